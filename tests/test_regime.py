"Regimes of planted zoos, and the geometry they are read from against whole matrices in float64."
import numpy as np
import pandas as pd
import pytest

from model_glue_nb.core import InputError
from model_glue_nb.mergeability.geometry import _input_products, _measure_weight, standing_out, task_geometry
from model_glue_nb.mergeability.pairs import files_for
from model_glue_nb.mergeability.similarity import compared_weights
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.merging.regime import _apart, _few_texts, _picks, divergences, flagged, forgotten, opposed, skills_of, zoo_regime
from model_glue_nb.zoo.writer import CheckpointWriter, copy_companions
from model_glue_nb.zoo.zoo import Zoo, read_zoo, tiny_zoo

DTYPES = ["float32", "bfloat16"]
COMMON, FOREIGN = 0, 1 # Seeds of the input directions that two bases have

@pytest.fixture(scope="module", params=DTYPES)
def home(request, tmp_path_factory):
    "A folder, a base and a stranger in it, and the type they are stored in."
    room = tmp_path_factory.mktemp(request.param)
    return room, tiny_zoo(room/"bases", ["base", "other"], dtype=request.param, intermediate_size=56), request.param

def stored(x, dtype):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return bits if dtype == "float32" else ((bits + 0x8000) >> 16).astype(np.uint16)

def learned(k, shape, skill, seed, directions=COMMON, own=.3):
    "A change of four directions of input; members of one skill share what they answer."
    inputs = np.random.default_rng([directions, *map(ord, k)]).normal(size=(4, shape[1]))
    answers = np.random.default_rng([7 + skill, *map(ord, k)]).normal(size=(shape[0], 4))
    mine = np.random.default_rng([99, seed, *map(ord, k)]).normal(size=(shape[0], 4))
    return (answers + own * mine) @ inputs * [.002, .0025, .003][seed % 3]

def plant(home, name, change, base="base"):
    "A member whose attention and MLP differ from the base's by `change(name of the weight, shape)`."
    room, bases, dtype = home
    out = room/name
    if not out.exists():
        out.mkdir()
        copy_companions(bases[base].path, out)
        (out/"README.md").write_text(f"---\nbase_model: {base}\n---\n")
        layout = {k: ("F32" if dtype == "float32" else "BF16", t.shape) for k, t in bases[base].tensors.items()}
        writer, weights = CheckpointWriter(out, layout), compared_weights(bases[base])
        for k in layout:
            x = bases[base].values(k).astype(np.float64)
            writer.write(k, stored(x + change(k, x.shape) if k in weights else x, dtype))
        writer.close()
    return read_zoo([out])[name]

def member(home, skill, seed):
    return plant(home, f"skill{skill}-{seed}", lambda k, shape: learned(k, shape, skill, seed))

def noise(k, shape): return np.random.default_rng([5, *map(ord, k)]).normal(size=shape) * .022
def layer_noise(k, shape): return learned(k, shape, 3, 4) + (2 * noise(k, shape) if "layers.1" in k else 0)
SPOILT = dict(noise=noise, times=lambda k, s: 4 * learned(k, s, 3, 3), layer=layer_noise,
              away=lambda k, s: -.6 * sum(learned(k, s, i, i) for i in (0, 1, 2)),
              foreign=lambda k, s: learned(k, s, 3, 3, FOREIGN))
WHOLE = {"one skill": [(0, 0), (0, 1), (0, 2)], "overlapping skills": [(0, 0), (0, 1), (1, 2)],
         "separated skills": [(0, 0), (1, 1), (2, 2)]}

def zoo_of(home, rows, *more, base=True):
    models = ([home[1]["base"]] if base else []) + [member(home, *r) for r in rows] + list(more)
    return Zoo(tuple(models))

@pytest.mark.parametrize("kind", WHOLE)
def test_planted_skills_are_told_apart(home, kind):
    found = zoo_regime(zoo_of(home, WHOLE[kind]))
    assert (found.kind, found.within, found.spoilt, found.origin) == (kind, kind, {}, "base")
    assert len(found.members) == 3 and all(r.base in ("base", None) for r in found.picks)
    assert [s.model for s in found.picks[0].models] == list(found.members)

@pytest.mark.parametrize("how", SPOILT)
def test_a_planted_spoilt_member_is_named_and_left_out(home, how):
    bad = plant(home, f"bad-{how}", SPOILT[how])
    found = zoo_regime(zoo_of(home, WHOLE["separated skills"], bad))
    assert (found.kind, found.within, list(found.spoilt)) == ("some spoilt", "separated skills", [bad.name])
    assert bad.name not in found.members and all(bad.name not in str(r) for r in found.picks)

def test_noise_on_top_of_a_skill_is_named_and_merged(home):
    noisy = plant(home, "noisy", lambda k, s: learned(k, s, 3, 3) + noise(k, s) / 3)
    found = zoo_regime(zoo_of(home, WHOLE["separated skills"], noisy))
    assert (found.kind, found.within, list(found.spoilt)) == ("some spoilt", "separated skills", ["noisy"])
    assert "noisy" in found.members and found.features["length"]["noisy"] < 4 * found.features["length"].min()

def test_noise_is_flat(home):
    g = task_geometry([plant(home, "bad-noise", SPOILT["noise"]), member(home, 0, 0)], home[1]["base"])
    assert abs(g.flatness[0] - 1) < .15 and g.flatness[1] < .5

def test_strangers_are_families(home):
    theirs = [plant(home, f"theirs-{i}", lambda k, s, i=i: learned(k, s, i, i), "other") for i in range(2)]
    found = zoo_regime(zoo_of(home, WHOLE["one skill"], home[1]["other"], *theirs))
    assert found.kind == "strangers" and found.picks == ()
    assert {(f.origin, f.kind) for f in found.families} == {("base", "one skill"), ("other", "separated skills")}

def test_the_order_of_methods():
    def methods(within, n, base="base", prompts="random"): return [r.method for r in _picks(within, [*"abcdef"[:n]], base, prompts)]
    assert methods("overlapping skills", 4)[0] == methods("one skill", 2)[0] == methods("one skill", 6)[0] == "linear"
    assert methods("separated skills", 4) == ["tsv_m", "regmean", "linear", "iso_c"]
    assert methods("separated skills", 5) == ["regmean", "tsv_m", "iso_c", "linear"]
    assert methods("overlapping skills", 6)[:2] == ["regmean", "linear"]
    assert methods("separated skills", 5, None, None) == ["linear"] and methods("separated skills", 1) == []
    assert "tsv_m" in methods("separated skills", 2, prompts=None)

def test_the_order_of_members_changes_nothing(home):
    bad = plant(home, "bad-noise", SPOILT["noise"])
    zoo = zoo_of(home, WHOLE["overlapping skills"], bad)
    one, two = (zoo_regime(Zoo(models)) for models in (zoo.models, zoo.models[::-1]))
    assert (one.kind, one.spoilt.keys()) == (two.kind, two.spoilt.keys())
    pd.testing.assert_frame_equal(one.features, two.features.loc[one.features.index])

def test_without_a_base_only_spoilt_ones_are_seen(home):
    bad = plant(home, "bad-noise", SPOILT["noise"])
    found = zoo_regime(zoo_of(home, WHOLE["separated skills"], bad, base=False), prompts=["w1 w2"])
    assert not found.has_base and list(found.spoilt) == [bad.name] and found.within == "overlapping skills"
    assert found.origin.startswith("skill") and {r.method for r in found.picks} == {"linear", "regmean"}

def test_a_member_alone_among_spoilt_ones_is_not_merged(home):
    bad = plant(home, "bad-times", SPOILT["times"])
    found = zoo_regime(zoo_of(home, [(0, 0)], bad))
    assert (found.kind, found.members, found.picks) == ("some spoilt", ("skill0-0",), ())
    with pytest.raises(InputError, match="one member besides the base"): zoo_regime(zoo_of(home, [(0, 0)]))

def changed(home, m, k): return m.values(k).astype(np.float64) - home[1]["base"].values(k)

@pytest.mark.parametrize("most", [300, 2**22])
def test_products_are_those_of_whole_matrices(home, most):
    models = [member(home, *r) for r in WHOLE["overlapping skills"]] + [plant(home, "bad-noise", SPOILT["noise"])]
    for k in compared_weights(models[0])[:7]:
        gram, inputs = _measure_weight([home[1]["base"], *models], k, files_for(1), most)
        d = [changed(home, m, k) for m in models]
        exact = np.array([[(x * y).sum() for y in d] for x in d])
        assert np.allclose(gram, exact, rtol=1e-5, atol=1e-7 * exact.max())
        assert np.abs(inputs / [[np.square(x @ y.T).sum() for y in d] for x in d] - 1).max() < .35

def test_sketched_products_are_right_on_average():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(30, r)) @ rng.normal(size=(r, 20)) for r in (3, 12))
    exact = np.array([[np.square(x @ y.T).sum() for y in (a, b)] for x in (a, b)])
    norms = np.array([np.square(a).sum(), np.square(b).sum()])
    def once():
        omega = rng.normal(size=(64, 30))
        return _input_products(np.stack([omega @ a, omega @ b]), norms)
    assert np.abs(np.mean([once() for _ in range(300)], 0) / exact - 1).max() < .05

def test_features_are_their_definitions(home):
    models = [member(home, *r) for r in WHOLE["separated skills"]] + [plant(home, "bad-layer", SPOILT["layer"])]
    g = task_geometry(models, home[1]["base"])
    table = standing_out(g)
    flat = {m.name: np.concatenate([changed(home, m, k).ravel() for k in g.weights]) for m in models}
    lengths = pd.Series({n: np.linalg.norm(d) for n, d in flat.items()})
    assert np.allclose(table["length"], lengths, rtol=1e-5)
    def norm(m, layer): return np.sqrt(sum(np.square(changed(home, m, k)).sum() for k in g.weights if f"layers.{layer}." in k))
    sizes = [[norm(m, i) / np.median([norm(o, i) for o in models if o is not m]) for i in (0, 1)] for m in models]
    assert np.allclose(table["size"], np.max(sizes, 1), rtol=1e-5)
    units = {n: d / np.linalg.norm(d) for n, d in flat.items()}
    for n in units:
        rest = sum(u for o, u in units.items() if o != n)
        assert abs(table["lean"][n] - units[n] @ rest / np.linalg.norm(rest)) < 1e-5
    assert table["flatness"].idxmax() == table["size"].idxmax() == "bad-layer"

def test_nothing_depends_on_the_size_of_weights():
    cosines = np.array([[1, .2, .1], [.2, 1, .7], [.1, .7, 1]])
    assert skills_of(cosines) == ("overlapping skills", (.1, .7)) and skills_of(cosines, .05)[0] == "one skill"
    usual = dict(length=1., size=1.9, flatness=2.6, overlap=.31, lean=-.04)
    rows = pd.DataFrame([usual] * 3, [*"abc"])
    assert flagged(rows) == {} == flagged(rows.assign(length=1e9))
    for feature, value in dict(size=2.1, flatness=2.8, overlap=.29, divergence=4.1).items():
        assert list(flagged(rows.assign(**{feature: value}))) == [*"abc"], feature

def test_whom_one_opposes_is_not_opposed_itself(home):
    one = [member(home, *r) for r in WHOLE["separated skills"]]
    turned = plant(home, "turned", lambda k, s: -learned(k, s, 0, 0))
    g = task_geometry([*one, turned], home[1]["base"])
    assert standing_out(g)["lean"]["skill0-0"] < -.05 and list(opposed(g)) in (["turned"], ["skill0-0"])
    assert opposed(g.only(["skill0-0", "turned"])) == {} # of two, nobody knows

def test_divergence_is_its_definition(home):
    import torch
    zoo = zoo_of(home, [(0, 0), (1, 1)])
    texts = ["w3 w9 w4 w20", "w7 w5"]
    got = divergences(zoo, ["skill0-0", "skill1-1"], "base", texts)
    for name, value in got.items():
        want = []
        for text in texts:
            p, q = (live_probabilities(zoo[n], text) for n in ("base", name))
            want.append((p * (p / q).log()).sum(-1).mean())
        assert abs(value - float(torch.stack(want).mean())) < 1e-6 and value > 0

def test_divergence_is_seen_from_the_origin():
    p, q = np.log([[.5, .5], [.9, .1]]), np.log([[.8, .2], [.9, .1]])
    assert np.isclose(_apart(p, q), (.5 * np.log(.5 / .8) + .5 * np.log(.5 / .2)) / 2)
    assert not np.isclose(_apart(p, q), _apart(q, p), rtol=.05)

def live_probabilities(model, text):
    import torch
    live = model.load()
    ids = torch.tensor([live.encode([text])[0]])
    with torch.no_grad(): return live.model(input_ids=ids).logits[0].double().softmax(-1)

TEXTS = {"skill0-0": ["w3 w9 w4 w20", "w7 w5 w1"], "skill1-1": ["w2 w2 w8"], "skill2-2": ["w30 w31 w6 w5 w4", "w11"]}

def lost_by_hand(zoo, merged, members, texts):
    "Of one merge, from probabilities in float64: `texts` are (text, whose it is)."
    def kl(p, q): return float((p * (p / q).log()).sum(-1).mean())
    lost = learned = 0
    for text, whose in texts:
        start = live_probabilities(zoo["base"], text)
        away, teacher = max(((kl(live_probabilities(zoo[m], text), start), live_probabilities(zoo[m], text)) for m in whose), key=lambda x: x[0])
        learned, lost = learned + away, lost + kl(teacher, live_probabilities(merged, text))
    return lost / learned

@pytest.mark.parametrize("own, last", [(True, 2), (False, 2), (False, 0)])
def test_what_a_merge_forgets_is_its_definition(home, own, last, tmp_path):
    from model_glue_nb.merging.merge import merge
    zoo, members = zoo_of(home, WHOLE["separated skills"]), ["skill0-0", "skill1-1", "skill2-2"]
    if last == 0: members = members[::-1] # whoever departs most is the teacher, not who comes last
    close = 4e-4 if home[2] == "float32" else 5e-3 # a merged folder is rounded to its type
    merges = [recipe("linear", members, weights=[.6, .3, .1]), recipe("task_arithmetic", members, weights=[.9, .2, .7], base="base")]
    texts = TEXTS if own else sum(TEXTS.values(), [])
    got = forgotten(zoo, merges, members, "base", texts)
    by_hand = [(t, [m] if own else members) for m, ts in TEXTS.items() for t in ts]
    for i, (r, value) in enumerate(zip(merges, got)):
        merged = merge(r, zoo, tmp_path/str(i))
        assert value == pytest.approx(lost_by_hand(zoo, merged, members, by_hand), rel=close)
    assert 0 < got[0] and abs(got[0] - got[1]) > .01

def test_who_says_the_same_forgets_nothing(home):
    zoo, members = zoo_of(home, [(0, 0), (1, 1)]), ["skill0-0", "skill1-1"]
    pure = [recipe("linear", members, weights=w) for w in ([1, 0], [0, 1])]
    mine = {m: TEXTS["skill0-0"] if m == "skill0-0" else ["w40"] for m in members}
    assert forgotten(zoo, pure[:1], ["skill0-0"], "base", mine)[0] == pytest.approx(0, abs=1e-9)
    with pytest.raises(InputError, match="predict what their base predicts"): forgotten(zoo, pure, ["base"], "base", ["w1 w2"])

def test_texts_come_from_all_of_a_list(home):
    live, many = home[1]["base"].load(), [f"w{i}" for i in range(3, 63)]
    few = _few_texts(live, ["a", "b"], many)
    words = [live.tokenizer.decode(x).split()[-1] for x in few]
    assert len(few) == 16 and (words[0], words[-1]) == ("w3", "w62") and set(map(tuple, few.values())) == {("a", "b")}
    own = _few_texts(live, ["a", "b"], dict(a=many, b=["w3"]))
    assert len(own) == 8 and [*own.values()][0] == ["a", "b"] and [*own.values()][-1] == ["a"]

def test_with_texts_the_probe_orders_the_picks(home):
    zoo = zoo_of(home, WHOLE["separated skills"])
    found = zoo_regime(zoo, prompts=TEXTS | dict(base=["w1"]), probe=True)
    plain = zoo_regime(zoo, prompts=TEXTS | dict(base=["w1"]))
    assert {r.method for r in found.picks} == {r.method for r in plain.picks} and plain.forgotten == ()
    assert found.forgotten == tuple(sorted(found.forgotten)) and len(set(found.forgotten)) > 1
    again = forgotten(zoo, list(found.picks), list(found.members), "base", TEXTS)
    assert again == pytest.approx(found.forgotten) and f"{found.picks[0].method} {again[0]:.0%}" in str(found)
    assert zoo_regime(zoo, probe=True).forgotten == () # random tokens
