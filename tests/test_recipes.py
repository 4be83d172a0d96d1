"What a recipe says at each tensor, what it refuses, and what it means in mergekit's words: uneven numbers at every level."
import numpy as np
import pytest

from model_glue_nb.core import InputError
from model_glue_nb.merging.recipe_files import first_value, value_at, varies_with_depth
from model_glue_nb.merging.recipes import MergeRecipe, check_recipe_form, check_value, recipe, stack

def test_values_over_depth_and_by_name():
    assert ([value_at([0, 1, 5], "w", d) for d in (0, .25, .75, 1)] == [0, .5, 3, 5]
            and value_at([7], "w", .3) == 7)
    by_name = [dict(filter="self_attn", value=.2), dict(filter="mlp", value=[.1, .9]), dict(value=.4)]
    def at(n, d=.25): return value_at(by_name, n, d)
    assert at("model.layers.3.self_attn.q_proj.weight") == .2 and at("layers.3.mlp.up.weight") == pytest.approx(.3) and at("norm") == .4
    assert value_at(by_name[:1], "norm", .5) is None
    assert first_value([dict(weight=by_name[:1]), dict(weight=[0, 2])], "weight", "norm", .25, 1) == .5
    assert first_value([{}, dict(weight=None)], "weight", "norm", .25, 9) == 9

def test_what_varies_with_depth():
    assert varies_with_depth([1, 2]) and varies_with_depth([dict(filter="mlp", value=[1, 2]), dict(value=3)])
    assert not varies_with_depth([dict(filter="mlp", value=1), dict(value=3)]) and not varies_with_depth(.5) and not varies_with_depth([1])

@pytest.mark.parametrize("key, good, bad",
                         [("density", (.001, 1), (0, 1.01, -.1)), ("gamma", (0, .99), (1, -.1)),
                          ("epsilon", (0, .5), (1, -.1)), ("t", (0, 1, .3), (-.1, 1.1))])
def test_ranges(key, good, bad):
    method = dict(density="ties", gamma="breadcrumbs", epsilon="della", t="slerp")[key]
    for v in good: assert not check_value(method, key, v), v
    for v in bad: assert check_value(method, key, v) and check_value(method, key, [good[0], v]), v

def test_epsilon_stays_inside_on_both_sides():
    def wrong(density, epsilon):
        return check_recipe_form(recipe("della", ["a", "b"], [1, 2], "base", density=density, epsilon=epsilon))
    assert not wrong(.3, .25) and not wrong(.8, .15)
    assert wrong(.2, .25) and wrong(.8, .25), "a chance below 0, or above 1"

def test_sums_of_weights():
    assert any("sum to 0" in p for p in check_recipe_form(recipe("linear", ["a", "b"], [1.5, -1.5])))
    assert (not check_recipe_form(recipe("linear", ["a", "b"], [1.5, -1]))
            and not check_recipe_form(recipe("linear", ["a", "b"], [1.5, -1.5], normalize=False)))

def test_numbers_of_models():
    for method, n in (("slerp", 2), ("passthrough", 1)):
        for k in (1, 2, 3):
            said = [p for p in check_recipe_form(recipe(method, list("abc")[:k])) if "exactly" in p]
            assert bool(said) == (k != n), (method, k)
    with pytest.raises(InputError, match="2 weights came with 3 models"):
        recipe("linear", list("abc"), [1, 2])

THEIRS = """
merge_method: dare_ties
base_model: base
seed: 7
models:
  - model: base
  - {model: a, parameters: {weight: 0.3, density: 0.4}}
  - {model: b, parameters: {weight: 0.7}}
parameters: {lambda: 0.8, rescale: %s}
"""

def test_mergekits_words():
    for given, ours in (("true", "l1"), ("false", "none")):
        r = MergeRecipe.from_yaml(THEIRS % given)
        assert r.parameters["rescale"] == ours and r.parameters["scale"] == .8 and r.seed == 7
        assert [s.model for s in r.models] == ["a", "b"] and [s.weight for s in r.models] == [.3, .7]
        assert r.parameters["density"] == 1.0, "mergekit keeps all where nothing is said"
        assert MergeRecipe.from_yaml(r.to_yaml()) == r
    assert MergeRecipe.from_yaml(THEIRS % "density").parameters.get("density") == 1.0
    base_second = MergeRecipe.from_yaml("merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.2}\n")
    assert [s.model for s in base_second.models] == ["b", "a"]
    kept = MergeRecipe.from_yaml("merge_method: linear\nbase_model: b\nmodels: [{model: a}, {model: b}]\n")
    assert [s.model for s in kept.models] == ["a", "b"]

def test_our_words_and_theirs():
    import yaml
    assert yaml.safe_load(recipe("ties", ["a"], [2], "base", scale=.3).to_yaml())["parameters"]["lambda"] == .3
    assert yaml.safe_load(recipe("passthrough", ["a"], scale=.3).to_yaml())["parameters"] == dict(scale=.3)

def test_what_is_as_usual_is_not_said():
    assert "density" not in recipe("ties", ["a"], [1], "base", density=.5).parameters
    assert recipe("ties", ["a"], [1], "base", density=.4).parameters == dict(density=.4)

def test_stacks():
    def spans(r): return [(x.sources[0].model, x.sources[0].layers) for x in r.slices]
    assert spans(stack(["a", "b"], 2, interleave=True)) == [("a", (0, 1)),
                                                            ("b", (0, 1)), ("a", (1, 2)),
                                                            ("b", (1, 2))]
    assert spans(stack(["a", "b"], 3)) == [("a", (0, 3)), ("b", (0, 3))]
