"Mixtures of every architecture that one checkpoint can hold: forced to an expert they are that expert, whatever the batch, the cache and the file."
import shutil, subprocess, sys

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from model_glue_nb.core import InputError
from model_glue_nb.mixing import modeling # registers the class
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.spec import SPARSE, SUPPORTED, MixtureSpec
from model_glue_nb.zoo.zoo import open_model, read_zoo, tiny_tokenizer

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=1)
SPARSER = dict(num_experts_per_tok=2, moe_intermediate_size=16)
MORE = dict( # what makes each of them another than Llama
    SmolLM3=dict(no_rope_layers=[1, 0]), Granite=dict(embedding_multiplier=2., residual_multiplier=.5, logits_scaling=3., attention_multiplier=.2),
    StableLm=dict(use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True), Starcoder2=dict(use_bias=True, sliding_window=4),
    Glm4=dict(attention_bias=True), Exaone4=dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]), Phi3=dict(sliding_window=4),
    Gemma2=dict(sliding_window=4), Gemma3=dict(sliding_window=4), Mistral=dict(sliding_window=4),
    Olmo3=dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]), Cohere2=dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    Cohere=dict(use_qk_norm=True, logit_scale=2.), Ministral=dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    SeedOss=dict(attention_bias=True), Olmo=dict(clip_qkv=1.),
    Olmoe=dict(num_experts=3, num_experts_per_tok=2),
    Phimoe=dict(num_local_experts=3, num_experts_per_tok=2),
    Mixtral=dict(num_local_experts=3, num_experts_per_tok=2), Qwen2Moe=dict(num_experts=3, shared_expert_intermediate_size=8) | SPARSER, Qwen3Moe=dict(num_experts=3) | SPARSER)
ALL = [a.removesuffix("ForCausalLM") for a in (*SUPPORTED, *SPARSE)]
NAMED = ["SmolLM3", "Olmo2", "Granite", "StableLm", "Starcoder2", "Glm4", "Exaone4", "Phi3", "Mixtral", "Qwen2Moe", "Qwen3Moe"]
NEW = [a for a in ALL if a not in {"Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3"}]
ROUTER = dict(name="random")
KINDS = dict(stacks=dict(level="model"), blocks=dict(level="block", top_k=2), hybrid=dict(level="model", dense_layers=1),
             mlps_by_token=dict(level="ffn", input="token", top_k=2, format="own"), mlps=dict(level="ffn", dense_layers=1))

@pytest.fixture(autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad(): yield
    torch.set_num_threads(before)

def write(folder, architecture, seed, **more):
    "A random model no tensor of which is zeros or ones: norms and biases count too."
    torch.manual_seed(seed)
    cls = getattr(transformers, f"{architecture}ForCausalLM")
    m = cls(cls.config_class(**SIZES | MORE.get(architecture, {}) | more)).float()
    for p in m.parameters(): p.add_(.1 * torch.randn_like(p))
    m.get_input_embeddings().weight[1] = 0 # of padding; some classes make it so when they load
    m.save_pretrained(folder)
    tiny_tokenizer(64).save_pretrained(folder)

@pytest.fixture(scope="module")
def zoos(tmp_path_factory):
    known = {}
    def get(architecture, **more):
        key = architecture, *more
        if key not in known:
            root = tmp_path_factory.mktemp(architecture)
            with torch.no_grad():
                for seed, name in enumerate(("base", "a", "b")): write(root/name, architecture, seed, **more)
            known[key] = read_zoo([root/n for n in ("base", "a", "b")])
        return known[key]
    return get

def made(zoo, out, experts=("a", "b"), **spec):
    return mix(MixtureSpec(experts, ROUTER, base="base", **spec), zoo, out, verify=False)
def load(model):
    return AutoModelForCausalLM.from_pretrained(getattr(model, "path", model), dtype=torch.float32, trust_remote_code=False).eval()
def tokens(n=4, length=9):
    return torch.randint(3, 64, (n, length), generator=torch.Generator().manual_seed(0))
def close(a, b, eps=1e-6):
    assert a.shape == b.shape and (a - b).abs().max() < eps, f"differ by {(a - b).abs().max():.1e}"
def says(model, ids, **kwargs): return model(input_ids=ids, **kwargs).logits
def kinds_of(architecture):
    return [k for k in KINDS if f"{architecture}ForCausalLM" in SUPPORTED or not k.startswith("mlps")]

def with_parts(zoo, expert, K, part):
    "The base with an expert's layers, or their MLPs, from K on."
    m, e = load(zoo["base"]), load(zoo[expert])
    for i in range(K, 2):
        mine, other = m.model.layers[i], e.model.layers[i]
        (mine.mlp if part == "mlp" else mine).load_state_dict((other.mlp if part == "mlp" else other).state_dict())
    return m

@pytest.mark.parametrize("architecture", NEW)
def test_forced_to_an_expert_it_is_that_expert(zoos, tmp_path, architecture):
    zoo, ids = zoos(architecture), tokens()
    base = says(load(zoo["base"]), ids)
    for kind in kinds_of(architecture) if architecture in NAMED else ("stacks", "blocks"):
        m = load(made(zoo, tmp_path/kind, **KINDS[kind]))
        K = KINDS[kind].get("dense_layers", 0)
        for i, name in enumerate("ab"):
            e = load(zoo[name]) if kind == "stacks" else with_parts(zoo, name, K, "mlp" if "mlps" in kind else "layer")
            close(says(m, ids, route=i), says(e, ids))
            assert (says(e, ids) - base).abs().max() > 1e-3, "the expert is the base: nothing is shown"
            if kind == "stacks": assert torch.equal(says(m, ids, route=i), says(e, ids))

@pytest.mark.parametrize("architecture", NAMED)
def test_padding_cache_and_saving_change_nothing(zoos, tmp_path, architecture):
    zoo, ids = zoos(architecture), tokens()
    pad, ones = torch.ones(4, 3, dtype=torch.long), torch.ones_like(ids)
    for kind in kinds_of(architecture)[1::2]:
        m = load(made(zoo, tmp_path/kind, **KINDS[kind]))
        want = torch.cat([says(m, x[None]) for x in ids])
        if "token" not in kind:
            assert any(len(r.unique(dim=0)) > 1 for r in m.route(ids).values()), "one route for all shows nothing"
        close(says(m, ids), want, 1e-5)
        close(says(m, torch.cat([pad, ids], 1),
                   attention_mask=torch.cat([0 * pad, ones], 1))[:, 3:],
              want, 1e-5)
        close(says(m, torch.cat([ids, pad], 1),
                   attention_mask=torch.cat([ones, 0 * pad], 1))[:, :9],
              want, 1e-5)
        how = dict(attention_mask=torch.cat([0 * pad, ones], 1), max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=None)
        cached, uncached = (m.generate(torch.cat([pad, ids], 1), use_cache=c, **how) for c in (True, False))
        assert torch.equal(cached, uncached)
    m.save_pretrained(tmp_path/"again")
    close(says(load(tmp_path/"again"), ids), want, 1e-5)

@pytest.mark.parametrize("architecture", ALL)
def test_a_mixture_of_the_base_with_itself_is_the_base(zoos, tmp_path, architecture):
    zoo, ids = zoos(architecture), tokens()
    for n in ("x", "y"): shutil.copytree(zoo["base"].path, tmp_path/n)
    twins = read_zoo([zoo["base"].path, tmp_path/"x", tmp_path/"y"])
    want = says(load(zoo["base"]), ids)
    for kind in kinds_of(architecture)[::2]:
        m = mix(MixtureSpec(("x", "y"), ROUTER, base="base", **KINDS[kind]), twins, tmp_path/kind) # verified too: it is small
        close(says(load(m), ids), want, 1e-5)

@pytest.mark.parametrize("architecture", ["StableLm", "Granite", "Mixtral", "Qwen3Moe"])
def test_tied_heads(zoos, tmp_path, architecture):
    zoo, ids = zoos(architecture, tie_word_embeddings=True), tokens()
    m = load(made(zoo, tmp_path/"m", level="model"))
    for i, name in enumerate("ab"): close(says(m, ids, route=i), says(load(zoo[name]), ids))
    m.save_pretrained(tmp_path/"again")
    close(says(load(tmp_path/"again"), ids), says(m, ids))

def test_plain_transformers_reads_them_all(zoos, tmp_path):
    "A fresh process that cannot import this package runs the file in the folder."
    ids, folders = tokens(), {}
    for a in NEW:
        m = made(zoos(a), tmp_path/a, level="block")
        folders[a] = says(load(m), ids)
    torch.save(dict(ids=ids, said=folders), tmp_path/"said.pt")
    code = """if True:
        import sys, torch; sys.modules["model_glue_nb"] = None
        from transformers import AutoModelForCausalLM
        known, bad = torch.load("said.pt"), []
        for a, want in known["said"].items():
            m = AutoModelForCausalLM.from_pretrained(a, dtype=torch.float32, trust_remote_code=True).eval()
            with torch.no_grad(): far = float((m(input_ids=known["ids"]).logits - want).abs().max())
            if not far < 1e-6 or "transformers_modules" not in type(m).__module__: bad.append((a, far))
        sys.exit(str(bad) if bad else 0)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

def test_sparse_members_are_not_mixed_by_mlps(zoos, tmp_path):
    for spec in (dict(level="ffn"), dict(level="ffn", input="token")):
        with pytest.raises(InputError, match="its MLPs are mixtures already. Mix at level 'block' or 'model'"):
            made(zoos("Mixtral"), tmp_path/"m", **spec)
    write(tmp_path/"neox", "GPTNeoX", 0)
    with pytest.raises(InputError, match="'base' is a GPTNeoXForCausalLM; mixed in one checkpoint are"):
        mix(MixtureSpec((str(tmp_path/"neox"),), ROUTER, "block", str(shutil.copytree(tmp_path/"neox", tmp_path/"base"))),
            None, tmp_path/"m")

def test_parameters_of_one_token_are_counted_inside_sparse_experts_too(zoos, tmp_path):
    import json
    zoo = zoos("Mixtral")
    m = made(zoo, tmp_path/"m", level="block")
    said = json.loads((m.path/"mixture.json").read_text())["params_active"]
    inner = sum(t.n_values for n, t in zoo["base"].tensors.items() if ".experts." in n)
    assert said == zoo["base"].n_params - inner // 3 # two of three inner experts

# What comes out of a sparse dense model

def test_routers_of_the_mixture_are_told_not_those_inside(zoos, tmp_path):
    m = load(made(zoos("Mixtral"), tmp_path/"m", level="block"))
    ids = tokens()
    before = m(input_ids=ids, labels=ids).loss
    m.config.text_config.output_router_logits = True # its own balance would be counted over parts of the batch
    out = m(input_ids=ids, labels=ids, output_router_logits=True)
    assert len(out.router_logits) == 2 and all(x.shape == (4, 2) for x in out.router_logits)
    close(m(input_ids=ids, labels=ids).loss, before, 1e-7)
    close(out.loss, before + .001 * out.aux_loss)

# What the dense class does about generation

@pytest.mark.parametrize("kind", ["stacks", "blocks"])
def test_a_rope_that_changes_with_the_length_begins_a_new_cache(zoos, tmp_path, kind):
    "Phi-3's long factors hold from the 17th token on, for the first 16 too."
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.] * 4, long_factor=[9., 7., 5., 3.], original_max_position_embeddings=16)
    zoo, ids = zoos("Phi3", rope_parameters=rope, original_max_position_embeddings=16, sliding_window=None), tokens(3, 12)
    how = dict(max_new_tokens=10, do_sample=False, pad_token_id=1, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    m = load(made(zoo, tmp_path/"m", **KINDS[kind]))
    routes = m.route(ids)
    cached, uncached = (m.generate(ids, use_cache=c, **how) for c in (True, False))
    for x, y in zip(cached.logits, uncached.logits): close(x, y, 1e-5)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert all(torch.equal(r, routes[place]) for place, r in cached.past_key_values.routes.chosen.items()), "the new cache has other routes"
    e = load(zoo["a"])
    said = e.generate(ids, **how)
    if kind == "stacks": assert torch.equal(m.generate(ids, route=0, **how).sequences, said.sequences)

@pytest.mark.parametrize("architecture", ["Granite", "StableLm", "Phi3", "Qwen2Moe"])
def test_other_architectures_are_used_as_llamas_are(zoos, tmp_path, architecture):
    zoo, ids = zoos(architecture), tokens(1)
    m, assistant = load(made(zoo, tmp_path/"m", level="block")), load(zoo["a"])
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=None)
    assert torch.equal(m.generate(ids, assistant_model=assistant, **how), m.generate(ids, **how))
    assert torch.equal(assistant.generate(ids, assistant_model=m, **how), assistant.generate(ids, **how))
    close(says(m, None, inputs_embeds=m.get_input_embeddings()(ids)), says(m, ids))
    with torch.enable_grad():
        m.train().gradient_checkpointing_enable()
        m(input_ids=ids, labels=ids).loss.backward()
    m.eval()
    before = says(m, ids)
    m.resize_token_embeddings(70)
    m.save_pretrained(tmp_path/"wide")
    close(says(load(tmp_path/"wide"), ids)[..., :64], before)
