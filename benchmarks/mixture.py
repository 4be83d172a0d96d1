"""Mixtures: tokens per second against one of their experts alone, and building one against copying its bytes.

    python benchmarks/mixture.py [--shape 135m] [--rounds 3] [--prompt 128] [--new 128] [--threads 2] [--out FILE.csv]

Random weights of a real shape, bf16 in the file, float32 in memory, cached greedy generation. Model-level and block-level mixtures route
samples, the FFN-level one routes tokens (top 1), all by hash. Half of a larger batch goes to either expert of the model-level mixture; beside one expert
with the whole batch it is measured against each expert with its own half, which is the work that has to be done. Sides take turns, for the
machine is not equally fast all the time; medians, ratios are medians of the rounds' ratios; the load is recorded."""
import argparse, os, shutil, statistics, tempfile, time
from pathlib import Path

from common import SHAPES, record, show, write_models

def generation(models, prompt, new, batch, rounds):
    "Name → seconds of cached generations; the models take turns. `halves`: each expert alone with the rows that go to it."
    import torch
    ids = torch.randint(0, 400, (64, prompt), generator=torch.Generator().manual_seed(0))
    route = models["model"].route(ids)["model"][:, 0]
    ids = torch.stack([ids[route == i % 2][i // 2] for i in range(batch)]) # in turns to the one and the other
    def answer(m, x):
        m.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    sides = {n: lambda m=m: answer(m, ids) for n, m in models.items() if n != "other"}
    if batch > 1:
        sides["halves"] = lambda: [answer(models[n], ids[i::2]) for i, n in enumerate(("dense", "other"))]
    took = {n: [] for n in sides}
    for i in range(rounds + 1): # the first warms up
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if i: took[name].append(time.perf_counter() - start)
    return took

def building(room, spec, rounds):
    "Seconds of writing a mixture, and of copying its bytes, in turns."
    from model_glue_nb.mixing.mixture import mix
    ours, copy = [], []
    for i in range(rounds + 1):
        start = time.perf_counter()
        mix(spec, None, room/"built")
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        shutil.copytree(room/"built", room/"copied")
        copy.append(time.perf_counter() - start)
        for n in ("built", "copied"): shutil.rmtree(room/n)
    return ours[1:], copy[1:]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="135m", choices=SHAPES)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--batches", nargs="*", type=int, default=[1, 4])
    p.add_argument("--prompt", type=int, default=128)
    p.add_argument("--new", type=int, default=128)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--out", help="CSV file")
    a = p.parse_args()
    import torch
    from transformers import AutoModelForCausalLM
    from model_glue_nb.mixing import modeling # registers our class
    from model_glue_nb.mixing.mixture import mix
    from model_glue_nb.mixing.spec import MixtureSpec
    torch.set_num_threads(a.threads)
    rows = []
    def tell(what, ours, reference, tokens=None):
        mid = statistics.median
        row = dict(what=what, ours_s=mid(ours), reference_s=mid(reference),
                   ratio=mid(x / y for x, y in zip(ours, reference)))
        row |= (dict(tokens_per_s=tokens / row["ours_s"]) if tokens else {}) | dict(shape=a.shape, load=os.getloadavg()[0])
        rows.append(row)
        show(row)
    with tempfile.TemporaryDirectory() as d:
        room = Path(d)
        write_models(room, SHAPES[a.shape])
        def spec(level, **more):
            return MixtureSpec(experts=(str(room/"a"), str(room/"b")),
                               base=str(room/"base"), level=level, router=dict(name="random"), **more)
        specs = dict(model=spec("model"), block=spec("block"), ffn=spec("ffn", input="token"))
        for name, s in specs.items():
            tell(f"build {name}", *building(room, s, a.rounds))
        def load(path): return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        models = (dict(dense=load(room/"a"), other=load(room/"b"))
                  | {n: load(mix(s, None, room/n).path) for n, s in specs.items()})
        for batch in a.batches:
            t = generation(models, a.prompt, a.new, batch, a.rounds)
            for n in specs: tell(f"generate {n}, batch {batch}", t[n], t["dense"], batch * a.new)
            if batch > 1:
                tell(f"generate model, batch {batch}, each expert with its half", t["model"], t["halves"], batch * a.new)
    record(rows, a.out)

if __name__ == "__main__": main()
