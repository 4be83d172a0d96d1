"Tokenizers joined by hand: whose settings count, which ids and merges stay, what is taken from the files beside, and adapters with weights of their own."
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model_glue_nb.core import InputError
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.zoo.adapters import adapted
from model_glue_nb.zoo.unions import copy_tokenizer, join_tokenizers, joinable, letters, read_parts
from model_glue_nb.zoo.zoo import tiny_zoo

def part(vocab, merges=(), **added):
    "A tokenizer.json of letters; added tokens with an id and whether they are special."
    tokens = [dict(content=f"<{k}>", id=i, special=special, lstrip=k == "x") for k, (i, special) in added.items()]
    return dict(model=dict(type="BPE", vocab=dict(vocab), merges=[tuple(m) for m in merges]), added_tokens=tokens)

A = part(dict(a=0, b=1, ab=2),
         [("a", "b")], x=(4, True), y=(3, False))
B = part(dict(b=0, c=1, bc=2),
         [("b", "c"), ("a", "b"), ("c", "c")],
         z=(3, True), x=(5, False), y=(4, True))
UNION = dict(a=0, b=1, ab=2, c=6, bc=7) | {"<y>": 3, "<x>": 4, "<z>": 5}

def test_the_leading_settings_count_and_ids_are_the_unions():
    joined = join_tokenizers(UNION, [A, B])
    told = [(x["content"], x["id"], x["special"], x["lstrip"]) for x in joined["added_tokens"]]
    assert told == [("<y>", 3, False, False), ("<x>", 4, True, True), ("<z>", 5, True, False)]
    other = join_tokenizers(UNION, [B, A])
    assert [(x["content"], x["special"])
            for x in other["added_tokens"]] == [("<y>", True), ("<x>", False), ("<z>", True)]
    assert joined["model"]["vocab"] == UNION

def test_merges_of_all_that_lead_to_a_token():
    assert join_tokenizers(UNION, [A, B])["model"]["merges"] == [["a", "b"], ["b", "c"]], "nothing is called cc"
    assert join_tokenizers(UNION, [B, A])["model"]["merges"] == [["b", "c"], ["a", "b"]]

def test_tokens_from_the_files_beside(tmp_path):
    t = Tokenizer(models.BPE(dict(a=0, b=1), []))
    t.save(str(tmp_path/"tokenizer.json"))
    (tmp_path/"added_tokens.json").write_text('{"<x>": 2}')
    (tmp_path/"special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    assert {x["content"]: x["special"] for x in read_parts(tmp_path)["added_tokens"]} == {"<x>": False, "<s>": True}

def written(t, home):
    t.save(str(home/"tokenizer.json"))
    (home/"tokenizer_config.json").write_text("{}")

def test_letters_of_two_kinds_do_not_join(tmp_path):
    zoo = tiny_zoo(tmp_path, ["a", "b"])
    by_bytes, by_words = (Tokenizer(models.BPE({c: i for i, c in enumerate("abĠ")}, [])),
                          Tokenizer(models.BPE({c: i for i, c in enumerate("ab▁")}, [])))
    by_bytes.pre_tokenizer, by_bytes.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    by_words.pre_tokenizer, by_words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    for m, t in zip(zoo, (by_bytes, by_words)): written(t, m.path)
    assert [letters(read_parts(m.path)) for m in zoo] == ["bytes", "▁"]
    said, = joinable(list(zoo))
    assert "its tokens are ▁, those of 'a' bytes" in said

def test_special_ids_come_with_the_tokenizer(tmp_path):
    one, other = tiny_zoo(tmp_path, ["one", "other"])
    for file in ("config.json", "generation_config.json"):
        (other.path/file).write_text(json.dumps(dict(eos_token_id=[7, 9], pad_token_id=3, hidden_size=1)))
        mine = json.loads((one.path/file).read_text()) if (one.path/file).exists() else {}
        (one.path/file).write_text(json.dumps(mine | dict(eos_token_id=1, hidden_size=5)))
    copy_tokenizer(other.path, one.path)
    for file in ("config.json", "generation_config.json"):
        told = json.loads((one.path/file).read_text())
        assert told["eos_token_id"] == [7, 9] and told["pad_token_id"] == 3 and told["hidden_size"] == 5

def test_a_union_says_its_added_tokens_in_both_files(tmp_path):
    from test_tokenizers import OTHER, TEXTS, byte_level, members
    pair = members(tmp_path, (byte_level(TEXTS), ("<y>", "<x>")), (byte_level(OTHER), ("<z>", "<x>")))
    merge(recipe("linear", pair, [1, 3], options=dict(tokenizer="union")), None, tmp_path/"out")
    t, about = (json.loads((tmp_path/"out"/f).read_text()) for f in ("tokenizer.json", "tokenizer_config.json"))
    assert {str(x["id"]): x["content"]
            for x in t["added_tokens"]} == {i: x["content"] for i, x in about["added_tokens_decoder"].items()}
    assert {"<x>", "<y>", "<z>"} <= {x["content"] for x in t["added_tokens"]}

def adapter(home, base, **tensors):
    "A LoRA adapter of the embeddings."
    home.mkdir()
    (home/"adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=2, lora_alpha=3, target_modules=["embed_tokens"])))
    stem = "base_model.model.model.embed_tokens."
    save_file({stem + k: v for k, v in tensors.items()}, home/"adapter_model.safetensors")
    return adapted(base, home)

def test_an_adapter_may_bring_the_weight_that_it_changes(tmp_path):
    from model_glue_nb.merging.engine import open_input
    from model_glue_nb.zoo.stored import Files
    base = tiny_zoo(tmp_path, ["a"], dtype="float32")["a"]
    rows, width = base.tensors["model.embed_tokens.weight"].shape
    torch.manual_seed(0)
    up, down, own = torch.randn(width, 2), torch.randn(2, rows), torch.randn(rows, width)
    def values(view):
        x = view.inputs["model.embed_tokens.weight"]
        out = np.zeros(4 * rows * width, np.uint8)
        with Files() as files: open_input(x, files, False, "cpu").read(0, rows * width, out)
        return out.view(np.float32).reshape(rows, width)
    change = 1.5 * (up @ down).T.numpy()
    plain = values(adapter(tmp_path/"plain", base, lora_embedding_A=down, lora_embedding_B=up))
    assert np.allclose(plain, base.values("model.embed_tokens.weight") + change, atol=1e-4)
    brought = values(adapter(tmp_path/"own", base, lora_embedding_A=down, lora_embedding_B=up, **{"base_layer.weight": own}))
    assert np.allclose(brought, own.numpy() + change, atol=1e-4)
    with pytest.raises(InputError, match="is incomplete"): adapter(tmp_path/"half", base, lora_embedding_B=up)
