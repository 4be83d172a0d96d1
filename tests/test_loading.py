"Loading and generating: every kind of causal model, and everything else in one line; no code, no question, no random weights."
import json, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from model_glue_nb.core import InputError
from model_glue_nb.zoo.decoding import takes_cache
from model_glue_nb.zoo.language_model import pick_dtype
from model_glue_nb.zoo.zoo import open_model, tiny_tokenizer, tiny_zoo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/"tools"))
import certificate

CACHED = "llama mistral qwen3 gemma gemma2 phi gpt2 gpt_neox opt bloom falcon olmo2 cohere mixtral qwen2_moe granite stablelm".split()
OWN = "mamba mamba2 falcon_mamba rwkv recurrent_gemma jamba bamba qwen3_next falcon_h1 lfm2 gemma3 llama4_text".split()

def written(kind, folder):
    certificate.tiny_model(kind, 0).save_pretrained(folder)
    tiny_tokenizer(64).save_pretrained(folder)
    return open_model(folder)

@pytest.mark.parametrize("kind", CACHED + OWN)
def test_generates_as_transformers_does(kind, tmp_path):
    live = written(kind, tmp_path/"m").load("cpu")
    prompts = ["w5 w6 w7", "w9 w8 w4"]
    got = live.generate(prompts, 6)
    ends = live.end_tokens()
    x = torch.tensor(live.encode(prompts))
    live.model.generation_config = GenerationConfig()
    want = live.model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=6,
                               do_sample=False, eos_token_id=ends or None, pad_token_id=(ends or [0])[0])
    assert got == live.decode(want[:, x.shape[1]:].tolist(), ends)

def test_both_ways_are_met(tmp_path):
    assert takes_cache(certificate.tiny_model("llama", 0)) and not takes_cache(certificate.tiny_model("mamba", 0))

@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_ends_and_lengths(kind, tmp_path):
    live = written(kind, tmp_path/"m").load("cpu")
    prompts = ["w5 w6 w7", "w9 w8"]
    live.model.generation_config.eos_token_id = None
    live.model.config.eos_token_id = None
    whole = live.generate(prompts, 12)
    words = whole[0].split()
    assert live.generate(prompts, 0) == ["", ""] and live.generate([], 3) == []
    second = words[4]
    assert live.generate(prompts[:1], 12, [second])[0] == whole[0].split(second)[0]
    ids = live.encode([" ".join(words[:6])])[0][1:]
    for ends in ([ids[3]], [ids[3], 63]):
        live.model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        first = ids.index(ids[3])
        assert live.generate(prompts[:1], 12)[0].split() == words[:first]
    live.model.generation_config = GenerationConfig(do_sample=True, temperature=9.)
    assert live.generate(prompts, 12) == whole
    live.model.generation_config = GenerationConfig(repetition_penalty=5.) # changes logits, so lm-eval's answers too
    x = torch.tensor(live.encode(prompts[:1]))
    own = live.model.generate(x, max_new_tokens=12, do_sample=False)[:, x.shape[1]:]
    assert live.generate(prompts[:1], 12) == live.tokenizer.batch_decode(own, skip_special_tokens=True) != whole[:1]

def test_odd_requests_are_refused(tmp_path):
    live = tiny_zoo(tmp_path, ["a"])["a"].load()
    for bad, message in ((lambda: live.generate("w5 w6"), "a list of texts"),
                         (lambda: live.generate([3]), "a list of texts"),
                         (lambda: live.generate(["w5"], -1), "whole number"),
                         (lambda: live.generate(["w5"], 2.5), "whole number"),
                         (lambda: live.generate(["w5"], 2, [""]), "not empty"),
                         (lambda: live.generate(["w5 " * 130], 2), "reads at most 128")):
        with pytest.raises(InputError, match=message): bad()

def refused(model, message):
    with pytest.raises(InputError, match=message) as e: model.load()
    assert "\n" not in str(e.value)

def test_what_continues_no_text_is_refused_in_a_line(tmp_path):
    import transformers as T
    small = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    makers = dict(encoder=lambda: T.BertForMaskedLM(T.BertConfig(**small)),
                  classes=lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**small, pad_token_id=1)),
                  translator=lambda: T.T5ForConditionalGeneration(T.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2)))
    for name, make in makers.items():
        make().save_pretrained(tmp_path/name)
        tiny_tokenizer(64).save_pretrained(tmp_path/name)
        refused(open_model(tmp_path/name), "does not continue text")

def test_missing_weights_are_no_random_numbers(tmp_path):
    m = tiny_zoo(tmp_path, ["a"])["a"]
    f = m.path/"model.safetensors"
    t = load_file(f)
    gone = "model.layers.1.mlp.up_proj.weight"
    own = t.pop(gone)
    save_file(t, f, dict(format="pt"))
    refused(open_model(m.path), gone)
    save_file(t | {gone: own, "model.extra": own.clone()}, f, dict(format="pt"))
    notes = open_model(m.path).load().notes
    assert len(notes) == 1 and "model.extra" in notes[0]

CODE = "open({!r}, 'w').write('ran')\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\nclass C(LlamaConfig): model_type = 'odd'\nclass M(LlamaForCausalLM): config_class = C\nclass T(PreTrainedTokenizerFast): pass\n"
@pytest.mark.parametrize("place", ["config", "tokenizer", "both known", "custom_generate"])
def test_code_in_a_folder_is_never_run(place, tmp_path, monkeypatch):
    m = tiny_zoo(tmp_path, ["a"])["a"]
    hit = tmp_path/"hit"
    (m.path/"code.py").write_text(CODE.format(str(hit)))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a question was asked"))
    def change(file, **more):
        f = m.path/file
        f.write_text(json.dumps(json.loads(f.read_text()) | more))
    maps = dict(AutoConfig="code.C", AutoModelForCausalLM="code.M")
    if place == "config":
        change("config.json", auto_map=maps, model_type="odd", architectures=["OddForCausalLM"])
        refused(open_model(m.path), "its own code|not know")
    if place == "tokenizer":
        change("tokenizer_config.json", auto_map=dict(AutoTokenizer=["code.T", "code.T"]), tokenizer_class="T")
    if place == "both known": change("config.json", auto_map=maps)
    if place == "custom_generate":
        (m.path/"custom_generate").mkdir()
        (m.path/"custom_generate"/"generate.py").write_text(CODE.format(str(hit)))
    if place != "config":
        try: assert len(open_model(m.path).load().generate(["w5 w6"], 2)) == 1
        except InputError as e: assert "\n" not in str(e)
    assert not hit.exists()

def test_the_tokenizer_is_missing_or_broken(tmp_path):
    m = tiny_zoo(tmp_path, ["a"])["a"]
    for f in m.path.glob("tokenizer*"): f.unlink()
    refused(open_model(m.path), "has no tokenizer")
    (m.path/"vocab.json").write_text("[]")
    refused(open_model(m.path), "tokenizer|vocab")

def test_image_and_text_models_continue_a_text(tmp_path):
    import transformers as T
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, bos_token_id=0, eos_token_id=1)
    sight = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    models = dict(gemma3=T.Gemma3ForConditionalGeneration(T.Gemma3Config(text_config=text, vision_config=sight | dict(model_type="siglip_vision_model"), mm_tokens_per_image=1, image_token_index=60)),
                  llava=T.LlavaForConditionalGeneration(
                      T.LlavaConfig(text_config=text | dict(model_type="llama"), vision_config=sight | dict(model_type="clip_vision_model", projection_dim=16), image_token_index=60)))
    for name, model in models.items():
        model.save_pretrained(tmp_path/name)
        tiny_tokenizer(64).save_pretrained(tmp_path/name)
        live = open_model(tmp_path/name).load("cpu")
        x = torch.tensor(live.encode(["w5 w6 w7"]))
        want = model.eval().generate(x, attention_mask=torch.ones_like(x), max_new_tokens=5,
                                     do_sample=False, eos_token_id=1, pad_token_id=1)[:, x.shape[1]:]
        assert live.generate(["w5 w6 w7"], 5) == live.decode(want.tolist(), [1])

def test_half_precision_only_where_the_processor_has_it():
    assert pick_dtype("bfloat16", 1e9, "cpu", {"avx512f"}) == "float32" and pick_dtype("bfloat16", 1e9, "cpu", {"amx_bf16"}) == "bfloat16"
    assert pick_dtype("bfloat16", 1e9, "cuda", set()) == "bfloat16" and pick_dtype("float32", 1e9, "cpu", set()) == "float32"

# Notes

@pytest.fixture
def with_extra(tmp_path):
    "A suite and two members; one of them has two tensors that no class wants."
    zoo = tiny_zoo(tmp_path/"zoo", ["a", "b"])
    f = zoo["b"].path/"model.safetensors"
    save_file(load_file(f) | {"model.extra": torch.ones(3), "model.more": torch.ones(3)}, f, dict(format="pt"))
    (tmp_path/"q.jsonl").write_text("".join(json.dumps(dict(question=f"w{i}", answer=f"w{i + 2}")) + "\n" for i in range(3, 23)))
    (tmp_path/"suite.yaml").write_text("name: s\nsearch_share: .5\ntasks: [{name: t, file: q.jsonl, max_new_tokens: 2}]\n")
    return zoo

def test_a_note_of_loading_is_a_warning_that_names_the_caller(with_extra):
    from model_glue_nb.errors import Note
    with pytest.warns(Note, match="2 tensors of 'b' have no place in a LlamaForCausalLM, the first: 'model.extra'") as told:
        with_extra["b"].load()
    assert len(told) == 1 and told[0].filename == __file__

@pytest.mark.parametrize("args", [("score", "zoo"), ("barrier", "zoo", "b", "b"), ("cka", "zoo")])
def test_commands_say_each_note_once(with_extra, tmp_path, monkeypatch, capsys, args):
    from model_glue_nb.cli.program import main
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["model-glue", *args, "--suite", "suite.yaml"])
    with pytest.raises(SystemExit): main()
    lines = [l for l in capsys.readouterr().err.splitlines() if "no place" in l]
    assert lines == ["note: 2 tensors of 'b' have no place in a LlamaForCausalLM, the first: 'model.extra'."]

def test_a_merge_that_has_not_converged_says_so(tmp_path, monkeypatch, capsys):
    from model_glue_nb.cli.program import main
    tiny_zoo(tmp_path, ["a", "b", "c"], dtype="float32")
    (tmp_path/"m.yaml").write_text("merge_method: karcher\nmodels: [a, b, c]\nparameters: {max_iter: 1, tol: 0}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["model-glue", "merge", "m.yaml", "out"])
    with pytest.raises(SystemExit) as e: main()
    err = capsys.readouterr().err
    assert not e.value.code and err.count("note: karcher has not converged") >= 1 and "Warning" not in err

def test_modules_are_walked_once_per_model(tmp_path, monkeypatch):
    live = tiny_zoo(tmp_path, ["a"])["a"].load()
    from model_glue_nb.zoo import decoding
    was = decoding.counts_itself
    asked = []
    monkeypatch.setattr(decoding, "counts_itself", lambda m: asked.append(1) or was(m))
    for n in range(1, 5): live.generate(["w3 w4", "w5", "w6 w7 w8"], n)
    assert len(asked) == 1
    live.model.generation_config = GenerationConfig(repetition_penalty=5.)
    assert not takes_cache(live.model), "settings may change later"
