"""A fine-tune as a LoRA adapter: our `model-glue extract` and mergekit-extract-lora, each a whole process, on the same files.

    python benchmarks/extract.py [SHAPE] [RANK] [--layers N]      135m and 16

The tune differs from its base by 24 steep directions per weight and noise. The error is ‖δ − δ′‖ / ‖δ‖ over all linear weights, found
from the written factors in float64; by parts, every weight's change is first divided by ‖W₀‖, as our ranks are given out."""
import argparse, json, subprocess, sys, tempfile
from pathlib import Path
from common import SHAPES, run, write_models

OURS = """
import sys
sys.argv[0] = "model-glue"
from model_glue_nb.cli.program import main
try: main()
finally: print("WORK 0")
"""
THEIRS = """
import sys
sys.argv[0] = "mergekit-extract-lora"
from mergekit.scripts.extract_lora import main
try: main()
finally: print("WORK 0")
"""

def tune(room, seed=0):
    "Low-rank steps on top of the second model's noise, written in place."
    import numpy as np, torch
    from safetensors.torch import load_file, save_file
    base, other = (load_file(room/n/"model.safetensors") for n in ("base", "tune"))
    draws = torch.Generator().manual_seed(seed)
    for k, w in base.items():
        if w.ndim < 2 or "proj" not in k:
            other[k] = w
            continue
        u, v = (torch.randn(n, 24, generator=draws) for n in w.shape)
        step = (u * .8 ** torch.arange(24)) @ v.T
        noise = other[k].float() - w.float()
        other[k] = (w.float() + step * .02 * w.float().norm() / step.norm() + .1 * noise).bfloat16()
    save_file(other, room/"tune/model.safetensors", dict(format="pt"))

def error(folder, room):
    "Of what an adapter holds, over the linear weights of both."
    from safetensors.torch import load_file
    base, new, found = load_file(room/"base/model.safetensors"), load_file(room/"tune/model.safetensors"), load_file(folder/"adapter_model.safetensors")
    config = json.loads((folder/"adapter_config.json").read_text())
    total = lacks = total_parts = lacks_parts = n_bytes = 0
    for k, w in base.items():
        if "proj" not in k: continue
        stem = "base_model.model." + k.removesuffix(".weight")
        delta = new[k].double() - w.double()
        said = 0
        if f"{stem}.lora_A.weight" in found:
            a, b = found[f"{stem}.lora_A.weight"], found[f"{stem}.lora_B.weight"]
            module = k.removesuffix(".weight")
            r, alpha = (next((v for p, v in (config.get(f"{key}_pattern") or {}).items() if module.endswith(p)), config[plain]) for key, plain in (("rank", "r"), ("alpha", "lora_alpha")))
            said, n_bytes = alpha / r * b.double() @ a.double(), n_bytes + sum(x.numel() * x.element_size() for x in (a, b))
        whole, left, before = (float(x.square().sum()) for x in (delta, delta - said, w.double()))
        total, lacks = total + whole, lacks + left
        total_parts, lacks_parts = total_parts + whole / before, lacks_parts + left / before
    return (lacks / total) ** .5, (lacks_parts / total_parts) ** .5, n_bytes

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="135m", choices=SHAPES)
    parser.add_argument("rank", nargs="?", default=16, type=int)
    parser.add_argument("--layers", type=int, help="fewer than the shape has: mergekit decomposes each weight in full")
    given = parser.parse_args()
    shape = SHAPES[given.shape] | (dict(layers=given.layers) if given.layers else {})
    with tempfile.TemporaryDirectory() as d:
        room = Path(d)
        write_models(room, shape, ("base", "tune"))
        tune(room)
        for name in ("base", "tune"): # what mergekit's loader wants beside the weights
            (room/name/"tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast")))
        ours = run(sys.executable, OURS, "extract", room/"tune", room/"base", room/"ours", "--rank", given.rank)
        theirs = run(sys.executable, THEIRS, "--model", room/"tune", "--base-model", room/"base", "--out-path", room/"theirs", "--max-rank", given.rank)
        for name, r in (("ours", ours), ("theirs", theirs)):
            if not (room/name/"adapter_model.safetensors").exists(): sys.exit(f"{name} wrote nothing:\n{r}")
            lacks, lacks_parts, n_bytes = error(room/name, room)
            print(f"{name:7} {r[0]:7.1f} s  peak {r[2] / 1e6:6.0f} MB  {n_bytes / 1e6:6.2f} MB of factors, error {lacks:.4f}, by parts {lacks_parts:.4f}")
        print(f"whole process: {theirs[0] / ours[0]:.1f} times as fast, memory {ours[2] / theirs[2]:.2f} of theirs")

if __name__ == "__main__": main()
