"""Search: what a candidate costs in memory and on disk, what each strategy finds within a budget, and what a race saves.

    python benchmarks/search.py candidate [--rounds 12]         four random models of 135M parameters, in memory against write and reload
    python benchmarks/search.py table  [--methods linear ties …] [--strategies …] [--budget 40] --out nbs/recorded/demo_strategies.csv
    python benchmarks/search.py racing [--methods …] [--seeds 5] [--runners 40] --out nbs/recorded/demo_racing.csv

Table and racing run on the embedded zoo. Cluster: the eight members of the embedded zoo's family A. Search: 60 questions per task; report: the whole report split. Trials and answers are kept in
the run folder (`--run`), so an interrupted benchmark goes on, and seconds are those of the first time. One thread, seed 0."""
import argparse, os, shutil, statistics, tempfile, time
from pathlib import Path

from common import SHAPES, record, show, write_models

def rooms(run):
    "The family, its scorer, the report questions and the run."
    import torch
    from model_glue_nb.core import Run
    from model_glue_nb.search import CandidateScorer
    from model_glue_nb.suites import load_suite
    from model_glue_nb.zoo import read_zoo
    torch.set_num_threads(1)
    zoo, suite = read_zoo("demo"), load_suite("demo"); family = [n for n in zoo.names if n.startswith("a-")]
    probe = CandidateScorer(zoo.subset(family), suite.part("search", 60))
    run = Run.start(run, dict(command="search") | probe.identity()); probe.store = run.store
    return family, probe, suite.part("report"), run

def spent(found): return sum(t.questions for t in found.trials)

def table(a):
    "Strategy × method."
    from model_glue_nb.intervals import mean_interval, paired_gain
    from model_glue_nb.methods import merge_methods
    from model_glue_nb.search import label, search
    from model_glue_nb.strategies import strategies
    family, score, report, run = rooms(a.run); told = score.on(report); rows = []
    for method in a.methods:
        for strategy in a.strategies or strategies:
            found = search(family, score, method, strategy, a.budget, "a-base", run=run)
            single = max(found.own, key=lambda m: found.own[m].mean); ours = told.items(found.winner)
            mean, gain = mean_interval(ours), paired_gain(ours, told.items(single))
            rows.append(dict(strategy=strategy, method=method, search=found.score, report=mean.mean, low=mean.low, high=mean.high, gain=gain.mean, gain_low=gain.low,
                             gain_high=gain.high, bias=found.score - mean.mean, evaluations=spent(found) / score.suite.n_questions, trials=len(found.trials),
                             seconds=sum(t.seconds for t in found.trials), best_single=single, winner=found.winner if isinstance(found.winner, str) else label(found.winner)))
            print(f"{strategy:24}{method:18}{found.score:.3f}  {mean}  gain {gain}  {rows[-1]['evaluations']:.1f} evaluations {rows[-1]['seconds']:.0f} s", flush=True)
    return rows

def racing(a):
    "The race against the full evaluation of the same runners."
    from model_glue_nb.intervals import mean_score, paired_gain
    from model_glue_nb.search import search
    family, score, report, run = rooms(a.run); told = score.on(report); rows = []
    mean = lambda found: mean_score(told.items(found.winner))
    for method in a.methods:
        for seed in range(a.seeds):
            run_it = lambda **more: search(family, score, method, "racing", 10**6, "a-base", run=run, seed=seed, options=dict(n=a.runners) | more)
            race, full = run_it(), run_it(shares=(1.0,)); d = paired_gain(told.items(race.winner), told.items(full.winner))
            rows.append(dict(method=method, seed=seed, runners=a.runners, race_questions=spent(race), full_questions=spent(full), share=spent(race) / spent(full), race_search=race.score, full_search=full.score,
                             race_report=mean(race), full_report=mean(full), difference=d.mean, low=d.low, high=d.high, same_winner=race.winner == full.winner))
            show(rows[-1])
    return rows

def words(n, seed):
    import numpy as np
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(3, 64, n))

def candidate_room(room, n_models=4):
    "Random models of 135M parameters with a small tokenizer, and 20 questions."
    from model_glue_nb.suites import Question, Suite, Task
    from model_glue_nb.zoo import read_zoo, tiny_tokenizer
    names = [f"m{i}" for i in range(n_models)]; write_models(room, SHAPES["135m"], names)
    for n in names: (room/n/"tokenizer.json").unlink(); tiny_tokenizer().save_pretrained(room/n)
    tasks = tuple(Task(f"t{t}", tuple(Question(words(24, 100 * t + q), "w1") for q in range(5)), 8) for t in range(4))
    return read_zoo([room/n for n in names]), Suite("random", tasks)

def written_by_mergekit(recipe, zoo, out):
    "The published way: mergekit in this process, to disk; None when it is not installed."
    try:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions
    except ImportError: return None
    models = [dict(model=str(zoo[s.model].path), parameters=dict(weight=s.weight)) for s in recipe.models]
    run_merge(MergeConfiguration.model_validate(dict(merge_method="linear", dtype="bfloat16", models=models)), out, options=MergeOptions(copy_tokenizer=True, quiet=True, lazy_unpickle=True))
    return out

def measured(f):
    "Seconds that pass, and processor seconds (which a busy machine changes least)."
    wall, cpu = time.perf_counter(), time.process_time(); f()
    return time.perf_counter() - wall, time.process_time() - cpu

def floor(zoo):
    "A function that moves as many bytes as a candidate does, on all processors, and computes nothing: half of them are read, half written."
    from concurrent.futures import ThreadPoolExecutor
    import numpy as np
    from model_glue_nb.merge import Mapped
    from model_glue_nb.streams import n_workers
    files, step, jobs, n = Mapped(), 2**20, [], sum(t.stop - t.start for m in zoo for t in m.tensors.values()) * (len(zoo) + 1) // len(zoo) // 2
    for m in zoo:
        x = np.frombuffer(files[next(m.path.glob("*.safetensors"))], np.uint8)
        jobs += [x[s:s + step] for s in range(0, len(x) - step, step)]
    to = np.ones(n, np.uint8); jobs = jobs[:n // step]
    def copy(i): to[i * step:(i + 1) * step] = jobs[i]
    def run():
        with ThreadPoolExecutor(n_workers()) as pool: list(pool.map(copy, range(len(jobs))))
    return run

def ways(zoo, score, mixes, d):
    "Seconds per candidate in memory, through a folder by our own engine, and through a folder by mergekit; in turns, in one process."
    from model_glue_nb.merge import merge
    from model_glue_nb.zoo import open_model
    ours = lambda m: merge(m, zoo, f"{d}/out", overwrite=True).load()
    def published(m): shutil.rmtree(f"{d}/kit", ignore_errors=True); return written_by_mergekit(m, zoo, f"{d}/kit") and open_model(f"{d}/kit").load()
    for f in (score.made, ours, published): there = f(mixes[0]) # first: load, look for NaN, page cache, imports
    move = floor(zoo); move(); runs = dict(memory=[], floor=[], folder=[], **(dict(mergekit=[]) if there else {}))
    for m in mixes:
        runs["memory"] += [measured(lambda: score.made(m)) for _ in range(3)]; runs["floor"] += [measured(move) for _ in range(3)]; runs["folder"].append(measured(lambda: ours(m)))
        if there: runs["mergekit"].append(measured(lambda: published(m)))
    return {k: [statistics.median(x) for x in zip(*v)] for k, v in runs.items()}

def candidate(a):
    "Time per candidate in memory, against writing and reloading in the same process, and what a search adds to the evaluation."
    from model_glue_nb.core import Run
    from model_glue_nb.recipes import recipe
    from model_glue_nb.search import CandidateScorer, search
    from model_glue_nb.zoo import LanguageModel
    with tempfile.TemporaryDirectory() as d:
        zoo, suite = candidate_room(Path(d)); mixes = [recipe("linear", zoo.names, [.4 + .01 * i, .3, .2, .1 - .01 * i]) for i in range(a.rounds)]
        times = ways(zoo, CandidateScorer(zoo, suite), mixes, d); asked, generate = [0.0], LanguageModel.generate
        def timed(self, *args): t = time.perf_counter(); out = generate(self, *args); asked[0] += time.perf_counter() - t; return out
        LanguageModel.generate = timed; run = Run.start(f"{d}/run", {}); at = []
        search(zoo.names, CandidateScorer(zoo, suite, run.store), "linear", "coefficient", a.rounds, run=run, on_trial=lambda t: at.append((time.perf_counter(), asked[0])))
        n, wall, evaluating = len(at) - 1, at[-1][0] - at[0][0], at[-1][1] - at[0][1] # from the end of the first trial to the end of the last
    row = dict(models=len(zoo), params=zoo.models[0].n_params)
    for k, (wall_s, cpu_s) in times.items(): row |= {f"{k}_ms": 1000 * wall_s, f"{k}_cpu_ms": 1000 * cpu_s}
    row |= dict(over_floor=times["memory"][0] / times["floor"][0])
    for k in list(times)[2:]: row |= {f"faster_than_{k}": times[k][0] / times["memory"][0]}
    row |= dict(candidates=n, evaluation_ms=1000 * evaluating / n, overhead=(wall - evaluating) / evaluating, load=os.getloadavg()[0])
    print("\n".join(f"{k:24}{v:.3g}" if isinstance(v, float) else f"{k:24}{v}" for k, v in row.items()))
    return [row]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", default="candidate", choices=["candidate", "table", "racing"]); p.add_argument("--methods", nargs="*", default=["linear", "task_arithmetic", "ties"])
    p.add_argument("--strategies", nargs="*"); p.add_argument("--budget", default=40, type=int); p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--runners", type=int, default=40); p.add_argument("--rounds", type=int, default=12); p.add_argument("--run", default="runs/strategies"); p.add_argument("--out", help="CSV file"); a = p.parse_args()
    rows = dict(candidate=candidate, table=table, racing=racing)[a.what](a)
    record(rows, a.out, digits=6)

if __name__ == "__main__": main()
