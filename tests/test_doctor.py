"The doctor on models that lie on a hub: a server on this machine speaks its protocol, the real client asks it, and the bytes sent are counted."
import json, os, subprocess, sys

import pytest

from fake_hub import Hub
from model_glue_nb.zoo.zoo import demo_zoo_path

@pytest.fixture
def hub():
    hub = Hub()
    for n in ("a-base", "a-sort", "c-base"): hub.add(f"org/{n}", demo_zoo_path()/n)
    yield hub
    hub.close()

def ask(hub, tmp_path, *args):
    env = os.environ | dict(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path/"cache"), NO_PROXY="127.0.0.1", HF_HUB_DISABLE_TELEMETRY="1")
    return subprocess.run([sys.executable, "-c", "from model_glue_nb.cli.program import main; main()", "doctor", *map(str, args)], env=env, capture_output=True, text=True)

def test_hub_ids_are_judged_by_their_headers(hub, tmp_path):
    zoo = tmp_path/"zoo.yaml"
    zoo.write_text(f"- org/a-base\n- org/c-base\n- {demo_zoo_path()/'a-sort'}\n")
    r = ask(hub, tmp_path, zoo, "--json")
    assert r.returncode == 0, r.stderr
    rows = {x["model"]: x for x in json.loads(r.stdout)}
    local = json.loads(ask(hub, tmp_path, demo_zoo_path(), "--json").stdout)
    local = {x["model"]: x for x in local}
    for name in ("a-base", "c-base"):
        for k in ("architecture", "layers", "heads", "rope", "params", "bytes", "dtype", "tokenizer", "licence", "problem", "notes"):
            assert rows[name][k] == local[name][k], k
    assert rows["a-base"]["group"] == rows["a-sort"]["group"] != rows["c-base"]["group"]
    sent = {k: hub.bytes_of(f"org/{k}", "safetensors") for k in ("a-base", "c-base")}
    for name, n in sent.items(): # the first request asks for 100,000 bytes, where nearly every header ends
        size = (demo_zoo_path()/name/"model.safetensors").stat().st_size
        assert 0 < n <= 100_000 < size / 10, "headers alone are fetched"

def test_pairs_of_hub_ids(hub, tmp_path):
    zoo = tmp_path/"zoo.yaml"
    zoo.write_text("- org/a-base\n- org/a-sort\n- org/c-base\n")
    r = ask(hub, tmp_path, zoo, "--pairs", "--json")
    assert r.returncode == 0, r.stderr
    found = {(x["a"], x["b"]): x["verdict"] for x in json.loads(r.stdout)}
    assert found == {("a-base", "a-sort"): "as is", ("a-base", "c-base"): "mix only", ("a-sort", "c-base"): "mix only"}

def test_a_long_header_takes_a_second_request(hub, tmp_path):
    import numpy as np
    from safetensors.numpy import save_file
    import shutil
    big = shutil.copytree(demo_zoo_path()/"a-base", tmp_path/"big")
    save_file({f"model.layers.0.x{i}" + "y" * 100: np.zeros(1, np.float32) for i in range(1500)}, big/"model.safetensors")
    hub.add("org/big", big)
    zoo = tmp_path/"zoo.yaml"
    zoo.write_text("- org/big\n")
    r = ask(hub, tmp_path, zoo, "--json")
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout)[0]["params"] == 1500

def test_a_wrong_id_is_one_message(hub, tmp_path):
    zoo = tmp_path/"zoo.yaml"
    zoo.write_text("- org/nobody\n")
    r = ask(hub, tmp_path, zoo)
    assert r.returncode == 2 and "could not be fetched" in r.stderr and "Traceback" not in r.stderr

def test_a_hub_that_cannot_be_reached_is_one_message(hub, tmp_path):
    hub.close()
    zoo = tmp_path/"zoo.yaml"
    zoo.write_text("- org/a-base\n")
    r = ask(hub, tmp_path, zoo)
    assert r.returncode == 2 and "Check the name, the network" in r.stderr and "Traceback" not in r.stderr
