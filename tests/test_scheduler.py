"Answers that are written together are those written alone, whoever comes and goes; and nobody is kept out."
import random, sys, threading
from pathlib import Path
from queue import SimpleQueue

import pytest, torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]/"tools"))
import certificate

from model_glue_nb.mixing.batches import GrowingBatch, Row, Sampling, SingleAnswers, batch_for
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.openai_api import Refusal
from model_glue_nb.mixing.scheduler import Done, Failed, Piece, Inquiry, Scheduler, Served, Started
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.zoo.decoding import greedy_tokens
from model_glue_nb.zoo.language_model import LanguageModel
from model_glue_nb.zoo.zoo import read_zoo, tiny_zoo

SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=.4)
LONG = dict(rope_theta=1e4, rope_type="longrope", factor=2., short_factor=[1.] * 4, long_factor=[2.] * 4, original_max_position_embeddings=8)
DYNAMIC = dict(rope_theta=1e4, rope_type="dynamic", factor=2.)

def kinds():
    torch.manual_seed(3)
    yield "llama", LlamaForCausalLM(LlamaConfig(**SMALL)), True
    yield "window", MistralForCausalLM(MistralConfig(**SMALL, sliding_window=64)), True
    yield "full window", MistralForCausalLM(MistralConfig(**SMALL, sliding_window=7)), True
    yield "long rope", LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=LONG)), False
    for kind in ("gpt2", "qwen3_moe", "gemma3_text"):
        yield kind, certificate.tiny_model(kind, 1), True

@pytest.mark.parametrize("name, model, joins", [pytest.param(*k, id=k[0]) for k in kinds()])
def test_who_joins_and_leaves_at_any_time_is_answered_as_alone(name, model, joins):
    "Rows of random lengths enter at random, leave at their ends, or before."
    model, chance = model.eval(), random.Random(7)
    vocabulary = min(40, model.config.get_text_config().vocab_size)
    rows = [Row([chance.randrange(5, vocabulary) for _ in range(chance.randrange(1, 9))], chance.randrange(1, 13)) for _ in range(14)]
    left, waiting, widths = set(rows[::5]), rows.copy(), []
    batch = GrowingBatch(LanguageModel(name, model, None))
    with torch.inference_mode():
        while waiting or batch.rows:
            said = batch.step() if batch.rows else []
            fresh = [waiting.pop() for _ in range(min(len(waiting), chance.randrange(4)))]
            if fresh: said += batch.add(fresh)
            for row, token in said: row.new.append(token)
            batch.drop({r for r in batch.rows if len(r.new) == r.most or r in left and len(r.new) > 2})
            widths += [(p.mask.shape[1], max(len(r.ids) + len(r.new) for r in p.rows)) for p in batch.parts if p.mask is not None]
    for row in rows:
        if row not in left: assert row.new == greedy_tokens(model, [row.ids], [], row.most)[0]
    assert batch.joined is joins and not batch.rows
    if joins: assert all(n < real + 1 for n, real in widths), "positions that nobody uses are taken out"

def test_models_that_keep_to_themselves_are_asked_one_by_one():
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    assert isinstance(batch_for(LanguageModel("x", model, None)), GrowingBatch)
    dynamic = LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=DYNAMIC))
    assert isinstance(batch_for(LanguageModel("x", dynamic, None)), SingleAnswers)
    model.generation_config.repetition_penalty = 1.2
    assert isinstance(batch_for(LanguageModel("x", model, None)), SingleAnswers)

# ---- the scheduler
def ask(scheduler, questions):
    "All at once: texts, and how each ended."
    events, texts, ends = SimpleQueue(), [""] * len(questions), {}
    scheduler.ask(questions, lambda i, event: events.put((i, event)))
    while len(ends) < len(questions):
        i, event = events.get(timeout=60)
        if isinstance(event, Piece): texts[i] += event.text
        if isinstance(event, (Done, Failed)): ends[i] = event
    return texts, [ends[i] for i in range(len(questions))]

@pytest.fixture
def at_work():
    made = []
    def make(live, **how):
        made.append(Scheduler(Served(live), **how))
        return made[-1]
    yield make
    for s in made: s.stop()

def test_a_rare_expert_is_not_kept_out_by_a_busy_one(tmp_path, at_work):
    "One model in memory: who came first is answered before those who came later to the open lane."
    zoo = tiny_zoo(tmp_path, ["a", "b"], dtype="float32")
    live = mix(MixtureSpec(("a", "b"), dict(name="random"), max_resident=1), zoo, tmp_path/"m").load("cpu")
    s, order, done = at_work(live), [], threading.Event()
    def tell(name, event):
        if isinstance(event, Started): order.append(name)
        if isinstance(event, (Done, Failed)):
            order.append(name + "!")
            if name == "last": done.set()
    with s.changed: # nothing is taken in before all are there
        for name, e in (("first", 0), ("rare", 1), ("last", 0)):
            s.ask([Inquiry("w3 w4", e, 3)], lambda i, event, name=name: tell(name, event))
    assert done.wait(60)
    assert order == ["first", "first!", "rare", "rare!", "last", "last!"]

def test_a_short_answer_does_not_wait_for_a_long_one(at_work):
    live = read_zoo("demo")["b-shift"].load("cpu")
    s, ended, done = at_work(live), [], threading.Event()
    def tell(i, event):
        if isinstance(event, Done):
            ended.append(i)
            if len(ended) == 6: done.set()
    s.ask([Inquiry("shift KLMNOPQ =", most=8), *[Inquiry("shift AB =", most=2)] * 5], tell)
    assert done.wait(60) and ended[-1] == 0
    assert s.n_steps <= 9, "one pass a token, however many are asked"

def test_a_lane_is_never_wider_than_allowed(at_work):
    live = read_zoo("demo")["a-sort"].load("cpu")
    sizes = []
    hook = live.model.register_forward_pre_hook(lambda m, a, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True)
    s = at_work(live, rows=3)
    prompts = [f"sort {x}A =" for x in "BCDEFGHIJK"]
    texts, _ = ask(s, [Inquiry(p, most=6) for p in prompts])
    hook.remove()
    assert max(sizes) == 3 and texts == live.generate(prompts, 6)

@pytest.mark.parametrize("level", ["block", "adapter"])
def test_a_mixture_in_one_checkpoint_answers_too(tmp_path, at_work, level):
    how = dict(difference=dict(rank=4)) if level == "adapter" else {}
    spec = MixtureSpec(("a-sort", "a-reverse"), dict(name="random"), level, "a-base", **how)
    live = mix(spec, read_zoo("demo"), tmp_path/"m", verify=False).load("cpu")
    prompts = ["sort CAB =", "reverse ABCDE =", "sort BA ="]
    texts, ends = ask(at_work(live), [Inquiry(p, most=5) for p in prompts])
    assert texts == live.generate(prompts, 5) and all(isinstance(e, Done) for e in ends)

def test_a_base_with_a_penalty_answers_as_its_experts_alone(tmp_path, at_work):
    "Such a base can't be batched token by token; each of its experts is asked by itself, with the penalty."
    spec = MixtureSpec(("a-sort", "a-reverse"), dict(name="random"), level="adapter", bases=("a-base",), difference=dict(rank=4))
    live = mix(spec, read_zoo("demo"), tmp_path/"m").load("cpu")
    prompts = ["sort IUJRH =", "turn CYZAO around =", "sort PEVBM ="]
    free = live.generate(prompts, 8)
    live.shared_base(0).live.model.generation_config.repetition_penalty = 1.3
    scheduler, said = at_work(live), set()
    for e in (0, 1):
        texts, _ = ask(scheduler, [Inquiry(p, e, 8) for p in prompts])
        assert texts == [live.expert(e).generate([p], 8)[0] for p in prompts] and texts != free
        said.add(tuple(texts))
    assert len(said) == 2, "the experts differ"

def test_a_mixture_among_the_experts_routes_again(tmp_path, at_work):
    zoo = tiny_zoo(tmp_path, ["a", "b", "c"], dtype="float32")
    inner = mix(MixtureSpec(("a", "b"), dict(name="random")), zoo, tmp_path/"inner")
    live = mix(MixtureSpec((str(inner.path), str(zoo["c"].path)), dict(name="random")), None, tmp_path/"outer").load("cpu")
    prompts = [f"w{i} w{i + 1}" for i in range(3, 15)]
    texts, _ = ask(at_work(live), [Inquiry(p, most=4) for p in prompts])
    assert texts == live.generate(prompts, 4) and len(set(texts)) > 3

def test_a_prompt_that_no_router_can_read_fails_alone(tmp_path, at_work, monkeypatch):
    zoo = tiny_zoo(tmp_path, ["a", "b"], dtype="float32")
    live = mix(MixtureSpec(("a", "b"), dict(name="random")), zoo, tmp_path/"m").load("cpu")
    real = type(live).route_scores
    def route_scores(self, prompts):
        if "w9" in prompts: raise RuntimeError("w9 cannot be read")
        return real(self, prompts)
    monkeypatch.setattr(type(live), "route_scores", route_scores)
    texts, ends = ask(at_work(live), [Inquiry(p, most=3) for p in ("w3", "w9", "w4")])
    assert [type(e) for e in ends] == [Done, Failed, Done] and ends[1].refusal.status == 500
    assert texts[0::2] == [live.expert(int(live.route([p])[0])).generate([p], 3)[0] for p in ("w3", "w4")]

def test_draws_follow_their_chances(at_work):
    "What is drawn from many seeds has the frequencies of the softmax."
    live = read_zoo("demo")["a-sort"].load("cpu")
    texts, _ = ask(at_work(live, rows=64, queue=1000), [Inquiry("double AB =", most=1, sampling=Sampling(2., seed=i)) for i in range(600)])
    ids = torch.tensor(live.encode(["double AB ="]))
    with torch.inference_mode(): p = (live.model(ids).logits[0, -1].float() / 2).softmax(-1)
    top = int(p.argmax())
    said = live.tokenizer.decode([top], skip_special_tokens=True)
    share = sum(t == said for t in texts) / 600
    assert abs(share - float(p[top])) < 4 * (float(p[top]) * (1 - float(p[top])) / 600)**.5 and .05 < share < .95

def test_nothing_is_taken_in_part(at_work):
    s = at_work(read_zoo("demo")["a-sort"].load("cpu"), queue=3)
    with pytest.raises(Refusal, match="0 of 3 places"): s.ask([Inquiry("sort BA =")] * 4, print)
    assert not s.waiting and all(isinstance(e, Done) for e in ask(s, [Inquiry("sort BA =")] * 3)[1])
