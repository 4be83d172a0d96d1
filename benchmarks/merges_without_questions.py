"""What merges that ask no question score on the embedded zoo: five fine-tunes of one base, and with two spoilt ones.

    python benchmarks/merges_without_questions.py nbs/recorded/merges_without_questions.csv

Rows that the file has are kept, the others are measured and added as they are found.
Texts, where a method needs some, are 24 search questions of each member's own skill with their answers, or random tokens.
Scores are of the report questions of the five skills, with 95 % intervals."""
import sys
from pathlib import Path

import pandas as pd

from model_glue_nb.benchmarking.harness import few_threads
from model_glue_nb.benchmarking.intervals import mean_interval
from model_glue_nb.benchmarking.scores import ask, ask_model
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.methods import method_info
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.zoo.layer_coefficients import split_source
from model_glue_nb.zoo.zoo import read_zoo

SKILLS = ["double", "reverse", "rotate", "shift", "sort"]
SPOILT = {"a-hot-double": "double", "a-hot-sort": "sort"}
METHODS = "linear task_arithmetic ties tsv_m iso_c iso_cts data_free_covariance regmean regmean_plus".split()

def texts_of(suite):
    "Per member, texts of its own skill."
    texts = {t.name: [f"{q.prompt} {q.answer}" for q in t.questions] for t in suite.part("search", 24).tasks}
    return {f"a-{s}": texts[s] for s in SKILLS} | {m: texts[s] for m, s in SPOILT.items()}

RAW = " raw" # Fisher information that is not divided by its mean over the model
VARIANTS = {"linear+fisher": ["random", "own"], "linear+fisher raw": ["random", "own"], "linear+agreement": ["random", "own"],
            "task_arithmetic+fisher": ["random"], "ties+fisher": ["random"], "ties+agreement": ["own"]}

def kinds():
    "Every method with the kinds of texts that it is tried on."
    for method in METHODS: yield from ((method, kind) for kind in (["own", "random"] if method.startswith("regmean") else [""]))
    for variant, texts in VARIANTS.items(): yield from ((variant, kind) for kind in texts)

def recipe_of(variant, members, prompts):
    "The recipe of a row."
    method, source = split_source(variant.removesuffix(RAW))
    base = "a-base" if method_info(method).needs_base or source == "agreement" else None
    if variant.endswith(RAW): source = dict(source=source, normalize=False)
    return recipe(method, members, base=base, options=dict(prompts=prompts, coefficients=source))

def measure(known):
    "One row per set of members, method and kind of texts."
    zoo, suite = read_zoo("demo"), load_suite("demo").only(SKILLS)
    few_threads(zoo)
    report, own = suite.part("report"), texts_of(suite)
    sets = {"five specialists": [f"a-{s}" for s in SKILLS]}
    sets["and two spoilt"] = sets["five specialists"] + list(SPOILT)
    for which, members in sets.items():
        if not any(w == which and m in members for w, m, _ in known):
            singles = {m: mean_interval(ask_model(zoo[m], report)) for m in members}
            best = max(singles, key=lambda m: singles[m].mean)
            yield row(which, best, "", singles[best])
        for method, kind in kinds():
            if (which, method, kind) in known: continue
            r = recipe_of(method, members, dict(own=own, random="random").get(kind))
            items = ask(lambda: merge(r, zoo), r.fingerprint(zoo), report)
            yield row(which, method, kind, mean_interval(items))
            print(which, method, kind, file=sys.stderr, flush=True)

def row(which, method, texts, m): return dict(members=which, method=method, texts=texts, score=m.mean, low=m.low, high=m.high)

def written(table):
    "The table as its file holds it."
    return f"# python {Path(__file__).parent.name}/{Path(__file__).name} {FILE}\n" + table.to_csv(index=False, float_format="%.4g")

if __name__ == "__main__":
    FILE = Path(sys.argv[1])
    table = pd.read_csv(FILE, comment="#", keep_default_na=False) if FILE.exists() else pd.DataFrame()
    known = set(zip(table.members, table.method, table.texts)) if len(table) else set()
    for found in measure(known):
        table = pd.concat([table, pd.DataFrame([found])], ignore_index=True)
        FILE.write_text(written(table.sort_values("members", key=lambda m: m == "and two spoilt", kind="stable")))
