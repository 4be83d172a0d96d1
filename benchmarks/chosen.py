"""Is `chosen` ever worse than doing nothing? Zoos whose answers are drawn, so that the truth is known.

    python benchmarks/chosen.py [--zoos 200] --out nbs/recorded/chosen.csv

In a zoo without a signal all models have one skill and prompts tell nothing of their task. With a weak or a strong one each model is better at a task of its own, and prompts tell it. A question is
answered when the model's skill and its own luck with that question together pass the question's difficulty. A merge has the weighted mean of its members' skills and lucks, and what merging adds or costs;
60 merges are tried by a climb on *search*, as a run would, so that its winner is lucky too. Each zoo has 3 to 9 tasks, 25 or 60 search questions and 300 report questions per task."""
import argparse

import numpy as np

from common import record, show

SIGNALS = dict(none=(0.0, 0.0), weak=(0.5, 1.0), strong=(2.5, 3.0)) # Skill at one's own task, how far apart the prompts of tasks are
MERGING = dict(none=(-.3, -.1, 0),
               weak=(-.2, 0, .2, .4),
               strong=(-.3, 0, 1, 3)) # What an even merge adds to the mean skill

def draw_zoo(seed, signal):
    "Skills, lucks and prompts of one zoo."
    rng = np.random.default_rng(seed)
    skill, apart = SIGNALS[signal]
    n_tasks, n_models = int(rng.integers(3, 10)), int(rng.integers(3, 8))
    n = dict(search=int(rng.choice([25, 60])), report=300)
    zoo = dict(seed=seed, signal=signal, tasks=n_tasks, models=n_models, n=n)
    own = rng.integers(0, n_models, n_tasks)
    level = rng.normal(0, 1, n_tasks)
    centre = rng.standard_normal((n_tasks, 8))
    general = rng.normal(0, .15, n_models) if signal != "none" else np.zeros(n_models)
    zoo["merging"] = float(rng.choice(MERGING[signal]))
    for part in n:
        task = np.repeat(np.arange(n_tasks), n[part])
        mean = level[task, None] + general + skill * (own[task, None] == np.arange(n_models))
        luck = rng.logistic(0, 1, (len(task), n_models))
        shared = rng.logistic(0, 1, (len(task), 1))
        prompts = apart * centre[task] + rng.standard_normal((len(task), 8))
        zoo[part] = dict(task=task, mean=mean, luck=.7 * luck + .7 * shared, prompts=prompts.astype(np.float32))
    return zoo, rng

def merged(part, weights, adds):
    "What the merge of all models with some weights answers."
    w = weights / weights.sum()
    spread = np.sqrt((w ** 2).sum())
    luck = part["luck"] @ w / (spread + (1 - spread) * .5) # averages vary less; most of it is kept
    return ((part["mean"] @ w + luck + adds * (1 - w.max())) > 0).astype(float)

def climb(zoo, rng, tries=60):
    "Merges as a search tries them: each a step from the best so far."
    n, tried = zoo["models"], []
    best, at = -1, np.ones(n)
    for _ in range(tries):
        w = np.clip(at + rng.normal(0, .4, n), .01, None)
        v = merged(zoo["search"], w, zoo["merging"])
        tried.append((w, v))
        if v.mean() > best: best, at = v.mean(), w
    return tried

def items_of(values, task):
    from model_glue_nb.benchmarking.intervals import ItemScores
    return ItemScores({f"t{t}": values[task == t] for t in np.unique(task)})

def outcome(seed, signal, router=dict(name="knn")):
    "What is chosen in one zoo, and how it fares on *report* against the best single model."
    from model_glue_nb.benchmarking.intervals import paired_gain
    from model_glue_nb.gluing.choice import best_candidate, cross_fitted, routed, simplest
    from model_glue_nb.mixing.routers import fit_router
    zoo, rng = draw_zoo(seed, signal)
    search, report = zoo["search"], zoo["report"]
    alone = {p: (zoo[p]["mean"] + zoo[p]["luck"] > 0).astype(float) for p in ("search", "report")}
    tried = climb(zoo, rng)
    pool = np.stack([v for _, v in tried], 1)
    like = items_of(alone["search"][:, 0], search["task"])
    held = cross_fitted(dict(best_single=best_candidate(alone["search"], like), merge=best_candidate(pool, like),
                             mixture=routed(router, search["prompts"], alone["search"])), like, seed=seed)
    taken = simplest(held, seed=seed).system
    best = alone["report"][:, int(alone["search"].mean(0).argmax())]
    fitted = fit_router(router, dict(model=search["prompts"]), alone["search"].astype(np.float32))
    route = fitted.route(report["prompts"])
    systems = dict(best_single=best, merge=merged(report, tried[int(pool.mean(0).argmax())][0], zoo["merging"]),
                   mixture=alone["report"][np.arange(len(route)), route])
    gain = {s: paired_gain(items_of(v, report["task"]), items_of(best, report["task"])) for s, v in systems.items()}
    top = max(gain, key=lambda s: gain[s].mean)
    return dict(seed=seed, signal=signal, tasks=zoo["tasks"],
                models=zoo["models"], merging=zoo["merging"], search=zoo["n"]["search"],
                chosen=taken, gain=gain[taken].mean, low=gain[taken].low,
                high=gain[taken].high, worse=bool(gain[taken].high < 0),
                always_mixture=gain["mixture"].mean, mixture_worse=bool(gain["mixture"].high < 0),
                always_merge=gain["merge"].mean, merge_worse=bool(gain["merge"].high < 0),
                best_on_report=top, missed=gain[top].mean - gain[taken].mean)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--zoos", type=int, default=200)
    p.add_argument("--out")
    a = p.parse_args()
    rows = [outcome(seed, signal) for signal in SIGNALS for seed in range(a.zoos)]
    for signal in SIGNALS:
        mine = [r for r in rows if r["signal"] == signal]
        def mean(k): return float(np.mean([r[k] for r in mine]))
        took = {s: sum(r["chosen"] == s for r in mine) for s in ("best_single", "merge", "mixture")}
        show(dict(signal=signal, zoos=len(mine),
                  worse=mean("worse"), gain=mean("gain"), missed=mean("missed"),
                  mixture_worse=mean("mixture_worse"), merge_worse=mean("merge_worse"))
             | took)
    record(rows, a.out)

if __name__ == "__main__": main()
