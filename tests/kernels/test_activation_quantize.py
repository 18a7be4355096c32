"""`activation_quantize` in Triton equals the reference.

Bit for bit where the activation is plain arithmetic (relu2): every format, layout, shape, limit and
NaN. But for the last bits of exp and erf elsewhere.
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
    RELU2,
    SILU,
    Activation,
    Format,
    activation_quantize,
    activation_quantize_both,
)
from octomoe.tune.configs import TileConfig

# rows, width after the gate
CASES = {
    "zero tokens": (0, 192),
    "one token": (1, 192),
    "no width": (300, 0),
    "one column": (5, 1),
    "divides nothing": (37, 131),
    "real": (20, 768),
}
EXACT = ("relu2", "relu2:ungated", "relu2:limit=1.0", "relu2:output_limit=1.0,up_offset=1.0")
ROUNDED = (
    "silu",
    "silu:ungated,alpha=1.702",
    "silu:alpha=1.702,limit=7.0,up_offset=1.0",
    "silu:output_limit=1.0",
    "gelu",
    "gelu:ungated",
    "gelu:limit=1.0",
    "gelu_tanh",
    "gelu_tanh:ungated",
    "gelu_tanh:output_limit=1.0",
)
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
    Format.parse("fp8[all,1,all]"),
    Format.parse("fp8[1,all,1]"),
    Format.parse("fp8[2,3,5]"),
)
EACH_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
# One kernel, and two passes.
PAIRS = (
    (FP8_GROUP128, FP8_COLUMN128),
    (MXFP8, Format.parse("mxfp8[1,32,1]")),
    (FP8_ROW, FP8_COLUMN128),
    (FP8_TENSOR, MXFP8_2D.derive(element=E4M3_240)),
)
EACH_PAIR = pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0].name} and {p[1].name}")
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
RELU2_GATED = Activation.parse("relu2")


def make_inputs(case, activation, device, dtype=torch.bfloat16):
    """Some beyond every limit, none where exp loses bits, or where gelu's 1 + erf cancels."""
    num_rows, width = case
    h_SN = 3 * torch.randn(num_rows, 2 * width if activation.gated else width)
    return h_SN.clamp(-1 if activation.kind.startswith("gelu") else -12, 12).to(device, dtype)


@EACH_FORMAT
@EACH_CASE
def test_plain_arithmetic_has_the_same_bits(case, format, kernel_device, assert_equals_reference):
    h_SN = make_inputs(case, RELU2_GATED, kernel_device)
    assert_equals_reference(activation_quantize, h_SN, RELU2_GATED, format)


@pytest.mark.parametrize("name", EXACT)
@EACH_CASE
def test_limits_and_gates_have_the_same_bits(case, name, kernel_device, assert_equals_reference):
    activation = Activation.parse(name)
    h_SN = make_inputs(case, activation, kernel_device)
    for format in (FP8_ROW, FP8_TENSOR, MXFP8):
        assert_equals_reference(activation_quantize, h_SN, activation, format)


@pytest.mark.parametrize("name", ROUNDED)
@EACH_CASE
def test_exp_and_erf_are_as_close_as_can_be(case, name, kernel_device, assert_equal_but_for_exp):
    activation = Activation.parse(name)
    h_SN = make_inputs(case, activation, kernel_device)
    for format in (FP8_ROW, FP8_TENSOR, FP8_GROUP128, MXFP8):
        actual = activation_quantize(h_SN, activation, format, backend="triton")
        expected = activation_quantize(h_SN, activation, format, backend="reference")
        assert_equal_but_for_exp(actual, expected)


@EACH_FORMAT
@pytest.mark.parametrize("layout", [GEMM_READY, INTERLEAVED])
def test_writes_the_layout_asked_for(layout, format, kernel_device, assert_equals_reference):
    h_SN = make_inputs(CASES["divides nothing"], RELU2_GATED, kernel_device)
    assert_equals_reference(activation_quantize, h_SN, RELU2_GATED, format, layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype(dtype, kernel_device, assert_equals_reference):
    h_SN = make_inputs(CASES["divides nothing"], RELU2_GATED, kernel_device, dtype)
    for format in (FP8_GROUP128, FP8_TENSOR, MXFP8):
        assert_equals_reference(activation_quantize, h_SN, RELU2_GATED, format)


def test_strided_inputs_are_read_through_their_strides(kernel_device, assert_equals_reference):
    h_SN = make_inputs((66, 40), RELU2_GATED, kernel_device)
    for strided in (h_SN.T, h_SN[::2, ::2], h_SN[:1].expand(5, -1)):
        for format in (FP8_ROW, FP8_TENSOR, MXFP8):
            assert_equals_reference(activation_quantize, strided, RELU2_GATED, format)


@EACH_FORMAT
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_what_is_no_number(value, format, kernel_device, assert_equals_reference):
    for name in ("relu2", "relu2:limit=2.0", "relu2:ungated"):
        activation = Activation.parse(name)
        h_SN = make_inputs(CASES["divides nothing"], activation, kernel_device)
        # In the gate, in up, and in both.
        h_SN[3, 5], h_SN[4, 5], h_SN[17, -3], h_SN[18, -3] = value, -value, value, -value
        h_SN[20, 0] = h_SN[20, h_SN.shape[1] // 2] = value
        assert_equals_reference(activation_quantize, h_SN, activation, format)


@pytest.mark.parametrize("name", [*ROUNDED, "silu:alpha=-0.5"])
@pytest.mark.parametrize("side", ["gate", "up"])
def test_far_out_and_no_numbers_are_as_in_torch(side, name, kernel_device):
    activation = Activation.parse(name)
    far = (1e38, 1e20, 1e4, 100.0, 0.0, torch.inf, torch.nan)
    h_SN = torch.tensor([*far, *(-value for value in far)], device=kernel_device)[:, None]
    if activation.gated:
        halves = (h_SN, torch.ones_like(h_SN))
        h_SN = torch.cat(halves if side == "gate" else halves[::-1], dim=1)
    # One value per scale is stored without a rounding.
    actual, expected = (
        activation_quantize(h_SN, activation, FP8_ROW, backend=backend).dequantize()
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-30, equal_nan=True)


@EACH_FORMAT
@pytest.mark.parametrize("element", ["e4m3fn", "e4m3_240"])
def test_given_scales(element, format, kernel_device, assert_equals_reference):
    if element == "e4m3_240":
        format = format.derive(element=E4M3_240)
    h_SN = make_inputs(CASES["divides nothing"], RELU2_GATED, kernel_device)
    scale = activation_quantize(h_SN, RELU2_GATED, format, backend="reference").scale
    h_SN[3, 5], h_SN[30, 100] = torch.nan, torch.inf
    one = scale.flatten()[:1]
    for given in (scale, one):
        assert_equals_reference(
            activation_quantize, h_SN, RELU2_GATED, format, scale=given, layout=GEMM_READY
        )


@pytest.mark.parametrize("config", [TileConfig(128, 128), TileConfig(32, 512, 8)])
def test_any_tile_gives_the_same_bits(config, kernel_device, assert_same_bits):
    from octomoe.kernels import activation_quantize as kernel

    h_SN = make_inputs((200, 350), RELU2, kernel_device)
    for format in (FP8_GROUP128, MXFP8, MXFP8_2D, FP8_TENSOR, FP8_ROW):
        expected = activation_quantize(h_SN, RELU2, format, backend="reference")
        actual = kernel.activation_quantize(h_SN, RELU2, format, layout=COMPACT, config=config)
        assert_same_bits(actual, expected)


@EACH_FORMAT
@EACH_CASE
def test_random_bits_are_the_reference_s(case, format, kernel_device, assert_equals_reference):
    h_SN = make_inputs(case, RELU2_GATED, kernel_device)
    assert_equals_reference(activation_quantize, h_SN, RELU2_GATED, format, seed=11)


@EACH_FORMAT
def test_random_bits_under_given_scales(format, kernel_device, assert_equals_reference):
    h_SN = make_inputs(CASES["divides nothing"], RELU2_GATED, kernel_device)
    scale = activation_quantize(h_SN, RELU2_GATED, format, backend="reference").scale.flatten()[:1]
    h_SN[3, 5], h_SN[30, 100] = torch.nan, torch.inf
    options = {"scale": scale, "seed": 12, "layout": INTERLEAVED}
    assert_equals_reference(activation_quantize, h_SN, RELU2_GATED, format, **options)


@EACH_PAIR
@EACH_CASE
def test_both_equal_the_reference(case, pair, kernel_device, assert_equals_reference):
    h_SN = make_inputs(case, RELU2_GATED, kernel_device)
    for options in ({"row_layout": GEMM_READY}, {"column_layout": INTERLEAVED, "seed": 13}):
        assert_equals_reference(activation_quantize_both, h_SN, RELU2_GATED, *pair, **options)


@EACH_PAIR
@pytest.mark.parametrize("name", EXACT)
def test_both_of_what_is_no_number(name, pair, kernel_device, assert_equals_reference):
    activation = Activation.parse(name)
    h_SN = make_inputs(CASES["divides nothing"], activation, kernel_device)
    h_SN[3, 5], h_SN[4, 5], h_SN[17, -3], h_SN[18, -3] = torch.nan, torch.inf, -torch.inf, 1e30
    assert_equals_reference(activation_quantize_both, h_SN, activation, *pair)


@pytest.mark.parametrize("config", [TileConfig(128, 128, 8), TileConfig(32, 256, 8)])
def test_any_tile_gives_the_same_bits_of_both(config, kernel_device, assert_same_bits):
    from octomoe.kernels import activation_quantize as kernel

    h_SN = make_inputs((140, 200), RELU2, kernel_device)
    seed = torch.tensor(14, device=kernel_device)
    for pair in PAIRS:
        arguments = (h_SN, RELU2, *pair)
        expected = activation_quantize_both(*arguments, seed=seed, backend="reference")
        actual = kernel.activation_quantize_both(*arguments, seed=seed, config=config)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)


def test_rows_longer_than_a_tile(kernel_device, assert_equals_reference):
    h_SN = make_inputs((2, 16500), RELU2_GATED, kernel_device)
    assert_equals_reference(activation_quantize, h_SN, RELU2_GATED, FP8_ROW)


def test_two_runs_are_identical(kernel_device, assert_same_bits):
    h_SN = make_inputs(CASES["real"], SILU, kernel_device)
    for format in (FP8_TENSOR, MXFP8):
        first, second = (
            activation_quantize(h_SN, SILU, format, backend="triton") for _ in range(2)
        )
        assert_same_bits(first, second)
