"What a run chose goes to a hub and comes back: a real server on this machine, the real client, a real run of the embedded zoo."
import hashlib, json, shutil, subprocess, sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from fake_hub import Hub
from model_glue_nb.checkpoints.fetching import local_folder
from model_glue_nb.core import InputError, Run
from model_glue_nb.gluing.pipeline import glue
from model_glue_nb.gluing.publishing import prepared, push
from model_glue_nb.gluing.recipe import read_recipe
from model_glue_nb.zoo.zoo import demo_zoo_path, open_model, read_zoo

ZOO = demo_zoo_path()
MEMBERS = ("a-base", "a-sort", "c-base", "c-complement")
RECIPE = dict(tasks=["sort", "complement"], search_questions=40, merge=dict(methods=["linear"], budget=4), mixture=dict(router="linear"), evidence=0, budget="3x")

def refused(call, *texts):
    with pytest.raises(InputError) as e: call()
    for text in texts: assert text in str(e.value), e.value
    return str(e.value)

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run whose members are on a hub; its cache of them goes along."
    room = tmp_path_factory.mktemp("push")
    hub, known = Hub(), {k: getattr(constants, k) for k in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_OFFLINE", "HF_HUB_CACHE")}
    for name in MEMBERS: hub.add(f"org/{name}", ZOO/name)
    try:
        constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = hub.url, False, str(room/"cache")
        constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        glue(read_recipe(RECIPE | dict(zoo=[f"org/{n}" for n in MEMBERS])), room/"run")
    finally:
        for k, v in known.items(): setattr(constants, k, v)
        hub.close()
    return room

@pytest.fixture
def run(finished, hub, monkeypatch):
    "The finished run, a hub that has its members, its cache, and a token that may write."
    for name in MEMBERS: hub.add(f"org/{name}", ZOO/name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(finished/"cache"))
    monkeypatch.setenv("HF_TOKEN", "good")
    return Run(finished/"run")

def weights(folder): return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in Path(folder).glob("*.safetensors")}

def repo(hub, name, branch="main"): return hub.repos[name].commits[hub.repos[name].branches[branch]]

def fresh(monkeypatch, tmp_path):
    "Another machine: its cache is empty."
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/"other machine"))

PROMPTS = ["w", "sort the letters: dbca", "complement 1234"]

def test_a_mixture_goes_and_comes_back(run, hub, monkeypatch, tmp_path):
    "Members that the hub has are named by their commit, the merge comes along, and it answers as here."
    told = []
    done = push(run, "me/mixed", progress=lambda *x: told.append(x))
    files = repo(hub, "me/mixed")
    assert hub.repos["me/mixed"].branches["main"] == done.commit and set(done.files) <= set(files)
    assert [f for f in files if f.endswith(".safetensors")] == ["experts/c-base-merged/model.safetensors", "router.safetensors"]
    rows = {e["name"]: e for e in json.loads(files["mixture.json"])["experts"]}
    assert rows["a-sort"]["hub"] == f"org/a-sort@{hub.repos['org/a-sort'].branches['main']}" and "hub" not in rows["c-base-merged"]
    here = open_model(run.path/"models"/"chosen").load()
    fresh(monkeypatch, tmp_path)
    there, = read_zoo("me/mixed")
    live = there.load()
    assert live.generate(PROMPTS, 8) == here.generate(PROMPTS, 8) and live.route(PROMPTS).tolist() == here.route(PROMPTS).tolist()
    assert [e.fingerprint() for e in live.experts] == [e.fingerprint() for e in here.experts]
    assert told[-1][0] == told[-1][1] == sum(done.files.values()) and told[0][2].startswith("pushing ")

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
x = tokenizer("complement 1234", return_tensors="pt")
print(model.generate(**x, max_new_tokens=8, do_sample=False).tolist(), float(model(**x).logits.double().sum()))
"""

def test_a_merge_goes_and_transformers_loads_it(run, hub, tmp_path):
    done = push(run, "me/merged", point="1x")
    files = repo(hub, "me/merged")
    merged = run.path/"models"/"c-base-merged"
    assert hashlib.sha256(files["model.safetensors"]).hexdigest() == weights(merged)["model.safetensors"]
    env = dict(PATH="/usr/bin:/bin", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path/"home"), HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1", OMP_NUM_THREADS="1")
    def said(name): return subprocess.run([sys.executable, "-c", LOAD, str(name)], env=env, capture_output=True, text=True)
    there, here = said("me/merged"), said(merged)
    assert there.returncode == 0, there.stderr
    assert there.stdout == here.stdout != ""
    assert done.card == files["README.md"].decode()

def test_the_recipe_on_the_card_makes_the_same_bytes(run, hub, tmp_path, command):
    "Copied from the card on another machine, with the hub's names in it."
    card = push(run, "me/merged", point="1x").card
    text = next(block for block in card.split("```yaml\n")[1:] if block.startswith("merge_method")).split("```")[0]
    (tmp_path/"merge.yaml").write_text(text)
    code, out, err = command("merge", tmp_path/"merge.yaml", tmp_path/"again")
    assert code == 0, err
    assert weights(tmp_path/"again") == weights(run.path/"models"/"c-base-merged")

def test_a_base_with_a_difference_goes_and_comes_back(run, hub, monkeypatch, tmp_path):
    done = push(run, "me/difference", point="1.5x")
    assert [f for f in done.files if f.endswith(".safetensors")][0].startswith("adapters/c-complement-on-c-base") and "experts/c-base/model.safetensors" not in done.files
    fresh(monkeypatch, tmp_path)
    live = read_zoo("me/difference").models[0].load()
    assert [e.name for e in live.experts] == ["c-complement on c-base (rank 32)", "c-base"] and len(live.generate(PROMPTS, 4)) == 3

def test_the_card(run, hub):
    with prepared(run, "me/mixed") as ready: card = ready.card
    data, table = ModelCard(card).data, run.read_table("comparison").set_index("system")
    assert (data.license, data.library_name, data.base_model_relation) == ("apache-2.0", "model-glue", "merge")
    assert sorted(data.base_model) == ["org/a-sort", "org/c-base", "org/c-complement"] and data.tags == ["mixture", "model-glue"]
    chosen, best = table.loc["chosen"], table.loc["best_single"]
    results = {r.task_name: r for r in data.eval_results}
    assert set(results) == {"all tasks", "sort", "complement"} and {r.dataset_split for r in data.eval_results} == {"report"}
    for task, value in (("all tasks", chosen["mean"]), ("sort", chosen["sort"]), ("complement", chosen["complement"])): assert results[task].metric_value == round(value, 4)
    for row in (chosen, best): assert f"{100 * row['mean']:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]" in card
    assert f"{100 * chosen.gain:+.1f} [{100 * chosen.gain_low:+.1f}, {100 * chosen.gain_high:+.1f}]" in card
    for name in ("a-sort", "c-complement"): assert hub.repos[f"org/{name}"].branches["main"] in card
    assert "trust_remote_code" not in card and "model-glue run recipe.yaml" in card

def test_nothing_of_this_machine_leaves(run, hub):
    "No path, no question and no answer is in any file."
    from model_glue_nb.benchmarking.suites import load_suite
    hub.repos.clear()
    for name in MEMBERS: hub.add(f"org/{name}", ZOO/name)
    push(run, "me/mixed")
    texts = [data.decode() for f, data in repo(hub, "me/mixed").items() if not f.endswith(".safetensors") and "tokenizer" not in f]
    asked = {q.prompt for t in load_suite("demo").only(["sort", "complement"]).tasks for q in t.questions}
    for text in texts:
        assert str(run.path.parent) not in text and str(Path.home()) + "/" not in text and str(ZOO) not in text
        assert not [q for q in asked if q in text]

def test_a_dry_run_pushes_nothing(run, hub, command):
    code, out, err = command("push", run.path, "me/never", "--dry-run")
    assert code == 0 and "Experts: c-base-merged; a-sort." in out and "router.safetensors" in out and "nothing was pushed" in out, err
    assert "me/never" not in hub.repos and not [1 for method, _ in hub.asked if method in ("POST", "PUT")]
    assert not list(run.path.glob(".push-*"))

def test_the_command(run, hub, command):
    code, out, err = command("push", run.path, "me/by-command", "--point", "1x", "--private", "--json")
    assert code == 0, err
    assert json.loads(out)["commit"] == hub.repos["me/by-command"].branches["main"] and hub.repos["me/by-command"].private

def test_what_was_there_before(run, hub):
    "Old weights go in the same commit, or transformers might read them; what belongs to the owner stays."
    push(run, "me/merged", point="1x")
    old = repo(hub, "me/merged") | {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "LICENSE": b"mine", "notes.txt": b"mine", "results.bin": b"x"}
    hub.repos["me/merged"].commit(old)
    n = len(hub.repos["me/merged"].commits)
    done = push(run, "me/merged", point="1x")
    assert sorted(done.removed) == ["model.safetensors.index.json"], "shards beside one whole file are not read anyway"
    now = repo(hub, "me/merged")
    assert {"LICENSE", "notes.txt", "results.bin", ".gitattributes", "model.safetensors"} <= set(now) and "model.safetensors.index.json" not in now
    assert len(hub.repos["me/merged"].commits) == n + 1
    again = push(run, "me/merged", point="1x")
    assert again.commit == done.commit and not again.removed, "the same once more is no commit"

def test_branches(run, hub):
    push(run, "me/merged", point="1x")
    main = hub.repos["me/merged"].branches["main"]
    done = push(run, "me/merged", revision="wide")
    assert hub.repos["me/merged"].branches == {"main": main, "wide": done.commit} and "router.safetensors" in repo(hub, "me/merged", "wide")
    assert open_model(local_folder("me/merged@wide")).kind == "mixture"

def changed(run, tmp_path, name, change):
    "A copy of the run with one of its records changed."
    out = shutil.copytree(run.path, tmp_path/"copy", symlinks=True)
    about = json.loads((out/f"{name}.json").read_text())
    change(about)
    (out/f"{name}.json").write_text(json.dumps(about))
    return Run(out)

def test_licences(run, hub, tmp_path, command):
    def say(**labels):
        def change(about):
            for n, x in labels.items(): about["models"][n.replace("_", "-")]["license"] = x
        return change
    copy = changed(run, tmp_path, "zoo", say(a_sort=None, c_base="llama3", c_complement="gemma"))
    said = refused(lambda: push(copy, "me/x"), "No licence can be seen that fits all members", "'a-sort' states no licence", "llama3 ('c-base') and gemma ('c-complement')", "--license ID")
    assert "me/x" not in hub.repos and "apache" not in said
    code, out, err = command("push", copy.path, "me/x", "--license", "my-terms-1.0", "--dry-run")
    assert code == 0 and "license: other" in out and "license_name: my-terms-1.0" in out and "licence: 'a-sort' states no licence" in err
    about = json.loads((copy.path/"zoo.json").read_text())
    for n, x in dict(a_sort="apache-2.0", c_base="mit", c_complement="cc-by-nc-4.0").items(): about["models"][n.replace("_", "-")]["license"] = x
    (copy.path/"zoo.json").write_text(json.dumps(about))
    with prepared(copy, "me/x") as ready: assert ready.licence.label == "cc-by-nc-4.0" and "no commercial use" in ready.card
    with prepared(copy, "me/x", "1x") as ready: assert ready.licence.label == "cc-by-nc-4.0"
    for m in about["models"].values(): m.pop("license") # as older runs wrote it: the cards are read
    (copy.path/"zoo.json").write_text(json.dumps(about))
    with prepared(copy, "me/x") as ready: assert ready.licence.label == "apache-2.0"

def test_a_model_that_was_given_is_not_published(run, hub, tmp_path):
    copy = changed(run, tmp_path, "chosen", lambda about: about.update(model="a-sort"))
    refused(lambda: push(copy, "me/x"), "The result is 'a-sort', a model that was given and not made here")

def test_a_run_without_a_result(run, tmp_path):
    copy = shutil.copytree(run.path, tmp_path/"copy", symlinks=True)
    (copy/"comparison.csv").unlink()
    refused(lambda: push(copy, "me/x"), "has no result yet. Give its command again")
    refused(lambda: push(tmp_path/"nowhere", "me/x"), "There is no run folder")

@pytest.mark.parametrize("token, name, texts", [
    (None, "me/x", ("does not let you write to 'me/x' (401)", "hf auth login")), ("reader", "me/x", ("You may not write to 'me/x' (403)",)),
    ("good", "others/x", ("You may not write to 'others/x' (403)", "a name of your own")), ("hf_wrong", "me/x", ("'me/x' (401)", "hf auth login"))])
def test_whoever_may_not_write(run, hub, monkeypatch, token, name, texts):
    if token is None: monkeypatch.delenv("HF_TOKEN")
    else: monkeypatch.setenv("HF_TOKEN", token)
    said = refused(lambda: push(run, name, point="1x"), *texts, "No file was changed there.")
    assert "hf_wrong" not in said and name not in hub.repos and not list(run.path.glob(".push-*"))

def test_a_commit_that_fails_changes_nothing(run, hub):
    push(run, "me/merged", point="1x")
    before = dict(hub.repos["me/merged"].branches)
    hub.writes_fail = 500
    refused(lambda: push(run, "me/merged"), "The hub refused 'me/merged' (500: no commits today). No file was changed there.")
    assert hub.repos["me/merged"].branches == before
    hub.writes_fail = 0
    sent = len([1 for method, _ in hub.asked if method == "PUT"])
    push(run, "me/merged")
    assert len([1 for method, _ in hub.asked if method == "PUT"]) == sent, "what came before the failure is not sent again"

def test_private_in_public_and_a_hub_that_is_away(run, hub, monkeypatch):
    push(run, "me/merged", point="1x")
    refused(lambda: push(run, "me/merged", point="1x", private=True), "is there and public, so nothing can be private in it")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(lambda: push(run, "me/merged", point="1x"), "'me/merged' cannot be written: HF_HUB_OFFLINE is set")
