"""Merging: our time and anonymous memory over mergekit 0.1.5 and over the machine's floor, side by side in one run.

    python benchmarks/merge.py [--shape 135m|1.1b] [--methods linear slerp …] [--rounds 3] [--mergekit PYTHON]

`--mergekit` is a Python that has mergekit (default: this one). Every figure is a whole process with its start-up; `work` is the time inside the
process after its imports. The floor is the bytes read and written at the speed this machine reaches now. Medians; the load is recorded."""
import argparse, os, statistics, subprocess, sys, tempfile
from pathlib import Path

from common import SHAPES, record, run, show, write_models

METHODS = ["linear", "slerp", "task_arithmetic", "model_stock", "ties", "dare_ties", "della"]

def recipe(room, method):
    def m(n, **p): return dict(model=str(room/n)) | (dict(parameters=p) if p else {})
    d = dict(merge_method=method,
             models=[m("a", weight=.5), m("b", weight=.5)],
             base_model=str(room/"base"), dtype="bfloat16")
    if method == "linear": del d["base_model"]
    if method == "slerp":
        d |= dict(base_model=str(room/"a"), models=[m("a"), m("b")], parameters=dict(t=.4))
    if method == "model_stock": d["models"] = [m("a"), m("b")]
    if method in ("ties", "dare_ties", "della"):
        d["models"] = [m("a", weight=.5, density=.5), m("b", weight=.5, density=.5)]
    if method == "della": d["parameters"] = dict(epsilon=.1)
    return d

OURS = """
import sys, time; t0 = time.perf_counter()
from model_glue_nb.merging.merge import merge_to_folder
from model_glue_nb.merging.recipes import MergeRecipe
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
    p.add_argument("--shape", default="135m", choices=SHAPES)
    p.add_argument("--methods", nargs="*", default=METHODS)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--mergekit", default=sys.executable, help="a Python that has mergekit")
    p.add_argument("--threads", nargs="*", default=[1, 2])
    p.add_argument("--out", help="CSV file")
    a = p.parse_args()
    theirs = subprocess.run([a.mergekit, "-c", "import mergekit"], capture_output=True).returncode == 0
    if not theirs:
        print("mergekit is not there (pip install mergekit==0.1.5): only our side and the floor are measured.")
    rows = []
    with tempfile.TemporaryDirectory() as d:
        import yaml
        room = Path(d)
        write_models(room, SHAPES[a.shape])
        size = (room/"a"/"model.safetensors").stat().st_size
        for method in a.methods:
            file = room/f"{method}.yaml"
            file.write_text(yaml.safe_dump(recipe(room, method)))
            ours, peer, low = [], {t: [] for t in a.threads}, []
            parents = ["a", "b"] if method in ("linear", "slerp") else ["base", "a", "b"]
            run(sys.executable, OURS, file, room/"warm") # compiled kernels, files in the page cache
            subprocess.run(["rm", "-rf", room/"warm"])
            for _ in range(a.rounds):
                for runs, python, code, more in [
                        (ours, sys.executable, OURS, [])] + ([(peer[t], a.mergekit, THEIRS, [t]) for t in a.threads]
                                                             if theirs else []):
                    runs.append(run(python, code, file, room/"out", *more))
                    subprocess.run(["rm", "-rf", room/"out"])
                low.append(floor(room, parents, size))
            def mid(runs, i): return statistics.median(r[i] for r in runs)
            best = min(peer.values(), key=lambda r: mid(r, 0)) if theirs else None
            row = dict(shape=a.shape, method=method, ours_s=mid(ours, 0),
                       ours_work_s=mid(ours, 1), floor_s=statistics.median(low),
                       ours_cpu_s=mid(ours, 3), ours_anon_mb=mid(ours, 2) / 1e6)
            row["work_over_floor"] = row["ours_work_s"] / row["floor_s"]
            if theirs:
                row |= dict(mergekit_s=mid(best, 0), mergekit_work_s=mid(best, 1),
                            mergekit_anon_mb=mid(best, 2) / 1e6, mergekit_cpu_s=mid(best, 3),
                            less_cpu=mid(best, 3) / row["ours_cpu_s"],
                            faster=mid(best, 0) / row["ours_s"],
                            faster_work=mid(best, 1) / row["ours_work_s"])
            row["load"] = os.getloadavg()[0]
            rows.append(row)
            show(row)
    record(rows, a.out)

if __name__ == "__main__": main()
