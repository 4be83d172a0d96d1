"""Similarity of a zoo: one pass against the reference way (load both models whole, per pair), side by side in one run.

    python benchmarks/similarity.py [--shape 135m|1.1b] [--models 2 5 16] [--reference 5] [--rounds 3] [--out FILE.csv]

The reference is written from the paper's definition: transformers loads both models of a pair in float32, then the mean over columns of torch's cosine
for every attention and MLP weight. `work` is the time inside a process after its imports (loading compiled kernels is one). Bytes are counted twice: by us, and by the system (rchar)
with the headers, fingerprints and Python's own files. Memory is the peak of anonymous pages. `all_s` measures all six metrics. Medians; the load is recorded."""
import argparse, os, statistics, sys, tempfile
from pathlib import Path

from common import SHAPES, run, write_models

OURS = """
import sys, time
import pandas
import numpy as np
from model_glue_nb.pairs import compare_weight
from model_glue_nb.similarity import METRICS, compare_zoo, weights_of
from model_glue_nb.zoo import read_zoo
rchar = lambda: int(open("/proc/self/io").readline().split()[1])
zoo = read_zoo(sys.argv[2:]); metrics = METRICS if sys.argv[1] == "all" else ("column_cosine",)
compare_weight(list(zoo)[:2], weights_of(zoo.models[0])[0], np.zeros(2, int) - 1) # loads the compiled kernels
before, start, cpu = rchar(), time.perf_counter(), time.process_time(); found = compare_zoo(zoo, metrics, {m.name: zoo.names[0] for m in zoo}); table = found.square()
took, cpu, after = time.perf_counter() - start, time.process_time() - cpu, rchar(); assert "torch" not in sys.modules
print("WORK", took, cpu, found.n_read, after - before, table.iloc[0, 1])
"""
REFERENCE = """
import itertools, sys, time
import torch; from transformers import AutoModelForCausalLM; from transformers.utils.logging import disable_progress_bar
disable_progress_bar(); paths = sys.argv[1:]; AutoModelForCausalLM.from_pretrained(paths[0]) # imports and warm-up
load = lambda p: AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).state_dict(); start, cpu = time.perf_counter(), time.process_time(); values = []
for a, b in itertools.combinations(paths, 2):
    x, y = load(a), load(b); keys = [k for k in x if ("self_attn" in k or "mlp" in k) and x[k].ndim == 2]
    values.append(torch.stack([torch.cosine_similarity(x[k], y[k], dim=0).mean() for k in keys]).mean().item())
print("WORK", time.perf_counter() - start, time.process_time() - cpu, values[0])
"""

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="135m", choices=SHAPES); p.add_argument("--rounds", type=int, default=3); p.add_argument("--out", help="CSV file")
    p.add_argument("--models", nargs="*", type=int, default=[2, 5, 10, 16]); p.add_argument("--reference", nargs="*", type=int, default=[5], help="N at which the reference runs"); a = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as d:
        room = Path(d); names = ["base", *(f"m{i}" for i in range(1, max(a.models)))]; write_models(room, SHAPES[a.shape], names)
        for n in a.models:
            paths = [room/m for m in names[:n]]; mid = lambda runs, i: statistics.median(r[i] for r in runs)
            run(sys.executable, OURS, "all", *paths) # compiled kernels, files in the page cache
            runs, every = [[run(sys.executable, OURS, what, *paths) for _ in range(a.rounds)] for what in ("one", "all")]
            row = dict(shape=a.shape, n=n, pairs=n * (n - 1) // 2, work_s=mid(runs, 1), work_cpu_s=mid(runs, 4), process_s=mid(runs, 0),
                       all_s=mid(every, 1), all_cpu_s=mid(every, 4), size_gb=n * compared(SHAPES[a.shape]) / 1e9, read_gb=runs[0][5] / 1e9,
                       rchar_gb=mid(runs, 6) / 1e9, anon_mb=mid(runs, 2) / 1e6, all_anon_mb=mid(every, 2) / 1e6)
            if n in a.reference:
                theirs = [run(sys.executable, REFERENCE, *paths) for _ in range(a.rounds)]
                row |= dict(reference_s=mid(theirs, 1), reference_cpu_s=mid(theirs, 4), reference_process_s=mid(theirs, 0), reference_anon_mb=mid(theirs, 2) / 1e6)
                row |= dict(faster=row["reference_s"] / row["work_s"], less_cpu=row["reference_cpu_s"] / row["work_cpu_s"],
                            faster_process=row["reference_process_s"] / row["process_s"], apart=abs(theirs[0][5] - runs[0][7]))
            rows.append(row | dict(load=os.getloadavg()[0]))
            print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if a.out:
        import pandas as pd
        pd.DataFrame(rows).to_csv(a.out, index=False, float_format="%.4g")

def compared(s):
    "Bytes of one model's attention and MLP weights."
    from common import tensors
    return 2 * sum(x * y for k, (x, *y) in tensors(s).items() if ("self_attn" in k or "mlp" in k) for y in y)

if __name__ == "__main__": main()
