"""`quantize_both` in Triton equals the reference bit for bit, in one kernel or two.

Two passes are taken where scale blocks do not fit into one tile, or a format has no scales.
"""

import pytest
import torch

from octomoe import (
    COMPACT,
    E4M3_240,
    FP8_BLOCK128,
    FP8_COLUMN128,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    GEMM_READY,
    INTERLEAVED,
    MXFP8,
    MXFP8_2D,
    MXFP8_E5M2,
    Format,
    quantize_both,
)
from octomoe.tune.configs import TileConfig

CASES = {
    "zero tokens": (0, 256),
    "one token": (1, 256),
    "divides nothing": (37, 131),
    "no columns": (300, 0),
    "one column": (5, 1),
    "an expert stack without rows": (3, 0, 64),
    "no experts": (0, 4, 64),
    "weights, divide nothing": (3, 130, 67),
    "real": (140, 384),
}
MX_COLUMN = Format.parse("mxfp8[1,32,1]")
IN_ONE = (
    (FP8_GROUP128, FP8_COLUMN128),
    (FP8_GROUP128.derive(rounding="pow2"), FP8_BLOCK128.derive(element=E4M3_240)),
    (MXFP8, MX_COLUMN),
    (MXFP8_E5M2, MXFP8_2D),
    # Columns first, and twice the same.
    (MX_COLUMN, FP8_GROUP128),
    (MXFP8, MXFP8),
)
IN_TWO = (
    (FP8_ROW, FP8_COLUMN128),
    (FP8_TENSOR, MXFP8),
    (MXFP8, Format.parse("fp8[1,all,1]")),
    (Format.parse("fp8[2,3,5]"), FP8_GROUP128),
)
EACH_PAIR = pytest.mark.parametrize(
    "pair", [*IN_ONE, *IN_TWO], ids=lambda pair: f"{pair[0].name} and {pair[1].name}"
)


def make_inputs(shape, device, dtype=torch.bfloat16):
    """Numbers of all magnitudes, some of them zero."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-30, 30, shape).float())
    return torch.where(torch.rand(shape) < 0.1, 0.0, x).to(device, dtype)


@EACH_PAIR
@pytest.mark.parametrize("seed", [None, 6])
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_equals_the_reference(shape, seed, pair, kernel_device, assert_equals_reference):
    assert_equals_reference(quantize_both, make_inputs(shape, kernel_device), *pair, seed=seed)


@EACH_PAIR
@pytest.mark.parametrize("layouts", [(GEMM_READY, INTERLEAVED), (COMPACT, GEMM_READY)])
def test_writes_the_layouts_asked_for(layouts, pair, kernel_device, assert_equals_reference):
    row_layout, column_layout = layouts
    x = make_inputs((2, 130, 67), kernel_device)
    options = {"row_layout": row_layout, "column_layout": column_layout}
    assert_equals_reference(quantize_both, x, *pair, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_and_stride(dtype, kernel_device, assert_equals_reference):
    x = make_inputs((130, 70), kernel_device, dtype)
    for pair in IN_ONE:
        for seed in (None, 7):
            assert_equals_reference(quantize_both, x, *pair, seed=seed)
            assert_equals_reference(quantize_both, x.T, *pair, seed=seed)


@EACH_PAIR
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_what_is_no_number(value, pair, kernel_device, assert_equals_reference):
    x = make_inputs((2, 130, 67), kernel_device)
    x[0, 3, 5] = value
    for seed in (None, 8):
        assert_equals_reference(quantize_both, x, *pair, seed=seed)


@pytest.mark.parametrize("config", [TileConfig(128, 128, 8), TileConfig(32, 256)])
def test_any_tile_gives_the_same_bits(config, kernel_device, assert_same_bits):
    from octomoe.kernels import quantize_both as kernel

    x = make_inputs((140, 200), kernel_device)
    for seed in (None, torch.tensor(9, device=kernel_device)):
        for pair in (*IN_ONE, *IN_TWO):
            expected = quantize_both(x, *pair, seed=seed, backend="reference")
            actual = kernel.quantize_both(x, *pair, seed=seed, config=config)
            for a, e in zip(actual, expected, strict=True):
                assert_same_bits(a, e)


@pytest.mark.parametrize("pair", IN_ONE, ids=lambda pair: f"{pair[0].name} and {pair[1].name}")
def test_one_kernel_reads_the_input(pair, kernel_device, monkeypatch):
    from octomoe.kernels import quantize_both as kernel

    passes = []
    monkeypatch.setattr(kernel, "quantize", lambda *args, **options: passes.append(args))
    for shape in ((37, 131), (3, 130, 67)):
        kernel.quantize_both(make_inputs(shape, kernel_device), *pair)
    assert not passes
