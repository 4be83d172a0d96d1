"Every stored type to the bit: what torch makes of the same bytes; eight bits by blocks of uneven sizes; adapters read in pieces."
import numpy as np
import pytest
import torch

from model_glue_nb.tensors.dtypes import CODES, ITEM_BYTES, add_halves, first_bad, n_bad, narrow, open_block, widen
from model_glue_nb.tensors.float8 import FLOAT8, TABLES, Float8Blocks, block_sizes
from model_glue_nb.tensors.streams import ArrayBlocks
from model_glue_nb.zoo import adapters

TYPES = dict(BF16=torch.bfloat16, F16=torch.float16, F32=torch.float32)

def odd_values():
    "All kinds of float32: near every half-way point of bf16 and fp16, the smallest, the largest, none."
    r = np.random.default_rng(0)
    bits = r.integers(0, 2**32, 60_000, dtype=np.uint32)
    halves = (r.integers(0, 2**16, 20_000, dtype=np.uint32) << 16) + r.choice(
        np.uint32([0x7fff, 0x8000, 0x8001]), 20_000)
    fp16 = (r.integers(0, 2**16, 20_000).astype(np.uint16).view(np.float16).astype(np.float32).view(
        np.uint32)
            + r.choice(np.uint32([0xfff, 0x1000, 0x1001, 0]), 20_000))
    small = np.float32(r.normal(size=5000) * 2.0**-18).view(np.uint32)
    ends = np.float32([65504, 65519.99, 65520, 65536, 1e9, np.inf, -np.inf, np.nan, 2**-24, 2**-25, 1.5 * 2**-25, 2**-14, 0, -0.]).view(
        np.uint32)
    sneaky = np.uint32([0x7f800001, 0xff800001, 0x7f80ffff, 0x7fc00000]) # NaN whose upper half looks infinite
    return np.concatenate([bits, halves, fp16, small, ends, sneaky]).view(np.float32)

@pytest.mark.parametrize("kind", TYPES)
def test_values_are_rounded_as_torch_rounds_them(kind):
    x = odd_values()
    out = np.zeros(x.size * ITEM_BYTES[CODES[kind]], np.uint8)
    narrow(x, CODES[kind], out)
    got = torch.from_numpy(out).view(TYPES[kind])
    want = torch.from_numpy(x).to(TYPES[kind])
    assert torch.equal(got.isnan(), want.isnan())
    bits = torch.int32 if kind == "F32" else torch.int16
    fine = ~want.isnan()
    assert torch.equal(got.view(bits)[fine], want.view(bits)[fine])

@pytest.mark.parametrize("kind", TYPES)
def test_values_are_widened_as_torch_widens_them(kind):
    raw = np.arange(2**16, dtype=np.uint16) if kind != "F32" else odd_values().view(np.uint32)
    out = np.zeros(raw.size, np.float32)
    widen(raw.view(np.uint8), CODES[kind], out)
    want = torch.from_numpy(raw.view(np.int16 if kind != "F32" else np.int32)).view(TYPES[kind]).float().numpy()
    assert (np.array_equal(np.isnan(out), np.isnan(want))
            and np.array_equal(out[~np.isnan(out)].view(np.uint32),
                               want[~np.isnan(want)].view(np.uint32)))
    bad = ~np.isfinite(want)
    assert n_bad(raw.view(np.uint8), CODES[kind], raw.size) == bad.sum() > 0
    good = raw[~bad]
    assert n_bad(good.view(np.uint8), CODES[kind], good.size) == 0

def test_rows_of_unlike_types():
    x = np.float32([[1, 2, 3, 4], [5, 7, 9, 11], [-1, .5, 2, 8]])
    raw, codes = np.zeros((3, 16), np.uint8), np.array([2, 0, 1])
    for row, code, v in zip(raw, codes, x): narrow(v, int(code), row)
    for has_base in (0, 1):
        out = np.zeros((3, 3), np.float32)
        open_block(raw, codes, has_base, 1, 3, out)
        assert np.array_equal(out,
                              x[:, 1:] - has_base * np.float32([[0], [1], [1]]) * x[0, 1:])
    assert first_bad(raw, codes, 4) == -1
    for i in (2, 1, 0):
        spoilt = raw.copy()
        narrow(np.float32([1, np.inf, 0, 0]), int(codes[i]), spoilt[i])
        assert first_bad(spoilt, codes, 4) == i
    almost = raw.copy()
    almost[1, :2] = np.array([0x7c00], np.uint16).view(np.uint8) # infinite as fp16, but this row is bf16
    assert first_bad(almost, codes, 4) == -1

def test_two_rows_at_once_keep_their_coefficients():
    x, y = (np.zeros(3, np.uint16) for _ in range(2))
    narrow(np.float32([1, 2, 3]), 0,
           x.view(np.uint8)), narrow(np.float32([10, 20, 40]), 0, y.view(np.uint8))
    total = np.float32([.5, 0, 0])
    add_halves(x, 2., y, .25, total)
    assert total.tolist() == [5, 9, 16]

@pytest.mark.parametrize("kind, theirs", dict(F8_E4M3=torch.float8_e4m3fn, F8_E5M2=torch.float8_e5m2).items())
def test_eight_bits_stand_for_what_torch_says(kind, theirs):
    want = torch.arange(256, dtype=torch.uint8).view(theirs).float().numpy()
    assert np.array_equal(TABLES[kind], want, equal_nan=True)

def test_powers_of_two():
    want = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float().numpy()
    assert np.array_equal(TABLES["F8_E8M0"], want, equal_nan=True)

@pytest.mark.parametrize("shape, scale, block, sizes", [
    ((5, 9), (3, 3), (2, 3), (2, 3)),
    ((5, 9), (5, 1), (128, 128), (1, 128)),
    ((5, 9), (5,), (128, 128), (1, 128)),
    ((5, 9), (), (128, 128), (5, 9)),
    ((4, 5, 9), (4, 3, 3), (2, 3), (1, 2, 3)),
    ((4, 5, 9), (4, 5), (128, 128), (1, 1, 128)),
    ((5, 9), (2, 3), (2, 3), None),
    ((5, 9), (9, 5), (128, 128), None)])
def test_blocks_share_a_scale_and_are_read_in_pieces(shape, scale, block, sizes):
    assert block_sizes(shape, scale, block) == sizes
    if sizes is None: return
    r = np.random.default_rng(0)
    codes = r.integers(0, 120, shape).astype(np.uint8)
    scales = r.uniform(.5, 2, scale).astype(np.float32)
    wide = np.broadcast_to(scales.reshape(scale + (1,) * (len(shape) - len(scale))) if scale else scales,
                           [-(-n // s) for n, s in zip(shape, sizes)])
    for i, s in enumerate(sizes): wide = np.repeat(wide, s, i).take(range(shape[i]), i)
    want = (TABLES[FLOAT8[0]][codes] * wide).reshape(-1)
    flat = codes.reshape(-1)
    def stored(start, n, into): into[:n] = flat[start:start + n]
    blocks = Float8Blocks(stored, FLOAT8[0], shape, scales, sizes)
    for start, n in ((0, flat.size),
                     (7, 20), (9, 9), (13, 1),
                     (flat.size - 4, 4), (3, 0)):
        into = np.zeros(4 * n, np.uint8)
        blocks.read(start, n, into)
        assert np.array_equal(into.view(np.float32), want[start:start + n]), (start, n)

def test_a_weight_with_an_adapter_is_read_in_pieces():
    r = np.random.default_rng(1)
    base, up, down = (r.normal(size=s).astype(np.float32)
                      for s in ((6, 11), (6, 2), (2, 11)))
    blocks, want = adapters.LoraBlocks(ArrayBlocks(base), up, down), (base + up @ down).reshape(-1)
    for start, n in ((0, 66), (5, 13), (11, 11), (21, 2), (60, 6)):
        into = np.zeros(4 * n, np.uint8)
        blocks.read(start, n, into)
        assert np.allclose(into.view(np.float32), want[start:start + n], atol=1e-6), (start, n)

def test_adapters_scale_by_name():
    config = dict(r=8, lora_alpha=4, rank_pattern={r"layers\.1\.q_proj": 2}, alpha_pattern={"down_proj": 3, "k_proj": 6})
    assert adapters.lora_scale(config, "model.layers.0.q_proj") == (8, .5) and adapters.lora_scale(config, "model.layers.1.q_proj") == (2, 2)
    assert adapters.lora_scale(config, "model.layers.1.down_proj") == (8, 3 / 8)
    assert adapters.lora_scale(config, "model.layers.1.down_proj_too") == (8, .5), "a pattern is a whole name"
    assert adapters.lora_scale(config | dict(use_rslora=True), "layers.1.q_proj") == (2, 4 / 2**.5)
