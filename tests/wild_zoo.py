"A zoo as people find it: two eras of names, odd files, strangers, quantised, hostile and broken members, all tiny."
import json, shutil, struct
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from model_glue_nb.zoo.zoo import tiny_tokenizer

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=1)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
META = dict(format="pt")

def model_of(architecture, seed, **config):
    "A random model of two layers."
    torch.manual_seed(seed)
    cls = getattr(transformers, architecture)
    return cls(cls.config_class(**SIZES | config)).to(torch.bfloat16)

def near(model, seed, share=.05):
    "A fine-tune: every weight moved a little."
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(share * p.float().std().nan_to_num(0) * torch.randn_like(p))
    return model

def save(model, path, words=64, **how):
    model.save_pretrained(path, **how)
    if words: tiny_tokenizer(words).save_pretrained(path)
    return path

def weights(path): return load_file(path/"model.safetensors")
def put(path, tensors):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path/"model.safetensors", META)
def config(path, **changes):
    file = path/"config.json"
    c = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in c.items() if v is not ...}))
def copy_of(root, name, of="base"): return Path(shutil.copytree(root/of, root/name))

def bpe_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(["the quick brown fox jumps over the lazy dog", "merging models is averaging weights"] * 8, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", pad_token="</s>")

def family(root):
    "One base and what people made of it."
    base = save(model_of("LlamaForCausalLM", 0), root/"base")
    for i, name in enumerate(("sharded", "latin1-card", "consolidated", "stale-index", "no-tokenizer", "saved-by-4", "fp16", "fp8")):
        save(near(model_of("LlamaForCausalLM", 0), i + 1), root/name, **dict(max_shard_size="20KB") if name == "sharded" else {})
    (root/"latin1-card"/"README.md").write_bytes("---\nlicense: mit\nbase_model: base\n---\nÜbersicht, café\n".encode("latin-1"))
    save_file({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, root/"consolidated"/"consolidated.safetensors", META)
    near(model_of("LlamaForCausalLM", 0), 50).save_pretrained(root/"stale", max_shard_size="20KB")
    for f in (root/"stale").glob("model*"): shutil.copyfile(f, root/"stale-index"/f.name)
    shutil.rmtree(root/"stale")
    for f in (root/"no-tokenizer").glob("tokenizer*"): f.unlink()
    config(root/"saved-by-4", rope_parameters=..., rope_theta=10000.0, rope_scaling=None, dtype=..., torch_dtype="bfloat16", transformers_version="4.40.0")
    put(root/"fp16", {k: v.half() for k, v in weights(root/"fp16").items()})
    config(root/"fp16", dtype="float16")
    eight = {}
    for k, v in weights(root/"fp8").items():
        if "proj.weight" not in k:
            eight[k] = v
            continue
        scale = v.float().abs().max() / 448
        eight |= {k: (v.float() / scale).to(torch.float8_e4m3fn), k + "_scale_inv": scale.reshape(1, 1)}
    put(root/"fp8", eight)
    config(root/"fp8", quantization_config=dict(quant_method="fp8", weight_block_size=[128, 128]))
    padded = near(model_of("LlamaForCausalLM", 0, vocab_size=80), 20)
    save(padded, root/"padded")
    for name, order in dict(chatml=["<|im_start|>", "<|im_end|>"], chatml_swapped=["<|im_end|>", "<|im_start|>"]).items():
        save(near(model_of("LlamaForCausalLM", 0, vocab_size=66), 30), root/name, words=0)
        t = tiny_tokenizer(64)
        t.add_tokens(order, special_tokens=True)
        t.save_pretrained(root/name)
    from peft import LoraConfig, get_peft_model
    lora = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
                          LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"]))
    for n, p in lora.named_parameters():
        if "lora_" in n: p.data += .05 * torch.randn_like(p)
    lora.save_pretrained(root/"lora")
    config(root/"lora") if (root/"lora"/"config.json").exists() else None
    a = json.loads((root/"lora"/"adapter_config.json").read_text())
    a["base_model_name_or_path"] = "someone/base"
    (root/"lora"/"adapter_config.json").write_text(json.dumps(a))

def strangers(root):
    "Other families, in two eras each where there are two."
    for i, name in enumerate(("bpe-old", "bpe-new")):
        save(near(model_of("LlamaForCausalLM", 60, vocab_size=300), 61 + i), root/name, words=0)
        bpe_tokenizer().save_pretrained(root/name)
    file = root/"bpe-old"/"tokenizer.json"
    t = json.loads(file.read_text())
    t["model"]["merges"] = [" ".join(x) for x in t["model"]["merges"]]
    file.write_text(json.dumps(t, ensure_ascii=False))
    for i, name in enumerate(("mixtral", "mixtral-fused")):
        save(near(model_of("MixtralForCausalLM", 70, **EXPERTS), 71 + i), root/name, save_original_format=name == "mixtral")
    save(model_of("GPTNeoXForCausalLM", 80), root/"pythia")
    save(model_of("MambaForCausalLM", 81, state_size=8, conv_kernel=4), root/"mamba")
    sizes = {k: v for k, v in SIZES.items() if k != "tie_word_embeddings"}
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    torch.manual_seed(82)
    nested = transformers.Gemma3Config(text_config=sizes | dict(head_dim=8), vision_config=vision, mm_tokens_per_image=4,
                                       image_token_index=5, boi_token_index=6, eoi_token_index=7)
    save(transformers.Gemma3ForConditionalGeneration(nested).to(torch.bfloat16), root/"gemma3")

def unusable(root, marker):
    "What must be set aside, each with its reason; `marker` would be written by code that nobody may run."
    g = copy_of(root, "gptq")
    packed = {}
    for k, v in weights(g).items():
        if "proj.weight" not in k:
            packed[k] = v
            continue
        stem = k.removesuffix("weight")
        packed |= {stem + "qweight": torch.ones(v.shape[1] // 8, v.shape[0], dtype=torch.int32),
                   stem + "scales": torch.ones(1, v.shape[0]).half(),
                   stem + "qzeros": torch.ones(1, v.shape[0] // 8, dtype=torch.int32),
                   stem + "g_idx": torch.zeros(v.shape[1], dtype=torch.int32)}
    put(g, packed)
    config(g, quantization_config=dict(quant_method="gptq", bits=4))
    n = copy_of(root, "nan")
    t = weights(n)
    t["model.norm.weight"][3] = float("nan")
    put(n, t)
    z = copy_of(root, "zero3")
    t = weights(z)
    t["model.layers.0.mlp.up_proj.weight"] = torch.zeros(0, dtype=torch.bfloat16)
    put(z, t)
    c = copy_of(root, "cut-short")
    raw = (c/"model.safetensors").read_bytes()
    (c/"model.safetensors").write_bytes(raw[:-100])
    h = copy_of(root, "overlapping")
    raw = (h/"model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8:8 + size])
    names = [k for k in head if k.endswith("norm.weight")]
    head[names[0]]["data_offsets"] = head[names[1]]["data_offsets"]
    text = json.dumps(head).encode()
    (h/"model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size:])
    (copy_of(root, "list-config")/"config.json").write_text("[1, 2]")
    (copy_of(root, "deep-config")/"config.json").write_text("[" * 200_000)
    p = copy_of(root, "pickled")
    (p/"model.safetensors").rename(p/"pytorch_model.bin")
    o = copy_of(root, "points-outside")
    (o/"model.safetensors").unlink()
    (o/"model.safetensors.index.json").write_text(json.dumps(dict(weight_map={k: "../base/model.safetensors" for k in weights(root/"base")})))
    (root/"empty").mkdir()
    (root/"half-fetched").mkdir()
    (root/"half-fetched"/"config.json").write_text('{"architectures": ["Lla')
    config(copy_of(root, "climber"), architectures=["/../../../outside"])
    e = copy_of(root, "esc\x1b]0;owned\x07")
    config(e, model_type="nobody-knows", architectures=["NobodyForCausalLM"])
    x = copy_of(root, "remote-code")
    (x/"modeling_evil.py").write_text(f"open({str(marker)!r}, 'w').write('ran')\n")
    config(x, model_type="evil", architectures=["EvilForCausalLM"], auto_map=dict(AutoConfig="modeling_evil.Evil", AutoModelForCausalLM="modeling_evil.Evil"))
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i-1}'] * 10)}]\n" for i in range(1, 9))
    (copy_of(root, "card-bomb")/"README.md").write_text(f"---\n{bomb}license: *a8\n---\n") # the card is odd, the model is well

def build(root, marker):
    "All of it, in one folder of folders."
    root.mkdir()
    family(root)
    strangers(root)
    unusable(root, marker)
    return root
