"""Every merge method against its paper's formula, written down once more in float64: unequal weights, uneven densities, three models of
three stored types, values that meet a cut, several chunks, rows that no block divides; on both backends and with files that are mapped or read."""
import os

import numpy as np
import pytest

from model_glue_nb.core import InputError
from model_glue_nb.merging import regions, spectra # their methods join the registry
from model_glue_nb.merging.methods import arc, merge_methods, method_info, run_method, try_method
from model_glue_nb.tensors.dtypes import CODES, narrow
from model_glue_nb.tensors.kernels import EVERYTHING, NOTHING
from model_glue_nb.tensors.streams import ArrayBlocks, FileBlocks, MappedBlocks, Stream, to_host

SHAPE, KINDS = (211, 443), ("BF16", "F16", "F32")
WEIGHTS, DENSITY, GAMMA = (.5, 1.75, .625), (.3, .55, .8), (.02, .11, .004)

def stored(x, kind):
    "An array as its bytes; its values are exact in every type."
    out = np.empty(x.size * (4 if kind == "F32" else 2), np.uint8)
    narrow(np.ascontiguousarray(x, np.float32).reshape(-1), CODES[kind], out)
    return MappedBlocks(out, CODES[kind], x.size)

@pytest.fixture(scope="module")
def zoo():
    "A base and three models: coarse values, so that many magnitudes are equal and some sums are zero; a tenth is the base's own."
    r = np.random.default_rng(7)
    base = r.integers(-40, 41, SHAPE) / 64
    step = [r.integers(-14, 15, SHAPE) / 64 * r.choice([0, 1, 1, 1, .5], SHAPE)
            for _ in range(3)]
    step[1] += .25 * np.sign(step[0]) # unequal cosines
    return base, [base + d for d in step]

def stream(models, base=None, keys=(), device="cpu", read=False, shape=SHAPE):
    "The tensors as a merge opens them; `read` copies what would otherwise be used where it lies."
    blocks = [stored(x, KINDS[i % 3]) for i, x in enumerate(models)]
    def bad(i): raise AssertionError(f"input {i} is said to hold no numbers")
    return Stream(blocks, shape, None if base is None else stored(base, "F32"), keys, on_bad=bad if read else None, device=device)

def made(method, s, **p):
    "What a method makes, float32."
    info = method_info(method)
    p = {k: v for k, v in dict(info.parameters).items()} | p
    if info.has_weights: p.setdefault("weight", 1.0)
    p |= {k: np.broadcast_to(np.float64(p[k]), s.k) for k in info.per_model}
    out = np.empty(s.n, np.float32)
    def put(block, start): out[start:start + len(block) // 4] = to_host(block).view(np.float32)
    s.make(run_method(method, s, p), CODES["F32"], put)
    return out.reshape(s.shape)

# --- the formulas once more

def order(d):
    "Positions by falling magnitude, of equal ones the earlier first."
    return np.lexsort((np.arange(d.size), -np.abs(d).ravel()))

def keep(d, most, top=0):
    "A vector of which entries from rank `top` to rank `most` are left."
    out, at = np.zeros(d.size), order(d)[top:most]
    out[at] = d.ravel()[at]
    return out.reshape(d.shape)

def combined(base, d, w, elect, normalize, scale, votes=None):
    "Weigh, elect, sum, normalise, scale, add the base."
    v = [a * x for a, x in zip(w, d)]
    den = np.full(base.shape, float(sum(w)))
    if elect:
        total = sum(a * x for a, x in zip(w if votes is None else votes, d))
        agree = [np.where(total >= 0, x > 0, x < 0) for x in v]
        den = sum(a * m for a, m in zip(w, agree))
        v = [x * m for x, m in zip(v, agree)]
    if not normalize: den = np.ones(base.shape)
    return base + scale * sum(v) / np.where(np.abs(den) > 1e-8, den, 1)

def whole(f, n): return int(f * n + 1e-6)

def ties(base, d, w, density, normalize=True, scale=1.):
    return combined(base, [keep(x, whole(f, x.size)) for x, f in zip(d, density)], w, True, normalize, scale)

def crumbs(base, d, w, density, gamma, elect, normalize=False, scale=1.):
    def left(x, f, g):
        return keep(x, min(whole(g, x.size) + whole(f, x.size), x.size), whole(g, x.size))
    return combined(base, [left(*x) for x in zip(d, density, gamma)], w, elect, normalize, scale)

def sce(base, d, share):
    variance = np.var(d, axis=0)
    n = whole(share * (variance != 0).sum() / variance.size, variance.size) if share < 1 else variance.size
    # ranked as float32, which is what the values are
    mask = keep(np.float32(variance), n) != 0 if share < 1 else np.ones(base.shape, bool)
    d = [x * mask for x in d]
    energy = np.array([(x**2).sum() for x in d])
    return combined(base, d, energy / energy.sum(), True, True, 1., votes=np.ones(len(d)))

def cosine(x, y): return float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))

def on_arc(x, y, t):
    angle = np.arccos(cosine(x, y))
    return (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)

def stock(base, d):
    k = len(d)
    mean = np.mean([cosine(d[i], d[j]) for i in range(k) for j in range(i)])
    return base + k * mean / (1 + (k - 1) * mean) * sum(d) / k

def cases(base, models):
    "Method, its parameters, and what its formula gives."
    d, w, total = [m - base for m in models], np.array(WEIGHTS), sum(WEIGHTS)
    summed, mixed = sum(a * x for a, x in zip(w, d)), sum(a * m for a, m in zip(w, models))
    opposed = np.array([-1.5, .5, .25])
    yield "linear", dict(weight=w), mixed / total
    yield "linear", dict(weight=w, normalize=False), mixed
    yield "task_arithmetic", dict(weight=w, scale=.6), base + .6 * summed
    yield "task_arithmetic", dict(weight=w, scale=.6, normalize=True), base + .6 * summed / total
    yield "task_arithmetic", dict(weight=opposed, normalize=True), base + sum(a * x for a, x in zip(opposed, d)) / opposed.sum()
    yield "model_stock", {}, stock(base, d)
    for p in (dict(), dict(scale=.7), dict(normalize=False, scale=1.3)):
        yield "ties", dict(weight=w, density=DENSITY) | p, ties(base, d, w, DENSITY, **p)
        yield "breadcrumbs", dict(weight=w, density=DENSITY, gamma=GAMMA) | p, crumbs(base, d, w, DENSITY, GAMMA, False, **p)
        yield "breadcrumbs_ties", dict(weight=w, density=DENSITY, gamma=GAMMA) | p, crumbs(base, d, w, DENSITY, GAMMA, True, **p)
    yield "ties", dict(weight=opposed, density=DENSITY), ties(base, d, opposed, DENSITY)
    yield "ties", dict(weight=w, density=1.), ties(base, d, w, (1., 1., 1.))
    yield "breadcrumbs", dict(weight=w, density=DENSITY, gamma=GAMMA, normalize=True), crumbs(base, d, w, DENSITY, GAMMA, False, True)

BACKENDS = [("cpu", False), ("cpu", True), ("cpu-torch", True)]

@pytest.mark.parametrize("device, read", BACKENDS, ids=["mapped", "read", "torch"])
def test_methods_follow_their_formulas(zoo, device, read):
    base, models = zoo
    for method, p, want in cases(base, models):
        reads = method_info(method).reads
        s = stream(models, base if reads != "models" else None, device=device, read=read)
        assert device != "cpu" or len(s.chunks()) > 1
        assert np.abs(made(method, s, **p) - want).max() < 2e-5, (method, p)

@pytest.mark.parametrize("device, read", BACKENDS, ids=["mapped", "read", "torch"])
def test_sce_follows_its_formula(zoo, device, read):
    base, models = zoo
    models = [*models, base + np.roll(models[0] - base, 1)] # four: their variance is exact in float32
    for share in (1., .35, .9):
        got = made("sce", stream(models, base, device=device, read=read), select_topk=share)
        assert np.abs(got - sce(base, [m - base for m in models], share)).max() < 2e-5, share

@pytest.mark.parametrize("device, read", BACKENDS, ids=["mapped", "read", "torch"])
def test_arcs_follow_their_formulas(zoo, device, read):
    base, (a, b, _) = zoo
    x, y = a, .5 * b + np.roll(a, 1) # of unequal length
    for t in (.2, .7):
        assert np.abs(made("slerp", stream([x, y], device=device, read=read), t=t)
                      - on_arc(x, y, t)).max() < 2e-5
    weights = np.array([.6, 1.8])
    assert np.abs(made("nuslerp", stream([x, y], device=device, read=read), weight=weights)
                  - on_arc(x, y, .75)).max() < 2e-5
    with_base = made("nuslerp", stream([a, b], base, device=device, read=read), weight=weights)
    assert np.abs(with_base - base - on_arc(a - base, b - base, .75)).max() < 2e-5
    assert np.abs(made("passthrough", stream([a], device=device, read=read), scale=.7) - .7 * a).max() < 1e-6
    near = made("nearswap", stream([a], base, device=device, read=read), t=.05)
    assert (np.abs(near - base - np.clip(a - base, -.05, .05)).max() < 1e-6
            and (near < base).any() and (near > base).any())

def on_arcs(x, y, t, axis):
    "The arc of every line of two tensors along an axis."
    x, y = np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1)
    lines = [on_arc(a, b, t) for a, b in zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))]
    return np.moveaxis(np.reshape(lines, x.shape), -1, axis)

@pytest.mark.parametrize("device, read", BACKENDS, ids=["mapped", "read", "torch"])
@pytest.mark.parametrize("shape", [SHAPE, (7, 29, 443)], ids=str)
def test_arcs_line_by_line(zoo, device, read, shape):
    base, a, b = (np.resize(x, shape) for x in (zoo[0], *zoo[1][:2]))
    b = .5 * b + np.roll(a, 1)
    weights = np.array([.6, 1.8])
    for row_wise, axis in ((False, -1), (True, 0)):
        p = dict(weight=weights, nuslerp_flatten=False, nuslerp_row_wise=row_wise)
        got = made("nuslerp", stream([a, b], device=device, read=read, shape=shape), **p)
        assert np.abs(got - on_arcs(a, b, .75, axis)).max() < 2e-5
        got = made("nuslerp", stream([a, b], base, device=device, read=read, shape=shape), **p)
        assert np.abs(got - base - on_arcs(a - base, b - base, .75, axis)).max() < 2e-5

@pytest.mark.parametrize("device, read", BACKENDS, ids=["mapped", "read", "torch"])
def test_model_stock_row_by_row(zoo, device, read):
    base, models = zoo
    want = np.stack([stock(x, [r - x for r in rows]) for x, *rows in zip(base, *models)])
    got = made("model_stock", stream(models, base, device=device, read=read), filter_wise=True)
    assert np.abs(got - want).max() < 2e-5 < np.abs(want - stock(base, [m - base for m in models])).max()

def ram(base, d, epsilon, gain=lambda shared, unique: 1.):
    changed = np.abs(d) > epsilon
    n = changed.sum(0)
    alone = [c & (n == 1) for c in changed]
    gains = [gain((c & (n > 1)).sum(), a.sum()) for c, a in zip(changed, alone)]
    parts = sum(np.where(a, g, 1) * c * x for a, g, c, x in zip(alone, gains, changed, d))
    return base + parts / np.maximum(n, 1)

@pytest.mark.parametrize("device, read", BACKENDS, ids=["mapped", "read", "torch"])
def test_ram_follows_its_formula(zoo, device, read):
    base, models = zoo
    d = [m - base for m in models]
    def opened(): return stream(models, base, device=device, read=read)
    for epsilon in (1e-5, 5 / 64): # many differences are exactly five steps
        assert np.abs(made("ram", opened(), epsilon=epsilon) - ram(base, d, epsilon)).max() < 2e-6
    for r, alpha in ((.1, .2), (.3, 1e6)):
        def gain(shared, unique): return 1 + r * min(shared / unique, alpha)
        got = made("ramplus_tl", opened(), epsilon=5 / 64, r=r, alpha=alpha)
        assert np.abs(got - ram(base, d, 5 / 64, gain)).max() < 2e-5

def fusion(base, model):
    def log_softmax(x): return x - np.log(np.exp(x).sum(1, keepdims=True))
    new, old = log_softmax(model), log_softmax(base)
    divergence = (np.exp(new) * (new - old)).sum(1, keepdims=True)
    importance = np.float32(np.abs(model - base)) * np.float32(divergence)
    low, middle, high = np.quantile(importance, (.25, .5, .75), method="lower").astype(float)
    return np.where(importance >= middle + 1.5 * (high - low), model, base)

@pytest.mark.parametrize("device, read", BACKENDS, ids=["mapped", "read", "torch"])
def test_arcee_fusion_takes_what_stands_out(zoo, device, read):
    base, models = zoo
    models = [m.copy() for m in models]
    for m in models:
        m[::9] = base[::9] + 4 * (m - base)[::9] # rows that changed more
        want = fusion(base, m)
        got = made("arcee_fusion", stream([m], base, device=device, read=read))
        wrong = np.abs(got - want) > 2e-6
        assert wrong.mean() < 1e-4 and .01 < (want != base).mean() < .4
    a = np.float32([[3, 1, 2, 9]]) # of four differences the largest is just three quarters of the way out
    assert np.array_equal(made("arcee_fusion", stream([a], 0 * a, device=device, shape=(1, 4))), [[0, 0, 0, 9]])

def regain(x, kept, density, rescale):
    return kept * dict(none=1, density=1 / density, l1=np.abs(x).sum() / np.abs(kept).sum())[rescale]

@pytest.mark.parametrize("device, read", BACKENDS, ids=["mapped", "read", "torch"])
@pytest.mark.parametrize("rescale", ["density", "l1"])
def test_what_trimming_took_can_be_given_back(zoo, device, read, rescale):
    base, models = zoo
    d, w = [m - base for m in models], np.array(WEIGHTS)
    n = base.size
    for method, gamma in (("ties", (0, 0, 0)), ("breadcrumbs", GAMMA), ("breadcrumbs_ties", GAMMA)):
        kept = [keep(x, whole(g, n) + whole(f, n), whole(g, n)) for x, f, g in zip(d, DENSITY, gamma)]
        back = [regain(*x, rescale) for x in zip(d, kept, DENSITY)]
        elect = method != "breadcrumbs"
        p = dict(weight=w, density=DENSITY, rescale=rescale, normalize=elect, scale=.7) | (dict(gamma=gamma) if any(gamma) else {})
        got = made(method, stream(models, base, device=device, read=read), **p)
        assert np.abs(got - combined(base, back, w, elect, elect, .7)).max() < 3e-5, method

def test_straight_lines_are_only_for_what_is_nearly_colinear():
    for c in (.9996, -.9996): assert arc(c, .3) == (.7, .3)
    for c in (.9994, .95, -.95, 0., -.9994):
        angle = np.arccos(c)
        assert np.allclose(arc(c, .3),
                           (np.sin(.7 * angle) / np.sin(angle), np.sin(.3 * angle) / np.sin(angle)))

def unit(x): return x / np.linalg.norm(x)

def log_map(at, x):
    "The way from a point of the sphere to another, in the tangent space."
    angle = np.arccos(np.clip((at * x).sum(), -1, 1))
    return angle / np.sin(angle) * (x - np.cos(angle) * at)

@pytest.mark.parametrize("device, read", BACKENDS, ids=["mapped", "read", "torch"])
def test_means_of_directions(zoo, device, read):
    base, models = zoo
    models = [models[0], 1.5 * models[1], .5 * np.roll(models[2], 3)]
    w = np.array(WEIGHTS) / sum(WEIGHTS)
    length = sum(a * np.linalg.norm(m) for a, m in zip(w, models))
    mean = made("karcher", stream(models, device=device, read=read), weight=WEIGHTS, max_iter=100, tol=1e-9)
    assert abs(np.linalg.norm(np.float64(mean)) / length - 1) < 1e-5
    pulls = sum(a * log_map(unit(np.float64(mean)), unit(m)) for a, m in zip(w, models))
    straight = sum(a * unit(m) for a, m in zip(w, models))
    assert np.linalg.norm(pulls) < 1e-4 < np.abs(unit(straight) - unit(mean)).max() * 100 # no pull is left, and it isn't the chord's mean
    made_by_chords = made("multislerp", stream(models, device=device, read=read), weight=WEIGHTS)
    assert np.abs(made_by_chords - unit(straight) * length).max() < 2e-5
    not_one = made("multislerp", stream(models, device=device, read=read), weight=WEIGHTS, normalize_weights=False)
    assert np.abs(not_one - unit(straight) * length * sum(WEIGHTS)).max() < 1e-4

def test_a_vector_of_zeros_has_no_direction(zoo):
    base, (a, b, _) = zoo
    for method in ("karcher", "multislerp"):
        got = made(method, stream([a, 0 * a, b]), weight=WEIGHTS)
        assert np.abs(got
                      - sum(w * m for w, m in zip(WEIGHTS, (a, 0 * a, b))) / sum(WEIGHTS)).max() < 1e-5

# --- what is drawn

KEYS = (11, 2**63 + 5, 40_000_000_000)

def masks(zoo, device, density, epsilon=None):
    "What each model keeps, seen one model at a time."
    base, models = zoo
    for m, key, f, e in zip(models, KEYS, density, epsilon or (0, 0, 0)):
        p = dict(density=f, rescale="none") | (dict(epsilon=e) if epsilon else {})
        s = Stream([ArrayBlocks(m)], SHAPE, ArrayBlocks(base), [key], device=device)
        got = made("della_linear" if epsilon else "dare_linear", s, **p)
        yield got != np.float32(base)

@pytest.mark.parametrize("device, read", BACKENDS, ids=["mapped", "read", "torch"])
def test_dare_and_della_weigh_what_they_keep(zoo, device, read):
    base, models = zoo
    d, w, epsilon = [m - base for m in models], np.array(WEIGHTS), (.1, .2, .15)
    rank = [np.argsort(np.argsort(np.abs(x), axis=1, kind="stable"), axis=1) for x in d]
    for family, spread in (("dare", None), ("della", epsilon)):
        kept = [x * m for x, m in zip(d, masks(zoo, device, DENSITY, spread))]
        chance = [np.full(SHAPE, f) for f in DENSITY] if spread is None else [
            f - e + 2 * e * r / (SHAPE[1] - 1) for f, e, r in zip(DENSITY, spread, rank)]
        gain = dict(none=[1, 1, 1],
                    density=[1 / c for c in chance],
                    l1=[np.abs(x).sum() / np.abs(y).sum() for x, y in zip(d, kept)])
        for rescale, g in gain.items():
            for elect in (False, True):
                method = f"{family}{'_ties' if elect and spread is None else '' if elect else '_linear'}"
                p = dict(density=DENSITY, rescale=rescale, weight=w, scale=.7, normalize=elect) | (dict(epsilon=spread) if spread else {})
                want = combined(base, [x * a for x, a in zip(kept, g)], w, elect, elect, .7)
                got = made(method, stream(models, base, KEYS, device, read), **p)
                assert np.abs(got - want).max() < 5e-5, (method, rescale)

def test_della_keeps_the_large_and_dare_whatever_comes(zoo):
    base, models = zoo
    for x, m, n, f, e in zip([m - base for m in models],
                             masks(zoo, "cpu", DENSITY),
                             masks(zoo, "cpu", DENSITY, (.25, .3, .15)),
                             DENSITY, (.25, .3, .15)):
        size, moved = np.abs(x), x != 0
        rank = np.argsort(np.argsort(size, axis=1, kind="stable"), axis=1) / (SHAPE[1] - 1)
        low, high = moved & (rank < .5), moved & (rank >= .5)
        assert abs(m[low].mean() - f) < .01 and abs(m[high].mean() - f) < .01
        for part in (low, high):
            assert abs(n[part].mean() - (f - e + 2 * e * rank[part].mean())) < .01

@pytest.mark.parametrize("device", ["cpu", "cpu-torch"])
def test_density_one_keeps_all_whatever_epsilon_says(zoo, device):
    base, models = zoo
    got = made("della_linear", stream(models, base, KEYS, device),
               density=(1., .5, 1.), epsilon=.2,
               weight=(1, 0, 2), rescale="none")
    assert np.abs(got - (base + models[0] - base + 2 * (models[2] - base))).max() < 1e-5

def test_draws_go_on_from_chunk_to_chunk():
    "A tensor of many chunks: what is kept depends on the entry alone, neither on chunks nor on blocks."
    r = np.random.default_rng(3)
    n = 300_001
    base, x = np.zeros(n, np.float32), r.normal(size=n).astype(np.float32)
    def once(limit):
        s = Stream([ArrayBlocks(x), ArrayBlocks(2 * x)], (n,), ArrayBlocks(base), [5, 6])
        s.chunks = lambda whole_rows=False, most=None: [(i, min(limit, n - i)) for i in range(0, n, limit)]
        return made("dare_linear", s, density=(.3, .6), weight=(1., 10.), rescale="none")
    one, two = once(n), once(4096)
    assert np.array_equal(one, two)
    both = one / np.where(x == 0, 1, x) # 0, 1, 20 or 21
    for value, share in ((1, .3 * .4), (20, .7 * .6), (21, .3 * .6)):
        assert abs((np.abs(both - value) < .01).mean() - share) < .005

# --- cuts

@pytest.mark.parametrize("device", ["cpu", "cpu-torch"])
def test_cuts_are_exact_at_the_ends_of_bins(device):
    "Values that lie at the very first and last place of a bin, many of them equal."
    r = np.random.default_rng(0)
    edge = np.float32(1 + 1 / 32)
    values = np.float32([0, 1e-45, .5, 1,
                         np.nextafter(edge, np.float32(0)), edge, 2,
                         np.nextafter(np.float32(4), np.float32(0)), 4])
    x = (r.choice(values, 150_000) * r.choice([-1, 1], 150_000)).astype(np.float32)
    y = (np.roll(x, 17) / 2).astype(np.float32)
    for fractions in ((.12, .91), (.334, .05), (.5, .2),
                      (.77, .66), (.45, .888), (0, 1), (1e-9, .25)):
        s = Stream([ArrayBlocks(x), ArrayBlocks(y)], x.shape, device=device)
        cuts = s.cuts(fractions)
        for v, f, low in zip((x, y), fractions, cuts):
            block = s.kernels.upload(v.copy(), s.device)
            s.kernels.keep_between(block, 0, low, NOTHING)
            assert np.array_equal(to_host(block.view(np.uint8) if device == "cpu" else block).view(np.float32),
                                  keep(v, whole(f, v.size)).astype(np.float32)), f
            below = s.kernels.upload(v.copy(), s.device)
            s.kernels.keep_between(below, 0, EVERYTHING, low)
            rest = v - keep(v, whole(f, v.size)).astype(np.float32)
            assert np.array_equal(to_host(below.view(np.uint8) if device == "cpu" else below).view(np.float32), rest), f

def test_fractions_of_whole_entries():
    "29 % of 100 are 29, though .29 · 100 is a little less."
    x = np.arange(1, 101, dtype=np.float32)
    assert (try_method("ties", [x], np.zeros(100), density=.29) != 0).sum() == 29
    assert (try_method("ties", [x], np.zeros(100), density=.295) != 0).sum() == 29
    assert (try_method("breadcrumbs", [x], np.zeros(100), density=.29, gamma=.015) != 0).tolist() == [1 <= 99 - i < 30 for i in range(
        100)]

def test_a_cut_counts_from_the_start_of_the_tensor():
    "Of equal magnitudes the first are kept, also where they lie beyond the first block and chunk."
    n = 200_000
    x = np.where(np.arange(n) % 3 == 1, -.5, .5).astype(np.float32)
    for f in (.3, .71):
        got = try_method("ties", [x], np.zeros(n), density=f)
        assert np.array_equal(got, np.where(np.arange(n) < whole(f, n), x, 0))

# --- what goes in

@pytest.mark.parametrize("device", ["cpu", "cpu-torch"])
def test_each_input_has_its_own_type_and_a_bad_one_is_named(zoo, device):
    base, models = zoo
    for i in range(4):
        inputs = [base.copy(), *(m.copy() for m in models)]
        inputs[i][5, 7] = np.inf
        seen = []
        s = Stream([stored(x, KINDS[j % 3]) for j, x in enumerate(inputs[1:])],
                   SHAPE, stored(inputs[0], "F32"), on_bad=seen.append, device=device)
        made("task_arithmetic", s)
        assert set(seen) == {i}

def test_a_method_that_is_a_function_of_arrays(zoo):
    "Whole arrays: the base, if any, is added; the inputs may be changed."
    base, models = zoo
    try:
        @merge_methods
        def furthest(deltas, weights=1.0, share=.5):
            "The largest change of each entry."
            deltas[0][:] *= 2
            stacked = np.stack(deltas)
            return share * np.take_along_axis(stacked, np.abs(stacked).argmax(0)[None], 0)[0]
        got = made("furthest", stream(models, base), share=.25)
        d = np.stack([2 * (models[0] - base), models[1] - base, models[2] - base])
        assert np.abs(got - base
                      - .25 * np.take_along_axis(d, np.abs(d).argmax(0)[None], 0)[0]).max() < 1e-5
    finally: merge_methods.pop("furthest", None)

def test_arrays_without_a_base(zoo):
    "Nothing is added, and models that are no task vectors stay what they are."
    _, models = zoo
    try:
        @merge_methods
        def smallest(models): return np.min(models, 0)
        assert np.abs(made("smallest", stream(models)) - np.min(models, 0)).max() < 1e-6
    finally: merge_methods.pop("smallest", None)

def test_files_are_read_where_they_lie_and_memory_is_filled_where_it_lies(zoo, tmp_path):
    "Three files whose tensors begin somewhere, and a result that is written in place, chunk by chunk."
    base, models = zoo
    blocks = []
    for i, x in enumerate([base, *models]):
        kind = KINDS[(i + 2) % 3]
        (tmp_path/f"{i}").write_bytes(bytes(13 + i) + stored(x, kind).bytes.tobytes() + b"end")
        blocks.append(FileBlocks(os.open(tmp_path/f"{i}", os.O_RDONLY), 13 + i, CODES[kind]))
    s = Stream(blocks[1:], SHAPE, blocks[0])
    assert len(s.chunks()) > 1
    out = np.zeros(s.n, np.float16)
    def put(block, start): raise AssertionError("memory is filled without it")
    put.memory = out.view(np.uint8)
    s.make(run_method("ties", s, dict(weight=WEIGHTS, density=DENSITY, normalize=True, scale=.5)), CODES["F16"], put)
    want = ties(base, [m - base for m in models], WEIGHTS, DENSITY, scale=.5)
    assert np.abs(out.reshape(SHAPE) - want).max() < 1e-3
    for x in blocks: os.close(x.file)

def test_the_sum_knows_where_each_chunk_begins(zoo):
    base, models = zoo
    s = stream(models, base)
    assert s.total(lambda d, start: start + 0 * d[0, 0]) == sum(start for start, _ in s.chunks()) > 0

def test_odd_calls_are_refused(zoo):
    with pytest.raises(InputError): MappedBlocks(np.zeros(7, np.uint8), CODES["F32"], 2)
