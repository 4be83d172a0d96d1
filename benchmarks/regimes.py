"""Which regime small zoos are in, and what their merges score without a question asked: made from the embedded zoo.

    python benchmarks/regimes.py members --out runs/regimes      # writes the members: two more fine-tunes, copies, sums, spoilt ones
    python benchmarks/regimes.py merges --out runs/regimes       # scores their merges, some minutes of a processor
    python benchmarks/regimes.py tables --out runs/regimes       # what the test says, beside the scores
    python benchmarks/regimes.py embedded --out runs/regimes     # its first picks for family A, on all report questions
    python benchmarks/regimes.py run --out runs/smollm2          # its first picks for that finished run's models

Scores are exact match on report questions of the family's skills, the same 12 of each for all."""
import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from model_glue_nb.benchmarking.harness import few_threads
from model_glue_nb.benchmarking.intervals import mean_interval, mean_score
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.checkpoints.tensor_names import LAYER
from model_glue_nb.core import Store, atomic_path, silent
from model_glue_nb.gluing.recipe import begin, read_recipe
from model_glue_nb.mergeability.similarity import compared_weights
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.merging.regime import forgotten, zoo_regime
from model_glue_nb.searching.candidates import CandidateScorer
from model_glue_nb.zoo.writer import CheckpointWriter, copy_companions
from model_glue_nb.zoo.zoo import Zoo, demo_zoo_path, read_zoo
from model_glue_nb.zoos.demo import _load, _train

SKILLS = dict(a="reverse sort shift double rotate".split(), b="skip swap shift".split(), c="expand complement".split())
METHODS = dict(linear=False, tsv_m=True, regmean=False, iso_c=True) # Does it need the base?
N_QUESTIONS = 12

def trained(name, seed, out):
    "One more fine-tune of `a-base` for sorting, as the embedded one was trained, for half as long."
    import torch
    if (out/name).exists(): return
    model, tokenizer = _load(demo_zoo_path()/"a-base")
    _train(model, tokenizer, "sort", 160, 5e-4, fraction=.15, seed=seed)
    with atomic_path(out/name) as tmp:
        model.to(torch.bfloat16).save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        Path(tmp/"README.md").write_text("---\nbase_model: a-base\n---\n")

def noisy(part):
    "The task vector with noise of `part` times its length in every weight."
    def change(k, d, x, rng):
        noise = rng.standard_normal(d.shape)
        return d + part * np.linalg.norm(d) / np.linalg.norm(noise) * noise
    return change

def scaled(factor): return lambda k, d, x, rng: factor * d

def holes(k, d, x, rng):
    "Half of the weights themselves are zero."
    return np.where(rng.random(d.shape) < .5, d, -x)

def one_layer(k, d, x, rng):
    "Noise of five times the change, in layer 1 alone."
    return noisy(5)(k, d, x, rng) if ".layers.1." in k else d

# Name → (base, {member: share of its task vector}, what is done to the sum)
def copies():
    "Members that learned the same as another."
    out = {f"reverse~{i}": ("a-base", {"a-reverse": 1}, noisy(.3)) for i in (1, 2, 3)}
    out |= {f"rotate~{i}": ("a-base", {"a-rotate": 1}, noisy(.4)) for i in (1, 2)}
    out |= {f"skip~{i}": ("b-base", {"b-skip": 1}, noisy(.3)) for i in (1, 2)}
    out |= {f"shift@{x}": ("a-base", {"a-shift": x}, None) for x in (.7, 1.3)}
    return out | {"sort~mean": ("a-base", {"a-sort": .5, "sort-2": .5}, None)}

def sums():
    "Members that learned what two others did."
    ring = ["double", "reverse", "rotate", "shift", "sort", "double"]
    out = {f"{x}&{y}": ("a-base", {f"a-{x}": .8, f"a-{y}": .8}, None) for x, y in zip(ring, ring[1:])}
    return out | {"skip&swap": ("b-base", {"b-skip": .8, "b-swap": .8}, None)}

def spoilt():
    "Members that would spoil a merge, by how they were made."
    return {"noise-sort": ("a-base", {"a-sort": 1}, noisy(1.5)), "noise-double": ("a-base", {"a-double": 1}, noisy(3)),
            "flip-rotate": ("a-base", {"a-rotate": -1}, None), "flip-shift": ("a-base", {"a-shift": -1}, None),
            "x4-reverse": ("a-base", {"a-reverse": 4}, None), "x3-double": ("a-base", {"a-double": 3}, None),
            "x4-skip": ("b-base", {"b-skip": 4}, None), "noise-swap": ("b-base", {"b-swap": 1}, noisy(2)),
            "holes-rotate": ("a-base", {"a-rotate": 1}, holes), "layer-shift": ("a-base", {"a-shift": 1}, one_layer),
            "foreign-skip": ("a-base", {"b-skip": 1}, None), "foreign-swap": ("a-base", {"b-swap": 1}, None)}

def write_member(name, zoo, base, shares, change, out):
    "A copy of a base with made-up task vectors in attention and MLP; the rest is the first member's."
    if (out/name).exists(): return
    rng, lead = np.random.default_rng(sum(map(ord, name))), zoo[base]
    own = next((m for m in shares if m[0] == base[0] and shares[m] > 0), base) if change != "permuted" else "a-sort"
    with atomic_path(out/name) as tmp:
        tmp = Path(tmp)
        tmp.mkdir()
        copy_companions(lead.path, tmp)
        (tmp/"README.md").write_text(f"---\nbase_model: {base}\n---\n")
        writer = CheckpointWriter(tmp, {k: ("F32", t.shape) for k, t in lead.tensors.items()})
        weights = set(compared_weights(lead))
        for k in lead.tensors:
            x = lead.values(k).astype(np.float64)
            if k in weights:
                d = sum(s * (zoo[m].values(k) - zoo[zoo[m].base or base].values(k).astype(np.float64)) for m, s in shares.items())
                y = zoo["a-sort"].values(turned(k)) if change == "permuted" else x + (change(k, d, x, rng) if change else d)
            else: y = zoo[own].values(k)
            writer.write(k, np.ascontiguousarray(y, np.float32).view(np.uint32))
        writer.close()

def turned(k):
    "The same weight of the next layer."
    m = LAYER.match(k)
    return f"{m[1]}{(int(m[2]) + 1) % 3}{k[m.end(2):]}"

def everyone(out):
    "All models by name."
    demo = read_zoo("demo")
    made = [m for m in read_zoo(out/"members")] if (out/"members").exists() else []
    return Zoo(tuple(demo) + tuple(made))

def members(out):
    "Write what the embedded zoo lacks."
    out = out/"members"
    out.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(("sort-2", "sort-3")): trained(name, 700 + 10 * i, out)
    zoo = Zoo(tuple(read_zoo("demo")) + tuple(read_zoo(out).subset(["sort-2", "sort-3"])))
    for name, (base, shares, change) in (copies() | sums() | spoilt()).items():
        write_member(name, zoo, base, shares, change, out)
    write_member("permuted-sort", zoo, "a-base", {"a-sort": 1}, "permuted", out)

A = [f"a-{s}" for s in ("double", "reverse", "rotate", "shift", "sort")]
B = ["b-skip", "b-swap", "b-shift"]
ZOOS = dict(
    one_skill=["a-sort sort-2 sort-3", "a-sort sort-2", "sort-2 sort-3", "a-reverse reverse~1 reverse~2 reverse~3",
               "a-rotate rotate~1 rotate~2", "a-shift shift@0.7 shift@1.3", "sort-2 sort-3 sort~mean", "b-skip skip~1 skip~2"],
    overlapping_skills=["double&reverse reverse&rotate rotate&shift", "double&reverse reverse&rotate rotate&shift shift&sort sort&double",
                 "a-sort a-shift shift&sort", "a-sort sort-2 a-double a-reverse", "a-sort sort-3 a-double a-shift",
                 "a-double a-rotate double&reverse", "reverse~1 reverse~2 a-sort sort-2", "b-skip b-swap skip&swap"],
    separated_skills=[" ".join(A), "a-double a-reverse", "a-rotate a-shift a-sort", "a-reverse a-shift sort-2",
               "a-double a-rotate a-shift a-sort", " ".join(B), "c-expand c-complement", "a-rotate a-sort"],
    strangers=["a-double a-sort b-skip b-swap", " ".join([*A, "b-shift"]), "a-rotate b-swap", " ".join([*B, "a-reverse", "a-shift"]),
               "a-sort a-shift c-expand c-complement", "a-double b-skip c-expand"],
    some_spoilt=[" ".join([*A, "a-hot-double", "a-hot-sort"]), "a-sort a-rotate a-shift a-hot-double",
                 "a-double a-reverse a-shift noise-sort", "a-reverse a-rotate a-shift noise-double",
                 "a-double a-sort a-shift flip-rotate", " ".join([*A, "flip-shift"]),
                 "a-sort a-rotate a-double x4-reverse", "a-sort sort-2 sort-3 x3-double",
                 "a-double a-reverse a-rotate permuted-sort", "a-sort a-shift a-reverse holes-rotate",
                 "a-double a-rotate a-sort foreign-skip", "a-double a-reverse a-shift a-sort foreign-swap",
                 "a-reverse a-rotate a-sort layer-shift", "double&reverse reverse&rotate rotate&shift noise-sort",
                 " ".join([*B, "x4-skip"]), "a-reverse reverse~1 reverse~2 foreign-swap", "b-skip b-shift noise-swap", "a-double a-sort noise-double"])

def is_sound(name): return name not in spoilt() and "hot" not in name and name != "permuted-sort"

def base_of(names, zoo): return zoo[names[0]].base

def own_texts(zoo, suite, names):
    "Texts of what each member was trained for, as a user has them; of all skills where that is unknown."
    texts = {t.name: [f"{q.prompt} {q.answer}" for q in t.questions] for t in suite.tasks}
    def of(name):
        own = [s for s in texts if s in name]
        return sum((texts[s] for s in own or texts), [])[:24]
    return {n: of(n) for n in names}

def zoos():
    "Kind, half and members of every zoo; within a kind they go to the two halves by turns."
    return [(kind, ("fit", "held out")[i % 2], names.split()) for kind, rows in ZOOS.items() for i, names in enumerate(rows)]

def merges(out):
    "Score members and merges; what is known is not asked again."
    zoo, suite, store = everyone(out), load_suite("demo"), Store(out/"store.sqlite")
    few_threads(zoo)
    rows = [names for kind, _, names in zoos() if kind != "strangers"]
    for methods in (list(METHODS)[:3], METHODS): # the cheapest of the last first
        for names in sorted(rows, key=len):
            scorer = scorer_of(zoo, suite, store, names)
            for m in names: scorer.items(m)
            for who in sets_of(names):
                made = recipes_of(zoo, suite, who)
                for method in methods: scorer.items(made[method])
            print(*names, file=sys.stderr, flush=True)

def scorer_of(zoo, suite, store, names):
    "Asks 12 report questions of each skill of the family."
    family = suite.only(SKILLS[base_of(names, zoo)[0]])
    return CandidateScorer(zoo, family.part("report", N_QUESTIONS), store)

def sets_of(names):
    "All members, and those that are not spoilt."
    sound = [n for n in names if is_sound(n)]
    return [names] if sound == names else [names, sound]

def recipes_of(zoo, suite, names):
    "A merge per method, at its defaults."
    texts, base = own_texts(zoo, suite.part("search", 24), names), base_of(names, zoo)
    def options(m): return dict(prompts=texts) if m == "regmean" else {}
    return {m: recipe(m, names, base=base if needs else None, options=options(m)) for m, needs in METHODS.items()}

def regimes(out):
    "What the test says of every zoo; features of every member."
    zoo, rows, features = everyone(out), [], []
    for i, (kind, half, names) in enumerate(zoos()):
        found = zoo_regime(zoo.subset(list(dict.fromkeys([*(zoo[n].base for n in names), *names]))))
        spoilt_here = [n for n in names if not is_sound(n)]
        rows.append(dict(zoo=i, half=half, kind=kind.replace("_", " "), members=" ".join(names), spoilt=" ".join(spoilt_here),
                         found=found.kind, within=found.within, found_spoilt=" ".join(found.spoilt), merged=" ".join(found.members),
                         **dict(zip(("lowest_cosine", "highest_cosine"), found.cosines))))
        for f in found.families or [found]:
            if f.features is None: continue
            features += [dict(zoo=i, half=half, member=m, sound=is_sound(m), **x) for m, x in f.features.iterrows()]
        print(i, found, file=sys.stderr, flush=True)
    return pd.DataFrame(rows), pd.DataFrame(features)

def scored(out, table):
    "What singles, merges and picks score; merges of all members, of the sound ones, of those that the test keeps."
    zoo, suite, store = everyone(out), load_suite("demo"), Store(out/"store.sqlite")
    few_threads(zoo)
    for row in table.to_dict("records"):
        if row["kind"] == "strangers": continue
        names = row["members"].split()
        scorer = scorer_of(zoo, suite, store, names)
        sets = dict(all=names, sound=[n for n in names if is_sound(n)], kept=row["merged"].split())
        singles = {m: mean_score(scorer.items(m)) for m in names}
        row["single"] = max(singles.values())
        for which, who in sets.items():
            if len(who) < 2: continue
            for m, r in recipes_of(zoo, suite, who).items(): row[f"{m} {which}"] = mean_score(scorer.items(r))
        row |= forgotten_by(zoo, suite, row["merged"].split())
        print(row, file=sys.stderr, flush=True)
        yield row

def forgotten_by(zoo, suite, names):
    "What each merge loses of its members' predictions on texts of their own skills."
    if len(names) < 2: return {}
    made = recipes_of(zoo, suite, names)
    texts = own_texts(zoo, suite.part("search", 24), names)
    return dict(zip((f"{m} forgotten" for m in made), forgotten(zoo, list(made.values()), names, base_of(names, zoo), texts)))

def embedded(out):
    "What the first picks for family A of the embedded zoo score on all report questions, texts of the members' own skills given."
    zoo, suite = read_zoo("demo"), load_suite("demo")
    few_threads(zoo)
    family = zoo.subset([n for n in zoo.names if n.startswith("a-")])
    texts = own_texts(family, suite.part("search", 24), [n for n in family.names if n != "a-base"])
    found = zoo_regime(family, prompts=texts, probe=True)
    scorer = CandidateScorer(family, suite.part("report"), Store(out/"store.sqlite"))
    for r, lost in zip(found.picks, found.forgotten):
        x = mean_interval(scorer.items(r))
        yield dict(found=found.kind, within=found.within, left_out=" ".join(found.spoilt), method=r.method, forgotten=lost, mean=x.mean, low=x.low, high=x.high)

def of_run(run):
    "What the first picks for the models of a finished run score on its search and report questions: from weights, and by a probe on questions without answers."
    work = begin(read_recipe(run/"recipe.yaml"), run, silent)
    models = work.zoo.subset(work.singles)
    order = [r.method for r in zoo_regime(models).picks]
    found = zoo_regime(models, prompts=[q.prompt for t in work.search.tasks for q in t.questions], probe=True)
    for r, lost in zip(found.picks, found.forgotten):
        by_split = {k: CandidateScorer(models, part, work.run.store).items(r) for k, part in (("search", work.search), ("report", work.report))}
        x = mean_interval(by_split["report"])
        by_weights = order.index(r.method) + 1 if r.method in order else ""
        yield dict(found=found.kind, method=r.method, by_weights=by_weights, forgotten=lost, search=mean_score(by_split["search"]), mean=x.mean, low=x.low, high=x.high)

def write(rows, name, what, out="runs/regimes"):
    "A recorded table, with its command."
    file = Path("nbs/recorded")/f"{name}.csv"
    text = pd.DataFrame(rows).to_csv(index=False, float_format="%.4g")
    file.write_text(f"# python benchmarks/regimes.py {what} --out {out}\n{text}")

def tables(out):
    "Record what was found and scored."
    table, features = regimes(out)
    write(features, "regime_features", "tables")
    write(list(scored(out, table)) + [r for r in table.to_dict("records") if r["kind"] == "strangers"], "regimes", "tables")

def embedded_table(out): write(list(embedded(out)), "regime_embedded", "embedded")

def run_table(run): write(list(of_run(run)), f"regime_{run.name.replace('-', '_')}", "run", run)

if __name__ == "__main__":
    commands = dict(members=members, merges=merges, tables=tables, embedded=embedded_table, run=run_table)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=commands)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    commands[args.what](args.out)
