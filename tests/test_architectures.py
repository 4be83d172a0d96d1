"Facts about architectures against transformers itself: the file is current, effective configs are what the classes build."
import json, subprocess, sys, warnings
from pathlib import Path

import pytest

from model_glue_nb.checkpoints.architectures import all_facts, architecture, effective_config, written_config
from model_glue_nb.checkpoints.meanings import meaning_differs

ROOT = Path(__file__).parent.parent
# What classes do with a config of a form that is not theirs (one RoPE where they have one per kind of layer, sizes that
# they count anew): not followed, and for none of these types is there a checkpoint of such a form
ODD = {"dots3_note", "dots3_note_text", "deepseek_v4", "cohere2_moe", "cohere_compass_text", "zaya", "mellum", "laguna", "beam", "lfm3",
       "mimo_v2_flash", "gemma4_text", "gemma4_unified_text", "dbrx", "bailing_hybrid", "mistral4", "longcat_flash", "hrm_text",
       "zamba2", "udop", "blip", "pix2struct", "recurrent_gemma", "granite_swa", "granitemoe_swa", "hunyuan_vl"}


@pytest.fixture(scope="module")
def classes():
    "Config classes by model type, as `tools/architectures.py` finds them."
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT/"tools"))
    try: from architectures import config_types
    finally: sys.path.pop(0)
    models, found = config_types()
    return {k: found[k] for k in models if k in all_facts()["types"]}


def test_the_file_is_of_the_installed_version():
    import transformers
    assert all_facts()["about"]["transformers"] == transformers.__version__, "Run: python tools/architectures.py"


@pytest.mark.slow
def test_the_file_is_what_transformers_says():
    done = subprocess.run([sys.executable, "tools/architectures.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_sample_of_the_file_is_what_transformers_says(classes):
    sys.path.insert(0, str(ROOT/"tools"))
    try: import architectures as tool
    finally: sys.path.pop(0)
    for kind in ("llama", "mixtral", "qwen2", "gemma3_text", "gpt_neox", "qwen3_next", "granitemoe", "cohere2"):
        cls = classes.get(kind) or tool.config_types()[1][kind]
        said = json.loads(json.dumps(tool.facts(kind, cls)))
        stored = {k: v for k, v in architecture(kind).items() if k not in ("causal", "image_text")}
        assert said == stored, f"{kind} has changed. Run: python tools/architectures.py"


def test_it_is_small_and_read_without_torch():
    assert (ROOT/"model_glue_nb/data/architectures.tsv").stat().st_size < 1_000_000
    code = ("import sys; from model_glue_nb.checkpoints.architectures import effective_config; effective_config({'model_type': 'llama'});"
            "sys.exit(bool({'torch', 'transformers', 'pandas'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


VARIANTS = {
    "nothing": {}, "small": dict(hidden_size=64, num_attention_heads=4), "theta": dict(rope_theta=123456.0),
    "linear": dict(rope_scaling=dict(type="linear", factor=2.0)), "layers": dict(num_hidden_layers=5),
    "yarn": dict(rope_scaling=dict(rope_type="yarn", factor=4.0), rope_theta=5e5, max_position_embeddings=256),
    "new": dict(rope_parameters=dict(rope_type="default", rope_theta=77.0)), "tied": dict(tie_word_embeddings=True),
}


def built(cls, given):
    "What a class makes of a config; None where it refuses it."
    try: return json.loads(json.dumps(cls(**json.loads(json.dumps(given))).to_dict(), default=str))
    except Exception: return None


def compared(kind, given, want):
    "Settings in which an effective config isn't what the class builds."
    got = effective_config(dict(model_type=kind) | given)
    facts, wrong = architecture(kind), []
    pairs = [("", facts, got, want)]
    pairs += [(k, architecture(got[k].get("model_type")) or {}, got[k], want[k])
              for k in facts.get("parts", {})
              if isinstance(got.get(k), dict) and isinstance(want.get(k), dict)]
    for part, facts, g, w in pairs:
        for key in {*facts.get("defaults", {}), *facts.get("derived", {}), "rope_parameters"}:
            if key in facts.get("parts", {}) or key.startswith("_") or key not in w: continue
            if key not in g and key in facts.get("derived", {}): continue # only the class knows
            x, y = g.get(key), w[key]
            if key == "rope_parameters" and isinstance(x, dict): x, y = without_type(x), without_type(y or {})
            by_code = key in ("head_dim", "num_key_value_heads") and y is None # the model's code derives it
            lifted = not part and key in got.get(facts.get("text"), {})
            if x != y and (x or y) and not by_code and not lifted: wrong.append((f"{part}.{key}", x, y))
    return wrong


def without_type(rope):
    "RoPE without the old word for its kind."
    return {k: without_type(v) if isinstance(v, dict) else v for k, v in rope.items() if k != "type"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_effective_configs_are_what_the_classes_build(classes, variant):
    given, wrong, n = VARIANTS[variant], {}, 0
    for kind, cls in classes.items():
        if "rope_parameters" in given or "rope_scaling" in given or "rope_theta" in given:
            if (architecture(kind).get("rope") or {"layers": 0}).keys() & {"layers"} and variant == "new":
                continue
            if architecture(kind).get("rope") is None: continue
        if kind in ODD or (want := built(cls, given)) is None: continue
        n += 1
        if bad := compared(kind, given, want): wrong[kind] = bad
    print(variant, n, "compared")
    assert n > 20 and not wrong, wrong


# Written by transformers 4 and by transformers 5, for the same model
ERAS = [
    ("llama", dict(rope_theta=5e5, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                                     original_max_position_embeddings=64), num_key_value_heads=2)),
    ("qwen2", dict(sliding_window=16, use_sliding_window=False, max_window_layers=1)),
    ("qwen2", dict(sliding_window=16, use_sliding_window=True, max_window_layers=1)),
    ("gpt_neox", dict(rotary_pct=.5, rotary_emb_base=5000)),
    ("gemma3_text", dict(rope_theta=1e6, rope_local_base_freq=2e4, sliding_window_pattern=2)),
    ("mistral", dict(rope_theta=1e6, sliding_window=None)), ("phi3", dict(rope_theta=2e4, partial_rotary_factor=.5)),
    ("stablelm", dict(partial_rotary_factor=.5, rope_theta=3e4)), ("olmo3", dict(rope_theta=5e5)),
    ("qwen3_next", dict(full_attention_interval=2)), ("cohere2", dict(sliding_window_pattern=2)),
    ("qwen2_5_vl", dict(rope_theta=5e5, rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2]), hidden_size=32, num_attention_heads=4)),
    ("gpt2", dict(n_embd=32, n_head=4, n_layer=2)),
    ("falcon", dict(rope_theta=2e4)), ("granite", dict(embedding_multiplier=12.0)),
]


@pytest.mark.parametrize("kind, old", ERAS, ids=[f"{k}-{i}" for i, (k, _) in enumerate(ERAS)])
def test_both_eras_mean_the_same(kind, old):
    from transformers import AutoConfig
    new = json.loads(AutoConfig.for_model(kind, **json.loads(json.dumps(old))).to_json_string(use_diff=False))
    old = dict(model_type=kind) | old
    assert meaning_differs(old, new) == []
    assert meaning_differs(new, old) == []
    for written in (written_config(old), written_config(new)): # read again, by the class, it is the same
        assert meaning_differs(old, written) == []
        again = json.loads(json.dumps(written))
        again.pop("model_type")
        assert meaning_differs(new, json.loads(AutoConfig.for_model(kind, **again).to_json_string(use_diff=False))) == []


# Each of these computes something else with equal shapes
CHANGES = [
    ("llama", dict(rope_theta=5e5)), ("llama", dict(rms_norm_eps=1e-3)), ("llama", dict(hidden_act="gelu")),
    ("llama", dict(num_attention_heads=8, head_dim=128)), ("llama", dict(num_key_value_heads=4)),
    ("llama", dict(rope_scaling=dict(rope_type="linear", factor=2.0))), ("llama", dict(tie_word_embeddings=True)),
    ("llama", dict(attention_bias=True)), ("mistral", dict(sliding_window=None)), ("gemma2", dict(attn_logit_softcapping=None)),
    ("gemma2", dict(query_pre_attn_scalar=8)), ("granite", dict(residual_multiplier=.5)), ("granite", dict(logits_scaling=8.0)),
    ("gpt_neox", dict(use_parallel_residual=False)), ("gpt_neox", dict(rotary_pct=1.0)), ("mixtral", dict(num_experts_per_tok=1)),
    ("qwen3_moe", dict(norm_topk_prob=True)), ("gemma3_text", dict(rope_local_base_freq=5e4)), ("gemma3_text", dict(sliding_window=8)),
    ("gpt2", dict(activation_function="relu")), ("qwen2_5_vl", dict(text_config=dict(rope_theta=7.0))),
    ("cohere", dict(logit_scale=1.0)), ("deepseek_v3", dict(routed_scaling_factor=1.0)), ("mamba2", dict(time_step_limit=[0.0, 1.0])),
]


@pytest.mark.parametrize("kind, change", CHANGES, ids=[f"{k}-{next(iter(c))}" for k, c in CHANGES])
def test_what_computes_differently_is_named(kind, change):
    said = meaning_differs(dict(model_type=kind), dict(model_type=kind) | change, ("'a'", "'b'"))
    assert said and all("'a'" in s and "'b'" in s for s in said), said
    assert meaning_differs(dict(model_type=kind) | change, dict(model_type=kind) | change) == []


def test_what_computes_the_same_is_not():
    same = dict(use_cache=False, torch_dtype="float16", bos_token_id=9, attention_dropout=.2, initializer_range=.5, _name_or_path="x",
                transformers_version="4.1", architectures=["Other"], max_position_embeddings=9, pad_token_id=3, unsloth_fixed=True)
    assert meaning_differs(dict(model_type="llama"), dict(model_type="llama") | same) == []


@pytest.mark.parametrize("odd",
                         [None, 7, "x", [], {}, [1], {"a": None},
                          True, -1, 1e400, {"rope_type": []}, {"full_attention": 7}])
def test_nothing_in_a_config_raises(odd):
    for kind in ("llama", "gemma3_text", "qwen2_5_vl", "gemma3", "gpt_neox", "phi3", "qwen3_next", "not-known", odd):
        for key in ("rope_scaling", "rope_parameters", "hidden_size", "num_attention_heads", "num_hidden_layers", "layer_types",
                    "text_config", "architectures", "rope_theta", "head_dim"):
            config = {"model_type": kind, key: odd}
            effective_config(config)
            written_config(config)
            meaning_differs(config, {"model_type": kind})
