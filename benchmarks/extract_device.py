"""The directions of a large weight's change: where the products are computed.

    python benchmarks/extract_device.py [ROWS] [COLUMNS] [DEVICE]      11008, 4096 and cuda

One weight of a 7B model in bf16, from memory; the reading, widening and products of `largest_directions` with 16 directions, by processor and
by device, and the error of both against an exact decomposition on the device."""
import sys, time
import numpy as np, torch
from model_glue_nb.merging.low_rank import Change, largest_directions
from model_glue_nb.tensors.streams import ArrayBlocks

def main(rows="11008", columns="4096", device="cuda"):
    shape, rng = (int(rows), int(columns)), np.random.default_rng(0)
    old = rng.standard_normal(shape, np.float32) * np.float32(.02)
    u, v = (rng.standard_normal((n, 24), np.float32) for n in shape)
    step = (u * .8 ** np.arange(24, dtype=np.float32)) @ v.T
    new = old + step * np.float32(.02 * np.linalg.norm(old) / np.linalg.norm(step)) + rng.standard_normal(shape, np.float32) * np.float32(2e-5)
    def change(where): return Change(ArrayBlocks(new.reshape(-1)), ArrayBlocks(old.reshape(-1)), shape, where)
    delta = torch.from_numpy(new - old)
    for where in ("cpu", device):
        largest_directions(change(where), 16) # once, for buffers and kernels
        began = time.perf_counter()
        found = largest_directions(change(where), 16)
        seconds = time.perf_counter() - began
        left, right = found.factors(16)
        error = float((delta - left @ right).norm() / delta.norm())
        print(f"{where:6} {seconds:6.2f} s  {delta.numel() * 8 / seconds / 1e9:5.2f} GB/s of float32 read  error {error:.4f}")
    exact = torch.linalg.svdvals(delta.to(device))
    print(f"exact                                          error {float(exact[16:].norm() / exact.norm()):.4f}")

if __name__ == "__main__": main(*sys.argv[1:])
