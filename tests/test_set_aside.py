"A member that cannot be read, loaded or scored is set aside with its reason by every command, and the rest goes on."
import json, sys

import pandas as pd
import pytest

from model_glue_nb.zoo.zoo import read_zoo, tiny_zoo

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Three good members; one that is cut off, one that no class can be made of, and one that cannot compute."
    root = tmp_path_factory.mktemp("zoo")
    tiny_zoo(root/"zoo", ["a", "b", "c", "cut", "odd", "weak"], dtype="float32")
    weights = root/"zoo"/"cut"/"model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    change(root/"zoo"/"odd", hidden_act="none such")
    change(root/"zoo"/"weak", num_attention_heads=5, head_dim=None)
    (root/"q.jsonl").write_text("".join(json.dumps(dict(question=f"w{i} w{i + 1}", answer=f"w{i + 2}")) + "\n" for i in range(3, 33)))
    (root/"suite.yaml").write_text("name: s\nsearch_share: .5\ntasks: [{name: t, file: q.jsonl, max_new_tokens: 2}]\n")
    return root

def change(folder, **settings):
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(config | settings))

@pytest.fixture
def command(home, monkeypatch, capsys):
    def run(*args):
        from model_glue_nb.cli.program import main
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["model-glue", *map(str, args)])
        with pytest.raises(SystemExit) as e: main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return e.value.code or 0, out, err
    return run

def told(err, *names): return all(f"skipped {n}: " in err for n in names)

def test_forecast_goes_on(command, tmp_path):
    code, out, err = command("forecast", "zoo", "--suite", "suite.yaml", "--out", tmp_path/"run", "--n", 4, "--json")
    assert code == 0 and told(err, "cut", "odd", "weak"), err
    assert set(pd.read_csv(tmp_path/"run"/"pairs.csv").a) == {"a", "b"}, "three pairs of good members"

GRID = """suite: suite.yaml
search_questions: 4
clusters: {threshold: 0}
merging: {methods: [linear], strategies: {average: {}}, sizes: [2], budget: 3, max_clusters: 1}
mixture: {levels: [model], routers: [random], dense_layers: [0], experts: 2}
"""

def test_bench_goes_on(command, home, tmp_path):
    (home/"grid.yaml").write_text(GRID)
    code, out, err = command("bench", "zoo", "--grid", "grid.yaml", "--out", tmp_path/"run", "--workers", 1)
    assert code == 0 and told(err, "cut", "odd", "weak"), err
    merging = pd.read_csv(tmp_path/"run"/"merging.csv")
    assert merging.score.notna().sum() >= 4 and not set(merging.winner) & {"cut", "odd", "weak"}
    again = command("bench", "zoo", "--grid", "grid.yaml", "--out", tmp_path/"run", "--workers", 1)
    assert again[0] == 0 and told(again[2], "cut", "odd", "weak")

def test_a_cell_that_fails_in_any_way_says_why(command, home, tmp_path, monkeypatch):
    import model_glue_nb.experiments.bench as benching
    def fail(b, cell): raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(benching, "mix_row", fail)
    (home/"grid.yaml").write_text(GRID)
    code, out, err = command("bench", "zoo", "--grid", "grid.yaml", "--out", tmp_path/"run", "--workers", 1)
    assert code == 0 and "cells could not be done" in out, err
    assert pd.read_csv(tmp_path/"run"/"mixture.csv").failed.str.contains("cannot be multiplied").all()

def test_barrier_of_good_members_goes_on(command):
    code, out, err = command("barrier", "zoo", "a", "b", "--suite", "suite.yaml", "--n", 2, "--json")
    assert code == 0 and len(json.loads(out)) == 5 and told(err, "cut")

@pytest.mark.parametrize("a,b,why",
                         [("cut", "a", "was set aside"), ("a", "cut", "was set aside"), ("odd", "a", "none such"), ("weak", "a", "'weak'")])
def test_barrier_of_a_bad_member_says_why(command, a, b, why):
    code, out, err = command("barrier", "zoo", a, b, "--suite", "suite.yaml", "--n", 2)
    assert code == 2 and why in err.splitlines()[-1], err

def test_cka_goes_on(command):
    code, out, err = command("cka", "zoo", "--suite", "suite.yaml", "--n", 2, "--depths", 2, "--json")
    rows = json.loads(out)
    assert code == 0 and told(err, "cut")
    good = {(r["a"], r["b"]) for r in rows if r["cka"] is not None}
    assert good == {("a", "b"), ("a", "c"), ("b", "c")}
    why = {(r["a"], r["b"]): r["reason"] for r in rows if r["cka"] is None}
    assert "none such" in why["a", "odd"] and "weak" in why["a", "weak"]
