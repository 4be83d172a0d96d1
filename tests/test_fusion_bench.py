"Parity with fusion-bench 0.2.33, as a black box; needs it and what it imports on the path, and is skipped without."
import numpy as np
import pytest
import torch

fisher_merging = pytest.importorskip("fusion_bench.method.fisher_merging.fisher_merging", exc_type=ImportError)
regression = pytest.importorskip("fusion_bench.method.regmean.regmean", exc_type=ImportError)

from test_coefficients import TEXTS, measured
from test_layer_inputs import NAMES, WEIGHTS

from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.methods import try_method
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.zoo.layer_coefficients import _drawn
from model_glue_nb.zoo.layer_inputs import Reads
from model_glue_nb.zoo.zoo import tiny_zoo

RAW = dict(source="fisher", normalize=False)

def test_squared_gradients(tmp_path):
    "Theirs of every text, summed and averaged over layers, are our coefficients."
    zoo = tiny_zoo(tmp_path, ["a", "base"], dtype="float32")
    live, rng = zoo["a"].load("cpu"), np.random.default_rng(0)
    ids, total = live.encode(TEXTS["a"]), {}
    params = dict(live.model.named_parameters())
    for x in ids:
        live.model.zero_grad()
        logits = live.model(input_ids=torch.tensor([x])).logits[0]
        y = _drawn(logits, rng)
        logits.log_softmax(-1)[torch.arange(len(y)), y].sum().backward()
        for n, g in fisher_merging.get_param_squared_gradients(live.model, list(params)).items(): total[n] = total.get(n, 0) + g
    ours = measured(zoo, RAW, "a")
    for start in ("model.layers.0.", "model.layers.1.", "model.embed_tokens.", "model.norm.", "lm_head."):
        own = [n for n in params if n.startswith(start)]
        theirs = sum(float(total[n].sum()) for n in own) / sum(params[n].numel() for n in own) / sum(map(len, ids))
        assert ours[own[0]] == pytest.approx(theirs, rel=1e-5), start

def test_merging_with_fisher_weights(tmp_path):
    "Their average by Fisher weights, equal within a layer, is our linear merge with coefficients."
    zoo = tiny_zoo(tmp_path, [*NAMES, "base"], dtype="float32")
    ours = merge(recipe("linear", NAMES, WEIGHTS, options=dict(prompts=TEXTS, coefficients=RAW)), zoo, tmp_path/"out")
    found = [measured(zoo, RAW, n) for n in NAMES]
    params = {k: [torch.from_numpy(zoo[n].values(k)) for n in NAMES] for k in ours.tensors}
    weights = [{k: torch.full(params[k][0].shape, f[k]) for k in params} for f in found]
    how = dict(normalize_fisher_weight=False, minimal_fisher_weight=0.0)
    theirs = fisher_merging.merging_with_fisher_weights(params, weights, torch.tensor(WEIGHTS), **how)
    far = {k: np.abs(ours.values(k) - x.numpy()).max() for k, x in theirs.items()}
    print(f"fisher: {len(far)} tensors, largest difference {max(far.values()):.1e}")
    assert set(far) == set(ours.tensors) and max(far.values()) < 1e-6

def test_regmean():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 12, 20)).astype(np.float32)
    x = [rng.normal(size=(60, 20)) * rng.uniform(.2, 3, 20) for _ in w]
    grams = [(v.T @ v / len(v)).astype(np.float32) for v in x]
    theirs = regression.merging_with_regmean_weights({"m.weight": list(map(torch.from_numpy, w))},
                                                     [{"m": torch.from_numpy(g)} for g in grams], .7)
    ours = try_method("regmean", list(w), inputs=Reads(grams, -1), alpha=.7)
    far = np.abs(theirs["m.weight"].numpy() - ours).max()
    print(f"regmean: largest difference {far:.1e}")
    assert far < 1e-5
