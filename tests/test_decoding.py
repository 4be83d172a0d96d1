"Answers written together: as each prompt alone, whatever the lengths, the architecture and where answers end; joined only where the model says the same."
import sys
from pathlib import Path
import pytest, torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from model_glue_nb.zoo import decoding
from model_glue_nb.zoo.decoding import greedy_tokens
from test_loading import CACHED

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/"tools"))
import certificate

PROMPTS = [[5, 6, 7], [9], [8, 4, 12, 13, 22, 31, 40], [17, 18, 19], [33, 3, 44, 6, 5, 9, 11, 23, 50, 51, 12, 10], [7, 7]]
NO_POSITIONS = {"bloom"} # they are no argument of its forward

def loud(model):
    "Random weights so large that a wrong position or mask changes every logit; float64."
    if hasattr(model, "set_experts_implementation"): model.set_experts_implementation("eager") # others know no float64
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p.mul_(8)
    return model.double().eval()

def wide(model):
    "With a window that never fills."
    for config in (model.config, *(m.config for m in model.modules() if hasattr(m, "config"))):
        if getattr(config, "sliding_window", None): config.sliding_window = 64
    for m in model.modules():
        if getattr(m, "sliding_window", None): m.sliding_window = 64
    return loud(model)

SMALL = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128)

def llama(**more):
    torch.manual_seed(3)
    return loud(LlamaForCausalLM(LlamaConfig(**SMALL, **more)))

@pytest.fixture
def joined(monkeypatch):
    "How many rows were aligned each time; nothing is known of any model before."
    seen, real = [], decoding.aligned
    monkeypatch.setattr(decoding, "_JOINS", {})
    monkeypatch.setattr(decoding, "aligned", lambda parts: seen.append(sum(len(p.rows) for p in parts)) or real(parts))
    return seen

def alone(model, ends=(), n=10, stopped=None): return [greedy_tokens(model, [p], ends, n, stopped)[0] for p in PROMPTS]

@pytest.mark.parametrize("kind", CACHED)
def test_every_architecture_answers_as_each_prompt_alone(kind, joined):
    model = wide(certificate.tiny_model(kind, 0))
    want = alone(model)
    assert not joined and len(set(map(tuple, want))) > 1
    assert greedy_tokens(model, PROMPTS, [], 10) == want
    assert joined == ([] if kind in NO_POSITIONS else [2, len(PROMPTS)]), "probed once, then all rows"

@pytest.mark.parametrize("kind", sorted(set(CACHED) - NO_POSITIONS))
def test_logits_are_those_of_each_alone(kind):
    "Not only the largest: all, at every step, as far as a softmax in float32 lets it be said."
    model = wide(certificate.tiny_model(kind, 1))
    with torch.inference_mode():
        parts = [decoding.read_together(model, PROMPTS, [i], decoding._anywhere) for i in range(len(PROMPTS))]
        rows = decoding.aligned(parts)
        for _ in range(5):
            got = rows.logits(model)
            want = torch.cat([p.logits(model) for p in parts])
            assert (got - want).abs().max() <= 1e-6 * want.abs().max() and got.std(0).max() > 1e-3
            rows.last = got.argmax(-1, keepdim=True)
            for p, token in zip(parts, rows.last): p.last = token[None]

def test_one_pass_per_length_and_one_per_token(joined):
    model, passes = llama(), []
    hook = model.register_forward_hook(lambda *a: passes.append(1))
    greedy_tokens(model, PROMPTS, [], 10)
    probe, lengths = 3, len(set(map(len, PROMPTS)))
    assert len(passes) == probe + lengths + 9
    passes.clear()
    greedy_tokens(model, PROMPTS, [], 10)
    assert len(passes) == lengths + 9, "probed once per class and configuration"
    hook.remove()

def test_rows_that_have_ended_are_taken_out(joined):
    model, sizes = llama(), []
    free = alone(model, n=16)
    ends = sorted({free[0][2], free[2][5], free[4][9]})
    want = [row[:next((i + 1 for i, t in enumerate(row) if t in ends), len(row))] for row in free]
    hook = model.register_forward_hook(lambda m, a, kw, y: sizes.append(len(kw["input_ids"])), with_kwargs=True)
    assert greedy_tokens(model, PROMPTS, ends, 16) == want and len(set(map(len, want))) > 2
    assert sizes[-1] < len(PROMPTS), "the last steps are of fewer rows"
    hook.remove()

def test_stop_strings_end_rows_too(joined):
    model = llama()
    free = alone(model, n=16)
    def stopped(rows): return [free[0][3] in r or len(r) >= 8 for r in rows]
    got = greedy_tokens(model, PROMPTS, [], 16, stopped)
    assert got == alone(model, n=16, stopped=stopped) and {len(r) for r in got} == {4, 8}
    assert all(g == f[:len(g)] for g, f in zip(got, free))

@pytest.mark.parametrize("window, together", [(64, True), (9, False)])
def test_a_sliding_window_joins_until_it_is_full(window, together, joined):
    torch.manual_seed(1)
    model = loud(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window)))
    assert greedy_tokens(model, PROMPTS, [], 20) == alone(model, n=20)
    assert bool(joined) == together

@pytest.mark.parametrize("rope", [dict(rope_type="dynamic", factor=2.), dict(rope_type="longrope", factor=2., short_factor=[1.] * 4, long_factor=[2.] * 4, original_max_position_embeddings=16)])
def test_frequencies_that_follow_the_length_keep_rows_apart(rope, joined):
    model = llama(rope_parameters=dict(rope_theta=1e4, **rope))
    assert greedy_tokens(model, PROMPTS, [], 10) == alone(model) and not joined

@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_an_argument_is_found_out(ignored, joined, monkeypatch):
    "It names both, and uses one: what it says is checked, not what its arguments are called."
    real = LlamaForCausalLM.forward
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, logits_to_keep=0):
        given = dict(attention_mask=attention_mask, position_ids=position_ids)
        given[ignored] = None
        return real(self, input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep, **given)
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    model = llama()
    assert greedy_tokens(model, PROMPTS, [], 10) == alone(model)
    assert joined == [2] and list(decoding._JOINS.values()) == [False]

def test_half_precision_is_joined_too(joined):
    model = llama().bfloat16()
    got = greedy_tokens(model, PROMPTS, [], 10)
    assert joined == [2, len(PROMPTS)] and all(len(r) == 10 for r in got)

def test_what_was_read_can_still_be_continued_alone():
    "Alignment copies; a part's cache is as it was."
    model = llama()
    with torch.inference_mode():
        parts = [decoding.read_together(model, PROMPTS, [i], decoding._anywhere) for i in range(3)]
        before = [[(l.keys.clone(), l.values.clone()) for l in p.cache.layers] for p in parts]
        assert decoding.joins(model, parts)
        decoding.aligned(parts).logits(model)
    for p, layers in zip(parts, before):
        for layer, (keys, values) in zip(p.cache.layers, layers, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
