"The main job end to end on part of the embedded zoo: tables, resuming after a kill, agreement with lm-eval, and what is refused."
import json, os, random, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from forked import MAIN, command, python

from model_glue_nb.benchmarking.scores import ask_lm_eval, ask_model
from model_glue_nb.benchmarking.suites import Suite, load_suite
from model_glue_nb.core import InputError, Run
from model_glue_nb.zoo.zoo import demo_zoo_path, read_zoo

MEMBERS = ("a-base", "a-sort", "a-reverse", "b-base", "c-complement")

@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    "A small recipe file: five members, three tasks, a small budget."
    room = tmp_path_factory.mktemp("pipeline")
    file = room/"recipe.yaml"
    file.write_text(yaml.safe_dump(dict(zoo=[str(demo_zoo_path()/m) for m in MEMBERS], tasks=["sort", "reverse", "complement"],
                                        search_questions=30, merge=dict(methods=["linear", "ties"], strategy="average", budget=6))))
    return file

@pytest.fixture(scope="module")
def done(recipe):
    "The finished run."
    r = subprocess.run([sys.executable, "-c", MAIN, "run", recipe, "--out", recipe.parent/"run"], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return Run(recipe.parent/"run"), r.stdout

def test_the_run_holds_every_table(done):
    run, printed = done
    comparison = run.read_table("comparison").set_index("system")
    assert list(comparison.index) == "best_single best_merge full_merge full_mixture model_glue chosen oracle_task oracle_question".split()
    assert ((comparison.low <= comparison["mean"]) & (comparison["mean"] <= comparison.high)).all()
    assert comparison.gain["best_single"] == 0
    assert comparison["mean"]["oracle_question"] == comparison["mean"].max()
    assert comparison.params_total["full_mixture"] > comparison.params_total["model_glue"] > comparison.params_active["model_glue"]
    routing = run.read_table("routing")
    share = routing.groupby(["system", "task"]).share.sum()
    assert np.allclose(share, 1)
    assert run.read_json("split") == load_suite("demo").only(run.read_json("split")["tasks"]).split_record(), "anyone can check how questions were split"
    assert {"recipe.yaml", "environment.json", "split.json", "scores.csv", "similarity.csv", "clusters.json", "trials.csv", "models", "report.html"} <= {f.name for f in run.path.iterdir()}
    assert "model_glue" in printed and "report.html" in printed
    report = (run.path/"report.html").read_text()
    assert 'id="sums"' in report, "its answers are known, so tasks can be left out"

def test_merged_checkpoints_load_in_plain_transformers(done):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    merged = [f for f in (done[0].path/"models").iterdir() if (f/"config.json").exists()]
    assert merged
    for f in merged:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(f), AutoTokenizer.from_pretrained(f)
        assert model.generate(**tokenizer("sort ECABD =", return_tensors="pt"), max_new_tokens=3).shape[1] > 3

def without_times(run): return Run(run).read_table("comparison").drop(columns="ms_per_question")

def test_a_second_run_asks_nothing_and_gives_the_same_table(done, recipe):
    before = done[0].read_table("comparison")
    store = Run(done[0].path).store
    def count(): return store.db.execute("select count(*) from results").fetchone()
    n = count()
    assert command("run", recipe, "--out", done[0].path).returncode == 0
    assert count() == n and done[0].read_table("comparison").equals(before)

DIES = """
import os, signal, sys
left, out = int(sys.argv.pop(1)), sys.argv[-1]
def touched(event, args):
    "Counts what is opened, made, renamed and taken away under the run's folder."
    global left
    path = os.fsdecode(args[0]) if args and isinstance(args[0], (str, bytes, os.PathLike)) else ""
    if out not in path: return
    left -= 1
    if left == 0: os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(touched)
""" + MAIN

def test_killed_at_random_moments_it_ends_with_the_same_table(done, recipe, tmp_path):
    rng, out = random.Random(0), tmp_path/"run"
    moments = [rng.randrange(*span) for span in ((5, 60), (60, 200), (60, 200))] # counted, not timed
    for n in moments:
        r = python(DIES, n, "run", recipe, "--out", out)
        assert r.returncode == -signal.SIGKILL, "it ended before it could be killed"
    kills = len(moments)
    assert command("run", recipe, "--out", out).returncode == 0
    pd.testing.assert_frame_equal(without_times(out), without_times(done[0].path))
    assert len(list(out.rglob("*.part"))) <= kills, "a kill leaves at most one unfinished temporary folder"

@pytest.mark.parametrize("name", ["a-reverse", "b-skip", "c-complement"])
def test_direct_scores_equal_lm_eval(name):
    model, part = read_zoo("demo")[name], load_suite("demo").part("search", 12)
    fast, slow = ask_model(model, part), ask_lm_eval(model.load, "x", part)
    assert all(np.array_equal(fast[t], slow[t]) for t in fast)

BROKEN = ("nan-weights", "truncated", "no-tokenizer")

@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    from model_glue_nb.zoos.demo import build_broken_zoo
    out = tmp_path_factory.mktemp("broken")/"zoo"
    build_broken_zoo(out)
    return out

def test_broken_members_are_named_and_the_rest_goes_on(broken, tmp_path):
    file = tmp_path/"r.yaml"
    file.write_text(yaml.safe_dump(
        dict(zoo=str(broken), tasks=["sort"], search_questions=10, merge=dict(methods=["linear"], strategy="average", budget=2))))
    r = command("run", file, "--out", tmp_path/"run")
    assert r.returncode == 0, r.stderr
    assert set(BROKEN) <= set(Run(tmp_path/"run").read_json("zoo")["skipped"])
    assert all(name in r.stderr for name in BROKEN)
    assert all(name in (tmp_path/"run"/"report.html").read_text() for name in BROKEN)

def test_doctor_names_what_is_broken(broken):
    r = command("doctor", broken, "--deep", "--json")
    rows = {x["model"]: x["problem"] or " ".join(x["notes"]) for x in json.loads(r.stdout)}
    assert r.returncode == 0
    assert "NaN" in rows["nan-weights"] and "truncated" in rows["truncated"] and "tokenizer" in rows["no-tokenizer"] and rows["a-base"] == ""

FAMILY = dict(zoo=[str(demo_zoo_path()/m) for m in ("a-base", "a-sort", "a-reverse")], tasks=["sort", "reverse"], search_questions=15,
              merge=dict(methods=["linear"], strategy="average", budget=3))

@pytest.mark.parametrize("mixture, kind", [
    (dict(level="model", router="linear", dense_layers=1), "mixture"), (dict(level="block", router="knn", dense_layers=1), "mixture"),
    (dict(level="ffn", router="linear", input="token", top_k=2, max_experts=2), "checkpoint"), # plain Mixtral
])
def test_one_family_is_mixed_at_every_level(mixture, kind, tmp_path, monkeypatch):
    from model_glue_nb.gluing.pipeline import glue
    part = Suite.part
    monkeypatch.setattr(Suite, "part", lambda s, name, n=None: part(s, name, n or 80)) # a quick report
    run = glue(FAMILY | dict(mixture=mixture), tmp_path/"run")
    t = run.read_table("comparison").set_index("system")
    full = read_zoo(str(run.path/"models"))["full-mixture"]
    alone = read_zoo(FAMILY["zoo"])["a-base"].n_params
    assert full.kind == kind and full.config["num_hidden_layers"] == 3
    assert t.params_total["full_mixture"] == pytest.approx(full.n_params, rel=1e-5) and alone < full.n_params < 3 * alone, "embedding, head and the first layer are shared"
    assert alone <= t.params_active["full_mixture"] < full.n_params
    assert t["mean"]["full_mixture"] > t.low["best_single"], "it answers as its experts do"
    routing = run.read_table("routing")
    scores = run.read_table("scores")
    assert not scores.model.isin(["full-mixture", "model-glue"]).any()
    if kind == "mixture":
        mine = routing[routing.system == "full_mixture"]
        assert np.allclose(mine.groupby("task").share.sum(), 1)
        told = mine.groupby("task").apply(lambda g: (g.share * g.score).sum(), include_groups=False)
        assert np.allclose(told[FAMILY["tasks"]], t.loc["full_mixture", FAMILY["tasks"]].astype(float)), "shares and scores give the score of the system"
    else: assert routing.empty, "tokens were routed, not questions"
    before = {f: f.stat().st_mtime_ns for f in (run.path/"models").rglob("*.safetensors")}
    glue(FAMILY | dict(mixture=mixture), run.path)
    assert before == {f: f.stat().st_mtime_ns for f in (run.path/"models").rglob("*.safetensors")}

@pytest.mark.parametrize("given, says", [
    (dict(zoo="nowhere"), "There is no zoo 'nowhere'"),
    (dict(zo="demo"), "Did you mean 'zoo'?"),
    (dict(suite="dmo"), "Did you mean 'demo'?"),
    (dict(tasks=["srot"]), "Did you mean 'sort'?"),
    (dict(merge=dict(methods=["tie"])), "Did you mean 'ties'?"),
    (dict(merge=dict(strategy="averag")), "Did you mean 'average'?"),
    (dict(mixture=dict(router="kn")), "Did you mean 'knn'?"),
    (dict(mixture=dict(level="blok")), "Did you mean 'block'?"),
    (dict(mixture=dict(level="ffn", top_k=4, max_experts=3)), "Give 1 to 3"),
    (dict(mixture=dict(level="block")), "'c-base' is a Qwen2ForCausalLM, 'a-base' a LlamaForCausalLM"),
    (dict(mixture=dict(level="ffn")), "Mix at level 'model' without a base"),
    (dict(zoo=FAMILY["zoo"], mixture=dict(level="ffn", dense_layers=3)), "Give 0 to 2"),
    (dict(zoo=FAMILY["zoo"], mixture=dict(base="a-bas")), "Did you mean 'a-base'?"),
    (dict(merge=dict(budget=0)), "at least 1"),
])
def test_bad_recipes_end_with_one_message_and_code_2(given, says, tmp_path):
    (tmp_path/"r.yaml").write_text(yaml.safe_dump(given))
    r = command("run", tmp_path/"r.yaml", "--out", tmp_path/"run")
    assert r.returncode == 2 and says in r.stderr and "Traceback" not in r.stderr
    assert not (tmp_path/"run").exists(), "nothing is left behind"

def test_a_zoo_without_a_usable_model(tmp_path):
    (tmp_path/"zoo"/"notes").mkdir(parents=True)
    r = command("doctor", tmp_path/"zoo")
    assert r.returncode == 2
    r = command("score", tmp_path/"zoo", "--out", tmp_path/"run")
    assert r.returncode == 2 and "no config.json" in r.stderr

def test_the_folder_of_another_run_is_refused(done, recipe, tmp_path):
    other = tmp_path/"other.yaml"
    other.write_text(recipe.read_text() + "\nseed: 5\n")
    r = command("run", other, "--out", done[0].path)
    assert r.returncode == 2 and "differs in seed" in r.stderr
