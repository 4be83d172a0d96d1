"Members of one shape that read other tokens: searched, attributed and merged by one tokenizer; what does not fit is set aside."
import json
from pathlib import Path

import numpy as np
import pytest

from model_glue_nb.benchmarking.suites import Question, Suite, Task
from model_glue_nb.core import InputError, Store
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.searching.candidates import CandidateScorer
from model_glue_nb.searching.evidence import ablations, attribution, honest_table
from model_glue_nb.searching.search import search
from model_glue_nb.zoo.zoo import read_zoo, tiny_tokenizer

def member(room, name, seed, words=64, added=(), swapped=False):
    "A fine-tune of one random base, with tokens of its own."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.02 * torch.randn_like(p) * bool(seed))
    t = tiny_tokenizer(64)
    if added:
        t.add_special_tokens(dict(additional_special_tokens=list(added)))
        model.resize_token_embeddings(len(t), mean_resizing=False)
    model.save_pretrained(room/name)
    t.save_pretrained(room/name)
    if swapped:
        file = room/name/"tokenizer.json"
        data = json.loads(file.read_text())
        v = data["model"]["vocab"]
        v["w10"], v["w11"] = v["w11"], v["w10"]
        file.write_text(json.dumps(data))
    return room/name

@pytest.fixture(scope="module")
def room(tmp_path_factory):
    room = tmp_path_factory.mktemp("vocabulary")
    for name, seed, more in (("base", 0, {}),
                             ("plain", 1, {}),
                             ("chat", 2, dict(added=["<im>", "</im>"])),
                             ("odd", 3, dict(swapped=True)),
                             ("other", 4, dict(added=["<tool>"]))):
        member(room, name, seed, **more)
    return room

def suite(n=8):
    def words(i): return " ".join(f"w{3 + (7 * i + k) % 60}" for k in range(6))
    return Suite("toy",
                 tuple(Task(t, tuple(Question(words(i + 50 * k), f"w{3 + i}") for i in range(n)), 4)
                       for k, t in enumerate("xy")))

@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_a_tune_with_added_tokens_is_searched_attributed_and_merged(room, method, tmp_path):
    zoo = read_zoo([room/n for n in ("base", "plain", "chat", "odd")])
    score = CandidateScorer(zoo, suite(), Store(tmp_path/"store.sqlite"))
    r = search(zoo.names, score, method, "stepwise", budget=14, base="base")
    assert r.tokenizer == "union" and list(r.aside) == ["odd"] and "uses different tokens than 'base'" in r.aside["odd"]
    assert r.trials and not r.failed, [t.failed for t in r.failed]
    used = [t.candidate for t in r.trials if "chat" in repr(t.candidate)]
    assert used and all(c.tokenizer == "union" for c in used)
    trial = next(t for t in r.trials[::-1] if "chat" in repr(t.candidate))
    made = merge(trial.candidate, zoo, tmp_path/"made") # the written merge answers as the live one did
    alone = CandidateScorer(type(zoo)((made,)), suite())
    assert alone("made") == pytest.approx(trial.score)
    assert {"<im>", "</im>"} <= set(made.tokenizer.tokens)
    from transformers import AutoTokenizer
    assert len(AutoTokenizer.from_pretrained(made.path)("<im>").input_ids) == 2, "begin, and one whole token"
    table = honest_table(r, score, suite(5))
    assert len(table) >= 3 and np.isfinite(table.report).all()
    from dataclasses import replace
    told = attribution(replace(r, winner=trial.candidate), score, suite(5), layer_groups=2)
    assert {"model", "layers"} <= set(told.kind) and np.isfinite(told.change).all()

def test_two_tunes_with_tokens_of_their_own_join_and_a_nested_union_keeps_them(room, tmp_path):
    zoo = read_zoo([room/n for n in ("base", "chat", "other")])
    inner = recipe("linear", ["chat", "base"], options=dict(tokenizer="union"))
    made = merge(recipe("linear",
                        [recipe("linear", ["base", "chat"], options=dict(tokenizer="union")), "other"],
                        options=dict(tokenizer="union")),
                 zoo, tmp_path/"nested")
    from transformers import AutoTokenizer
    t = AutoTokenizer.from_pretrained(made.path)
    assert [len(t(x).input_ids) for x in ("<im>", "<tool>", "w5")] == [2, 2, 2]
    r = search(zoo.names, CandidateScorer(zoo, suite()), "linear", "average", budget=4, base="base")
    assert r.tokenizer == "union" and not r.aside and not r.failed and inner.tokenizer == "union"

def test_what_is_wished_is_done_and_what_cannot_be_is_one_line(room):
    zoo = read_zoo([room/n for n in ("base", "plain", "odd")])
    score = CandidateScorer(zoo, suite())
    by_base = search(zoo.names, score, "linear", "average", budget=3, base="base", tokenizer="base")
    assert by_base.tokenizer == "base" and not by_base.aside and not by_base.failed
    two = zoo.subset(["base", "odd"])
    with pytest.raises(InputError, match="uses different tokens than 'base'"):
        search(two.names, CandidateScorer(two, suite()), "linear", "average", budget=3, base="base")
    with pytest.raises(InputError, match="Did you mean 'base'"):
        search(zoo.names, score, "linear", "average", budget=3, base="base", tokenizer="bsae")

def test_members_that_read_alike_need_no_tokenizer(room):
    zoo = read_zoo([room/n for n in ("base", "plain")])
    r = search(zoo.names, CandidateScorer(zoo, suite()), "linear", "average", budget=3, base="base")
    assert r.tokenizer is None and all(t.candidate.tokenizer is None for t in r.trials)
