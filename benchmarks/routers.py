"""What routers get right after few questions: five folds of the *search* questions of finished runs, single models as experts.

    python benchmarks/routers.py runs/smollm2 runs/demo      # their answers are stored: nothing is asked

Writes a row per run, router and number of questions of each task that were learned from: the mean over draws, and its deviation."""
import argparse, functools
import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold
from model_glue_nb.benchmarking.scores import ask_model
from model_glue_nb.core import silent
from model_glue_nb.gluing.recipe import begin, read_recipe
from model_glue_nb.mixing.learners import pooled
from model_glue_nb.mixing.routers import fit_texts, featurize, feature_kind
from model_glue_nb.mixing.selection import by_question, shares_of

ROUTERS = "linear", "tfidf_linear", "knn", "tfidf_knn"

def few(learn, task, n, rng):
    "At most `n` questions of each task."
    rows = [rng.permutation(learn[task[learn] == t])[:n] for t in np.unique(task)]
    return np.concatenate(rows)

def share_right(router, draw, n, prompts, values, task, share, encoder):
    "The mean over tasks, each question routed by what the other folds taught."
    rng, total = np.random.default_rng(draw), 0
    for learn, ask in StratifiedKFold(5, shuffle=True, random_state=draw).split(task, task):
        learn = few(learn, task, n, rng)
        texts, lessons = [prompts[i] for i in learn], pooled(values[learn], task[learn])
        fitted = fit_texts(dict(name=router), encoder, [1] * values.shape[1], texts, lessons, weights=share[learn])
        seen = featurize(fitted, encoder, [prompts[i] for i in ask], feature_kind(router))
        total += share[ask] @ values[ask, fitted.route(seen)]
    return total / len(task)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of finished runs")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--out", help="CSV to write")
    given, rows = parser.parse_args(), []
    for run in given.runs:
        work = begin(read_recipe(f"{run}/recipe.yaml"), run, silent)
        items = {n: ask_model(work.zoo[n], work.search, work.run.store) for n in work.singles}
        values, task = by_question(items, work.singles)
        share = shares_of(items[work.singles[0]])
        best = work.singles[int(values.mean(0).argmax())]
        encoder = functools.cache(work.zoo[best].load)
        most = int(np.bincount(task).max())
        for router in ROUTERS:
            for n in sorted({10, 20, most}):
                got = [share_right(router, d, n, work.search.prompts, values, task, share, encoder) for d in range(given.draws)]
                rows.append(dict(run=run.rstrip("/").split("/")[-1], router=router, questions=n, score=np.mean(got), deviation=np.std(got)))
                print("{run:16} {router:13} {questions:3} {score:.4f} ± {deviation:.4f}".format(**rows[-1]), flush=True)
    if given.out: pd.DataFrame(rows).to_csv(given.out, index=False, float_format="%.4f")

if __name__ == "__main__": main()
