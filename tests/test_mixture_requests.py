"Requests of many kinds, experts as folders, configs that leave things unsaid, and what a mixture's folder holds."
import json, os, shutil
from types import SimpleNamespace

import pytest
import torch
from forked import command
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model_glue_nb.benchmarking.harness import as_lm_eval
from model_glue_nb.core import InputError
from model_glue_nb.mixing import verified
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.zoo.outlet import companions
from model_glue_nb.zoo.zoo import Zoo, ZooModel, open_model, read_zoo, tiny_zoo

RANDOM, PROMPTS = dict(name="random"), dict(name="prompt", positive=["w3 w4 w5", "w20 w21"])
TOKENIZER_STEMS = [f"w{i}" for i in range(3, 60)]

def asked():
    "Generation requests that differ in stops, lengths and wording; one names nothing, one is too long, one comes from another task."
    kinds = [dict(until=["w9"], max_gen_toks=5),
             dict(until="w11", max_gen_toks=9), dict(until=[], max_gen_toks=3),
             dict(until=["w30", "w4 w"], max_gen_toks=12), dict(max_gen_toks=7)]
    prompts = [" ".join(TOKENIZER_STEMS[i:i + 4]) for i in range(10)] + [" ".join(TOKENIZER_STEMS * 4)]
    return [Instance(request_type="generate_until", doc={}, arguments=(p, dict(kinds[i % 5])), idx=0)
            for i, p in enumerate(prompts)]

def test_a_mixture_of_one_answers_as_that_expert(tmp_path):
    zoo = tiny_zoo(tmp_path, ["a"], dtype="float32", max_position_embeddings=64)
    live = mix(MixtureSpec(("a",), RANDOM), zoo, tmp_path/"m").load()
    want = as_lm_eval(zoo["a"].load()).generate_until(asked(), disable_tqdm=True)
    assert as_lm_eval(live).generate_until(asked(), disable_tqdm=True) == want
    assert len({len(a.split()) for a in want}) > 2, "all answers are alike: nothing was shown"

def test_requests_keep_their_arguments_behind_a_router(tmp_path):
    zoo = tiny_zoo(tmp_path, ["a", "b"], dtype="float32", max_position_embeddings=64)
    live = mix(MixtureSpec(("a", "b"), RANDOM), zoo, tmp_path/"m").load()
    requests = asked()
    route = live.route([r.args[0] for r in requests])
    assert set(route) == {0, 1}
    own = [as_lm_eval(zoo["ab"[e]].load()).generate_until([r], disable_tqdm=True)[0]
           for e, r in zip(route, requests)]
    assert as_lm_eval(live).generate_until(requests, disable_tqdm=True) == own

@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("more", ["router: {name: prompt, positive: [w3 w4, w20 w21]}\nmax_resident: 1\n", "base: {base}\nlevel: block\nrouter: random\n"])
def test_the_command_takes_folders(tmp_path, relative, more):
    room, moved = tmp_path/"here", tmp_path/"there"
    tiny_zoo(room/"zoo", ["base", "a", "b"])
    home = "zoo" if relative else room/"zoo"
    (room/"m.yaml").write_text(f"experts: [{home}/a, {home}/b/]\n" + more.replace("{base}", f"{home}/base"))
    run = command("mix", "m.yaml", "out", cwd=room)
    assert run.returncode == 0, run.stderr
    about = json.loads((room/"out"/"mixture.json").read_text())
    assert str(room) not in json.dumps(about) and about["eyes"] == "a"
    room.rename(moved)
    m = open_model(moved/"out")
    live = m.load(device="cpu")
    assert len(live.generate(["w3 w4", "w20 w21"], 3)) == 2
    if hasattr(live, "resident"):
        assert len(live.resident) == 1, "the encoder of the router stays beside the expert"

def test_two_folders_of_one_name(tmp_path):
    for side in "xy": tiny_zoo(tmp_path/side, ["a"])
    spec = MixtureSpec((str(tmp_path/"x"/"a"), str(tmp_path/"y"/"a")), RANDOM)
    with pytest.raises(InputError, match="Two experts are called 'a'"): mix(spec, None, tmp_path/"m")

def test_one_text_and_parts(tmp_path):
    live = mix(MixtureSpec(("a", "b"), PROMPTS), tiny_zoo(tmp_path, ["a", "b"]), tmp_path/"m").load()
    want = live.generate(["w3 w4 w5"], 4)
    parts = [dict(type="text", text="w3 w4"), dict(type="text", text=" w5")]
    assert live.generate("w3 w4 w5", 4) == live.generate([parts], 4) == want
    assert "".join(live.stream(parts, 4)) == "".join(
        live.chat([dict(role="user", content=parts)], 4)) == want[0]
    with pytest.raises(InputError, match="experts read text"):
        live.generate([[dict(type="image_url", image_url="x")]])

# Configs

SIZES = dict(head_dim=8, num_hidden_layers=2, sliding_window=None)
def load(m):
    return AutoModelForCausalLM.from_pretrained(getattr(m, "path", m), dtype=torch.float32, trust_remote_code=False).eval()
def rewrite(folder, drop=(), **more):
    c = {k: v for k, v in json.loads((folder/"config.json").read_text()).items() if k not in drop}
    (folder/"config.json").write_text(json.dumps(c | more))

def equal_to_itself(zoo, tmp_path, **spec):
    "A mixture of a model with itself, beside the model."
    twins = []
    for n in ("x", "y"):
        shutil.copytree(zoo["base"].path, tmp_path/n)
        twins.append(open_model(tmp_path/n))
    spec = dict(level="ffn", input="token", top_k=2) | spec
    m = mix(MixtureSpec(("x", "y"), dict(name="prompt", positive=["w3 w4", "w20"]), base="base", **spec),
            Zoo((open_model(zoo["base"].path), *twins)),
            tmp_path/"m", verify=False)
    ids = torch.randint(3, 64, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        far = float((load(m)(input_ids=ids).logits
                     - load(zoo["base"])(input_ids=ids).logits).abs().max())
    assert far < 1e-5, f"differs by {far:.2g}"
    return m

LEFT_OUT = ["rope_parameters", "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings", "head_dim", "max_position_embeddings", "pad_token_id", "num_key_value_heads"]
@pytest.mark.parametrize("key", LEFT_OUT)
def test_what_llama_leaves_unsaid_stays_llamas(tmp_path, key):
    more = dict(num_key_value_heads=4) if key == "num_key_value_heads" else {}
    zoo = tiny_zoo(tmp_path/"zoo", ["base"], dtype="float32", **SIZES | more)
    rewrite(zoo["base"].path, [key])
    m = equal_to_itself(zoo, tmp_path)
    assert m.architecture == "MixtralForCausalLM"

@pytest.mark.parametrize("architecture", ["Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("drop", [(), ("rope_parameters", "rms_norm_eps", "sliding_window", "use_sliding_window", "layer_types", "hidden_act")])
def test_plain_formats_of_other_architectures(tmp_path, architecture, drop):
    zoo = tiny_zoo(tmp_path/"zoo", ["base"], architecture, "float32", **SIZES | (dict(sliding_window=6) if architecture == "Mistral" and not drop else {}))
    rewrite(zoo["base"].path, drop)
    assert "Mixture" not in equal_to_itself(zoo, tmp_path).architecture

@pytest.mark.parametrize("architecture, more", [("Llama", dict(attention_bias=True)),
                                                ("Llama", dict(mlp_bias=True)),
                                                ("Qwen3", dict(attention_bias=True)),
                                                ("Llama", dict(hidden_act="gelu")),
    ("Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)), ("Qwen3", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1))])
@pytest.mark.parametrize("level", ["ffn", "block"])
def test_what_a_plain_format_cannot_say(tmp_path, architecture, more, level):
    zoo = tiny_zoo(tmp_path/"zoo", ["base"], architecture, "float32", **SIZES | more)
    equal_to_itself(zoo, tmp_path, **dict() if level == "ffn" else dict(level=level, input="sample"))

def test_rope_in_either_spelling_is_one_meaning(tmp_path):
    zoo = tiny_zoo(tmp_path, ["base", "a", "b"], dtype="float32")
    rewrite(zoo["a"].path, ["rope_parameters"], rope_theta=10000.0, rope_scaling=None)
    zoo = read_zoo([m.path for m in zoo])
    mix(MixtureSpec(("a", "b"), RANDOM, "block", "base"), zoo, tmp_path/"m")
    rewrite(zoo["a"].path, rope_theta=5e5)
    zoo = read_zoo([m.path for m in zoo])
    with pytest.raises(InputError, match="rope_theta"):
        mix(MixtureSpec(("a", "b"), RANDOM, "block", "base"), zoo, tmp_path/"n")

# The folder

@pytest.mark.parametrize("apart", [False, True])
def test_no_code_and_no_state_of_others_is_published(tmp_path, apart):
    zoo = tiny_zoo(tmp_path/"zoo", ["base", "a", "b"])
    secret = tmp_path/"secret.json"
    secret.write_text("{}")
    for m in zoo:
        for name in ("evil.py", "x.pkl", "optimizer.pt", "pytorch_model.bin", "tf_model.h5", "m.gguf"):
            (m.path/name).write_bytes(b"x")
        rewrite(m.path, auto_map=dict(AutoConfig="evil.C"))
        t = m.path/"tokenizer_config.json"
        t.write_text(json.dumps(json.loads(t.read_text()) | dict(auto_map=dict(AutoTokenizer=["evil.T", None]))))
    spec = MixtureSpec(("a", "b"), RANDOM, copy=True) if apart else MixtureSpec(("a", "b"), RANDOM, "block", "base")
    m = mix(spec, read_zoo([m.path for m in zoo]), tmp_path/"m")
    files = [f for f in m.path.rglob("*") if f.is_file()]
    assert [f.name for f in files if f.suffix in (".py", ".pkl", ".pt", ".bin", ".h5", ".gguf")] == ([] if apart else ["modeling.py"])
    assert not [f for f in files if "evil" in f.read_bytes().decode("latin-1")]
    m.load(device="cpu").generate(["w3 w4"], 2)

@pytest.mark.parametrize("name", ["../../away", "/away", "x/../../../away", "a\\b", ".", "..", "con\n~x", "y" * 300])
def test_the_name_of_an_expert_is_no_path(tmp_path, name):
    zoo = tiny_zoo(tmp_path/"zoo", ["a", "b"])
    odd = Zoo((ZooModel(name, zoo["a"].path), zoo["b"]))
    before = {f for f in tmp_path.rglob("*")}
    m = mix(MixtureSpec((name, "b"), RANDOM, copy=True), odd, tmp_path/"in"/"m")
    assert not {f for f in tmp_path.rglob("*")} - before - {tmp_path/"in"} - set((tmp_path/"in").rglob("*"))
    folders = [f.name for f in (m.path/"experts").iterdir()]
    assert len(folders) == 2 and "b" in folders
    assert (m.load(device="cpu").experts[0].path.parent == (m.path/"experts").resolve()
            and json.loads((m.path/"mixture.json").read_text())["experts"][0]["name"] == name)

@pytest.mark.parametrize("apart", [False, True])
def test_companions_are_those_of_a_merge(tmp_path, apart):
    zoo = tiny_zoo(tmp_path/"zoo", ["base", "a", "b"])
    for m in zoo:
        (m.path/"chat_templates").mkdir()
        for name in ("preprocessor_config.json", "trainer_state.json", "chat_templates/tool.jinja", "USAGE POLICY.md"):
            (m.path/name).write_text("{}")
        (m.path/"generation_config.json").write_text(json.dumps(dict(inner=dict(custom_generate="evil.py"), eos_token_id=1)))
    spec = MixtureSpec(("a", "b"), RANDOM, copy=True) if apart else MixtureSpec(("a", "b"), RANDOM, "block", "base")
    home = mix(spec, zoo, tmp_path/"m").path
    home = home/"experts"/"a" if apart else home
    for file in companions(zoo["a"].path): assert (home/file).exists(), file
    assert (home/"chat_templates"/"tool.jinja").exists() and not (home/"trainer_state.json").exists()
    assert json.loads((home/"generation_config.json").read_text()) == dict(inner={}, eos_token_id=1)

def test_a_mixture_that_is_an_expert_brings_no_links_and_no_code(tmp_path):
    zoo = tiny_zoo(tmp_path/"zoo", ["base", "a", "b"])
    inner = mix(MixtureSpec(("a", "b"), RANDOM, "block", "base"), zoo, tmp_path/"zoo"/"inner")
    secret = tmp_path/"secret"
    secret.write_text("key")
    (inner.path/"x.json").symlink_to(secret)
    (inner.path/"more").symlink_to(tmp_path)
    os.mkfifo(inner.path/"pipe")
    (inner.path/"evil.py").write_text("evil")
    (inner.path/"modeling.py").write_text("evil")
    m = mix(MixtureSpec(("inner", "b"), RANDOM, copy=True), read_zoo([inner.path, zoo["b"].path]), tmp_path/"m")
    found = [f for f in m.path.rglob("*") if f.is_file()]
    assert (not [f for f in found if f.read_bytes() in (b"key", b"evil")]
            and {f.name for f in found if f.suffix == ".py"} == {"modeling.py"})

def test_a_wrong_mixture_does_not_appear(tmp_path, monkeypatch):
    from model_glue_nb.mixing import one_checkpoint
    zoo = tiny_zoo(tmp_path/"zoo", ["base", "a", "b"], dtype="float32")
    right = one_checkpoint._ownership
    def swapped(*args): # an expert's tensors under another's name
        out = right(*args)
        return {k: out[k.replace("experts.0", "experts.9").replace("experts.1", "experts.0").replace("experts.9", "experts.1")] for k in out}
    monkeypatch.setattr(one_checkpoint, "_ownership", swapped)
    for spec in (dict(level="block"), dict(level="ffn", input="token", router=PROMPTS)):
        with pytest.raises(InputError, match="logits differ"):
            mix(MixtureSpec(("a", "b"), **dict(router=RANDOM, base="base") | spec), zoo, tmp_path/"m")
        assert not (tmp_path/"m").exists()

@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_the_widest_dtype_holds_all(tmp_path, narrow):
    zoo = tiny_zoo(tmp_path/"zoo", ["base", "a", "b"], dtype="float32")
    f = zoo["b"].path/"model.safetensors"
    save_file({k: v.to(narrow) for k, v in load_file(f).items()}, f, dict(format="pt"))
    rewrite(zoo["b"].path, dtype=str(narrow).split(".")[1])
    m = mix(MixtureSpec(("a", "b"), RANDOM, "ffn", "base"), read_zoo([m.path for m in zoo]), tmp_path/"m")
    assert {t.dtype for t in m.tensors.values()} == {"F32"} and m.config["dtype"] == "float32"
