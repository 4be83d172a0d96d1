"""Do 95% intervals hold the truth in 95 of 100 draws, and does racing spare the leader's equals? By simulation, where the truth is known.

    python benchmarks/intervals.py coverage [--draws 500] [--out nbs/recorded/interval_coverage.csv]
    python benchmarks/intervals.py racing [--draws 300] [--out nbs/recorded/racing_false_drops.csv]

Coverage: systems of a known accuracy answer questions that are new in every draw. Single: the interval of the mean over tasks. Paired: of the difference to a second
system that is `gap` better and shares the luck of part of the questions (`shared`). `spread` lets tasks differ in difficulty, `graded` gives scores between 0 and 1 (a beta distribution). `questions` are
counted over all tasks; `differ` is how many of them two systems answer unlike. `width` is the mean width, `least` the smallest.
Racing: equal runners answer the same questions; `dropped` is the share of the leader's rivals that the test calls worse, `old` the share by the plain test of each task's own variance;
`survives` is how often one that is `edge` better than the others is not called worse, `caught` how often one that is as much worse is, when it does not lead."""
import argparse, itertools

import numpy as np
from scipy.special import betaincinv

from common import record, show
from model_glue_nb.benchmarking.intervals import ItemScores, behind, mean_interval, mean_score, paired_gain, task_weights

def answers(luck, p, graded):
    "What a system of accuracy p says to questions with such luck."
    return 1 - betaincinv(3 * (1 - p), 3 * p, luck) if graded else (luck < p).astype(float)

def simulate(accuracy, n_tasks, n, draws, gap=None, shared=0.0, spread=False, graded=False, seed=0):
    "Coverage and widths of one setting."
    rng = np.random.default_rng(seed)
    sizes = [len(x) for x in np.array_split(np.arange(n), n_tasks)]
    ease = np.linspace(-1, 1, n_tasks) * min(1 - accuracy, .3) * spread if n_tasks > 1 else np.zeros(1)
    held, widths, differ = 0, [], 0
    for _ in range(draws):
        ours, theirs = {}, {}
        for t, (size, e) in enumerate(zip(sizes, ease)):
            luck = rng.random(size)
            ours[f"t{t}"] = answers(luck, accuracy + e, graded)
            if gap is None: continue
            other = np.where(rng.random(size) < shared, luck, rng.random(size))
            theirs[f"t{t}"] = answers(other, accuracy + e - gap, graded)
            differ += (ours[f"t{t}"] != theirs[f"t{t}"]).sum()
        i = mean_interval(ours) if gap is None else paired_gain(ours, theirs)
        held += i.low <= (accuracy if gap is None else gap) <= i.high
        widths.append(i.high - i.low)
    return dict(coverage=held / draws, differ=differ / draws, width=np.mean(widths), least=min(widths))

ACCURACIES, TASKS, QUESTIONS = (.5, .7, .8, .9, .95, .98, .995), (1, 3, 9), (25, 60, 100, 500)
PAIRS = [(0, 0), (.02, 0), (.02, .5), (.02, 1), (.1, .5)] # gap, shared

def coverage(a):
    rows = []
    for p, k, n in itertools.product(ACCURACIES, TASKS, QUESTIONS):
        single = [dict(), dict(graded=True)] + [dict(spread=True)] * (k > 1)
        for how in single + [dict(gap=g, shared=s) for g, s in PAIRS]:
            rows.append(dict(kind="single" if "gap" not in how else "paired", accuracy=p,
                             tasks=k, questions=n, gap=how.get("gap", np.nan),
                             shared=how.get("shared", np.nan),
                             spread=int(how.get("spread", 0)), graded=int(how.get("graded", 0)))
                        | simulate(p, k, n, a.draws, seed=len(rows), **how))
        show(rows[-1])
    return rows

def plainly_behind(ours, leader):
    "The test as it was: each task's own variance, 0 for one question."
    d, w = [ours[t] - leader[t] for t in leader], task_weights(leader)
    noise = np.array([x.var(ddof=1) / len(x) if len(x) > 1 else 0 for x in d])
    return w @ [x.mean() for x in d] + 1.645 * (w**2 @ noise)**.5 < 0

def runners(rng, n, n_tasks, skill, shared, edge=0.0):
    "Runners' answers; the last is better by `edge`, the first worse."
    p = np.full(len(n), skill)
    p[-1] += edge
    p[0] -= edge
    out = [ItemScores() for _ in n]
    for t in range(n_tasks):
        luck = rng.random(n[0])
        for i, x in enumerate(out):
            x[f"t{t}"] = (np.where(rng.random(n[0]) < shared, luck, rng.random(n[0])) < p[i]).astype(
                float)
    return out

def one_heat(rng, k, per_task, n_tasks, skill, shared, edge):
    "What the two tests say of the rivals of one heat: (dropped, old, survives, caught)."
    field = runners(rng, [per_task] * k, n_tasks, skill, shared)
    lead = max(range(k), key=lambda i: mean_score(field[i]))
    rivals = [x for i, x in enumerate(field) if i != lead]
    equal = [np.mean([behind(x, field[lead], k) for x in rivals]),
             np.mean([plainly_behind(x, field[lead]) for x in rivals])]
    field = runners(rng, [per_task] * k, n_tasks, skill, shared, edge)
    lead = max(range(k), key=lambda i: mean_score(field[i]))
    return *equal, not behind(field[-1], field[lead], k), behind(field[0], field[lead], k)

def racing(a):
    rows = []
    for k, n_tasks, per_task, shared in itertools.product((2, 8, 32),
                                                          (1, 3, 9),
                                                          (1, 2, 8, 20, 60), (.5,)):
        rng = np.random.default_rng(len(rows))
        found = np.array([one_heat(rng, k, per_task, n_tasks, .7, shared, .15) for _ in range(a.draws)], float)
        rows.append(dict(runners=k, tasks=n_tasks, per_task=per_task, skill=.7, shared=shared, edge=.15)
                    | dict(zip(("dropped", "old", "survives", "caught"), found.mean(0))))
        show(rows[-1])
    return rows

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["coverage", "racing"])
    p.add_argument("--draws", type=int)
    p.add_argument("--out", help="CSV file")
    a = p.parse_args()
    a.draws = a.draws or dict(coverage=500, racing=300)[a.what]
    record(dict(coverage=coverage, racing=racing)[a.what](a), a.out)
