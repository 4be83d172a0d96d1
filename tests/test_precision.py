"Inner products of long tensors, summed as the formulas need them."
import numpy as np
import pytest
import torch

from model_glue_nb.tensors import masks, kernels, torch_kernels
from model_glue_nb.tensors.dtypes import CODES

@pytest.mark.parametrize("module, near", [(torch_kernels, 1e-12), (kernels, 1e-5)], ids=["torch", "compiled"])
def test_inner_products_of_long_vectors(module, near):
    r = np.random.default_rng(0)
    x = (30 + r.normal(size=(2, 300_000))).astype(np.float32)
    raw = x.view(np.uint8)
    if module is torch_kernels: raw = torch.from_numpy(raw)
    got, want = (module.gram(raw, np.full(2, CODES["F32"]), False, x.shape[1]),
                 np.float64(x) @ np.float64(x).T)
    assert np.abs(got / want - 1).max() < near

def test_cuts_at_the_ends_of_bins():
    counts = np.array([5, 0, 3, 2])
    assert [kernels.kth_bin(counts, k)
            for k in (1, 2, 3, 5, 6, 10)] == [(3, 1),
                                              (3, 2), (2, 1), (2, 3),
                                              (0, 1), (0, 5)]
    found = np.array([(bits << 33) + kernels.LAST - at
                      for bits, at in ((9, 4), (7, 1), (7, 6))],
                     np.uint64)
    assert [kernels.cut_of(found, k)
            for k in (1, 2, 3, 4)] == [(9, 4), (7, 1), (7, 6), (0, -1)]

def test_draws_are_compared_exactly_and_go_on_from_row_to_row():
    kept = np.zeros(3, np.uint8)
    masks.decide(np.array([3, 4, 5], np.uint32), 4, kept)
    assert kept.tolist() == [1, 0, 0] and masks.cut_at(.5 + 2.0**-26) == 2**23 + 1
    x = np.ones((2, 64), np.float32)
    masks.drop_by_rank(x, 0, 7, .5, .2)
    assert ((x[0] != 0) != (x[1] != 0)).any()

def test_every_entry_is_decided_by_the_chance_of_its_rank():
    r = np.random.default_rng(1)
    n, keep, spread = 4096, .5, .3
    x = np.stack([np.zeros(n), r.normal(size=n)]).astype(np.float32)
    bits, _ = masks.mark(x.view(np.uint8),
                         np.full(2, CODES["F32"]), n, 0, n,
                         np.array([9], np.uint64),
                         np.array([keep]), np.array([spread]))
    numbers = np.empty(n, np.uint32)
    masks.draw(9, 0, numbers)
    rank = np.abs(x[1]).argsort(kind="stable").argsort()
    chance = keep - spread + 2 * spread / (n - 1) * rank
    assert np.array_equal(np.unpackbits(bits[0], bitorder="little")[:n], numbers < np.ceil(chance * 2**24))
