"Experts as low-rank changes of one base: every sample of a batch is answered as its own expert answers it alone, however the batch is mixed."
import json, shutil, sys
from pathlib import Path
import numpy as np
import pytest, torch
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.core import InputError
from model_glue_nb.mixing.difference_experts import gather_changes
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.residents import Resident, answered_by, as_differences, difference_model
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.merging.differences import extract
from model_glue_nb.zoo.zoo import Zoo, open_model, read_zoo, tiny_tokenizer, tiny_zoo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/"tools"))
import certificate

KINDS = "llama qwen2 qwen3 gemma2 stablelm starcoder2 olmo2 cohere gpt2 phi gpt_neox nemotron".split() # biases, two norms, tied, (in, out) weights

def family(kind, folder, n=2):
    "A base and fine-tunes of it that differ in rank, as checkpoints and as adapters."
    torch.manual_seed(3)
    model = certificate.tiny_model(kind, 0)
    model.save_pretrained(folder/"base")
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    for i in range(n):
        with torch.no_grad():
            for k, p in model.named_parameters():
                p.copy_(start[k])
                if "embed_positions" in k or "wpe" in k: continue
                if p.ndim == 2: p += .3 * p.std() * torch.randn(p.shape[0], 2 + i) @ torch.randn(2 + i, p.shape[1]) / (2 + i)
                elif p.ndim == 1: p += .2 * torch.randn(p.shape)
        model.save_pretrained(folder/f"tune{i}")
    for name in ("base", *(f"tune{i}" for i in range(n))): tiny_tokenizer(64).save_pretrained(folder/name)
    for i in range(n): extract(folder/f"tune{i}", folder/"base", folder/f"adapter{i}", error=.05)
    return open_model(folder/"base"), [None, *(folder/f"adapter{i}" for i in range(n))]

def alone(base, adapter, device="cpu"):
    "The base with an adapter's changes in its weights."
    member = base if adapter is None else read_zoo([str(base.path), f"{base.path}+{adapter}"]).models[1]
    return member.load(device, "float32").model

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_each_sample_alone(kind, device, tmp_path):
    base, adapters = family(kind, tmp_path)
    resident = Resident(base, adapters, device, "float32")
    x = torch.randint(3, 60, (5, 7), device=device)
    each = [alone(base, a, device) for a in adapters]
    with torch.no_grad():
        plain = each[0](x).logits
        for route in ((1, 0, 2, 1, 2), (2,) * 5, (0,) * 5, (2, 2, 0, 0, 1)):
            want = torch.stack([each[e](x[i:i + 1]).logits[0] for i, e in enumerate(route)])
            with answered_by(route): got = resident.live.model(x).logits
            assert (got - want).abs().max() < 2e-5 * max(1, want.abs().max())
        assert all((m(x).logits - plain).abs().max() > 1e-2 for m in each[1:])
        assert (resident.live.model(x).logits - plain).abs().max() < 1e-6, "without a route it is the base"
        assert (resident.expert(1, "one").model(x[:2]).logits - each[1](x[:2]).logits).abs().max() < 2e-5 * max(1, plain.abs().max())

def test_who_reads_the_same_shares_a_product_and_nobody_takes_anothers(tmp_path, monkeypatch):
    from model_glue_nb.mixing import per_sample
    base, adapters = family("llama", tmp_path)
    resident = Resident(base, adapters, "cpu", "float32")
    each = [alone(base, a).model.layers[0].self_attn for a in adapters]
    live, calls, along = resident.live.model.model.layers[0].self_attn, [], per_sample._along
    monkeypatch.setattr(per_sample, "_along", lambda *a: calls.append(1) or along(*a))
    x = torch.randn(3, 5, live.q_proj.in_features)
    y = x.clone()
    y[0] += 1
    def is_right(name, x, route):
        want = torch.stack([getattr(each[e], name)(x[i]) for i, e in enumerate(route)])
        return (getattr(live, name)(x) - want).abs().max() < 1e-5
    with torch.no_grad():
        with answered_by((1, 0, 2)):
            assert all(is_right(name, x, (1, 0, 2)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")) and len(calls) == 2
            assert live.q_proj.changes.beside.read[0] is None, "what all have read is let go"
            assert is_right("q_proj", x, (1, 0, 2)) and is_right("k_proj", y, (1, 0, 2)) and is_right("v_proj", x, (1, 0, 2)), "another vector"
            assert is_right("q_proj", x, (1, 0, 2)) and is_right("q_proj", x, (1, 0, 2)) and is_right("k_proj", x, (1, 0, 2)), "asked twice"
        with answered_by((2, 2, 1)): assert is_right("v_proj", x, (2, 2, 1)), "the same vector on other routes"
        with answered_by((1,) * 3): assert is_right("o_proj", x, (1,) * 3)
    view = resident.expert(1, "one").model.model.layers[0].self_attn
    assert view.q_proj.changes.beside.members[0] is view.q_proj.changes is not live.q_proj.changes

def test_answers_of_any_length_and_kind(tmp_path):
    base, adapters = family("llama", tmp_path, 3)
    resident = Resident(base, adapters, "cpu")
    rng = np.random.default_rng(0)
    prompts = [" ".join(f"w{k}" for k in rng.integers(3, 60, n)) for n in rng.integers(2, 9, 24)]
    who = rng.integers(0, 4, 24)
    views = [resident.expert(e, str(e)) for e in range(4)]
    want = [views[e].generate([p], 9)[0] for p, e in zip(prompts, who)]
    assert resident.generate(prompts, who, 9) == want and len(set(want)) > 4
    assert [v.generate(prompts[:6], 5) for v in views] == [[v.generate([p], 5)[0] for p in prompts[:6]] for v in views]

def test_adapters_that_peft_wrote(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    certificate.tiny_model("llama", 0).save_pretrained(tmp_path/"base")
    tiny_tokenizer(64).save_pretrained(tmp_path/"base")
    x, want = torch.randint(3, 60, (2, 6)), []
    for i, how in enumerate((dict(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"]), dict(r=3, lora_alpha=2, use_rslora=True, target_modules="all-linear"))):
        torch.manual_seed(i)
        live = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path/"base", dtype=torch.float32), LoraConfig(**how))
        for name, p in live.named_parameters():
            if "lora_" in name: p.data.normal_(0, .1)
        live.save_pretrained(tmp_path/str(i))
        with torch.no_grad(): want.append(live.eval()(x[i:i + 1]).logits[0])
    resident = Resident(open_model(tmp_path/"base"), [tmp_path/"0", tmp_path/"1"], "cpu")
    with torch.no_grad(), answered_by((0, 1)): got = resident.live.model(x).logits
    assert (got - torch.stack(want)).abs().max() < 1e-5

@pytest.fixture(scope="module")
def in_one(tmp_path_factory):
    "Three experts of the embedded zoo in one checkpoint."
    folder = tmp_path_factory.mktemp("one")
    spec = MixtureSpec(("a-base", "a-sort", "a-reverse"), dict(name="linear"), level="adapter", base="a-base", difference=dict(rank=4))
    return mix(spec, read_zoo("demo"), folder/"m", load_suite("demo").only(["sort", "reverse"]).part("search", 20), verify=True)

def test_one_checkpoint_holds_one_model_and_its_changes(in_one, tmp_path):
    import subprocess
    base = read_zoo("demo")["a-base"]
    assert base.n_params < in_one.n_params < 1.15 * base.n_params
    shutil.copytree(in_one.path, tmp_path/"m")
    code = ("import sys; sys.modules['model_glue_nb'] = None\nimport torch\nfrom transformers import AutoModelForCausalLM\n"
            "m = AutoModelForCausalLM.from_pretrained('m', trust_remote_code=True, dtype=torch.float32).eval()\n"
            "x = torch.arange(5, 14)[None].expand(3, -1)\n"
            "with torch.no_grad(): y = m(x, route=torch.tensor([0, 1, 2])).logits\n"
            "torch.save(y, 'y')\nm.save_pretrained('again')\n"
            "n = AutoModelForCausalLM.from_pretrained('again', trust_remote_code=True, dtype=torch.float32).eval()\n"
            "with torch.no_grad(): assert torch.equal(n(x, route=torch.tensor([0, 1, 2])).logits, y)\n")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
    live, x = in_one.load("cpu").model, torch.arange(5, 14)[None]
    with torch.no_grad(): want = torch.cat([live(x, route=e).logits for e in range(3)])
    assert (torch.load(tmp_path/"y") - want).abs().max() < 1e-4 and (want[0] - want[1]).abs().max() > 1

def test_the_route_stays_while_an_answer_grows(in_one):
    live = in_one.load("cpu")
    prompts = ["put LIFWCB in order =", "reverse ABCD =", "MLRIP as in a dictionary ="]
    model = live.model
    route = live.route(prompts)[:, 0]
    for p, e in zip(prompts, route):
        x = torch.tensor([live.encode([p])[0]])
        how = dict(max_new_tokens=8, do_sample=False)
        want = model.generate(x, route=int(e), **how)
        for more in ({}, dict(use_cache=False)): assert torch.equal(model.generate(x, **how, **more), want)
        assert torch.equal(model.generate(x, **how, num_beams=2), model.generate(x, **how, num_beams=2, route=int(e)))
    ids = [live.encode([p])[0] for p in prompts]
    width = max(map(len, ids))
    x, mask = (torch.tensor([[fill] * (width - len(i)) + (i if v is None else [v] * len(i)) for i in ids]) for fill, v in ((0, None), (0, 1)))
    with torch.no_grad(): padded = model(x, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    with torch.no_grad(): single = torch.cat([model(torch.tensor([i])).logits[:, -1] for i in ids])
    assert (padded - single).abs().max() < 1e-3
    vectors = model.get_input_embeddings()(x)
    assert model(inputs_embeds=vectors, attention_mask=mask).logits.isfinite().all()
    with pytest.raises(ValueError, match="Resize the base and mix again"): model.resize_token_embeddings(400)

def test_changes_can_be_trained(in_one):
    model = in_one.load("cpu").model.train()
    x = torch.arange(5, 14)[None].expand(2, -1)
    for checkpointing in (False, True):
        if checkpointing: model.gradient_checkpointing_enable()
        model.zero_grad()
        model(x, labels=x, route=torch.tensor([1, 2])).loss.backward()
        changes = [(n, p.grad) for n, p in model.named_parameters() if ".changes.up" in n]
        assert changes and all(g is not None and g.abs().max() > 0 for _, g in changes)
        found = torch.cat([g.flatten() for _, g in changes])
        if not checkpointing: first = found
    assert (found - first).abs().max() < 1e-5 * first.abs().max()

def test_families_and_strangers_behind_one_router(tmp_path):
    zoo = read_zoo("demo")
    zoo = Zoo((*zoo, *tiny_zoo(tmp_path/"t", ["stranger"])), {})
    suite = load_suite("demo").only(["sort", "reverse", "swap"]).part("search", 12)
    names = ("a-sort", "a-reverse", "b-swap", "stranger", "a-base")
    spec = MixtureSpec(names, dict(name="linear"), level="adapter", bases=("a-base", "b-base"), difference=dict(rank=4), copy=True)
    m = mix(spec, zoo, tmp_path/"m", suite, verify=True)
    live = m.load("cpu")
    assert [e.kind for e in live.experts] == ["difference"] * 3 + ["checkpoint", "difference"]
    assert live.siblings(0) == [0, 1, 4] and live.siblings(2) == [2] and live.siblings(3) == [3]
    prompts = [q.prompt for t in suite.tasks for q in t.questions]
    route = live.route(prompts)
    want = [live.experts[e].load("cpu").generate([p], 8)[0] for p, e in zip(prompts, route)]
    assert live.generate(prompts, 8) == want and len({*route}) > 2
    assert [x for p in prompts[:3] for x in ["".join(live.stream(p, 8))]] == want[:3]
    assert len(live.resident) <= 3 and set(live.resident) == {str(live.experts[i].path) for i in (0, 2)} | ({3} & {*route})
    shutil.move(tmp_path/"m", tmp_path/"moved")
    assert open_model(tmp_path/"moved").load("cpu").generate(prompts[:4], 8) == want[:4]
    adapter = json.loads((tmp_path/"moved/adapters/a-sort/adapter_config.json").read_text())
    assert adapter["peft_type"] == "LORA"
    factor = tmp_path/"moved/adapters/a-sort/adapter_model.safetensors"
    factor.write_bytes(factor.read_bytes()[:-4] + b"\\0\\0\\0\\1")
    with pytest.raises(InputError, match="has changed since"): open_model(tmp_path/"moved").load("cpu")

@pytest.mark.parametrize("how, says", [
    (dict(level="adapter", base="a-base", difference=dict(rnak=3)), "budget of a difference 'rnak'"),
    (dict(level="adapter", base="a-base", difference=dict(form="signs")), "signs are not added sample by sample. Leave form out, or mix whole models"),
    (dict(level="adapter", base="a-base", difference=dict(rank=0)), "whole number from 1"),
    (dict(level="adapter", base="a-base", difference={}), "No budget came"),
    (dict(level="adapter", base="a-base", top_k=2), "one expert answers"),
    (dict(level="adapter", base="a-base", dense_layers=1), "all layers are shared"),
    (dict(level="adapter", base="a-base", bases=("a-base",)), "without a base"),
    (dict(bases=("a-base",)), "belong to level 'adapter'"),
    (dict(level="adapter", base="b-base"), "different tokenizers|Give its own base|It was not tuned from"),
    (dict(level="adapter", base="a-base", difference=dict(rank=4000)), "The factors would take")])
def test_bad_specs(how, says, tmp_path):
    with pytest.raises(InputError, match=says):
        mix(MixtureSpec(("a-sort", "a-reverse"), dict(name="random"), **how), read_zoo("demo"), tmp_path/"m")
    assert not list(tmp_path.iterdir())

def test_an_adapter_with_a_vocabulary_of_its_own_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    base, adapters = family("llama", tmp_path, 1)
    file = adapters[1]/"adapter_model.safetensors"
    tensors = load_file(file)
    stem = "base_model.model.model.embed_tokens"
    down, up = tensors[f"{stem}.lora_embedding_A"], tensors[f"{stem}.lora_embedding_B"]
    tensors |= {f"{stem}.base_layer.weight": torch.zeros(72, 32), f"{stem}.lora_embedding_A": torch.zeros(down.shape[0], 72)}
    save_file(tensors, file, dict(format="pt"))
    with pytest.raises(InputError, match="a vocabulary of its own|of shape"): gather_changes(base, adapters)

def test_who_is_no_fine_tune_stays_whole(tmp_path):
    zoo = read_zoo("demo")
    found = as_differences([zoo["a-sort"], zoo["b-swap"]], [zoo["a-base"]], tmp_path, dict(rank=2))
    assert [m.kind for m in found] == ["difference", "checkpoint"] and found[0].base == "a-base"
    assert difference_model(zoo["a-base"], found[0].adapter).problems() == []
