"Checkpoints of recorded shapes that hold no weights: 16 × 7B and 4 × 70B go through doctor, plan and engine, in little memory and on no disk."
import json, math, os, subprocess, sys
from pathlib import Path

import pytest

from model_glue_nb.checkpoints.recorded import recorded, recorded_models, write_headers
from model_glue_nb.core import InputError
from model_glue_nb.gluing.recipe import read_recipe
from model_glue_nb.zoo.zoo import read_zoo

RECIPES = Path(__file__).parent.parent/"recipes"
SEVENTY = [m for m in recorded_models() if m.said["layout"] == "llama-2-70b"]

def sizes(folder):
    "Bytes that the files claim, and bytes that they take."
    files = [os.stat(f) for f in folder.rglob("*") if f.is_file()]
    return sum(f.st_size for f in files), sum(f.st_blocks * 512 for f in files)

@pytest.fixture(scope="module")
def sevens(tmp_path_factory):
    out = tmp_path_factory.mktemp("sevens")
    for name in read_recipe(RECIPES/"which16.yaml").zoo: write_headers(name, out/recorded(name).repo.split("/")[1])
    return out

@pytest.fixture(scope="module")
def seventies(tmp_path_factory):
    out = tmp_path_factory.mktemp("seventies")
    for m in SEVENTY: write_headers(m, out/m.repo.split("/")[1])
    return out

def test_they_take_no_space(sevens, seventies):
    for folder, claimed in ((sevens, 255.4e9), (seventies, 551.8e9)):
        apparent, taken = sizes(folder)
        assert apparent == pytest.approx(claimed, rel=1e-3) and taken < 4e6, (apparent, taken)

WORK = """
import json, sys, threading, tracemalloc
from model_glue_nb.mergeability.doctor import examine_zoo, pairs_table
from model_glue_nb.merging.engine import run_task
from model_glue_nb.merging.estimate import plan
from model_glue_nb.merging.planner import MergePlan
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.zoo.stored import Files
from model_glue_nb.zoo.zoo import read_zoo
folder, out, tensor, method, *names = sys.argv[1:]
def most_held(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024 # this program's own
def read_by_us(): return int(next(l for l in open("/proc/self/io") if l.startswith("rchar")).split()[1])
cases = examine_zoo(folder)
pairs = pairs_table(cases)
after_doctor = read_by_us()
zoo = read_zoo(folder).subset(names)
how = dict(base=names[-1], density=.5) if method == "ties" else {}
r = recipe(method, names[:-1] if how else names, **how)
planned = plan(r, zoo, out)
after_plan = read_by_us()
task = MergePlan(r, zoo).build()[tensor]
made = [0]
def put(block, start): made[0] += block.size
tracemalloc.start()
with Files() as files: run_task(task, files, put, task.dtype)
held = tracemalloc.get_traced_memory()[1]
print(json.dumps(dict(sound=sum(c.sound for c in cases), verdicts=pairs.verdict.value_counts().to_dict(), plan=planned,
                      doctor=after_doctor, planning=after_plan, made=made[0], held=held, rss=most_held())))
"""

def work(*args):
    done = subprocess.run([sys.executable, "-c", WORK, *map(str, args)], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])

LLAMAS = [recorded(n).repo.split("/")[1] for n in read_recipe(RECIPES/"which12.yaml").zoo]

@pytest.mark.parametrize("zoo, tensor, method, n", [("sevens", "model.layers.3.self_attn.q_proj.weight", "linear", 12), ("seventies", "model.layers.3.self_attn.k_proj.weight", "ties", 3)])
def test_doctor_plan_and_engine_stay_small(zoo, tensor, method, n, request, tmp_path):
    "Nothing is read but headers, and of one tensor its values: in pieces, however many models there are."
    folder = request.getfixturevalue(zoo)
    names = LLAMAS if zoo == "sevens" else [m.repo.split("/")[1] for m in SEVENTY[:3]]
    done = work(folder, tmp_path/"out", tensor, method, *names)
    apparent, _ = sizes(folder)
    assert done["sound"] == len(list(folder.iterdir()))
    assert done["doctor"] < 40e6 and done["planning"] - done["doctor"] < 100e6, "headers, and 32 MB that time the disk"
    model = recorded(SEVENTY[0].repo) if zoo == "seventies" else recorded("teknium/OpenHermes-7B")
    assert done["made"] == 2 * math.prod(model.shapes[tensor])
    assert done["held"] < 8e6 and done["rss"] < 600e6 < apparent / 400
    plan = done["plan"]
    assert plan["input_bytes"] == n * model.n_bytes and plan["write_bytes"] == model.n_bytes
    assert plan["memory_bytes"] < 2e9
    assert not (tmp_path/"out").exists()

def test_a_plan_that_the_disk_cannot_hold_is_a_problem(seventies, tmp_path, monkeypatch):
    from model_glue_nb.merging.estimate import plan
    from model_glue_nb.merging.recipes import recipe
    import model_glue_nb.outputs as outputs
    class Usage: free = 10**9
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda home: Usage)
    zoo = read_zoo(seventies)
    bad = plan(recipe("linear", [m.repo.split("/")[1] for m in SEVENTY[:2]]), zoo, tmp_path/"out")["problems"]
    assert len(bad) == 1 and "needs 137.95 GB, but only 1.00 GB are free" in bad[0], bad

def test_a_shape_that_is_not_recorded_is_refused(tmp_path):
    with pytest.raises(InputError, match="There is no recorded model 'org/name'"): write_headers("org/name", tmp_path/"x")
    with pytest.raises(InputError, match="There is no recorded model"): write_headers("lmsys/vicuna-7b-v1.5@main", tmp_path/"x")
    assert not list(tmp_path.iterdir())
