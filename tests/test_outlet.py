"What is written is what was asked for: numbers, names, companions, and results that are whole or absent."
import json, os, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_glue_nb.core import AlreadyThere, InputError, atomic_path
from model_glue_nb.merging.engine import run_tasks
from model_glue_nb.zoo.stored import Mapped
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.merging.planner import checked_plan
from model_glue_nb.zoo.zoo import open_model, tiny_zoo

NORM, UP = "model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.up_proj.weight"

@pytest.fixture
def zoo(tmp_path): return tiny_zoo(tmp_path/"zoo", ["a", "b"])

def change(model, **tensors):
    "The same folder with other tensors."
    file = model.path/"model.safetensors"
    save_file(load_file(file) | tensors, file, dict(format="pt"))
    return open_model(model.path)

def opened(zoo): return {m.name: open_model(m.path) for m in zoo}

def configure(model, **config):
    file = model.path/"config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))

def names(folder): return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())

@pytest.mark.parametrize("value, options, passes", [
    (65504., dict(out_dtype="float16"), True), (65536., dict(out_dtype="float16"), False),
    (-70000., dict(dtype="float16"), False), (70000., {}, True)])
def test_values_must_be_finite_as_they_are_stored(zoo, tmp_path, value, options, passes):
    models = {m.name: change(m, **{NORM: torch.full((32,), value)}) for m in zoo}
    def run(**more): return merge(recipe("linear", ["a", "b"], options=options), models, tmp_path/"o", **more)
    if passes:
        assert run().path.exists()
        return
    with pytest.raises(InputError, match=f"'{NORM}' of the result"): run()
    assert not (tmp_path/"o").exists()
    run(allow_nan=True)

def test_a_factor_may_overflow(zoo, tmp_path):
    models = {m.name: change(m, **{NORM: torch.full((32,), v, dtype=torch.float16)})
              for m, v in zip(zoo, (0, 30000.))}
    with pytest.raises(InputError, match="not finite as F16"):
        merge(recipe("task_arithmetic", ["b"], [3.], base="a"), models, tmp_path/"o")

@pytest.mark.parametrize("scale, whole",
                         [(torch.tensor(.25), None), (torch.rand(48, 1), 1), (torch.rand(2, 3), 2)])
def test_eight_bits_are_read_as_the_floats_they_stand_for(zoo, tmp_path, scale, whole):
    floats, size = {}, (32, 12) # 48 × 32 weights: the last blocks are cut off
    for m in zoo:
        x = load_file(m.path/"model.safetensors")[UP].float().to(torch.float8_e4m3fn)
        wide = scale if whole != 2 else scale.repeat_interleave(32, 0)[:48].repeat_interleave(12, 1)[:, :32]
        floats[m.name] = x.float() * wide
        end, block = ("_scale_inv", dict(weight_block_size=list(size))) if whole == 2 else ("_scale", {})
        change(m, **{UP: x, UP + end: scale, "model.layers.0.mlp.input_scale": torch.ones(1)})
        configure(m, quantization_config=dict(quant_method="fp8") | block)
    out = merge(recipe("linear", ["a", "b"], [.3, .7], options=dict(out_dtype="float32")),
                opened(zoo), tmp_path/"o", verify=True)
    found = load_file(out.path/"model.safetensors")
    assert torch.allclose(found[UP], .3 * floats["a"] + .7 * floats["b"], atol=1e-6)
    assert "quantization_config" not in out.config and not any("scale" in n for n in found)

def test_eight_bits_that_are_no_number_are_refused(zoo, tmp_path):
    x = torch.zeros(48, 32, dtype=torch.uint8)
    x[3, 5] = 0x7f
    change(zoo["b"], **{UP: x.view(torch.float8_e4m3fn), f"{UP}_scale": torch.tensor(1.)})
    with pytest.raises(InputError, match="holds NaN"):
        merge(recipe("linear", ["a", "b"]), opened(zoo), tmp_path/"o")

@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])
def test_whole_numbers_are_copied_only_where_they_are_equal(zoo, tmp_path, dtype):
    one = torch.tensor([0, 1, 1]).to(dtype)
    for m in zoo: change(m, table=one)
    out = merge(recipe("linear", ["a", "b"]), opened(zoo), tmp_path/"o")
    assert torch.equal(load_file(out.path/"model.safetensors")["table"], one)
    models = dict(a=open_model(zoo["a"].path),
                  b=change(zoo["b"], table=torch.tensor([0, 1, 0]).to(dtype)))
    with pytest.raises(InputError, match="'table' holds whole numbers"):
        merge(recipe("linear", ["a", "b"]), models, tmp_path/"p")

GOOD = """LICENSE LICENSE.txt NOTICE USE_POLICY.md chat_template.jinja preprocessor_config.json tekken.json
additional_chat_templates/tool.jinja""".split()
BAD = """x.PY modeling.py nested/model.safetensors model.gguf w.pkl run.sh README.txt chat_templates/code.py
LICENSE.bin optimizer.pt adapter_model.bin .env""".split()

def test_companions_are_a_list(zoo, tmp_path):
    for f in (*GOOD, *BAD):
        (zoo["a"].path/f).parent.mkdir(exist_ok=True)
        (zoo["a"].path/f).write_text("{}")
    (tmp_path/"secret").mkdir()
    (tmp_path/"secret/x.jinja").write_text("secret")
    os.symlink(tmp_path/"secret/x.jinja", zoo["a"].path/"LICENSE.md")
    os.symlink(tmp_path/"secret", zoo["a"].path/"chat_templates_2")
    os.mkfifo(zoo["a"].path/"NOTICE.txt")
    found = names(merge(recipe("linear", ["a", "b"]), zoo, tmp_path/"o").path)
    assert not {*GOOD} - {*found} and not {*BAD, "LICENSE.md", "NOTICE.txt"} & {*found}
    assert "secret" not in "".join(f.read_text(errors="replace") for f in (tmp_path/"o").rglob("*") if f.is_file())

def test_code_goes_along_only_when_it_was_allowed(zoo, tmp_path):
    (zoo["a"].path/"modeling.py").write_text("")
    configure(zoo["a"], auto_map=dict(AutoConfig="modeling.X"))
    out = merge(recipe("linear", ["a", "b"]), zoo, tmp_path/"o")
    assert "auto_map" not in out.config and not (out.path/"modeling.py").exists()
    out = merge(recipe("linear", ["a", "b"]), zoo, tmp_path/"p", code=True)
    assert "auto_map" in out.config and (out.path/"modeling.py").exists()

def test_a_tokenizer_that_does_not_load_is_said_before_the_work(zoo, tmp_path):
    file = zoo["a"].path/"tokenizer.json"
    t = json.loads(file.read_text())
    t["model"]["type"] = "Nothing"
    file.write_text(json.dumps(t))
    seen = []
    with pytest.raises(InputError, match="tokenizer.json cannot be loaded"):
        merge(recipe("linear", ["a"]), zoo, tmp_path/"o", progress=lambda *x: seen.append(x))
    assert not seen and not (tmp_path/"o").exists()

@pytest.mark.parametrize("what", ["truncated", "replaced", "deleted", "rewritten"])
def test_a_mapped_file_that_changes_is_an_error_and_no_signal(zoo, what):
    plan, files, f = checked_plan(recipe("linear", ["a", "b"]), zoo), Mapped(), zoo["b"].path/"model.safetensors"
    def go():
        run_tasks(list(plan.tasks.values()), lambda task: ("BF16", lambda block, start: None), files=files)
    go()
    go()
    if what == "truncated": os.truncate(f, 4000)
    if what == "deleted": f.unlink()
    if what == "replaced":
        (f.parent/"x").write_bytes(f.read_bytes())
        os.replace(f.parent/"x", f)
    if what == "rewritten":
        x = f.read_bytes()
        os.utime(f, ns=(0, 0))
        f.write_bytes(x)
    with pytest.raises(InputError, match="changed, replaced or deleted"): go()

CODE = """
import os, sys, time
from model_glue_nb.outputs import atomic_path
with atomic_path(sys.argv[1], overwrite=False) as tmp:
    tmp.mkdir(); (tmp/"x").write_text(sys.argv[2]); print("ready", flush=True); sys.stdin.read()
"""
def writer(path, text):
    p = subprocess.Popen([sys.executable, "-c", CODE, path, text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)) # nohup around the tests ignores it
    p.stdout.readline()
    return p

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_ask_clean_up(tmp_path, number):
    p = writer(tmp_path/"o", "1")
    p.send_signal(number)
    p.communicate()
    assert p.returncode == -number and os.listdir(tmp_path) == []

def test_the_dead_are_swept_and_the_living_are_not(tmp_path):
    dead, living = writer(tmp_path/"o", "1"), writer(tmp_path/"p", "2")
    dead.kill()
    dead.communicate()
    assert len(os.listdir(tmp_path)) == 2
    with atomic_path(tmp_path/"q") as tmp: tmp.write_text("x")
    assert len(list(tmp_path.glob(".o.*"))) == 0 and len(list(tmp_path.glob(".p.*"))) == 1
    living.communicate()
    assert living.returncode == 0 and names(tmp_path) == ["p/x", "q"]

def test_of_four_writers_one_succeeds(tmp_path):
    ps = [writer(tmp_path/"o", str(i)) for i in range(4)]
    told = [p.communicate()[1] for p in ps]
    assert sorted(p.returncode for p in ps) == [0, 1, 1, 1] and sum(b"already exists" in t for t in told) == 3
    winner = [p.returncode for p in ps].index(0)
    assert (tmp_path/"o/x").read_text() == str(winner) and os.listdir(tmp_path) == ["o"]

def test_a_dangling_link_is_something(tmp_path):
    os.symlink(tmp_path/"nowhere", tmp_path/"o")
    with pytest.raises(AlreadyThere):
        with atomic_path(tmp_path/"o", overwrite=False): pass
