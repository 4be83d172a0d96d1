"""What merges that ask no question score on the embedded zoo: five fine-tunes of one base, and with two spoilt ones.

    python benchmarks/merges_without_questions.py > nbs/recorded/merges_without_questions.csv

Texts, where a method needs some, are 24 search questions of each member's own skill with their answers, or random tokens.
Scores are of the report questions of the five skills, with 95 % intervals."""
import sys

import pandas as pd

from model_glue_nb.benchmarking.harness import few_threads
from model_glue_nb.benchmarking.intervals import mean_interval
from model_glue_nb.benchmarking.scores import ask, ask_model
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.zoo.zoo import read_zoo

SKILLS = ["double", "reverse", "rotate", "shift", "sort"]
SPOILT = {"a-hot-double": "double", "a-hot-sort": "sort"}
METHODS = "linear task_arithmetic ties tsv_m iso_c iso_cts data_free_covariance regmean regmean_plus".split()

def texts_of(suite):
    "Per member, texts of its own skill."
    texts = {t.name: [f"{q.prompt} {q.answer}" for q in t.questions] for t in suite.part("search", 24).tasks}
    return {f"a-{s}": texts[s] for s in SKILLS} | {m: texts[s] for m, s in SPOILT.items()}

def measure():
    "One row per set of members, method and kind of texts."
    zoo, suite = read_zoo("demo"), load_suite("demo").only(SKILLS)
    few_threads(zoo)
    report, own = suite.part("report"), texts_of(suite)
    sets = {"five specialists": [f"a-{s}" for s in SKILLS]}
    sets["and two spoilt"] = sets["five specialists"] + list(SPOILT)
    for which, members in sets.items():
        singles = {m: mean_interval(ask_model(zoo[m], report)) for m in members}
        best = max(singles, key=lambda m: singles[m].mean)
        yield row(which, best, "", singles[best])
        for method in METHODS:
            base = None if method in ("linear", "regmean", "regmean_plus") else "a-base"
            kinds = {"own": own, "random": "random"} if method.startswith("regmean") else {"": None}
            for kind, prompts in kinds.items():
                r = recipe(method, members, base=base, options=dict(prompts=prompts))
                items = ask(lambda: merge(r, zoo), r.fingerprint(zoo), report)
                yield row(which, method, kind, mean_interval(items))
                print(which, method, kind, file=sys.stderr, flush=True)

def row(which, method, texts, m): return dict(members=which, method=method, texts=texts, score=m.mean, low=m.low, high=m.high)

if __name__ == "__main__":
    table = pd.DataFrame(list(measure()))
    print("# python benchmarks/merges_without_questions.py > nbs/recorded/merges_without_questions.csv")
    sys.stdout.write(table.to_csv(index=False, float_format="%.4g"))
