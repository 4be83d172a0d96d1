"Experts of a mixture by any of their names: a member's, a folder's, a hub id, or a whole zoo at once."
import json, shutil, subprocess, sys

import pytest
import yaml

from model_glue_nb.core import InputError
from model_glue_nb.mixing.mixture import plan_mixture, read_mixture
from model_glue_nb.zoo.zoo import open_model, tiny_zoo

@pytest.fixture(scope="module")
def room(tmp_path_factory):
    "A zoo of three, and a hub cache that holds one more."
    room = tmp_path_factory.mktemp("experts")
    tiny_zoo(room/"zoo", ["a", "b", "c"], dtype="float32")
    tiny_zoo(room/"far", ["far"], dtype="float32", seed=5)
    home = room/"hub"/"hub"/"models--org--far"
    (home/"refs").mkdir(parents=True)
    (home/"refs"/"main").write_text("0" * 40)
    shutil.copytree(room/"far"/"far", home/"snapshots"/("0" * 40))
    return room

def mixed(room, name, given):
    "Mix by the command line, with that hub cache and no network."
    file = room/f"{name}.yaml"
    file.write_text(yaml.safe_dump(given))
    code = f"import os; os.environ.update(HF_HOME={str(room/'hub')!r}, HF_HUB_OFFLINE='1'); from model_glue_nb.cli.program import main; main()"
    return subprocess.run([sys.executable, "-c", code, "mix", file, room/name], capture_output=True, text=True)

@pytest.mark.parametrize("more", [{}, dict(zoo="zoo")], ids=["no zoo", "beside a zoo"])
def test_an_expert_by_hub_id(room, more):
    if more: more = dict(zoo=str(room/"zoo"))
    name = f"hub{len(more)}"
    first = "a" if more else str(room/"zoo"/"a")
    done = mixed(room, name, dict(experts=[first, "org/far"], router="random", copy=True) | more)
    assert done.returncode == 0, done.stderr
    about = json.loads((room/name/"mixture.json").read_text())
    assert [e["name"] for e in about["experts"]] == ["a", "far"]
    live = open_model(room/name).load()
    assert len(live.generate(["w3 w4", "w9 w8", "w30"], 3)) == 3 and [e.name for e in live.experts] == ["a", "far"]

def test_a_hub_id_that_is_nowhere_is_one_line(room):
    done = mixed(room, "nowhere", dict(experts=["org/far", "org/other"], router="random"))
    assert done.returncode == 2 and "'org/other' is not a local folder and could not be fetched" in done.stderr
    assert "Traceback" not in done.stderr and not (room/"nowhere").exists()

def test_a_whole_zoo(room):
    (room/"all.yaml").write_text(yaml.safe_dump(dict(zoo=str(room/"zoo"), router="random")))
    spec, zoo, _ = read_mixture(room/"all.yaml")
    assert spec.experts == ("a", "b", "c") and list(plan_mixture(spec, zoo).model) == ["a", "b", "c"]
    (room/"block.yaml").write_text(yaml.safe_dump(dict(zoo=str(room/"zoo"), router="random", level="block", base="b")))
    assert read_mixture(room/"block.yaml")[0].experts == ("a", "c"), "the base is what they share, not one of them"

def test_nobody_is_named(room):
    (room/"none.yaml").write_text("router: random\n")
    with pytest.raises(InputError, match="names no experts. List them, or give a zoo"):
        read_mixture(room/"none.yaml")
    (room/"typo.yaml").write_text(yaml.safe_dump(dict(zoo=str(room/"zoo"), experts=["aa"], router="random")))
    with pytest.raises(InputError, match="Did you mean 'a'"):
        plan_mixture(*read_mixture(room/"typo.yaml")[:2])
