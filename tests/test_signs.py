"Differences of signs: a bit per value and the best step of each row, whatever the width and type; what is broken is named, and what can't use them says so."
import json, sys
from pathlib import Path
import numpy as np
import pytest, torch
from safetensors.torch import load_file, save_file
from model_glue_nb.core import InputError
from model_glue_nb.merging import low_rank
from model_glue_nb.merging.packing import pack, unpack_model
from model_glue_nb.merging.sign_differences import extract_signs
from model_glue_nb.tensors.signs import pack_signs, unpack_signs
from model_glue_nb.zoo.adapters import adapted, read_adapter
from model_glue_nb.zoo.zoo import open_model, read_zoo, tiny_tokenizer, tiny_zoo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/"tools"))
import certificate
from test_differences import view_values

@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 15, 16, 17, 50])
def test_bits_come_back_at_every_width(width):
    rng = np.random.default_rng(width)
    change = (rng.normal(size=(5, width)) * [[1], [1e-6], [100], [0], [3]]).astype(np.float32)
    change[0, 0] = 0
    bits, steps = pack_signs(change)
    assert bits.dtype == np.uint8 and bits.shape == (5, (width + 7) // 8) and steps.dtype == np.float32
    want = np.where(change >= 0, 1, -1) * np.abs(change).mean(1, dtype=np.float64, keepdims=True)
    np.testing.assert_allclose(unpack_signs(bits, steps, width), want, rtol=1e-6)
    np.testing.assert_array_equal(unpack_signs(bits, steps, width)[3], 0)
    again = pack_signs(unpack_signs(bits, steps, width)) # except in the row that is all zero
    np.testing.assert_array_equal(np.delete(again[0], 3, 0), np.delete(bits, 3, 0))
    def lacks(steps): return np.square(change.astype(float) - unpack_signs(bits, np.float32(steps), width)).sum(1)
    for other in (.9 * steps, 1.1 * steps, np.abs(change.mean(1)), np.full(5, np.abs(change).mean())):
        assert (lacks(steps) <= lacks(other) * (1 + 1e-5) + 1e-12).all()

ODD = dict(hidden_size=36, num_attention_heads=2, num_key_value_heads=1, intermediate_size=50, tie_word_embeddings=True) # no width of eights

@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def pair(request, tmp_path_factory):
    "A base and a tune of it, of one stored type."
    folder = tmp_path_factory.mktemp(request.param)
    tiny_zoo(folder, ["base", "tune"], dtype=request.param, **ODD)
    base, rng = load_file(folder/"base/model.safetensors"), torch.Generator().manual_seed(1)
    tuned = {k: (x.float() + .003 * torch.randn(x.shape, generator=rng) * torch.rand(len(x), *[1] * (x.ndim - 1), generator=rng)).to(x.dtype) for k, x in base.items()}
    save_file(tuned, folder/"tune/model.safetensors", dict(format="pt"))
    return folder, open_model(folder/"base"), open_model(folder/"tune"), extract_signs(folder/"tune", folder/"base", folder/"signs")

def test_what_is_written_is_the_formula(pair):
    folder, base, tune, made = pair
    view, total, lacks = adapted(base, folder/"signs"), 0., 0.
    whole = unpack(folder)
    for p in made.parts:
        old, new, got = base.values(p.name), tune.values(p.name), view_values(view, p.name)
        if len(p.shape) == 1:
            assert p.kind == "whole" and np.array_equal(got, new)
            continue
        change = new.astype(float) - old
        want = old + np.where(change >= 0, 1, -1) * np.abs(change).mean(1, keepdims=True)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
        rounded = torch.from_numpy(got).to(load_file(folder/"base/model.safetensors")[p.name].dtype).float().numpy()
        np.testing.assert_array_equal(whole.values(p.name), rounded)
        size = float(np.square(old.astype(float)).sum())
        total, lacks = total + np.square(change).sum() / size, lacks + np.square(new - got.astype(float)).sum() / size
    assert made.error == pytest.approx((lacks / total) ** .5, rel=1e-4) and .5 < made.error < .7 and made.unsaid == 0
    assert made.n_bytes == sum(t.stop - t.start for t in open_model(folder/"signs").stored.values())
    bits = sum(t.n_values for k, t in open_model(folder/"signs").stored.items() if k.startswith("signs."))
    assert bits == sum(t.shape[0] * -(-t.shape[1] // 8) for t in base.tensors.values() if len(t.shape) > 1)

def unpack(folder):
    "The difference as a whole model."
    from model_glue_nb.merging.merge import merge
    from model_glue_nb.merging.recipes import recipe
    models = dict(base=open_model(folder/"base"), signs=open_model(folder/"signs"))
    return merge(recipe("passthrough", ["base+signs"]), models, folder/"whole", overwrite=True)

def test_rows_in_pieces_are_the_same(pair, monkeypatch, tmp_path):
    folder, *_ = pair
    monkeypatch.setattr(low_rank, "_HELD", 0)
    monkeypatch.setattr(low_rank, "_AT_ONCE", 100)
    monkeypatch.setattr(low_rank.Change.__init__, "__defaults__", ("cpu", None, 100))
    extract_signs(folder/"tune", folder/"base", tmp_path/"s")
    assert (tmp_path/"s/adapter_model.safetensors").read_bytes() == (folder/"signs/adapter_model.safetensors").read_bytes()

def test_ends_may_stay(pair, tmp_path):
    folder, base, *_ = pair
    made = extract_signs(folder/"tune", folder/"base", tmp_path/"s", embeddings=False)
    assert made.unsaid > 0 and [p.kind for p in made.parts if p.is_end] == ["fixed"]
    assert np.array_equal(view_values(adapted(base, tmp_path/"s"), "model.embed_tokens.weight"), base.values("model.embed_tokens.weight"))

NAME = "model.layers.0.mlp.down_proj.weight"
BROKEN = {"its steps are (None, None)": lambda t, c: t.pop(f"steps.{NAME}"),
          "but its signs are ('U8', (36, 6))": lambda t, c: t.update({f"signs.{NAME}": t[f"signs.{NAME}"][:, :6].contiguous()}),
          "but its steps are ('F32', (35,))": lambda t, c: t.update({f"steps.{NAME}": t[f"steps.{NAME}"][:35].clone()}),
          "but its signs are ('F32'": lambda t, c: t.update({f"signs.{NAME}": t[f"signs.{NAME}"].float()}),
          "negative or not finite": lambda t, c: t[f"steps.{NAME}"].__setitem__(3, float("nan")),
          "steps that are negative": lambda t, c: t[f"steps.{NAME}"].__setitem__(3, -1.),
          "which 'base' does not have": lambda t, c: t.update({"signs.other.weight": t[f"signs.{NAME}"].clone()}),
          "holds 'steps.other.weight'": lambda t, c: t.update({"steps.other.weight": t[f"steps.{NAME}"].clone()}),
          "the base's is": lambda t, c: t.update({"whole.model.norm.weight": t["whole.model.norm.weight"][:9].clone()}),
          "changes nothing": lambda t, c: t.clear(),
          "expected 'model-glue signs 1'": lambda t, c: c.update(format="model-glue signs 2")}

@pytest.mark.parametrize("says", BROKEN)
def test_a_broken_difference_is_named(says, pair, tmp_path):
    folder, base, *_ = pair
    tensors, config = load_file(folder/"signs/adapter_model.safetensors"), json.loads((folder/"signs/adapter_config.json").read_text())
    BROKEN[says](tensors, config)
    (tmp_path/"d").mkdir()
    save_file(tensors, tmp_path/"d/adapter_model.safetensors", dict(format="pt"))
    (tmp_path/"d/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as e: adapted(base, tmp_path/"d")
    assert says in str(e.value) and "'d'" in str(e.value)

def test_a_file_cut_short_is_named(pair, tmp_path):
    import shutil
    folder, base, *_ = pair
    shutil.copytree(folder/"signs", tmp_path/"d")
    f = tmp_path/"d/adapter_model.safetensors"
    f.write_bytes(f.read_bytes()[:-100])
    with pytest.raises(InputError): adapted(base, tmp_path/"d")
    shutil.copytree(folder/"base", tmp_path/"base")
    assert "base+d" not in read_zoo(tmp_path).names and "d" in read_zoo(tmp_path).skipped

def test_who_adds_factors_refuses_signs_by_name(pair):
    from model_glue_nb.mixing.residents import Resident
    folder, base, *_ = pair
    for asked in (lambda: read_adapter(base, folder/"signs"), lambda: Resident(base, [folder/"signs"], "cpu")):
        with pytest.raises(InputError, match="'signs' is a difference of signs.*Unpack it to a whole model"): asked()

def test_nothing_is_left_of_a_pair_that_is_none(pair, tmp_path):
    folder, *_ = pair
    zoo = read_zoo("demo")
    for model, base, says in ((zoo["b-skip"], zoo["a-base"], "It was not tuned from 'a-base'"), (zoo["a-base"], zoo["a-base"], "no value differs")):
        with pytest.raises(InputError, match=says): extract_signs(model, base, tmp_path/"d")
    assert not list(tmp_path.iterdir())

def test_stacked_experts_take_part(tmp_path):
    model = certificate.tiny_model("mixtral", 0)
    model.save_pretrained(tmp_path/"base")
    with torch.no_grad():
        for p in model.parameters(): p.add_(.02 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    model.save_pretrained(tmp_path/"tune")
    for name in ("base", "tune"): tiny_tokenizer(64).save_pretrained(tmp_path/name)
    made = extract_signs(tmp_path/"tune", tmp_path/"base", tmp_path/"d")
    assert made.unsaid == 0 and {p.kind for p in made.parts} == {"signs", "whole"} and .55 < made.error < .65

def test_packed_members_answer_nearly_as_before(tmp_path):
    from model_glue_nb.benchmarking.scores import ask_model
    from model_glue_nb.benchmarking.suites import load_suite
    zoo = read_zoo("demo")
    made = pack(zoo.subset(["a-base", "a-double"]), tmp_path/"p", write=extract_signs)
    assert [r["kept"] for r in made.rows] == ["base", "difference"] and made.rows[1]["bytes"] < .1 * zoo["a-base"].n_bytes
    suite = load_suite("demo").only(["double"]).part("report", 20)
    def skill(m): return float(ask_model(m, suite)["double"].mean())
    assert skill(zoo["a-base"]) < .8 < skill(unpack_model(tmp_path/"p", "a-double", tmp_path/"w")) and read_zoo(tmp_path/"p").names == ["a-base", "a-base+a-double"]

def test_commands(tmp_path, command):
    zoo = read_zoo("demo")
    pair = zoo["a-sort"].path, zoo["a-base"].path
    code, out, err = command("extract", *pair, tmp_path/"d", "--form", "signs", "--json")
    assert not code and json.loads(out)["share"] < .1
    code, out, err = command("extract", *pair, tmp_path/"e", "--form", "signs", "--rank", 4)
    assert code == 2 and "rank says nothing" in " ".join(err.split()) and not (tmp_path/"e").exists()
    code, out, err = command("extract", *pair, tmp_path/"e", "--form", "sings")
    assert code == 2 and "Did you mean 'signs'?" in err
    code, out, err = command("doctor", tmp_path/"d")
    assert "MODEL_GLUE_SIGNS adapter, expected LORA" not in out + err
    (tmp_path/"z.yaml").write_text("".join(f"- {zoo[n].path}\n" for n in ("a-base", "a-sort")))
    code, out, err = command("pack", tmp_path/"z.yaml", tmp_path/"p", "--form", "signs", "--json")
    assert not code and [r["kept"] for r in json.loads(out)] == ["base", "difference"]
    code, out, err = command("unpack", tmp_path/"p", "a-sort", tmp_path/"w")
    assert not code and (tmp_path/"w/config.json").exists()
