"Laws and faults of the merge-ability analysis: parity with whole-model float64, planted clusters, order, invariance, and every kind of bad input."
import itertools, shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.core import InputError
from model_glue_nb.mergeability.clusters import cluster_by_similarity, linkages, relations
from model_glue_nb.mergeability.pairs import METRICS, compare_weight
from model_glue_nb.mergeability.similarity import compare_zoo, role, similarity
from model_glue_nb.merging.barrier import align, barrier, texts_of
from model_glue_nb.zoo.writer import CheckpointWriter, copy_companions
from model_glue_nb.zoo.zoo import Zoo, read_zoo, tiny_zoo

@pytest.fixture(scope="module")
def demo(): return read_zoo("demo")

@pytest.fixture(scope="module")
def table(demo): return similarity(demo)

@pytest.fixture(scope="module")
def room(tmp_path_factory): return tmp_path_factory.mktemp("mergeability")

def whole(model):
    return {k: model.values(k).astype(np.float64)
            for k, t in model.tensors.items()
            if role(k) and len(t.shape) == 2}

def direct(x, y):
    "The paper's measure, from its definition, on whole models."
    def one(a, b):
        return np.mean((a * b).sum(0) / np.linalg.norm(a, axis=0)
                       / np.linalg.norm(b, axis=0))
    return np.mean([one(x[k], y[k]) for k in x])

def test_every_pair_equals_the_whole_model_computation(demo, table):
    loaded = {m.name: whole(m) for m in demo}
    for a, b in itertools.combinations(demo.names, 2):
        if np.isnan(table.loc[a, b]): assert demo[a].signature != demo[b].signature
        else: assert abs(table.loc[a, b] - direct(loaded[a], loaded[b])) < 1e-6

@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "GPTNeoX"])
def test_all_metrics_equal_their_definitions(room, dtype, architecture):
    zoo = tiny_zoo(room/f"{architecture}-{dtype}", ["base", "x", "y"], architecture, dtype, intermediate_size=560)
    found = compare_zoo(zoo, METRICS, dict(x="base", y="base"))
    b, x, y = (whole(zoo[n]) for n in ("base", "x", "y"))
    at = ("x", "y")
    def cos(u, v): return (u * v).sum() / np.linalg.norm(u) / np.linalg.norm(v)
    def mean(f): return np.mean([f(k) for k in x])
    want = dict(column_cosine=direct(x, y),
                cosine=mean(lambda k: cos(x[k], y[k])),
                task_cosine=mean(lambda k: cos(x[k] - b[k], y[k] - b[k])),
                norm_ratio=mean(
                    lambda k: min(np.linalg.norm(x[k]), np.linalg.norm(y[k]))
                              / max(np.linalg.norm(x[k]), np.linalg.norm(y[k]))))
    def agree(k):
        u, v = np.sign(x[k] - b[k]), np.sign(y[k] - b[k])
        both = (u != 0) & (v != 0)
        return (u == v)[both].mean()
    want["sign_agreement"] = mean(agree)
    for m, v in want.items(): assert abs(found.square(m).loc[at] - v) < 2e-6, m
    assert 0 <= found.square("subspace_overlap").loc[at] <= 1

def test_the_order_of_models_does_not_matter(demo):
    names = ["a-sort", "a-base", "b-skip", "a-reverse"]
    x, y = compare_zoo(demo.subset(names)), compare_zoo(demo.subset(names[::-1]))
    for m in METRICS: pd.testing.assert_frame_equal(x.square(m), y.square(m).loc[names, names], rtol=1e-9)

@pytest.mark.parametrize("n", [2, 5, 11])
@pytest.mark.parametrize("tile_bytes", [2**12, 2**16, 2**25])
def test_memory_is_bounded_and_every_byte_is_read_once(room, n, tile_bytes):
    folder = room/f"many-{n}"
    names = [f"m{i}" for i in range(n)]
    zoo = read_zoo([folder/m for m in names]) if folder.exists() else tiny_zoo(folder, names, intermediate_size=1100)
    k = "model.layers.0.mlp.down_proj.weight"
    got, _, n_read = compare_weight(list(zoo), k, np.full(n, -1), ("column_cosine",), tile_bytes=tile_bytes)
    assert n_read == sum(m.tensors[k].stop - m.tensors[k].start for m in zoo)
    x = [m.values(k).astype(float) for m in list(zoo)[:2]]
    assert abs(got["column_cosine"][0, 1] - direct(dict(k=x[0]), dict(k=x[1]))) < 1e-6

# clusters

def FAMILIES(demo): return {frozenset(n for n in demo.names if n[0] == f) for f in "abc"}
def sets(t, how="average", threshold=.95):
    return {frozenset(c.members) for c in cluster_by_similarity(t, threshold, how)}

def test_planted_clusters_are_found_by_default(demo, table): assert sets(table) == FAMILIES(demo)

def test_planted_strangers_are_called_strangers(demo, table):
    r = relations(table, cluster_by_similarity(table))
    shapes = {m.name: m.signature for m in demo}
    for t in r.itertuples():
        assert t.relation == ("one cluster" if t.a[0] == t.b[0] else "strangers" if shapes[t.a] == shapes[t.b] else "other shapes")

@pytest.mark.parametrize("threshold", [.5, .95, .98, .992])
def test_average_linkage_does_not_depend_on_order(table, threshold):
    for i in range(10):
        o = table.sample(frac=1, random_state=i).index
        assert sets(table.loc[o, o], threshold=threshold) == sets(table, threshold=threshold)

def test_first_fit_depends_on_order_where_families_are_chains(table):
    found = set()
    for i in range(20):
        o = table.sample(frac=1, random_state=i).index
        found.add(frozenset(sets(table.loc[o, o], "first_fit", .992)))
    assert len(found) > 1

@pytest.mark.parametrize("linkage", sorted(linkages))
def test_identical_models_are_one_cluster(room, linkage):
    zoo = tiny_zoo(room/f"twins-{linkage}", ["a", "b"])
    shutil.copytree(zoo["a"].path, room/f"twins-{linkage}"/"copy")
    t = similarity(read_zoo(room/f"twins-{linkage}"))
    assert t.loc["a", "copy"] == 1
    assert sets(t, linkage) == {frozenset({"a", "copy"}), frozenset({"b"})}

# bad input: named, and the rest goes on

def rewritten(out, source, rename=lambda k: k, dtype=None, change=lambda x: x):
    out.mkdir(parents=True)
    copy_companions(source.path, out)
    w = CheckpointWriter(out, {rename(k): (dtype or t.dtype, t.shape) for k, t in source.tensors.items()})
    for k in source.tensors:
        x = change(source.raw(k))
        w.write(rename(k), np.ascontiguousarray(x.astype(np.int8) if dtype else x))
    w.close()
    return out

def poisoned(x):
    x = x.copy()
    x.reshape(-1)[0] = 0x7fc0
    return x

BAD = dict(unnamed=(lambda out, a: rewritten(out, a, lambda k: k.replace("mlp", "part").replace("self_attn", "piece")),
                    "named like attention or MLP"),
           quantised=(lambda out, a: rewritten(out, a, dtype="I8"), "Use the unquantized checkpoint"),
           layers=(lambda out, a: tiny_zoo(out.parent, [out.name], num_hidden_layers=3)[out.name].path, "no other model of the zoo has its tensors"),
           single=(lambda out, a: tiny_zoo(out.parent, [out.name], num_hidden_layers=1)[out.name].path, "no other model of the zoo has its tensors"),
           nan=(lambda out, a: rewritten(out, a, change=poisoned), "NaN or infinite"))

@pytest.mark.parametrize("kind", BAD)
def test_a_bad_member_is_named_and_the_rest_goes_on(room, kind):
    good = tiny_zoo(room/kind, ["a", "b"])
    make, why = BAD[kind]
    zoo = read_zoo([*(m.path for m in good), make(room/kind/"odd", good["a"])])
    found = compare_zoo(zoo)
    table = found.table()
    s = similarity(zoo)
    assert why in found.skipped["odd"] and why in s.attrs["skipped"]["odd"]
    ok = table[(table.a == "a") & (table.b == "b") & (table.metric == "cosine")]
    assert len(ok) == 1 and np.isfinite(ok.value.item())
    if kind != "nan": assert table[table.b == "odd"].reason.str.contains(why).all()
    assert {frozenset(c.members) for c in cluster_by_similarity(s)} == {frozenset({n}) for n in zoo.names}

def test_a_single_layer_a_zoo_of_one_and_an_empty_zoo(room):
    zoo = tiny_zoo(room/"one-layer", ["a", "b"], num_hidden_layers=1)
    assert np.isfinite(similarity(zoo).loc["a", "b"])
    one = similarity(zoo.subset(["a"]))
    assert one.shape == (1, 1) and [c.members for c in cluster_by_similarity(one)] == [("a",)]
    with pytest.raises(InputError, match="The zoo is empty"): similarity(Zoo(()))
    with pytest.raises(InputError, match="nothing to cluster"): cluster_by_similarity(one.iloc[:0, :0])

# the way between two models

def test_a_model_has_no_barrier_to_itself_and_alignment_keeps_it(demo, room):
    texts = texts_of(load_suite("demo").part("search"), 2)
    zoo = {n: demo[n] for n in ("a-sort", "b-skip")}
    shutil.copytree(demo["a-sort"].path, room/"same"/"copy")
    zoo["copy"] = read_zoo([room/"same"/"copy"])["copy"]
    assert barrier(zoo, "a-sort", "copy", texts).barrier.abs().max() < 1e-5
    aligned = align(demo["a-sort"], demo["b-skip"], room/"aligned")
    zoo["aligned"] = aligned
    t = barrier(zoo, "b-skip", "aligned", texts, alphas=(0, .5, 1))
    assert abs(t.loss[0] - t.loss[2]) < 1e-3, "matching changes the weights, not the function"
    same = align(demo["a-sort"], demo["a-sort"], room/"itself")
    assert all(np.array_equal(same.raw(k), demo["a-sort"].raw(k)) for k in same.tensors)

def test_recorded_pairs_hold_the_claim():
    t = pd.read_csv(Path(__file__).parents[1]/"nbs"/"recorded"/"demo_pairs.csv", comment="#")
    strangers = t.a.str[0] != t.b.str[0]
    hot = t.a.str.contains("hot") | t.b.str.contains("hot")
    calm = ~strangers & ~hot
    assert len(t) == 69 and t.change_report[strangers].max() < -.3 and t.change_report[calm].min() > -.02
    assert t.mlp_distance[strangers].min() > 4 * t.mlp_distance[~strangers].max()
