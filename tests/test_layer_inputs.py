"Merges that read layer inputs, through files and the command line, against the papers' equations in float64 with torch's own module hooks."
import json

import numpy as np
import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import model_glue_nb.merging.canonical # gives recipes their fingerprint
from model_glue_nb.core import InputError
from model_glue_nb.merging.live import merge_into
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.methods import try_method
from model_glue_nb.merging.planner import check_merge_recipe
from model_glue_nb.merging.recipes import MergeRecipe, MergeSource, recipe
from model_glue_nb.zoo.layer_inputs import Reads
from model_glue_nb.zoo.zoo import open_model, read_zoo, tiny_tokenizer, tiny_zoo

NAMES, WEIGHTS = ["a", "b", "c"], [.7, 1.6, .4]
TEXTS = {"a": ["w3 w9 w4", "w7 w5 w7 w20"], "b": ["w8 w11 w6 w30 w12"], "c": ["w40 w41", "w42 w9", "w3 w3 w50"]}

def gpt2_zoo(out, names):
    for i, name in enumerate(names):
        torch.manual_seed(i)
        sizes = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
        GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(out/name)
        tiny_tokenizer(64).save_pretrained(out/name)
    return read_zoo([out/n for n in names])

def tied_zoo(out, names): return tiny_zoo(out, names, "Llama", "bfloat16", tie_word_embeddings=True)
def experts_zoo(out, names): return tiny_zoo(out, names, "Mixtral", "float32", num_local_experts=2)
ZOOS = dict(llama=lambda out, names: tiny_zoo(out, names, dtype="float32"), tied=tied_zoo, gpt2=gpt2_zoo)

def inputs_by_hooks(model, ids, only=""):
    "Per weight, the inputs of its module in float64; texts run one by one."
    seen = {}
    def hook(name):
        def note(_, given): seen.setdefault(name, []).append(given[0].detach().double().reshape(-1, given[0].shape[-1]))
        return note
    linear = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and only in n}
    handles = [m.register_forward_pre_hook(hook(f"{n}.weight")) for n, m in linear.items()]
    with torch.no_grad():
        for x in ids: model(input_ids=torch.tensor([x]))
    for h in handles: h.remove()
    return {n: torch.cat(x).numpy() for n, x in seen.items()}, {f"{n}.weight" for n, m in linear.items() if isinstance(m, Conv1D)}

def fitted(ws, xs, weights, alpha, turned):
    "The paper's equation: sums of inner products, solved."
    left, right = 0, 0
    for w, x, c in zip(ws, xs, weights):
        g = x.T @ x / len(x)
        g = np.where(np.eye(len(g)) > 0, g, alpha * g)
        w = w.astype(np.float64)
        left, right = left + c * g, right + c * g @ (w if turned else w.T)
    solved = np.linalg.inv(left) @ right
    return solved if turned else solved.T

def mean(ws, weights): return np.tensordot(np.array(weights) / sum(weights), np.array(ws, np.float64), 1)

def expected(zoo, weights, alpha):
    "RegMean of a zoo by hooks, of every stored tensor."
    seen, turned = [], set()
    for n in NAMES:
        live = zoo[n].load("cpu", "float32")
        x, t = inputs_by_hooks(live.model, live.encode(TEXTS[n]))
        seen, turned = [*seen, x], turned | t
    out = {}
    for k in zoo["a"].tensors:
        ws = [zoo[n].values(k) for n in NAMES]
        head = k == "lm_head.weight" and live.model.config.tie_word_embeddings
        read = all(k in x for x in seen) and not head
        out[k] = fitted(ws, [x[k] for x in seen], weights, alpha, k in turned) if read else mean(ws, weights)
    return out

@pytest.mark.parametrize("kind", ZOOS)
def test_regmean_through_the_command_line(kind, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from model_glue_nb.cli.program import app
    zoo = ZOOS[kind](tmp_path, NAMES)
    (tmp_path/"a.txt").write_text("\n".join(TEXTS["a"]))
    (tmp_path/"b.yaml").write_text(yaml.safe_dump(TEXTS["b"]))
    prompts = {"a": str(tmp_path/"a.txt"), "b": str(tmp_path/"b.yaml"), "c": TEXTS["c"]}
    models = [dict(model=str(tmp_path/n), parameters=dict(weight=w)) for n, w in zip(NAMES, WEIGHTS)]
    prompts = {str(tmp_path/n): p for n, p in prompts.items()}
    given = dict(merge_method="regmean", models=models, prompts=prompts, parameters=dict(alpha=.8), out_dtype="float32")
    (tmp_path/"recipe.yaml").write_text(yaml.safe_dump(given))
    done = CliRunner().invoke(app, ["merge", str(tmp_path/"recipe.yaml"), str(tmp_path/"out")])
    assert done.exit_code == 0, done.output
    merged, wanted = open_model(tmp_path/"out"), expected(zoo, WEIGHTS, .8)
    assert set(merged.tensors) == set(wanted)
    for k, w in wanted.items(): assert np.abs(merged.values(k) - w).max() < 3e-5 * max(1, np.abs(w).max()), k
    plain = merge(recipe("linear", NAMES, WEIGHTS), zoo, tmp_path/"plain")
    assert sum(np.abs(plain.values(k) - w).max() > 1e-3 for k, w in wanted.items()) > 6

def test_the_live_merge_equals_the_folder(tmp_path):
    zoo = experts_zoo(tmp_path, NAMES)
    for method in ("regmean", "regmean_plus"):
        r = recipe(method, NAMES, WEIGHTS, options=dict(prompts=TEXTS))
        folder = merge(r, zoo, tmp_path/method).load("cpu").model.state_dict()
        live = merge_into(zoo["c"].load("cpu"), r, zoo).model.state_dict()
        assert all((live[k] - v).abs().max() < 1e-6 for k, v in folder.items())

@pytest.mark.parametrize("method", ["regmean", "regmean_plus", "data_free_covariance"])
def test_the_twin_in_torch_agrees(method, tmp_path):
    zoo = tiny_zoo(tmp_path, [*NAMES, "base"], dtype="float32")
    needs_base = method == "data_free_covariance"
    r = recipe(method, NAMES, WEIGHTS, "base" if needs_base else None, options={} if needs_base else dict(prompts=TEXTS))
    ours, twins = (merge(r, zoo, tmp_path/d, device=d) for d in ("cpu", "cpu-torch"))
    assert all(np.abs(ours.values(k) - twins.values(k)).max() < 2e-6 for k in ours.tensors)

def test_experts_are_weighed_by_what_they_are_given(tmp_path):
    "An expert's inputs are those of its tokens, so a model that never chooses it has no say where others do."
    zoo = tiny_zoo(tmp_path, ["a", "b"], "Mixtral", "float32", num_local_experts=4)
    r = recipe("regmean", ["a", "b"], options=dict(prompts={"a": ["w3"], "b": TEXTS["b"]}), alpha=.9)
    merged = merge(r, zoo, tmp_path/"out")
    def chosen(n, texts):
        live, seen = zoo[n].load("cpu"), set()
        def note(_, given): seen.update(given[1].flatten().tolist())
        live.model.model.layers[0].mlp.experts.register_forward_pre_hook(note)
        with torch.no_grad():
            for x in live.encode(texts): live.model(input_ids=torch.tensor([x]))
        return seen
    never = set(range(4)) - chosen("a", ["w3"])
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    assert never and all(np.isfinite(merged.values(name.format(e))).all() for e in range(4))
    both = never & chosen("b", TEXTS["b"])
    assert both
    for e in both: # as few tokens as directions: only along what was read it is b's
        n = name.format(e)
        far = [np.abs(merged.values(n) - zoo[m].values(n)).mean() for m in "ab"]
        assert far[1] < far[0]

def test_regmean_plus_reads_behind_merged_layers(tmp_path):
    "Against whole models made of merged layers, one layer of a member and whatever follows."
    zoo = tiny_zoo(tmp_path, NAMES, dtype="float32", num_hidden_layers=3)
    ours = merge(recipe("regmean_plus", NAMES, WEIGHTS, options=dict(prompts=TEXTS)), zoo, tmp_path/"out")
    live = zoo["a"].load("cpu")
    state = {k: mean([zoo[n].values(k) for n in NAMES], WEIGHTS) for k in zoo["a"].tensors}
    for at in ["layers.0.", "layers.1.", "layers.2.", "lm_head"]:
        names, seen = [k for k in state if at in k], []
        for n in NAMES:
            own = state | {k: zoo[n].values(k) for k in names}
            live.model.load_state_dict({k: torch.from_numpy(np.float32(v)) for k, v in own.items()})
            seen.append(inputs_by_hooks(live.model, live.encode(TEXTS[n]), at)[0])
        for k in names:
            if k in seen[0]: state[k] = fitted([zoo[n].values(k) for n in NAMES], [x[k] for x in seen], WEIGHTS, .9, False)
    for k, w in state.items(): assert np.abs(ours.values(k) - w).max() < 5e-5, k
    other = merge(recipe("regmean", NAMES, WEIGHTS, options=dict(prompts=TEXTS)), zoo, tmp_path/"other")
    first, last = "model.layers.0.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"
    assert np.abs(other.values(last) - ours.values(last)).max() > 1e-3 < np.abs(other.values(first) - ours.values(first)).max()

@pytest.mark.parametrize("axis", [-1, -2])
def test_covariance_from_differences(axis):
    r = np.random.default_rng(0)
    base = r.normal(size=(12, 20)).astype(np.float32)
    models = [base + (i + 1) * r.normal(size=(12, 20)).astype(np.float32) for i in range(3)]
    more = dict(weight=WEIGHTS, inputs=Reads([None] * 3, axis), alpha=.6, scale=.7)
    ours = try_method("data_free_covariance", models, base, **more)
    top, bottom = 0, 0
    for m, w in zip(models, WEIGHTS):
        d = m.astype(np.float64) - base
        d = d if axis == -1 else d.T
        g = d.T @ d
        g = (.6 * g + .4 * np.diag(np.diag(g))) / np.trace(g)
        top, bottom = top + w * d @ g, bottom + w * g
    wanted = top @ np.linalg.inv(bottom)
    assert np.abs(ours - base - .7 * (wanted if axis == -1 else wanted.T)).max() < 1e-5

def test_covariance_knows_embeddings_and_layouts(tmp_path):
    zoo = gpt2_zoo(tmp_path, [*NAMES, "base"])
    ours = merge(recipe("data_free_covariance", NAMES, WEIGHTS, "base"), zoo, tmp_path/"out")
    name, table = "transformer.h.0.mlp.c_fc.weight", "transformer.wte.weight"
    def delta(k): return [zoo[n].values(k) - zoo["base"].values(k) for n in NAMES]
    wanted = try_method("data_free_covariance", delta(name), np.zeros_like(delta(name)[0]), weight=WEIGHTS, inputs=Reads([None] * 3, -2))
    assert np.abs(ours.values(name) - zoo["base"].values(name) - wanted).max() < 1e-5
    assert np.abs(ours.values(table) - zoo["base"].values(table) - mean(delta(table), WEIGHTS)).max() < 1e-6

def test_a_merge_of_a_merge_is_the_merge_of_all(tmp_path):
    "Inner products add up, so the order in which models join is no matter."
    zoo, how = tiny_zoo(tmp_path, NAMES, dtype="float32"), dict(prompts=TEXTS)
    inner = recipe("regmean", ["a", "b"], [.7, 1.6], options=how)
    outer = merge(MergeRecipe("regmean", (MergeSource(inner, 2.3), MergeSource("c", .4)), prompts=TEXTS), zoo, tmp_path/"nested")
    flat = merge(recipe("regmean", NAMES, WEIGHTS, options=how), zoo, tmp_path/"flat")
    assert all(np.abs(outer.values(k) - flat.values(k)).max() < 2e-5 for k in flat.tensors)

def test_prompts_are_part_of_the_recipe(tmp_path):
    zoo = tiny_zoo(tmp_path, NAMES, dtype="float32")
    file = tmp_path/"texts.txt"
    file.write_text("w3 w4")
    r = recipe("regmean", NAMES, options=dict(prompts=str(file)))
    assert MergeRecipe.from_yaml(r.to_yaml()) == r and MergeRecipe.from_dict(json.loads(json.dumps(r.to_dict()))) == r
    before = r.canonical_fingerprint(zoo)
    assert recipe("regmean", NAMES, options=dict(prompts=["w3 w4"])).canonical_fingerprint(zoo) == before
    file.write_text("w3 w5")
    assert r.canonical_fingerprint(zoo) != before

def test_recipes_without_prompts_keep_their_fingerprint():
    "Answers that are stored under it stay valid."
    from model_glue_nb.core import digest
    from model_glue_nb.merging.canonical import recipe_fingerprint
    r = recipe("linear", ["a", recipe("linear", ["b", "c"])])
    def without(x):
        if isinstance(x, dict): return {k: without(v) for k, v in x.items() if k != "prompts"}
        return [without(v) for v in x] if isinstance(x, (list, tuple)) else x
    assert recipe_fingerprint(r, lambda n: n) == digest("merge", without(r.to_dict()))

def test_what_is_refused(tmp_path):
    zoo = tiny_zoo(tmp_path, NAMES)
    def says(r): return " ".join(check_merge_recipe(r, zoo))
    assert "Give prompts" in says(recipe("regmean", NAMES))
    assert "no texts for 'c'" in says(recipe("regmean", NAMES, options=dict(prompts={"a": ["x"], "b": ["y"]})))
    assert "There is no file of prompts" in says(recipe("regmean", NAMES, options=dict(prompts="nowhere.txt")))
    assert "not a list of texts" in says(recipe("regmean", NAMES, options=dict(prompts=[3])))
    inner = recipe("linear", ["a", "b"])
    assert "Use regmean" in says(recipe("regmean_plus", [inner, "c"], options=dict(prompts="random")))
    assert "alpha is 2" in says(recipe("regmean", NAMES, options=dict(prompts="random"), alpha=2))
    with pytest.raises(InputError, match="expected a list of texts"):
        MergeRecipe.from_yaml("merge_method: regmean\nmodels: [a, b]\nprompts: 7\n")

@pytest.mark.parametrize("method", ["regmean", "regmean_plus"])
def test_a_search_gives_each_member_what_it_can_answer(method):
    from model_glue_nb.benchmarking.suites import load_suite
    from model_glue_nb.searching.candidates import CandidateScorer
    from model_glue_nb.searching.search import search
    zoo = read_zoo("demo")
    suite = load_suite("demo").only(["double", "reverse"]).part("search", 6)
    score = CandidateScorer(zoo, suite)
    found = search(["a-double", "a-reverse", "a-sort"], score, method, "coefficient", budget=3)
    assert not found.failed and len(found.trials) == 3
    recipes = [t.candidate for t in found.trials]
    assert all(isinstance(s.model, str) for r in recipes for s in r.models), "merges of merges are multiplied out"
    texts = recipes[0].prompts["a-double"]
    right = [f"{q.prompt} {q.answer}" for t in suite.tasks
             for q, x in zip(t.questions, score.items("a-double")[t.name]) if x >= .5]
    assert texts == right and texts[0].startswith("double")
