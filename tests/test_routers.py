"Routers on scores of any kind, the choice of experts on unlike zoos, and plain baselines that must not win."
import numpy as np
import pytest

from model_glue_nb.benchmarking.intervals import ItemScores, mean_score
from model_glue_nb.core import InputError
from model_glue_nb.mixing.learners import pooled, question_weights, routers, usable_routers
from model_glue_nb.mixing.routers import check_router, featurize, fit_router, fit_texts, read_router, write_router
from model_glue_nb.mixing.selection import by_question, predicting_routers, rank_pairs, select_experts, shares_of
from model_glue_nb.mixing.terms import fit_terms, term_vectors
from model_glue_nb.zoo.zoo import tiny_zoo

LEARNED = [r for r in usable_routers() if r != "random"]

def topics(n, k, seed, noise=.3):
    "Questions of k topics: which, and a vector of each."
    rng = np.random.default_rng(seed)
    topic = rng.integers(k, size=n)
    return (topic,
            (np.eye(k + 2)[topic] + noise * rng.normal(size=(n, k + 2))).astype(np.float32),
            rng)

# ---- scores of any kind
@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("low, high",
                         [(0, 1), (.2, .6), (-30, 12), (-900, -850), (5, 5.01)])
def test_graded_scores_teach(name, low, high):
    topic, x, rng = topics(240, 3, 1)
    skill = np.where(np.eye(3)[topic], .8, .2) + .1 * rng.normal(size=(240, 3))
    values = low + (high - low) * skill.clip(0, 1)
    route = fit_router(dict(name=name), dict(model=x[:160]), values[:160]).route(x[160:])
    assert (route == topic[160:]).mean() > .85

@pytest.mark.parametrize("name", ["linear", "knn", "kmeans", "tfidf_knn"])
def test_neither_unit_nor_difficulty_changes_a_route(name):
    topic, x, rng = topics(200, 3, 2)
    values = 3 * np.eye(3)[topic] + rng.normal(size=(200, 3)) - 1.5
    def route(v):
        return fit_router(dict(name=name), dict(model=x[:150]), v[:150]).route(x[150:]).tolist()
    assert (route(values) == route(17 * values - 400) == route(values + 9 * rng.normal(size=(200, 1)))
            and len(set(route(values))) == 3)

@pytest.mark.parametrize("name", LEARNED)
def test_a_task_without_weight_teaches_nothing(name):
    "A perplexity of weight 0 beside a task of right and wrong."
    topic, x, rng = topics(120, 2, 3)
    right = np.eye(2)[topic]
    nats = -50 * rng.random((120, 2)) * [1, 20]
    weights = question_weights(dict(t=1., p=0.), dict(t=120, p=120))
    both = np.concatenate([right, nats])
    mixed = fit_router(dict(name=name), dict(model=np.concatenate([x, x])), both, weights=weights)
    alone = fit_router(dict(name=name), dict(model=x), right)
    np.testing.assert_allclose(mixed.scores(x), alone.scores(x), atol=1e-5)
    assert (mixed.route(x) == topic).mean() > .9

@pytest.mark.parametrize("name", ["linear", "mlp", "knn", "kmeans", "tfidf_knn", "sentence_kmeans"])
def test_a_weight_counts_as_that_many_prompts(name):
    topic, x, rng = topics(30, 2, 4)
    values = np.eye(2)[topic] if name == "mlp" else rng.normal(size=(30, 2))
    how = dict(linear=dict(C=.1), knn=dict(k=30), tfidf_knn=dict(k=30), kmeans=dict(clusters=1), sentence_kmeans=dict(clusters=1)).get(
        name, {})
    weights = np.where(np.arange(30) < 10, 3., 1.)
    twice = np.repeat(np.arange(30), weights.astype(int))
    one = fit_router(dict(name=name) | how, dict(model=x), values, weights=weights)
    other = fit_router(dict(name=name) | how | (dict(k=50) if "k" in how else {}),
                       dict(model=x[twice]), values[twice])
    if name == "mlp": assert (one.route(x) == other.route(x)).mean() > .9 # its draws differ
    elif name == "linear": # features and penalty are scaled by other means
        np.testing.assert_allclose(one.scores(x), other.scores(x), atol=.4)
    else: np.testing.assert_allclose(one.scores(x), other.scores(x), atol=1e-4)
    far = fit_router(dict(name=name) | how, dict(model=x), values).scores(x)
    assert name == "mlp" or not np.allclose(one.scores(x), far, atol=1e-3)

def test_one_expert_and_one_prompt():
    x = np.ones((1, 4), np.float32)
    for name in LEARNED:
        assert fit_router(dict(name=name), dict(model=x), np.array([[.3]])).route(x).tolist() == [
            0]
        assert fit_router(dict(name=name), dict(model=x), np.array([[-2.,
                                                                     7.]])).route(x).tolist() == [
       1], name

# ---- settings
BAD = [dict(name="knn", k=3.5), dict(name="knn", k="3"),
       dict(name="knn", k=-1), dict(name="knn", k=True),
       dict(name="tfidf_knn", max_terms=0), dict(name="linear", C=-1),
       dict(name="linear", C=float("nan")),
       dict(name="linear", bias="no"), dict(name="mlp", hidden=2.5),
       dict(name="mlp", seed=-3), dict(name="kmeans", clusters="all"),
       dict(name="random", seed="x"),
       dict(name="knn", temperature=None, margin="wide"),
       dict(name="knn", costs="cheap"),
       dict(name="knn", costs=[1, -1]),
       dict(name="prompt", positive="w3"),
       dict(name="prompt", positive=[["a"], []]), dict(name=3),
       dict(name=None), dict(name=["knn"]), "knn", None, ["knn"]]
@pytest.mark.parametrize("router", BAD, ids=str)
def test_a_wrong_setting_is_one_clear_error(router):
    with pytest.raises(InputError) as e:
        fit_router(router, dict(model=np.eye(4, dtype=np.float32)), np.eye(2)[[0, 1, 0, 1]])
    assert len(str(e.value)) < 400 and str(e.value).count("\n") < 2

@pytest.mark.parametrize("name", list(routers))
def test_an_unknown_setting_is_named(name):
    with pytest.raises(InputError, match="There is no setting '.*' of router"):
        fit_router(dict(name=name, neighbours=3), dict(model=np.eye(2, dtype=np.float32)), np.eye(2))

def test_a_text_router_is_written_and_read_again(tmp_path):
    texts, values = ["sort BA", "sort CA", "double B", "double C"], np.eye(2)[[0, 0, 1, 1]]
    fitted = fit_texts(dict(name="tfidf_knn", k=2), None, [1, 1], texts, values)
    write_router(tmp_path, fitted, [])
    again = read_router(tmp_path)
    asked = ["double XY", "sort the list"]
    assert again.route(featurize(again, None, asked, "tfidf")).tolist() == [1, 0] and again.settings == fitted.settings

def test_words_weigh_in_a_new_prompt_what_they_weighed_in_the_old():
    texts = ["sort BA", "sort CA", "double B", "double sort C"]
    fitted = fit_texts(dict(name="tfidf_knn", k=2), None, [1, 1],
                       texts, np.eye(2)[[0, 0, 1, 1]])
    new = ["sort C", "double BA"]
    np.testing.assert_allclose(featurize(fitted, None, new, "tfidf"), term_vectors(new, **fit_terms(texts)), atol=1e-6)

def test_given_prompts_need_no_weights_of_search_prompts(tmp_path):
    live = tiny_zoo(tmp_path, ["a"])["a"].load(device="cpu")
    given = dict(name="embedding", positive=["w3 w4", "w5"])
    fitted = fit_texts(given, lambda: live, [1, 1], weights=np.ones(9))
    assert fitted.route(featurize(fitted, lambda: live, ["w5", "w3 w4"], "embedding")).tolist() == [1, 0]

# ---- the choice of experts
def zoo_of(kind, seed):
    "A simulated zoo: prompts of a few words, vectors, and what each candidate scores on them."
    rng = np.random.default_rng(seed)
    k, n = 4, 480
    topic = np.arange(n) % k
    words = [[f"t{t}x{i}" for i in range(6)] for t in range(k)]
    texts = [" ".join([*rng.choice(words[t], 3), *rng.choice(["the", "of", "a", "list"], 2)])
             for t in topic]
    x = (np.eye(k + 4)[topic] + .5 * rng.normal(size=(n, k + 4))).astype(np.float32)
    if kind == "specialists": chance = np.where(np.eye(k)[:, topic], .85, .15)
    elif kind == "generalist":
        chance = np.concatenate(
            [np.full((1, n), .72), np.where(np.eye(k)[:, topic], .9, .1)])
    elif kind == "no signal": chance = np.tile([[.5], [.52], [.48], [.5], [.51]], (1, n))
    elif kind == "crowd":
        chance = np.concatenate(
            [np.where(np.eye(k)[:, topic], .8, .3),
             .45 + .1 * rng.random((8, 1)) + np.zeros((8, n))])
    elif kind == "overlap": chance = np.where(np.add.outer(np.arange(6), topic) % 3 == 0, .8, .25)
    else: chance = None # graded
    if chance is None:
        scores = (np.where(np.eye(k)[:, topic], 2., -3.)
                  + 2 * rng.normal(size=(k, n))
                  + 4 * rng.normal(size=(1, n)))
    else: scores = (rng.random(chance.shape) < chance).astype(float)
    task = topic // 2
    order = np.argsort(task, kind="stable") # two tasks of two topics each
    side = np.arange(n)[order] % 8 >= 4 # half for choosing
    def part(mask):
        return {f"m{i}": ItemScores({f"task{t}": s[order][mask & (task[order] == t)] for t in (0, 1)})
                for i, s in enumerate(scores)}
    def pick(a, mask): return [a[i] for i in order[mask]]
    return [(part(m), pick(texts, m), x[order][m]) for m in (~side, side)]

ZOOS = ["specialists", "generalist", "no signal", "crowd", "overlap", "graded"]

def on_report(zoo, router, experts, seen):
    "What each report question scores behind a router over some experts."
    (search, *_), (report, *_) = zoo
    values = pooled(*by_question(search, list(experts)))
    fresh, _ = by_question(report, list(experts))
    fitted = fit_router(router, dict(model=seen[0]), values, weights=shares_of(next(iter(search.values()))))
    return fresh[np.arange(len(fresh)), fitted.route(seen[1])
                                        if len(experts) > 1 else np.zeros(len(fresh), int)]

@pytest.mark.parametrize("kind", ZOOS)
def test_ours_is_not_below_the_plain_baselines(kind):
    "On three draws of each zoo; a baseline uses every member."
    gains = []
    for seed in range(3):
        zoo = zoo_of(kind, seed)
        (items, texts, x), (_, fresh, y) = zoo
        known = fit_terms(texts)
        words = [term_vectors(t, **known) for t in (texts, fresh)]
        seen = {"linear": (x, y), "knn": (x, y), "tfidf_knn": words, "sentence_kmeans": (x, y)} # the vectors stand in for an encoder's
        pairs = rank_pairs(items,
                           [(dict(name=n), s[0]) for n, s in seen.items()],
                           dict.fromkeys(items, 1))
        router, experts = pairs.router[0], pairs.experts[0]
        ours = on_report(zoo, router, experts, seen[router["name"]])
        for plain in ("tfidf_knn", "sentence_kmeans"):
            gains.append(ours - on_report(zoo, dict(name=plain), list(items), seen[plain]))
    pooled = [np.concatenate(gains[i::2]) for i in (0, 1)] # one for each baseline
    for g in (*gains, *pooled): assert g.mean() > -2.6 * g.std() / np.sqrt(len(g)) - 1e-9, f"{g.mean():.3f}"

def test_every_structure_is_found():
    "What the searched sets should look like."
    sets = {}
    for kind in ZOOS:
        items, texts, x = zoo_of(kind, 0)[0]
        sets[kind] = set(select_experts(items, x, dict.fromkeys(items, 1), dict(name="linear")).expert)
    assert sets["specialists"] == {"m0", "m1", "m2", "m3"} == sets["graded"]
    assert sets["generalist"] >= {"m1", "m2", "m3", "m4"} and sets["crowd"] >= {"m0", "m1", "m2", "m3"}
    assert len(sets["overlap"]) <= 4 # three kinds, each twice

def test_the_best_alone_is_given_up_for_two_that_are_better_together():
    rng = np.random.default_rng(0)
    half = np.repeat([0, 1], 60)
    x = (np.eye(4)[half] + .1 * rng.normal(size=(120, 4))).astype(np.float32)
    def said(a, b):
        return ItemScores(dict(t=(rng.random(120) < np.where(half == 0, a, b)).astype(float)))
    items = dict(all=said(.75, .75), one=said(1, 0), two=said(0, 1))
    alone = {m: mean_score(i) for m, i in items.items()}
    assert max(alone, key=alone.get) == "all"
    t = select_experts(items, x, dict.fromkeys(items, 1), max_experts=2)
    assert (set(t.expert) == {"one", "two"}
            and t.score.iloc[-1] > .95
            and t.gain.sum() == pytest.approx(t.score.iloc[-1]))

@pytest.mark.parametrize("budget", [dict(max_experts=1), dict(max_experts=2), dict(max_params=25), dict(max_params=12)])
def test_budgets_hold_after_every_move(budget):
    for kind in ZOOS[:3]:
        items, _, x = zoo_of(kind, 1)[0]
        size = {m: 10 + i for i, m in enumerate(items)}
        t = select_experts(items, x, size, dict(name="knn"), **budget)
        assert len(t) <= budget.get("max_experts", 9) and t.params.sum() <= budget.get("max_params", 99) and len(t)

def test_a_task_without_weight_chooses_nobody():
    items, _, x = zoo_of("specialists", 2)[0]
    def weigh(w): return {m: ItemScores(dict(by), w) for m, by in items.items()}
    some = select_experts(weigh(dict(task0=1., task1=0.)), x, dict.fromkeys(items, 1), dict(name="linear")).expert
    assert set(some) == {"m0", "m1"} # the topics of the first task

def test_experts_are_chosen_by_routers_that_predict(monkeypatch):
    assert set(predicting_routers()) == set(routers) - {"random", "prompt", "embedding"}
    monkeypatch.setattr(routers["knn"], "predicts", False) # what is asked is the mark, not a list of names
    assert "knn" not in predicting_routers()

def test_a_set_is_worth_the_weighted_mean():
    "One expert only: the better one at what counts, not at what is asked most."
    a, b = lambda n, p: (np.arange(n) % 10 < 10 * p).astype(float), dict(task0=.8, task1=.2)
    items = {"first": ItemScores(dict(task0=a(20, .9), task1=a(80, .1)), b),
             "second": ItemScores(dict(task0=a(20, .5), task1=a(80, .8)), b)}
    t = select_experts(items, np.ones((100, 3), np.float32),
                       dict(first=1, second=1), dict(name="knn"), max_experts=1)
    assert (t.expert.tolist() == ["first"]
            and t.score[0] == pytest.approx(.8 * .9 + .2 * .1) == pytest.approx(mean_score(items["first"])))
