"Candidates scored by processes of this machine: the same results as here; one that takes its process down is asked again, alone."
import os

import pytest

from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.core import InputError, Store
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.searching import executors as executors_room
from model_glue_nb.searching.candidates import CandidateScorer
from model_glue_nb.searching.executors import N_TRIES, Auto, ask_together, executors, scored
from model_glue_nb.searching.protocol import Ask
from model_glue_nb.searching.search import search
from model_glue_nb.zoo.language_model import COMPUTED_IN
from model_glue_nb.zoo.zoo import read_zoo, tiny_zoo

def weight(c):
    return c if isinstance(c, str) else round({s.model: s.weight for s in c.models}.get("a", 0), 3)

def toy(room, dies=()):
    "Arithmetic that leaves a mark where it was asked, and may take its process down; a closure, so that workers need not find it."
    room, dies = str(room), dict(dies)
    class Toy:
        def items(self, c, share=1.0):
            import os
            import numpy as np
            w = {c: 1.0} if isinstance(c, str) else {s.model: s.weight for s in c.models}
            mark = f"{w.get('a', 0):.3f}"
            n = sum(f.startswith(mark) for f in os.listdir(room))
            open(f"{room}/{mark}.{n}.{os.getpid()}", "w").close()
            if not isinstance(c, str) and n < dies.get(round(w.get("a", 0), 3), 0): os._exit(1)
            return {"x": np.array([1 - (w.get("b", 0) - .3)**2])}
    return Toy()

def trials(r): return [(t.number, t.candidate, t.score, t.best) for t in r.trials]
def pids(room): return {int(f.rsplit(".", 1)[1]) for f in os.listdir(room)}

@pytest.mark.parametrize("strategy, budget", [("evolution", 14), ("stepwise", 9)])
def test_the_same_as_here_under_the_same_seed(tmp_path, strategy, budget):
    there = search(["a", "b"], toy(tmp_path), "linear", strategy, budget=budget, executor="processes")
    assert pids(tmp_path) and os.getpid() not in pids(tmp_path), "this process only hands out"
    here = search(["a", "b"], toy(tmp_path), "linear", strategy, budget=budget, executor="local")
    assert trials(there) == trials(here) and there.winner == here.winner

def test_what_dies_is_asked_again_and_hurts_nobody_else(tmp_path):
    r = search(["a", "b"], toy(tmp_path, {.5: 1, .2: N_TRIES}), "linear", "coefficient", budget=9, executor="processes")
    def asked(w): return [f for f in os.listdir(tmp_path) if f.startswith(w)]
    assert len({f.rsplit(".", 1)[1] for f in asked("0.200")}) == N_TRIES, "by another process each time"
    assert [(weight(t.candidate), t.failed.startswith(f"It took {N_TRIES} workers down")) for t in r.failed] == [(.2, True)]
    here = search(["a", "b"], toy(tmp_path), "linear", "coefficient", budget=9, executor="local")
    n = r.failed[0].number
    assert ([x for x in trials(r) if x[0] != n] == [x for x in trials(here) if x[0] != n]
            and r.winner == here.winner)

def test_a_score_that_does_not_travel_is_one_line():
    class Homesick:
        def __reduce__(self): return eval, ("__import__('nowhere')",)
        def items(self, c, share=1.): return {}
    with pytest.raises(InputError, match="A worker could not start.*nowhere"):
        search(["a", "b"], Homesick(), executor="processes")

def test_mistakes_in_a_score_are_not_swallowed():
    with executors["processes"](lambda c: c.nothing) as evaluate, pytest.raises(AttributeError, match="nothing"): list(evaluate([Ask("a")]))

def test_real_merges_and_answers_come_home(tmp_path):
    zoo, part = read_zoo("demo").subset(["a-sort", "a-reverse"]), load_suite("demo").only(["sort", "reverse"]).part("search", 10)
    home = CandidateScorer(zoo, part, Store(tmp_path/"store.sqlite"))
    there = search(zoo.names, home, "linear", "coefficient", budget=4, executor="processes")
    assert not home.live and all(home.known(t.candidate, 1.0) for t in there.trials), "nothing ran here, all is remembered here"
    assert trials(there) == trials(search(zoo.names, CandidateScorer(zoo, part), "linear", "coefficient", budget=4, executor="local"))
    class Dead(CandidateScorer):
        def items(self, *args):
            return super().items(*args) if self.known(*args) else pytest.fail("asked again")
    ask_together(Dead(zoo, part, home.store), [t.candidate for t in there.trials], "local")

def test_workers_compute_in_the_type_of_the_run(monkeypatch):
    def types(c): return float(len(os.environ.get("MODEL_GLUE_DTYPE", "")))
    for dtype, n in (("float32", 7), ("bfloat16", 8), (None, 0)): # the processes stay, the type changes
        monkeypatch.setenv(COMPUTED_IN, dtype) if dtype else monkeypatch.delenv(COMPUTED_IN, raising=False)
        with executors["processes"](types) as evaluate:
            assert [o.items["score"][0] for _, o in evaluate([Ask("a")])] == [n]

def test_auto_begins_here_and_goes_on_in_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(executors_room, "gains_by_processes", lambda score: True)
    monkeypatch.setattr(Auto, "spent", 0.)
    monkeypatch.setattr(executors_room, "n_cores", lambda: 2)
    score = toy(tmp_path)
    with executors["auto"](score) as evaluate: assert len(list(evaluate([Ask("a"), Ask("b")]))) == 2
    assert pids(tmp_path) == {os.getpid()}, "starting processes would take longer"
    monkeypatch.setattr(Auto, "spent", executors_room.START_S + 1)
    with executors["auto"](score) as evaluate:
        assert {a.candidate for a, _ in evaluate([Ask("c"), Ask("d"), Ask("e")])} == set("cde")
    assert len(pids(tmp_path)) >= 2

def test_only_small_models_on_several_cores_gain_by_processes(tmp_path, monkeypatch):
    score = CandidateScorer(read_zoo("demo"), load_suite("demo").part("search", 2))
    monkeypatch.setattr(executors_room, "n_cores", lambda: 2)
    monkeypatch.setattr(executors_room, "pick_device", lambda: "cpu")
    assert executors_room.gains_by_processes(score) and not executors_room.gains_by_processes(lambda c: 1)
    monkeypatch.setattr(executors_room, "pick_device", lambda: "cuda:0")
    assert not executors_room.gains_by_processes(score)
    monkeypatch.setattr(executors_room, "pick_device", lambda: "cpu")
    monkeypatch.setattr(executors_room, "are_small", lambda zoo: False)
    assert not executors_room.gains_by_processes(score)
    monkeypatch.undo()
    monkeypatch.setattr(executors_room, "n_cores", lambda: 1)
    assert not executors_room.gains_by_processes(score)

def test_a_member_that_fails_in_any_way_is_a_failed_outcome(tmp_path):
    zoo = tiny_zoo(tmp_path, ["a", "b"])
    class Odd(CandidateScorer):
        def items(self, c, share=1.): raise ZeroDivisionError("odd") if c == "a" else KeyError("deep inside")
    score = Odd(zoo, load_suite("demo").part("search", 1))
    assert "odd" in scored(score, Ask("a")).failed and "deep inside" in scored(score, Ask("b")).failed
    with pytest.raises(KeyError): scored(score, Ask(recipe("linear", ["a", "b"])))
