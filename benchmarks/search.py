"""Search: what a candidate costs in memory and on disk, what each strategy finds within a budget, and what a race saves.

    python benchmarks/search.py candidate [--rounds 12]         four random models of 135M parameters, in memory against write and reload
    python benchmarks/search.py table  [--methods linear ties …] [--strategies …] [--budget 40] --out nbs/recorded/demo_strategies.csv
    python benchmarks/search.py landscapes [--real] [--budgets 10 20 60] [--seeds 12] --out nbs/recorded/search_landscapes.csv
    python benchmarks/search.py racing [--methods …] [--seeds 5] [--runners 40] --out nbs/recorded/demo_racing.csv
    python benchmarks/search.py irt --methods linear task_arithmetic [--pools 3] [--seeds 10] [--first-seed 100] --out nbs/recorded/irt_search.csv

Table and racing run on the embedded zoo. Cluster: the eight members of the embedded zoo's family A. Search: 60 questions per task; report: the whole report split. Trials and answers are kept in
the run folder (`--run`), so an interrupted benchmark goes on, and seconds are those of the first time. One thread, seed 0."""
import argparse, os, shutil, statistics, tempfile, time
from pathlib import Path

from common import SHAPES, record, show, write_models

def rooms(run, n=60):
    "The family, its scorer, the report questions and the run."
    import torch
    from model_glue_nb.benchmarking.suites import load_suite
    from model_glue_nb.core import Run
    from model_glue_nb.searching.candidates import CandidateScorer
    from model_glue_nb.zoo.zoo import read_zoo
    torch.set_num_threads(1)
    zoo, suite = read_zoo("demo"), load_suite("demo")
    family = [n for n in zoo.names if n.startswith("a-")]
    probe = CandidateScorer(zoo.subset(family), suite.part("search", n))
    run = Run.start(run, dict(command="search") | probe.identity())
    probe.store = run.store
    return family, probe, suite.part("report"), run

def spent(found): return sum(t.questions for t in found.trials)

def table(a):
    "Strategy × method."
    from model_glue_nb.benchmarking.intervals import mean_interval, paired_gain
    from model_glue_nb.merging.methods import merge_methods
    from model_glue_nb.searching.search import label, search
    from model_glue_nb.searching.strategies import strategies
    family, score, report, run = rooms(a.run)
    told = score.on(report)
    rows = []
    for method in a.methods:
        for strategy in a.strategies or strategies:
            found = search(family, score, method, strategy, budget=a.budget, base="a-base", run=run)
            single = max(found.own, key=lambda m: found.own[m].mean)
            ours = told.items(found.winner)
            mean, gain = mean_interval(ours), paired_gain(ours, told.items(single))
            rows.append(dict(strategy=strategy, method=method,
                             search=found.score, report=mean.mean, low=mean.low,
                             high=mean.high, gain=gain.mean, gain_low=gain.low,
                             gain_high=gain.high, bias=found.score - mean.mean, evaluations=spent(found) / score.suite.n_questions, trials=len(found.trials),
                             seconds=sum(t.seconds for t in found.trials), best_single=single,
                             winner=found.winner if isinstance(found.winner, str) else label(found.winner)))
            print(f"{strategy:24}{method:18}{found.score:.3f}  {mean}  gain {gain}  {rows[-1]['evaluations']:.1f} evaluations {rows[-1]['seconds']:.0f} s", flush=True)
    return rows

def racing(a):
    "The race against the full evaluation of the same runners."
    from model_glue_nb.benchmarking.intervals import mean_score, paired_gain
    from model_glue_nb.searching.search import search
    family, score, report, run = rooms(a.run)
    told = score.on(report)
    rows = []
    def mean(found): return mean_score(told.items(found.winner))
    for method in a.methods:
        for seed in range(a.seeds):
            def run_it(**more):
                return search(family, score, method, "racing", budget=10**6, base="a-base",
                              run=run, seed=seed, options=dict(n=a.runners) | more)
            race, full = run_it(), run_it(shares=(1.0,))
            d = paired_gain(told.items(race.winner), told.items(full.winner))
            rows.append(dict(method=method, seed=seed, runners=a.runners,
                             race_questions=spent(race), full_questions=spent(full),
                             share=spent(race) / spent(full), race_search=race.score, full_search=full.score,
                             race_report=mean(race), full_report=mean(full), difference=d.mean,
                             low=d.low, high=d.high, same_winner=race.winner == full.winner))
            show(rows[-1])
    return rows

# Few questions: fields drawn from a pool of candidates that were asked everything once

class Replay:
    "Answers of a pool from memory, in any order of the questions."
    def __init__(self, answers, order=None): self.answers, self.order = answers, order or {}

    def key(self, c): return c if isinstance(c, str) else repr(c)

    def items(self, c, share=1.0):
        from model_glue_nb.benchmarking.few_questions import reordered
        from model_glue_nb.searching.protocol import first
        return first(reordered(self.answers[self.key(c)], self.order), share)

def two_races(field, shares, race):
    "As `racing` does it, with half of a field that is given instead of drawn around the leader."
    half = len(field) // 2
    leaders = yield from race(field[:half], shares[:-1])
    finalists = yield from race([*(c for c, _ in leaders[:1]), *field[half:]], shares)
    return finalists[0]

def replayed(replay, own, field, shares, race):
    "Questions asked, and the winner's answers, in the suite's order."
    from model_glue_nb.benchmarking.few_questions import reordered
    from model_glue_nb.searching.budgets import Budget
    from model_glue_nb.searching.conversations import drive
    from model_glue_nb.searching.executors import local
    from model_glue_nb.searching.protocol import Answer
    from model_glue_nb.searching.search import Ledger
    mine = {m: Answer(reordered(a, replay.order)) for m, a in own.items()}
    ledger = Ledger(replay, mine, Budget(), None, lambda trial: None)
    with local(replay) as evaluate: drive([(two_races(field, shares, race), ledger)], evaluate)
    return ledger.spent, ledger.winner

class PlainMean:
    "In place of a gauge: the mean of the first questions, which drops nobody but the slower part."
    order = {}
    def scores(self, answers):
        import numpy as np
        from model_glue_nb.benchmarking.intervals import mean_score
        return np.array([mean_score(x) for x in answers]), np.ones(len(answers))

def gauges(zoo_answers, earlier):
    "A gauge of the zoo, one that also knows earlier candidates, this one in the suite's order, and with the curves of other questions."
    from dataclasses import replace
    import numpy as np
    from model_glue_nb.benchmarking.few_questions import make_gauge
    everyone = [*zoo_answers, *earlier]
    zoo, known, suite = make_gauge(zoo_answers)[0], make_gauge(everyone)[0], make_gauge(everyone, "suite")[0]
    for g in (zoo, known, suite): print(g.note, g.blend, g.stretch, flush=True)
    mixed = np.random.default_rng(0).permutation(len(known.model.slopes))
    model = replace(known.model, slopes=known.model.slopes[mixed], offsets=known.model.offsets[mixed])
    return dict(zoo=zoo, earlier=known, suite=suite, shuffled=replace(known, model=model), random=PlainMean())

def irt(a):
    "Races on a handful of questions against the full evaluation of the same field."
    import numpy as np
    from model_glue_nb.benchmarking.intervals import mean_score, paired_gain
    from model_glue_nb.benchmarking.scores import ask_model
    from model_glue_nb.searching.search import search
    from model_glue_nb.searching.strategies import KEEP_BY_ESTIMATE, estimated_race
    from model_glue_nb.zoo.zoo import read_zoo
    family, score, _, run = rooms(a.run, None)
    def whole(method, seed):
        return search(family, score, method, "racing", budget=10**6, base="a-base", run=run, seed=seed,
                      options=dict(n=a.runners, shares=(1.0,)))
    trials = [t for seed in range(a.pools) for m in a.methods for t in whole(m, seed).trials if not t.failed]
    pool = list({repr(t.candidate): t.candidate for t in trials}.values())
    answers = {repr(c): score.items(c) for c in pool} | {m: score.items(m) for m in family}
    zoo_answers = [ask_model(m, score.suite, run.store) for m in read_zoo("demo")]
    own, rows = {m: answers[m] for m in family}, []
    made = gauges(zoo_answers, [answers[repr(c)] for c in pool[::len(pool) // a.earlier][:a.earlier]])
    pool = [c for i, c in enumerate(pool) if i % (len(pool) // a.earlier) or i // (len(pool) // a.earlier) >= a.earlier]
    shares = made["zoo"].shares()
    for seed in range(a.first_seed, a.first_seed + a.seeds):
        rng = np.random.default_rng(seed)
        field = [pool[i] for i in rng.permutation(len(pool))[:a.field]]
        full = max([*own, *field], key=lambda c: mean_score(answers[c if isinstance(c, str) else repr(c)]))
        best = answers[full if isinstance(full, str) else repr(full)]
        for way, g in made.items():
            replay = Replay(answers, g.order)
            spent, winner = replayed(replay, own, field, shares, lambda r, s: estimated_race(r, s, KEEP_BY_ESTIMATE, g))
            theirs = answers[replay.key(winner)]
            d = paired_gain(theirs, best)
            rows.append(dict(way=way, seed=seed, pool=len(pool), runners=len(field), questions=spent,
                             share=spent / (len(field) * score.suite.n_questions),
                             winner=mean_score(theirs), full=mean_score(best), difference=d.mean, low=d.low, high=d.high,
                             within=bool(d.high >= 0), same_winner=winner == full))
            show(rows[-1])
    return rows

def words(n, seed):
    import numpy as np
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(3, 64, n))

def candidate_room(room, n_models=4):
    "Random models of 135M parameters with a small tokenizer, and 20 questions."
    from model_glue_nb.benchmarking.suites import Question, Suite, Task
    from model_glue_nb.zoo.zoo import read_zoo, tiny_tokenizer
    names = [f"m{i}" for i in range(n_models)]
    write_models(room, SHAPES["135m"], names)
    for n in names:
        (room/n/"tokenizer.json").unlink()
        tiny_tokenizer().save_pretrained(room/n)
    tasks = tuple(Task(f"t{t}", tuple(Question(words(24, 100 * t + q), "w1") for q in range(5)), 8)
                  for t in range(4))
    return read_zoo([room/n for n in names]), Suite("random", tasks)

def written_by_mergekit(recipe, zoo, out):
    "The published way: mergekit in this process, to disk; None when it is not installed."
    try:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions
    except ImportError: return None
    models = [dict(model=str(zoo[s.model].path), parameters=dict(weight=s.weight)) for s in recipe.models]
    run_merge(MergeConfiguration.model_validate(dict(merge_method="linear", dtype="bfloat16", models=models)),
              out, options=MergeOptions(copy_tokenizer=True, quiet=True, lazy_unpickle=True))
    return out

def measured(f):
    "Seconds that pass, and processor seconds (which a busy machine changes least)."
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - wall, time.process_time() - cpu

def floor(zoo):
    "A function that moves as many bytes as a candidate does, on all processors, and computes nothing: half of them are read, half written."
    from concurrent.futures import ThreadPoolExecutor
    import numpy as np
    from model_glue_nb.tensors.streams import n_workers
    from model_glue_nb.zoo.stored import Mapped
    files, step, jobs, n = (Mapped(), 2**20, [],
                            sum(t.stop - t.start for m in zoo for t in m.tensors.values()) * (len(zoo) + 1) // len(zoo)
                            // 2)
    for m in zoo:
        x = np.frombuffer(files[next(m.path.glob("*.safetensors"))], np.uint8)
        jobs += [x[s:s + step] for s in range(0, len(x) - step, step)]
    to = np.ones(n, np.uint8)
    jobs = jobs[:n // step]
    def copy(i): to[i * step:(i + 1) * step] = jobs[i]
    def run():
        with ThreadPoolExecutor(n_workers()) as pool: list(pool.map(copy, range(len(jobs))))
    return run

def ways(zoo, score, mixes, d):
    "Seconds per candidate in memory, through a folder by our own engine, and through a folder by mergekit; in turns, in one process."
    from model_glue_nb.merging.merge import merge
    from model_glue_nb.zoo.zoo import open_model
    def ours(m): return merge(m, zoo, f"{d}/out", overwrite=True).load()
    def published(m):
        shutil.rmtree(f"{d}/kit", ignore_errors=True)
        return written_by_mergekit(m, zoo, f"{d}/kit") and open_model(f"{d}/kit").load()
    for f in (score.merged, ours, published): # first: load, look for NaN, page cache, imports
        there = f(mixes[0])
    move = floor(zoo)
    move()
    runs = dict(memory=[], floor=[], folder=[], **(dict(mergekit=[]) if there else {}))
    for m in mixes:
        runs["memory"] += [measured(lambda: score.merged(m)) for _ in range(3)]
        runs["floor"] += [measured(move) for _ in range(3)]
        runs["folder"].append(measured(lambda: ours(m)))
        if there: runs["mergekit"].append(measured(lambda: published(m)))
    return {k: [statistics.median(x) for x in zip(*v)] for k, v in runs.items()}

def candidate(a):
    "Time per candidate in memory, against writing and reloading in the same process, and what a search adds to the evaluation."
    from model_glue_nb.core import Run
    from model_glue_nb.merging.recipes import recipe
    from model_glue_nb.searching.candidates import CandidateScorer
    from model_glue_nb.searching.search import search
    from model_glue_nb.zoo.zoo import LanguageModel
    with tempfile.TemporaryDirectory() as d:
        zoo, suite = candidate_room(Path(d))
        mixes = [recipe("linear", zoo.names, [.4 + .01 * i, .3, .2, .1 - .01 * i]) for i in range(a.rounds)]
        times = ways(zoo, CandidateScorer(zoo, suite), mixes, d)
        asked, generate = [0.0], LanguageModel.generate
        def timed(self, *args):
            t = time.perf_counter()
            out = generate(self, *args)
            asked[0] += time.perf_counter() - t
            return out
        LanguageModel.generate = timed
        run = Run.start(f"{d}/run", {})
        at = []
        search(zoo.names, CandidateScorer(zoo, suite, run.store),
               "linear", "coefficient", budget=a.rounds, run=run,
               on_trial=lambda t: at.append((time.perf_counter(), asked[0])))
        n, wall, evaluating = (len(at) - 1,
                               at[-1][0] - at[0][0],
                               at[-1][1] - at[0][1]) # from the end of the first trial to the end of the last
    row = dict(models=len(zoo), params=zoo.models[0].n_params)
    for k, (wall_s, cpu_s) in times.items(): row |= {f"{k}_ms": 1000 * wall_s, f"{k}_cpu_ms": 1000 * cpu_s}
    row |= dict(over_floor=times["memory"][0] / times["floor"][0])
    for k in list(times)[2:]: row |= {f"faster_than_{k}": times[k][0] / times["memory"][0]}
    row |= dict(candidates=n, evaluation_ms=1000 * evaluating / n, overhead=(wall - evaluating) / evaluating, load=os.getloadavg()[0])
    print("\n".join(f"{k:24}{v:.3g}" if isinstance(v, float) else f"{k:24}{v}" for k, v in row.items()))
    return [row]

# Landscapes: scores by arithmetic with interactions, and the embedded zoo itself

class Landscape:
    "Questions whose chance of being answered depends on who is in a merge, how much, how far and by layers; report questions are others."
    def __init__(self, kind, seed, n=40, tasks=4):
        import numpy as np
        rng = np.random.default_rng(1000 * seed + len(kind))
        self.kind, self.n_layers = kind, 8
        k = 7 if kind == "clashes" else 12
        self.members = ["base"] + [f"m{i:02}" for i in range(1, k)]
        self.skill = rng.normal(0, .5, (k, tasks))
        self.skill[0] = -.6 # a member's pull on each task
        clash = rng.normal(0, 1, (k, k))
        self.clash = (clash + clash.T) / 2 * (rng.random((k, k)) < .5)
        self.clash = np.triu(self.clash, 1) + np.triu(self.clash, 1).T
        self.depth = rng.random((k, self.n_layers)) * (rng.random((k, self.n_layers)) < .7)
        self.depth /= self.depth.mean(1, keepdims=True)
        self.harm = rng.random((k, self.n_layers)) < (.25 if kind == "layers" else .05) # layers that fine-tuning spoilt
        self.reach = rng.uniform(.6, 1.8)
        self.hard = {s: rng.logistic(0, 1, (tasks, n if s == "search" else 2000)) for s in ("search", "report")}
        self.split = "search"

    def layers(self, members): return tuple(f"model.layers.{i}." for i in range(self.n_layers))

    def parts(self, c):
        "(members, layers) of a candidate: what of each task vector is in each layer."
        import numpy as np
        from model_glue_nb.merging.recipes import value_at
        k, L = len(self.members), self.n_layers
        if isinstance(c, str):
            out = np.zeros((k, L))
            out[self.members.index(c)] = 1
            return out
        names = [f"model.layers.{i}.x" for i in range(L)]
        w = np.array([[value_at(s.weight, n, 0) for n in names] for s in c.models], float)
        t = c.parameters.get("t")
        if t is not None:
            t = np.array([value_at(t, n, 0) for n in names])
            w = np.stack([1 - t, t])
        elif c.method in ("linear", "ties"): w = w / np.maximum(w.sum(0), 1e-9)
        inner = np.stack([self.parts(s.model) for s in c.models])
        return c.parameters.get("scale", 1.0) * (w[:, None] * inner).sum(0)

    def items(self, c, share=1.0):
        import numpy as np
        from model_glue_nb.searching.protocol import first
        p = self.parts(c)
        p[0] = 0 # the base has no task vector
        amount = (p * self.depth).mean(1)
        gain = self.skill.T @ (3 * np.tanh(1.2 * amount))
        clash = 4 * amount @ self.clash @ amount if self.kind != "layers" else amount @ self.clash @ amount
        harm = 6 * (p * self.harm * self.depth).sum(0).mean()
        far = .6 * (amount.sum() / self.reach)**2
        level = gain - abs(clash) * (clash < 0) + .5 * max(clash, 0) - harm - far
        return first({f"t{i}": (h < x).astype(float)
                      for i, (h, x) in enumerate(zip(self.hard[self.split], level))},
                     share)

def landscapes(a):
    "Every strategy under small budgets: the embedded zoo, and two landscapes over several draws."
    import numpy as np
    from model_glue_nb.benchmarking.intervals import mean_score
    from model_glue_nb.searching.search import search
    from model_glue_nb.searching.strategies import strategies
    rows, chosen = [], a.strategies or [s for s in strategies if not s.startswith("similarity")]
    def add(zoo, method, budget, strategy, seed, found, told):
        single = max(found.own, key=lambda m: found.own[m].mean)
        rows.append(dict(zoo=zoo, method=method, budget=budget,
                         strategy=strategy, seed=seed, search=found.score,
                         corrected=found.corrected, report=mean_score(told(found.winner)),
                         gain=mean_score(told(found.winner)) - mean_score(told(single)),
                         evaluations=spent(found) / sum(map(len, found.own[single].items.values()))))
    for kind in ("clashes", "layers"):
        for seed in range(a.seeds):
            for method in ("linear", "ties", "task_arithmetic"):
                for budget in a.budgets:
                    for strategy in chosen:
                        land = Landscape(kind, seed)
                        found = search(land.members, land, method, strategy, budget=budget, base="base", seed=seed)
                        land.split = "report"
                        add(kind, method, budget, strategy, seed, found, land.items)
    if a.real:
        family, score, report, run = rooms(a.run, a.questions)
        told = score.on(report.part("all", 120)).items
        for method in a.methods:
            for budget in a.budgets[:2]:
                for strategy in chosen:
                    add("embedded", method, budget, strategy, 0, search(family, score, method, strategy, budget=budget, base="a-base"), told)
                    print("embedded", method, budget, strategy, round(rows[-1]["report"], 4), flush=True)
    import pandas as pd
    t = pd.DataFrame(rows)
    mean = t.groupby(["zoo", "budget", "strategy"])[["search", "corrected", "report", "gain", "evaluations"]].mean()
    print(mean.round(4).to_string())
    return mean.reset_index().to_dict("records")

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", default="candidate", choices=["candidate", "table", "racing", "irt", "landscapes"])
    p.add_argument("--methods", nargs="*", default=["linear", "task_arithmetic", "ties"])
    p.add_argument("--strategies", nargs="*")
    p.add_argument("--budget", default=40, type=int)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--runners", type=int, default=40)
    p.add_argument("--pools", type=int, default=3, help="fields per method that are asked everything")
    p.add_argument("--first-seed", type=int, default=0, help="of the fields that are drawn")
    p.add_argument("--field", type=int, default=64, help="candidates of a search, drawn from the pool")
    p.add_argument("--earlier", type=int, default=40, help="candidates of the pool that are in no field, and that a gauge may know")
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--budgets", type=int, nargs="*", default=[10, 20, 60])
    p.add_argument("--questions", type=int, default=60)
    p.add_argument("--real", action="store_true", help="the embedded zoo too, under the two smallest budgets")
    p.add_argument("--run", default="runs/strategies")
    p.add_argument("--out", help="CSV file")
    a = p.parse_args()
    rows = dict(candidate=candidate, table=table, racing=racing, irt=irt, landscapes=landscapes)[a.what](a)
    record(rows, a.out, digits=6)

if __name__ == "__main__": main()
