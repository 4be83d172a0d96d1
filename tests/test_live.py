"A merge in a live model: every tensor where it belongs, tied ones once, what does not fit refused before work."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_glue_nb.core import InputError
from model_glue_nb.merging.live import Conversion, LiveSink, fill, merge_into
from model_glue_nb.zoo.places import runs
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.zoo.zoo import open_model, tiny_zoo

def test_pieces_lie_where_they_begin():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(6, 4, dtype=dtype)
        put, item = fill(x), x.itemsize
        for start, value in ((5, 2.), (17, -3.)):
            piece = torch.full((3,), value, dtype=dtype).view(torch.uint8)
            put(piece.numpy() if value > 0 else piece, start)
        assert x.view(-1).tolist() == [0] * 5 + [2] * 3 + [0] * 9 + [-3] * 3 + [
            0] * 4
        assert put.memory.size == 24 * item

def step(kinds, dims, sources, targets=("x",)):
    made = [type(k, (), {})() for k in kinds]
    for o, d in zip(made, dims): o.dim = d
    return SimpleNamespace(operations=made, source_patterns=list(sources), target_patterns=list(targets))

def test_tensors_that_are_joined_lie_one_after_another():
    x = torch.zeros(7, 3)
    members, shapes = ([("q", "a.q"), ("k", "a.k"), ("v", "a.v")],
                       {"a.q": (4, 3), "a.k": (1, 3), "a.v": (2, 3)})
    parts = runs(step(["Concatenate"], [0], "qkv"), members, shapes, x)
    for i, (_, n) in enumerate(members): parts[n].fill_(i + 1)
    assert x[:, 0].tolist() == [1, 1, 1, 1, 2, 3, 3]

def test_experts_are_stacked_and_joined_within():
    x = torch.zeros(3, 5, 2)
    members = [(p, f"{p}.{e}") for p in ("gate", "up") for e in range(3)]
    shapes = {n: (2, 2) if p == "gate" else (3, 2) for p, n in members}
    parts = runs(step(["MergeModulelist", "Concatenate"], [0, 1], ["gate", "up"]), members, shapes, x)
    for i, (_, n) in enumerate(members): parts[n].fill_(i + 1)
    assert x[:, :, 0].tolist() == [[1, 1, 4, 4, 4],
                                   [2, 2, 5, 5, 5], [3, 3, 6, 6, 6]]
    assert runs(step(["Transpose"], [0], ["gate"]), members[:3], shapes, x) is None

def test_members_are_handed_over_in_their_order():
    class Step:
        def __init__(self): self.got = []
        def add_tensor(self, place, name, pattern, tensor): self.got.append(name)
        def convert(self, place, model, config):
            return {place: [torch.tensor([float(n[-1]) for n in self.got])]}
    c = Conversion("x", Step(),
                   [("p", "e.0"), ("p", "e.1"), ("q", "e.2")],
                   {f"e.{i}": torch.zeros(1) for i in range(3)})
    assert c.run(SimpleNamespace(config=None))["x"].tolist() == [0, 1, 2]

@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "GPTNeoX", "Mixtral"])
def test_a_live_model_equals_the_folder(architecture, tmp_path):
    zoo = tiny_zoo(tmp_path, ["base", "a", "b"], architecture, dtype="float32")
    r = recipe("task_arithmetic", ["a", "b"], [.3, 1.1], "base")
    live = merge(recipe("linear", ["a"]), zoo)
    merge_into(live, r, zoo)
    merge(r, zoo, tmp_path/"out")
    want = open_model(tmp_path/"out").load(device="cpu", dtype="float32").model.state_dict()
    got = {k: v.cpu() for k, v in live.model.state_dict().items()}
    assert (got.keys() == want.keys()
            and all(torch.equal(got[k].float(), want[k].to(got[k].dtype).float())
                    for k in got))
    assert any((got[k] != v.cpu()).any()
               for k, v in merge(recipe("linear", ["a"]), zoo).model.state_dict().items())

class Live(torch.nn.Module):
    "A model whose two ends may be one tensor, with a buffer that no merge has."
    def __init__(self, tied):
        super().__init__()
        self.embed, self.head = torch.nn.Parameter(torch.zeros(4, 2)), torch.nn.Parameter(torch.zeros(4, 2))
        if tied: self.head = self.embed
        self.register_buffer("mask", torch.ones(3))

def sink(tied=True, apart=False, **shapes):
    return LiveSink(Live(tied), shapes or dict(embed=(4, 2), head=(4, 2)), "m", apart)

def test_tied_weights_are_filled_once():
    assert sorted(sink(tied=False).to) == ["embed", "head"] and sorted(sink(tied=True).to) == ["embed"]
    with pytest.raises(InputError, match="ties 'embed' and 'head', the merge makes them differ"):
        sink(tied=True, apart=True)
    sink(tied=False, apart=True)

def test_what_is_missing_or_of_another_shape_is_refused():
    with pytest.raises(InputError, match="has no tensor 'head'"): sink(tied=False, embed=(4, 2))
    assert sorted(sink(tied=True, embed=(4, 2)).to) == ["embed"]
    made = SimpleNamespace(name="embed", shape=(5, 2), method="linear", dtype="F32")
    with pytest.raises(InputError, match=r"shape \(4, 2\) in the live model 'm', the merge makes \(5, 2\)"):
        sink()(made)

def test_a_head_apart_is_seen_only_where_models_differ(tmp_path):
    zoo = tiny_zoo(tmp_path, ["a", "b"], "Qwen2", tie_word_embeddings=True)
    live = merge(recipe("linear", ["a"]), zoo)
    merge_into(live, recipe("linear", ["a", "b"], [1, 3]), zoo)
    values = [load_file(zoo[n].path/"model.safetensors") for n in "ab"]
    want = (.25 * values[0]["model.norm.weight"].float() + .75 * values[1]["model.norm.weight"].float())
    assert (live.model.state_dict()["model.norm.weight"].float().cpu() - want).abs().max() < .01
