"Requests to a model: what they ask for, in which groups, what is remembered, and what is cut."
from types import SimpleNamespace

import pytest

from model_glue_nb.benchmarking.harness import Keeper, count_cut, cut_left, generate_each, generation_settings, grouped_by_arguments
from model_glue_nb.benchmarking.harness import last_tokens, request_key, respond, sampling_of, token_budget
from model_glue_nb.benchmarking.judging import answer_of
from model_glue_nb.core import InputError
from model_glue_nb.store import Store

def asked(text, kind="generate_until", repeats=1, doc=0, **how):
    args = (text, how) if kind == "generate_until" else (text, how["end"])
    return SimpleNamespace(args=args, request_type=kind, repeats=repeats, resps=[], task_name="t", doc_id=doc)

class Words:
    "A tokenizer of words, with one token before every text."
    def __call__(self, text, add_special_tokens=True):
        return dict(input_ids=["<s>"] * add_special_tokens + text.split())
    def decode(self, ids): return " ".join(ids)

class Counting:
    "A model that answers with how often it was asked."
    max_length = 10
    def __init__(self): self.calls = []
    def set_cache_hook(self, hook): self.cache_hook = hook
    def tok_encode(self, text): return text.split()
    def generate_until(self, requests, disable_tqdm):
        out = []
        for r in requests:
            self.calls.append(r.args[0])
            out.append(f"{r.args[0]} {len(self.calls)}")
            self.cache_hook.add_partial("generate_until", r.args, out[-1])
        return out

def test_logits_take_at_most_a_gigabyte():
    for vocab in (151_936, 262_144):
        assert 256 <= token_budget(vocab, False) * vocab * 4 / 2**30 * 1024 <= 1024.1 * 1
    assert token_budget(32_000, True) == 2048 and token_budget(32_000, False) == 2**28 // 32_000 and token_budget(2**26, True) == 256
    assert token_budget(1000, False) == 16384

def test_what_a_request_asks_for():
    got = generation_settings(dict(until=["\n", ["x", "y"]], max_gen_toks=9))
    assert got == (9, ["\n", "x", "y"], {})
    assert generation_settings(dict(until=["\n", ""], max_gen_toks=9))[:2] == (1, ["\n"])
    assert generation_settings({}, 7).max_new_tokens == 7

def test_what_makes_an_answer_other_than_greedy():
    assert sampling_of(dict(do_sample=False, temperature=.7, top_p=.9, num_beams=1, use_cache=True)) == {}
    assert sampling_of(dict(do_sample=True, temperature=.7, top_p=None)) == dict(do_sample=True, temperature=.7)
    assert sampling_of(dict(num_beams=3, repetition_penalty=1.2)) == dict(num_beams=3, repetition_penalty=1.2)

class Echo:
    "Answers with the prompt and what it was told."
    def __init__(self): self.calls = []
    def generate(self, prompts, max_new_tokens, stop):
        self.calls.append((tuple(prompts), max_new_tokens, tuple(stop)))
        return [f"{p}:{max_new_tokens}{''.join(stop)}" for p in prompts]

def test_each_request_keeps_its_own_arguments():
    requests = [asked("a", until=["x"], max_gen_toks=3),
                asked("b", until=["y"], max_gen_toks=5),
                asked("c", until=["x"], max_gen_toks=3)]
    assert [at for _, at in grouped_by_arguments(requests)] == [[0, 2], [1]]
    live, kept = Echo(), []
    assert generate_each(live, requests, lambda r, answer: kept.append((r.args[0], answer))) == ["a:3x", "b:5y", "c:3x"]
    assert (live.calls == [(("a", "c"), 3, ("x",)), (("b",), 5, ("y",))]
            and sorted(kept) == [("a", "a:3x"), ("b", "b:5y"), ("c", "c:3x")])

class Sampling(Echo):
    "Takes a temperature too."
    def generate(self, prompts, max_new_tokens, stop, temperature=None, do_sample=False):
        self.calls.append((tuple(prompts), temperature, do_sample))
        return list(prompts)

def test_what_is_drawn_in_another_way_is_asked_apart():
    requests = [asked("a", do_sample=True, temperature=.7), asked("b", until=["\n"]),
                asked("c", do_sample=True, temperature=.2), asked("d", temperature=.7)]
    live = Sampling()
    assert generate_each(live, requests) == list("abcd")
    assert live.calls == [(("a", "d"), .7, True), (("b",), None, False), (("c",), .2, True)]

def test_what_a_model_cannot_do_is_refused_before_it_is_asked_anything():
    requests, live = [asked("a"), asked("b", do_sample=True, temperature=.7)], Echo()
    with pytest.raises(InputError, match="generates greedily only"): generate_each(live, requests)
    assert not live.calls
    requests[1] = asked("b", do_sample=False, temperature=.7)
    assert len(generate_each(live, requests)) == 2, "a temperature says nothing of greedy decoding"

@pytest.mark.parametrize("how, says", [(dict(until=[3]), "stops at"), (dict(max_gen_toks=0), "generates 0 tokens"),
                                       (dict(max_gen_toks="many"), "Correct them in its YAML")])
def test_a_request_that_asks_for_what_nobody_can_give_is_refused(how, says):
    with pytest.raises(InputError, match=says): generation_settings(how)

def test_answers_of_another_length_are_asked_apart():
    requests = [asked("a", until=["x"], max_gen_toks=3), asked("b", until=["x"], max_gen_toks=4)]
    assert generate_each(Echo(), requests) == ["a:3x", "b:4x"]

def test_prompts_leave_the_tokens_that_an_answer_needs():
    live = Echo()
    live.tokenizer, live.model = Words(), SimpleNamespace(config=SimpleNamespace(max_position_embeddings=8))
    assert generate_each(live, [asked("a b c d e f g", until=["x"], max_gen_toks=3)]) == ["d e f g:3x"]

def test_the_end_of_a_prompt_is_what_stays():
    words = Words()
    assert last_tokens(words, "a b c d", 5) == "a b c d" and last_tokens(words, "a b c d e f", 4) == "d e f"
    live = SimpleNamespace(tokenizer=words, model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=8)))
    assert cut_left(live, ["a b c d e f g", "a b"], 3) == ["d e f g", "a b"]
    with pytest.raises(InputError, match="generates up to 8 tokens, the model reads 8"):
        cut_left(live, ["a"], 8)

def test_what_is_remembered_is_not_asked_again(tmp_path):
    store = Store(tmp_path/"s.sqlite")
    first = [asked("a", until=["x"]), asked("b", until=["x"]), asked("a", until=["y"])]
    assert len({request_key(r) for r in first}) == 3
    respond(Counting(), first, "m", store)
    assert [r.resps for r in first] == [["a 1"], ["b 2"], ["a 3"]]
    again, lm = ([asked("a", until=["x"]),
                  asked("a", until=["z"]),
                  asked("b", until=["x"], repeats=3)],
                 Counting())
    respond(lm, again, "m", store)
    assert lm.calls == ["a", "b", "b", "b"], "an answer that is drawn several times is asked for each time"
    assert [r.resps for r in again] == [["a 1"], ["a 1"], ["b 2", "b 3", "b 4"]]

def test_progress_counts_what_was_there():
    seen, requests = [], [asked(t, until=["x"]) for t in "abc"]
    respond(Counting(), requests, "m", progress=lambda done, total, what: seen.append((done, total)))
    assert seen[-1] == (3, 3)
    keeper = Keeper(None, "m", lambda *said: seen.append(said), done=2, total=3)
    keeper.add_partial("generate_until", ("a", {}), "b")
    keeper.flush()
    assert seen[-1] == (3, 3, "asking") and not keeper.waiting

def test_questions_longer_than_the_context_are_counted_to_the_token():
    lm = Counting() # reads 10 tokens
    choices = [asked(" ".join("abcdefgh"[:n]), "loglikelihood", doc=n, end=" x y z") for n in (6, 7, 8)]
    assert count_cut(lm, SimpleNamespace(name="t", kind="multiple_choice"), choices) == 0, "the last token is not read"
    assert count_cut(lm, SimpleNamespace(name="t", kind="multiple_choice"), [asked(" ".join("abcdefghi"), "loglikelihood", end=" x y z")]) == 1
    texts = [asked(" ".join("abcdefgh"[:n]), doc=n, until=["."], max_gen_toks=4)
             for n in (5, 6, 7, 8)]
    assert count_cut(lm, SimpleNamespace(name="t", kind="generate_until"), texts) == 2
    with pytest.raises(InputError, match="generates up to 10 tokens"):
        count_cut(lm, SimpleNamespace(name="t", kind="generate_until"), [asked("a", max_gen_toks=10)])

def test_the_likeliest_choice_is_the_answer():
    loaded = SimpleNamespace(doc_to_choice=lambda doc: ["x", "y", "z"])
    asked_of = [SimpleNamespace(doc={})]
    assert answer_of(SimpleNamespace(kind="multiple_choice"), loaded, asked_of, [(-3., False), (-1., False), (-2., True)]) == "y"
    assert answer_of(SimpleNamespace(kind="generate_until"), loaded, asked_of, ["said"]) == "said"
    assert answer_of(SimpleNamespace(kind="loglikelihood_rolling"), loaded, asked_of, [-3.]) == ""
