"What a merge does with files, threads and progress: a base that is bad is named, chunks come in order, keys go along, nothing is read that changed."
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model_glue_nb.core import InputError, silent
from model_glue_nb.merging import engine
from model_glue_nb.merging.engine import in_groups, moved_bytes, run_task, run_tasks
from model_glue_nb.zoo.stored import Files, Mapped, read_whole
from model_glue_nb.merging.planner import checked_plan
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.zoo.zoo import open_model, tiny_zoo

SHAPES = dict(w=(90, 401), v=(33, 7), s=(5,))

@pytest.fixture
def models(tmp_path):
    "A base and two models, of three stored types."
    out, r = {}, np.random.default_rng(0)
    for n, dtype in dict(base=torch.float32, a=torch.bfloat16, b=torch.float64).items():
        home = tmp_path/n
        home.mkdir()
        save_file({k: torch.from_numpy(r.integers(-30, 31, s) / 64).to(dtype) for k, s in SHAPES.items()},
                  home/"model.safetensors")
        for file in ("config.json", "vocab.json"): (home/file).write_text("{}")
        out[n] = open_model(home, n)
    return out

def tasks(models, method="task_arithmetic", **p):
    return dict(checked_plan(recipe(method, ["a", "b"], [.3, 1.2], "base", options=dict(out_dtype="float32"), **p),
                             models).tasks)

def values(m, k): return m.values(k).astype(np.float64)

def run(task, files, **more):
    out = np.empty(task.n_values, np.float32)
    def put(block, start): out[start:start + len(block) // 4] = np.asarray(block).view(np.float32)
    run_task(task, files, put, "F32", **more)
    return out.reshape(task.shape)

def test_types_are_read_as_what_they_are(models):
    for task in tasks(models).values():
        base, a, b = (values(models[n], task.name) for n in ("base", "a", "b"))
        with Files() as files:
            assert np.abs(run(task, files) - (base + .3 * (a - base) + 1.2 * (b - base))).max() < 1e-6

def test_whoever_holds_no_numbers_is_named(models):
    for culprit in ("base", "a"):
        f = models[culprit].path/"model.safetensors"
        good = f.read_bytes()
        t = models[culprit].tensors["v"]
        raw = bytearray(good)
        raw[t.start + 4:t.start + 8] = (np.array([np.inf], np.float32).tobytes()
                                        if culprit == "base"
                                        else np.array([0x7f80, 0x7f80], np.uint16).tobytes())
        f.write_bytes(raw)
        with Files() as files:
            with pytest.raises(InputError, match=f"'v' of '{culprit}' holds NaN"):
                run(tasks(models)["v"], files)
            assert not np.isfinite(run(tasks(models)["v"], files, allow_nan=True)).all()
        f.write_bytes(good)

def test_what_is_drawn_follows_the_keys(models):
    task = tasks(models, "dare_linear", density=.4)["w"]
    assert len(set(task.keys)) == 2
    with Files() as files:
        one, two = run(task, files), run(replace(task, keys=[k + 1 for k in task.keys]), files)
    assert .2 < (one != two).mean() and not np.array_equal(one, run_default(task))

def run_default(task):
    with Files() as files: return run(replace(task, keys=[]), files)

def test_groups_hand_items_back_in_their_order():
    with ThreadPoolExecutor(3) as pool:
        for n in (1, 2, 5, 17):
            assert in_groups(pool, 4)(lambda x: 10 * x, list(range(n))) == [10 * x for x in range(n)]

def test_progress_counts_what_is_read_and_written(models):
    made = list(tasks(models).values())
    n = sum(int(np.prod(s)) for s in SHAPES.values())
    assert sum(map(moved_bytes, made)) == n * (4 + 2 + 8 + 4) # base, a, b, result
    seen = []
    run_tasks(made, lambda task: ("F32", lambda block, start: None), progress=lambda done, total, what: seen.append((done, total, what)))
    assert seen[-1] == (n * 18, n * 18, "merging")
    assert [d for d, *_ in seen] == sorted(d for d, *_ in seen)

def test_nothing_is_counted_where_nobody_watches(models, monkeypatch):
    "Pieces come thousands a second: they go straight to the sink."
    def counted(*_): raise AssertionError("pieces are counted for nobody")
    monkeypatch.setattr(engine, "ByteCounter", counted)
    made, written = list(tasks(models).values()), []
    def sink(job): return "F32", lambda block, start: written.append(job.name)
    run_tasks(made, sink)
    run_tasks(made, sink, progress=silent)
    assert set(written) == {j.name for j in made}
    with pytest.raises(AssertionError, match="for nobody"): run_tasks(made, sink, progress=lambda *_: None)

def test_large_and_small_tensors_are_all_made_once(models, monkeypatch):
    "Large ones are cut up, small ones go side by side."
    monkeypatch.setattr(engine, "LARGE", 20_000)
    monkeypatch.setattr(engine, "n_workers", lambda: 2)
    made = [replace(j, name=f"{j.name}{i}") for i in range(3) for j in tasks(models).values()]
    whole = sum(j.n_values * len(j.inputs) for j in made)
    copies = -(-2**23 // whole)
    made = [replace(j, name=f"{j.name}.{i}") for i in range(copies) for j in made] if copies < 60 else made
    count = {}
    def sink(task):
        count[task.name] = count.get(task.name, 0) + 1
        return "F32", lambda block, start: None
    run_tasks(made, sink)
    assert set(count) == {j.name for j in made} and set(count.values()) == {1}

def test_a_mapped_file_that_changed_is_refused(models):
    t = models["a"].tensors["w"]
    with Mapped() as files:
        block, into = files.blocks(t), np.zeros(100, np.uint8)
        block.read(0, 10, into)
        os.utime(t.file, ns=(1, 1))
        with pytest.raises(InputError, match="was changed, replaced or deleted"): block.read(0, 10, into)
        with pytest.raises(InputError, match="was changed, replaced or deleted"): files.blocks(t)

def test_a_file_that_took_anothers_place_is_refused(models, tmp_path):
    t = models["a"].tensors["w"]
    with Mapped() as files:
        files.blocks(t)
        (tmp_path/"new").write_bytes(t.file.read_bytes())
        os.replace(tmp_path/"new", t.file)
        with pytest.raises(InputError, match="was changed, replaced or deleted"): files.blocks(t)
    assert len(read_whole(t, Files())) == 90 * 401 * 2
