"""Similarity of a zoo: one pass against the reference way (load both models whole, per pair), side by side in one run.

    python benchmarks/similarity.py [--shape 135m|1.1b] [--models 2 5 16] [--reference 5] [--rounds 3] [--out FILE.csv]

The reference is written from the paper's definition: transformers loads both models of a pair in float32, then the mean over columns of torch's cosine
for every attention and MLP weight. `work` is the time inside a process after its imports (loading compiled kernels is one), with the files in the page cache. Bytes are counted twice:
by us, and by the system, in a run that finds nothing in the cache (`disk_gb`: what it fetched, read ahead included; `cold_s`). Memory is the peak of anonymous pages.
`all_s` measures all six metrics. Medians over rounds in which the sides take turns; ratios are medians of the rounds' ratios; the load is recorded."""
import argparse, os, statistics, sys, tempfile
from pathlib import Path

from common import SHAPES, record, run, show, write_models

OURS = """
import os, sys, time
import pandas
import numpy as np
from pathlib import Path
from model_glue_nb.mergeability.pairs import compare_weight
from model_glue_nb.mergeability.similarity import METRICS, compare_zoo, weights_of
from model_glue_nb.zoo.zoo import read_zoo
fetched = lambda: int(next(l for l in open("/proc/self/io") if l.startswith("read_bytes")).split()[1])
zoo = read_zoo(sys.argv[2:]); metrics = METRICS if sys.argv[1] == "all" else ("column_cosine",)
compare_weight(list(zoo)[:2], weights_of(zoo.models[0])[0], np.zeros(2, int) - 1) # loads the compiled kernels
if sys.argv[1] == "cold":
    for f in (f for p in sys.argv[2:] for f in Path(p).glob("*.safetensors")):
        with open(f, "rb") as opened: os.fsync(opened.fileno()); os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
before, start, cpu = fetched(), time.perf_counter(), time.process_time(); found = compare_zoo(zoo, metrics, {m.name: zoo.names[0] for m in zoo}); table = found.square()
took, cpu, after = time.perf_counter() - start, time.process_time() - cpu, fetched(); assert "torch" not in sys.modules
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
    p.add_argument("--shape", default="135m", choices=SHAPES)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--out", help="CSV file")
    p.add_argument("--models", nargs="*", type=int, default=[2, 5, 10, 16])
    p.add_argument("--reference", nargs="*", type=int, default=[5], help="N at which the reference runs")
    a = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as d:
        room = Path(d)
        names = ["base", *(f"m{i}" for i in range(1, max(a.models)))]
        write_models(room, SHAPES[a.shape], names)
        for n in a.models:
            paths = [room/m for m in names[:n]]
            def mid(runs, i): return statistics.median(r[i] for r in runs)
            run(sys.executable, OURS, "all", *paths) # compiled kernels, files in the page cache
            runs, every, theirs = [], [], []
            for _ in range(a.rounds): # in turns: the machine is not equally fast all the time
                runs.append(run(sys.executable, OURS, "one", *paths))
                every.append(run(sys.executable, OURS, "all", *paths))
                if n in a.reference: theirs.append(run(sys.executable, REFERENCE, *paths))
            cold = run(sys.executable, OURS, "cold", *paths)
            row = dict(shape=a.shape, n=n,
                       pairs=n * (n - 1) // 2, work_s=mid(runs, 1),
                       work_cpu_s=mid(runs, 4), process_s=mid(runs, 0),
                       all_s=mid(every, 1), all_cpu_s=mid(every, 4),
                       size_gb=n * compared(SHAPES[a.shape]) / 1e9,
                       read_gb=runs[0][5] / 1e9,
                       disk_gb=cold[6] / 1e9, cold_s=cold[1], anon_mb=mid(runs, 2) / 1e6, all_anon_mb=mid(every, 2) / 1e6)
            if theirs:
                def ratio(i): return statistics.median(x[i] / y[i] for x, y in zip(theirs, runs))
                row |= dict(reference_s=mid(theirs, 1), reference_cpu_s=mid(theirs, 4),
                            reference_process_s=mid(theirs, 0), reference_anon_mb=mid(theirs, 2) / 1e6)
                row |= dict(faster=ratio(1), less_cpu=ratio(4), faster_process=ratio(0),
                            apart=abs(theirs[0][5] - runs[0][7]))
            rows.append(row | dict(load=os.getloadavg()[0]))
            show(rows[-1])
    record(rows, a.out)

def compared(s):
    "Bytes of one model's attention and MLP weights."
    from common import tensors
    return (2
            * sum(x * y for k, (x, *y) in tensors(s).items() if ("self_attn" in k or "mlp" in k) for y in y))

if __name__ == "__main__": main()
