"The benchmark: resumed after a kill, nothing paid for twice, honest columns, tables that agree, faults that say what to do."
import os, re, signal, sqlite3, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from forked import command

from model_glue_nb.benchmarking.intervals import mean_score
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.core import InputError, Run
from model_glue_nb.experiments import bench as module
from model_glue_nb.experiments.bench import bench, open_bench, row_of
from model_glue_nb.experiments.grids import Cell, Grid, check_grid, read_grid
from model_glue_nb.experiments.tables import claims, latex, laid_out, markdown, tidy
from model_glue_nb.zoo.zoo import demo_zoo_path, read_zoo, tiny_zoo

root = Path(__file__).resolve().parents[1]
TABLES = [f"{n}.{end}" for n in ("merging", "mixture") for end in ("csv", "md", "tex")] + ["claims.csv", "claims.md", "claims.tex", "controls.csv"]
COSTS = "seconds cpu_s peak_bytes joules ms_per_question".split() # what a second run may measure differently
GRID = replace(read_grid("tiny"), tasks=["reverse", "sort"], search_questions=6, report_questions=12)

def members(*names): return [str(demo_zoo_path()/n) for n in names]
ZOO = members("a-base", "a-sort", "a-reverse", "a-shift", "b-base", "b-skip")

@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return bench(GRID, ZOO, tmp_path_factory.mktemp("bench")/"run", workers=1)

def figures(run, name): return run.read_table(name).drop(columns=COSTS, errors="ignore")

def test_every_cell_has_its_row(undisturbed):
    merging, mixture = undisturbed.read_table("merging"), undisturbed.read_table("mixture")
    assert set(merging.set) == {"a-base: 2", "a-base: 3", "across"} and set(mixture.set) == {"one cluster", "across"}
    searched = merging[~merging.strategy.isin(["single", "uniform"])]
    assert len(searched) == 2 * 1 * 2 and (searched.evaluations <= 4).all() and (searched.bytes > 0).all()
    assert (mixture.router.notna()).sum() == 2 * 2 * 1 + 2
    for t in (merging, mixture):
        assert "failed" not in t and t.n.eq(24).all() and t.joules.isna().all() == (not module.joules())
        assert ((t.low <= t.score) & (t.score <= t.high) & (t.gain_low <= t.gain)
                & (t.gain <= t.gain_high)).all()
        assert (t.gain[t.strategy == "single"] == 0).all()
        assert (abs(t[["reverse", "sort"]].mean(axis=1) - t.score) < 1e-5).all()

def test_rivals_are_those_of_the_set(undisturbed):
    t = undisturbed.read_table("merging")
    for r in t.to_dict("records"):
        same = t[t.set == r["set"]]
        single = same[same.strategy == "single"].score.item()
        assert abs(r["score"] - single - r["gain"]) < 1e-5
        if r["strategy"] not in ("single", "uniform"):
            rival = same[(same.method == r["method"]) & (same.strategy == "uniform")].score.item()
            assert abs(r["score"] - rival - r["over_uniform"]) < 1e-5

def test_chosen_on_search_told_on_report(undisturbed):
    b = open_bench(GRID, ZOO)
    asked, told = ({q.key for t in s.tasks for q in t.questions} for s in (b.work.search, b.work.report))
    assert not asked & told and len(asked) == 12 and len(told) == 24
    assert undisturbed.read_json("split") == load_suite("demo").only(GRID.tasks).split_record()

def test_a_router_is_judged_by_questions_it_did_not_learn_from(undisturbed, tmp_path, monkeypatch):
    b = open_bench(replace(GRID, search_questions=30), ZOO)
    b.work.run = Run.start(tmp_path/"run", {})
    experts = "a-reverse", "a-sort"
    items = {e: b.scorer.items(e) for e in experts}
    learned, asked = [], []
    def keys(suite): return {q.key for t in suite.tasks for q in t.questions}
    def mix(spec, zoo, out, suite, *, items, **more):
        assert all(list(map(len, x.values())) == [len(t.questions) for t in suite.tasks] for x in items.values())
        learned.append(keys(suite))
        return real_mix(spec, zoo, out, suite, items=items, **more)
    def ask(live, mark, suite, store):
        asked.append(keys(suite))
        return real_ask(live, mark, suite, store)
    real_mix, real_ask = module.mix, module.ask
    monkeypatch.setattr(module, "mix", mix)
    monkeypatch.setattr(module, "ask", ask)
    def spec(**router): return module.MixtureSpec(experts, router, "model", prompt_encoder="a-reverse")
    unseen = module.unseen_score(b, spec(name="knn", k=1), f"{tmp_path}/part", items)
    assert ([x | y for x, y in zip(learned, asked)] == 3 * [keys(b.work.search)]
            and not any(x & y for x, y in zip(learned, asked)))
    assert sum(map(len, asked)) == len(set.union(*asked)) == 60
    model = mix(spec(name="knn", k=1), b.work.zoo, f"{tmp_path}/whole", b.work.search, items=items)
    assert unseen < mean_score(real_ask(model.load, model.fingerprint(), b.work.search, b.work.run.store)), "learned by heart"
    assert module.unseen_score(b, spec(name="random"), f"{tmp_path}/part", items) is None

def test_the_three_forms_agree(undisturbed):
    for name in ("merging", "mixture"):
        t = undisturbed.read_table(name)
        md, tex = ((undisturbed.path/f"{name}.{e}").read_text() for e in ("md", "tex"))
        assert md.count("\n|") == len(t) + 2 and tex.count(r" \\") == len(t) + 1
        for x in t.score: assert f"{100 * x:.1f}" in md and f"{100 * x:.1f}" in tex
        assert (tex.count(r"\begin{") == tex.count(r"\end{") == 1
                and not re.search(r"(?<!\\)[%&_](?=\w)", tex.split("head")[1].replace(" & ", "")))

def test_claims_of_a_gain_are_tried_against_controls(undisturbed):
    told, tried = undisturbed.read_table("claims"), undisturbed.read_table("controls")
    kinds = tried.groupby("claim").control.agg(set)
    assert kinds["merging helps within a cluster"] == kinds["selective merging beats the uniform merge"] == {"noise", "shuffled", "base"}
    assert kinds["mixing adds across clusters"] == {"shuffled"} and "merging collapses across clusters" not in kinds
    assert ((tried.low <= tried.figure) & (tried.figure <= tried.high) & (tried.passes == (tried.low > 0))).all()
    passed = set(tried.claim[tried.passes])
    assert (told.struck == (told.holds & told.claim.isin(passed))).all()
    md, tex = ((undisturbed.path/f"claims.{e}").read_text() for e in ("md", "tex"))
    for r in told.to_dict("records"):
        assert (f"~~{r['claim']}~~" in md) == r["struck"] == (rf"\sout{{{r['claim']}}}" in tex)

def test_a_control_is_what_it_is_called(undisturbed):
    from model_glue_nb.benchmarking.intervals import paired_gain
    b = open_bench(GRID, ZOO)
    b.work.run = undisturbed
    cell = Cell("merging", "a-base: 3", ("a-sort", "a-reverse", "a-shift"), "a-base", "linear", "average", budget=4)
    single = module.best_member(cell.members, b.scorer)
    base = row_of(b, replace(cell, control="base", figure="gain"))
    assert base["gain"] == pytest.approx(paired_gain(b.on_report.items("a-base"), b.on_report.items(single)).mean)
    from model_glue_nb.experiments.controls import shuffled_scorer
    own = b.scorer.items(single)
    dealt = shuffled_scorer(b.scorer, own, 0)
    merges = [module.recipe("linear", ["a-sort", "a-reverse"], [1, w]) for w in range(1, 40)]
    scores = [mean_score(dealt.items(c)) for c in merges]
    assert (len(set(scores)) > 5
            and abs(sum(scores) / 39 - mean_score(own)) < .1
            and dealt.items(merges[0]) .keys() == own.keys())
    assert all((dealt.items(merges[0], .5)[t] == dealt.items(merges[0])[t][:3]).all()
               for t in own), "a share is the beginning of the whole"

def test_axes_of_a_mixture(tmp_path):
    grid = replace(GRID, tasks=["sort"], search_questions=4, report_questions=4, controls=[],
                   merging=dict(GRID.merging, sizes=[2], methods=["linear"]),
                   mixture=dict(GRID.mixture, levels=["model", "ffn"], routers=["linear"], inputs=["sample", "token"], top_k=[1, 2]))
    run = bench(grid, members("a-base", "a-sort", "a-reverse"), tmp_path/"run", workers=1)
    t = run.read_table("mixture")
    routed = t[t.router.notna()]
    assert [tuple(x)
            for x in routed[["level", "input", "top_k"]].to_numpy()] == [("model", "sample", 1),
                                                                         ("ffn", "sample", 1),
                                                                         ("ffn", "sample", 2),
                                                                         ("ffn", "token", 1),
                                                                         ("ffn", "token", 2)]
    assert "failed" not in t and routed.params_active.nunique() > 1 and not len(run.read_table("controls"))
    assert "ffn, K=0, linear, tokens, top 2" in (run.path/"mixture.md").read_text()

def test_nothing_is_asked_twice(undisturbed, monkeypatch):
    def refuse(*a, **k): raise AssertionError("a model was loaded")
    from model_glue_nb.zoo.zoo import LanguageModel
    before = {n: (undisturbed.path/n).read_bytes() for n in TABLES}
    monkeypatch.setattr(LanguageModel, "generate", refuse)
    undisturbed._store = None
    bench(GRID, ZOO, undisturbed.path, workers=1)
    assert {n: (undisturbed.path/n).read_bytes() for n in TABLES} == before

def known_cells(folder):
    if not (folder/"store.sqlite").exists(): return 0
    db = sqlite3.connect(folder/"store.sqlite", timeout=30)
    try: return db.execute("select count(*) from facts where kind='bench'").fetchone()[0]
    except sqlite3.OperationalError: return 0
    finally: db.close()

def children(pid):
    "Processes below one."
    out = []
    for p in Path("/proc").glob("[0-9]*"):
        try: parent = int((p/"stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError: continue
        if parent == pid: out += [int(p.name), *children(int(p.name))]
    return out

def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError: return False

@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_killed_and_resumed_by_two_processes(undisturbed, tmp_path):
    out = tmp_path/"run"
    (tmp_path/"zoo.yaml").write_text(yaml.safe_dump(ZOO))
    code = (f"from test_bench import *\nif __name__ == '__main__': bench(GRID, ZOO, {str(out)!r}, workers=2)")
    (tmp_path/"go.py").write_text(code)
    env = os.environ | dict(PYTHONPATH=f"{root}:{root/'tests'}", OMP_NUM_THREADS="1")
    run = subprocess.Popen([sys.executable, tmp_path/"go.py"], env=env, cwd=tmp_path)
    while known_cells(out) < 3: # a state is waited for, however long it takes
        assert run.poll() is None, "it ended"
        time.sleep(.05)
    workers = children(run.pid)
    run.send_signal(signal.SIGKILL)
    run.wait()
    for _ in range(100):
        if not any(map(alive, workers)): break
        time.sleep(.1)
    assert workers and not any(map(alive, workers)), "workers go with their parent"
    (out/".mixture_half").mkdir(exist_ok=True)
    had = known_cells(out)
    total = known_cells(undisturbed.path)
    assert 3 <= had < total
    db = sqlite3.connect(out/"store.sqlite")
    rows = dict(db.execute("select key, value from facts where kind='bench'"))
    again = bench(GRID, ZOO, out, workers=2)
    assert rows.items() <= dict(db.execute("select key, value from facts where kind='bench'")).items(), "kept as they were"
    for name in ("merging", "mixture"):
        pd.testing.assert_frame_equal(figures(again, name), figures(undisturbed, name))
    assert not list(out.glob(".mixture_*")), "half-written mixtures are swept"

def test_a_changed_zoo_or_grid_is_refused(undisturbed):
    with pytest.raises(InputError, match="differs in grid"):
        bench(replace(GRID, seed=1), ZOO, undisturbed.path)
    with pytest.raises(InputError, match="differs in zoo"): bench(GRID, ZOO[:4], undisturbed.path)

def test_what_cannot_be_done_is_a_row_that_says_why(undisturbed):
    b = open_bench(GRID, ZOO)
    b.work.run = undisturbed
    row = row_of(b, Cell("merging", "strangers", ("a-sort", "b-skip"), None, "linear", "average", budget=3))
    assert "Clusters are mixed" in row["failed"]
    told = laid_out(tidy([row, dict(set="strangers", strategy="single", score=.5, gain=0, gain_low=0, gain_high=0)],
                         ["sort"]),
                    ["sort"])
    assert "not done: Clusters are mixed" in markdown(told) and "not done" in latex(told, "x")

def test_strangers_alone_are_mixed_only(tmp_path):
    run = bench(GRID, members("a-base", "c-base"), tmp_path/"run", workers=1)
    assert set(run.read_table("mixture").set) == {"across"} and not len(run.read_table("merging"))

def test_one_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="Give at least two models"):
        bench(GRID, members("a-base"), tmp_path/"run", workers=1)

@pytest.mark.parametrize("change, says", [
    (dict(merging=dict(GRID.merging, methods=["tie"])), "Did you mean 'ties'"),
    (dict(merging=dict(GRID.merging, methods=[])), "merging, methods is empty"),
    (dict(merging=dict(GRID.merging, strategies=dict(averge={}))), "Did you mean 'average'"),
    (dict(merging=dict(GRID.merging, strategies=dict(coefficient=dict(step=3)))), "Did you mean 'steps'"),
    (dict(merging=dict(GRID.merging, sizes=[1])), "at least 2"),
    (dict(merging=dict(GRID.merging, budget=0)), "budget is 0"),
    (dict(mixture=dict(GRID.mixture, levels=["fnn"])), "Did you mean 'ffn'"),
    (dict(mixture=dict(GRID.mixture, routers=["linaer"])), "Did you mean 'linear'"),
    (dict(mixture=dict(GRID.mixture, dense_layers=[-1])), "K is -1"),
    (dict(mixture=dict(GRID.mixture, experts=1)), "Mix at least 2"),
    (dict(mixture=dict(GRID.mixture, inputs=["tokens"])), "Did you mean 'token'"),
    (dict(mixture=dict(GRID.mixture, top_k=[0])), "top_k is 0"),
    (dict(mixture=dict(GRID.mixture, top_k=[3], experts=2)), "top_k is 3. Give 1 to 2"),
    (dict(controls=["shuffle"]), "Did you mean 'shuffled'"),
    (dict(clusters=dict(threshold=.9, linkage="averag")), "Did you mean 'average'")])
def test_grids_are_checked(change, says): assert any(says in p for p in check_grid(replace(GRID, **change)))

def test_command(tmp_path):
    (zoo := tmp_path/"zoo.yaml").write_text(yaml.safe_dump(members("a-base", "a-sort", "a-reverse")))
    (grid := tmp_path/"grid.yaml").write_text(yaml.safe_dump(dict(tasks=["sort", "reverse"], search_questions=4, report_questions=4,
        merging=dict(methods=["linear"], strategies=["average"], sizes=[2], budget=2),
                                                                  mixture=dict(levels=["ffn"], routers=["linear"], experts=2))))
    def call(*a): return command("bench", *a, cwd=tmp_path)
    bad = call(zoo, "--grid", "smal", "--out", "run")
    assert bad.returncode == 2 and "Did you mean 'small'?" in bad.stderr
    assert not (tmp_path/"run").exists()
    done = call(zoo, "--grid", grid, "--out", "run", "--workers", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert pd.read_json(__import__("io").StringIO(done.stdout)).claim.str.contains("within a cluster").any()
    assert all((tmp_path/"run"/n).exists() for n in TABLES)
    page = (tmp_path/"run"/"figures.html").read_text()
    assert "What merging gains" in page and "src=\"http" not in page

def test_full_grid_covers_what_the_paper_compares():
    full, small = read_grid("full"), read_grid("small")
    assert len(small.merging["methods"]) == 5 and len(small.merging["strategies"]) == 4 and len(small.merging["sizes"]) == 3
    assert len(small.mixture["levels"]) == 3 and len(small.mixture["routers"]) == 4 and len(small.mixture["dense_layers"]) == 2
    assert set(small.merging["methods"]) <= set(full.merging["methods"]) and set(small.mixture["routers"]) <= set(full.mixture["routers"])

RECORDED = root/"nbs"/"recorded"

@pytest.mark.skipif(not (RECORDED/"bench_small_claims.csv").exists(), reason="not recorded yet")
def test_recorded_claims_follow_from_the_recorded_tables():
    merging, mixture, told = (pd.read_csv(RECORDED/f"bench_small_{n}.csv", comment="#") for n in ("merging", "mixture", "claims"))
    pd.testing.assert_frame_equal(claims(merging, mixture), told)
    held = told.set_index("claim").holds
    assert held["merging helps within a cluster"] and held["merging collapses across clusters"]
    assert held["selective merging beats the uniform merge"] and held["mixing adds across clusters"]

def test_tasks_that_run_code_are_skipped_by_name_or_run_in_the_sandbox(tmp_path, monkeypatch):
    from model_glue_nb.benchmarking import sandbox
    from model_glue_nb.experiments.tables import write_tables
    suite = replace(load_suite("demo").only(["sort"]), skipped=dict(programs="runs generated code; allow it by --allow-code-execution"))
    asked = []
    monkeypatch.setattr(module, "load_suite", lambda spec, run_code=None: asked.append(run_code) or suite)
    b = open_bench(replace(GRID, tasks=None), ZOO[:2])
    run = Run.start(tmp_path/"run", {})
    write_tables(run,
                 [dict(benchmark="merging", set="x", n_models=1, strategy="single",
                       search=.5, score=.5, gain=0., gain_low=0., gain_high=0.)],
                 b.work.report)
    assert asked == [None]
    for end in ("md", "tex"):
        assert "Skipped: programs (runs generated code" in (run.path/f"merging.{end}").read_text()
    monkeypatch.setattr(sandbox, "isolation", lambda: "user")
    open_bench(replace(GRID, tasks=None), ZOO[:2], allow_code=True)
    assert asked[1] is sandbox.passes
    def no(): raise InputError("Generated code cannot be run here")
    monkeypatch.setattr(sandbox, "isolation", no)
    with pytest.raises(InputError, match="cannot be run here"):
        bench(GRID, ZOO, tmp_path/"other", allow_code=True)
    assert not (tmp_path/"other").exists()
