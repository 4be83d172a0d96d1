"Parity with mergekit 0.1.5: the same YAML files, merged there in one process and here; deliberate differences are tests of their own."
import json, os, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.recipes import MergeRecipe
from model_glue_nb.zoo.sources import tokens_of
from model_glue_nb.zoo.zoo import open_model, tiny_zoo

pytest.importorskip("mergekit")
F32 = dict(dtype="float32", out_dtype="bfloat16")
SIZE = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4) # for what is drawn: mergekit draws tensors of one shape alike
ARCHITECTURES = dict(Llama={}, Qwen2=dict(tie_word_embeddings=True, shards=True),
                     Mistral=dict(shards=True), GPTNeoX={}, Gemma=dict(tie_word_embeddings=True))
THEIRS = """
import sys, traceback, yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for f in sorted(Path(sys.argv[1]).glob("*/*.yaml")):
    try: run_merge(MergeConfiguration.model_validate(yaml.safe_load(f.read_text())), str(f.with_suffix(".theirs")),
                   options=MergeOptions(quiet=True, random_seed=0, lora_merge_cache=str(f.parent/"cache")))
    except Exception: f.with_suffix(".failed").write_text(traceback.format_exc())
"""

def methods(m, b):
    "Every method that both have and that draws nothing, with uneven numbers, by name; `m` makes a source, `b` is the base."
    def pair(**p):
        return [m("a", weight=.31, **{k: v[0] for k, v in p.items()}),
                m("b", weight=.57, **{k: v[1] for k, v in p.items()})]
    three = [m("a", weight=.31), m("b", weight=.57), m("c", weight=.83)]
    sparse = dict(density=(.3, .6))
    crumbs = sparse | dict(gamma=(.05, .02))
    return dict(
        linear=dict(models=pair()),
        slerp=dict(models=[m("a"), m("b")], base_model=m("a")["model"], parameters=dict(t=.37)),
        nuslerp=dict(models=pair(), base_model=b),
        multislerp=dict(models=three),
        karcher=dict(models=[m("a"), m("b"), m("c")]),
        task_arithmetic=dict(models=pair(), base_model=b, parameters={"lambda": .7}),
        ties=dict(models=pair(**sparse), base_model=b),
        breadcrumbs=dict(models=pair(**crumbs), base_model=b),
        breadcrumbs_ties=dict(models=pair(**crumbs), base_model=b),
        model_stock=dict(models=[m("a"), m("b"), m("c")], base_model=b),
        sce=dict(models=[m("a"), m("b"), m("c")], base_model=b, parameters=dict(select_topk=.4)),
        nearswap=dict(models=[m("a")], base_model=b, parameters=dict(t=.01)),
        passthrough=dict(models=[m("a")], parameters=dict(scale=.7)))

def precedence(m, s, b):
    "Scalars, gradients, filters and slices at every level; `s` makes the source of a slice."
    by_name = [dict(filter="self_attn", value=.23), dict(filter="mlp", value=[.11, .97]), dict(value=.41)]
    turns = [dict(filter="self_attn", value=[0, .53, .31, .71, 1]),
             dict(filter="mlp", value=[1, .53, .71, .31, 0]),
             dict(value=.47)]
    only = [dict(filter="self_attn", value=.23)]
    one = dict(merge_method="linear")
    over = dict(merge_method="ties", base_model=b)
    def slerp(*names, **p):
        return dict(merge_method="slerp", models=[m(n) for n in names], base_model=m("a")["model"], parameters=p)
    return dict(
        filters=one
                | dict(models=[m("a", weight=by_name), m("b", weight=.57), m("c")], parameters=dict(weight=.73)),
        no_match=one | dict(models=[m("a", weight=only), m("b", weight=.57)], parameters=dict(weight=.73)),
        no_match_filters=one
                         | dict(models=[m("a", weight=only), m("b", weight=.57)],
                                parameters=dict(weight=[dict(filter="mlp", value=3.1), dict(value=2.3)])),
        star=one | dict(models=[m("a", weight=[dict(filter="*", value=.23)]), m("b", weight=.57)]),
        gradients=one
                  | dict(models=[m("a", weight=[0, .53, 1.1]), m("b", weight=[1, .58, .21])]),
        not_normalised=one | dict(models=[m("a", weight=.31), m("b", weight=.57)], parameters=dict(normalize=False)),
        one_dtype=dict(merge_method="linear", models=[m("a", weight=.31), m("b", weight=.57)], dtype="float32", out_dtype=None),
        slerp_by_name=slerp("a", "b", t=turns), slerp_base_second=slerp("b", "a", t=.23),
        slerp_slices=dict(merge_method="slerp",
                          slices=[dict(sources=[s("a", 0, 3), s("b", 0, 3)])],
                          base_model=m("a")["model"],
                          parameters=dict(t=[0, .53, 1])),
        levels=one
               | dict(slices=[dict(sources=[s("a", 0, 2, weight=.37), s("b", 1, 3)],
                                   parameters=dict(weight=.91)),
                              dict(sources=[s("a", 2, 3), s("b", 0, 1, weight=.23)])],
                      parameters=dict(weight=.61)),
        gradients_in_slices=one
                            | dict(slices=[dict(sources=[s("a", 0, 2, weight=[.31, .97]), s("b", 1, 3)],
                                                parameters=dict(weight=[.23, .71])),
                                           dict(sources=[s("a", 0, 3, weight=[1, 2.3]), s("b", 0, 3)])],
                                   parameters=dict(weight=[.11, .61])),
        stack=dict(merge_method="passthrough",
                   slices=[dict(sources=[s("a", 0, 2)]), dict(sources=[s("b", 1, 3)])]),
        interleave=dict(merge_method="passthrough",
                        slices=[dict(sources=[s(n, i, i + 1)]) for i in range(3) for n in "ab"]),
        stack_scaled=dict(merge_method="passthrough",
                          slices=[dict(sources=[s("a", 0, 2)]),
                                  dict(sources=[s("b", 1, 3, scale=[dict(filter="o_proj", value=0), dict(value=1)])])]),
        ties_levels=over
                    | dict(models=[m("a", weight=[.31, .53],
                                     density=[dict(filter="mlp", value=.31), dict(value=.83)]),
                                   m("b", density=.61), m("base")],
                           parameters={"lambda": [.53, 1.1], "weight": .41, "normalize": False, "int8_mask": True}),
        ties_slices=over
                    | dict(slices=[dict(
                        sources=[s("base", 0, 1),
                                 s("a", 0, 1, weight=.53, density=.53),
                                 s("b", 0, 1, weight=.31, density=.41)]),
                                   dict(sources=[s("base", 1, 3),
                                                 s("a", 1, 3, weight=.11, density=.53),
                                                 s("b", 1, 3, weight=.31, density=.41)],
                                        parameters={"lambda": .53})],
                           parameters={"lambda": 1.2}),
        ties_defaults=over | dict(models=[m("a", weight=.31), m("b", weight=.57)]),
        normalised=dict(merge_method="task_arithmetic",
                        models=[m("a", weight=.31), m("b", weight=.57)],
                        base_model=b, parameters=dict(normalize=True)),
        base_among_models=dict(merge_method="model_stock", models=[m("base"), m("a"), m("b")], base_model=b),
        dare_keeps_all=dict(merge_method="dare_ties", models=[m("a", weight=.31), m("b", weight=.57)], base_model=b))

TIES = {"ties", "breadcrumbs", "breadcrumbs_ties", "sce", "ties_levels", "ties_slices"} # equal magnitudes may meet a threshold
RANDOM = {f"{k}_{r}": dict(merge_method=k, r=r) for k in ("dare_linear", "dare_ties", "della", "della_linear") for r in ("true", "false")}
TOKENIZERS = dict(union="union", base="base", named=None, padded="union")

def prepare(room, architecture, shards=False, **config):
    "A base and three models near it, norms and biases too; sharded by the hub's own code; NeoX with the buffers that old files have."
    import torch
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file, save_file
    zoo = tiny_zoo(room, ["base", "a", "b", "c"], architecture, **dict(num_hidden_layers=3) | config)
    base = {k: v.float() for k, v in load_file(zoo["base"].path/"model.safetensors").items()}
    for i, m in enumerate(zoo):
        r = np.random.default_rng(i)
        file = m.path/"model.safetensors" # numpy's: torch's draws would be those of mergekit's masks
        t = {k: (v + .01 * torch.from_numpy(r.normal(size=v.shape)).float()).bfloat16()
             for k, v in base.items()}
        if architecture == "GPTNeoX":
            for n in range(3):
                at = f"gpt_neox.layers.{n}.attention."
                t |= {at + "bias": torch.ones(1, 1, 16, 16).tril(),
                      at + "masked_bias": torch.tensor(-1e9), at + "rotary_emb.inv_freq": torch.rand(2)}
        file.unlink()
        if shards: save_torch_state_dict(t, m.path, max_shard_size=20_000)
        else: save_file(t, file, dict(format="pt"))

def write_cases(room):
    "YAML files for one architecture's folder."
    def m(n, **p): return dict(model=str(room/n)) | (dict(parameters=p) if p else {})
    def s(n, i, j, **p): return m(n, **p) | dict(layer_range=[i, j])
    b = str(room/"base")
    cases = {k: dict(merge_method=k) | c for k, c in methods(m, b).items()}
    if room.name == "Llama":
        cases |= precedence(m, s, b)
        cases["karcher_weights"] = dict(merge_method="karcher", models=[m("a", weight=.31), m("b", weight=.57)])
        cases["no_weight"] = dict(merge_method="linear", models=[m("a"), m("b")])
        for n in ("twin", "other_twin", "third"): shutil.copytree(room/"base", room/n)
        cases["zero"] = dict(merge_method="multislerp",
                             models=[m("twin", weight=.31), m("other_twin", weight=.57), m("third", weight=.83)],
                             base_model=b)
        cases["in_bf16"] = cases["task_arithmetic"] | dict(dtype="bfloat16", out_dtype=None)
        cases["crumbs_keep_all"] = dict(merge_method="breadcrumbs", models=[m("a", weight=.31)], base_model=b, parameters=dict(gamma=.05))
        cases["adapter"] = dict(merge_method="linear", models=[dict(model=f"{room/'a'}+{room/'lora'}", parameters=dict(weight=.31)), m("b", weight=.57)])
    if room.name == "drawn":
        cases = {k: dict(merge_method=c["merge_method"],
                         models=[m("a", weight=1., density=.4)], base_model=b,
                         parameters=dict(rescale=c["r"] == "true"), out_dtype="float32")
                 for k, c in RANDOM.items()}
    for name, c in cases.items():
        (room/f"{name}.yaml").write_text(yaml.safe_dump({k: v for k, v in (F32 | c).items() if v is not None}))

def write_tokenizers(room):
    "Models with other vocabularies: more words, and the same words in another order."
    for n, size in dict(base=64, a=70, b=80).items(): tiny_zoo(room, [n], vocab_size=size, seed=size)
    file = room/"b"/"tokenizer.json"
    t = json.loads(file.read_text())
    v = t["model"]["vocab"]
    words = [k for k in v if k[0] == "w"]
    v.update(zip(words, [v[k] for k in reversed(words)]))
    file.write_text(json.dumps(t))
    two = [dict(model=str(room/n), parameters=dict(weight=w))
           for n, w in (("a", .31), ("b", .57))]
    for name, source in TOKENIZERS.items():
        t = dict(source=source or str(room/"b")) | (dict(pad_to_multiple_of=64) if name == "padded" else {})
        d = dict(merge_method="task_arithmetic", models=two, base_model=str(room/"base"), tokenizer=t) | F32
        (room/f"{name}.yaml").write_text(yaml.safe_dump(d))

def write_adapter(room):
    "A LoRA adapter written by PEFT, with patterns."
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    c = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={r"layers\.0\.self_attn\.q_proj": 2}, alpha_pattern={"down_proj": 3}, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(room/"a"), c)
    torch.manual_seed(0)
    for n, p in model.named_parameters():
        if "lora_" in n: torch.nn.init.normal_(p, std=.1)
    model.save_pretrained(room/"lora")

@pytest.fixture(scope="module")
def room(tmp_path_factory):
    "All cases of all architectures, merged by one mergekit process."
    room = tmp_path_factory.mktemp("parity")
    for name, c in ARCHITECTURES.items():
        prepare(room/name, name, **c)
        write_cases(room/name) if name != "Llama" else None
    write_adapter(room/"Llama")
    write_cases(room/"Llama")
    write_tokenizers(room/"words")
    prepare(room/"drawn", "Llama", **SIZE)
    write_cases(room/"drawn")
    in_mergekit(sys.executable, "-c", THEIRS, room)
    return room

def in_mergekit(*command):
    "A process of mergekit's, on the processor and without a network."
    env = os.environ | dict(HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="passive", CUDA_VISIBLE_DEVICES="")
    subprocess.run(command, check=True, capture_output=True, env=env)

def both(room, name, lenient=False):
    "Our merge and theirs."
    file = room/f"{name}.yaml"
    failed = file.with_suffix(".failed")
    assert not failed.exists(), failed.read_text()[-800:]
    return merge(MergeRecipe.from_yaml(file, lenient), None, file.with_suffix(".ours"), overwrite=True), open_model(file.with_suffix(".theirs"))

def same(ours, theirs):
    "Share of equal values, and of those that differ by a unit in the last place at most; −0 is 0."
    def whole(x): return np.where(x == 0x8000, 0, x).astype(np.int64)
    weights = [k for k, t in ours.tensors.items() if t.dtype == "BF16" and k in theirs.tensors]
    off = np.concatenate([np.abs(whole(ours.raw(k)) - whole(theirs.raw(k))).reshape(-1)
                          for k in weights])
    return (off == 0).mean(), (off <= 1).mean()

def check(room, name):
    ours, theirs = both(room, name)
    equal, near = same(ours, theirs)
    assert set(theirs.tensors) == set(ours.tensors), set(theirs.tensors) ^ set(ours.tensors)
    assert {k: t.shape for k, t in ours.tensors.items()} == {k: t.shape for k, t in theirs.tensors.items()}
    if name in TIES: assert equal >= .99
    else: assert equal >= .999 and near >= .9999, (equal, near)

@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", methods(lambda n, **p: dict(model=n), ""))
def test_methods(method, architecture, room): check(room/architecture, method)

@pytest.mark.parametrize("case", precedence(lambda n, **p: dict(model=n), lambda *a, **p: {}, ""))
def test_precedence(case, room):
    if case == "one_dtype": # the stored type follows dtype
        ours, theirs = both(room/"Llama", case)
        k = "model.layers.1.mlp.up_proj.weight"
        assert (ours.tensors[k].dtype == theirs.tensors[k].dtype == "F32"
                and np.abs(ours.values(k) - theirs.values(k)).max() < 1e-7)
    else: check(room/"Llama", case)

def test_an_adapter_that_peft_wrote(room):
    "mergekit has PEFT write the adapted model in its own type first; here it stays in float32 until the end."
    from safetensors.numpy import load_file
    ours, theirs = both(room/"Llama", "adapter")
    a, b, lora = open_model(room/"Llama"/"a"), open_model(room/"Llama"/"b"), load_file(room/"Llama"/"lora"/"adapter_model.safetensors")
    for k in ours.tensors:
        key = f"base_model.model.{k.removesuffix('.weight')}.lora_%s.weight"
        x = a.values(k).astype(np.float64)
        if key % "A" in lora:
            x += ((3 if "down_proj" in k else 8) / (len(lora[key % "A"]))
                  * lora[key % "B"].astype(np.float64) @ lora[key % "A"])
        right = (.31 * x + .57 * b.values(k)) / .88
        step = 2.0**-8 * np.abs(np.stack([right, x])).max(0)
        assert (np.abs(ours.values(k) - right) <= 2.0**-8 * np.abs(right) + 1e-9).all(), k # the nearest bf16
        assert (np.abs(theirs.values(k) - right) <= 2 * step).all(), k
    assert sum("lora_A" in k for k in lora) == 6 and open_model(room/"Llama"/"a").n_layers == 3

@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(case, room):
    "Rows belong to tokens, in whatever order a union lists them; the other tensors are the same."
    ours, theirs = both(room/"words", case)
    a, b = tokens_of(ours), tokens_of(theirs)
    assert set(a) == set(b) and ours.config["vocab_size"] == theirs.config["vocab_size"] and (a == b or TOKENIZERS[case] == "union")
    for k in ("model.embed_tokens.weight", "lm_head.weight"):
        assert ours.tensors[k].shape == theirs.tensors[k].shape
        mine, other = (np.stack([m.raw(k)[t[w]] for w in sorted(a)])
                       for m, t in ((ours, a), (theirs, b)))
        assert (mine == other).mean() >= .999
    assert same(*(type("Part", (),
                       dict(raw=m.raw, tensors={k: t for k, t in m.tensors.items() if "layers" in k}))
                  for m in (ours, theirs)))[0] >= .999
    words = sorted(w for w in a if w[0] == "w")[:40]
    from transformers import AutoTokenizer
    mine, other = (AutoTokenizer.from_pretrained(m.path) for m in (ours, theirs))
    assert [mine.convert_ids_to_tokens(i)
            for i in mine(" ".join(words))["input_ids"]] == [other.convert_ids_to_tokens(i) for i in other(" ".join(words))["input_ids"]]

@pytest.mark.parametrize("case", RANDOM)
def test_what_is_drawn_agrees_in_distribution(case, room):
    "Share of kept entries, mean and variance of what is left; for DELLA also the share by rank in the row."
    ours, theirs = both(room/"drawn", case)
    a, base = open_model(room/"drawn"/"a"), open_model(room/"drawn"/"base")
    names = [k for k, t in a.tensors.items() if len(t.shape) == 2]
    def flat(m): return np.concatenate([(m.values(k) - base.values(k)).reshape(-1) for k in names])
    whole, mine, other = flat(a), flat(ours), flat(theirs)
    n = len(whole)
    moved = whole != 0
    kept = [(np.abs(x) > 1e-9)[moved].mean() for x in (mine, other)]
    assert abs(kept[0] - .4) < .015 and abs(kept[0] - kept[1]) < .015
    size = [np.abs(x).mean() / np.abs(whole).mean() for x in (mine, other)]
    spread = [x.var() / whole.var() for x in (mine, other)]
    assert abs(size[0] / size[1] - 1) < .04 and abs(spread[0] / spread[1] - 1) < .08, (size, spread)
    if case.startswith("della"): # ranks: from 0.4 − 0.15 to 0.4 + 0.15
        rank = np.concatenate(
            [np.argsort(np.argsort(np.abs(a.values(k) - base.values(k)), axis=1), axis=1).reshape(
                -1)
             / a.tensors[k].shape[1]
             for k in names])
        for low in (0, .5, .9):
            part = (rank >= low) & (rank < low + .1)
            share = [(np.abs(x) > 1e-9)[part].mean() for x in (mine, other)]
            assert abs(share[0] - share[1]) < .05, (low, share)

# Deliberate differences
def test_karcher_heeds_weights(room):
    "mergekit 0.1.5 takes weights for karcher and forgets them; ours go into the mean."
    ours, theirs = both(room/"Llama", "karcher_weights")
    assert same(ours, theirs)[0] < .5
    equal = merge(MergeRecipe.from_yaml(json.dumps(dict(merge_method="karcher", models=[str(room/"Llama"/n) for n in "ab"]) | F32)),
                  None, room/"Llama"/"equal")
    assert same(equal, theirs)[0] >= .999

def test_a_weight_may_be_left_out(room):
    "mergekit wants a weight for every model; ours is 1."
    assert "required parameter weight" in (room/"Llama"/"no_weight.failed").read_text()
    ours = merge(MergeRecipe.from_yaml(room/"Llama"/"no_weight.yaml"), None, room/"Llama"/"no_weight.ours")
    k = "model.layers.1.mlp.up_proj.weight"
    assert np.abs(ours.values(k)
                  - (open_model(room/"Llama"/"a").values(k) + open_model(room/"Llama"/"b").values(k)) / 2).max() < 1e-3

def test_models_that_equal_the_base_are_merged(room):
    "mergekit's multislerp stops where the task vectors of three models are zero; here the base comes out."
    assert "sum of the input tensors is zero" in (room/"Llama"/"zero.failed").read_text()
    ours = merge(MergeRecipe.from_yaml(room/"Llama"/"zero.yaml"), None, room/"Llama"/"zero.ours")
    base = open_model(room/"Llama"/"base")
    assert all(np.array_equal(ours.raw(k), base.raw(k)) for k in base.tensors)

def test_arithmetic_is_float32_whatever_is_stored(room):
    "Under dtype bfloat16 mergekit rounds after every step; here the result is the one of float32."
    ours, theirs = both(room/"Llama", "in_bf16")
    exact, _ = both(room/"Llama", "task_arithmetic")
    assert same(ours, exact)[0] == 1 and same(theirs, exact)[0] < .95

def test_breadcrumbs_drop_the_largest_at_density_1_too(room):
    "At density 1 mergekit drops nothing; the paper's top fraction is dropped here."
    ours, theirs = both(room/"Llama", "crumbs_keep_all")
    base = open_model(room/"Llama"/"base")
    k = "model.layers.1.mlp.up_proj.weight"
    def share(m): return (m.raw(k) != base.raw(k)).mean()
    assert share(theirs) > .98 and abs(share(ours) - share(theirs) + .05) < .01
