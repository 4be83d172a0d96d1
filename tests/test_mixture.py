"Laws of mixtures at every level and architecture, loading where this package is not, and what is refused."
import json, os, shutil, subprocess, sys, sysconfig, venv
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import command
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_glue_nb.core import InputError
from model_glue_nb.mixing import modeling
from model_glue_nb.mixing.mixture import mix, score_continuations
from model_glue_nb.mixing.spec import SUPPORTED, MixtureSpec
from model_glue_nb.zoo.zoo import Zoo, open_model, tiny_zoo

ARCHITECTURES = [a.removesuffix("ForCausalLM") for a in SUPPORTED][:7] # all of them: test_mixture_architectures
KINDS = dict(stacks=dict(level="model"), hybrid=dict(level="model", dense_layers=1), blocks=dict(level="block", dense_layers=1),
             two_blocks=dict(level="block", top_k=2),
             mlps=dict(level="ffn", top_k=2),
             mlps_by_token=dict(level="ffn", input="token", format="own"))
PROMPTS = dict(name="prompt", positive=["w3 w4 w5", "w20 w21", "w40 w41 w42 w43"])

@pytest.fixture(autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad(): yield
    torch.set_num_threads(before)

@pytest.fixture(scope="module")
def zoos(tmp_path_factory):
    "A base and three experts of every architecture, made when first asked for."
    known = {}
    def get(architecture="Llama", **config):
        key = (architecture, *config.items())
        if key not in known:
            more = dict(head_dim=8, num_hidden_layers=3, sliding_window=6 if architecture in ("Mistral", "Gemma2", "Gemma3") else None) | config
            known[key] = tiny_zoo(tmp_path_factory.mktemp(architecture), ["base", "a", "b", "c"], architecture, dtype="float32", **more)
        return known[key]
    return get

def made(zoo, out, experts=("a", "b", "c"), base="base", router=PROMPTS, **spec):
    return mix(MixtureSpec(experts=tuple(experts), base=base, router=router, **spec), zoo, out)

def load(model, **kwargs):
    return AutoModelForCausalLM.from_pretrained(getattr(model, "path", model), **{"dtype": torch.float32} | kwargs).eval()
def tokens(n=6, length=11, seed=0):
    return torch.randint(3, 64, (n, length), generator=torch.Generator().manual_seed(seed))
def close(a, b, eps=1e-5): assert (a - b).abs().max() < eps, f"differ by {(a - b).abs().max():.1e}"

arch = pytest.mark.parametrize("architecture", ARCHITECTURES)
kind = pytest.mark.parametrize("kind", KINDS)

# Exactness

@arch
@pytest.mark.parametrize("tied", [False, True])
def test_forced_to_an_expert_it_is_that_expert(zoos, tmp_path, architecture, tied):
    zoo = zoos(architecture, tie_word_embeddings=tied)
    ids = tokens()
    mixture = load(made(zoo, tmp_path/"m", level="model"))
    for i, e in enumerate("abc"):
        close(mixture(input_ids=ids, route=i).logits, load(zoo[e])(input_ids=ids).logits)

@arch
@pytest.mark.parametrize("level, input", [("model", "sample"), ("block", "sample"), ("ffn", "sample"), ("ffn", "token")])
def test_a_hybrid_of_identical_experts_is_the_dense_model(zoos, tmp_path, architecture, level, input):
    zoo = zoos(architecture)
    twins = []
    for n in ("x", "y"):
        shutil.copytree(zoo["base"].path, tmp_path/n)
        twins.append(open_model(tmp_path/n))
    m = made(Zoo((*zoo, *twins)), tmp_path/"m", ("x", "y"),
             level=level, input=input, dense_layers=1, top_k=1 if level == "model" else 2,
             router=dict(name="prompt", positive=["w3 w4", "w9 w8"]))
    close(load(m)(input_ids=tokens()).logits, load(zoo["base"])(input_ids=tokens()).logits)

@arch
def test_one_mlp_is_that_mlp(zoos, tmp_path, architecture):
    zoo = zoos(architecture)
    m = made(zoo, tmp_path/"m", ("a",), base="a", level="ffn", router=dict(name="random"))
    close(load(m)(input_ids=tokens()).logits, load(zoo["a"])(input_ids=tokens()).logits)

@pytest.mark.parametrize("architecture, kind",
                         [(a, k) for a in ARCHITECTURES for k in KINDS if a in ("Llama", "Gemma2") or k in ("blocks", "hybrid")])
def test_cached_generation_equals_uncached(zoos, tmp_path, architecture, kind):
    m = load(made(zoos(architecture), tmp_path/"m", **KINDS[kind]))
    m.generation_config.eos_token_id = None
    ids = torch.cat([torch.full((6, 3), 1), tokens()], 1)
    mask = (torch.arange(14) >= 3).long().expand(6, -1).clone()
    mask[0] = 1
    def run(**k):
        return m.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=1, **k)
    assert torch.equal(run(use_cache=True), run(use_cache=False)) # longer than the sliding windows
    assert torch.equal(run(num_beams=3, use_cache=True), run(num_beams=3, use_cache=False))

@kind
def test_neighbours_padding_and_order_change_nothing(zoos, tmp_path, kind):
    m = load(made(zoos(), tmp_path/"m", **KINDS[kind]))
    ids = tokens(8)
    whole, route = m(input_ids=ids).logits, m.route(ids)
    pad, one = torch.full((8, 5), 1), torch.ones_like(ids)
    off = torch.zeros_like(pad)
    left, right = ((torch.cat(x[::s], 1), torch.cat(y[::s], 1))
                   for s in (1, -1)
                   for x, y in [([pad, ids], [off, one])])
    close(m(input_ids=left[0], attention_mask=left[1]).logits[:, 5:], whole)
    close(m(input_ids=right[0], attention_mask=right[1]).logits[:, :11], whole)
    close(torch.cat([m(input_ids=x[None]).logits for x in ids]), whole)
    close(m(input_ids=ids.flip(0)).logits.flip(0), whole)
    for place, chosen in route.items():
        for other in (m.route(*left)[place],
                      m.route(*right)[place],
                      m.route(ids.flip(0))[place].flip(0),
                      torch.cat([m.route(x[None])[place] for x in ids])):
            assert torch.equal(other, chosen)
    assert kind == "mlps_by_token" or any(len(c.unique()) > 1 for c in route.values()), "all samples went one way: nothing was shown"

@kind
def test_a_continuation_never_changes_the_route(zoos, tmp_path, kind):
    m = load(made(zoos(), tmp_path/"m", **KINDS[kind]))
    prompt = tokens(1)
    many = torch.cat([prompt.expand(40, -1), tokens(40, 9, seed=1)], 1)
    lengths = torch.full((40,), 11)
    alone, scored = m.route(prompt), m.route(many, prompt_lengths=lengths)
    assert all(torch.equal(scored[p], alone[p].expand(40, -1)) for p in alone)
    close(m(input_ids=many, prompt_lengths=lengths).logits[:, :11],
          m(input_ids=prompt).logits.expand(40, -1, -1))

def test_temperature_and_margin_in_one_checkpoint(zoos, tmp_path):
    ids = tokens()
    def block(name, **k): return load(made(zoos(), tmp_path/name, level="block", **k))(input_ids=ids).logits
    first, both = block("first"), block("both", top_k=2)
    assert (first - both).abs().max() > 1e-3
    close(block("cold", top_k=2, router=PROMPTS | dict(temperature=1e-5)), first) # nearly nothing is left for the second choice
    def route(name, **k):
        return load(made(zoos(), tmp_path/name, level="model", router=PROMPTS | k)).route(ids)["model"]
    free = route("free")
    assert len(free.unique()) > 1
    assert ((route("cheap", margin=9., costs=[3, 1, 2]) == 1).all()
            and torch.equal(route("strict", margin=1e-9, costs=[3, 1, 2]), free))

def test_lm_eval_scores_are_those_of_the_routed_expert(zoos, tmp_path):
    zoo = zoos()
    live = made(zoo, tmp_path/"m", level="model").load(device="cpu")
    pairs = [(tokens(1, 4 + i % 3, seed=i)[0].tolist(),
              tokens(1, 1 + i % 4, seed=50 + i)[0].tolist())
             for i in range(12)]
    for (score, greedy), (p, c) in zip(score_continuations(live, pairs), pairs):
        expert = load(zoo["abc"[int(live.model.route(torch.tensor([p]))["model"])]])
        logp = expert(input_ids=torch.tensor([p + c])).logits[0, len(p) - 1:-1].log_softmax(-1)
        assert (abs(score - float(logp.gather(1, torch.tensor(c)[:, None]).sum())) < 1e-4
                and greedy == (logp.argmax(-1).tolist() == c))

# Loading

CLEAN = """
import importlib.util, sys; sys.path[:] = [p for p in sys.path if p]
assert importlib.util.find_spec("model_glue_nb") is None, "the package is here: nothing would be shown"
import torch; from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left") # asks about the config, not about code of its own
    x = tokenizer(["w3 w4 w5 w6", "w40 w41"], return_tensors="pt", padding=True)
    print(type(model).__name__, model.generate(**x, max_new_tokens=5, do_sample=False).tolist())
"""

def test_loads_and_generates_in_an_environment_without_our_package(zoos, tmp_path):
    models = [made(zoos(a), tmp_path/f"{a}{k}", **spec) for a, k, spec in [("Llama", "own", KINDS["stacks"]),
                                                                           ("Gemma3", "blocks", KINDS["blocks"]),
              ("Mistral", "moe", dict(level="ffn", input="token", router=PROMPTS))]]
    venv.create(tmp_path/"env", with_pip=False) # sees the installed libraries, but not the .pth of our editable install
    site = next((tmp_path/"env"/"lib").glob("python*"))/"site-packages"
    (site/"libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(HF_MODULES_CACHE=str(tmp_path/"modules"), HF_HUB_OFFLINE="1")
    r = subprocess.run([tmp_path/"env"/"bin"/"python", "-c", CLEAN, *(m.path for m in models)],
                       cwd=tmp_path, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    said = [l for l in r.stdout.splitlines() if "ForCausalLM [[" in l]
    assert [s.split()[0] for s in said] == ["MixtureForCausalLM", "MixtureForCausalLM", "MixtralForCausalLM"]
    for m, line in zip(models, said): # and it says there what it says here
        t = AutoTokenizer.from_pretrained(m.path, padding_side="left")
        x = t(["w3 w4 w5 w6", "w40 w41"], return_tensors="pt", padding=True)
        assert str(load(m).generate(**x, max_new_tokens=5, do_sample=False).tolist()) in line

@pytest.mark.parametrize("kind", ["stacks", "two_blocks", "mlps_by_token"])
def test_bf16_device_map_and_saving_again(zoos, tmp_path, kind):
    m = made(zoos(), tmp_path/"m", **KINDS[kind])
    ids = tokens()
    whole = load(m)(input_ids=ids).logits
    low = load(m, dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert {p.dtype for n, p in low.named_parameters() if "router" in n} == {torch.float32}, "routers stay exact"
    close(low(input_ids=ids).logits.float(), whole, .05)
    placed = load(m, device_map="auto")
    close(placed(input_ids=ids.to(placed.device)).logits.cpu(), whole)
    spread = load(m, device_map="auto", max_memory={"cpu": "60KB"}, offload_folder=str(tmp_path/"disk")) # most of it stays on the disk
    assert "disk" in spread.hf_device_map.values()
    close(spread(input_ids=ids).logits, whole)
    low.generate(ids, max_new_tokens=3, do_sample=False)
    load(m).save_pretrained(tmp_path/"again")
    assert (tmp_path/"again"/"modeling.py").exists()
    close(load(tmp_path/"again", trust_remote_code=True)(input_ids=ids).logits, whole)

def test_shards_and_hidden_states(zoos, tmp_path, monkeypatch):
    from model_glue_nb.mixing import one_checkpoint
    small = one_checkpoint.write_tensors
    monkeypatch.setattr(one_checkpoint, "write_tensors", lambda *given: small(*given, shard_bytes=20_000))
    m = made(zoos(), tmp_path/"m", level="block")
    one = load(m)
    assert len(list(m.path.glob("model-*.safetensors"))) > 2
    monkeypatch.undo()
    ids = tokens()
    close(one(input_ids=ids).logits, load(made(zoos(), tmp_path/"n", level="block"))(input_ids=ids).logits)
    states = one(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == 4 and all(s.shape == (6, 11, 32) for s in states)
    close(one.dense.lm_head(states[-1]), one(input_ids=ids).logits)

@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_standard_formats_say_what_our_file_says(zoos, tmp_path, architecture, top_k):
    spec = dict(level="ffn", input="token", top_k=top_k, dense_layers=int(architecture.startswith("Qwen")))
    plain, own = (made(zoos(architecture), tmp_path/f, format=f, **spec) for f in ("auto", "own"))
    assert "Mixture" not in plain.architecture and plain.kind == "checkpoint" and own.architecture == "MixtureForCausalLM"
    close(load(plain)(input_ids=tokens()).logits, load(own)(input_ids=tokens()).logits)
    assert not (plain.path/"modeling.py").exists()
    if top_k == 1: # one expert for every token: the dense model with that expert's MLPs
        one = made(zoos(architecture), tmp_path/"one", ("base",), level="ffn",
                   input="token", router=dict(name="prompt", positive=["w3"]))
        close(load(one)(input_ids=tokens()).logits, load(zoos(architecture)["base"])(input_ids=tokens()).logits)

# Experts that stand apart

@pytest.fixture
def strangers(zoos, tmp_path):
    return Zoo((zoos("Llama")["a"],
                open_model(zoos("Qwen2")["b"].path, "q"),
                open_model(zoos("Gemma2")["c"].path, "g")))

def test_at_most_max_resident_experts_are_in_memory(strangers, tmp_path):
    live = mix(MixtureSpec(experts=("a", "q", "g"), router=dict(name="random"), max_resident=1), strangers, tmp_path/"m").load()
    prompts = [f"w{i} w{i + 1}" for i in range(3, 40)]
    route = live.route(prompts)
    assert not live.resident, "random reads nothing"
    answers = live.generate(prompts, 4)
    assert set(route) == {0, 1, 2} and len(live.resident) == 1
    assert answers == [live.expert(int(e)).generate([p], 4)[0] for p, e in zip(prompts, route)]
    assert [live.generate([p], 4)[0] for p in prompts[::-1]] == answers[::-1]

def test_the_choice_depends_on_seed_and_prompt_alone(strangers, tmp_path):
    def r(seed, name):
        return mix(MixtureSpec(experts=("a", "q",
                                        "g"), router=dict(name="random", seed=seed)), strangers, tmp_path/name).load().route(
  [f"w{i}" for i in range(3, 60)])
    assert (r(0, "x") == r(0, "y")).all() and (r(0, "z") != r(1, "w")).any()

# What is refused

@pytest.mark.parametrize("change, says", [
    (dict(experts=("a", "wide")), "has shape (32, 96) in 'wide', (32, 48) in 'base'"), (dict(experts=("a", "q")), "Mix at level 'model' without a base"),
    (dict(dense_layers=3), "Give 0 to 2"), (dict(dense_layers=-1), "Give 0 to 2"),
    (dict(top_k=3), "Give 1 to 2"), (dict(top_k=0), "Give 1 to 2"),
    (dict(experts=("a", "nobody")), "There is no model 'nobody'"),
    (dict(router=dict(name="knn")), "Give a suite"),
    (dict(base="neox"), "GPTNeoXForCausalLM"),
])
def test_bad_mixtures_leave_nothing_behind(zoos, tmp_path, change, says):
    wide = tiny_zoo(tmp_path/"z", ["wide"], dtype="float32", intermediate_size=96, head_dim=8, num_hidden_layers=3)["wide"]
    zoo = Zoo((*zoos(), wide,
               open_model(zoos("Qwen2")["b"].path, "q"),
               tiny_zoo(tmp_path/"z", ["neox"], "GPTNeoX")["neox"]))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as e:
        made(zoo, tmp_path/"m", **dict(experts=("a", "b"), level="ffn", router=dict(name="random")) | change)
    assert says in str(e.value) and sorted(tmp_path.iterdir()) == before

def test_a_router_for_other_experts_is_refused(zoos, tmp_path):
    made(zoos(), tmp_path/"m", level="block")
    made(zoos(), tmp_path/"again", level="block", router=dict(file=str(tmp_path/"m")))
    assert (tmp_path/"m"/"router.safetensors").read_bytes() == (tmp_path/"again"/"router.safetensors").read_bytes()
    for experts in ("acb", "ab"):
        with pytest.raises(InputError, match="Fit a router for these experts"):
            made(zoos(), tmp_path/"x", experts, level="block", router=dict(file=str(tmp_path/"m")))
    assert not (tmp_path/"x").exists()

def test_empty_long_and_moved(zoos, strangers, tmp_path):
    inside = load(made(zoos(), tmp_path/"in", level="model"))
    with pytest.raises(ValueError, match="at least one token"):
        inside(input_ids=tokens(2), attention_mask=torch.tensor([[1] * 11, [0] * 11]))
    for a in ("a", "q"): shutil.copytree(strangers[a].path, tmp_path/a)
    live = (m := mix(MixtureSpec(experts=("a", "q"), router=dict(name="random")),
                     Zoo((open_model(tmp_path/"a"), open_model(tmp_path/"q"))),
                     tmp_path/"m")).load()
    with pytest.raises(InputError, match="Prompt 1 is empty"): live.generate(["w3", " \n"])
    with pytest.raises(InputError, match="reads at most 128"): live.generate(["w3 " * 200])
    shutil.move(tmp_path/"q", tmp_path/"elsewhere")
    with pytest.raises(InputError, match="Expert 'q' of mixture 'm' is not at"): m.load()

def test_the_command_mixes_plans_and_refuses(zoos, tmp_path):
    zoo = zoos()
    file = tmp_path/"m.yaml"
    def run(*more): return command("mix", file, tmp_path/"out", *more)
    text = "level: block\ndense_layers: 1\nexperts: [{a}, {b}]\nbase: {base}\nrouter: {{name: random}}\n"
    file.write_text(text.format(**{m.name: m.path for m in zoo}))
    plan = run("--dry-run", "--json")
    assert plan.returncode == 0, plan.stderr
    rows = json.loads(plan.stdout)
    assert [r["part"] for r in rows] == ["shared", "expert", "expert"] and not (tmp_path/"out").exists()
    done = run()
    assert done.returncode == 0 and "trust_remote_code=True" in done.stdout, done.stderr
    assert sum(r["parameters"] for r in rows) == open_model(tmp_path/"out").n_params
    assert run().returncode == 2 # it exists
    file.write_text(text.format(**{m.name: m.path for m in zoo}).replace("dense_layers: 1", "dense_layers: 9"))
    bad = run("--overwrite")
    assert bad.returncode == 2 and "Give 0 to 2" in bad.stderr and "Traceback" not in bad.stderr
    assert open_model(tmp_path/"out").n_params, "the old one is still there"
