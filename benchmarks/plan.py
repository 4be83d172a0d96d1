"""What a plan predicts of each stage, against what the stage takes: seconds, peak memory, bytes read and written, over sizes and numbers of models.

    python benchmarks/plan.py [--shapes 1m 9m 36m] [--models 2 4 8] [--out nbs/recorded/plan_benchmark.csv]

Random models of one shape, files in the page cache. Seconds are those of one core (a busy machine changes them little), without imports and after a small
warm-up. Each stage runs in a fork of one process that has everything imported; memory is what it takes above that process, at its peak, of anonymous
pages, and the prediction is without the process, too. The machine's rates are measured once, before. The constants of `merging.costs` (a stage's start,
a model's share of the speed of products, buffers, what loading holds) were set after trial runs on 1m and 36m; 9m had not been looked at. `ratio` is
measured / predicted: 2 means that it took twice as much. The last rows are predictions alone, of zoos that do not fit here, with what limits them."""
import argparse, ctypes, os, random, sys, tempfile, time, traceback
from dataclasses import asdict, replace
from pathlib import Path

from common import SHAPES, anonymous, record, show, tensors, write_models
from model_glue_nb.benchmarking.scores import ask_model
from model_glue_nb.benchmarking.suites import Question, Suite, Task
from model_glue_nb.checkpoints.recorded import recorded
from model_glue_nb.mergeability.similarity import compare_zoo
from model_glue_nb.merging.costs import PlanSettings, measure_rates, process_bytes, stage_costs, zoo_size
from model_glue_nb.merging.differences import extract
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.searching.candidates import CandidateScorer
from model_glue_nb.searching.search import search
from model_glue_nb.zoo.zoo import read_zoo, tiny_tokenizer

SHAPES = SHAPES | {"1m": dict(hidden=128, inner=352, layers=4, heads=4, kv=4, vocab=1024, tied=True),
                   "9m": dict(hidden=320, inner=864, layers=6, heads=5, kv=5, vocab=4096, tied=True),
                   "36m": dict(hidden=512, inner=1376, layers=10, heads=8, kv=8, vocab=8192, tied=True)}
QUESTIONS, WORDS, EVALUATIONS, RANK = 8, 100, 4, 16 # a word and its space are four characters, as the plan counts a token

def questions():
    rng = random.Random(0)
    def prompt(): return "".join(f"w{rng.randrange(10, 100)} " for _ in range(WORDS))
    return Suite("words", (Task("words", tuple(Question(prompt(), "w11") for _ in range(QUESTIONS)), 1),))

def score(zoo, out):
    for m in zoo: ask_model(m, questions())
    return sum(m.n_bytes for m in zoo)

def similarity(zoo, out): return compare_zoo(zoo, ("column_cosine",), {}).n_read

def search_merges(zoo, out):
    "Members are scored before: a search begins when they are known."
    scorer = CandidateScorer(zoo, questions())
    return lambda: len(search(zoo.names, scorer, "linear", "evolution", budget=EVALUATIONS).trials)

def merge_all(zoo, out):
    merge(recipe("linear", zoo.names), zoo, out)
    return sum(m.n_bytes for m in zoo)

def extract_one(zoo, out):
    extract(zoo.models[1], zoo.models[0], out, rank=RANK)
    return 2 * zoo.models[0].n_bytes

def mix_all(zoo, out):
    mix(MixtureSpec(tuple(zoo.names[1:]), dict(name="random"), level="ffn", base=zoo.names[0]), zoo, out, verify=False)
    return 0

STAGES = dict(score=score, similarity=similarity, search=search_merges, merge=merge_all, extract=extract_one, mix=mix_all)

def forked(work, *args):
    "What a stage takes in a fork: seconds of one core, peak bytes above this process, what it returns."
    ctypes.CDLL(None).malloc_trim(0) # what is free here would be used there, uncounted
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            began, found = time.process_time(), work(*args)
            if callable(found): began, found = time.process_time(), found()
            os.write(write, f"{time.process_time() - began} {found}".encode())
        except BaseException: traceback.print_exc()
        os._exit(0)
    own, peak = anonymous(os.getpid()), 0
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        peak = max(peak, anonymous(pid))
        time.sleep(.005)
    os.close(write)
    text = os.read(read, 1000).decode()
    os.close(read)
    if not text: sys.exit("A stage failed.")
    seconds, found = map(float, text.split())
    return seconds, max(peak - own, 0), found

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="*", default=["1m", "9m", "36m"], choices=SHAPES)
    p.add_argument("--models", nargs="*", type=int, default=[2, 4, 8])
    p.add_argument("--stages", nargs="*", default=list(STAGES), choices=STAGES)
    p.add_argument("--out", help="CSV file")
    a = p.parse_args()
    rows, rates = [], measure_rates()
    show(asdict(rates))
    with tempfile.TemporaryDirectory() as d:
        small = Path(d)
        zoo = models(small, SHAPES["tiny"], ["a", "b"])
        for stage in a.stages: # imports and compiled kernels
            with tempfile.TemporaryDirectory(dir=d) as out:
                found = STAGES[stage](zoo, Path(out)/"made")
                if callable(found): found()
    for shape in a.shapes:
        with tempfile.TemporaryDirectory() as d:
            zoo = models(Path(d), SHAPES[shape], [f"m{i}" for i in range(max(a.models))])
            for n in a.models:
                for stage in a.stages:
                    rows.append(measured(Path(d), shape, zoo.subset(zoo.names[:n]), stage, rates))
                    show(rows[-1])
                    record(rows + far(rates), a.out) # whatever comes, it is kept
    record(rows + far(rates), a.out)

def models(folder, shape, names):
    "Random models, with a tokenizer for which a word is a token."
    write_models(folder, shape, names)
    for n in names: tiny_tokenizer(512).save_pretrained(folder/n)
    return read_zoo([folder/n for n in names])

def measured(folder, shape, zoo, stage, rates):
    "One stage on some models: predicted and measured."
    size = zoo_size([tensors(SHAPES[shape])] * len(zoo), [m.n_bytes for m in zoo])
    how = PlanSettings(QUESTIONS * (4 * WORDS + 4), EVALUATIONS, rank=RANK, experts=len(zoo) - 1)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        took, memory, found = forked(STAGES[stage], zoo, Path(out)/"made")
        written = sum(f.stat().st_size for f in Path(out).rglob("*.safetensors"))
    if stage == "search": how = replace(how, evaluations=found)
    cost = next(c for c in stage_costs(size, rates, how) if c.stage == stage)
    row = dict(shape=shape, n=len(zoo), params=size.params, stage=stage,
               predicted_s=cost.compute, measured_s=took, ratio_s=took / max(cost.compute, 1e-9))
    growth = cost.memory - process_bytes(stage)
    row |= dict(predicted_mb=growth / 1e6, measured_mb=memory / 1e6, ratio_mb=memory / growth)
    read = found if stage in ("score", "similarity", "merge", "extract") else float("nan")
    row |= dict(predicted_read_mb=cost.reads / 1e6, measured_read_mb=read / 1e6)
    row |= dict(predicted_written_mb=cost.writes / 1e6, measured_written_mb=written / 1e6, bound=cost.bound(rates))
    return row | dict(load=os.getloadavg()[0])

def far(rates):
    "What is predicted for zoos that do not fit here: 200 questions of 2,000 characters, 200 evaluations."
    seven, seventy = recorded("teknium/OpenHermes-7B"), recorded("migtissera/Synthia-70B-v1.2")
    how = PlanSettings(characters=200 * 2000, evaluations=200)
    rows = []
    for n, model, name in ((12, seven, "7b"), (100, seven, "7b"), (4, seventy, "70b")):
        size = zoo_size([model.shapes] * n, [model.n_bytes] * n)
        for cost in stage_costs(size, rates, how):
            rows.append(dict(shape=name, n=n, params=size.params, stage=cost.stage, predicted_s=cost.compute, predicted_mb=(cost.memory - process_bytes(cost.stage)) / 1e6,
                             predicted_read_mb=cost.reads / 1e6, predicted_written_mb=cost.writes / 1e6, bound=cost.bound(rates)))
    return rows

if __name__ == "__main__": main()
