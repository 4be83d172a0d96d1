"Equal merges share a fingerprint and unequal ones never do: recipes drawn at random, their merged weights compared."
import random
from collections import defaultdict

import numpy as np
import pytest

from model_glue_nb.merging.canonical import merge_fingerprint
from model_glue_nb.core import Store
from model_glue_nb.merging.engine import open_input
from model_glue_nb.searching.candidates import CandidateScorer
from model_glue_nb.zoo.stored import Files
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.merging.methods import method_info
from model_glue_nb.merging.planner import checked_plan
from model_glue_nb.merging.recipes import MergeRecipe, MergeSlice, MergeSource, check_recipe_form, recipe
from model_glue_nb.zoo.zoo import read_zoo, tiny_zoo

NOISE = 1e-5 # Of the largest weight: sums of float32 in another order

@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    "A base and three that differ from it a little, with settings that agree."
    import torch
    from safetensors.torch import load_file, save_file
    room = tmp_path_factory.mktemp("equal")
    tiny_zoo(room, ["z", "a", "b", "c"], dtype="float32")
    base = load_file(room/"z"/"model.safetensors")
    for i, n in enumerate("abc"):
        torch.manual_seed(i)
        save_file({k: v + .02 * torch.randn_like(v) for k, v in base.items()}, room/n/"model.safetensors", {"format": "pt"})
    return read_zoo([room/n for n in "zabc"])

PICKED = ("embed_tokens", "layers.0.mlp.down_proj", "layers.1.self_attn.q_proj", "norm.weight")

def merged(r, zoo):
    "Some tensors of a merge: embeddings, an MLP, attention, a norm."
    tasks = checked_plan(r, zoo).tasks
    out = []
    with Files() as files:
        for n in tasks:
            if not any(p in n for p in PICKED): continue
            x = open_input(tasks[n], files, True, "cpu")
            out.append(np.array(x.array if hasattr(x, "array") else x.bytes.view(np.float32)).ravel())
    return np.concatenate(out).astype(np.float64)

def close(x, y): return np.abs(x - y).max() <= NOISE * np.abs(x).max()

METHODS = "linear task_arithmetic ties breadcrumbs dare_linear dare_ties della slerp nuslerp model_stock sce multislerp karcher".split()
BASED = "task_arithmetic ties breadcrumbs dare_linear dare_ties della model_stock sce".split()

def drawn(rng, depth=1):
    "A recipe from a small pool, so that equal merges are common."
    m = rng.choice(METHODS)
    base = "z" if m in BASED else None
    n = 2 if m in ("slerp", "nuslerp") else rng.choice([2, 3])
    names = rng.sample("abc", n) if rng.random() < .8 else [rng.choice("abc") for _ in range(n)]
    if depth and rng.random() < .25: names[rng.randrange(n)] = drawn(rng, 0)
    def by_name():
        return [dict(filter="layers.0.", value=rng.choice([0, 1])),
                dict(filter=rng.choice(["*", None]), value=1)]
    def weight(): return rng.choice([0, .5, 1, 1, 2, [.5, 1], [1, 1], by_name()])
    kw, weights = {}, [weight() for _ in names]
    if m == "slerp": kw["t"] = rng.choice([.3, .7, [.3, .7], [.7, .3], [.3, .3]])
    if m in ("linear", "task_arithmetic", "ties", "dare_linear", "breadcrumbs") and rng.random() < .6:
        kw["normalize"] = rng.random() < .5
    if m in BASED and m not in ("model_stock", "sce") and rng.random() < .5:
        kw["scale"] = rng.choice([.5, 1., 2.])
    if "density" in method_info(m).parameters: kw["density"] = rng.choice([.5, 1., 1.])
    return recipe(m, names, weights, base, options=dict(seed=rng.choice([0, 0, 1])), **kw)

def test_recipes_of_one_print_merge_alike_and_the_print_finds_most_twins(zoo):
    rng, by_print, found = random.Random(3), defaultdict(list), 0
    for _ in range(900):
        r = drawn(rng)
        if check_recipe_form(r): continue
        same = by_print[merge_fingerprint(r)]
        if repr(r) not in {repr(x) for x in same}: same.append(r)
    for group in by_print.values():
        for other in group[1:2]:
            try: one, two = merged(group[0], zoo), merged(other, zoo)
            except Exception as e:
                assert "sum to 0" in str(e), e # weights by filter may cancel
                continue
            assert close(one, two), (group[0], other)
            found += 1
    assert found > 40, "too few twins were drawn to say anything"

@pytest.mark.parametrize("method", METHODS)
def test_merges_that_differ_in_one_number_have_another_print(zoo, method):
    base = "z" if method in BASED else None
    two = ["a", "b"]
    own = dict(slerp=dict(t=.3)).get(method, {})
    one = recipe(method, two, [1, 3], base, **own)
    x, seen = merged(one, zoo), {merge_fingerprint(one)}
    others = [recipe(method, two, [3, 1], base, **own),
              recipe(method, ["a", "c"], [1, 3], base, **own),
              recipe(method, two, [1, 3.1], base, **own),
              recipe(method, two, [[dict(filter="mlp", value=2), dict(value=1)], 3], base, **own),
              recipe(method, two, [1, 3], base,
                     **own | (dict(scale=.5) if base and method not in ("model_stock", "sce") else {})),
              recipe(method, two, [1, 3], base, options=dict(seed=5), **own),
              recipe(method, [recipe("linear", two), "b"], [1, 3], base, **own)]
    for r in others:
        same = merge_fingerprint(r) == merge_fingerprint(one)
        assert same <= close(x, merged(r, zoo)), r
        if not close(x, merged(r, zoo)): assert not same
    assert any(merge_fingerprint(r) != merge_fingerprint(one) for r in others)

EQUAL = [
    (recipe("linear", ["a", "b"], [1, 3]), recipe("linear", ["b", "a"], [.75, .25])),
    (recipe("linear", ["a", "b"], [-1, -3]),
     recipe("linear", ["a", "b"], [.25, .75], normalize=False)),
    (recipe("task_arithmetic", ["a", "b"], [1, 3], base="z", scale=.5),
     recipe("task_arithmetic", ["a", "b"], [.5, 1.5], base="z")),
    (recipe("task_arithmetic", ["a", "b"], [1, 3], base="z", normalize=True, scale=2.),
     recipe("task_arithmetic", ["a", "b"], [.5, 1.5], base="z")),
    (recipe("ties", ["a", "b", "c"], [1, 3, 0], base="z"),
     recipe("ties", ["b", "a"], [6, 2], base="z")),
    (recipe("dare_ties", ["a", "b"], [1, 3], base="z", density=1.),
     recipe("dare_ties", ["a", "b"], [1, 3], base="z", density=1., rescale="l1", options=dict(seed=9))),
    (recipe("dare_linear", ["a", "b"], [1, 3], base="z", scale=.5),
     recipe("dare_linear", ["b", "a"], [1.5, .5], base="z")),
    (recipe("della", ["a", "b"], [1, 3], base="z", density=1.),
     recipe("della", ["a", "b"], [1, 3], base="z", density=[1., 1.], epsilon=.3)),
    (recipe("nuslerp", ["a", "b"], [1, 3]), recipe("nuslerp", ["b", "a"], [.75, .25])),
    (recipe("slerp", ["a", "b"], t=[.2, .7]), recipe("slerp", ["b", "a"], t=[.8, .3])),
    (recipe("model_stock", ["a", "b"], [1, 3], base="z"), recipe("model_stock", ["b", "a"], base="z")),
    (recipe("multislerp", ["a", "b"], [1, 3]), recipe("multislerp", ["a", "b"], [.25, .75])),
    (recipe("linear",
            [recipe("linear", ["a", "b"], [1, 3]), recipe("linear", ["b", "c"])],
            [1, 2]),
     recipe("linear", ["a", "b", "c"], [.25, 1.75, 1])),
    (recipe("ties", [recipe("linear", ["a", "b"], [1, 3]), "c"], base="z"),
     recipe("ties", ["c", recipe("linear", ["b", "a"], [3, 1])], base="z")),
    (recipe("linear", ["a", "b"],
            [[dict(filter="mlp", value=1), dict(filter="mlp.up", value=7), dict(value=2)], 2]),
     recipe("linear", ["b", "a"], [[dict(filter="mlp", value=2), dict(filter="*", value=1)], 1])),
    (recipe("linear", ["a", "b"], [[1, 3], [1, 1]]),
     recipe("linear", ["a", "b"], [[2, 6], 2])),
    (recipe("karcher", ["a", "b"], [1, 3]), recipe("karcher", ["a", "b"], [2, 6]))]

@pytest.mark.parametrize("one, other", EQUAL, ids=lambda r: r.method)
def test_twins_are_known_and_merge_alike(zoo, one, other):
    assert merge_fingerprint(one) == merge_fingerprint(other) and one.fingerprint(zoo) != other.fingerprint(zoo)
    assert one.canonical_fingerprint(zoo) == other.canonical_fingerprint(zoo)
    assert close(merged(one, zoo), merged(other, zoo))

UNEQUAL = [
    (recipe("linear", ["a", "b"], [-1, -3]),
     recipe("linear", ["a", "b"], [-1, -3], normalize=False)),
    (recipe("ties", ["a", "b"], [5e-9, 5e-8], base="z"),
     recipe("ties", ["a", "b"], [1, 10], base="z")), # too small to be divided by
    (recipe("dare_ties", [recipe("linear", ["a", "b"]), "c"], base="z"),
     recipe("dare_ties", [recipe("linear", ["b", "a"]), "c"], base="z")), # other draws
    (recipe("dare_linear", ["a", "a", "b"], [0, 1, 1], base="z"),
     recipe("dare_linear", ["a", "b"], base="z")), # the second draw of a
    (recipe("slerp", ["a", "b"], t=[.2, .7]), recipe("slerp", ["b", "a"], t=[.2, .7])),
    (recipe("linear", ["a", "b"], [[1, 3], 1]),
     recipe("linear", ["a", "b"], [[3, 1], 1])),
    (recipe("ties", ["a", "b"], base="z", scale=.5),
     recipe("ties", ["a", "b"], [.5, .5], base="z"))]

@pytest.mark.parametrize("one, other", UNEQUAL, ids=lambda r: r.method)
def test_what_only_looks_alike_is_told_apart(zoo, one, other):
    assert merge_fingerprint(one) != merge_fingerprint(other)
    assert not close(merged(one, zoo), merged(other, zoo))

def test_slices_and_stored_types_count():
    def part(m, w):
        return MergeSlice((MergeSource(m, w, {}, (0, 1)), MergeSource("b", 1., {}, (0, 1))))
    one, other = (MergeRecipe("linear", slices=(part(a, 1.), part(b, 1.))) for a, b in ("ac", "ca"))
    assert merge_fingerprint(one) != merge_fingerprint(other)
    def half(**kw): return merge_fingerprint(recipe("linear", ["a", "b"], options=kw))
    assert half(dtype="float16") == half(out_dtype="float16", dtype="float32") != half() != half(tokenizer="union")
    def union(names, weights=None):
        return merge_fingerprint(recipe("linear", names, weights, options=dict(tokenizer="union")))
    assert union(["a", "b"]) != union(["a", "b", "c"], [1, 1, 0]), "a model of weight 0 brings its tokens"
    assert union(["a", "b"], [1, 1]) == union(["a", "b"], [2, 2])

def test_order_counts_where_members_lead_to_other_settings(tmp_path):
    tiny_zoo(tmp_path, ["a", "b"])
    zoo = read_zoo([tmp_path/"a", tmp_path/"b"])
    both = recipe("linear", ["a", "b"]), recipe("linear", ["b", "a"])
    assert len({r.canonical_fingerprint(zoo) for r in both}) == 1
    import json
    settings = json.loads((tmp_path/"b"/"config.json").read_text())
    (tmp_path/"b"/"config.json").write_text(json.dumps(settings | dict(rms_norm_eps=1e-3)))
    changed = read_zoo([tmp_path/"a", tmp_path/"b"])
    assert len({r.canonical_fingerprint(changed) for r in both}) == 2
