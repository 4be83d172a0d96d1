"What is installed is what was written: wheel and sdist hold the package, its data and recipes and nothing else, and the command works from the wheel alone."
import configparser, email, json, os, shutil, subprocess, sys, sysconfig, tarfile, zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta as b; import sys; out, *kinds = sys.argv[1:]; [getattr(b, f'build_{k}')(out) for k in kinds]"

def listed():
    "Files of the repository, those not yet committed too."
    out = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [f for f in out.stdout.split("\0") if f and (ROOT/f).exists()]

def build(tree, out, *kinds):
    done = subprocess.run([sys.executable, "-c", BUILD, out, *kinds], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A wheel and an sdist, from a copy without what lies around."
    room = tmp_path_factory.mktemp("built")
    for f in listed():
        if (ROOT/f).is_dir(): continue # a link to a folder
        (room/"tree"/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/f, room/"tree"/f)
    (room/"out").mkdir()
    build(room/"tree", room/"out", "wheel", "sdist")
    return room

@pytest.fixture(scope="module")
def wheel(built): return next((built/"out").glob("*.whl"))

def files(wheel): return {n for n in zipfile.ZipFile(wheel).namelist() if not n.endswith("/")}

def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    inside, info = files(wheel), wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info/"
    assert {n for n in inside if not n.startswith(info)} == {f for f in listed() if f.startswith("model_glue_nb/")}
    wanted = ("py.typed", "data/recipes/demo.yaml", "data/recipes/which16.yaml", "data/zoo/a-sort/model.safetensors", "data/grids/tiny.yaml",
              "data/report.html.template", "data/architectures.tsv")
    assert {f"model_glue_nb/{f}" for f in wanted} <= inside and any("data/suites/demo/" in n for n in inside)
    assert any(n.startswith(info) and n.endswith("LICENSE") for n in inside)

def test_its_metadata_say_where_it_runs(wheel):
    inside = zipfile.ZipFile(wheel)
    about = email.message_from_bytes(inside.read(next(n for n in inside.namelist() if n.endswith("METADATA"))))
    said = [c for c in about.get_all("Classifier") if c.startswith("Programming Language :: Python :: 3.")]
    assert said == [f"Programming Language :: Python :: {v}" for v in ("3.11", "3.12", "3.13")] and about["Requires-Python"] == ">=3.11"
    assert {"ray", "serve", "dev", "sentence"} == set(about.get_all("Provides-Extra")) and "Typing :: Typed" in about.get_all("Classifier")
    for extra, package in (("ray", "ray"), ("serve", "fastapi"), ("dev", "pytest")):
        assert any(r.startswith(package) and f'extra == "{extra}"' in r for r in about.get_all("Requires-Dist")), extra

def test_a_wheel_from_the_sdist_is_the_same(built, wheel):
    packed = next((built/"out").glob("*.tar.gz"))
    with tarfile.open(packed) as t:
        names = t.getnames()
        t.extractall(built/"again", filter="data")
    assert not [n for n in names if "/tests" in n or "/nbs" in n or n.endswith(".pyc")]
    (built/"second").mkdir()
    build(next((built/"again").iterdir()), built/"second", "wheel")
    assert files(next((built/"second").glob("*.whl"))) == files(wheel)

@pytest.fixture(scope="module")
def installed(built, wheel):
    "A clean environment with the wheel; what it needs is lent by this one, whose own model_glue_nb is out of sight."
    home = built/"env"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    site = Path(sysconfig.get_path("purelib", vars=dict(base=home, platbase=home)))
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} # pip takes what lies there for installed
    subprocess.run([home/"bin/python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True, env=alone)
    (site/"lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home

def run(home, *args, at):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(XDG_CACHE_HOME=str(at/"cache"), HF_HUB_OFFLINE="1", MODEL_GLUE_STORE="none")
    return subprocess.run([home/"bin"/args[0], *args[1:]], cwd=at, env=env, capture_output=True, text=True)

def test_the_command_works_from_the_wheel_alone(installed, tmp_path):
    found = run(installed, "python", "-c", "import model_glue_nb; print(model_glue_nb.__file__)", at=tmp_path)
    assert found.stdout.startswith(str(installed)), (found.stdout, found.stderr)
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT/"settings.ini")
    assert settings["DEFAULT"]["version"] in run(installed, "model-glue", "--version", at=tmp_path).stdout
    assert "_MODEL_GLUE_COMPLETE" in run(installed, "model-glue", "--show-completion", "bash", at=tmp_path).stdout
    done = run(installed, "model-glue", "run", "demo", "--out", "runs/demo", "--dry-run", "--json", at=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"score", "search", "merge", "mix", "report"} <= {r["step"] for r in json.loads(done.stdout)}
    done = run(installed, "model-glue", "run", "dmo", "--out", "x", at=tmp_path)
    assert done.returncode == 2 and "Did you mean 'demo'?" in done.stderr and not (tmp_path/"x").exists()
