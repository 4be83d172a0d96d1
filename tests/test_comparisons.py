"Similarities gathered by hand: roles, layers, error bounds, what is left out, and what each model is to itself."
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from model_glue_nb.core import InputError
from model_glue_nb.merging.live import head_is_apart
from model_glue_nb.zoo.adapters import adapted
from model_glue_nb.mergeability.similarity import Comparison, layer, role, compared_weights
from model_glue_nb.merging.planner import checked_plan
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.zoo.zoo import Zoo, tiny_zoo

WEIGHTS = [f"model.layers.{k}" for k in ("0.self_attn.q", "0.mlp.up", "0.mlp.down", "1.mlp.up", "1.adapter.w")]

def comparison():
    "Three models of two shapes: two compared over five weights, with bounds; the third alone."
    values = np.array([[[1, x], [x, 1]] for x in (.9, .5, .1, .7, .3)])
    values[:, 0, 0] = .99 # as a zero column would leave it
    errors = np.array([[[0, e], [e, 0]] for e in (.03, .04, .0, .12, .9)])
    return Comparison(["a", "b", "c"],
                      [(["a", "c"], WEIGHTS, dict(column_cosine=values), dict(column_cosine=errors))],
                      {"b": "it is alone"})

def test_names_tell_roles_and_layers():
    assert [role(k) for k in WEIGHTS] == ["attn", "mlp", "mlp", "mlp", None]
    assert [role(k) for k in ("h.0.attn.c_attn.weight", "layer.1.attention.key", "block_sparse_moe.gate", "norm")] == ["attn", "attn", "mlp", None]
    assert layer("model.layers.12.mlp.up_proj.weight") == 12 and layer("model.norm.weight") == layer("lm_head.weight") == -1

def test_only_weights_of_a_role_count():
    c = comparison()
    assert c.square().loc["a", "c"] == pytest.approx((.9 + .5 + .1 + .7) / 4)
    assert (c.square(roles=("mlp",)).loc["a", "c"] == pytest.approx((.5 + .1 + .7) / 3)
            and np.isnan(c.square().loc["a", "b"]))

def test_bounds_of_different_weights_are_independent():
    assert comparison().square(errors=True).loc["a", "c"] == pytest.approx(
        np.sqrt(.03**2 + .04**2 + .12**2) / 4)

def test_a_model_is_one_with_itself():
    near = comparison().nearness()
    assert near.to_numpy().diagonal().tolist() == [1, 1, 1] and near.attrs["skipped"] == {"b": "it is alone"}

def test_tables_by_role_and_layer():
    c = comparison()
    def told(by):
        return {(r.role, r.layer if r.layer == r.layer else None): round(r.value, 6)
                for r in c.table(by).itertuples()
                if r.value == r.value}
    assert told("role") == {("attn", None): .9, ("mlp", None): round(1.3 / 3, 6), ("all", None): .5}
    assert told("layer") == {("attn", 0): .9, ("mlp", 0): .3, ("mlp", 1): .7}
    assert c.table("all").reason.dropna().tolist() == ["'b': it is alone"] * 2

def test_vectors_are_no_weights(tmp_path):
    from model_glue_nb.zoo.zoo import open_model
    home = tmp_path/"m"
    home.mkdir()
    save_file({k: np.ones(s, np.float32)
               for k, s in {"model.layers.0.mlp.up.weight": (3, 2), "model.layers.0.mlp.up.bias": (3,), "model.norm.weight": (2, 2)}.items()},
              home/"model.safetensors")
    (home/"config.json").write_text("{}")
    assert compared_weights(open_model(home, "m")) == ["model.layers.0.mlp.up.weight"]

def test_an_adapter_that_says_a_thing_twice_or_half_is_refused(tmp_path):
    base = tiny_zoo(tmp_path, ["a"], dtype="float32")["a"]
    rows, width = base.tensors["model.layers.0.self_attn.q_proj.weight"].shape
    half, one = ({},
                 dict(A=np.ones((2, width), np.float32), B=np.ones((rows, 2), np.float32)))
    def adapter(name, **tensors):
        home = tmp_path/name
        home.mkdir()
        (home/"adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=2, lora_alpha=3)))
        save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, home/"adapter_model.safetensors")
        return adapted(base, home)
    q = "model.layers.0.self_attn.q_proj.lora_"
    whole = {f"{q}{k}.weight": v for k, v in one.items()}
    adapter("good", **whole)
    with pytest.raises(InputError, match="changes 'model.layers.0.self_attn.q_proj.weight' twice"):
        adapter("twice", **whole, **{k.removeprefix("model."): v for k, v in whole.items()})
    with pytest.raises(InputError, match="'base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight' has no factor A"):
        adapter("half", **whole, **{"model.layers.1.self_attn.q_proj.lora_B.weight": one["B"]})

def test_a_head_is_apart_only_where_models_differ(tmp_path):
    zoo = tiny_zoo(tmp_path, ["tied"], tie_word_embeddings=True)
    plain = tiny_zoo(tmp_path, ["apart", "other"], tie_word_embeddings=False)
    both = Zoo((*zoo, *plain))
    def apart(*names): return head_is_apart(checked_plan(recipe("linear", list(names)), both))
    assert apart("apart", "tied") and not apart("apart", "other") and not apart("tied")
