"Laws over every merge method, faults, and what a merge refuses; parity with mergekit is in test_mergekit.py."
import errno, json, os, shutil, subprocess, sys, time

import numpy as np
import pytest
import yaml

from model_glue_nb.core import InputError
from model_glue_nb.merge import MergeRecipe, check_recipe, merge, merge_into, merge_methods, plan, recipe, stack
from model_glue_nb.methods import method_info, try_method
from model_glue_nb.zoo import open_model, tiny_zoo

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
METHODS = sorted(merge_methods)
MANY = [m for m in METHODS if method_info(m).n_models is None]
SPARSE = {"ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"}
WHOLE = dict(density=1.0, gamma=0.0, epsilon=0.0, select_topk=1.0, t=9.0)

@pytest.fixture(scope="module")
def zoo(tmp_path_factory): return tiny_zoo(tmp_path_factory.mktemp("zoo"), ["base", "a", "b", "c"])

def arrays(seed=0, shape=(37, 129), k=4):
    "A base, and models near it."
    r = np.random.default_rng(seed); base = r.normal(size=shape).astype(np.float32)
    return base, [(base + .1 * r.normal(size=shape)).astype(np.float32) for _ in range(k)]

def whole(method):
    "Parameters that leave nothing out."
    return {k: v for k, v in WHOLE.items() if k in method_info(method).parameters and not (k == "t" and method == "slerp")}

def run(method, models, base, **more):
    return try_method(method, models, base if method_info(method).reads != "models" else None, **whole(method) | more)

@pytest.mark.parametrize("method", METHODS)
def test_merging_twins_gives_the_twin(method):
    base, (a, *_) = arrays(); n = method_info(method).n_models or 2
    more = {"normalize": True} if "normalize" in method_info(method).parameters else {}
    assert np.abs(run(method, [a] * n, base, **more) - a).max() < 1e-5

@pytest.mark.parametrize("method", MANY)
def test_the_order_of_models_does_not_matter(method):
    if method_info(method).has_weights and method.startswith(("dare", "della")): pytest.skip("drawn per model; tested on files")
    base, models = arrays()
    assert np.abs(run(method, models, base) - run(method, models[::-1], base)).max() < 1e-5

@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_what_is_dropped_depends_on_content_not_on_order(method, zoo):
    live, state = merge(recipe("linear", ["a"]), zoo), lambda x: {k: v.clone() for k, v in x.model.state_dict().items()}
    one = state(merge_into(live, recipe(method, ["a", "b"], [1, 2], base="base"), zoo))
    two = state(merge_into(live, recipe(method, ["b", "a"], [2, 1], base="base"), zoo))
    other = state(merge_into(live, recipe(method, ["a", "b"], [1, 2], base="base", options=dict(seed=1)), zoo))
    assert all((one[k] - two[k]).abs().max() < 1e-6 for k in one)
    assert any((one[k] - other[k]).abs().max() > 1e-3 for k in one)

@pytest.mark.parametrize("method", [m for m in MANY if method_info(m).has_weights])
def test_weight_zero_equals_absence(method):
    base, (a, b, c, _) = arrays()
    with_zero, without = run(method, [a, b, c], base, weight=[1, 2, 0]), run(method, [a, b], base, weight=[1, 2])
    if method == "karcher": return  # a weight of 0 still spans the space; the mean is the same to its tolerance
    assert np.abs(with_zero - without).max() < 1e-5

@pytest.mark.parametrize("method", [m for m in METHODS if "scale" in method_info(m).parameters and method_info(m).needs_base])
def test_scale_zero_is_the_base(method):
    base, models = arrays(); assert np.array_equal(run(method, models, base, scale=0), base)

@pytest.mark.parametrize("method", sorted(SPARSE))
def test_density_is_the_share_that_is_kept(method):
    base, (a, *_) = arrays(shape=(100, 200)); more = {"gamma": 0.0} if "gamma" in method_info(method).parameters else {}
    kept = (try_method(method, [a], base, density=.4, **more) != base).mean()
    assert abs(kept - .4) < (.02 if method[0] == "d" else .001)

@pytest.mark.parametrize("method", METHODS)
def test_chunks_do_not_show(method, monkeypatch):
    from model_glue_nb.streams import Stream
    base, models = arrays(shape=(64, 129)); n = method_info(method).n_models or 3; p = dict(density=.3) if method in SPARSE else {}
    if method == "sce": p = dict(select_topk=.3)
    args = models[:n], base if method_info(method).reads != "models" else None
    one = try_method(method, *args, **p)
    def small(self, whole_rows=False): return [(s, min(129 * 5, self.n - s)) for s in range(0, self.n, 129 * 5)]
    monkeypatch.setattr(Stream, "chunks", small)
    assert np.abs(try_method(method, *args, **p) - one).max() < 1e-5

def stored(path, name, x, dtype="bfloat16"):
    "A checkpoint-like folder of one model, from arrays."
    import torch
    from safetensors.torch import save_file
    path.mkdir(parents=True); save_file({k: torch.from_numpy(v).to(getattr(torch, dtype)) for k, v in x.items()}, path/"model.safetensors")
    (path/"config.json").write_text("{}"); (path/"vocab.json").write_text("{}")
    return name, open_model(path)

@pytest.fixture(scope="module")
def wide_zoo(tmp_path_factory):
    "Four models of two larger tensors and a small one, in bf16, fp16 and fp32."
    r = np.random.default_rng(0); shapes = dict(w=(300, 1000), v=(70, 4001), s=(9,)); room = tmp_path_factory.mktemp("wide")
    base = {k: r.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    near = lambda: {k: v + .1 * r.normal(size=v.shape).astype(np.float32) for k, v in base.items()}
    return dict(stored(room/n, n, x, d) for n, x, d in [("base", base, "bfloat16"), ("a", near(), "bfloat16"), ("b", near(), "float16"), ("c", near(), "float32")])

def of_device(method, models, device, out, dtype):
    "Every tensor of a merge that leaves out and rescales, by a method on a device."
    info = method_info(method); names = ["a", "b", "c"][:info.n_models or 3]
    p = dict(density=.4, gamma=.05, select_topk=.3, scale=.7); p = {k: v for k, v in p.items() if k in info.parameters}
    r = recipe(method, names, [.3, .5, .9][:len(names)] if info.has_weights else None, "base" if info.reads != "models" else None,
               options=dict(out_dtype=dtype), **p)
    m = merge(r, models, out, device=device)
    return np.concatenate([m.raw(k).reshape(-1).view(np.uint16 if dtype == "bfloat16" else np.uint32) for k in m.tensors])

GEOMETRIC = {"slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce"} # inner products come first; torch adds them up in another order

def agree(ours, twins, method):
    "Equal bits where the order of additions is the same; else a unit in the last place on at least 99.99 %, float32 to six digits."
    if method not in GEOMETRIC: assert np.array_equal(ours, twins)
    elif ours.dtype == np.uint16: assert (np.abs(ours.astype(np.int64) - twins) <= 1).mean() >= .9999
    else: assert np.abs(ours.view(np.float32) - twins.view(np.float32)).max() < 2e-6 # of values up to 5

@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_the_twin_in_torch_agrees(method, dtype, wide_zoo, tmp_path):
    agree(*(of_device(method, wide_zoo, d, tmp_path/d, dtype) for d in ("cpu", "cpu-torch")), method)

@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_the_twin_on_a_gpu_agrees(method, wide_zoo, tmp_path):
    agree(*(of_device(method, wide_zoo, d, tmp_path/d, "bfloat16") for d in ("cpu", "cuda")), method)

def test_a_live_model_is_filled_on_either_device(zoo):
    r = recipe("ties", ["a", "b"], base="base", density=.4); state = lambda live: {k: v.clone() for k, v in live.model.state_dict().items()}
    live = merge(r, zoo, device="cpu"); one = state(live); merge_into(live, recipe("linear", ["a"]), zoo)
    two = state(merge_into(live, r, zoo, device="cpu-torch"))
    assert all(bool((one[k] == two[k]).all()) for k in one)

def test_sharded_half_precision_and_tied_inputs(tmp_path):
    for dtype in ("float16", "float32"):
        a, b = tiny_zoo(tmp_path/dtype, ["a", "b"], "Qwen2", dtype, tie_word_embeddings=True)
        models = dict(a=a, b=b)
        out = merge(recipe("linear", ["a", "b"]), models, tmp_path/dtype/"out", shard_bytes=20_000)
        assert len(list(out.path.glob("*.safetensors"))) > 1 and "lm_head.weight" not in out.tensors
        again = merge(recipe("linear", ["out"]), dict(out=out), tmp_path/dtype/"again")
        for k in out.tensors:
            assert np.abs(out.values(k) - (a.values(k) + b.values(k)) / 2).max() < 1e-3 and np.array_equal(again.raw(k), out.raw(k))
        assert out.load().generate(["w3"], 2) == again.load().generate(["w3"], 2)

def test_union_of_vocabularies_and_padding(tmp_path):
    a, b = tiny_zoo(tmp_path, ["a"], vocab_size=64)["a"], tiny_zoo(tmp_path, ["b"], vocab_size=70)["b"]
    models = dict(a=a, b=b); r = recipe("linear", ["a", "b"], options=dict(tokenizer="union", pad_to_multiple_of=16))
    assert any("tokenizer: base, union" in p or "another tokenizer" in p for p in check_recipe(recipe("linear", ["a", "b"]), models))
    out = merge(r, models, tmp_path/"out"); k = "model.embed_tokens.weight"
    assert out.tensors[k].shape[0] == out.config["vocab_size"] == 80
    assert np.array_equal(out.values(k)[69], b.values(k)[69]) and not out.values(k)[75].any()
    assert np.abs(out.values(k)[5] - (a.values(k)[5] + b.values(k)[5]) / 2).max() < 1e-3
    ids = out.load().encode(["w3 w69"])[0]; assert ids[-1] == 69

def test_an_adapter_is_applied_while_streaming(zoo, tmp_path):
    from safetensors.numpy import save_file
    r, stem, k = np.random.default_rng(0), "base_model.model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.weight"
    down, up = r.normal(size=(4, 32)).astype(np.float32), r.normal(size=(48, 4)).astype(np.float32); (tmp_path/"lora").mkdir()
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, tmp_path/"lora"/"adapter_model.safetensors")
    (tmp_path/"lora"/"adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=4, lora_alpha=8)))
    name = f"a+{tmp_path/'lora'}"; half = recipe("task_arithmetic", [name], [.5], base="a", options=dict(out_dtype="float32"))
    out = merge(half, zoo, tmp_path/"out")
    assert np.abs(out.values(k) - (zoo["a"].values(k) + up @ down)).max() < 1e-4
    assert half.fingerprint(zoo) != recipe("task_arithmetic", ["a"], [.5], base="a", options=dict(out_dtype="float32")).fingerprint(zoo)

def test_model_stock_against_float64():
    base, models = arrays(shape=(32, 1024), k=3); d = np.stack([m.astype(np.float64) - base for m in models]); flat = d.reshape(3, -1)
    norms = np.linalg.norm(flat, axis=1); mean = ((flat @ flat.T / norms / norms[:, None]).sum() - 3) / 6
    right = base + 3 * mean / (1 + 2 * mean) * d.mean(0)
    assert np.abs(try_method("model_stock", models, base) - right).max() < 1e-6

def test_another_layout(tmp_path):
    z = tiny_zoo(tmp_path, ["base", "a", "b"], "GPTNeoX")
    out = merge(recipe("ties", ["a", "b"], base="base", density=[.2, .8]), z, tmp_path/"out")
    assert out.signature == z["a"].signature and out.load().generate(["w3"], 2)

def test_recipes_survive_json_and_yaml(zoo):
    r = recipe("della", [recipe("linear", ["a", "b"], [.3, .7]), "c"], base="base", density=[.3, .6], scale=.8, options=dict(out_dtype="float32", seed=3))
    assert MergeRecipe.from_dict(json.loads(json.dumps(r.to_dict()))) == r == MergeRecipe.from_yaml(r.to_yaml()) # both routes
    assert MergeRecipe.from_dict(json.loads(json.dumps(stack(["a", "b"], 2).to_dict()))) == stack(["a", "b"], 2)
    assert check_recipe(r, zoo) == [] and plan(r, zoo)["tensors"] == len(zoo["a"].tensors)

@pytest.mark.parametrize("spoil, message", [
    (lambda z, d: recipe("linear", ["a", "nobody"]), "no model 'nobody'"),
    (lambda z, d: recipe("ties", ["a", "b"]), "needs a base model"),
    (lambda z, d: recipe("ties", ["a", "b"], base="bas"), "Did you mean 'base'"),
    (lambda z, d: recipe("slerp", ["a", "b", "c"]), "exactly 2 models"),
    (lambda z, d: recipe("ties", ["a"], base="base", densiti=.5), "Did you mean 'density'"),
    (lambda z, d: MergeRecipe("passthrough", slices=stack(["a"], 9).slices), "outside its 2 layers")])
def test_refusals_leave_nothing_behind(spoil, message, zoo, tmp_path):
    with pytest.raises(InputError, match=message): merge(spoil(zoo, tmp_path), zoo, tmp_path/"out")
    assert not list(tmp_path.iterdir())

def test_a_truncated_file_is_named_and_nothing_is_left(zoo, tmp_path):
    short = open_model(shutil.copytree(zoo["a"].path, tmp_path/"short"))
    short.tensors  # read while it was whole
    with open(short.path/"model.safetensors", "r+b") as f: f.truncate(9000)
    with pytest.raises(InputError, match="truncated|ended too early"): merge(recipe("linear", ["s", "b"]), dict(s=short, b=zoo["b"]), tmp_path/"out")
    assert [f.name for f in tmp_path.iterdir()] == ["short"]

def test_a_full_disk_is_seen_before_work(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(InputError, match="are free"): merge(recipe("linear", ["a"]), zoo, tmp_path/"out")
    assert not list(tmp_path.iterdir())

LIGHT = """
import sys
from model_glue_nb.cli import main
sys.argv[1:] = sys.argv[1:]
try: main()
except SystemExit as e: code = e.code
heavy = [m for m in ("torch", "transformers", "pandas", "rich.progress", "IPython") if m in sys.modules]
sys.exit(code or (f"imported: {heavy}" if heavy else 0))
"""

def test_a_merge_from_the_command_line_imports_neither_torch_nor_transformers(zoo, tmp_path):
    (tmp_path/"r.yaml").write_text(yaml.safe_dump(dict(merge_method="ties", models=[str(zoo[m].path) for m in "ab"], base_model=str(zoo["base"].path))))
    for more in ([], ["--dry-run"]):
        done = subprocess.run([sys.executable, "-c", LIGHT, "merge", str(tmp_path/"r.yaml"), str(tmp_path/f"out{len(more)}"), *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert open_model(tmp_path/"out0").signature == zoo["a"].signature and not (tmp_path/"out1").exists()

def test_help_comes_at_once():
    code = "import sys; from model_glue_nb.cli import main; sys.argv = ['model-glue', '--help']; main()"
    def took():
        start = time.perf_counter(); subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        return time.perf_counter() - start
    assert min(took() for _ in range(5)) < .5 # the least of a few: other processes may be running

@pytest.fixture
def command(monkeypatch, capsys):
    "Runs `model-glue` in this process: exit code, standard output, standard error."
    from model_glue_nb.cli import main
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["model-glue", *map(str, args)]); capsys.readouterr()
        try: main(); code = 0
        except SystemExit as e: code = e.code or 0
        return code, *capsys.readouterr()
    return run

def written(path, zoo, **more):
    "A recipe file over paths."
    r = dict(merge_method="linear", models=[str(zoo[m].path) for m in "ab"]) | more
    path.write_text(yaml.safe_dump(r)); return path

def test_a_dry_run_tells_the_truth(zoo, wide_zoo, tmp_path, monkeypatch, command):
    "What is read and written is what the plan said; every problem comes at once, with exit code 2."
    from model_glue_nb import streams
    read = []
    preadv = os.preadv; monkeypatch.setattr(os, "preadv", lambda *a: (read.append(n := preadv(*a)), n)[1])
    for method in ("linear", "ties", "slerp", "della", "sce", "task_arithmetic"):
        info = method_info(method); names = ["a", "b", "c"][:info.n_models or 3]; p = dict(density=.4) if "density" in info.parameters else {}
        r = recipe(method, names, base="base" if info.needs_base else None, **p); told = plan(r, wide_zoo, tmp_path/method); read.clear()
        out = merge(r, wide_zoo, tmp_path/method, device="cpu")
        assert told["write_bytes"] == out.n_bytes and told["tensors"] == 3 and told["problems"] == []
        assert abs(sum(read) / told["read_bytes"] - 1) < .25, (method, sum(read), told) # how far TIES reads depends on where the last kept entry lies
        assert told["input_bytes"] == sum(wide_zoo[m].n_bytes for m in names + ["base"] * info.needs_base)
    code, text, err = command("merge", written(tmp_path/"r.yaml", zoo), tmp_path/"out", "--dry-run", "--json")
    assert (code, json.loads(text)["tensors"]) == (0, len(zoo["a"].tensors)) and not (tmp_path/"out").exists()
    assert "GB/s" not in err and "read " in command("merge", tmp_path/"r.yaml", tmp_path/"out", "--dry-run")[1]
    bad = written(tmp_path/"bad.yaml", zoo, models=["nowhere", str(zoo["a"].path), "nothing"])
    code, text, err = command("merge", bad, tmp_path, "--dry-run", "--json")
    assert code == 2 and len(json.loads(text)["problems"]) == 3 and err.count("problem:") == 3

def test_the_command_writes_shards_and_refuses(zoo, tmp_path, command):
    r, out = written(tmp_path/"r.yaml", zoo), tmp_path/"out"
    code, text, _ = command("merge", r, out, "--shard-size", "20KB", "--device", "cpu", "--json")
    assert code == 0 and json.loads(text)["parameters"] == zoo["a"].n_params and len(list(out.glob("*.safetensors"))) > 2
    for args, message in [((r, out), "exists already"), ((tmp_path/"no.yaml", out), "There is no recipe"), ((r, tmp_path/"x", "--device", "gpu"), "no device 'gpu'"),
                          ((r, tmp_path/"x", "--shard-size", "many"), "is no size"), ((written(tmp_path/"q.yaml", zoo, merge_method="liner"), tmp_path/"x"), "Did you mean 'linear'")]:
        code, _, err = command("merge", *args)
        assert code == 2 and message in err, (code, err)
    assert not (tmp_path/"x").exists() and command("merge", r, out, "--overwrite")[0] == 0 and len(list(out.glob("*.safetensors"))) == 1

def test_a_disk_that_fills_up_while_writing_leaves_nothing(zoo, tmp_path, monkeypatch, command):
    r = written(tmp_path/"r.yaml", zoo); before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for where, after in (("posix_fallocate", 0), ("pwrite", 5)):
        real, calls = getattr(os, where), []
        def full(*a):
            calls.append(a)
            if len(calls) > after: raise OSError(errno.ENOSPC, "No space left on device")
            return real(*a)
        with monkeypatch.context() as m:
            m.setattr(os, where, full); code, _, err = command("merge", r, tmp_path/"out")
        assert code == 2 and "became full" in err and sorted(f.name for f in tmp_path.iterdir()) == ["r.yaml"]
    assert not before or len(os.listdir("/proc/self/fd")) <= before + 1 # no file is left open
