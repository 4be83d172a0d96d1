"Strategies by toy scores and on real weights: laws, budgets, resuming after kills, what is remembered, what is refused."
import gc, itertools, math, os, random, signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forked import python

from model_glue_nb.benchmarking.intervals import ItemScores, mean_score
from model_glue_nb.core import InputError, Run, Store, UnknownName, digest
from model_glue_nb.merging.methods import merge_methods, method_info
from model_glue_nb.merging.recipes import check_recipe_form, coefficients, recipe
from model_glue_nb.searching.candidates import CandidateScorer, leaves
from model_glue_nb.searching.protocol import Answer, Ask, Problem, first, weigh
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.searching.budgets import Budget
from model_glue_nb.searching.executors import executors, scored
from model_glue_nb.searching.search import search, search_each
from model_glue_nb.searching.strategies import strategies, undominated
from model_glue_nb.zoo.zoo import read_zoo, tiny_zoo

MEMBERS = ["a", "b", "c", "d", "spoiler"]
METHODS = [m for m in merge_methods if method_info(m).n_models != 1]
GOAL = dict(a=.5, b=.3, c=.2)

class Toy:
    "A score by arithmetic that offers all that strategies ask for; three tasks, forty questions each."
    layers = staticmethod(lambda members: tuple(f"model.layers.{i}." for i in range(4)))
    def __init__(self, fail=lambda c: False): self.asked, self.fail = [], fail

    def shares(self, c):
        if isinstance(c, str): return {c: 1.0}
        def number(w): return np.mean([v["value"] for v in w]) if isinstance(w, list) else w
        out = {}
        t = number(c.parameters["t"]) if c.method == "slerp" else None
        for i, s in enumerate(c.models):
            w = number(s.weight) if t is None else (1 - t, t)[i]
            for m, x in self.shares(s.model).items(): out[m] = out.get(m, 0) + w * x
        total = sum(out.values()) or 1
        return {m: w / total for m, w in out.items()}

    def skill(self, c):
        w = self.shares(c)
        far = math.sqrt(sum((w.get(m, 0) - GOAL.get(m, 0))**2
                            for m in {*w, *GOAL}))
        return {t: min(1, max(0, 1 - far * k))
                for t, k in dict(x=.6, y=.8, z=1.).items()}

    def items(self, c, share=1.0):
        self.asked.append((repr(c), share))
        if self.fail(c): return {t: np.array([np.nan]) for t in "xyz"}
        hard = np.random.default_rng(3).random((3, 40))
        return first({t: (hard[i] < s).astype(float)
                      for i, (t, s) in enumerate(self.skill(c).items())},
                     share)

    def similarity(self, c, names):
        w = self.shares(c)
        return [w.get(n, 0) + .01 * MEMBERS.index(n) for n in names]

every = pytest.mark.parametrize("strategy", strategies)

def found(strategy, method="linear", budget=40, score=None, **kw):
    return search(MEMBERS, score or Toy(), method, strategy, budget=budget, base="d" if method_info(method).needs_base else None, **kw)

@every
@pytest.mark.parametrize("method", METHODS)
def test_every_strategy_works_with_every_method(strategy, method):
    r = found(strategy, method)
    assert r.trials and r.score >= max(a.mean for a in r.own.values())
    for t in r.trials:
        assert not isinstance(t.candidate, str) and not check_recipe_form(t.candidate), t.label
        assert set(leaves(t.candidate)) <= set(MEMBERS)

@every
def test_the_budget_is_respected_and_nothing_is_asked_twice(strategy):
    for budget, spent in ((7, lambda r: sum(t.questions for t in r.trials) / 120),
                          (Budget(questions=700), lambda r: sum(t.questions for t in r.trials) / 100)):
        score = Toy()
        r = found(strategy, budget=budget, score=score)
        assert 0 < spent(r) <= 7 + 1e-9
        assert len(score.asked) == len(set(score.asked)), "the same candidate was scored twice"
        assert [t.number for t in r.trials] == list(range(len(r.trials)))
        best = [t.best for t in r.trials]
        assert best == sorted(best)

@every
def test_seconds_end_a_search(strategy, monkeypatch):
    clock = [0.]
    monkeypatch.setattr("model_glue_nb.searching.executors.time.perf_counter", lambda: clock[0])
    class Slow(Toy):
        def items(self, c, share=1.0):
            clock[0] += 1.5 * (not isinstance(c, str))
            return super().items(c, share)
    r = found(strategy, budget="4s", score=Slow())
    assert len(r.trials) == 3 and clock[0] == 4.5 # the third began in time

@every
def test_the_order_of_members_does_not_matter(strategy):
    one, other = found(strategy), search(MEMBERS[::-1], Toy(), "linear", strategy, budget=40)
    assert [t.candidate for t in one.trials] == [t.candidate for t in other.trials] and one.winner == other.winner

@every
def test_the_spoiler_is_left_out_and_the_winner_gains(strategy):
    r = found(strategy, budget=80)
    assert Toy().shares(r.winner).get("spoiler", 0) < .15
    assert r.score > max(a.mean for a in r.own.values()) + .05

@every
def test_a_failed_trial_is_reported_and_the_search_goes_on(strategy):
    def fails(c): return not isinstance(c, str) and int(digest(repr(c)), 16) % 2 == 0
    r = found(strategy, budget=30, score=Toy(fails))
    assert r.failed and all(t.failed == "The score is not a number." and math.isnan(t.score) for t in r.failed)
    assert len(r.trials) > len(r.failed) and not fails(r.winner) and math.isfinite(r.score)

@every
def test_seeds_decide(strategy):
    a, b, c = (found(strategy, seed=s) for s in (0, 0, 1))
    assert [t.candidate for t in a.trials] == [t.candidate for t in b.trials]
    if strategy in ("evolution", "racing", "pareto"):
        assert [t.candidate for t in a.trials] != [t.candidate for t in c.trials]

class Killed(BaseException): pass

@every
def test_resumed_after_a_kill_at_every_trial_it_ends_the_same(strategy, tmp_path):
    class Fragile(Toy):
        left = 1
        def items(self, c, share=1.0):
            if not isinstance(c, str):
                if not self.left: raise Killed
                self.left -= 1
            return super().items(c, share)
    whole = found(strategy, budget=8)
    for n in range(200):
        try:
            r = found(strategy, budget=8, score=Fragile(), run=tmp_path/"run")
            break
        except Killed: continue
    def key(r): return [(t.number, t.candidate, t.score, t.best, t.share, t.questions) for t in r.trials]
    assert key(r) == key(whole) and r.winner == whole.winner and n >= len(whole.trials) - 1
    stored = studies(tmp_path/"run")[0].trials
    assert sorted(t.user_attrs["number"] for t in stored) == list(range(len(whole.trials)))

def studies(run):
    import optuna
    file = f"sqlite:///{run/'trials.db'}"
    return [optuna.load_study(study_name=n, storage=file) for n in optuna.get_all_study_names(file)]

@contextmanager
def counting(each):
    "Call `each` at every collection of garbage inside, of which there is one for every few objects that are made; moments are counted, not timed."
    was = gc.get_threshold()
    def at(phase, _):
        if phase == "start": each()
    gc.callbacks.append(at)
    gc.set_threshold(2, 10_000)
    try: yield
    finally:
        gc.callbacks.remove(at)
        gc.set_threshold(*was)

def moments_of(work):
    "What some work gives, and at how many moments it can be killed."
    n = itertools.count()
    with counting(n.__next__): out = work()
    return out, next(n)

def killed(n, longest, work):
    "Run some work in a child n times, killed at one of its first `longest` moments, drawn; how often the kill came before the end."
    rng, kills = random.Random(7), 0
    for _ in range(n):
        left = itertools.count(rng.randrange(longest), -1)
        if not (child := os.fork()):
            def each():
                if not next(left): os.kill(os.getpid(), signal.SIGKILL)
            try:
                with counting(each): work()
            finally: os._exit(0)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return kills

def same_and_whole(run, resumed, whole):
    "No trial is lost or doubled, and the end is that of a search which nobody disturbed."
    assert [(t.number, t.candidate, t.score, t.share)
            for t in resumed.trials] == [(t.number, t.candidate, t.score, t.share) for t in whole.trials]
    assert resumed.winner == whole.winner and resumed.score == whole.score
    assert sorted(t.user_attrs["number"] for t in studies(run)[0].trials) == list(range(len(whole.trials)))

@pytest.mark.parametrize("strategy", ["evolution", "racing", "coefficient"])
def test_killed_by_the_system_at_twenty_random_moments(strategy, tmp_path):
    _, n = moments_of(lambda: found(strategy, run=tmp_path/"undisturbed"))
    kills = killed(20, n // 4, lambda: found(strategy, run=tmp_path/"run"))
    same_and_whole(tmp_path/"run", found(strategy, run=tmp_path/"run"), found(strategy))
    assert kills >= 10

def test_killed_while_the_database_is_made_it_ends_the_same(tmp_path):
    import optuna, sqlalchemy
    def made(n):
        "A search that is killed at the n-th statement to its database."
        left = [n]
        @sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "before_cursor_execute")
        def count(*_):
            left[0] -= 1
            if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
        found("average", budget=3, run=tmp_path/"run")
    for n in (*range(1, 40), 45, 50, 60, 80): # forty statements make the tables, and each kill meets what the one before left
        if not (child := os.fork()):
            try: made(n)
            finally: os._exit(0)
        os.waitpid(child, 0)
    same_and_whole(tmp_path/"run", found("average", budget=3, run=tmp_path/"run"), found("average", budget=3))

def test_pareto_gives_a_front_to_pick_from():
    r = found("pareto", budget=60)
    points = np.array([list(t.values()) for t in r.front.values()])
    assert len(undominated(points)) == len(points) and max(p.mean() for p in points) == pytest.approx(r.score)
    assert (np.diff([p.mean() for p in points]) <= 1e-12).all()
    for words, tasks in r.front.items():
        assert Answer(Toy().items(r.pick(words))).tasks == tasks, "what is picked is what was scored"
    with pytest.raises(UnknownName, match="Did you mean 'linear"): r.pick(next(iter(r.front))[:-1])

class Weighed(Toy):
    "Only what is asked in `z` counts."
    def items(self, c, share=1.0):
        return ItemScores(super().items(c, share), dict(x=0., y=0., z=1.))

@every
def test_tasks_count_as_their_suite_says(strategy, tmp_path):
    r, again = (found(strategy, score=Weighed(), run=Run(tmp_path)) for _ in range(2)) # the second time from the log
    for one in (r, again):
        assert one.score == max(t.tasks["z"] for t in one.trials if t.share == 1)
        assert (all(t.score == pytest.approx(t.tasks["z"]) for t in one.trials)
                and all(a.mean == a.tasks["z"] for a in one.own.values()))
        scores = [tasks["z"] for _, tasks in one.asked().values()]
        assert scores == sorted(scores, reverse=True)
    assert [t.score for t in r.trials] == [t.score for t in again.trials] and r.winner == again.winner

def test_equal_answers_score_the_same_whatever_the_order_of_tasks():
    rng = np.random.default_rng(0)
    for _ in range(100):
        values = {t: (rng.random(30) < rng.random()).astype(float) for t in "abcdefg"}
        names = list(values)
        assert len({mean_score({t: values[t] for t in rng.permutation(names)}) for _ in range(20)}) == 1

def test_racing_asks_a_third_of_the_questions():
    race, full = (found("racing", options=dict(n=40), budget=1000),
                  found("racing", options=dict(n=40, shares=(1.0,)), budget=1000))
    def asked(r): return sum(t.questions for t in r.trials)
    assert (asked(race) * 3 <= asked(full)
            and Answer(Toy().items(race.winner)).mean >= Answer(Toy().items(full.winner)).mean - .05)
    assert (any(t.share < 1 for t in race.trials)
            and all(t.share == 1 for t in race.trials if t.candidate == race.winner and t.score == race.score))

def test_layers_can_differ():
    r = search(["a", "b"], Toy(), "linear", "layerwise", budget=60, options=dict(layer_groups=2))
    assert any(isinstance(s.weight, list) for t in r.trials for s in t.candidate.models)
    many = search(["a", "b"], Toy(), "linear", "evolution", budget=30, options=dict(layer_groups=4))
    layered = [s.weight for t in many.trials[1:] for s in t.candidate.models if isinstance(s.weight, list)]
    assert layered and max(len({v["value"] for v in w}) for w in layered) == 5, "four groups, and what lies outside"

# Real weights

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Four related random models: a base and three that differ from it a little."
    import torch
    from safetensors.torch import load_file, save_file
    room = tmp_path_factory.mktemp("tiny")
    tiny_zoo(room, ["base", "x", "y", "z"], dtype="float32")
    base = load_file(room/"base"/"model.safetensors")
    for i, n in enumerate("xyz"):
        torch.manual_seed(i)
        save_file({k: v + .02 * torch.randn_like(v) for k, v in base.items()}, room/n/"model.safetensors", {"format": "pt"})
    return read_zoo([room/n for n in ("base", "x", "y", "z")])

@pytest.mark.parametrize("candidate", [
    recipe("linear", ["x", "y", "z"], [.5, .3, .2]),
    recipe("linear", [recipe("linear", ["x", "y"]), "z"], [.7, .3]),
    recipe("task_arithmetic", ["x", "y"], [1., .4], base="base", scale=.8), "x"], ids=str)
def test_similarity_by_products_equals_similarity_by_weights(tiny, candidate):
    score = CandidateScorer(tiny, load_suite("demo").part("search", 1))
    names = ["base", "x", "y", "z"]
    fast = score.similarity(candidate, names)
    if not isinstance(candidate, str):
        score.grams_of = lambda names: None
        assert np.allclose(fast, score.similarity(candidate, names), atol=2e-5)
    c, total = coefficients(candidate), []
    for k in score.mlp_weights("x"):
        m = sum(w * tiny[n].values(k).astype(np.float64) for n, w in c.items())
        x = [tiny[n].values(k).astype(np.float64) for n in names]
        total.append([((m * v).sum(0) / np.linalg.norm(m, axis=0)
                       / np.linalg.norm(v, axis=0)).mean()
                      for v in x])
    assert np.allclose(fast, np.mean(total, 0), atol=2e-5)

@pytest.fixture(scope="module")
def demo():
    import torch
    torch.set_num_threads(1)
    return read_zoo("demo").subset(["a-base", "a-sort", "a-reverse"]), load_suite("demo").only(["sort", "reverse"]).part("search", 10)

@pytest.mark.parametrize("strategy, method", [("layerwise", "ties"), ("similarity_ascending", "ties"), ("similarity_descending", "linear"),
                                              ("pareto", "task_arithmetic"), ("racing", "slerp"), ("evolution", "dare_ties")])
def test_real_merges(demo, strategy, method, tmp_path):
    zoo, part = demo
    score = CandidateScorer(zoo, part, Store(tmp_path/"store.sqlite"))
    r = search(zoo.names, score, method, strategy, budget=6, base="a-base", run=tmp_path/"run")
    assert r.trials and not r.failed and r.score == pytest.approx(score(r.winner))
    assert all(t.bytes > 0 and t.seconds > 0 for t in r.trials)
    kept = sorted(studies(tmp_path/"run")[0].trials, key=lambda t: t.user_attrs["number"]) # processes end in any order
    assert [t.user_attrs["label"] for t in kept] == [t.label for t in r.trials]
    assert all(sum(map(len, t.user_attrs["items"].values())) > 0 and t.user_attrs["recipe"] for t in kept)

def test_real_merges_killed_at_twenty_random_moments(demo, tmp_path):
    zoo, part = demo
    def once(run, scorer):
        return search(zoo.names, scorer, "task_arithmetic", "evolution", budget=24, base="a-base", run=run)
    whole, n = moments_of(lambda: once(None, CandidateScorer(zoo, part)))
    kills = killed(20, n // 10, lambda: once(tmp_path/"run", CandidateScorer(zoo, part, Store(tmp_path/"store.sqlite"))))
    same_and_whole(tmp_path/"run", once(tmp_path/"run", CandidateScorer(zoo, part, Store(tmp_path/"store.sqlite"))), whole)
    assert kills >= 5

def test_answers_are_shared_by_strategies_and_runs(demo, tmp_path):
    zoo, part = demo
    store = Store(tmp_path/"store.sqlite")
    first_time = CandidateScorer(zoo, part, store)
    one = search(zoo.names, first_time, "linear", "average", budget=5)
    class Dead(CandidateScorer):
        def merged(self, candidate): raise AssertionError("a model was made again")
    assert search(zoo.names, Dead(zoo, part, store), "linear", "average", budget=5).winner == one.winner
    both = search(["a-sort", "a-reverse"], first_time, "linear", "coefficient", budget=9) # 0.5 is also the soup of the two
    again = search(["a-sort", "a-reverse"], Dead(zoo, part, store), "linear", "average", budget=1)
    assert again.trials[0].candidate in [t.candidate for t in both.trials]
    assert CandidateScorer(zoo, part, Store(tmp_path/"store.sqlite")).known(one.winner, 1.0)

def test_one_live_model_serves_all_candidates(demo, monkeypatch):
    zoo, part = demo
    loads = []
    from model_glue_nb.zoo.zoo import ZooModel
    load = ZooModel.load
    monkeypatch.setattr(ZooModel, "load", lambda self, *a, **k: loads.append(self.name) or load(self, *a, **k))
    score = CandidateScorer(zoo, part)
    search(zoo.names, score, "linear", "coefficient", budget=8)
    assert len(loads) == len(zoo) + 1, "one load per member's own score, one for all merges"

@pytest.mark.parametrize("method, dtype",
                         [("linear", "bfloat16"), ("linear", "float32"), ("task_arithmetic", "bfloat16"), ("slerp", "float16"), ("ties", "bfloat16")])
def test_mapped_files_give_the_same_bits_as_files_that_are_read(method, dtype, tmp_path, monkeypatch):
    import torch
    from model_glue_nb.merging.merge import merge_into
    from model_glue_nb.tensors.streams import FileBlocks
    zoo = tiny_zoo(tmp_path, ["base", "x", "y"], dtype=dtype)
    base = "base" if method_info(method).needs_base else None
    nested = recipe(method, [recipe("linear", ["x", "y"], [.3, .7]), "y"], base=base) # a merge of a merge
    score, live = CandidateScorer(zoo, load_suite("demo").part("search", 1)), zoo["x"].load()
    for r in (recipe(method, ["x", "y"], base=base), nested):
        read = merge_into(live, r, zoo).model.state_dict()
        with monkeypatch.context() as m:
            m.setattr(FileBlocks, "read", None) # a candidate's files are not read, they are mapped
            made = score.merged(r).model.state_dict()
        assert all(torch.equal(read[k], made[k]) for k in read)

def test_two_processes_on_one_run_folder(tmp_path):
    run = Run.start(tmp_path/"run", dict(command="search", zoo=sorted(MEMBERS)))
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_search import *; found('average', run={str(run.path)!r})"
    with run.lock(): r = python(code)
    assert r.returncode and "Another process is working on the run" in r.stderr
    assert python(code).returncode == 0

def test_the_run_folder_of_another_zoo(demo, tmp_path):
    zoo, part = demo
    found("average", run=tmp_path/"toy")
    with pytest.raises(InputError, match="its recipe differs in questions, zoo"):
        search(zoo.names, CandidateScorer(zoo, part), run=tmp_path/"toy")
    search(zoo.names, CandidateScorer(zoo, part), "linear", "average", budget=2, run=tmp_path/"run")
    fewer = zoo.subset(["a-base", "a-sort"])
    with pytest.raises(InputError, match="differs in zoo"):
        search(fewer.names, CandidateScorer(fewer, part), run=tmp_path/"run")

def test_nan_weights_fail_one_trial(demo):
    zoo, part = demo
    score = CandidateScorer(zoo, part)
    object.__setattr__(zoo["a-reverse"], "bad_weights", lambda: ["'a-reverse' holds NaN. Leave it out."])
    try: r = search(zoo.names, score, "linear", "average", budget=6)
    finally: zoo["a-reverse"].__dict__.pop("bad_weights")
    assert r.failed and all("holds NaN" in t.failed for t in r.failed)

def test_a_kill_within_a_candidate_leaves_none_of_its_answers(demo, tmp_path, monkeypatch):
    from dataclasses import replace
    from model_glue_nb.zoo.zoo import LanguageModel
    zoo, part = demo
    one, two = part.tasks
    part = replace(part, tasks=(one, replace(two, max_new_tokens=one.max_new_tokens + 1))) # asked in two pieces
    store = Store(tmp_path/"store.sqlite")
    score = CandidateScorer(zoo, part, store)
    c = recipe("linear", ["a-sort", "a-reverse"], [.6, .4])
    generate, left = LanguageModel.generate, [1]
    def fragile(self, *args):
        if not left[0]: raise Killed
        left[0] -= 1
        return generate(self, *args)
    monkeypatch.setattr(LanguageModel, "generate", fragile)
    with pytest.raises(Killed): score.items(c)
    assert [store.items(score.key(c), t.asked) for t in part.tasks] == [{}, {}]
    left[0] = 9
    whole = score.items(c)
    assert (left[0] == 7
            and all(len(store.items(score.key(c), t.asked)) == 10 for t in part.tasks)
            and Answer(whole).mean == score(c))

def test_stores_of_older_versions_are_read_and_twins_are_asked_once(demo, tmp_path):
    zoo, part = demo
    store = Store(tmp_path/"store.sqlite")
    score = CandidateScorer(zoo, part, store)
    c = recipe("linear", ["a-sort", "a-reverse"], [.6, .4])
    for t in part.tasks:
        store.add_items(c.fingerprint(zoo), t.asked, {q.key: (.25, "old") for q in t.questions})
    score.merged = None # a model cannot be made any more
    assert score(c) == .25 and score(recipe("linear", ["a-reverse", "a-sort"], [2, 3])) == .25

def test_twins_are_not_asked_twice_and_cost_nothing():
    asked = []
    def score(c):
        asked.append(c)
        return .5
    from model_glue_nb.searching.conversations import drive
    from model_glue_nb.searching.search import Ledger
    def talk():
        yield [Ask(recipe("linear", ["a", "b"])),
               Ask(recipe("linear", ["b", "a"], [.5, .5])),
               Ask(recipe("linear", ["a", "b"], [1, 2]))]
    from model_glue_nb.searching.executors import scored
    own = {m: Answer(ItemScores({"score": np.array([.1])})) for m in "ab"}
    ledger = Ledger(score, own, Budget(evaluations=9), None, lambda t: None)
    drive([(talk(), ledger)], lambda asks: ((a, scored(score, a)) for a in asks))
    assert len(asked) == len(ledger.trials) == 2 and ledger.spent == 2

def test_every_kind_of_move_is_reached_by_a_small_budget():
    "Seven members and a budget of ten: λ, someone left out or exchanged, weights and layers are all tried."
    members = list("bcdefgz")
    class Seven(Toy):
        def shares(self, c): return {m: 1. for m in [c]} if isinstance(c, str) else super().shares(c)
    r = search(members, Seven(), "ties", "stepwise", budget=10, base="z")
    tried = [t.candidate for t in r.trials]
    assert len(tried) == 10
    flat = [c for c in tried if c.method == "ties"]
    assert any(c.parameters.get("scale", 1) != 1 for c in flat), "λ"
    assert any(c.method == "linear" for c in tried), "layers"
    assert any(len({s.weight for s in c.models}) > 1 for c in flat), "weights"

@pytest.mark.parametrize("budget, strategy", [("100q", "stepwise"), (.5, "average"), ("10q", "racing")])
def test_a_budget_that_no_candidate_fits_is_one_line(budget, strategy):
    with pytest.raises(InputError, match="the cheapest candidate asks") as e: found(strategy, budget=budget)
    assert len(str(e.value).splitlines()) == 1

def test_searches_at_once_are_each_what_they_are_alone(tmp_path):
    "Three methods on workers that answer late and in another order."
    members, methods = list("abcd"), ["linear", "slerp", "ties"]
    @contextmanager
    def late(score): # three asks are out; the last that was sent is answered first
        def answer(asks):
            asks, out = iter(asks), []
            while True:
                while len(out) < 3 and (ask := next(asks, "end")) not in (None, "end"): out.append(ask)
                if not out: return
                ask = out.pop()
                at_once.append(len({c.method for c in [ask.candidate, *(o.candidate for o in out)] if not isinstance(c, str)}))
                yield ask, scored(score, ask)
        yield answer
    executors["late"], at_once, trials = late, [], []
    try:
        found = search_each(members, Toy(), methods, "coefficient", budget=30, base="a",
                            on_trial=lambda m, t: trials.append((m, t.number)),
                            seed=1, run=tmp_path, executor="late")
    finally: del executors["late"]
    assert list(found) == methods and max(at_once) > 1
    for m in methods:
        alone = search(members, Toy(), m, "coefficient", budget=30, base="a", seed=1)
        assert found[m].score == alone.score and found[m].winner == alone.winner and found[m].corrected == alone.corrected
        timeless = [replace(t, seconds=0) for t in found[m].trials]
        assert (timeless == [replace(t, seconds=0) for t in alone.trials]
                and [n for k, n in trials if k == m] == list(range(len(timeless))))
    with pytest.raises(InputError, match="(?s)nosuch|method"):
        search_each(members, Toy(), ["linear", "nosuch"])
    with pytest.raises(InputError, match="needs the base.*") as e:
        search_each(members, Toy(), ["ties", "linear", "task_arithmetic"])
    assert "'ties'" in str(e.value) and "'task_arithmetic'" in str(e.value) # all at once
