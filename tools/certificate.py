"Merge every causal language model that transformers can build, and write down what came out: nbs/recorded/certificate.csv."
import argparse, csv, json, os, re, subprocess, sys, tempfile, time, traceback, warnings
from pathlib import Path

for key, value in dict(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error").items():
    os.environ.setdefault(key, value)
warnings.simplefilter("ignore")
ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT/"nbs"/"recorded"/"certificate.csv"
COLUMNS = "architecture model_type parameters doctor folder reload live generation ours mergekit note".split()
WEIGHTS = .3, .7
PROMPTS = ["w5 w6 w7 w8", "w9 w10"]

# Settings that make a config small, by their names; whatever a class doesn't know is left out
SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=128, ffn_dim=48, ffn_hidden_size=48, n_inner=48, d_ff=48, dim_ff=48, d_kv=8, d_head=8,
    decoder_layers=2, decoder_ffn_dim=48, decoder_attention_heads=4, encoder_layers=2, encoder_ffn_dim=48,
    encoder_attention_heads=4, num_decoder_layers=2, num_layers=2, d_model=32, n_embd=32, n_head=4, n_layer=2, n_positions=128,
    attention_head_dim=8, rotary_dim=8, embedding_size=32, word_embed_proj_dim=32, d_inner=48, max_seq_len=128,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, num_experts_per_token=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, moe_shared_expert_intermediate_size=16, moe_k=2, moe_topk=2,
    expert_ffn_hidden_size=16, expert_hidden_dim=16, shared_intermediate_size=16, n_group=1, topk_group=1, n_groups=1,
    first_k_dense_replace=1, zero_expert_num=2, num_shared_experts=1, n_shared_experts=1,
    q_lora_rank=16, kv_lora_rank=16, o_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, qk_head_dim=16,
    index_head_dim=16, index_n_heads=2, index_topk=8, indexer_head_dim=16, indexer_num_heads=2,
    sliding_window=16, attention_window=16, attention_window_size=16, attention_chunk_size=16, window_size=16,
    state_size=8, mamba_d_state=8, ssm_state_size=8, conv_kernel=4, mamba_n_heads=4, mamba_num_heads=4, mamba_d_head=16,
    mamba_head_dim=16, mamba_n_groups=1, mamba_d_ssm=64, time_step_rank=4, mamba_dt_rank=4, chunk_size=8, mamba_chunk_size=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4,
    lru_width=32, attention_hidden_size=32, kv_channels=8, num_query_groups=4, swa_num_attention_heads=4, swa_head_dim=8,
    swa_num_key_value_heads=2, swa_v_head_dim=8, num_memory_blocks=1, adapter_rank=8, hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=64, laurel_rank=8, altup_num_inputs=2, num_kv_shared_layers=0, mem_blocks=1, num_heads=4,
    num_kv_heads=2, qk_dim_factor=.5, embedding_dim=32, num_blocks=2, conv_L_cache=3, block_dim=32, num_mtp_layers=0,
    num_nextn_predict_layers=0, use_mem_rope=False, bos_token_id=0, eos_token_id=1, pad_token_id=1, decoder_start_token_id=0,
    is_decoder=True)
# What a class needs beyond that, or where its parts must fit each other
SPECIAL = {k: dict(num_key_value_heads=4) for k in """axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite
glm_moe_dsa longcat_flash minicpm3 youtu""".split()}
SPECIAL |= {k: dict(num_hidden_layers=4) for k in "qwen3_next qwen3_5_text qwen3_5_moe_text lfm3 zamba2".split()}
SPECIAL |= dict(
    kimi_linear=dict(layer_types=["linear_attention", "full_attention"]),
    bailing_hybrid=dict(num_hidden_layers=6, num_key_value_heads=4), granitemoehybrid=dict(layer_types=["linear_attention", "full_attention"]),
    jamba=dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    gpt_neo=dict(attention_types=[[["global", "local"], 1]]), mamba2=dict(num_heads=8), zaya=dict(num_experts_per_tok=1),
    reformer=dict(axial_pos_shape=[8, 16], axial_pos_embds_dim=[16, 16], attn_layers=["local", "local"]),
    lfm2_moe=dict(layer_types=["full_attention", "conv"], num_dense_layers=1), recurrent_gemma=dict(num_hidden_layers=3),
    zamba=dict(num_hidden_layers=4), bamba=dict(attn_layer_indices=[1]), ministral=dict(layer_types=["full_attention"] * 2))
LARGEST = 12e6 # parameters; a type that can't be made smaller by the settings above is left out


def causal_types():
    "Model types that have a causal language model, with the class's name."
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names
    return {k: v for k, v in names.items()}


def tiny_config(kind):
    "A small config of one type."
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    cls = CONFIG_MAPPING[kind]
    for key in ("text_config", "decoder_config"):
        spec = getattr(cls, "sub_configs_defaults", {}).get(key)
        if spec and not any(k in fields_of(cls) for k in ("hidden_size", "n_embd", "d_model")):
            return nested(cls, kind)
    return cls(**small(cls, kind))


def fields_of(cls):
    "The settings that a config class has, by every name."
    import dataclasses
    return {f.name for f in dataclasses.fields(cls)} | set(cls.attribute_map)


def small(cls, kind):
    "Settings that make a class small."
    known, special = fields_of(cls), SPECIAL.get(kind, {})
    own = {k: cls.attribute_map.get(k, k) for k in known}
    given = {own[k]: v for k, v in SMALL.items() if k in known and cls.attribute_map.get(k, k) == k}
    given = {own[k]: v for k, v in SMALL.items() if k in known and k in cls.attribute_map} | given
    defaults = getattr(cls, "__dataclass_fields__", {})
    tokens = {k: 2 for k, f in defaults.items() if re.search("_token_(id|index)$", k) and k not in given and isinstance(f.default, int)}
    return tokens | given | special


def nested(cls, kind):
    "A small config whose text part is small."
    parts = {}
    for key, spec in cls.sub_configs_defaults.items():
        part = spec.get_config_class(spec.model_type) if "AutoConfig" in spec.config_class.__name__ else spec.config_class
        parts[key] = small(part, spec.model_type) | ({"model_type": spec.model_type} if "AutoConfig" in spec.config_class.__name__ else {})
    return cls(**small(cls, kind) | parts)


def tiny_model(kind, seed):
    "A random model; what starts as zero or one is made random too, so that a merge shows in every tensor."
    import torch, transformers
    torch.manual_seed(seed)
    cls = getattr(transformers, causal_types()[kind] if isinstance(causal_types()[kind], str) else causal_types()[kind][0])
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point(): p.add_(torch.randn_like(p) * .02)
        for m in model.modules(): # stays zero, as in training; some classes make it so when they load
            if isinstance(m, torch.nn.Embedding) and m.padding_idx is not None: m.weight[m.padding_idx] = 0
    return model


def write_pair(kind, folder):
    "Two random members of one architecture with a tokenizer, as folders `a` and `b`; how many parameters each has."
    from model_glue_nb.zoo.zoo import tiny_tokenizer
    for seed, name in enumerate("ab"):
        model = tiny_model(kind, seed)
        n = sum(p.numel() for p in model.parameters())
        if n > LARGEST: raise TooLarge(f"{n:,} parameters at the smallest")
        model.save_pretrained(folder/name)
        tiny_tokenizer(64).save_pretrained(folder/name)
    return n


class TooLarge(Exception): "Not a matter of merging."


class NothingToCompare(Exception): "A check that the other side fails."


def loaded(path):
    "A model as transformers loads it, and the names that were missing or not expected."
    import torch
    from transformers import AutoModelForCausalLM
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    return model.eval(), [*info["missing_keys"], *info["unexpected_keys"], *(str(x) for x in info["mismatched_keys"])]


def averaged(a, b):
    "The merge by torch, on the state dicts of two loaded models."
    a, b = a.state_dict(), b.state_dict()
    return {k: WEIGHTS[0] * a[k] + WEIGHTS[1] * b[k] if a[k].is_floating_point() else a[k]
            for k in a}


def difference(got, want):
    "Largest difference over all tensors; the first name that only one has."
    odd = got.keys() ^ want.keys()
    if odd: return f"only one has {sorted(odd)[0]}"
    for k in want:
        x, y = got[k].cpu(), want[k].cpu() # a live merge lies where it was made
        if x.shape != y.shape: return f"shape of {k}"
        near = ((x - y).abs() <= 1e-5) | (x == y) # infinite bounds are equal
        if not near.all(): return f"values of {k}"
    return ""


def generated(model, tokenizer):
    "Greedy continuations by transformers."
    out = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, num_beams=1)[0, ids.shape[1]:]
        out.append(tokenizer.decode(new, skip_special_tokens=True))
    return out


def judge(step, row, key):
    "Run one check; what it returns, or what it raises, is what is wrong."
    try: wrong = step()
    except NothingToCompare as e:
        row[key], row["note"] = "none", (row["note"] + f"; {key}: {e}").strip("; ")
        return
    except Exception as e: wrong = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    row[key] = "yes" if not wrong else "no"
    if wrong: row["note"] = (row["note"] + f"; {key}: {wrong}").strip("; ")[:300]


def certify(kind, folder):
    "One row: every check of one architecture, on a pair of random members."
    from model_glue_nb.mergeability.doctor import examine_zoo, pairs_table
    from model_glue_nb.merging.merge import merge
    from model_glue_nb.merging.recipes import recipe
    from model_glue_nb.zoo.zoo import read_zoo
    names = causal_types()[kind]
    row = dict.fromkeys(COLUMNS, "") | dict(architecture=names if isinstance(names, str) else names[0], model_type=kind)
    row["parameters"] = write_pair(kind, folder)
    pair = [str(folder/n) for n in "ab"]
    members, missing = zip(*(loaded(p) for p in pair))
    want, made = averaged(*members), {}
    how = recipe("linear", ["a", "b"], list(WEIGHTS))

    def doctor():
        cases = examine_zoo([folder/"a", folder/"b"])
        said = [x for c in cases for x in (*c.problems, *c.notes)]
        verdict = pairs_table(cases).iloc[0]
        return "; ".join(said) or ("" if verdict.verdict == "as is" else f"{verdict.verdict} {verdict.reason}")

    def to_folder():
        merge(how, read_zoo([folder/"a", folder/"b"]), folder/"out")
        made["model"], made["odd"] = loaded(folder/"out")
        return difference(made["model"].state_dict(), want)

    def reloads():
        allowed = {x for m in missing for x in m} # what members themselves lack
        return ", ".join(x for x in made["odd"] if x not in allowed)[:100]

    def live():
        model = merge(how, read_zoo([folder/"a", folder/"b"])).model
        return difference(model.state_dict(), made["model"].state_dict())

    def generation():
        from transformers import AutoTokenizer
        try: there = generated(made["model"], AutoTokenizer.from_pretrained(folder/"out"))
        except Exception as e:
            raise NothingToCompare(f"transformers' own generate ends with {type(e).__name__}") from None
        here = read_zoo([folder/"out"])["out"].load("cpu").generate(PROMPTS, 8)
        return "" if here == there else f"{here} instead of {there}"[:120]

    for key, step in dict(doctor=doctor, folder=to_folder, reload=reloads, live=live, generation=generation).items():
        judge(step, row, key)
    row["ours"] = "ok" if all(row[k] in ("yes", "none") for k in "doctor folder reload live generation".split()) else "no"
    return row, want


THEIRS = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
out = {}
for folder in sys.argv[2:]:
    models = [dict(model=f"{folder}/{n}", parameters=dict(weight=w)) for n, w in zip("ab", (.3, .7))]
    said = dict(merge_method="linear", models=models, dtype="float32")
    try: run_merge(MergeConfiguration.model_validate(said), f"{folder}/theirs", options=MergeOptions(quiet=True))
    except BaseException as e: out[folder] = f"{type(e).__name__}: {e}"[:200]
    json.dump(out, open(sys.argv[1], "w"))
"""


def by_mergekit(folders, scratch):
    "Merge every pair by mergekit, in a process of its own; what it raised, by folder."
    report = scratch/"mergekit.json"
    done = subprocess.run([sys.executable, "-c", THEIRS, str(report), *map(str, folders)], capture_output=True, text=True)
    found = json.loads(report.read_text()) if report.exists() else {}
    return {str(f): found.get(str(f), "" if (f/"theirs").is_dir() else f"ended with {done.returncode}") for f in folders}


def their_outcome(folder, raised, want):
    "What mergekit's folder is worth: ok, wrong, or the kind of error."
    if raised: return raised.split(":")[0]
    try:
        model, odd = loaded(folder/"theirs")
        return "ok" if not odd and not difference(model.state_dict(), want) else "wrong"
    except Exception as e: return f"unreadable ({type(e).__name__})"


def certify_all(kinds, mergekit=True, batch=12, report=print):
    "Rows of many architectures; those that can't be built are named."
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error
    disable_progress_bar()
    set_verbosity_error()
    rows, unbuilt = [], {}
    for at in range(0, len(kinds), batch):
        with tempfile.TemporaryDirectory() as d:
            done = {}
            for kind in kinds[at:at + batch]:
                folder = Path(d)/kind
                folder.mkdir()
                start = time.time()
                try: done[kind] = certify(kind, folder)
                except (Exception, SystemExit) as e:
                    unbuilt[kind] = f"{type(e).__name__}: {str(e).splitlines()[0][:100] if str(e) else ''}"
                    report(f"{kind}: not built: {unbuilt[kind]}")
                    continue
                row = done[kind][0]
                report(f"{kind}: {row['ours']} {time.time() - start:.1f} s {row['note']}")
            theirs = by_mergekit([Path(d)/k for k in done], Path(d)) if mergekit and done else {}
            for kind, (row, want) in done.items():
                if mergekit: row["mergekit"] = their_outcome(Path(d)/kind, theirs[str(Path(d)/kind)], want)
                rows.append(row)
    return rows, unbuilt


def joined_to_table(rows, unbuilt):
    "New rows in place of those of the same types."
    _, left_out, *lines = CSV.read_text(encoding="utf-8").splitlines()
    new = {r["model_type"] for r in rows}
    kept = [r for r in csv.DictReader(lines) if r["model_type"] not in new | unbuilt.keys()]
    named = re.findall(r"([\w.-]+) \(((?:[^()]|\([^()]*\))*)\)", left_out.removeprefix("# not built: "))
    return kept + rows, {k: why for k, why in named if k not in new} | unbuilt


def write_csv(rows, unbuilt):
    "The table, with how it was made and what is not in it."
    import importlib.metadata as meta
    versions = ", ".join(f"{p} {meta.version(p)}" for p in ("transformers", "mergekit", "torch"))
    left_out = "; ".join(f"{k} ({why})" for k, why in unbuilt.items())
    with open(CSV, "w", newline="", encoding="utf-8") as f:
        f.write(f"# make certificate; {versions}\n# not built: {left_out.replace(chr(10), ' ')}\n")
        table = csv.DictWriter(f, COLUMNS)
        table.writeheader()
        table.writerows(sorted(rows, key=lambda r: r["architecture"].lower()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="model types; none means all, and writes the table")
    parser.add_argument("--no-mergekit", action="store_true", help="leave mergekit's column empty")
    parser.add_argument("--update", action="store_true", help="put the rows of these types into the table")
    args = parser.parse_args()
    rows, unbuilt = certify_all(args.kinds or list(causal_types()), not args.no_mergekit)
    good, theirs = (sum(r[k] == "ok" for r in rows) for k in ("ours", "mergekit"))
    print(f"{len(rows)} architectures: {good} in order, mergekit {theirs}; {len(unbuilt)} not built")
    if args.update: rows, unbuilt = joined_to_table(rows, unbuilt)
    if args.update or not args.kinds: write_csv(rows, unbuilt)
    sys.exit(good < len(rows))
