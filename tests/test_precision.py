"Inner products of long tensors, summed as the formulas need them."
import numpy as np
import pytest
import torch

from model_glue_nb import kernels, torch_kernels
from model_glue_nb.values import CODES

@pytest.mark.parametrize("module, near", [(torch_kernels, 1e-12), (kernels, 1e-5)], ids=["torch", "compiled"])
def test_inner_products_of_long_vectors(module, near):
    r = np.random.default_rng(0)
    x = (30 + r.normal(size=(2, 300_000))).astype(np.float32)
    raw = x.view(np.uint8)
    if module is torch_kernels: raw = torch.from_numpy(raw)
    got, want = module.gram(raw, np.full(2, CODES["F32"]), False, x.shape[1]), np.float64(x) @ np.float64(x).T
    assert np.abs(got / want - 1).max() < near
