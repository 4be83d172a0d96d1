"""Merging: our time and anonymous memory over mergekit 0.1.5 and over the machine's floor, side by side in one run.

    python benchmarks/merge.py [--shape 135m|1.1b] [--methods linear slerp …] [--rounds 3] [--mergekit PYTHON]

`--mergekit` is a Python that has mergekit (default: this one). Every figure is a whole process with its start-up; `work` is the time inside the
process after its imports. The floor is the bytes read and written at the speed this machine reaches now. Medians; the load is recorded."""
import argparse, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
SHAPES = {"135m": dict(hidden=576, inner=1536, layers=30, heads=9, kv=3, vocab=49152, tied=True),
          "1.1b": dict(hidden=2048, inner=5632, layers=22, heads=32, kv=4, vocab=32000, tied=False),
          "tiny": dict(hidden=64, inner=128, layers=2, heads=4, kv=2, vocab=512, tied=True)}
METHODS = ["linear", "slerp", "task_arithmetic", "model_stock", "ties", "dare_ties", "della"]

def tensors(s):
    h, k = s["hidden"], s["hidden"] // s["heads"] * s["kv"]
    out = {"model.embed_tokens.weight": (s["vocab"], h), "model.norm.weight": (h,)}
    for i in range(s["layers"]):
        p = f"model.layers.{i}."
        out |= {p + "self_attn.q_proj.weight": (h, h), p + "self_attn.k_proj.weight": (k, h), p + "self_attn.v_proj.weight": (k, h),
                p + "self_attn.o_proj.weight": (h, h), p + "mlp.gate_proj.weight": (s["inner"], h), p + "mlp.up_proj.weight": (s["inner"], h),
                p + "mlp.down_proj.weight": (h, s["inner"]), p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
    return out if s["tied"] else out | {"lm_head.weight": (s["vocab"], h)}

def write_models(room, s):
    "A base and two fine-tunes, random, bf16."
    import numpy as np
    from model_glue_nb.zoo import CheckpointWriter
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=s["hidden"], intermediate_size=s["inner"], dtype="bfloat16",
                  num_hidden_layers=s["layers"], num_attention_heads=s["heads"], num_key_value_heads=s["kv"], vocab_size=s["vocab"], tie_word_embeddings=s["tied"])
    vocab = json.dumps(dict(version="1.0", added_tokens=[], model=dict(type="WordLevel", vocab={"a": 0}, unk_token="a")))
    writers, layout = [], {k: ("BF16", v) for k, v in tensors(s).items()}
    for name in ("base", "a", "b"):
        (room/name).mkdir(); (room/name/"config.json").write_text(json.dumps(config)); (room/name/"tokenizer.json").write_text(vocab)
        writers.append(CheckpointWriter(room/name, layout))
    rng = np.random.default_rng(0); bf16 = lambda x: (x.view(np.uint32) >> 16).astype(np.uint16)
    for k, (_, shape) in layout.items():
        n = int(np.prod(shape)); x = rng.standard_normal(n, np.float32) * np.float32(.02)
        for i, w in enumerate(writers): w.write(k, bf16(x if i == 0 else x + rng.standard_normal(n, np.float32) * np.float32(.002)))
    for w in writers: w.close()

def recipe(room, method):
    m = lambda n, **p: dict(model=str(room/n)) | (dict(parameters=p) if p else {})
    d = dict(merge_method=method, models=[m("a", weight=.5), m("b", weight=.5)], base_model=str(room/"base"), dtype="bfloat16")
    if method == "linear": del d["base_model"]
    if method == "slerp": d |= dict(base_model=str(room/"a"), models=[m("a"), m("b")], parameters=dict(t=.4))
    if method == "model_stock": d["models"] = [m("a"), m("b")]
    if method in ("ties", "dare_ties", "della"): d["models"] = [m("a", weight=.5, density=.5), m("b", weight=.5, density=.5)]
    if method == "della": d["parameters"] = dict(epsilon=.1)
    return d

OURS = """
import sys, time; t0 = time.perf_counter()
from model_glue_nb.merge import MergeRecipe, merge_to_folder
t1 = time.perf_counter(); merge_to_folder(MergeRecipe.from_yaml(sys.argv[1]), None, sys.argv[2])
assert "torch" not in sys.modules
print("WORK", time.perf_counter() - t1)
"""
THEIRS = """
import sys, time, yaml; t0 = time.perf_counter()
import torch
if len(sys.argv) > 3: torch.set_num_threads(int(sys.argv[3]))
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
t1 = time.perf_counter()
run_merge(MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1]))), sys.argv[2], options=MergeOptions(copy_tokenizer=False, quiet=True, lazy_unpickle=True))
print("WORK", time.perf_counter() - t1)
"""

def anonymous(pid):
    try: return int(next(l.split()[1] for l in open(f"/proc/{pid}/status") if l.startswith("RssAnon"))) * 1024
    except (OSError, StopIteration): return 0

def run(python, code, *args):
    "Seconds in all, seconds of work, peak anonymous bytes, processor seconds (which a busy machine changes least)."
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        p = subprocess.Popen([python, "-c", code, *map(str, args)], stdout=log, stderr=log); peak = 0
        while True:
            peak = max(peak, anonymous(p.pid)); pid, status, used = os.wait4(p.pid, os.WNOHANG)
            if pid: break
            time.sleep(.01)
        took = time.perf_counter() - start; log.seek(0); text = log.read(); p.returncode = status
    if status: sys.exit(f"A merge failed:\n{text[-2000:]}")
    return took, float(text.rsplit("WORK", 1)[1].split()[0]), peak, used.ru_utime + used.ru_stime

def floor(room, n_read, n_write):
    "Seconds to read and write as many bytes, on all processors, from and to the page cache."
    code = """
import os, sys, time; from concurrent.futures import ThreadPoolExecutor
room, n_write = sys.argv[1], int(sys.argv[2]); files = [os.path.join(room, n, "model.safetensors") for n in sys.argv[3:]]; n = len(os.sched_getaffinity(0)); step = 2**20
def read(part):
    b = bytearray(step); fds = [os.open(f, os.O_RDONLY) for f in files]
    for fd, f in zip(fds, files):
        for at in range(part * step, os.path.getsize(f), n * step): os.preadv(fd, [b], at)
def write(part):
    b = bytes(step)
    for at in range(part * step, n_write, n * step): os.pwrite(out, b, at)
start = time.perf_counter(); out = os.open(room + "/floor", os.O_RDWR | os.O_CREAT); os.posix_fallocate(out, 0, n_write)
with ThreadPoolExecutor(n) as pool: list(pool.map(read, range(n))); list(pool.map(write, range(n)))
print("WORK", time.perf_counter() - start); os.unlink(room + "/floor")"""
    return run(sys.executable, code, room, n_write, *n_read)[1]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="135m", choices=SHAPES); p.add_argument("--methods", nargs="*", default=METHODS)
    p.add_argument("--rounds", type=int, default=3); p.add_argument("--mergekit", default=sys.executable, help="a Python that has mergekit"); p.add_argument("--threads", nargs="*", default=[1, 2])
    p.add_argument("--out", help="CSV file"); a = p.parse_args()
    theirs = subprocess.run([a.mergekit, "-c", "import mergekit"], capture_output=True).returncode == 0
    if not theirs: print("mergekit is not there (pip install mergekit==0.1.5): only our side and the floor are measured.")
    rows = []
    with tempfile.TemporaryDirectory() as d:
        import yaml
        room = Path(d); write_models(room, SHAPES[a.shape]); size = (room/"a"/"model.safetensors").stat().st_size
        for method in a.methods:
            file = room/f"{method}.yaml"; file.write_text(yaml.safe_dump(recipe(room, method))); ours, peer, low = [], {t: [] for t in a.threads}, []
            parents = ["a", "b"] if method in ("linear", "slerp") else ["base", "a", "b"]
            run(sys.executable, OURS, file, room/"warm") # compiled kernels, files in the page cache
            subprocess.run(["rm", "-rf", room/"warm"])
            for _ in range(a.rounds):
                for runs, python, code, more in [(ours, sys.executable, OURS, [])] + ([(peer[t], a.mergekit, THEIRS, [t]) for t in a.threads] if theirs else []):
                    runs.append(run(python, code, file, room/"out", *more)); subprocess.run(["rm", "-rf", room/"out"])
                low.append(floor(room, parents, size))
            mid = lambda runs, i: statistics.median(r[i] for r in runs)
            best = min(peer.values(), key=lambda r: mid(r, 0)) if theirs else None
            row = dict(shape=a.shape, method=method, ours_s=mid(ours, 0), ours_work_s=mid(ours, 1), floor_s=statistics.median(low), ours_cpu_s=mid(ours, 3), ours_anon_mb=mid(ours, 2) / 1e6)
            row["work_over_floor"] = row["ours_work_s"] / row["floor_s"]
            if theirs: row |= dict(mergekit_s=mid(best, 0), mergekit_work_s=mid(best, 1), mergekit_anon_mb=mid(best, 2) / 1e6,
                                   mergekit_cpu_s=mid(best, 3), less_cpu=mid(best, 3) / row["ours_cpu_s"], faster=mid(best, 0) / row["ours_s"], faster_work=mid(best, 1) / row["ours_work_s"])
            row["load"] = os.getloadavg()[0]; rows.append(row)
            print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if a.out:
        import pandas as pd
        pd.DataFrame(rows).to_csv(a.out, index=False, float_format="%.4g")

if __name__ == "__main__": main()
