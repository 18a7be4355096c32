"""`quantize`: the op equals the definition in every layout, writes where it is told, and refuses.

The definition itself is tested in tests/reference/test_quantize.py.
"""

import pytest
import torch

from octomoe import (
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
    # Divided on the CPU: CUDA rounds a division by a Python number twice.
    assert_same_bits(given.compact_scale, (amax_Td.cpu() / 448.0).to(device))
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


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_a_seed_is_a_number_or_a_tensor(format, device, assert_same_bits):
    x_ENK = make_inputs((3, 130, 67), device, seed=10)
    q = quantize(x_ENK, format, seed=-5)
    for seed in (torch.tensor(-5, device=device), torch.full((1, 1), -5, device=device)):
        assert_same_bits(quantize(x_ENK, format, seed=seed), q)
    nearest, other = quantize(x_ENK, format), quantize(x_ENK, format, seed=2**63 - 1)
    assert_same_bits(q.scale, nearest.scale)
    for changed in (nearest, other):
        assert (q.data.float() != changed.data.float()).float().mean() > 0.05


def test_a_seed_goes_with_every_option(device, assert_same_bits):
    x_TD = make_inputs((37, 131), device, seed=11)
    q = quantize(x_TD, FP8_GROUP128, seed=6)
    assert_same_bits(quantize(x_TD, FP8_GROUP128, scale=q.scale, seed=6), q)
    gemm_ready = quantize(x_TD, FP8_GROUP128, layout=GEMM_READY, seed=6)
    assert_same_bits(gemm_ready, q.relayout(GEMM_READY))
    out = QTensor(torch.empty_like(q.data), torch.empty_like(q.scale), FP8_GROUP128)
    assert_same_bits(quantize(x_TD, FP8_GROUP128, out=out, seed=6), q)


def test_zeros_and_empty_tensors_need_no_random_bits(device, assert_same_bits):
    for shape in ((0, 256), (3, 0, 64), (5, 40)):
        zeros = torch.zeros(shape, device=device)
        assert_same_bits(quantize(zeros, MXFP8, seed=7), quantize(zeros, MXFP8))


X_TD, ONE = torch.ones(4, 8), torch.ones(1)
OUT = QTensor(torch.zeros(4, 8).to(torch.float8_e4m3fn), torch.ones(4, 1), FP8_ROW)
REFUSALS = {
    "no tensor": (
        TypeError,
        "quantize: x is a float, but needs a tensor",
        lambda: quantize(3.0, FP8_ROW),
    ),
    "int": (
        TypeError,
        "x has dtype torch.int32, but needs float32, bfloat16 or float16",
        lambda: quantize(X_TD.int(), FP8_ROW),
    ),
    "float64": (TypeError, "x has dtype torch.float64", lambda: quantize(X_TD.double(), FP8_ROW)),
    "quantised already": (
        TypeError,
        "e4m3fn.*; dequantize it first",
        lambda: quantize(OUT.data, FP8_ROW),
    ),
    "rank 1": (
        ValueError,
        r"x has shape \(8,\), but needs \[rows",
        lambda: quantize(X_TD[0], FP8_ROW),
    ),
    "rank 4": (
        ValueError,
        r"x has shape \(1, 1, 4, 8\)",
        lambda: quantize(X_TD[None, None], FP8_ROW),
    ),
    "format's name": (
        TypeError,
        "format is a str.*Format.parse..mxfp8",
        lambda: quantize(X_TD, "mxfp8"),
    ),
    "no format": (TypeError, "format is a int, but needs a Format", lambda: quantize(X_TD, 8)),
    "amax and scale": (
        ValueError,
        "amax and scale are both given, but needs at most one",
        lambda: quantize(X_TD, FP8_ROW, amax=ONE, scale=ONE),
    ),
    "amax dtype": (
        TypeError,
        "amax has dtype torch.bfloat16, but needs torch.float32",
        lambda: quantize(X_TD, FP8_ROW, amax=ONE.bfloat16()),
    ),
    "scale dtype": (
        TypeError,
        "scale has dtype torch.float32, but needs torch.float8_e8m0fnu",
        lambda: quantize(X_TD, MXFP8, scale=ONE),
    ),
    "amax shape": (
        ValueError,
        r"amax has shape \(4,\), but needs \(4, 1\) for fp8_row on shape \(4, 8\), or one element",
        lambda: quantize(X_TD, FP8_ROW, amax=torch.ones(4)),
    ),
    "scale shape": (
        ValueError,
        r"scale has shape \(1, 8\), but needs \(4, 1\)",
        lambda: quantize(X_TD, FP8_ROW, scale=torch.ones(1, 8)),
    ),
    "amax device": (
        ValueError,
        "amax is on meta, but needs the other tensors' device cpu",
        lambda: quantize(X_TD, FP8_ROW, amax=ONE.to("meta")),
    ),
    "scale device": (
        ValueError,
        "scale is on meta",
        lambda: quantize(X_TD, FP8_ROW, scale=ONE.to("meta")),
    ),
    "seed's type": (
        TypeError,
        "quantize: seed is a float, but needs an int, or an int64 tensor of one element",
        lambda: quantize(X_TD, FP8_ROW, seed=1.0),
    ),
    "seed's dtype": (
        TypeError,
        "seed has dtype torch.int32, but needs torch.int64",
        lambda: quantize(X_TD, FP8_ROW, seed=torch.tensor(1, dtype=torch.int32)),
    ),
    "seed's shape": (
        ValueError,
        r"seed has shape \(2,\), but needs one element",
        lambda: quantize(X_TD, FP8_ROW, seed=torch.tensor([1, 2])),
    ),
    "seed's device": (
        ValueError,
        "seed is on meta, but needs the other tensors' device cpu",
        lambda: quantize(X_TD, FP8_ROW, seed=torch.tensor(1, device="meta")),
    ),
    "seed's size": (
        ValueError,
        "seed is 9223372036854775808, but needs an int of 64 bits, signed",
        lambda: quantize(X_TD, FP8_ROW, seed=2**63),
    ),
    "out device": (
        ValueError,
        "out is on meta",
        lambda: quantize(X_TD, FP8_ROW, out=OUT.to("meta")),
    ),
    "out format": (
        ValueError,
        r"out is fp8_row in compact of shape \(4, 8\), but needs fp8_group128 in compact",
        lambda: quantize(X_TD, FP8_GROUP128, out=OUT),
    ),
    "out layout": (
        ValueError,
        "out is fp8_row in compact .* needs fp8_row in interleaved",
        lambda: quantize(X_TD, FP8_ROW, out=OUT, layout=INTERLEAVED),
    ),
    "out shape": (
        ValueError,
        r"out is fp8_row in compact of shape \(4, 8\), .* of shape \(3, 8\)",
        lambda: quantize(X_TD[:3], FP8_ROW, out=OUT),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
