"Adapters that PEFT wrote for many architectures equal PEFT's own merge; odd ones are refused in a sentence."
import json, random, sys
from pathlib import Path
import pytest, torch
from transformers import AutoModelForCausalLM
from model_glue_nb.core import InputError
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.zoo.adapters import adapted, is_simple
from model_glue_nb.zoo.zoo import open_model, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/"tools"))
import certificate

TARGETS = dict(llama="all-linear", gpt2=["c_attn", "c_proj"],
               gpt_neox="all-linear", mixtral=["q_proj", "v_proj"], falcon="all-linear",
               bloom=["query_key_value", "word_embeddings"], phi=["q_proj", "dense"])

def tuned(kind, room):
    "A tiny model, a random adapter of it, and what PEFT makes of both."
    from peft import LoraConfig, get_peft_model
    certificate.tiny_model(kind, 0).save_pretrained(room/"m")
    tiny_tokenizer(64).save_pretrained(room/"m")
    base = AutoModelForCausalLM.from_pretrained(room/"m", dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2"))
    for name, x in model.named_parameters():
        if "lora_" in name: x.data += .1 * torch.randn_like(x)
    model.save_pretrained(room/"lora")
    return model.merge_and_unload().eval()

@pytest.mark.parametrize("kind", TARGETS)
def test_equals_what_peft_makes(kind, tmp_path):
    want, x = tuned(kind, tmp_path), torch.arange(3, 20)[None]
    merge(recipe("passthrough", [f"{tmp_path/'m'}+{tmp_path/'lora'}"], options=dict(out_dtype="float32")), None, tmp_path/"out")
    got = AutoModelForCausalLM.from_pretrained(tmp_path/"out", dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/"m", dtype=torch.float32).eval()
    assert ((got(x).logits - want(x).logits).abs().max() < 1e-5
            and (got(x).logits - plain(x).logits).abs().max() > 1e-3)

def test_odd_configs_are_refused_quickly(tmp_path):
    tuned("llama", tmp_path)
    base, f = open_model(tmp_path/"m"), tmp_path/"lora"/"adapter_config.json"
    good = json.loads(f.read_text())
    values = [None, "8", -1, 0, 1e308, [], {},
              [3], {"a": None}, {"(a+)+$": 4}, {"(": 4},
              {".*" * 9: 4}, {"q_proj": "x"}, True, "\ud800"]
    rng, refused = random.Random(0), 0
    for _ in range(300):
        config = good | {rng.choice([*good, "r", "lora_alpha", "rank_pattern", "alpha_pattern"]): rng.choice(values)}
        f.write_text(json.dumps(config))
        try: adapted(base, tmp_path/"lora")
        except InputError: refused += 1
    assert refused > 30 # a pattern that takes for ever would not come here
    f.write_text("[]")
    with pytest.raises(InputError): adapted(base, tmp_path/"lora")

def test_the_adapters_files_lie_in_its_folder(tmp_path):
    tuned("llama", tmp_path)
    f = tmp_path/"lora"/"adapter_config.json"
    elsewhere = tmp_path/"elsewhere.json"
    f.rename(elsewhere)
    f.symlink_to(elsewhere)
    with pytest.raises(InputError, match="link out of its folder"):
        adapted(open_model(tmp_path/"m"), tmp_path/"lora")
    assert is_simple(r"model\.layers\.\d+\.self_attn\.q_proj") and not is_simple("(x+x+)+y")
