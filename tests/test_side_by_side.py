"""Batches that are asked side by side: the same answers on every number of cores, the weights held once, torch's threads left as they were"""
import pytest, torch
from lm_eval.api.instance import Instance

from model_glue_nb.benchmarking import harness
from model_glue_nb.benchmarking.harness import as_lm_eval, pieces_of
from model_glue_nb.zoo import language_model
from model_glue_nb.zoo import threads as threads_room
from model_glue_nb.zoo.threads import n_side_by_side, side_by_side, twin
from model_glue_nb.zoo.zoo import tiny_zoo

PROMPTS = ["hello", "a", "to be or not", "hello there", "b", "one two three four five", "why", "x y z"] * 2
MANY = [f"{p} {n}" for n in "abcde" for p in PROMPTS] # more than are written together

@pytest.fixture(scope="module")
def live(tmp_path_factory): return tiny_zoo(tmp_path_factory.mktemp("zoo"), ["m"])["m"].load(device="cpu") # a GPU has threads of its own

@pytest.fixture
def threads(monkeypatch):
    "Models of any size count as large."
    monkeypatch.setattr(threads_room, "ONE_CORE", 0)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

def asked(until=("\n",)):
    ends = [dict(until=list(until), max_gen_toks=n, do_sample=False) for n in (5, 9, 3)]
    return [Instance(request_type="generate_until", doc={}, arguments=(p, dict(ends[i % 3])), idx=0)
            for i, p in enumerate(PROMPTS)]

def test_a_twin_shares_the_weights_and_nothing_else(live):
    other = twin(live.model)
    assert all(a is b for a, b in zip(live.model.parameters(), other.parameters(), strict=True))
    assert not {id(m) for m in live.model.modules()} & {id(m) for m in other.modules()}
    assert other.generation_config is not live.model.generation_config

def test_answers_do_not_depend_on_the_threads(live, threads, monkeypatch):
    said, used = {}, []
    real = language_model.side_by_side
    def seen(work, workers, pieces):
        used.append(len(workers))
        return real(work, workers, pieces)
    monkeypatch.setattr(language_model, "side_by_side", seen)
    for n in (1, 2, 3):
        threads(n)
        said[n] = live.generate(MANY, 12, ["\n"])
        assert torch.get_num_threads() == n
    assert said[1] == said[2] == said[3] and len(set(said[1])) > 1 and used == [2, 3]

def test_lm_eval_hears_the_same_side_by_side(live, threads, monkeypatch):
    heard, said, used = {}, {}, []
    real = harness.side_by_side
    def seen(work, workers, pieces):
        used.append((len(workers), sum(map(len, pieces))))
        return real(work, workers, pieces)
    class Hook:
        def __init__(self): self.got = []
        def add_partial(self, attr, args, answer):
            self.got.append((attr, args[0], args[1]["max_gen_toks"], answer))
    monkeypatch.setattr(harness, "side_by_side", seen)
    for n in (1, 2):
        threads(n)
        lm, hook = as_lm_eval(live, 2), Hook()
        lm.set_cache_hook(hook)
        said[n], heard[n] = lm.generate_until(asked(), disable_tqdm=True), hook.got
    assert said[1] == said[2] and len(set(said[1])) > 2
    assert heard[1] == heard[2] and used == [(2, len(PROMPTS))]

def test_the_pieces_are_those_that_lm_eval_makes(live):
    requests, lm = asked(), as_lm_eval(live, 3)
    sizes = {p: len(lm.tok_encode(p)) for p in PROMPTS}
    batches, real = [], lm.tok_batch_encode
    def seen(strings, **how):
        batches.append(list(strings))
        return real(strings, **how)
    lm.tok_batch_encode = seen
    lm.generate_until(requests, disable_tqdm=True)
    assert [[requests[i].args[0] for i in piece] for piece in pieces_of(requests, sizes, 3)] == batches

def test_samples_are_drawn_one_after_another(live, threads, monkeypatch):
    monkeypatch.setattr(harness, "side_by_side", lambda *_: pytest.fail("drawn side by side"))
    threads(2)
    requests = [Instance(request_type="generate_until", doc={}, idx=0,
                         arguments=(p, dict(until=["\n"], max_gen_toks=4, do_sample=True, temperature=.8))) for p in PROMPTS]
    assert len(as_lm_eval(live, 2).generate_until(requests, disable_tqdm=True)) == len(PROMPTS)

def test_memory_and_devices_bound_how_many_are_asked_at_once(live, threads):
    threads(4)
    assert [n_side_by_side(live.model, s)
            for s in ([], [9], [9]
                               * 2, [9] * 8, [2**14] * 8, [2**20] * 8)] == [
                1, 1, 2, 4, 2, 1]
    threads(1)
    assert n_side_by_side(live.model, [9] * 8) == 1

def test_a_failure_ends_all_of_it_and_leaves_the_threads(threads):
    threads(4)
    def work(worker, piece):
        if piece == 3: raise ValueError("no")
        return piece
    with pytest.raises(ValueError, match="no"): list(side_by_side(work, ["a", "b"], list(range(50))))
    assert torch.get_num_threads() == 4
