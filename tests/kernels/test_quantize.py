"""`quantize` in Triton equals the reference bit for bit: every format, layout, shape and NaN."""

import pytest
import torch

from octomoe import (
    COMPACT,
    E4M3_240,
    E4M3FN,
    E5M2,
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
    Format,
    quantize,
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
    "real": (70, 384),
    "real weights": (2, 192, 256),
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
    Format.parse("mxfp8[1,32,1]"),
    Format.parse("fp8[all,1,all]"),
    Format.parse("fp8[1,all,1]"),
    Format.parse("fp8[2,3,5]"),
)
EACH_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def make_inputs(shape, device, dtype=torch.bfloat16):
    """Numbers of all magnitudes, some of them zero."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-30, 30, shape).float())
    return torch.where(torch.rand(shape) < 0.1, 0.0, x).to(device, dtype)


@EACH_FORMAT
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_equals_the_reference(shape, format, kernel_device, assert_equals_reference):
    assert_equals_reference(quantize, make_inputs(shape, kernel_device), format)


@EACH_FORMAT
@pytest.mark.parametrize("layout", [GEMM_READY, INTERLEAVED])
@pytest.mark.parametrize("shape", [(0, 256), (37, 131), (3, 130, 67)])
def test_writes_the_layout_asked_for(shape, layout, format, kernel_device, assert_equals_reference):
    assert_equals_reference(quantize, make_inputs(shape, kernel_device), format, layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype(dtype, kernel_device, assert_equals_reference):
    for format in (FP8_GROUP128, FP8_TENSOR, MXFP8):
        assert_equals_reference(quantize, make_inputs((9, 300), kernel_device, dtype), format)


def test_a_transposed_input_is_read_through_its_strides(kernel_device, assert_equals_reference):
    for format in (FP8_ROW, FP8_TENSOR, MXFP8):
        assert_equals_reference(quantize, make_inputs((131, 37), kernel_device).T, format)


@EACH_FORMAT
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number(value, format, kernel_device, assert_equals_reference):
    x = make_inputs((2, 130, 67), kernel_device)
    x[0, 3, 5] = value
    assert_equals_reference(quantize, x, format)


@EACH_FORMAT
@pytest.mark.parametrize("element", ["e4m3fn", "e4m3_240"])
def test_given_magnitudes_and_scales(element, format, kernel_device, assert_equals_reference):
    if element == "e4m3_240":
        format = format.derive(element=E4M3_240)
    x = make_inputs((2, 130, 67), kernel_device)
    x[0, 3, 5], x[1, 2, 1] = torch.nan, torch.inf
    shape = format.scale_shape(tuple(x.shape))
    amax = torch.rand(shape, device=kernel_device) * 100
    scale = quantize(x.nan_to_num(1.0, 1.0, 1.0), format, backend="reference").scale
    assert_equals_reference(quantize, x, format, amax=amax)
    assert_equals_reference(quantize, x, format, amax=torch.full((1,), 3.0, device=kernel_device))
    assert_equals_reference(quantize, x, format, scale=scale, layout=GEMM_READY)


def test_magnitudes_at_the_ends_of_float32(kernel_device, assert_equals_reference):
    bits = torch.tensor([0, 1, 0x7FFFFF, 0x800000, 0x800001, 0x7F7FFFFF, 0x7F000000])
    x = bits.int().view(torch.float32).repeat_interleave(32)[None].to(kernel_device)
    for format in (
        MXFP8,
        MXFP8_E5M2,
        Format.parse("fp8[1,1,32]-pow2"),
        # Its largest scale is 2^127, whose reciprocal is subnormal.
        MXFP8.derive(target_max=2.0),
        Format.parse("fp8[1,1,32]"),
    ):
        assert_equals_reference(quantize, x, format)
        assert_equals_reference(quantize, -x, format)


@EACH_FORMAT
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_random_bits_are_the_reference_s(shape, format, kernel_device, assert_equals_reference):
    assert_equals_reference(quantize, make_inputs(shape, kernel_device), format, seed=-(2**40) - 7)


@EACH_FORMAT
@pytest.mark.parametrize("layout", [GEMM_READY, INTERLEAVED])
def test_random_bits_in_any_layout(layout, format, kernel_device, assert_equals_reference):
    x = make_inputs((3, 130, 67), kernel_device)
    assert_equals_reference(quantize, x, format, layout=layout, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_bits_of_every_float_dtype(dtype, kernel_device, assert_equals_reference):
    x = make_inputs((300, 9), kernel_device, dtype)
    for format in FORMATS:
        assert_equals_reference(quantize, x, format, seed=2)
        assert_equals_reference(quantize, x.T, format, seed=2)


@EACH_FORMAT
@pytest.mark.parametrize("element", ["e4m3fn", pytest.param("e4m3_240", marks=pytest.mark.full)])
def test_random_bits_of_what_is_no_number(element, format, kernel_device, assert_equals_reference):
    if element == "e4m3_240":
        format = format.derive(element=E4M3_240)
    x = make_inputs((2, 130, 67), kernel_device)
    x[0, 3, 5], x[1, 2, 1], x[1, 129, 66] = -torch.nan, torch.inf, torch.nan
    assert_equals_reference(quantize, x, format, seed=3)
    for value in (1e-6, 3.0):
        amax = torch.full((1,), value, device=kernel_device)
        assert_equals_reference(quantize, x, format, amax=amax, seed=3)


def test_random_bits_of_all_magnitudes(kernel_device, assert_equals_reference):
    x = torch.randint(0, 0x7F800000, (64, 256), dtype=torch.int32).view(torch.float32)
    x = torch.where(torch.rand(x.shape) < 0.5, x, -x).to(kernel_device)
    for element in (E4M3FN, E5M2, E4M3_240):
        for scale in (1.0, 2.0**-100, 2.0**120):
            format = FP8_TENSOR.derive(element=element)
            given = torch.full((1, 1), scale, device=kernel_device)
            assert_equals_reference(quantize, x, format, scale=given, seed=4)
        assert_equals_reference(quantize, x, MXFP8.derive(element=element), seed=4)
        assert_equals_reference(quantize, x, FP8_GROUP128.derive(element=element), seed=4)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(
    "config", [TileConfig(128, 128), TileConfig(32, 512, 8), TileConfig(256, 2), TileConfig(128, 4)]
)
def test_any_tile_gives_the_same_bits(config, seed, kernel_device, assert_same_bits):
    from octomoe.kernels import quantize as kernel

    num_columns = 700 if config.columns > 4 else 9
    x = make_inputs((200, num_columns), kernel_device)
    seed = None if seed is None else torch.tensor(seed, device=kernel_device)
    for format in (FP8_GROUP128, FP8_COLUMN128, MXFP8, MXFP8_2D, FP8_TENSOR, FP8_ROW):
        expected = quantize(x, format, seed=seed, backend="reference")
        actual = kernel.quantize(x, format, layout=COMPACT, seed=seed, config=config)
        assert_same_bits(actual, expected)
