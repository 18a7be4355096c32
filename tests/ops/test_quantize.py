"""`quantize`: the op equals the definition in every layout, writes where it is told, and refuses.

The definition itself is tested in tests/reference/test_quantize.py.
"""

import pytest
import torch

from octomoe import (
    COMPACT,
    E4M3_240,
    FP8_BLOCK128,
    FP8_COLUMN128,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    GEMM_READY,
    INTERLEAVED,
    MXFP8,
    MXFP8_2D,
    MXFP8_E5M2,
    QTensor,
    ScaleLayout,
    quantize,
)
from octomoe.core.layouts import unpack

CASES = {
    "zero tokens": (0, 256),
    "one token": (1, 256),
    "divides nothing": (37, 131),
    "an expert stack without rows": (3, 0, 64),
    "weights, divide nothing": (3, 130, 67),
    "real": (70, 256),
    "real weights": (2, 192, 256),
    "wide": pytest.param((16, 384, 512), marks=pytest.mark.full),
}
FORMATS = (
    FP8_TENSOR,
    FP8_EXPERT,
    FP8_ROW,
    FP8_GROUP128,
    FP8_GROUP128.derive(rounding="pow2"),
    FP8_BLOCK128,
    FP8_BLOCK128.derive(element=E4M3_240, rounding="pow2"),
    FP8_COLUMN128,
    MXFP8,
    MXFP8_E5M2,
    MXFP8_2D,
)


def make_inputs(shape, device, seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_equals_a_naive_loop(shape, format, device, naive_quantize, assert_same_bits):
    x = make_inputs(shape, device, seed=1)
    q = quantize(x, format)
    assert q.device == x.device
    assert_same_bits(q.to("cpu"), naive_quantize(x, format))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype(dtype, device, naive_quantize, assert_same_bits):
    x_TD = make_inputs((5, 300), device, seed=2, dtype=dtype)
    assert_same_bits(quantize(x_TD, FP8_GROUP128).to("cpu"), naive_quantize(x_TD, FP8_GROUP128))


def test_a_transposed_input_is_read_through_its_strides(device, naive_quantize, assert_same_bits):
    x_TD = make_inputs((131, 37), device, seed=3).T
    assert_same_bits(quantize(x_TD, MXFP8).to("cpu"), naive_quantize(x_TD, MXFP8))


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(0, 256), (37, 131), (3, 130, 67)])
def test_layout_moves_scales_and_nothing_else(shape, format, layout, device, assert_same_bits):
    x = make_inputs(shape, device, seed=4)
    q, compact = quantize(x, format, layout=layout), quantize(x, format)
    assert q.layout == layout
    assert_same_bits(q.data, compact.data)
    assert_same_bits(unpack(q.scale, layout, tuple(compact.scale.shape)), compact.scale)
    assert_same_bits(q, compact.relayout(layout))


@pytest.mark.parametrize("layout", ScaleLayout)
def test_out_is_written_in_place(layout, device, assert_same_bits):
    x_TD = make_inputs((37, 131), device, seed=5)
    fresh = quantize(x_TD, MXFP8, layout=layout)
    out = QTensor(torch.empty_like(fresh.data), torch.empty_like(fresh.scale), MXFP8, layout)
    pointers = out.data.data_ptr(), out.scale.data_ptr()
    result = quantize(x_TD, MXFP8, layout=layout, out=out)
    assert result is out
    assert (out.data.data_ptr(), out.scale.data_ptr()) == pointers
    assert_same_bits(out, fresh)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)])
def test_one_given_element_serves_every_block(shape, device, naive_quantize, assert_same_bits):
    x_ENK = make_inputs((2, 37, 131), device, seed=6)
    expected = naive_quantize(x_ENK, FP8_GROUP128, scale=0.5)
    amax, scale = (torch.full(shape, v, device=device) for v in (224.0, 0.5))
    assert_same_bits(quantize(x_ENK, FP8_GROUP128, amax=amax).to("cpu"), expected)
    assert_same_bits(quantize(x_ENK, FP8_GROUP128, scale=scale).to("cpu"), expected)


def test_given_scale_of_every_block(device, assert_same_bits):
    x_TD = make_inputs((37, 131), device, seed=7)
    q = quantize(x_TD, FP8_GROUP128)
    amax_Td = torch.tensor([[1.0], [3.0]], device=device).repeat(19, 2)[:37]
    given = quantize(x_TD, FP8_GROUP128, amax=amax_Td, layout=GEMM_READY)
    assert_same_bits(given.compact_scale, amax_Td / 448.0)
    assert_same_bits(quantize(x_TD, FP8_GROUP128, scale=q.scale), q)


def test_wrong_scale_is_noticed(device, naive_values, sqnr_db):
    x_TD = make_inputs((64, 256), device, seed=8)
    q = quantize(x_TD, FP8_GROUP128)
    scale_Td = q.scale.clone()
    scale_Td[3, 1] *= 1.25
    wrong = QTensor(q.data, scale_Td, q.format)
    assert sqnr_db(x_TD, naive_values(q)) > 30
    assert sqnr_db(x_TD, naive_values(wrong)) < sqnr_db(x_TD, naive_values(q)) - 1


def test_two_runs_are_identical(device, assert_same_bits):
    x_ENK = make_inputs((3, 130, 67), device, seed=9)
    for format in FORMATS:
        assert_same_bits(quantize(x_ENK, format), quantize(x_ENK, format))


X_TD = torch.ones(4, 8)
OUT = QTensor(torch.zeros(4, 8).to(torch.float8_e4m3fn), torch.ones(4, 1), FP8_ROW)
REFUSALS = {
    "no tensor": ((3.0, FP8_ROW), {}, TypeError, "quantize: x is a float, but needs a tensor"),
    "dtype": ((X_TD.int(), FP8_ROW), {}, TypeError, "x has dtype torch.int32, but needs float32"),
    "quantised already": ((OUT.data, FP8_ROW), {}, TypeError, "e4m3fn.*dequantize it first"),
    "float64": ((X_TD.double(), FP8_ROW), {}, TypeError, "x has dtype torch.float64"),
    "rank 1": ((X_TD[0], FP8_ROW), {}, ValueError, r"x has shape \(8,\), but needs \[rows, col"),
    "rank 4": ((X_TD[None, None], FP8_ROW), {}, ValueError, r"x has shape \(1, 1, 4, 8\)"),
    "format's name": ((X_TD, "mxfp8"), {}, TypeError, "format is a str.*Format.parse..mxfp8"),
    "no format": ((X_TD, 8), {}, TypeError, "format is a int, but needs a Format"),
    "amax and scale": (
        (X_TD, FP8_ROW),
        {"amax": torch.ones(1), "scale": torch.ones(1)},
        ValueError,
        "amax and scale are both given, but needs at most one",
    ),
    "amax dtype": (
        (X_TD, FP8_ROW),
        {"amax": torch.ones(4, 1).bfloat16()},
        TypeError,
        "amax has dtype torch.bfloat16, but needs torch.float32",
    ),
    "scale dtype": (
        (X_TD, MXFP8),
        {"scale": torch.ones(4, 1)},
        TypeError,
        "scale has dtype torch.float32, but needs torch.float8_e8m0fnu",
    ),
    "amax shape": (
        (X_TD, FP8_ROW),
        {"amax": torch.ones(4)},
        ValueError,
        r"amax has shape \(4,\), but needs \(4, 1\) for fp8_row on x \(4, 8\), or one element",
    ),
    "scale shape": (
        (X_TD, FP8_ROW),
        {"scale": torch.ones(1, 8)},
        ValueError,
        r"scale has shape \(1, 8\), but needs \(4, 1\)",
    ),
    "amax device": (
        (X_TD, FP8_ROW),
        {"amax": torch.ones(1, device="meta")},
        ValueError,
        "amax is on meta, but needs the other tensors' device cpu",
    ),
    "scale device": (
        (X_TD, FP8_ROW),
        {"scale": torch.ones(1, device="meta")},
        ValueError,
        "scale is on meta",
    ),
    "out device": ((X_TD, FP8_ROW), {"out": OUT.to("meta")}, ValueError, "out is on meta"),
    "out format": (
        (X_TD, FP8_GROUP128),
        {"out": OUT},
        ValueError,
        r"out is fp8_row in compact of shape \(4, 8\), but needs fp8_group128 in compact",
    ),
    "out layout": (
        (X_TD, FP8_ROW),
        {"out": OUT, "layout": INTERLEAVED},
        ValueError,
        "out is fp8_row in compact .* needs fp8_row in interleaved",
    ),
    "out shape": (
        (X_TD[:3], FP8_ROW),
        {"out": OUT, "layout": COMPACT},
        ValueError,
        r"out is fp8_row in compact of shape \(4, 8\), .* of shape \(3, 8\)",
    ),
}


@pytest.mark.parametrize(("args", "options", "error", "match"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(args, options, error, match):
    with pytest.raises(error, match=match):
        quantize(*args, **options)
