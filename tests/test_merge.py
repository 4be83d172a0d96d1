"Laws over every merge method, faults, and what a merge refuses; parity with mergekit is in test_mergekit.py."
import errno, json, os, shutil, subprocess, sys, time

import numpy as np
import pytest
import yaml

from model_glue_nb.core import InputError
from model_glue_nb.merging.estimate import plan
from model_glue_nb.merging.merge import merge, merge_into
from model_glue_nb.merging.methods import merge_methods, method_info, try_method
from model_glue_nb.merging.planner import check_merge_recipe
from model_glue_nb.merging.recipes import MergeRecipe, recipe, stack
from model_glue_nb.zoo.zoo import open_model, tiny_zoo

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
METHODS = sorted(merge_methods)
MANY = [m for m in METHODS if method_info(m).n_models is None]
STREAMED = [m for m in METHODS if not method_info(m).inputs] # the others look into models; tests/test_layer_inputs.py
SPARSE = {"ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"}
SPECTRAL = {"tsv_m", "iso_c", "iso_cts"} # cut or flatten the spectrum, also that of a model beside itself; tests/test_spectra.py
WHOLE = dict(density=1.0, gamma=0.0, epsilon=0.0, select_topk=1.0, t=9.0)

@pytest.fixture(scope="module")
def zoo(tmp_path_factory): return tiny_zoo(tmp_path_factory.mktemp("zoo"), ["base", "a", "b", "c"])

def arrays(seed=0, shape=(37, 129), k=4):
    "A base, and models near it."
    r = np.random.default_rng(seed)
    base = r.normal(size=shape).astype(np.float32)
    return base, [(base + .1 * r.normal(size=shape)).astype(np.float32) for _ in range(k)]

def whole(method):
    "Parameters that leave nothing out."
    return {k: v for k, v in WHOLE.items() if k in method_info(method).parameters and not (k == "t" and method == "slerp")}

def run(method, models, base, **more):
    return try_method(method, models, base if method_info(method).reads != "models" else None, **whole(method) | more)

@pytest.mark.parametrize("method", [m for m in METHODS if m not in SPECTRAL | {"arcee_fusion"}]) # it takes what stands out
def test_merging_twins_gives_the_twin(method):
    base, (a, *_) = arrays()
    n = method_info(method).n_models or 2
    more = {"normalize": True} if "normalize" in method_info(method).parameters else {}
    assert np.abs(run(method, [a] * n, base, **more) - a).max() < 1e-5

@pytest.mark.parametrize("method", MANY)
def test_the_order_of_models_does_not_matter(method):
    if method_info(method).has_weights and method.startswith(("dare", "della")):
        pytest.skip("drawn per model; tested on files")
    base, models = arrays()
    assert np.abs(run(method, models, base) - run(method, models[::-1], base)).max() < 1e-5

@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_what_is_dropped_depends_on_content_not_on_order(method, zoo):
    live, state = (merge(recipe("linear", ["a"]), zoo),
                   lambda x: {k: v.clone() for k, v in x.model.state_dict().items()})
    one = state(merge_into(live, recipe(method, ["a", "b"], [1, 2], base="base"), zoo))
    two = state(merge_into(live, recipe(method, ["b", "a"], [2, 1], base="base"), zoo))
    other = state(merge_into(live,
                             recipe(method, ["a", "b"], [1, 2], base="base", options=dict(seed=1)),
                             zoo))
    assert all((one[k] - two[k]).abs().max() < 1e-6 for k in one)
    assert any((one[k] - other[k]).abs().max() > 1e-3 for k in one)

@pytest.mark.parametrize("method", [m for m in MANY if method_info(m).has_weights])
def test_weight_zero_equals_absence(method):
    base, (a, b, c, _) = arrays()
    with_zero, without = (run(method, [a, b, c], base, weight=[1, 2, 0]),
                          run(method, [a, b], base, weight=[1, 2]))
    if method == "karcher": # a weight of 0 still spans the space; the mean is the same to its tolerance
        return
    assert np.abs(with_zero - without).max() < 1e-5

@pytest.mark.parametrize("method", [m for m in METHODS if "scale" in method_info(m).parameters and method_info(m).needs_base])
def test_scale_zero_is_the_base(method):
    base, models = arrays()
    assert np.array_equal(run(method, models, base, scale=0), base)

@pytest.mark.parametrize("method", sorted(SPARSE))
def test_density_is_the_share_that_is_kept(method):
    base, (a, *_) = arrays(shape=(100, 200))
    more = {"gamma": 0.0} if "gamma" in method_info(method).parameters else {}
    kept = (try_method(method, [a], base, density=.4, **more) != base).mean()
    assert abs(kept - .4) < (.02 if method[0] == "d" else .001)

@pytest.mark.parametrize("method", METHODS)
def test_chunks_do_not_show(method, monkeypatch):
    from model_glue_nb.tensors.streams import Stream
    base, models = arrays(shape=(64, 129))
    n = method_info(method).n_models or 3
    p = dict(density=.3) if method in SPARSE else {}
    if method == "sce": p = dict(select_topk=.3)
    args = models[:n], base if method_info(method).reads != "models" else None
    one = try_method(method, *args, **p)
    def small(self, whole_rows=False, most=None):
        return [(s, min(129 * 5, self.n - s)) for s in range(0, self.n, 129 * 5)]
    monkeypatch.setattr(Stream, "chunks", small)
    assert np.abs(try_method(method, *args, **p) - one).max() < 1e-5

def stored(path, name, x, dtype="bfloat16"):
    "A checkpoint-like folder of one model, from arrays."
    import torch
    from safetensors.torch import save_file
    path.mkdir(parents=True)
    save_file({k: torch.from_numpy(v).to(getattr(torch, dtype)) for k, v in x.items()}, path/"model.safetensors")
    (path/"config.json").write_text("{}")
    (path/"vocab.json").write_text("{}")
    return name, open_model(path)

@pytest.fixture(scope="module")
def wide_zoo(tmp_path_factory):
    "Four models of two larger tensors and a small one, in bf16, fp16 and fp32."
    r = np.random.default_rng(0)
    shapes = dict(w=(300, 1000), v=(70, 4001), s=(9,))
    room = tmp_path_factory.mktemp("wide")
    base = {k: r.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    def near():
        return {k: v + .1 * r.normal(size=v.shape).astype(np.float32) for k, v in base.items()}
    return dict(stored(room/n, n, x, d)
                for n, x, d in [("base", base, "bfloat16"),
                                ("a", near(), "bfloat16"), ("b", near(), "float16"),
                                ("c", near(), "float32")])

def of_device(method, models, device, out, dtype):
    "Every tensor of a merge that leaves out and rescales, by a method on a device."
    info = method_info(method)
    names = ["a", "b", "c"][:info.n_models or 3]
    p = dict(density=.4, gamma=.05, select_topk=.3, scale=.7)
    p = {k: v for k, v in p.items() if k in info.parameters}
    r = recipe(method, names, [.3, .5, .9][:len(names)] if info.has_weights else None, "base" if info.reads != "models" else None,
               options=dict(out_dtype=dtype), **p)
    m = merge(r, models, out, device=device)
    return np.concatenate([m.raw(k).reshape(-1).view(np.uint16 if dtype == "bfloat16" else np.uint32)
                           for k in m.tensors])

NORMED = {"della", "della_linear"} # divided by L1 norms, which torch adds up in another order
GEOMETRIC = {"slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce", "ramplus_tl", "arcee_fusion", *SPECTRAL} # inner products come first; torch adds them up in another order

def agree(ours, twins, method):
    "Equal bits where the order of additions is the same; else a unit in the last place on at least 99.99 %, float32 to six digits."
    apart = np.abs(ours.astype(np.int64) - twins)
    if method in NORMED: assert apart.max() <= 1 and (apart == 0).mean() >= .9999
    elif method not in GEOMETRIC: assert np.array_equal(ours, twins)
    elif ours.dtype == np.uint16: assert (np.abs(ours.astype(np.int64) - twins) <= 1).mean() >= .9999
    else: assert np.abs(ours.view(np.float32) - twins.view(np.float32)).max() < 2e-6 # of values up to 5

@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", STREAMED)
def test_the_twin_in_torch_agrees(method, dtype, wide_zoo, tmp_path):
    agree(*(of_device(method, wide_zoo, d, tmp_path/d, dtype) for d in ("cpu", "cpu-torch")), method)

@pytest.mark.gpu
@pytest.mark.parametrize("method", STREAMED)
def test_the_twin_on_a_gpu_agrees(method, wide_zoo, tmp_path):
    agree(*(of_device(method, wide_zoo, d, tmp_path/d, "bfloat16") for d in ("cpu", "cuda")), method)

def test_a_live_model_is_filled_on_either_device(zoo):
    r = recipe("ties", ["a", "b"], base="base", density=.4)
    def state(live): return {k: v.clone() for k, v in live.model.state_dict().items()}
    live = merge(r, zoo, device="cpu")
    one = state(live)
    merge_into(live, recipe("linear", ["a"]), zoo)
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
            assert (np.abs(out.values(k) - (a.values(k) + b.values(k)) / 2).max() < 1e-3
                    and np.array_equal(again.raw(k), out.raw(k)))
        assert out.load().generate(["w3"], 2) == again.load().generate(["w3"], 2)

def test_union_of_vocabularies_and_padding(tmp_path):
    a, b = tiny_zoo(tmp_path, ["a"], vocab_size=64)["a"], tiny_zoo(tmp_path, ["b"], vocab_size=70)["b"]
    models = dict(a=a, b=b)
    r = recipe("linear", ["a", "b"], options=dict(tokenizer="union", pad_to_multiple_of=16))
    assert any("tokenizer: base, union" in p or "another tokenizer" in p for p in check_merge_recipe(recipe("linear", ["a", "b"]), models))
    out = merge(r, models, tmp_path/"out")
    k = "model.embed_tokens.weight"
    assert out.tensors[k].shape[0] == out.config["vocab_size"] == 80
    assert np.array_equal(out.values(k)[69], b.values(k)[69]) and not out.values(k)[75].any()
    assert np.abs(out.values(k)[5]
                  - (a.values(k)[5] + b.values(k)[5]) / 2).max() < 1e-3
    ids = out.load().encode(["w3 w69"])[0]
    assert ids[-1] == 69

def test_an_adapter_is_applied_while_streaming(zoo, tmp_path):
    from safetensors.numpy import save_file
    r, stem, k = np.random.default_rng(0), "base_model.model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.weight"
    down, up = (r.normal(size=(4, 32)).astype(np.float32),
                r.normal(size=(48, 4)).astype(np.float32))
    (tmp_path/"lora").mkdir()
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, tmp_path/"lora"/"adapter_model.safetensors")
    (tmp_path/"lora"/"adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=4, lora_alpha=8)))
    name = f"a+{tmp_path/'lora'}"
    half = recipe("task_arithmetic", [name], [.5], base="a", options=dict(out_dtype="float32"))
    out = merge(half, zoo, tmp_path/"out")
    assert np.abs(out.values(k) - (zoo["a"].values(k) + up @ down)).max() < 1e-4
    assert half.fingerprint(zoo) != recipe("task_arithmetic", ["a"], [.5], base="a", options=dict(out_dtype="float32")).fingerprint(zoo)

def test_model_stock_against_float64():
    base, models = arrays(shape=(32, 1024), k=3)
    d = np.stack([m.astype(np.float64) - base for m in models])
    flat = d.reshape(3, -1)
    norms = np.linalg.norm(flat, axis=1)
    mean = ((flat @ flat.T / norms / norms[:, None]).sum() - 3) / 6
    right = base + 3 * mean / (1 + 2 * mean) * d.mean(0)
    assert np.abs(try_method("model_stock", models, base) - right).max() < 1e-6

def test_another_layout(tmp_path):
    z = tiny_zoo(tmp_path, ["base", "a", "b"], "GPTNeoX")
    out = merge(recipe("ties", ["a", "b"], base="base", density=[.2, .8]), z, tmp_path/"out")
    assert out.signature == z["a"].signature and out.load().generate(["w3"], 2)

def test_recipes_survive_json_and_yaml(zoo):
    r = recipe("della",
               [recipe("linear", ["a", "b"], [.3, .7]), "c"], base="base",
               density=[.3, .6], scale=.8, options=dict(out_dtype="float32", seed=3))
    assert MergeRecipe.from_dict(json.loads(json.dumps(r.to_dict()))) == r == MergeRecipe.from_yaml(r.to_yaml()) # both routes
    assert MergeRecipe.from_dict(
        json.loads(json.dumps(stack(["a", "b"], 2).to_dict()))) == stack(["a", "b"], 2)
    assert check_merge_recipe(r, zoo) == [] and plan(r, zoo)["tensors"] == len(zoo["a"].tensors)

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
    with pytest.raises(InputError, match="truncated|ended too early"):
        merge(recipe("linear", ["s", "b"]), dict(s=short, b=zoo["b"]), tmp_path/"out")
    assert [f.name for f in tmp_path.iterdir()] == ["short"]

def test_a_full_disk_is_seen_before_work(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(InputError, match="are free"): merge(recipe("linear", ["a"]), zoo, tmp_path/"out")
    assert not list(tmp_path.iterdir())

LIGHT = """
import sys
from model_glue_nb.cli.program import main
sys.argv[1:] = sys.argv[1:]
try: main()
except SystemExit as e: code = e.code
heavy = [m for m in ("torch", "transformers", "pandas", "rich.progress", "IPython") if m in sys.modules]
sys.exit(code or (f"imported: {heavy}" if heavy else 0))
"""

def test_a_merge_from_the_command_line_imports_neither_torch_nor_transformers(zoo, tmp_path):
    (tmp_path/"r.yaml").write_text(
        yaml.safe_dump(dict(merge_method="ties",
                            models=[str(zoo[m].path) for m in "ab"],
                            base_model=str(zoo["base"].path))))
    for more in ([], ["--dry-run"]):
        done = subprocess.run([sys.executable, "-c", LIGHT, "merge", str(tmp_path/"r.yaml"), str(tmp_path/f"out{len(more)}"), *more],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert open_model(tmp_path/"out0").signature == zoo["a"].signature and not (tmp_path/"out1").exists()

def test_help_comes_at_once():
    def cost(code): # processor seconds of a process, the least of a few: other processes may be running
        def once():
            p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(p.pid, 0)
            p.returncode = status
            assert not status
            return used.ru_utime + used.ru_stime
        return min(once() for _ in range(5))
    ours = "import sys; from model_glue_nb.cli.program import main; sys.argv = ['model-glue', '--help']; main()"
    assert cost(ours) < 3.4 * cost("import typer, rich.table"), "beside what every such command line imports"

def written(path, zoo, **more):
    "A recipe file over paths."
    r = dict(merge_method="linear", models=[str(zoo[m].path) for m in "ab"]) | more
    path.write_text(yaml.safe_dump(r))
    return path

def test_a_dry_run_tells_the_truth(zoo, wide_zoo, tmp_path, monkeypatch, command):
    "What is read and written is what the plan said; every problem comes at once, with exit code 2."
    from model_glue_nb.checkpoints import content
    monkeypatch.setattr(content, "SETTLED_HERE", 0) # fingerprints are read once for good, here before anything is counted
    for m in wide_zoo.values(): m.fingerprint()
    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: (read.append(n := preadv(*a)), n)[1])
    for method in ("linear", "ties", "slerp", "della", "sce", "task_arithmetic"):
        info = method_info(method)
        names = ["a", "b", "c"][:info.n_models or 3]
        p = dict(density=.4) if "density" in info.parameters else {}
        r = recipe(method, names, base="base" if info.needs_base else None, **p)
        told = plan(r, wide_zoo, tmp_path/method, device="cpu")
        read.clear()
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
    for args, message in [((r, out), "already exists"),
                          ((tmp_path/"no.yaml", out), "There is no recipe"),
                          ((r, tmp_path/"x", "--device", "gpu"), "no device 'gpu'"),
                          ((r, tmp_path/"x", "--shard-size", "many"), "is not a size"), ((written(tmp_path/"q.yaml", zoo, merge_method="liner"), tmp_path/"x"), "Did you mean 'linear'")]:
        code, _, err = command("merge", *args)
        assert code == 2 and message in err, (code, err)
    assert (not (tmp_path/"x").exists()
            and command("merge", r, out, "--overwrite")[0] == 0
            and len(list(out.glob("*.safetensors"))) == 1)

def test_a_disk_that_fills_up_while_writing_leaves_nothing(zoo, tmp_path, monkeypatch, command):
    r = written(tmp_path/"r.yaml", zoo)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for where, after in (("posix_fallocate", 0), ("pwrite", 5)):
        real, calls = getattr(os, where), []
        def full(*a):
            calls.append(a)
            if len(calls) > after: raise OSError(errno.ENOSPC, "No space left on device")
            return real(*a)
        with monkeypatch.context() as m:
            m.setattr(os, where, full)
            code, _, err = command("merge", r, tmp_path/"out")
        assert code == 2 and "filled up" in err and sorted(f.name for f in tmp_path.iterdir()) == ["r.yaml"]
    assert not before or len(os.listdir("/proc/self/fd")) <= before + 1 # no file is left open

def edited(source, out, change, **config):
    "A copy of a model with other tensors (None removes one) and other settings."
    from safetensors.torch import load_file, save_file
    shutil.copytree(source.path, out)
    tensors = load_file(out/"model.safetensors")
    tensors |= change(tensors)
    save_file({k: v for k, v in tensors.items() if v is not None}, out/"model.safetensors", dict(format="pt"))
    (out/"config.json").write_text(json.dumps(source.config | config))
    return open_model(out)

def test_buffers_may_be_missing_and_are_the_leading_models(tmp_path):
    "Masks, rotary tables and positions are copied from the model that leads, of whatever type; others may have them or not."
    import torch
    z = tiny_zoo(tmp_path, ["a", "b"], "GPTNeoX")
    at = "gpt_neox.layers.0.attention."
    mask = {at + "bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
            at + "masked_bias": torch.tensor(-1e9), at + "rotary_emb.inv_freq": torch.rand(2)}
    old = edited(z["a"], tmp_path/"old", lambda t: mask)
    models = dict(a=z["a"], b=z["b"], old=old)
    for names in (["old", "b"], ["b", "old"]):
        out = merge(recipe("linear", names), models, tmp_path/"-".join(names))
        assert (at + "masked_bias" in out.tensors) == (names[0] == "old") and out.load().generate(["w3"], 2)
    assert out.signature == z["a"].signature
    out = merge(recipe("ties", ["b"], base="old", density=.5), models, tmp_path/"task")
    assert out.tensors[at + "bias"].dtype == "BOOL" and np.array_equal(out.raw(at + "rotary_emb.inv_freq"), old.raw(at + "rotary_emb.inv_freq"))
    weights = edited(z["b"], tmp_path/"weights", lambda t: {at + "dense.extra": torch.rand(4)})
    assert "has 1 tensors that 'a' lacks" in check_merge_recipe(recipe("linear", ["a", "w"]), dict(a=z["a"], w=weights))[0]

def test_a_tied_and_an_untied_head(tmp_path):
    "Where one model stores a head of its own, the result does, and says so."
    tied = tiny_zoo(tmp_path, ["tied"], tie_word_embeddings=True)["tied"]
    own = tiny_zoo(tmp_path, ["own"], seed=1)["own"]
    models = dict(tied=tied, own=own)
    k, e = "lm_head.weight", "model.embed_tokens.weight"
    for names in (["tied", "own"], ["own", "tied"]):
        out = merge(recipe("linear", names), models, tmp_path/"-".join(names))
        assert (out.config["tie_word_embeddings"] is False
                and np.abs(out.values(k) - (tied.values(e) + own.values(k)) / 2).max() < 1e-3)
        live = out.load().model
        assert (live.lm_head.weight.float() != live.model.embed_tokens.weight.float()).any()
        live = merge(recipe("linear", names), models).model
        assert (live.lm_head.weight != live.model.embed_tokens.weight).any()
    with pytest.raises(InputError, match="makes them differ"):
        merge_into(tied.load(), recipe("linear", ["tied", "own"]), models)
    both = merge(recipe("linear", ["tied", "tied"]), models, tmp_path/"both")
    assert both.config["tie_word_embeddings"] and k not in both.tensors

def test_what_goes_along(tmp_path):
    "Generation settings, chat template, special tokens of the tokenizer that is asked for, licences and parents of nested merges."
    z = tiny_zoo(tmp_path, ["base", "a", "b"])
    template = "{{ messages }}"
    for m, licence in zip(z, ("apache-2.0", "apache-2.0", "mit")):
        (m.path/"README.md").write_text(f"---\nlicense: {licence}\n---\n")
        (m.path/"generation_config.json").write_text(json.dumps(dict(temperature=.3, eos_token_id=1)))
    for n in "ab": (z[n].path/"chat_template.jinja").write_text(template)
    nested = recipe("ties", [recipe("linear", ["a", "b"])], base="base", density=.5, options=dict(chat_template="auto"))
    out = merge(nested, z, tmp_path/"out")
    card = (out.path/"README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == ["a", "b", "base"] and "license" not in head and "| b | `" + z["b"].fingerprint() in card and "| mit |" in card
    assert nested.fingerprint(z) in card and (out.path/"chat_template.jinja").read_text() == template
    assert json.loads((out.path/"generation_config.json").read_text())["temperature"] == .3
    again = card[card.index("```yaml") + 8:card.rindex("```")]
    assert MergeRecipe.from_yaml(again) == nested
    assert yaml.safe_load((merge(recipe("linear", ["base", "a"]), z, tmp_path/"one").path/"README.md").read_text().split(
        "---")[1])["license"] == "apache-2.0"
    assert merge(recipe("linear", ["a"]), z).name == "linear-" + recipe("linear", ["a"]).fingerprint(z)[:8]
    (z["b"].path/"config.json").write_text(json.dumps(z["b"].config | dict(eos_token_id=5)))
    (z["b"].path/"chat_template.jinja").write_text("{{ b }}")
    other = merge(recipe("linear", ["a", "b"], options=dict(tokenizer="b", chat_template="{{ own }}")), z, tmp_path/"other")
    assert other.config["eos_token_id"] == 5 and (other.path/"chat_template.jinja").read_text() == "{{ own }}"

def test_adapters_as_peft_applies_them(tmp_path):
    "Embeddings, transposed weights, rank and alpha patterns, rsLoRA: what PEFT's own merge gives."
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
    from model_glue_nb.zoo.zoo import tiny_tokenizer
    torch.manual_seed(0)
    tiny_zoo(tmp_path, ["llama"], dtype="float32")
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)).save_pretrained(tmp_path/"gpt2")
    tiny_tokenizer(64).save_pretrained(tmp_path/"gpt2")
    settings = dict(llama=dict(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens"], rank_pattern={r"layers\.0\.self_attn\.q_proj": 2}, use_rslora=True),
                    gpt2=dict(r=4, lora_alpha=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, alpha_pattern={"mlp.c_proj": 7}))
    for name, c in settings.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path/name), LoraConfig(task_type="CAUSAL_LM", **c))
        for n, p in model.named_parameters():
            if "lora_" in n: torch.nn.init.normal_(p, std=.1)
        model.save_pretrained(tmp_path/f"{name}-lora")
        right = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path/name), tmp_path/f"{name}-lora").merge_and_unload().state_dict()
        ours = merge(recipe("linear", [f"{tmp_path/name}+{tmp_path/name}-lora"], options=dict(out_dtype="float32")), None, tmp_path/f"{name}-out").load("cpu").model.state_dict()
        moved = AutoModelForCausalLM.from_pretrained(tmp_path/name).state_dict()
        assert (max((ours[k] - right[k]).abs().max() for k in right) < 1e-5
                and sum(bool((moved[k] - ours[k]).abs().max() > 1e-3) for k in right) >= 3), name

def test_values_of_64_bits_and_copies_of_whole_numbers(tmp_path):
    import torch
    a, b = tiny_zoo(tmp_path, ["a", "b"])
    k = "model.norm.weight"
    wide = edited(a, tmp_path/"wide",
                  lambda t: {k: torch.linspace(0, 1, 32, dtype=torch.float64), "model.position_ids": torch.arange(8)})
    out = merge(recipe("linear", ["wide", "b"]), dict(wide=wide, b=b), tmp_path/"out")
    assert (out.tensors[k].dtype == "F32"
            and np.abs(out.values(k) - (np.linspace(0, 1, 32) + b.values(k)) / 2).max()
                < 1e-6)
    assert (out.raw("model.position_ids").tolist() == list(range(8))
            and plan(recipe("linear", ["wide", "b"]), dict(wide=wide, b=b))["write_bytes"] == out.n_bytes)

@pytest.mark.parametrize("spoil, message", [
    (lambda f: f.write_bytes(f.read_bytes()[:-7]), "truncated"),
    (lambda f: f.unlink(), "No such file|model-00002"),
    (lambda f: f.write_bytes(b"{}"), "not a safetensors file")])
def test_a_spoilt_shard_is_named(spoil, message, zoo, tmp_path, command):
    parts = merge(recipe("linear", ["a"]), zoo, tmp_path/"parts", shard_bytes=20_000).path
    file = sorted(parts.glob("*.safetensors"))[1]
    spoil(file)
    code, _, err = command("merge",
                           written(tmp_path/"r.yaml", zoo, models=[str(parts), str(zoo["b"].path)]),
                           tmp_path/"out")
    import re
    assert code == 2 and re.search(message, err) and not (tmp_path/"out").exists(), err

def test_nan_is_refused_by_name_unless_allowed(zoo, tmp_path, command):
    import torch
    k = "model.layers.1.mlp.up_proj.weight"
    bad = edited(zoo["b"], tmp_path/"bad",
                 lambda t: {k: t[k].index_fill(0, torch.tensor([3]), float("inf"))})
    r, keep = written(tmp_path/"r.yaml", zoo, models=[str(zoo["a"].path), str(bad.path)]), tmp_path/"keep"
    assert command("merge", written(tmp_path/"good.yaml", zoo), keep)[0] == 0
    before = open_model(keep).fingerprint()
    for device in ("cpu", "cpu-torch"):
        code, _, err = command("merge", r, keep, "--overwrite", "--device", device)
        assert code == 2 and f"'{k}' of 'bad' holds NaN" in err and "--allow-nan" in err and open_model(keep).fingerprint() == before # what was there is whole
    assert command("merge", r, keep, "--overwrite", "--allow-nan")[0] == 0 and not np.isfinite(open_model(keep).values(k)).all()

def test_recipes_are_values(zoo):
    r = recipe("ties", ["a", "b"], base="base", density=.4)
    with pytest.raises(AttributeError): r.method = "linear"
    assert r.fingerprint(zoo) == MergeRecipe.from_yaml(r.to_yaml()).fingerprint(
        zoo) != recipe("ties", ["a", "b"], base="base", density=.5).fingerprint(zoo)

def test_layers_in_other_words(tmp_path):
    "Stacks of layers are counted by the config's own key, and what it lists per layer follows."
    z = tiny_zoo(tmp_path, ["a", "b"], "Qwen2", num_hidden_layers=3)
    r = stack(["a", "b"], 3, interleave=True)
    listed = edited(z["a"], tmp_path/"listed", lambda t: {}, layer_types=["full_attention"] * 2 + ["sliding_attention"], sliding_window=16, use_sliding_window=True)
    out = merge(r, dict(a=listed, b=z["b"]), tmp_path/"out")
    assert out.n_layers == 6 and out.config["layer_types"] == ["full_attention"] * 4 + ["sliding_attention"] * 2 and out.load().generate(["w3"], 2)

def test_a_hub_id_is_looked_for_on_the_hub():
    "Offline it is refused in words; a path with one slash that is not there says so too."
    assert "could not be fetched as a hub id" in check_merge_recipe(recipe("linear", ["nobody/nothing"]))[0]

def test_nested_recipes_are_planned_once(monkeypatch):
    "A recipe in a recipe in a recipe: as many plans as recipes, however many tensors look at them."
    from model_glue_nb.merging.planner import MergePlan, checked_plan
    from model_glue_nb.merging.recipes import recipe
    from model_glue_nb.zoo.zoo import read_zoo
    nested = "a-sort"
    for name in ("a-shift", "a-rotate", "a-double"): nested = recipe("slerp", [nested, name])
    build, plans = MergePlan.build, []
    monkeypatch.setattr(MergePlan, "build", lambda self: plans.append(self) or build(self))
    checked_plan(nested, read_zoo("demo"))
    assert len(plans) == 3
