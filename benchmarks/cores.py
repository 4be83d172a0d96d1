"""How much of a run grows with the cores? One recipe, whole, on one core and on more, nothing remembered.

    python benchmarks/cores.py recipes/demo.yaml [--cores 1 2] --out nbs/recorded/cores.csv

A run is held to its cores by the kernel, so that threads and processes share them; its own record of stages (`stages.csv`) is read. The results must be the same:
the script ends with an error where the tables of two runs differ."""
import argparse, os, subprocess, sys, tempfile, time
from pathlib import Path

import pandas as pd

from common import record, show

TABLES = ("comparison.csv", "scores.csv", "search.csv", "routing.csv", "attribution.csv")

def run_on(cores, recipe, out):
    "Seconds of one run by stage, the whole included."
    alone = dict(MODEL_GLUE_STORE="none", HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", "from model_glue_nb.cli.program import main; main()", "run", str(recipe), "--out", str(out)]
    began = time.perf_counter()
    done = subprocess.run(command, env=os.environ | alone, text=True, capture_output=True, preexec_fn=lambda: os.sched_setaffinity(0, cores))
    whole = time.perf_counter() - began
    if done.returncode: sys.exit(f"The run failed:\n{done.stderr[-2000:]}")
    stages = pd.read_csv(out/"stages.csv")
    return dict(zip(stages.stage, stages.seconds)) | dict(whole=whole)

def differing(a, b):
    "Which tables two runs tell differently, times aside."
    def told(file): return pd.read_csv(file, usecols=lambda c: not c.startswith(("ms_", "seconds", "began")))
    for name in TABLES:
        there = [(d/name).exists() for d in (a, b)]
        if any(there) and not (all(there) and told(a/name).equals(told(b/name))): yield name

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a run's recipe")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="how many, each time")
    parser.add_argument("--name", help="what the zoo is called in the table; the recipe's name when left out")
    parser.add_argument("--out", type=Path, help="a CSV file for the rows")
    a = parser.parse_args()
    mine, rows, times = sorted(os.sched_getaffinity(0)), [], {}
    if max(a.cores) > len(mine):
        sys.exit(f"There are {len(mine)} cores here, and --cores asks for {max(a.cores)}.")
    with tempfile.TemporaryDirectory() as tmp:
        for n in a.cores: times[n] = run_on(mine[:n], a.recipe, Path(tmp)/str(n))
        first, *others = (Path(tmp)/str(n) for n in a.cores)
        wrong = [f"{t} ({o.name} cores)" for o in others for t in differing(first, o)]
    for stage in times[a.cores[0]]:
        row = (dict(zoo=a.name or a.recipe.stem, stage=stage)
               | {f"cores_{n}_s": round(times[n][stage], 1) for n in a.cores})
        rows.append(row | dict(ratio=times[min(a.cores)][stage] / times[max(a.cores)][stage]))
        show(rows[-1])
    record(rows, a.out)
    if wrong: sys.exit(f"Not the same results: {', '.join(wrong)}")

if __name__ == "__main__": main()
