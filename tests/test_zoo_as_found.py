"A zoo as found goes through doctor, similarity, score, search and run to the end: what cannot be used is set aside with its reason."
import json, os
from pathlib import Path

import pandas as pd
import pytest

import wild_zoo
from model_glue_nb.cli.program import main

BROKEN = ("climber zero3 cut-short overlapping list-config deep-config pickled points-outside empty half-fetched").split()
SOUND = ("base sharded latin1-card consolidated stale-index saved-by-4 fp16 padded chatml chatml_swapped bpe-old bpe-new mixtral "
         "mixtral-fused pythia mamba gemma3 card-bomb no-tokenizer fp8").split()

@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    "The zoo, its suite, and a marker file that only forbidden code would write."
    room = tmp_path_factory.mktemp("wild")
    marker = room/"ran"
    zoo = wild_zoo.build(room/"zoo", marker)
    for name, (first, more) in dict(next=(3, 1), skip=(4, 2)).items():
        rows = [json.dumps(dict(question=f"w{i} w{i + first}", answer=f"w{i + 2 * more}")) for i in range(3, 43)]
        (room/f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    tasks = [dict(name="next", file="next.jsonl", max_new_tokens=2), dict(name="skip", file="skip.jsonl", max_new_tokens=4)]
    (room/"suite.yaml").write_text(json.dumps(dict(name="wild", search_share=.5, tasks=tasks)))
    before = {p: p.stat().st_mtime_ns for p in zoo.rglob("*") if p.is_file()}
    yield room, zoo
    assert not marker.exists(), "code of a member ran"
    assert {p: p.stat().st_mtime_ns for p in zoo.rglob("*") if p.is_file()} == before, "a member was changed"
    assert sorted(p.name for p in room.iterdir()) == sorted({*made(room)}), "something was written beside the outputs"

def made(room):
    return ["zoo", "suite.yaml", "next.jsonl", "skip.jsonl", *(n for n in ("scores", "search", "run", "similarity") if (room/n).exists())]

def command(capfd, monkeypatch, *args):
    "One command line in process: exit code and what it printed."
    monkeypatch.setattr("sys.argv", ["model-glue", *map(str, args)])
    code = 0
    try: main()
    except SystemExit as e: code = e.code or 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err and "\x1b]0;" not in out + err
    return code, out, err

def test_doctor_names_every_member(wild, capfd, monkeypatch):
    room, zoo = wild
    code, out, err = command(capfd, monkeypatch, "doctor", zoo, "--json")
    assert code == 0, err
    table = pd.DataFrame(json.loads(out)).set_index("model")
    assert len(table) == len(list(zoo.iterdir())) >= 35
    assert table.problem[BROKEN].astype(bool).all(), table.problem[BROKEN]
    assert not table.problem[SOUND].astype(bool).any(), table.problem[SOUND].loc[lambda p: p.astype(bool)]
    assert "quantized" in " ".join(table.notes["gptq"]) + table.problem["gptq"]
    same = table.group[["base", "sharded", "stale-index", "saved-by-4", "fp16", "consolidated"]]
    assert same.nunique() == 1 and table.group["mixtral"] == table.group["mixtral-fused"] != same.iloc[0]

def test_doctor_judges_pairs(wild, capfd, monkeypatch):
    room, zoo = wild
    code, out, err = command(capfd, monkeypatch, "doctor", zoo, "--pairs", "--headers", "--json")
    verdicts = {frozenset((r["a"], r["b"])): r["verdict"] for r in json.loads(out)}
    def say(a, b): return verdicts[frozenset((a, b))]
    assert say("base", "saved-by-4") == say("bpe-old", "bpe-new") == say("mixtral", "mixtral-fused") == "as is"
    assert say("chatml", "chatml_swapped") == say("base", "chatml") == "with a tokenizer choice"
    assert say("base", "mamba") == say("base", "gptq") == "mix only"
    assert say("base", "cut-short") == "neither"

def test_similarity_compares_what_can_be_compared(wild, capfd, monkeypatch):
    room, zoo = wild
    code, out, err = command(capfd, monkeypatch, "similarity", zoo, "--out", room/"similarity", "--json")
    assert code == 0, err
    table = pd.read_csv(room/"similarity"/"similarity.csv", index_col=0)
    assert table.loc["base", ["sharded", "saved-by-4", "stale-index", "fp16"]].gt(.95).all()
    assert table.loc["mixtral", "mixtral-fused"] > .95 and pd.isna(table.loc["base", "mamba"])
    assert "nan" not in table.dropna(axis=1, how="all").columns or table.loc["base", "nan"] != table.loc["base", "nan"]

def test_scores_are_given_for_all_that_can_answer(wild, capfd, monkeypatch):
    room, zoo = wild
    code, out, err = command(capfd, monkeypatch, "score", zoo, "--suite", room/"suite.yaml", "--out", room/"scores", "--json")
    assert code == 0, err
    scored = set(pd.read_csv(room/"scores"/"scores.csv").model)
    assert set(SOUND) - {"no-tokenizer", "fp8"} <= scored # no kernel for eight bits on this machine
    assert not scored & {*BROKEN, "remote-code"}
    for name in (*BROKEN, "remote-code", "no-tokenizer", "fp8"):
        assert name in err, f"{name} is not named with its reason"

def test_search_finds_a_winner_per_cluster(wild, capfd, monkeypatch):
    room, zoo = wild
    code, out, err = command(capfd, monkeypatch, "search", zoo, "--suite", room/"suite.yaml", "--out", room/"search", "--budget", "6",
                             "--questions", "8", "--strategy", "average", "--json")
    assert code == 0, err
    trials = pd.read_csv(room/"search"/"trials.csv")
    assert len(trials.cluster.unique()) >= 2 # the Llamas and the two eras of Mixtral are searched

def test_the_run_ends_in_its_table(wild, capfd, monkeypatch):
    room, zoo = wild
    recipe = dict(zoo=str(zoo), suite=str(room/"suite.yaml"),
                  search_questions=8, merge=dict(methods=["linear"], strategy="average", budget=4),
                  mixture=dict(level="model", router="random", max_experts=3))
    (room/"scores"/"recipe-of-the-run.yaml").write_text(json.dumps(recipe))
    code, out, err = command(capfd, monkeypatch, "run", room/"scores"/"recipe-of-the-run.yaml", "--out", room/"run", "--json")
    assert code == 0, err
    comparison = pd.read_csv(room/"run"/"comparison.csv").set_index("system")
    assert comparison.loc["best_single", "n"] > 0 and "model_glue" in comparison.index
    skipped = json.loads((room/"run"/"zoo.json").read_text())["skipped"]
    assert {*BROKEN, "remote-code", "nan"} <= set(skipped), set(BROKEN) - set(skipped)
