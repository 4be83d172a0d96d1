"Fine-tunes as differences: the best directions, shared out by what they gain; what is written is what plain PEFT and a zoo read."
import itertools, json, math, sys
from pathlib import Path
import numpy as np
import pytest, torch
from model_glue_nb.core import InputError
from model_glue_nb.merging.differences import bytes_said, extract, parts_of
from model_glue_nb.merging.low_rank import Change, allotted_ranks, largest_directions, stored_floats
from model_glue_nb.tensors.streams import ArrayBlocks
from model_glue_nb.zoo.adapters import adapted
from model_glue_nb.zoo.stored import Files, open_stored
from model_glue_nb.zoo.zoo import open_model, read_zoo, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/"tools"))
import certificate

def change_of(delta, base=None, **how):
    base = np.zeros_like(delta) if base is None else base
    return Change(ArrayBlocks((base + delta).reshape(-1)), ArrayBlocks(base.reshape(-1)), delta.shape, **how)

SPECTRA = dict(steep=.5 ** np.arange(48), slow=1 / (1 + np.arange(48)), flat=np.ones(48), low=np.r_[np.ones(3), np.zeros(45)])

@pytest.mark.parametrize("shape", [(48, 200), (200, 48), (48, 48)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_as_good_as_an_exact_decomposition(spectrum, shape):
    rng = np.random.default_rng(4)
    u, v = (np.linalg.qr(rng.normal(size=(n, 48)))[0] for n in shape)
    delta = (u * SPECTRA[spectrum] @ v.T).astype(np.float32)
    base = rng.normal(size=shape).astype(np.float32)
    exact = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    for how in ({}, dict(held=0, at_once=7 * shape[1])):
        found = largest_directions(change_of(delta, base, **how), 6)
        best = float(np.square(exact[6:]).sum())
        left, right = found.factors(6)
        lacks = float(np.square(delta - (left @ right).numpy()).sum())
        assert lacks <= 1.01 * best + 1e-6 and lacks == pytest.approx(found.left_out(6), rel=1e-3, abs=1e-6)

def test_noise_is_kept_within_a_hundredth_of_the_best():
    "Directions that are all alike are the hardest: no few of them stand out, also at the last one that was asked for."
    delta = np.random.default_rng(5).normal(size=(300, 400)).astype(np.float32)
    exact = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    found = largest_directions(change_of(delta), 24)
    for rank in (6, 12, 24): assert math.sqrt(found.left_out(rank) / np.square(exact[rank:]).sum()) < 1.01
    for x in (found.left, found.right): assert (x.T @ x - torch.eye(24)).abs().max() < 1e-4

def test_ranks_are_the_best_that_a_budget_buys():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = [np.sort(rng.exponential(size=4))[::-1] for _ in range(3)]
        costs = [3, 3, 3] # of equal cost the greedy choice is the best
        ranks = allotted_ranks(values, costs, n_bytes=15)
        def kept(r): return sum(float(np.square(v[:k]).sum()) for v, k in zip(values, r))
        best = max(kept(r) for r in itertools.product(range(5), repeat=3) if sum(r) * 3 <= 15)
        assert kept(ranks) == pytest.approx(best) and sum(ranks) == 5
    values, costs = [np.array([10., .9]), np.array([10., 8])], [1, 100]
    assert allotted_ranks(values, costs, n_bytes=101) == [1, 1] and allotted_ranks(values, costs, n_bytes=102) == [2, 1]
    total = sum(float(np.square(v).sum()) for v in values)
    ranks = allotted_ranks(values, costs, may_lose=.4 * total)
    assert total - kept_energy(values, ranks) <= .4 * total < total - kept_energy(values, [ranks[0], ranks[1] - 1])

def kept_energy(values, ranks): return sum(float(np.square(v[:k]).sum()) for v, k in zip(values, ranks))

def tuned(kind, folder, rank=3, tied=False):
    "A base, and the same with low-rank changes of its matrices and any change of its vectors."
    model = certificate.tiny_model(kind.removesuffix(", tied"), 0)
    if kind.endswith(", tied"):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    rng = torch.Generator().manual_seed(9)
    model.save_pretrained(folder/"base")
    ends = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if id(p) in ends and not tied or "embed_positions" in name: continue
            if p.ndim == 2: p += .2 * p.std() * torch.randn(p.shape[0], rank, generator=rng) @ torch.randn(rank, p.shape[1], generator=rng)
            elif p.ndim == 1: p += .1 * torch.randn(p.shape, generator=rng)
    model.save_pretrained(folder/"tune")
    for name in ("base", "tune"): tiny_tokenizer(64).save_pretrained(folder/name)
    return model

def logits(model):
    x = torch.tensor([[5, 6, 7, 9, 12], [8, 3, 3, 20, 41]])
    with torch.no_grad(): return model.eval()(x).logits

KINDS = "llama mistral qwen2 qwen3 gemma2 phi gpt2 gpt_neox opt olmo2 cohere stablelm".split() # biases, layer norms, (in, out) weights

@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_and_a_zoo_read_what_was_written(kind, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    want = logits(tuned(kind, tmp_path))
    made = extract(tmp_path/"tune", tmp_path/"base", tmp_path/"difference", error=1e-3)
    assert made.error < 1e-3 and made.unsaid == 0 and {p.kind for p in made.parts if p.energy} <= {"linear", "turned", "embedding", "whole", "bias"}
    assert {p.rank for p in made.parts if p.energy and p.is_low_rank} == {3}
    base = AutoModelForCausalLM.from_pretrained(tmp_path/"base", dtype=torch.float32)
    before = logits(base)
    live = PeftModel.from_pretrained(base, tmp_path/"difference")
    assert (logits(live) - want).abs().max() < 2e-3 * (before - want).abs().max()
    live.save_pretrained(tmp_path/"again")
    ours, again = (adapted(open_model(tmp_path/"base"), tmp_path/d) for d in ("difference", "again"))
    assert all(type(again.inputs[k]) is type(x) for k, x in ours.inputs.items()), "what PEFT saves of it is read the same"
    assert (logits(live.merge_and_unload()) - want).abs().max() < 2e-3 * (before - want).abs().max()
    member = read_zoo([str(tmp_path/"base"), f"{tmp_path/'base'}+{tmp_path/'difference'}"]).models[1]
    assert (logits(member.load("cpu").model) - want).abs().max() < 2e-3 * (before - want).abs().max()

@pytest.mark.parametrize("kind", ["gemma2", "llama, tied", "qwen2, tied", "gpt2", "cohere"])
def test_a_tied_table_changes_at_both_ends(kind, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    want = logits(tuned(kind, tmp_path, tied=True))
    made = extract(tmp_path/"tune", tmp_path/"base", tmp_path/"d", error=1e-3)
    base = AutoModelForCausalLM.from_pretrained(tmp_path/"base", dtype=torch.float32)
    assert base.config.tie_word_embeddings
    before = logits(base)
    member = read_zoo([str(tmp_path/"base"), f"{tmp_path/'base'}+{tmp_path/'d'}"]).models[1]
    ours = logits(member.load("cpu").model)
    live = PeftModel.from_pretrained(base, tmp_path/"d")
    assert (logits(live) - ours).abs().max() < 2e-3 * (before - want).abs().max()
    if kind in ("gemma2", "gpt2"): # a forward of its own; a name that PEFT does not tie
        assert {p.kind for p in made.parts if p.is_end} == {"fixed"} and 1 > made.unsaid > .01
        return
    assert made.unsaid == 0 and [(p.kind, p.rank) for p in made.parts if p.is_end and p.tied] == [("embedding", 3)]
    assert (ours - want).abs().max() < 2e-3 * (before - want).abs().max()
    live.save_pretrained(tmp_path/"again") # the head's factors stand there too
    again = read_zoo([str(tmp_path/"base"), f"{tmp_path/'base'}+{tmp_path/'again'}"]).models[1]
    assert (logits(again.load("cpu").model) - ours).abs().max() < 1e-5

@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_untied_ends_take_part_where_it_pays(kind, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    want = logits(tuned(kind, tmp_path, tied=True))
    made = extract(tmp_path/"tune", tmp_path/"base", tmp_path/"d", error=1e-3)
    assert {p.kind for p in made.parts if p.is_end and p.rank} == {"embedding", "linear"}
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path/"base", dtype=torch.float32), tmp_path/"d")
    assert (logits(live) - want).abs().max() < 1e-2
    without = extract(tmp_path/"tune", tmp_path/"base", tmp_path/"e", error=1e-3, embeddings=False)
    assert without.unsaid > .01 and not any(p.rank for p in without.parts if p.is_end) and without.n_bytes < made.n_bytes

def test_an_embedding_with_a_forward_of_its_own_stays(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = tuned("opt", tmp_path)
    with torch.no_grad(): model.model.decoder.embed_positions.weight += .01
    model.save_pretrained(tmp_path/"tune")
    made = extract(tmp_path/"tune", tmp_path/"base", tmp_path/"d", rank=3)
    assert [p.kind for p in made.parts if "embed_positions" in p.name] == ["fixed"] and 0 < made.unsaid < 1
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path/"base", dtype=torch.float32), tmp_path/"d")
    assert logits(live).isfinite().all()

def view_values(view, name):
    with Files() as files:
        n = math.prod(view.inputs[name].shape)
        return np.array(stored_floats(open_stored(view.inputs[name], files), 0, n)).reshape(view.inputs[name].shape)

def test_what_is_said_of_it_is_what_the_files_hold(tmp_path):
    zoo = read_zoo("demo")
    made = extract(zoo["a-shift"], zoo["a-base"], tmp_path/"d", rank=4)
    view, total, lacks = adapted(zoo["a-base"], tmp_path/"d"), 0., 0.
    live = read_zoo([str(zoo["a-base"].path), f"{zoo['a-base'].path}+{tmp_path/'d'}"]).models[1]
    for p in made.parts:
        if not p.is_low_rank: continue
        new, old, read = zoo["a-shift"].values(p.name), zoo["a-base"].values(p.name), view_values(view, p.name)
        size = float(np.square(old, dtype=np.float64).sum())
        total += float(np.square(new - old, dtype=np.float64).sum()) / size
        lacks += float(np.square(new - read, dtype=np.float64).sum()) / size
    assert made.error == pytest.approx(math.sqrt(lacks / total)) and 0 < made.error < 1
    assert made.n_bytes == sum(t.stop - t.start for t in open_model(tmp_path/"d").stored.values())
    assert set(view.inputs) == set(zoo["a-base"].tensors) and live.n_params == zoo["a-base"].n_params
    config = json.loads((tmp_path/"d/adapter_config.json").read_text())
    assert config["rank_pattern"] == {p.module: p.rank for p in made.parts if p.is_low_rank and p.rank} and len(set(config["rank_pattern"].values())) > 1

@pytest.mark.parametrize("size", ["3%", "8%", 60_000])
def test_a_size_is_kept(size, tmp_path):
    zoo = read_zoo("demo")
    made = extract(zoo["a-sort"], zoo["a-base"], tmp_path/"d", size=size)
    wanted = bytes_said(size, zoo["a-base"].n_bytes)
    cheapest = min(p.cost for p in made.parts if p.is_low_rank)
    assert wanted - cheapest < made.n_bytes <= wanted

def test_more_is_better_and_directions_beat_equal_ranks(tmp_path):
    zoo = read_zoo("demo")
    errors = [extract(zoo["a-sort"], zoo["a-base"], tmp_path/f"d{r}", rank=r).error for r in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    lacks, total = 0., 0.
    for p in parts_of(zoo["a-base"]):
        if not p.is_low_rank: continue
        old = zoo["a-base"].values(p.name)
        s = np.linalg.svd((zoo["a-sort"].values(p.name) - old) / np.linalg.norm(old), compute_uv=False)
        lacks += float(np.square(s[4 * (p.kind != "embedding"):]).sum()) # the same bytes
        total += float(np.square(s).sum())
    assert errors[2] < math.sqrt(lacks / total), "rank 4 in every linear weight"

def test_a_small_weight_counts_as_much_as_a_large_one(tmp_path):
    "Changes of one shape and energy: directions go where the weight itself is smaller."
    model = certificate.tiny_model("llama", 0)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1 if p.ndim == 1 else .02 / p.std())
        for i in (0, 1): model.model.layers[i].mlp.up_proj.weight.mul_((1, 10)[i])
    model.save_pretrained(tmp_path/"base")
    with torch.no_grad():
        for i in (0, 1): model.model.layers[i].mlp.up_proj.weight.add_(.005 * torch.randn(model.model.layers[0].mlp.up_proj.weight.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path/"tune")
    for name in ("base", "tune"): tiny_tokenizer(64).save_pretrained(tmp_path/name)
    made = extract(tmp_path/"tune", tmp_path/"base", tmp_path/"d", rank=5)
    assert [p.rank for p in made.parts if p.energy] == [10, 0]

@pytest.mark.parametrize("given, says", [
    (dict(rank=0), "whole number from 1"), (dict(rank=2, size="4%"), "rank and size came"), (dict(error=1.5), "between 0 and 1"),
    (dict(size="a lot"), "4% or 12MB"), (dict(size=10), "is the least"), (dict(rank=4000), "The factors would take"), (dict(error=1e-4), "The factors would take")])
def test_bad_budgets(given, says, tmp_path):
    zoo = read_zoo("demo")
    with pytest.raises(InputError, match=says): extract(zoo["a-sort"], zoo["a-base"], tmp_path/"d", **given)
    assert not list(tmp_path.iterdir())

def test_who_is_no_fine_tune_is_refused(tmp_path):
    zoo = read_zoo("demo")
    for model, base, says in (("b-skip", "a-base", "It was not tuned from 'a-base'"), ("a-base", "a-base", "no value differs"), ("c-expand", "a-base", "differ")):
        with pytest.raises(InputError, match=says): extract(zoo[model], zoo[base], tmp_path/"d")
    assert not list(tmp_path.iterdir())

def test_values_that_are_not_finite_are_named(tmp_path):
    from model_glue_nb.zoo.zoo import tiny_zoo
    from safetensors.torch import load_file, save_file
    zoo = tiny_zoo(tmp_path/"zoo", ["a", "b"])
    f = zoo["b"].path/"model.safetensors"
    bad = load_file(f)
    bad["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(bad, f, dict(format="pt"))
    with pytest.raises(InputError, match="up_proj.weight' holds values that are not finite"): extract(zoo["b"], zoo["a"], tmp_path/"d")
    assert not (tmp_path/"d").exists()

def test_changed_stacks_of_experts_are_refused(tmp_path):
    model = certificate.tiny_model("mixtral", 0)
    model.save_pretrained(tmp_path/"base")
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1.01)
    model.save_pretrained(tmp_path/"tune")
    for name in ("base", "tune"): tiny_tokenizer(64).save_pretrained(tmp_path/name)
    with pytest.raises(InputError, match="belong to no linear layer"): extract(tmp_path/"tune", tmp_path/"base", tmp_path/"d")

# Packing

def test_each_family_has_its_base():
    from model_glue_nb.merging.packing import families
    zoo = read_zoo("demo")
    found = families(list(zoo))
    assert {b: set(ms) for b, ms in found.items()} == {b: {n for n in zoo.names if n[0] == b[0]} - {b} for b in ("a-base", "b-base", "c-base")}
    some = [zoo[n] for n in ("a-sort", "a-base", "a-shift", "b-skip", "b-base")]
    assert families(some, ["b-skip", "a-shift"]) == {"b-skip": ["b-base"], "a-shift": ["a-sort", "a-base"]}
    both = families(some[:3], ["a-base", "a-sort"]) # two bases of one family: each member to the nearer
    assert both == {"a-base": ["a-shift"], "a-sort": []}
    assert families(some[:3], ["a-sort", "a-base"]) == {"a-sort": [], "a-base": ["a-shift"]}, "not to the first"

def test_a_packed_zoo_is_a_zoo_and_gives_every_member_back(tmp_path):
    from model_glue_nb.merging.packing import pack, unpack_model
    zoo = read_zoo("demo").subset(["a-base", "a-sort", "b-base", "c-base", "c-expand"])
    made = pack(zoo, tmp_path/"p", error=.3)
    kept = {r["member"]: r["kept"] for r in made.rows}
    assert kept == {"a-base": "base", "a-sort": "difference", "b-base": "whole", "c-base": "base", "c-expand": "difference"}
    assert json.loads((tmp_path/"p/a-sort/adapter_config.json").read_text())["base_model_name_or_path"] == "../a-base"
    again = read_zoo(tmp_path/"p")
    assert set(again.names) == {"a-base", "a-base+a-sort", "b-base", "c-base", "c-base+c-expand"} and not again.skipped
    assert made.n_bytes == sum(t.stop - t.start for f in (tmp_path/"p").iterdir() for t in open_model(f).stored.values())
    whole = unpack_model(tmp_path/"p", "c-base", tmp_path/"w")
    assert all(np.array_equal(whole.raw(k), zoo["c-base"].raw(k)) for k in zoo["c-base"].tensors)
    view, one = adapted(zoo["a-base"], tmp_path/"p/a-sort"), unpack_model(tmp_path/"p", "a-sort", tmp_path/"one")
    member = again["a-base+a-sort"]
    assert set(view.inputs) == set(one.tensors) and all(np.array_equal(one.raw(k), member.raw(k)) for k in one.tensors)
    changed = [k for k in one.tensors if not np.array_equal(one.raw(k), zoo["a-base"].raw(k))]
    assert len(changed) > 20

def test_bad_packing_leaves_nothing(tmp_path):
    from model_glue_nb.merging.packing import pack, unpack_model
    zoo = read_zoo("demo")
    for names, how, says in ((["a-sort", "b-skip"], {}, "No model of the zoo was tuned"), (["a-base", "a-sort"], dict(rank=0), "whole number from 1"),
                             (["a-base", "a-sort"], dict(bases=["a-bse"]), "Did you mean 'a-base'"), (["a-base"], {}, "No model of the zoo was tuned")):
        with pytest.raises(InputError, match=says): pack(zoo.subset(names), tmp_path/"p", **how)
    with pytest.raises(InputError, match="There is no member 'x'"): unpack_model(tmp_path, "x", tmp_path/"o")
    assert not list(tmp_path.iterdir())

def test_a_member_that_no_adapter_can_say_stays_whole(tmp_path):
    from model_glue_nb.merging.packing import pack
    from model_glue_nb.zoo.zoo import Zoo
    model = certificate.tiny_model("mixtral", 0)
    for name, factor in (("base", 1), ("tune", 1.01)):
        with torch.no_grad():
            for p in model.parameters(): p.mul_(factor)
        model.save_pretrained(tmp_path/name)
        tiny_tokenizer(64).save_pretrained(tmp_path/name)
    made = pack(Zoo((open_model(tmp_path/"base"), open_model(tmp_path/"tune"))), tmp_path/"p", rank=2)
    assert [r["kept"] for r in made.rows] == ["base", "whole"] and "no linear layer" in made.rows[1]["why"]
    assert set(read_zoo(tmp_path/"p").names) == {"base", "tune"}

def test_commands(tmp_path, command):
    zoo = read_zoo("demo")
    (tmp_path/"z.yaml").write_text("".join(f"- {zoo[n].path}\n" for n in ("a-base", "a-sort")))
    code, out, err = command("extract", zoo["a-sort"].path, zoo["a-base"].path, tmp_path/"d", "--error", .3, "--json")
    about = json.loads(out)
    assert not code and about["error"] <= .3 and about["share"] == about["n_bytes"] / zoo["a-base"].n_bytes and about["unsaid"] == 0
    code, out, err = command("extract", zoo["a-sort"].path, zoo["a-base"].path, tmp_path/"e", "--rank", 2, "--no-embeddings")
    assert not code and "PeftModel.from_pretrained" in out and "leaves as in the base" in err
    code, out, err = command("pack", tmp_path/"z.yaml", tmp_path/"p", "--size", "5%", "--json")
    assert not code and [r["kept"] for r in json.loads(out)] == ["base", "difference"]
    code, out, err = command("unpack", tmp_path/"p", "a-sort", tmp_path/"w")
    assert not code and (tmp_path/"w/config.json").exists()
    code, out, err = command("extract", zoo["a-sort"].path, zoo["a-base"].path, tmp_path/"d", "--rank", 2)
    assert code == 2 and "already" in err
