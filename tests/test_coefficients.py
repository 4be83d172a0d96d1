"Coefficients per layer, through files and the command line, against the equations in float64 with torch's own hooks and gradients."
import json, re

import numpy as np
import pytest
import torch
import yaml
from test_layer_inputs import NAMES, TEXTS, WEIGHTS, experts_zoo, gpt2_zoo, mean

import model_glue_nb.merging.canonical # gives recipes their fingerprint
from model_glue_nb.core import InputError
from model_glue_nb.merging.live import merge_into
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.methods import merge_methods, method_info
from model_glue_nb.merging.planner import check_merge_recipe, checked_plan
from model_glue_nb.merging.recipes import MergeRecipe, MergeSource, recipe
from model_glue_nb.zoo.layer_coefficients import LayerCoefficients, fisher
from model_glue_nb.zoo.views import View
from model_glue_nb.zoo.zoo import open_model, read_zoo, tiny_tokenizer, tiny_zoo

EVERYONE = [*NAMES, "base"]
def llama_zoo(out, names): return tiny_zoo(out, names, dtype="float32", num_hidden_layers=3)
def tied_zoo(out, names): return tiny_zoo(out, names, "Llama", "bfloat16", tie_word_embeddings=True)
ZOOS = dict(llama=llama_zoo, tied=tied_zoo, gpt2=gpt2_zoo)

def measured(zoo, given, model, texts=TEXTS, **more):
    "Tensor → coefficient."
    views = {m.name: View(m.name, m, dict(m.tensors)) for m in zoo}
    asked = LayerCoefficients(given, views, "base", texts, **more)
    return {n: a for n in zoo[model].tensors if (a := asked.of(n, {model: 1})) is not None}

def layer_of(name):
    "By the two architectures' names, tensor or parameter."
    found = re.search(r"(?:layers|h)\.(\d+)\.", name)
    return int(found[1]) if found else name.removeprefix("transformer.").removeprefix("model.")

def true_fisher(live, ids, seed, squared_sum=False):
    "Layer → mean over entries and tokens of the squared gradient in float64, of drawn tokens, text by text."
    model, rng = live.model.double(), np.random.default_rng(seed)
    named, total = dict(model.named_parameters()), {}
    for x in ids:
        logs = model(input_ids=torch.tensor([x])).logits[0].log_softmax(-1)
        p = logs.detach().exp().numpy()
        drawn = [int(np.searchsorted(np.cumsum(row), u)) for row, u in zip(p, rng.random(len(p)))]
        slopes = torch.autograd.grad(sum(row[y] for row, y in zip(logs, drawn)), list(named.values()))
        for n, g in zip(named, slopes): total[n] = total.get(n, 0) + (g if squared_sum else g**2)
    sums, sizes = {}, {}
    for n, g in total.items():
        g = g**2 if squared_sum else g
        sums[layer_of(n)] = sums.get(layer_of(n), 0) + float(g.sum())
        sizes[layer_of(n)] = sizes.get(layer_of(n), 0) + g.numel()
    means = {k: s / sizes[k] / sum(map(len, ids)) for k, s in sums.items()}
    return means, sum(means[k] * n for k, n in sizes.items()) / sum(sizes.values())

@pytest.mark.parametrize("kind", ZOOS)
def test_fisher_is_the_mean_squared_gradient_of_drawn_tokens(kind, tmp_path):
    zoo = ZOOS[kind](tmp_path, EVERYONE)
    live = zoo["c"].load("cpu", "float32")
    ids = live.encode(TEXTS["c"])
    means, whole = true_fisher(live, ids, 3)
    raw = measured(zoo, dict(source="fisher", normalize=False), "c", seed=3)
    divided = measured(zoo, "fisher", "c", seed=3)
    assert {n for n in zoo["c"].tensors if n not in raw} == set()
    for n, a in raw.items():
        at = layer_of(n) if layer_of(n) in means else "wte.weight" if kind == "gpt2" else "embed_tokens.weight" # a tied head
        assert a == pytest.approx(means[at], rel=2e-4), n
        assert divided[n] == pytest.approx(means[at] / whole, rel=2e-4), n
    wrong, _ = true_fisher(zoo["c"].load("cpu", "float32"), ids, 3, squared_sum=True)
    assert abs(wrong[0] / means[0] - 1) > .01, "the squared sum over texts is another number"

def test_fisher_is_the_mean_over_all_that_the_model_may_say(tmp_path):
    "Against every token that could be drawn, by its probability."
    zoo = tiny_zoo(tmp_path, ["a"], dtype="float32", num_hidden_layers=1)
    live, ids = zoo["a"].load("cpu"), [5, 9, 17]
    params = dict(live.model.named_parameters())
    logs = live.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    truth = dict.fromkeys(params, 0.0)
    for row in logs:
        for y in range(len(row)):
            slopes = torch.autograd.grad(row[y], list(params.values()), retain_graph=True, allow_unused=True)
            for n, g in zip(params, slopes): truth[n] += 0.0 if g is None else float(row[y].detach().exp() * g.square().sum())
    found = fisher(live, [ids] * 300, 0, normalize=False)
    layer = [n for n in params if ".layers.0." in n]
    wanted = sum(truth[n] for n in layer) / sum(params[n].numel() for n in layer) / 3
    assert found["model.layers.0"] == pytest.approx(wanted, rel=.1)

def outputs(live, ids):
    "Layer → what its module puts out, in the order of texts by length; of a head, what it reads."
    seen, handles = {}, []
    def note(key, x):
        x = x[0] if isinstance(x, tuple) else x
        seen.setdefault(key, []).append(x.detach().double().reshape(-1, x.shape[-1]))
    def after(key): return lambda m, given, out: note(key, out)
    def before(key): return lambda m, given: note(key, given[0])
    for n, m in live.model.named_modules():
        key = layer_of(n + ".")
        if re.search(r"(layers|h)\.\d+$", n): handles.append(m.register_forward_hook(after(key)))
        elif m is live.model.get_output_embeddings(): handles.append(m.register_forward_pre_hook(before("lm_head.weight")))
        elif not isinstance(key, int) and list(m.parameters(recurse=False)):
            for p, _ in m.named_parameters(recurse=False): handles.append(m.register_forward_hook(after(layer_of(f"{n}.{p}"))))
    with torch.no_grad():
        for x in ids: live.model(input_ids=torch.tensor([x]))
    for h in handles: h.remove()
    return {k: torch.cat(x).numpy() for k, x in seen.items()}

@pytest.mark.parametrize("kind", ZOOS)
def test_agreement_is_the_information_of_correlated_units(kind, tmp_path):
    zoo = ZOOS[kind](tmp_path, EVERYONE)
    a, base = zoo["a"].load("cpu", "float32"), zoo["base"].load("cpu", "float32")
    texts = [*TEXTS["a"], *TEXTS["b"], *TEXTS["c"]]
    own, other = outputs(a, a.encode(texts)), outputs(base, a.encode(texts))
    found = measured(zoo, dict(source="agreement", t=.7), "a", texts)
    def coefficient(x, y):
        rho = np.array([np.corrcoef(x[:, u], y[:, u])[0, 1] for u in range(x.shape[1])])
        return 1 / (1 + np.exp(.7 * np.mean(-.5 * np.log(1 - rho**2))))
    for n, value in found.items():
        assert value == pytest.approx(coefficient(own[layer_of(n)], other[layer_of(n)]), rel=1e-4), n
    layers = {layer_of(n): v for n, v in found.items()}
    unsaid = {"wpe.weight"} if kind == "gpt2" else set() # once per position, not per token
    assert {layer_of(n) for n in zoo["a"].tensors} - set(layers) == unsaid
    assert len({round(v, 5) for v in layers.values()}) >= len(layers) - 2 # the last norm puts out what the head reads
    assert max(measured(zoo, "agreement", "base", texts).values()) < 1e-5, "the base tells everything of itself"

def weights_by_hand(zoo, given, names=NAMES, weights=WEIGHTS, texts=TEXTS):
    "Tensor → weights that sum to what the recipe's do."
    found = [measured(zoo, given, n, texts) for n in names]
    w = np.array(weights)
    def shared(n):
        if any(n not in f for f in found): return w
        parts = w * [f[n] for f in found]
        return parts / parts.sum() * w.sum()
    return {n: shared(n) for n in zoo[names[0]].tensors}

@pytest.mark.parametrize("kind", ZOOS)
def test_linear_with_fisher_through_the_command_line(kind, tmp_path):
    from typer.testing import CliRunner

    from model_glue_nb.cli.program import app
    zoo = ZOOS[kind](tmp_path, NAMES)
    models = [dict(model=str(tmp_path/n), parameters=dict(weight=w)) for n, w in zip(NAMES, WEIGHTS)]
    given = dict(merge_method="linear", models=models, out_dtype="float32", coefficients=dict(source="fisher", tokens=128))
    (tmp_path/"recipe.yaml").write_text(yaml.safe_dump(given))
    done = CliRunner().invoke(app, ["merge", str(tmp_path/"recipe.yaml"), str(tmp_path/"out")])
    assert done.exit_code == 0, done.output
    merged = open_model(tmp_path/"out")
    by_hand = weights_by_hand(zoo, given["coefficients"], texts=None)
    for n, w in by_hand.items():
        assert np.abs(merged.values(n) - mean([zoo[m].values(n) for m in NAMES], w)).max() < 1e-5, n
        assert sum(w) == pytest.approx(sum(WEIGHTS))
    spread = np.ptp([w[0] / sum(w) for w in by_hand.values()])
    assert spread > .01, "layers differ"

METHODS = [m for m in merge_methods if method_info(m).has_weights and method_info(m).n_models is None and m != "regmean_plus"]

@pytest.mark.parametrize("method", METHODS)
def test_any_method_merges_as_with_weights_written_by_hand(method, tmp_path):
    zoo = llama_zoo(tmp_path, EVERYONE)
    base = "base" if method_info(method).needs_base else None
    how = dict(prompts=TEXTS) if method_info(method).needs_prompts else {}
    texts = how.get("prompts")
    ours = merge(recipe(method, NAMES, WEIGHTS, base, options=how | dict(coefficients="fisher")), zoo, tmp_path/"ours")
    by_hand = weights_by_hand(zoo, "fisher", texts=texts)
    def layered(i): return [dict(filter=n, value=float(w[i])) for n, w in by_hand.items()]
    written = merge(recipe(method, NAMES, [layered(i) for i in range(3)], base, options=how), zoo, tmp_path/"written")
    plain = merge(recipe(method, NAMES, WEIGHTS, base, options=how), zoo, tmp_path/"plain")
    for n in ours.tensors: assert np.abs(ours.values(n) - written.values(n)).max() < 2e-6, n
    assert any(np.abs(ours.values(n) - plain.values(n)).max() > 1e-4 for n in ours.tensors)

@pytest.mark.parametrize("given", ["fisher", "agreement"])
def test_equal_models_have_equal_coefficients(given, tmp_path):
    "The same content under three names: nothing changes, to the bit."
    zoo = tiny_zoo(tmp_path, ["a", "base"], dtype="float32")
    for n in ("b", "c"): zoo["a"].load("cpu").model.save_pretrained(tmp_path/n), tiny_tokenizer(64).save_pretrained(tmp_path/n)
    zoo = read_zoo([tmp_path/n for n in EVERYONE])
    how = dict(prompts=TEXTS["a"], coefficients=given)
    ours = merge(recipe("task_arithmetic", NAMES, WEIGHTS, "base", options=how), zoo, tmp_path/"ours")
    plain = merge(recipe("task_arithmetic", NAMES, WEIGHTS, "base"), zoo, tmp_path/"plain")
    assert all((ours.values(n) == plain.values(n)).all() for n in ours.tensors)

def test_on_both_backends_and_in_memory(tmp_path):
    zoo = experts_zoo(tmp_path, EVERYONE)
    r = recipe("ties", NAMES, WEIGHTS, "base", options=dict(prompts=TEXTS, coefficients=dict(source="agreement", t=2.)))
    ours, twins = (merge(r, zoo, tmp_path/d, device=d) for d in ("cpu", "cpu-torch"))
    assert all(np.abs(ours.values(k) - twins.values(k)).max() < 2e-6 for k in ours.tensors)
    folder = ours.load("cpu").model.state_dict()
    live = merge_into(zoo["c"].load("cpu"), r, zoo).model.state_dict()
    assert all((live[k] - v).abs().max() < 1e-6 for k, v in folder.items())
    shares = {n: task.shares(task.parameters["weight"]) for n, task in checked_plan(r, zoo).tasks.items()}
    first = [w for n, w in shares.items() if ".layers.0." in n]
    assert len(first) > 8 and all((w == first[0]).all() for w in first), "experts count as their layer does"
    assert (first[0] != shares["model.embed_tokens.weight"]).any()

def test_a_merge_of_a_merge_is_the_merge_of_all(tmp_path):
    zoo, how = llama_zoo(tmp_path, NAMES), dict(coefficients=dict(source="fisher", tokens=256))
    inner = recipe("linear", ["a", "b"], [.7, 1.6], options=how)
    outer = merge(MergeRecipe("linear", (MergeSource(inner, 2.3), MergeSource("c", .4)), **how), zoo, tmp_path/"nested")
    flat = merge(recipe("linear", NAMES, WEIGHTS, options=how), zoo, tmp_path/"flat")
    assert all(np.abs(outer.values(k) - flat.values(k)).max() < 2e-6 for k in flat.tensors)

def test_layers_of_a_slice_count_as_where_they_come_from(tmp_path):
    zoo = llama_zoo(tmp_path, ["a", "b"])
    from model_glue_nb.merging.recipes import MergeSlice
    part = MergeSlice((MergeSource("a", 1., {}, (0, 2)), MergeSource("b", 1., {}, (1, 3))))
    tasks = checked_plan(MergeRecipe("linear", slices=(part,), coefficients="fisher"), zoo).tasks
    a, b = (measured(zoo, "fisher", n, None) for n in "ab")
    name = "model.layers.{}.mlp.up_proj.weight"
    for i in (0, 1):
        x, y = a[name.format(i)], b[name.format(i + 1)]
        assert tasks[name.format(i)].shares([1, 1]) == pytest.approx([2 * x / (x + y), 2 * y / (x + y)])

def test_tokens_seed_and_texts_are_what_is_read(tmp_path):
    zoo = tiny_zoo(tmp_path, EVERYONE, dtype="float32")
    name = "model.layers.1.mlp.up_proj.weight"
    def at(given, texts=None, seed=0): return measured(zoo, given, "a", texts, seed=seed)[name]
    few = dict(source="fisher", tokens=64)
    values = [at(few), at(few, seed=1), at("fisher"), at("fisher", TEXTS), at(few | dict(normalize=False))]
    assert len(set(values)) == 5 and at(few) == values[0]
    assert at(few) == at(dict(source="fisher", tokens=1)), "a text has 64 random tokens"

def test_coefficients_are_part_of_the_recipe(tmp_path):
    zoo = tiny_zoo(tmp_path, NAMES, dtype="float32")
    prints = set()
    for given in ("fisher", dict(source="fisher", tokens=64), dict(source="fisher", normalize=False), None):
        r = recipe("linear", NAMES, WEIGHTS, options=dict(coefficients=given))
        assert MergeRecipe.from_yaml(r.to_yaml()) == r and MergeRecipe.from_dict(json.loads(json.dumps(r.to_dict()))) == r
        prints |= {(r.fingerprint(zoo), r.canonical_fingerprint(zoo))}
    assert len({a for a, _ in prints}) == len({b for _, b in prints}) == 4
    assert "coefficients" not in recipe("linear", NAMES).to_dict(), "stored answers keep their fingerprint"

def test_what_is_refused(tmp_path):
    zoo = tiny_zoo(tmp_path, EVERYONE)
    def says(method, given="fisher", base=None, prompts=None, weights=None, models=NAMES):
        r = recipe(method, models, weights, base, options=dict(coefficients=given, prompts=prompts))
        return " ".join(check_merge_recipe(r, zoo))
    assert "Did you mean 'fisher'?" in says("linear", "fischer")
    assert "Did you mean 'tokens'?" in says("linear", dict(source="fisher", token=64))
    assert "coefficients, t is 'much', expected a number" in says("linear", dict(source="agreement", t="much"), "base", "random")
    assert "slerp has none" in says("slerp", models=NAMES[:2]) and "model_stock has none" in says("model_stock", base="base")
    assert "needs a base model" in says("task_arithmetic")
    assert "Name it: base" in says("linear", "agreement", prompts="random")
    assert "Give prompts" in says("linear", "agreement", "base")
    assert "no texts for 'c'" in says("linear", "fisher", prompts={"a": ["x"], "b": ["y"]})
    assert "There is no file of prompts" in says("linear", "fisher", prompts="nowhere.txt")
    assert "one below 0" in says("linear", weights=[1, -.2, .5])
    inner = recipe("linear", ["base", "a"])
    assert "the base is a merge" in says("task_arithmetic", "agreement", inner, "random")
    with pytest.raises(InputError, match="coefficients, source"):
        MergeRecipe.from_yaml("merge_method: linear\nmodels: [a, b]\ncoefficients: {source: 3}\n")
    with pytest.raises(InputError, match="'source' is missing"):
        MergeRecipe.from_yaml("merge_method: linear\nmodels: [a, b]\ncoefficients: {tokens: 3}\n")

def test_strangers_can_be_measured_by_gradients_only(tmp_path):
    "Another tokenizer reads other tokens, so nothing can be compared token by token."
    zoo = tiny_zoo(tmp_path, ["a", "base"], dtype="float32")
    tiny_tokenizer(60).save_pretrained(tmp_path/"a")
    zoo = read_zoo([tmp_path/"a", tmp_path/"base"])
    def of(given):
        how = dict(coefficients=given, prompts="random", tokenizer="union")
        return recipe("linear", ["a", "base"], base="base", options=how)
    assert "Use fisher" in " ".join(check_merge_recipe(of("agreement"), zoo))
    merged = merge(of("fisher"), zoo, tmp_path/"out")
    assert all(np.isfinite(merged.values(n)).all() for n in merged.tensors)

def test_a_search_starts_from_coefficients_where_it_is_told_to():
    from model_glue_nb.benchmarking.suites import load_suite
    from model_glue_nb.searching.candidates import CandidateScorer
    from model_glue_nb.searching.search import search_each
    zoo = read_zoo("demo")
    score = CandidateScorer(zoo, load_suite("demo").only(["double"]).part("search", 3))
    methods = ["linear+fisher", "ties+agreement"]
    found = search_each(["a-double", "a-reverse", "a-sort"], score, methods, "coefficient", budget=2, base="a-base")
    for (named, result), source in zip(found.items(), ("fisher", "agreement")):
        assert not result.failed and len(result.trials) == 2
        assert {t.candidate.coefficients for t in result.trials} == {source} and result.trials[0].label.startswith(named)
    assert found["linear+fisher"].trials[0].candidate.prompts is None
    assert set(found["ties+agreement"].trials[0].candidate.prompts) == {"a-double", "a-reverse", "a-sort"}
    assert all(isinstance(s.model, str) for t in found["linear+fisher"].trials for s in t.candidate.models)
    with pytest.raises(InputError, match="slerp has none"): search_each(["a-double", "a-sort"], score, ["slerp+fisher"])
    with pytest.raises(InputError, match="needs the base"): search_each(["a-double", "a-sort"], score, ["linear+agreement"])

def test_a_run_and_a_grid_know_the_names():
    from model_glue_nb.experiments.grids import Grid, check_grid
    from model_glue_nb.gluing.recipe import read_recipe
    assert read_recipe(dict(merge=dict(methods=["linear", "linear+fisher"]))).merge["methods"][1] == "linear+fisher"
    with pytest.raises(InputError, match="Did you mean 'fisher'"): read_recipe(dict(merge=dict(methods=["linear+fischer"])))
    assert check_grid(Grid(merging=dict(methods=["ties+agreement"]))) == []
    assert "slerp has none" in check_grid(Grid(merging=dict(methods=["slerp+fisher"])))[0]
