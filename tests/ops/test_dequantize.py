"""`dequantize`: ``data * scale`` in float32, rounded once, whatever the layout."""

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
    MXFP8_E5M2,
    QTensor,
    ScaleLayout,
    dequantize,
)

CASES = {
    "zero tokens": (0, 256),
    "one token": (1, 256),
    "divides nothing": (37, 131),
    "an expert stack without rows": (3, 0, 64),
    "weights, divide nothing": (3, 130, 67),
    "real": (70, 256),
    "wide": pytest.param((16, 384, 512), marks=pytest.mark.full),
}
FORMATS = (
    FP8_TENSOR,
    FP8_EXPERT,
    FP8_ROW,
    FP8_GROUP128,
    FP8_BLOCK128,
    FP8_COLUMN128,
    MXFP8,
    MXFP8_E5M2,
    MXFP8_2D,
)


def make_inputs(shape, format, device, seed):
    """Random bytes that are numbers, under random scales: no quantiser is involved."""
    generator = torch.Generator().manual_seed(seed)
    limit = 0x7B if format.element.dtype == torch.float8_e5m2 else 0x7E
    magnitude = torch.randint(limit + 1, shape, generator=generator)
    sign = torch.randint(2, shape, generator=generator) * 0x80
    data = (magnitude + sign).to(torch.uint8).view(format.element.dtype)
    scale_shape = format.scale_shape(shape)
    if format.scale_dtype == torch.float8_e8m0fnu:
        # From 2^-127, a subnormal float32, to 2^30.
        exponents = torch.randint(158, scale_shape, generator=generator)
        scale = exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        scale = torch.rand(scale_shape, generator=generator) + 2.0**-20
    return QTensor(data.to(device), scale.to(device), format)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_equals_a_naive_loop(shape, format, device, naive_values, assert_same_bits):
    q = make_inputs(shape, format, device, seed=1)
    # A product of 4 and 24 bits is exact in float64, so this rounds once, as float32 does.
    assert_same_bits(dequantize(q).cpu(), naive_values(q).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once_to_the_dtype_wanted(dtype, device, naive_values, assert_same_bits):
    q = make_inputs((37, 131), FP8_GROUP128, device, seed=2)
    assert_same_bits(dequantize(q, dtype=dtype).cpu(), naive_values(q).float().to(dtype))


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_layout_does_not_matter(format, layout, device, assert_same_bits):
    q = make_inputs((3, 130, 67), format, device, seed=3)
    assert_same_bits(dequantize(q.relayout(layout)), dequantize(q))


def test_nan_in_data_stays_and_in_scale_spreads(device):
    q = make_inputs((4, 256), FP8_GROUP128, device, seed=4)
    data_TD, scale_Td = q.data.clone(), q.scale.clone()
    data_TD.view(torch.uint8)[0, 3] = 0x7F
    scale_Td[2, 1] = torch.nan
    is_nan_TD = dequantize(QTensor(data_TD, scale_Td, FP8_GROUP128)).isnan()
    expected_TD = torch.zeros_like(is_nan_TD)
    expected_TD[0, 3] = True
    expected_TD[2, 128:] = True
    assert torch.equal(is_nan_TD, expected_TD)


def test_e8m0_byte_255_reads_as_nan(device):
    data_TD = torch.zeros(1, 64, device=device).to(torch.float8_e4m3fn)
    scale_Td = torch.tensor([[0xFF, 0]], dtype=torch.uint8, device=device)
    values_TD = dequantize(QTensor(data_TD, scale_Td.view(torch.float8_e8m0fnu), MXFP8))
    assert values_TD[0, :32].isnan().all()
    assert (values_TD[0, 32:] == 0).all()


Q = QTensor(torch.zeros(2, 2).to(torch.float8_e4m3fn), torch.ones(2, 1), FP8_ROW)
REFUSALS = {
    "a tensor": (
        TypeError,
        "dequantize: q is a Tensor, but needs a QTensor",
        lambda: dequantize(Q.data),
    ),
    "an int dtype": (
        TypeError,
        "dtype is torch.int32, but needs a floating-point dtype",
        lambda: dequantize(Q, dtype=torch.int32),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
