"Mixtures as others open them: plain formats of hybrids, a shared expert that servers split, tokenizers without questions, state-space experts."
import json, shutil, subprocess, sys

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_glue_nb.benchmarking.harness import as_lm_eval
from model_glue_nb.mixing import modeling # registers the class
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.zoo.zoo import Zoo, open_model, read_zoo, tiny_zoo

LINEAR = dict(name="prompt", positive=["w3 w4 w5", "w20 w21"])
MLPS = dict(level="ffn", input="token", top_k=2, base="base")

@pytest.fixture(autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad(): yield
    torch.set_num_threads(before)

def load(model):
    return AutoModelForCausalLM.from_pretrained(getattr(model, "path", model), dtype=torch.float32, trust_remote_code=False).eval()
def tokens(n=4, length=30):
    return torch.randint(3, 64, (n, length), generator=torch.Generator().manual_seed(0))
def close(a, b, eps=1e-5):
    assert a.shape == b.shape and (a - b).abs().max() < eps, f"differ by {(a - b).abs().max():.1e}"
def rewrite(folder, drop=(), **more):
    c = {k: v for k, v in json.loads((folder/"config.json").read_text()).items() if k not in drop}
    (folder/"config.json").write_text(json.dumps(c | more))

# Hybrids in plain formats

def both(zoo, root, **spec):
    "The same mixture in a plain format and in ours."
    return [mix(MixtureSpec(("a", "b"), LINEAR, format=f, **MLPS | spec), zoo, root/f) for f in ("auto", "own")]

@pytest.mark.parametrize("architecture, more", [("Llama", {}),
                                                ("Llama", dict(head_dim=4, rms_norm_eps=1e-3)),
                                                ("Llama", dict(tie_word_embeddings=True)),
                                                ("Llama", dict(hidden_act="gelu")),
    ("Llama", dict(rope_parameters=dict(rope_type="yarn", factor=4., rope_theta=5e5, original_max_position_embeddings=32))),
    ("Mistral", dict(sliding_window=None)), ("Mistral", dict(sliding_window=128)), ("Qwen2", {})])
@pytest.mark.parametrize("K", [1, 2])
def test_a_hybrid_is_a_plain_qwen2_moe(tmp_path, architecture, more, K):
    zoo = tiny_zoo(tmp_path, ["base", "a", "b"], architecture, "float32", **dict(num_hidden_layers=3) | more)
    plain, own = both(zoo, tmp_path, dense_layers=K)
    assert plain.architecture == "Qwen2MoeForCausalLM" and own.architecture == "MixtureForCausalLM" and not (plain.path/"modeling.py").exists()
    model, said = AutoModelForCausalLM.from_pretrained(plain.path, dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    close(model.eval()(input_ids=tokens()).logits, load(own)(input_ids=tokens()).logits)
    assert plain.config["mlp_only_layers"] == list(range(K)) and not plain.config.get("use_sliding_window")

@pytest.mark.parametrize("key", ["rope_parameters", "rms_norm_eps", "hidden_act", "attention_bias", "tie_word_embeddings", "head_dim", "max_position_embeddings", "num_key_value_heads", "vocab_size"])
def test_what_llama_leaves_unsaid_stays_llamas_in_a_hybrid(tmp_path, key):
    more = dict(num_key_value_heads=4) if key == "num_key_value_heads" else dict(vocab_size=32000) if key == "vocab_size" else {}
    zoo = tiny_zoo(tmp_path, ["base", "a", "b"], dtype="float32", **more)
    for m in zoo: rewrite(m.path, [key])
    plain = mix(MixtureSpec(("a", "b"), LINEAR, dense_layers=1, **MLPS),
                read_zoo([m.path for m in zoo]), tmp_path/"m", verify=True)
    assert plain.architecture == "Qwen2MoeForCausalLM"

@pytest.mark.parametrize("architecture, more", [("Llama", dict(attention_bias=True)),
                                                ("Llama", dict(mlp_bias=True)),
                                                ("Mistral", dict(sliding_window=6)),
    ("Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1))])
def test_what_qwen2_moe_cannot_say_stays_in_ours(tmp_path, architecture, more):
    zoo = tiny_zoo(tmp_path, ["base", "a", "b"], architecture, "float32", **more)
    assert both(zoo, tmp_path, dense_layers=1)[0].architecture == "MixtureForCausalLM"

@pytest.mark.parametrize("architecture, K", [("Qwen2", 0), ("Llama", 1)])
def test_servers_can_split_every_expert(tmp_path, architecture, K):
    "Column- and row-parallel layers as servers cut them: each device has a whole slice, and the slices add up."
    zoo = tiny_zoo(tmp_path, ["base", "a", "b"], architecture, "float32")
    m = mix(MixtureSpec(("a", "b"), LINEAR, dense_layers=K, **MLPS), zoo, tmp_path/"m")
    width = m.config["shared_expert_intermediate_size"]
    for devices in (1, 2, 4, 8, 16, 32, 64): assert width % devices == 0 and width // devices >= 1
    shared = load(m).model.layers[1].mlp.shared_expert
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for p in shared.parameters():
        assert not p.any()
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    cut = [slice(i * width // 4, (i + 1) * width // 4) for i in range(4)]
    parts = [torch.nn.functional.silu(x @ shared.gate_proj.weight[c].T) * (x @ shared.up_proj.weight[c].T)
             @ shared.down_proj.weight[:, c].T
             for c in cut]
    assert shared.gate_proj.weight.shape == (width, 32)
    close(sum(parts), shared(x), 1e-3)

# Tokenizers

def test_a_tokenizer_loads_without_a_question(tmp_path):
    "In a process without this package, with somebody at the keyboard who must not be asked."
    zoo = tiny_zoo(tmp_path, ["base", "a", "b"], dtype="float32")
    mix(MixtureSpec(("a", "b"), LINEAR, level="block", base="base"), zoo, tmp_path/"ours")
    mix(MixtureSpec(("a", "b"), LINEAR, **MLPS), zoo, tmp_path/"plain")
    code = """if True:
        import builtins, sys; sys.modules["model_glue_nb"] = None
        def asked(*args): sys.exit("somebody is asked: " + str(args))
        builtins.input = asked
        from transformers import AutoTokenizer
        want = AutoTokenizer.from_pretrained("base")
        for how in (dict(pretrained_model_name_or_path="ours", trust_remote_code=False), dict(pretrained_model_name_or_path="plain")):
            got = AutoTokenizer.from_pretrained(**how)
            assert type(got) is type(want) and got("w3 w9 w63")["input_ids"] == want("w3 w9 w63")["input_ids"] and got.special_tokens_map == want.special_tokens_map"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "AutoTokenizer.from_pretrained(folder, trust_remote_code=False)" in (tmp_path/"ours"/"README.md").read_text()

def test_our_own_loading_asks_nobody(tmp_path, monkeypatch):
    zoo = tiny_zoo(tmp_path, ["base", "a", "b"], dtype="float32")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or "n")
    for level in ("model", "block"):
        live = mix(MixtureSpec(("a", "b"), LINEAR, level=level, base="base"), zoo, tmp_path/level).load()
        live.generate(["w3 w4"], 2)
        AutoTokenizer.from_pretrained(tmp_path/level) # the class is known here
    assert not asked

# State-space experts

@pytest.fixture(scope="module")
def states(tmp_path_factory):
    "Three kinds of memory: none but a state, a state of two kinds, keys and values."
    root = tmp_path_factory.mktemp("states")
    small = dict(state_size=8, time_step_rank=4)
    with torch.no_grad():
        tiny_zoo(root, ["mamba"], "Mamba", "float32", **small)
        tiny_zoo(root, ["llama"], dtype="float32")
        tiny_zoo(root, ["mamba2"], "Mamba2", "float32", state_size=8, num_heads=8, head_dim=8, expand=2, n_groups=1, chunk_size=8)
    return read_zoo([root/n for n in ("mamba", "llama", "mamba2")])

@pytest.mark.parametrize("router", [dict(name="random"), dict(name="prompt", positive=["w3 w4", "w20 w21", "w40 w41"])])
@pytest.mark.parametrize("features", ["embedding", "hidden"])
def test_state_space_experts_answer_as_they_do_alone(states, tmp_path, router, features):
    experts = ("mamba", "llama", "mamba2")
    texts = [f"w{i} w{i + 1} w{i + 5}" for i in range(3, 21)]
    for encoder in experts[::2] if router["name"] == "prompt" else (None,):
        live = mix(MixtureSpec(experts, router, features=features, prompt_encoder=encoder, max_resident=2), states, tmp_path/f"m{encoder}").load()
        route = live.route(texts)
        alone = {e: states[e].load() for e in experts}
        want = [alone[experts[e]].generate([p], 5)[0] for e, p in zip(route, texts)]
        assert live.generate(texts, 5) == want and len(set(route)) > 1
        assert ["".join(live.stream(p, 5)) for p in texts] == want
        asked = [Instance("loglikelihood", {}, (p, f" w{i + 7}"), 0) for i, p in enumerate(texts)]
        said = [as_lm_eval(alone[experts[e]], 64).loglikelihood([r], disable_tqdm=True)[0][0]
                for e, r in zip(route, asked)]
        np.testing.assert_allclose([x for x, _ in live.lm_eval().loglikelihood(asked)], said, atol=1e-4)

def test_state_space_experts_share_no_checkpoint(states, tmp_path):
    from model_glue_nb.core import InputError
    base = open_model(shutil.copytree(states["mamba"].path, tmp_path/"base"))
    zoo = Zoo((base, *states))
    with pytest.raises(InputError, match="'base' is a MambaForCausalLM; mixed in one checkpoint are"):
        mix(MixtureSpec(("mamba",), dict(name="random"), "block", "base"), zoo, tmp_path/"m")
