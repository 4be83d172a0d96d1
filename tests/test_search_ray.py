"A search on a Ray cluster of two nodes on one machine: the same results as here; an actor that dies is replaced and its candidate asked again."
import os, sys, time

import numpy as np
import pytest

ray = pytest.importorskip("ray")

from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.core import InputError, Store
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.searching.candidates import CandidateScorer
from model_glue_nb.searching.executors import N_TRIES, executors, patient_ray
from model_glue_nb.searching.protocol import Ask
from model_glue_nb.searching.search import search
from model_glue_nb.zoo.zoo import read_zoo

@pytest.fixture(scope="module")
def cluster():
    "Two nodes of one processor each."
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__]) # workers do not see the tests
    from ray.cluster_utils import Cluster
    node = dict(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
    with patient_ray():
        c = Cluster(initialize_head=True, head_node_args=node)
        c.add_node(**node | dict(include_dashboard=None))
    ray.init(address=c.address, log_to_driver=False, logging_level="ERROR")
    c.wait_for_nodes()
    yield c
    ray.shutdown()
    c.shutdown()

def test_a_node_may_take_longer_to_start_than_ray_allows(monkeypatch):
    from ray._private import services
    answers = iter([RuntimeError("not yet"), RuntimeError("not yet"), "there"])
    def ask(*node):
        said = next(answers)
        if isinstance(said, Exception): raise said
        return said
    monkeypatch.setattr(services, "get_node", ask)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with patient_ray(): assert services.get_node("address", "id") == "there"
    assert services.get_node is ask, "Ray's own limit is back"
    answers = iter([RuntimeError("never")])
    with pytest.raises(RuntimeError, match="never"), patient_ray(-1): services.get_node("address", "id")

def test_a_cluster_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(InputError, match="Nothing answers at RAY_ADDRESS='127.0.0.1:1' .*executor 'processes'"):
        executors["ray"](Toy(".")).__enter__()

class Toy:
    "Arithmetic in another process; says where it was asked, and may take its worker down."
    def __init__(self, room, dies=()): self.room, self.dies = str(room), dict(dies)

    def items(self, c, share=1.0):
        w = {c: 1.0} if isinstance(c, str) else {s.model: s.weight for s in c.models}
        mark = f"{self.room}/{w.get('a', 0):.3f}"
        n = sum(f.startswith(os.path.basename(mark)) for f in os.listdir(self.room))
        open(f"{mark}.{n}.{os.getpid()}", "w").close()
        time.sleep(.05)
        if not isinstance(c, str) and n < self.dies.get(round(w.get("a", 0), 3), 0): os._exit(1)
        return {"x": np.array([1 - (w.get("b", 0) - .3)**2])}

    def pids(self): return {f.rsplit(".", 1)[1] for f in os.listdir(self.room)}

def trials(r): return [(t.number, t.candidate, t.score, t.best) for t in r.trials]

def test_the_same_as_here_under_the_same_seed(cluster, tmp_path):
    room = tmp_path/"room"
    room.mkdir()
    score = Toy(room)
    how = dict(method="linear", strategy="evolution", budget=14)
    there = search(["a", "b"], score, **how, executor="ray", run=tmp_path/"run")
    assert len(score.pids()) == 2 and str(os.getpid()) not in score.pids(), "both nodes worked, this process did not"
    here = search(["a", "b"], score, **how)
    assert trials(there) == trials(here) and there.winner == here.winner
    again = search(["a", "b"], Toy(room), **how, run=tmp_path/"run") # what the cluster found goes on here
    assert trials(again) == trials(here)

def test_dead_actors_are_replaced_and_their_candidates_asked_again(cluster, tmp_path):
    score = Toy(tmp_path, dies={.5: 1, .2: N_TRIES})
    r = search(["a", "b"], score, "linear", "coefficient", budget=9, executor="ray")
    def asked(w): return [f for f in os.listdir(tmp_path) if f.startswith(w)]
    assert len(asked("0.500")) == 2 and len({f.rsplit(".", 1)[1] for f in asked("0.500")}) == 2, "asked again, by another process"
    assert [(t.number, t.failed.startswith(f"It took {N_TRIES} workers down")) for t in r.failed] == [(1, True)], "what kills every worker fails alone"
    here = search(["a", "b"], Toy(tmp_path), "linear", "coefficient", budget=9)
    assert ([x for x in trials(r) if x[0] != 1] == [x for x in trials(here) if x[0] != 1]
            and r.winner == here.winner)

def test_workers_that_cannot_start_are_no_failed_trials(cluster):
    class Homesick(Toy):
        def __reduce__(self): return eval, ("__import__('nowhere')",)
    with pytest.raises(InputError, match="A worker could not start.*nowhere"):
        search(["a", "b"], Homesick("."), executor="ray")

def test_real_merges_and_answers_come_home(cluster, tmp_path):
    zoo, part = read_zoo("demo").subset(["a-sort", "a-reverse"]), load_suite("demo").only(["sort", "reverse"]).part("search", 10)
    home = CandidateScorer(zoo, part, Store(tmp_path/"store.sqlite"))
    there = search(zoo.names, home, "linear", "coefficient", budget=4, executor="ray")
    assert not home.live and all(home.known(t.candidate, 1.0) for t in there.trials), "nothing ran here, all is remembered here"
    assert trials(there) == trials(search(zoo.names, CandidateScorer(zoo, part), "linear", "coefficient", budget=4))
    with executors["ray"](home) as evaluate: # what is remembered is not sent out
        (_, outcome), = evaluate([Ask(there.trials[0].candidate)])
        assert not evaluate.actors and outcome.items

@pytest.mark.parametrize("strategy", ["stepwise", "average", "racing"])
def test_workers_never_change_what_is_found(cluster, strategy):
    class Many:
        "Three members, forty questions; answers come back in another order than they were asked for."
        def items(self, c, share=1.0):
            from model_glue_nb.searching.protocol import first
            w = {c: 1.0} if isinstance(c, str) else {s.model: s.weight for s in c.models}
            level = .9 - (w.get("b", 0) - .3)**2 - w.get("c", 0) * .5
            time.sleep(.02 * (hash(repr(c)) % 3))
            return first({"x": (np.random.default_rng(1).random(40) < level).astype(float)}, share)
    here, there = (search(["a", "b", "c"], Many(), "linear", strategy, budget=12, executor=e) for e in ("local", "ray"))
    assert trials(here) == trials(there) and here.winner == there.winner and here.corrected == there.corrected
