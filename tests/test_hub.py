"Models by their name on a hub: a real server on this machine, the real client, and bytes of the embedded zoo."
import hashlib, json, shutil, warnings
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from fake_hub import etag
from model_glue_nb.checkpoints.fetching import Fetching, fetch_headers, fetch_model, is_here, local_folder
from model_glue_nb.checkpoints.hub import HubName, pinned
from model_glue_nb.core import InputError
from model_glue_nb.errors import Note
from model_glue_nb.gluing.pipeline import glue
from model_glue_nb.gluing.recipe import begin, read_recipe
from model_glue_nb.mergeability.doctor import doctor, examine_zoo
from model_glue_nb.merging.differences import extract
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.zoo.zoo import demo_zoo_path, read_zoo

ZOO = demo_zoo_path()
MEMBERS = ("a-base", "a-sort", "a-reverse")

@pytest.fixture
def zoo(hub):
    for name in MEMBERS: hub.add(f"org/{name}", ZOO/name)
    return [f"org/{n}" for n in MEMBERS]

def weights(folder): return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in Path(folder).glob("*.safetensors")}

def refused(call, *texts):
    with pytest.raises(InputError) as e: call()
    for text in texts: assert text in str(e.value), e.value
    return str(e.value)

def test_members_are_the_same_models(hub, zoo):
    "By name and content, and where they came from is known."
    found = read_zoo(zoo)
    for m in found:
        assert m.fingerprint() == read_zoo("demo")[m.name].fingerprint() and m.hub == f"org/{m.name}@{hub.repos[f'org/{m.name}'].branches['main']}"
    assert found.names == list(MEMBERS) and pinned(found["a-base"].path) == found["a-base"].hub
    assert read_zoo("org/a-sort").names == ["a-sort"]

def test_only_what_is_read_is_fetched(hub):
    junk = {f: b"x" * 9 for f in ("pytorch_model.bin", "original/consolidated.safetensors", "consolidated.safetensors", "model.fp16.safetensors", "model.gguf", "onnx/config.json")}
    hub.add("org/full", ZOO/"a-base", more=junk)
    folder = local_folder("org/full")
    there = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert there == {f.name for f in (ZOO/"a-base").iterdir()} and not there & set(junk)

def test_bytes_are_told(hub, zoo):
    told = []
    fetch_model(HubName("org/a-base"), Fetching(lambda *x: told.append(x)))
    n = sum(f.stat().st_size for f in (ZOO/"a-base").iterdir())
    done, total, what = zip(*told)
    assert set(total) == {n} and done[-1] == n and list(done) == sorted(done) and what[0] == "fetching org/a-base"
    told.clear()
    fetch_model(HubName("org/a-base"), Fetching(lambda *x: told.append(x)))
    assert not told and hub.bytes_of("org/a-base") == n, "nothing comes twice"

def test_a_merge_of_names_is_the_merge_of_folders(hub, zoo, tmp_path):
    def of(names): return recipe("ties", names[1:], weights=[2, 1], base=names[0], density=.5)
    merge(of(zoo), None, tmp_path/"hub")
    merge(of([str(ZOO/n) for n in MEMBERS]), None, tmp_path/"here")
    assert weights(tmp_path/"hub") == weights(tmp_path/"here") != weights(ZOO/"a-base")

def test_revisions_are_members_of_their_own(hub, zoo):
    first = hub.repos["org/a-base"].branches["main"]
    hub.repos["org/a-base"].tags["v1"] = first
    hub.add("org/a-base", ZOO/"a-reverse")
    found = read_zoo(["org/a-base", "org/a-base@v1", f"org/a-base@{first}"])
    demo = read_zoo("demo")
    assert found.names == ["a-base", "a-base@v1", f"a-base@{first[:7]}"]
    assert [m.fingerprint() == demo[n].fingerprint() for m, n in zip(found, ("a-reverse", "a-base", "a-base"))] == [True] * 3
    assert found["a-base@v1"].hub == f"org/a-base@{first}"

def test_a_folder_wins_and_revisions_are_the_hubs(hub, zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ZOO/"a-reverse", "org/a-base")
    assert local_folder("org/a-base") == Path("org/a-base")
    hub.repos["org/a-base"].tags["v1"] = hub.repos["org/a-base"].branches["main"]
    with pytest.warns(Note, match="is a folder here, and folders have no revisions"): assert pinned(local_folder("org/a-base@v1"))

def adapter(tmp_path, base):
    out = extract(ZOO/"a-sort", ZOO/"a-base", tmp_path/"lora", rank=4).path if not (tmp_path/"lora").exists() else tmp_path/"lora"
    about = json.loads((out/"adapter_config.json").read_text()) | base
    (out/"adapter_config.json").write_text(json.dumps(about))
    return out

def test_adapters_bring_their_base(hub, zoo, tmp_path):
    "An adapter on the hub whose base is on the hub too, at a revision; then with that base in the zoo, and in a merge."
    hub.repos["org/a-base"].tags["v1"] = hub.repos["org/a-base"].branches["main"]
    hub.add("org/a-base", ZOO/"a-reverse")
    lora = adapter(tmp_path, dict(base_model_name_or_path="org/a-base", revision="v1"))
    hub.add("org/lora", lora)
    wanted = read_zoo([f"{ZOO/'a-base'}+{lora}"]).models[0]
    alone = read_zoo(["org/lora"])
    assert alone.names == ["a-base@v1+lora"] and alone.models[0].fingerprint() == wanted.fingerprint()
    states = [f"org/{n}@{s}" for n, s in (("a-base", hub.repos["org/a-base"].tags["v1"]), ("lora", hub.repos["org/lora"].branches["main"]))]
    assert alone.models[0].hub == "+".join(states)
    both = read_zoo(["org/a-base@v1", "org/lora", "org/a-base@v1+org/lora@main"])
    assert both.names == ["a-base@v1", "a-base@v1+lora", "a-base@v1+lora@main"] and both.models[1].fingerprint() == wanted.fingerprint()
    merge(recipe("passthrough", ["org/a-base@v1+org/lora"]), None, tmp_path/"hub")
    assert weights(tmp_path/"hub") == weights(wanted.path)
    local = read_zoo([lora])
    assert local.models[0].hub == states[0] + "+" and local.models[0].fingerprint() == wanted.fingerprint()

def test_an_adapter_whose_base_is_nowhere_is_set_aside(hub, zoo, tmp_path):
    hub.add("org/lora", adapter(tmp_path, dict(base_model_name_or_path="org/gone", revision=None)))
    found = read_zoo(["org/a-base", "org/lora"])
    assert found.names == ["a-base"] and "which the zoo lacks. Add it. From the hub: 'org/gone'" in found.skipped["lora"]

SMALL = dict(tasks=["sort", "reverse"], search_questions=8, merge=dict(methods=["linear"], budget=3), evidence=0)

def test_a_run_is_pinned(hub, zoo, tmp_path, monkeypatch):
    "From names as from folders; run again offline; and with a branch that moved, which is said."
    r = read_recipe(SMALL | dict(zoo=zoo))
    run = glue(r, tmp_path/"run")
    here = glue(read_recipe(SMALL | dict(zoo=[str(ZOO/n) for n in MEMBERS])), tmp_path/"here")
    assert run.read_json("chosen") == here.read_json("chosen")
    timeless = [c for c in run.read_table("comparison") if c != "ms_per_question"]
    assert run.read_table("comparison")[timeless].equals(here.read_table("comparison")[timeless])
    merged = [p.name for p in (run.path/"models").iterdir() if p.is_dir() and not p.is_symlink()]
    assert merged and all(weights(run.path/"models"/n) == weights(here.path/"models"/n) for n in merged)
    pins = {n: m["hub"] for n, m in run.read_json("zoo")["models"].items()}
    assert pins == {n: f"org/{n}@{hub.repos[f'org/{n}'].branches['main']}" for n in MEMBERS}
    assert "hub" not in here.read_json("zoo")["models"]["a-base"]
    hub.add("org/a-sort", ZOO/"a-rotate")
    before = len(hub.sent)
    with pytest.warns(Note, match="'org/a-sort' was at .* when this run began, and is at .* now"): again = glue(r, tmp_path/"run")
    assert {n: m["hub"] for n, m in again.read_json("zoo")["models"].items()} == pins
    assert not [p for p, n in hub.sent[before:] if p.endswith("safetensors")]
    fresh = read_zoo(zoo)
    assert fresh["a-sort"].fingerprint() == read_zoo("demo")["a-rotate"].fingerprint()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        assert begin(r, tmp_path/"run").zoo["a-sort"].hub == pins["a-sort"] and len(hub.asked) == asked
    refused(lambda: read_zoo(["org/a-rotate"]), "HF_HUB_OFFLINE is set, and the cache does not hold it whole")

def test_a_hub_that_is_away(hub, zoo, tmp_path):
    "What is cached is used and that is said; what is not is one message."
    read_zoo(zoo[:1])
    hub.close()
    close_session() # and the line that is open
    with pytest.warns(Note, match="'org/a-base' was taken from the cache, as it was last seen"): assert read_zoo(zoo[:1]).names == ["a-base"]
    refused(lambda: read_zoo(zoo), "'org/a-sort' is not a local folder and could not be fetched", "cannot be reached", "Check the name, the network")

def test_half_a_snapshot_is_not_taken_for_a_model(hub, zoo, monkeypatch):
    folder = local_folder("org/a-base")
    assert is_here("org/a-base")
    (folder/"model.safetensors").resolve().unlink()
    (folder/"model.safetensors").unlink()
    assert not is_here("org/a-base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(lambda: local_folder("org/a-base"), "the cache does not hold it whole")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert weights(local_folder("org/a-base")) == weights(ZOO/"a-base"), "what is missing is fetched"

def test_a_line_that_breaks_goes_on(hub, zoo, monkeypatch):
    "Within a command by itself, from where it broke."
    n = (ZOO/"a-base"/"model.safetensors").stat().st_size
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**14) # what the client keeps at once
    hub.cut["model.safetensors"] = n // 3
    assert weights(local_folder("org/a-base")) == weights(ZOO/"a-base")
    assert n <= hub.bytes_of("org/a-base", "safetensors") < n + 2**14, "no byte of the weights came twice"

def test_a_file_that_is_too_short(hub, zoo):
    "A server that says it is done too early: nothing is kept under the file's name, and complete files are."
    data = (ZOO/"a-base"/"model.safetensors").read_bytes()
    hub.swapped["model.safetensors"] = data[:-1000]
    refused(lambda: local_folder("org/a-base"), "'org/a-base' was cut off while it was fetched", "files that are complete are kept")
    hub.swapped.clear()
    small = hub.bytes_of("org/a-base", "tokenizer.json")
    assert weights(local_folder("org/a-base")) == weights(ZOO/"a-base") and hub.bytes_of("org/a-base", "tokenizer.json") == small > 0

@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_other_bytes_than_the_hash(hub, zoo, file):
    data = bytearray((ZOO/"a-base"/file).read_bytes())
    data[-2] ^= 1
    hub.swapped[file] = bytes(data)
    refused(lambda: local_folder("org/a-base"), f"'{file}' of 'org/a-base' has other bytes than its hash on the hub says", "it was removed")
    hub.swapped.clear()
    assert (local_folder("org/a-base")/file).read_bytes() == (ZOO/"a-base"/file).read_bytes()

def test_a_full_disk_is_said_before_the_first_byte(hub, zoo, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 10, 5))
    refused(lambda: local_folder("org/a-base"), "GB are free")
    assert not hub.bytes_of("org/a-base")

def test_what_is_here_needs_no_disk(hub, zoo, monkeypatch):
    local_folder("org/a-base")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 10, 5))
    assert local_folder("org/a-base")

def test_gated(hub, monkeypatch):
    hub.add("org/gated", ZOO/"a-base", gated=True)
    said = refused(lambda: local_folder("org/gated"), "'org/gated' is gated", f"Accept it at {hub.url}/org/gated", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", "reader")
    assert local_folder("org/gated") and "reader" not in said

def test_private_missing_and_misspelt(hub, zoo, monkeypatch):
    hub.add("org/secret", ZOO/"a-base", private=True)
    for name in ("org/secret", "org/nobody-at-all"):
        refused(lambda: local_folder(name), f"'{name}' is not a local folder", "no such model, or it is private", "hf auth login")
    refused(lambda: local_folder("org/a-bse"), "Did you mean 'org/a-base'?")
    monkeypatch.setenv("HF_TOKEN", "reader")
    assert local_folder("org/secret")

def test_a_revision_that_is_not_there(hub, zoo):
    hub.repos["org/a-base"].tags["v1.0"] = hub.repos["org/a-base"].branches["main"]
    refused(lambda: local_folder("org/a-base@v1"), "'org/a-base' has no revision 'v1'", "Did you mean 'v1.0'? Known: main, v1.0")
    refused(lambda: local_folder(f"org/a-base@{'3' * 40}"), "has no revision '3333")

def test_a_token_that_is_not_valid_is_not_shown(hub, zoo, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    assert "verysecret" not in refused(lambda: local_folder("org/a-base"), "does not accept your token (401)", "hf auth login")

def test_a_password_in_the_address_is_not_shown(hub, zoo, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url.replace("//", "//me:secret@"))
    hub.close()
    close_session()
    assert "secret" not in refused(lambda: local_folder("org/a-base"), "cannot be reached")

def test_an_old_state_is_taken_and_that_is_said(hub, zoo):
    "Fetched or not, a pin is what is read."
    old = hub.repos["org/a-base"].branches["main"]
    hub.add("org/a-base", ZOO/"a-reverse")
    how = Fetching(pins={"a-base": f"org/a-base@{old}"})
    with pytest.warns(Note, match="and is at"): assert weights(local_folder("org/a-base", how)) == weights(ZOO/"a-base")
    assert weights(local_folder("org/a-base")) == weights(ZOO/"a-reverse")

@pytest.mark.parametrize("status", [403, 429, 500])
def test_answers_that_are_errors(hub, zoo, status):
    hub.down = status
    refused(lambda: local_folder("org/a-base"), f"{status}")

def test_pickled_weights_are_refused_before_anything_is_fetched(hub):
    hub.add("org/old", ZOO/"a-base", only=lambda f: f.suffix != ".safetensors", more={"pytorch_model.bin": b"x"})
    refused(lambda: local_folder("org/old"), "has no .safetensors on the hub, only pytorch_model.bin, which is never read")
    assert not hub.bytes_of("org/old")

def test_twins_are_refused_before_anything_is_fetched(hub, zoo):
    hub.add("other/a-base", ZOO/"a-base")
    refused(lambda: read_zoo(["org/a-base", "other/a-base"]), "Two models are called 'a-base'")
    assert not hub.sent

def test_the_doctor_reads_headers_at_a_revision(hub, zoo, tmp_path):
    first = hub.repos["org/a-base"].branches["main"]
    hub.add("org/a-base", ZOO/"c-base")
    table = doctor(["org/a-base", f"org/a-base@{first}"]).set_index("model")
    local = doctor("demo").set_index("model")
    for name, own in (("a-base", "c-base"), (f"a-base@{first[:7]}", "a-base")):
        for k in ("architecture", "params", "bytes", "tokenizer"): assert table.loc[name, k] == local.loc[own, k]
    assert 0 < hub.bytes_of("org/a-base", "safetensors") <= 2 * 100_000

def test_the_doctor_finds_the_base_of_an_adapter(hub, zoo, tmp_path):
    hub.add("org/lora", adapter(tmp_path, dict(base_model_name_or_path="org/a-base", revision=None)))
    case, = examine_zoo(["org/lora"])
    assert case.model.name == "a-base+lora" and case.sound and case.base == "a-base"
    assert hub.bytes_of("org/a-base", "safetensors") <= 100_000

def test_a_dry_run_fetches_no_weights(hub, zoo):
    from model_glue_nb.gluing.dry_run import estimate_run
    hub.repos["org/a-sort"].counted = dict(parameters=dict(BF16=565248), total=565248)
    read_zoo(zoo[:1])
    hub.add("org/a-base", ZOO/"a-reverse") # it moved, and is still read from the cache
    before = len(hub.sent)
    table = estimate_run(read_recipe(SMALL | dict(zoo=zoo[:2])))
    assert not [p for p, _ in hub.sent[before:] if "/resolve/" in p]
    rows = table[table.step == "fetch"].what.tolist()
    assert len(rows) == 1 and rows[0].startswith("org/a-sort: ") or rows[0].startswith("a-sort: "), rows
    n = sum(f.stat().st_size for f in (ZOO/"a-sort").iterdir())
    assert f"{n / 1e9:.2f} GB" in rows[0] and "5.65e+05 parameters, as the hub says" in " ".join(table[table.step == "assume"].what)

def test_headers_of_one_model(hub, zoo, tmp_path):
    folder = fetch_headers(HubName("org/a-base"), tmp_path)
    assert {f.name: f.stat().st_size for f in folder.iterdir()} == {f.name: f.stat().st_size for f in (ZOO/"a-base").iterdir()}

def test_hashes_are_gits_and_lfs(tmp_path):
    "The hub on this machine names files as a real one does."
    assert etag("config.json", b"Hello World!\n") == "980a0d5f19a64b4b30a87d4206aade58726b60e3"

def test_commands_take_names(hub, zoo, command, tmp_path):
    code, out, err = command("doctor", "org/a-base", "--json")
    assert code == 0 and json.loads(out)[0]["model"] == "a-base", err
    code, out, err = command("similarity", "org/nobody")
    assert code == 2 and "no such model, or it is private" in err and "Traceback" not in err
