"The frontier: what fits is chosen on *search*, what is written scores what the table says, and bad budgets are refused."
import json, shlex
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
from model_glue_nb.benchmarking.intervals import ItemScores
from model_glue_nb.benchmarking.intervals import mean_score
from model_glue_nb.benchmarking.scores import ask_model
from model_glue_nb.core import InputError, file_name
from model_glue_nb.experiments.difference_controls import difference_controls, random_difference
from model_glue_nb.gluing.dry_run import estimate_run
from model_glue_nb.gluing.frontier import _STEPS, Made, Point, Pool, _raise_ranks, _readable, best_point, ladder_points
from model_glue_nb.gluing.pipeline import glue
from model_glue_nb.gluing.points import read_points, write_point, writing_command
from model_glue_nb.gluing.recipe import check_reach, open_work, params_within, read_recipe
from model_glue_nb.merging.differences import extract
from model_glue_nb.mixing.difference_experts import values_with
from model_glue_nb.mixing.residents import difference_model
from model_glue_nb.mixing.selection import OnTop, pruned, select_experts, stored_params
from model_glue_nb.zoo.zoo import open_model, read_zoo

RECIPE = dict(suite="demo", tasks=["sort", "reverse", "double", "swap"], search_questions=16, evidence=0, budget="2.5x",
              merge=dict(methods=["linear"], strategy="average", budget=3), mixture=dict(router="linear"))

NAMES = "a-base", "a-hot-sort", "a-reverse", "a-hot-double", "b-swap"

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    zoo = read_zoo("demo")
    return glue(RECIPE | dict(zoo=[str(zoo[n].path) for n in NAMES]), tmp_path_factory.mktemp("frontier")/"run")

def test_what_is_written_scores_what_the_frontier_says(run):
    frontier, comparison = run.read_table("frontier"), run.read_table("comparison").set_index("system")
    assert (frontier.stored <= frontier.budget + 1e-9).all() and frontier.search.is_monotonic_increasing
    row = frontier[np.isclose(frontier.budget, 2.5)].iloc[0]
    ours, one = comparison.loc["model_glue"], comparison.loc["best_single"]
    assert ours["mean"] == pytest.approx(row.report, abs=1e-5) and ours.low == pytest.approx(row.low, abs=1e-5)
    assert ours.params_total / one.params_total == pytest.approx(row.stored, abs=1e-4) and row.stored <= 2.5
    assert "rank" in row.experts and row.report > frontier.report[0]
    whole = frontier.iloc[-1]
    assert np.isinf(whole.budget) and row.stored < whole.stored or row.experts == whole.experts
    page = (run.path/"report.html").read_text() if (run.path/"report.html").exists() else ""
    assert not page or "What each size buys" in page

def test_the_mixture_holds_a_base_once(run):
    name = run.read_table("comparison").set_index("system").model["model_glue"]
    m = open_model(run.path/"models"/name)
    about = json.loads((m.path/"mixture.json").read_text())["experts"]
    on_top = [e for e in about if e.get("adapter")]
    assert on_top and all((m.path/e["adapter"]/"adapter_config.json").exists() for e in on_top)
    live = m.load("cpu")
    assert len({str(e.path) for e in live.experts}) < len(live.experts)
    prompts = ["put LIFWCB in order =", "reverse ABCD ="]
    assert live.generate(prompts, 6) == [live.experts[e].load("cpu").generate([p], 6)[0] for p, e in zip(prompts, live.route(prompts))]

def test_a_second_run_finds_everything_done(run, monkeypatch):
    from model_glue_nb.gluing import frontier
    before = run.read_table("frontier")
    def never(*_, **__): raise AssertionError("a difference was made again")
    monkeypatch.setattr(frontier, "extract", never)
    again = glue(read_recipe(run.path/"recipe.yaml"), run.path)
    assert again.read_table("frontier").equals(before)

def stored_by(m):
    "Parameters that a written system takes, from its own files."
    if m.kind == "checkpoint": return m.n_params
    experts = json.loads((m.path/"mixture.json").read_text())["experts"]
    return sum({e["path"]: e["n_params"] for e in experts}.values()) + sum(e.get("n_added", 0) for e in experts)

@pytest.mark.parametrize("which", [0, -1])
def test_the_shown_command_writes_what_the_row_says(run, which, tmp_path, monkeypatch):
    from typer.testing import CliRunner
    from model_glue_nb.cli.program import app
    points = read_points(run)
    i, asked = which % len(points), run.store.db.execute("select count(*) from results").fetchone()
    program, *words = shlex.split(writing_command(points, i, run.path))
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, words, catch_exceptions=False)
    assert program == "model-glue" and said.exit_code == 0
    assert run.store.db.execute("select count(*) from results").fetchone() == asked # nothing was asked again
    m, report = open_model(words[-1]), open_work(read_recipe(run.path/"recipe.yaml")).report
    row, one = points.loc[i], read_zoo("demo")["a-base"] # all of one size
    assert mean_score(ask_model(m, report)) == pytest.approx(row.report, abs=1e-5)
    assert stored_by(m) / one.n_params == pytest.approx(row.stored, abs=1e-5)
    assert sum(f.stat().st_size for f in m.path.glob("*.safetensors")) / 1e6 == pytest.approx(row.megabytes, rel=.01) or m.kind == "mixture"

def test_a_point_that_is_copied_stands_alone(run, tmp_path):
    m = write_point(run, "all", tmp_path/"whole", copy=True)
    moved = (tmp_path/"whole").rename(tmp_path/"moved")
    assert all((moved/e["path"]).resolve().is_relative_to(moved) for e in json.loads((moved/"mixture.json").read_text())["experts"])
    assert len(open_model(moved).load("cpu").generate(["reverse ABCD ="], 4)) == 1

def test_a_point_whose_parts_are_gone_is_refused(run, tmp_path):
    parts = run.path/"models"/"differences"
    parts.rename(run.path/"models"/"elsewhere")
    try:
        with pytest.raises(InputError, match="is not there any more. Run the command of the run again"): write_point(run, "all", tmp_path/"out")
    finally: (run.path/"models"/"elsewhere").rename(parts)
    assert not (tmp_path/"out").exists()

def test_scores_per_task_are_those_of_the_points(run):
    frontier, tasks = run.read_table("frontier"), run.read_table("frontier_tasks")
    assert np.allclose(tasks.groupby("budget").score.mean(), frontier.set_index("budget").report, atol=1e-5)
    comparison = run.read_table("comparison").set_index("system")
    ours = tasks[np.isclose(tasks.budget, 2.5)].set_index("task").score
    assert np.allclose(ours, [comparison.loc["model_glue", t] for t in ours.index], atol=1e-5)

def test_an_active_budget_holds_for_every_point_and_for_what_is_chosen(run, tmp_path):
    zoo = read_zoo("demo")
    recipe = RECIPE | dict(zoo=[str(zoo[n].path) for n in NAMES], budget=dict(stored="2x", active="1x"))
    strict = glue(recipe, tmp_path/"run", store=run.store)
    free, frontier = run.read_table("frontier"), strict.read_table("frontier")
    assert free.active.max() > 1.001 and frontier.active.max() <= 1 and not frontier.experts.str.contains("rank").any()
    systems = strict.read_table("comparison").set_index("system")
    one, chosen = systems.loc["best_single"], systems.loc["chosen"]
    assert chosen.params_total <= 2.0001 * one.params_total and chosen.params_active <= one.params_active
    compared = set(strict.read_table("choice").system)
    assert "model_glue" in compared and "full_mixture" not in compared and systems.params_total["full_mixture"] > 2 * one.params_total

@pytest.mark.parametrize("budget, more, says", [
    ("2", {}, "1.25x, 400MB, all"), ("much", {}, "1.25x, 400MB, all"), ("0x", {}, "1.25x, 400MB, all"), ({}, {}, "is empty"), (["2x"], {}, "budget"),
    (dict(stord="2x"), {}, "Did you mean 'stored'"), (dict(stored="2x", active=2), {}, "1.25x, 400MB, all"), (dict(active=None), {}, "1.25x, 400MB, all"),
    ("2x", dict(mixture=dict(level="ffn")), "stay apart"), ("2x", dict(mixture=dict(dense_layers=1)), "stay apart")])
def test_bad_budgets_are_refused_before_anything_is_opened(budget, more, says):
    with pytest.raises(InputError, match=says): read_recipe(dict(zoo="nowhere", budget=budget, **more))

@pytest.mark.parametrize("budget", ["0.5x", "100KB", dict(stored="0.99x"), dict(active="0.99x"), dict(stored="all", active="200KB")])
def test_a_budget_under_the_smallest_system_is_refused_before_anything_is_asked(budget, tmp_path):
    zoo = read_zoo("demo")
    small = RECIPE | dict(zoo=[str(zoo[n].path) for n in ("a-base", "a-sort")], tasks=["sort", "reverse"], search_questions=4, budget=budget)
    for call in (lambda: glue(small, tmp_path/"run"), lambda: estimate_run(read_recipe(small))):
        with pytest.raises(InputError, match="The smallest system is one model, 'a-base'.*Give at least 1x or 1.14MB"): call()
    assert not (tmp_path/"run").exists()

def test_what_is_named_as_the_least_is_enough():
    "Sizes that two digits can't say are rounded up, and the worst of the models that may be the best one counts."
    def model(name, n, width): return SimpleNamespace(name=name, n_params=n, n_bytes=width * n)
    zoo = [model("small", 100_001, 2), model("large", 300_000, 4)]
    class Known(list): __getitem__ = lambda self, n: next(m for m in self if m.name == n)
    assert not check_reach("0.5x", Known(zoo)) and "small" in check_reach("0.5x", Known(zoo), "small")[0] and not check_reach("0.5x", Known(zoo), "large")
    for best, budget in (("large", "0.33x"), ("large", "0.4MB"), ("small", "0.2MB"), (None, "0.2MB")):
        for form in (budget, dict(active=budget)):
            (said,) = check_reach(form, Known(zoo), best)
            assert not any(check_reach(x, Known(zoo), best) for x in said.split("at least ")[1].rstrip(".").split(" or ")), said

def work_of(budget):
    "A run's recipe and best model, without the run."
    one = SimpleNamespace(name="a", n_params=100, n_bytes=400)
    return SimpleNamespace(recipe=read_recipe(dict(budget=budget)), singles=["a"], zoo=dict(a=one))

def test_candidates_that_are_too_active_are_left_out():
    rng = np.random.default_rng(3)
    pool = Pool(dict.fromkeys(("a", "large", "d")), dict(a=100, large=160, d=OnTop("a", 100, 8)),
                {n: noisy(rng, 20, .5, .5) for n in ("a", "large", "d")})
    for budget, names in ((dict(active="1x"), ["a"]), (dict(active="1.08x"), ["a", "d"]), (dict(stored="1x"), ["a", "large", "d"]), (dict(active="1KB"), ["a", "large", "d"])):
        found = _readable(work_of(budget), pool)
        assert list(found.stored) == list(found.models) == list(found.items) == names

def test_budgets_in_bytes_are_those_of_the_best_single_model():
    one = read_zoo("demo")["a-base"]
    assert params_within("3MB", one) == pytest.approx(3e6 * one.n_params / one.n_bytes) and params_within("1.5X", one) == 1.5 * one.n_params

def test_a_base_counts_once():
    sizes = dict(base=100, a=OnTop("base", 100, 7), b=OnTop("base", 100, 9), c=OnTop("other", 60, 5), whole=40)
    for names, total in ((["a"], 107), (["a", "b"], 116), (["base", "a", "b"], 116), (["a", "c"], 172), (["whole", "c"], 105), (["base"], 100)):
        assert stored_params(names, sizes) == total

def test_what_is_missed_least_goes_first():
    worth, price = [5, 3, 3, 1], [1, 1, 9, 1]
    def score(S): return sum(worth[i] for i in S)
    def cost(S): return sum(price[i] for i in S)
    assert pruned(score, lambda S: cost(S) <= 3, cost, range(4)) == (0, 1) and pruned(score, lambda S: False, cost, range(4)) == ()
    assert pruned(score, lambda S: cost(S) <= 9, cost, (3, 2)) == (2,)

def noisy(rng, n, *right): return ItemScores({t: (rng.random(n) < r).astype(float) for t, r in zip("ab", right)})

def test_alone_a_whole_model_is_taken_instead_of_a_difference():
    rng = np.random.default_rng(1)
    pool = Pool({}, dict(whole=100, d=OnTop("base", 100, 2)), dict(whole=noisy(rng, 40, .5, .5), d=noisy(rng, 40, .9, .9)))
    point = best_point(pool, np.repeat(np.eye(2, dtype=np.float32), 40, 0), dict(name="linear"), 102)
    assert point.experts == ("whole",) and point.stored == 100

def test_differences_of_one_base_are_tried_together():
    """Whole specialists are a little better than their differences, so of all candidates the differences go first, and no single
    move leads from a merge to a base with three differences."""
    def right(i, n): return ItemScores({t: np.repeat([1., 0.], [n, 20 - n]) if k == i else np.zeros(20) for k, t in enumerate("abc")})
    sizes = dict(merge=100, base=100) | {f"w{i}": 100 for i in range(3)} | {f"d{i}": OnTop("base", 100, 5) for i in range(3)}
    items = {f"w{i}": right(i, 20) for i in range(3)} | {f"d{i}": right(i, 18) for i in range(3)} | dict(base=right(9, 0))
    items["merge"] = ItemScores({t: np.repeat([1., 0.], [12, 8]) for t in "abc"})
    vectors = np.repeat(np.eye(3, dtype=np.float32), 20, 0)
    t = select_experts(items, vectors, sizes, dict(name="linear"), max_params=120)
    assert set(t.expert) == {"d0", "d1", "d2"} and t.score.iloc[-1] == pytest.approx(.9)

def test_a_larger_budget_is_never_worse():
    rng = np.random.default_rng(2)
    pool = Pool({}, {}, {})
    for i in range(6):
        pool.stored[f"m{i}"], pool.items[f"m{i}"] = 100, noisy(rng, 30, rng.random(), rng.random())
        pool.stored[f"d{i}"], pool.items[f"d{i}"] = OnTop("m0", 100, 5 + i), noisy(rng, 30, rng.random(), rng.random())
    points = ladder_points(pool, np.repeat(np.eye(2, dtype=np.float32), 30, 0), dict(name="linear"), 100, (130,))
    assert [p.search for p in points] == sorted(p.search for p in points) and all(p.stored <= p.budget for p in points)
    assert 130 in [p.budget for p in points] and points[-1].budget == float("inf")

def test_a_budget_is_used_up_for_higher_ranks(run):
    frontier = run.read_table("frontier")
    row = frontier[np.isclose(frontier.budget, 2.5)].iloc[0]
    held = [e for e in row.experts.split("; ") if "(rank" in e]
    sizes = {}
    for name in held:
        member, base = name.split(" (rank")[0].split(" on ")
        d = difference_model(read_zoo("demo")[base] if base in read_zoo("demo").names else open_model(run.path/"models"/base),
                             run.path/"models"/"differences"/file_name(name), name)
        sizes[name] = d.n_added
    rank = {e: int(e.rsplit(" ", 1)[1][:-1]) for e in held}
    assert held and min(rank.values()) >= _STEPS[0]
    one = read_zoo("demo")["a-base"].n_params
    for e, n in sizes.items(): # the next rank of none fits
        steps = [r for r in _STEPS if r > rank[e]]
        assert not steps or row.stored + .97 * n * (steps[0] / rank[e] - 1) / one > 2.5

@pytest.mark.parametrize("budget, ranks", [(124, (4, 4, 16)), (128, (8, 4, 16)), (132, (8, 8, 16)), (139, (8, 8, 16)), (140, (16, 8, 16)),
                                           (148, (16, 16, 16)), (164, (32, 16, 16)), (9999, (48, 48, 48))])
def test_ranks_rise_one_by_one_from_the_lowest(budget, ranks, monkeypatch):
    from model_glue_nb.gluing import frontier
    names, asked = [f"{m} (rank {r})" for m, r in zip("abc", (4, 4, 16))], []
    def size(r): return OnTop("base", 100, r)
    pool = Pool(dict.fromkeys(names), {n: size(r) for n, r in zip(names, (4, 4, 16))}, dict.fromkeys(names),
                {n: Made(n[0], "base", r) for n, r in zip(names, (4, 4, 16))})
    def with_rank(work, pool, name, rank):
        new = f"{name[0]} (rank {rank})"
        pool.stored[new], pool.made[new], pool.models[new] = size(rank), Made(name[0], "base", rank), new
        return new
    monkeypatch.setattr(frontier, "_with_rank", with_rank)
    monkeypatch.setattr(frontier, "ask_model", lambda m, *_: asked.append(m))
    work = SimpleNamespace(search=None, run=SimpleNamespace(store=None))
    raised = _raise_ranks(work, pool, Point(budget, tuple(names), 124, .5), lambda _: True)
    assert raised.experts == tuple(f"{m} (rank {r})" for m, r in zip("abc", ranks)) and raised.stored == 100 + sum(ranks)
    assert sorted(asked) == sorted(set(raised.experts) - set(names)) and raised.search == .5
    pool.made[names[1]] = pool.made[names[1]]._replace(keeps=False) # it goes first, as far as it can
    first = _raise_ranks(work, pool, Point(156, tuple(names), 124, .5), lambda _: True)
    assert first.experts == ("a (rank 8)", "b (rank 32)", "c (rank 16)")
    low = _raise_ranks(work, pool, Point(budget, tuple(names), 124, .5), lambda some: not any("32" in e for e in some))
    assert max(pool.made[e].rank for e in low.experts) <= 16 # what may be read is limited, too; and rank 64 takes more than half of the base

def test_controls_gain_nothing(run):
    t = difference_controls(run.path).set_index("system")
    built = run.read_table("comparison").set_index("system").loc["model_glue"]
    assert t.score["as it was built"] == pytest.approx(built["mean"], abs=1e-5) and t.behind["as it was built"] == 0
    for control in ("random differences", "differences exchanged"): assert t.behind_low[control] > 0
    assert "neighbors by words as router" in t.index and not list(run.path.glob(".controls_*"))

def test_a_random_difference_keeps_ranks_and_norms(run, tmp_path):
    zoo = read_zoo("demo")
    true = difference_model(zoo["a-base"], _reversing(zoo, tmp_path), "d")
    other = random_difference(true, tmp_path/"random", seed=3)
    assert other.n_added == true.n_added and other.fingerprint() != true.fingerprint()
    before, after = (dict(values_with(true.home, d.adapter)) for d in (true, other))
    for name, w in before.items():
        home = zoo["a-base"].values(name)
        change, drawn = w - home, after[name] - home
        assert np.linalg.norm(drawn) == pytest.approx(np.linalg.norm(change), rel=6e-2, abs=1e-6), name # bf16 rounds
        if np.linalg.norm(change) > 1e-3 and change.ndim == 2:
            cosine = (change * drawn).sum() / np.linalg.norm(change) / np.linalg.norm(drawn)
            assert abs(cosine) < .3, name

def _reversing(zoo, folder):
    extract(zoo["a-reverse"], zoo["a-base"], folder/"d", rank=4)
    return folder/"d"

def test_controls_want_a_mixture_of_differences(tmp_path):
    zoo = read_zoo("demo")
    small = RECIPE | dict(zoo=[str(zoo[n].path) for n in ("a-base", "a-sort")], tasks=["sort", "reverse"], search_questions=4, budget="1x")
    glue(small, tmp_path/"run")
    with pytest.raises(InputError, match="holds no differences"): difference_controls(tmp_path/"run")

def test_what_no_rank_keeps_is_offered_as_it_is(monkeypatch):
    "The smallest that keeps the skill, or the largest; nobody asks for more than is needed."
    from model_glue_nb.gluing import frontier
    right = {("a", 4): 2, ("a", 8): 20, ("b", 4): 2, ("b", 8): 9}
    def scores(n): return ItemScores({"t": np.repeat([1., 0.], [n, 20 - n])})
    base, members = SimpleNamespace(name="base", n_params=100), [SimpleNamespace(name=n) for n in "ab"]
    def difference(work, m, b, rank): return SimpleNamespace(name=f"{m.name} (rank {rank})", n_added=rank, at=(m.name, rank))
    asked = []
    def answers(work, models, suite):
        asked.extend(d.name for d in models)
        return {d.name: scores(right[d.at]) for d in models}
    monkeypatch.setattr(frontier, "_difference", difference)
    monkeypatch.setattr(frontier, "_asked", answers)
    pool = Pool({}, {}, {n: scores(20) for n in "ab"})
    work = SimpleNamespace(search=None, progress=lambda *_: None)
    found = frontier._add_smallest(work, pool, [(m, base) for m in members], dict(a=["t"], b=["t"]), (4, 8))
    assert found == dict(a=8) and asked == ["a (rank 4)", "b (rank 4)", "a (rank 8)", "b (rank 8)"]
    assert {n: m.keeps for n, m in pool.made.items()} == {"a (rank 8)": True, "b (rank 8)": False}
