"What the benchmarks share: random models of real shapes, and a process that is measured from outside."
import json, os, subprocess, sys, tempfile, time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
SHAPES = {"135m": dict(hidden=576, inner=1536, layers=30, heads=9, kv=3, vocab=49152, tied=True),
          "1.1b": dict(hidden=2048, inner=5632, layers=22, heads=32, kv=4, vocab=32000, tied=False),
          "tiny": dict(hidden=64, inner=128, layers=2, heads=4, kv=2, vocab=512, tied=True)}

def tensors(s):
    h, k = s["hidden"], s["hidden"] // s["heads"] * s["kv"]
    out = {"model.embed_tokens.weight": (s["vocab"], h), "model.norm.weight": (h,)}
    for i in range(s["layers"]):
        p = f"model.layers.{i}."
        out |= {p + "self_attn.q_proj.weight": (h, h), p + "self_attn.k_proj.weight": (k, h), p + "self_attn.v_proj.weight": (k, h),
                p + "self_attn.o_proj.weight": (h, h), p + "mlp.gate_proj.weight": (s["inner"], h), p + "mlp.up_proj.weight": (s["inner"], h),
                p + "mlp.down_proj.weight": (h, s["inner"]), p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
    return out if s["tied"] else out | {"lm_head.weight": (s["vocab"], h)}

def write_models(room, s, names=("base", "a", "b"), dtype="bfloat16"):
    "A base and fine-tunes of it, random, in bfloat16 or float32."
    import numpy as np
    from model_glue_nb.zoo.writer import CheckpointWriter
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=s["hidden"], intermediate_size=s["inner"], dtype=dtype,
                  num_hidden_layers=s["layers"], num_attention_heads=s["heads"], num_key_value_heads=s["kv"], vocab_size=s["vocab"], tie_word_embeddings=s["tied"])
    vocab = json.dumps(dict(version="1.0", added_tokens=[], model=dict(type="WordLevel", vocab={"a": 0}, unk_token="a")))
    writers, layout = [], {k: ("BF16" if dtype == "bfloat16" else "F32", v) for k, v in tensors(s).items()}
    for name in names:
        (room/name).mkdir()
        (room/name/"config.json").write_text(json.dumps(config))
        (room/name/"tokenizer.json").write_text(vocab)
        writers.append(CheckpointWriter(room/name, layout))
    rng, bits = (np.random.default_rng(0),
                 lambda x: (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else x.view(np.uint32))
    for k, (_, shape) in layout.items():
        n = int(np.prod(shape))
        x = rng.standard_normal(n, np.float32) * np.float32(.02)
        for i, w in enumerate(writers):
            w.write(k, bits(x if i == 0 else x + rng.standard_normal(n, np.float32) * np.float32(.002)))
    for w in writers: w.close()

def anonymous(pid):
    try: return int(next(l.split()[1] for l in open(f"/proc/{pid}/status") if l.startswith("RssAnon"))) * 1024
    except (OSError, StopIteration): return 0

def run(python, code, *args):
    "Seconds in all, seconds of work, peak anonymous bytes, processor seconds (which a busy machine changes least), what else it printed."
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        p = subprocess.Popen([python, "-c", code, *map(str, args)], stdout=log, stderr=log)
        peak = 0
        while True:
            peak = max(peak, anonymous(p.pid))
            pid, status, used = os.wait4(p.pid, os.WNOHANG)
            if pid: break
            time.sleep(.01)
        took = time.perf_counter() - start
        log.seek(0)
        text = log.read()
        p.returncode = status
    if status: sys.exit(f"A measured process failed:\n{text[-2000:]}")
    work, *more = map(float, text.rsplit("WORK", 1)[1].split())
    return took, work, peak, used.ru_utime + used.ru_stime, *more

def show(row):
    "One row of a benchmark, on one line."
    print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

def record(rows, out, digits=4):
    "The rows as CSV, below the command that made them; nothing without a file."
    if not out: return
    import pandas as pd
    command = f"# python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}\n"
    Path(out).write_text(command + pd.DataFrame(rows).to_csv(index=False, float_format=f"%.{digits}g"))
