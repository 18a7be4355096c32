"""`quantize_both` is `quantize` twice, bit for bit; and refuses what it refuses."""

import pytest
import torch

from octomoe import (
    COMPACT,
    FP8_BLOCK128,
    FP8_COLUMN128,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    GEMM_READY,
    INTERLEAVED,
    MXFP8,
    MXFP8_2D,
    Format,
    quantize,
    quantize_both,
)

CASES = {
    "zero tokens": (0, 256),
    "one token": (1, 256),
    "divides nothing": (37, 131),
    "no columns": (3, 0),
    "an expert stack without rows": (3, 0, 64),
    "weights, divide nothing": (3, 130, 67),
    "real": (140, 256),
}
PAIRS = (
    (FP8_GROUP128, FP8_COLUMN128),
    (MXFP8, Format.parse("mxfp8[1,32,1]")),
    (FP8_ROW, FP8_TENSOR),
    (FP8_BLOCK128, MXFP8_2D),
)
EACH_PAIR = pytest.mark.parametrize(
    "pair", PAIRS, ids=lambda pair: f"{pair[0].name} and {pair[1].name}"
)


def make_inputs(shape, device, seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


@EACH_PAIR
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_is_quantize_twice(shape, seed, pair, device, assert_same_bits):
    x = make_inputs(shape, device, seed=1)
    for format, q in zip(pair, quantize_both(x, *pair, seed=seed), strict=True):
        assert_same_bits(q, quantize(x, format, seed=seed))


@EACH_PAIR
@pytest.mark.parametrize("layouts", [(COMPACT, GEMM_READY), (INTERLEAVED, COMPACT)])
def test_each_has_its_layout(layouts, pair, device, assert_same_bits):
    x = make_inputs((3, 130, 67), device, seed=2)
    both = quantize_both(x, *pair, row_layout=layouts[0], column_layout=layouts[1])
    for format, layout, q in zip(pair, layouts, both, strict=True):
        assert_same_bits(q, quantize(x, format, layout=layout))


def test_a_transposed_input_is_read_through_its_strides(device, assert_same_bits):
    x_TD = make_inputs((131, 37), device, seed=3, dtype=torch.float32).T
    for format, q in zip(PAIRS[0], quantize_both(x_TD, *PAIRS[0]), strict=True):
        assert_same_bits(q, quantize(x_TD.contiguous(), format))


X_TD = torch.ones(4, 8)
OP = quantize_both
REFUSALS = {
    "no tensor": (
        TypeError,
        "quantize_both: x is a float, but needs a tensor",
        lambda: OP(3.0, FP8_ROW, MXFP8),
    ),
    "float64": (
        TypeError,
        "x has dtype torch.float64",
        lambda: OP(X_TD.double(), FP8_ROW, MXFP8),
    ),
    "rank": (
        ValueError,
        r"x has shape \(8,\), but needs \[rows",
        lambda: OP(X_TD[0], FP8_ROW, MXFP8),
    ),
    "row format's name": (
        TypeError,
        "row_format is a str.*Format.parse..mxfp8",
        lambda: OP(X_TD, "mxfp8", MXFP8),
    ),
    "no column format": (
        TypeError,
        "column_format is a NoneType, but needs a Format",
        lambda: OP(X_TD, MXFP8, None),
    ),
    "seed": (
        TypeError,
        "quantize_both: seed has dtype torch.float32, but needs torch.int64",
        lambda: OP(X_TD, FP8_ROW, MXFP8, seed=torch.ones(1)),
    ),
    "backend": (
        ValueError,
        "quantize_both: backend is 'cuda', but needs one of",
        lambda: OP(X_TD, FP8_ROW, MXFP8, backend="cuda"),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
