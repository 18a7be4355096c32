"""`requantize`: the values of one format, quantised to another; free between powers of two."""

import pytest
import torch

from octomoe import (
    FP8_BLOCK128,
    FP8_COLUMN128,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    MXFP8,
    MXFP8_2D,
    QTensor,
    ScaleLayout,
    quantize,
    requantize,
)

CASES = {
    "zero tokens": (0, 256),
    "one token": (1, 256),
    "divides nothing": (37, 131),
    "weights, divide nothing": (3, 130, 67),
    "real": (70, 256),
    "wide": pytest.param((16, 384, 512), marks=pytest.mark.full),
}
PAIRS = (
    (FP8_GROUP128, FP8_COLUMN128),
    (FP8_BLOCK128, FP8_BLOCK128.derive(rounding="pow2")),
    (FP8_TENSOR, FP8_ROW),
    (FP8_EXPERT, MXFP8),
    (MXFP8, MXFP8_2D),
    (MXFP8_2D, FP8_TENSOR),
)


def make_inputs(shape, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, torch.bfloat16)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0].name} to {p[1].name}")
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_equals_quantising_the_values(
    shape, pair, device, naive_quantize, naive_values, assert_same_bits
):
    old, new = pair
    q = quantize(make_inputs(shape, device, seed=1), old)
    expected = naive_quantize(naive_values(q).float(), new)
    assert_same_bits(requantize(q, new).to("cpu"), expected)


@pytest.mark.parametrize("new_layout", ScaleLayout)
@pytest.mark.parametrize("old_layout", ScaleLayout)
def test_layouts_change_no_bit(old_layout, new_layout, device, assert_same_bits):
    q = quantize(make_inputs((37, 131), device, seed=2), FP8_GROUP128)
    result = requantize(q.relayout(old_layout), MXFP8, layout=new_layout)
    assert_same_bits(result, requantize(q, MXFP8).relayout(new_layout))


def test_to_its_own_pow2_format_changes_no_value(device):
    # The largest element may sit below half the target, so bytes and scale can shift together.
    for format in (MXFP8, MXFP8_2D, FP8_GROUP128.derive(rounding="pow2")):
        q = quantize(make_inputs((64, 256), device, seed=3), format)
        assert torch.equal(requantize(q, format).dequantize(), q.dequantize())


def test_only_subnormals_change_between_pow2_scales(device):
    row_pow2 = FP8_ROW.derive(rounding="pow2")
    q = quantize(make_inputs((64, 256), device, seed=4), MXFP8)
    result = requantize(q, row_pow2)
    is_normal_TD = result.data.float().abs() >= 2.0**-6
    assert is_normal_TD.float().mean() > 0.9
    assert torch.equal(result.dequantize()[is_normal_TD], q.dequantize()[is_normal_TD])


Q = QTensor(torch.zeros(2, 2).to(torch.float8_e4m3fn), torch.ones(2, 1), FP8_ROW)
REFUSALS = {
    "a tensor": (
        TypeError,
        "requantize: q is a Tensor, but needs a QTensor; use octomoe.quantize",
        lambda: requantize(torch.ones(2, 2), MXFP8),
    ),
    "format's name": (
        TypeError,
        "requantize: format is a str.*Format.parse..mxfp8",
        lambda: requantize(Q, "mxfp8"),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
