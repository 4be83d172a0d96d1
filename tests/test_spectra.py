"Methods by singular vectors against the papers' formulas in float64, written otherwise than ours."
import numpy as np
import pytest
from scipy.linalg import polar
from model_glue_nb.core import InputError
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.methods import try_method
from model_glue_nb.merging.planner import check_merge_recipe
from model_glue_nb.merging.recipes import recipe, require_form
from model_glue_nb.zoo.zoo import tiny_zoo

SHAPES = [(24, 40), (40, 24), (31, 31)]
WEIGHTS = [.7, 1.6, .4]

def tensors(shape, k=3, seed=0):
    "A base of size 1 and task vectors with a falling spectrum, unlike each other."
    r = np.random.default_rng(seed)
    base, out = r.normal(size=shape), []
    for i in range(k):
        u, _, v = np.linalg.svd(r.normal(size=shape), full_matrices=False)
        out.append((u * (1 + i) * .8 ** np.arange(min(shape))) @ v)
    return base.astype(np.float32), out

def merged(method, shape, k=3, weights=None, **more):
    base, deltas = tensors(shape, k)
    weights = weights or WEIGHTS[:k]
    models = [(base + d).astype(np.float32) for d in deltas]
    deltas = [w * (m.astype(np.float64) - base) for w, m in zip(weights, models)]
    return try_method(method, models, base, weight=weights, **more) - base, deltas

def closest(x):
    "Orthonormal columns by the polar decomposition, which is unique where the columns are independent."
    return polar(x)[0]

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [2, 3])
def test_tsv_m(shape, k):
    ours, deltas = merged("tsv_m", shape, k, scale=.8)
    each, u, s, v = min(shape) // k, [], [], []
    for d in deltas: # by eigenvectors of the two Gram matrices
        values, vectors = np.linalg.eigh(d.T @ d)
        top = np.argsort(-values)[:each]
        v.append(vectors[:, top])
        s.append(np.sqrt(values[top]))
        u.append(d @ vectors[:, top] / s[-1])
    wanted = .8 * closest(np.hstack(u)) @ np.diag(np.hstack(s)) @ closest(np.hstack(v)).T
    assert np.abs(ours - wanted).max() < 2e-6

@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c(shape):
    ours, deltas = merged("iso_c", shape, scale=1.3)
    total = sum(deltas)
    turned = polar(total)[0]
    mean = np.linalg.svd(total, compute_uv=False).mean()
    assert np.abs(ours - 1.3 * mean * turned).max() < 2e-6

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("common", [.5, .8])
def test_iso_cts(shape, common):
    ours, deltas = merged("iso_cts", shape, common=common)
    total, r = sum(deltas), min(shape)
    u, s, v = np.linalg.svd(total)
    n = int(common * r)
    each = (r - n) // 3
    left, lengths, right = [u[:, :n]], [s[:n]], [v[:n].T]
    for d in deltas:
        a, b, c = np.linalg.svd(
            (np.eye(shape[0]) - u[:, :n] @ u[:, :n].T) @ d)
        left.append(a[:, :each])
        lengths.append(b[:each])
        right.append(c[:each].T)
    wanted = np.hstack(lengths).mean() * closest(np.hstack(left)) @ closest(np.hstack(right)).T
    assert np.abs(ours - wanted).max() < 3e-6

@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_a_model_that_changed_nothing_and_one_of_weight_zero(method):
    base, (a, b, _) = tensors((24, 40))
    a, b = ((base + d).astype(np.float32) for d in (a, b))
    both = try_method(method, [a, b], base, weight=[.7, 1.6])
    assert np.array_equal(try_method(method, [a, b, b], base, weight=[.7, 1.6, 0]), both)
    assert np.array_equal(try_method(method, [base, base], base), base)
    assert np.array_equal(try_method(method, [a, b], base, weight=0.), base)

def test_twins_leave_their_stronger_half():
    "Two equal models share all directions: tsv_m keeps the half of them that each was given, at their length."
    base, (d, *_) = tensors((24, 40))
    m = (base + d).astype(np.float32)
    u, s, v = np.linalg.svd(m.astype(np.float64) - base, full_matrices=False)
    assert np.abs(try_method("tsv_m", [m, m], base) - base
                  - (u[:, :12] * s[:12]) @ v[:12]).max() < 2e-6

def test_few_directions_are_not_filled_up():
    "Task vectors of rank 2: the result has no more than they have, and lies in their span."
    r = np.random.default_rng(1)
    base = np.zeros((24, 40), np.float32)
    low = [(r.normal(size=(24, 2)) @ r.normal(size=(2, 40))).astype(np.float32)
           for _ in range(3)]
    span = np.linalg.svd(np.hstack(low))[0][:, :6]
    for method in ("tsv_m", "iso_c", "iso_cts"):
        out = try_method(method, low, base)
        assert np.linalg.matrix_rank(out, 1e-4) == 6 and np.abs(out - span @ (span.T @ out)).max() < 1e-4, method

@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_from_files(method, tmp_path):
    "The engine hands each tensor over whole, and what it writes is what the function gives."
    zoo = tiny_zoo(tmp_path/"zoo", ["base", "a", "b"])
    r = recipe(method, ["a", "b"], [.6, 1.1], base="base", scale=.9)
    assert not check_merge_recipe(r, zoo)
    out, read = (merge(r, zoo, tmp_path/"out"),
                 lambda m, k: m.load().model.state_dict()[k].float().cpu().numpy())
    for k in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"):
        wanted = try_method(method, [read(zoo[n], k) for n in "ab"],
                            read(zoo["base"], k), weight=[.6, 1.1], scale=.9)
        assert np.abs(read(out, k) - wanted).max() <= .01 * np.abs(wanted).max(), k

def test_bad_settings_are_refused():
    for bad in (-.1, 1.5, "x"):
        with pytest.raises(InputError, match="common"):
            require_form(recipe("iso_cts", ["a", "b"], base="c", common=bad))
    with pytest.raises(InputError, match="needs a base"): require_form(recipe("tsv_m", ["a", "b"]))
