"""`activation_bwd` in Triton equals the reference.

Bit for bit where the derivative is plain arithmetic (relu2): every format, layout, shape, limit and
NaN. But for the last bits of exp and erf elsewhere.
"""

import pytest
import torch

from octomoe import (
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
    RELU2,
    Activation,
    Format,
    activation_bwd,
    activation_bwd_both,
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
    FP8_ROW,
    FP8_GROUP128,
    FP8_GROUP128.derive(rounding="pow2"),
    FP8_BLOCK128,
    FP8_COLUMN128,
    FP8_ROW.derive(element=E4M3_240),
    FP8_TENSOR.derive(element=E4M3_240, rounding="pow2"),
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
    """Gradients, and h: some beyond every limit and some on it."""
    num_rows, width = case
    h_SN = 3 * torch.randn(num_rows, 2 * width if activation.gated else width)
    for i, value in enumerate((1.0, -1.0, 7.0, 0.0)):
        h_SN[i::11, i::7] = value
    return torch.randn(case).to(device, dtype), h_SN.clamp(-12, 12).to(device, dtype)


@EACH_FORMAT
@EACH_CASE
def test_plain_arithmetic_has_the_same_bits(case, format, kernel_device, assert_equals_reference):
    dy_SF, h_SN = make_inputs(case, RELU2_GATED, kernel_device)
    assert_equals_reference(activation_bwd, dy_SF, h_SN, RELU2_GATED, format=format)


@pytest.mark.parametrize("name", EXACT)
@EACH_CASE
def test_limits_and_gates_have_the_same_bits(case, name, kernel_device, assert_equals_reference):
    activation = Activation.parse(name)
    dy_SF, h_SN = make_inputs(case, activation, kernel_device)
    for format in (None, FP8_ROW, FP8_TENSOR, MXFP8):
        assert_equals_reference(activation_bwd, dy_SF, h_SN, activation, format=format)


@pytest.mark.parametrize("name", ROUNDED)
@EACH_CASE
def test_exp_and_erf_are_as_close_as_can_be(case, name, kernel_device, assert_equal_but_for_exp):
    activation = Activation.parse(name)
    dy_SF, h_SN = make_inputs(case, activation, kernel_device)
    for options in ({"out_dtype": torch.float32}, {}):
        actual = activation_bwd(dy_SF, h_SN, activation, **options, backend="triton")
        expected = activation_bwd(dy_SF, h_SN, activation, **options, backend="reference")
        assert_equal_but_for_exp(actual, expected)


@pytest.mark.parametrize("name", ROUNDED)
def test_quantised_gradients_of_exp_and_erf(name, kernel_device, assert_equal_but_for_exp):
    activation = Activation.parse(name)
    # Up differs from its limits: a gradient of zero beyond them would show.
    dy_SF, h_SN = make_inputs((40, 384), activation, kernel_device)
    for format in (FP8_ROW, FP8_GROUP128, MXFP8):
        actual = activation_bwd(dy_SF, h_SN, activation, format=format, backend="triton")
        expected = activation_bwd(dy_SF, h_SN, activation, format=format, backend="reference")
        assert_equal_but_for_exp(actual, expected)


@EACH_FORMAT
@pytest.mark.parametrize("layout", [GEMM_READY, INTERLEAVED])
def test_writes_the_layout_asked_for(layout, format, kernel_device, assert_equals_reference):
    # Blocks of 128 reach over the middle, and lie on either side of it.
    for case in ((37, 131), (37, 256)):
        dy_SF, h_SN = make_inputs(case, RELU2_GATED, kernel_device)
        assert_equals_reference(
            activation_bwd, dy_SF, h_SN, RELU2_GATED, format=format, layout=layout
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype(dtype, kernel_device, assert_equals_reference):
    for other in (torch.float32, torch.bfloat16, torch.float16):
        dy_SF, h_SN = make_inputs(CASES["divides nothing"], RELU2_GATED, kernel_device, dtype)
        options = {"activation": RELU2_GATED}
        assert_equals_reference(activation_bwd, dy_SF.to(other), h_SN, **options)
        assert_equals_reference(activation_bwd, dy_SF, h_SN, **options, out_dtype=other)


def test_strided_inputs_are_read_through_their_strides(kernel_device, assert_equals_reference):
    dy_SF, h_SN = make_inputs((66, 33), RELU2_GATED, kernel_device)
    strided = (
        (dy_SF[:, :20].T.contiguous().T, h_SN[:, :40].T.contiguous().T),
        (dy_SF[::2, ::3], h_SN[::2, ::3]),
        (dy_SF[:1].expand(5, -1), h_SN[:1].expand(5, -1)),
    )
    for dy, h in strided:
        for format in (None, FP8_ROW, FP8_TENSOR, MXFP8):
            assert_equals_reference(activation_bwd, dy, h, RELU2_GATED, format=format)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_what_is_no_number(value, name, kernel_device, assert_equals_reference):
    activation = Activation.parse(name)
    dy_SF, h_SN = make_inputs(CASES["divides nothing"], activation, kernel_device)
    # In the gate, in up, in the gradient, and in all.
    h_SN[3, 5], h_SN[4, 5], h_SN[7, -3], h_SN[8, -3] = value, -value, value, -value
    dy_SF[9, 2], dy_SF[10, 2] = value, -value
    h_SN[20, 0] = h_SN[20, h_SN.shape[1] // 2] = dy_SF[20, 0] = value
    for format in (None, FP8_ROW, MXFP8, FP8_TENSOR.derive(element=E4M3_240)):
        assert_equals_reference(activation_bwd, dy_SF, h_SN, activation, format=format)


@pytest.mark.parametrize("name", [*ROUNDED, "silu:alpha=-0.5"])
@pytest.mark.parametrize("side", ["gate", "up"])
def test_far_out_and_no_numbers_are_as_in_torch(side, name, kernel_device):
    activation = Activation.parse(name)
    far = (1e38, 1e15, 1e4, 100.0, 0.0, torch.inf, torch.nan)
    h_SN = torch.tensor([*far, *(-value for value in far)], device=kernel_device)[:, None]
    dy_SF = torch.ones_like(h_SN)
    if activation.gated:
        halves = (h_SN, torch.ones_like(h_SN))
        h_SN = torch.cat(halves if side == "gate" else halves[::-1], dim=1)
    actual = activation_bwd(dy_SF, h_SN, activation, backend="triton")
    expected = activation_bwd(dy_SF, h_SN, activation, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("config", [TileConfig(128, 128), TileConfig(32, 512, 8)])
def test_any_tile_gives_the_same_bits(config, kernel_device, assert_same_bits):
    from octomoe.kernels import activation_bwd as kernel

    dy_SF, h_SN = make_inputs((200, 350), RELU2, kernel_device)
    for format in (None, FP8_GROUP128, MXFP8, MXFP8_2D, FP8_TENSOR, FP8_ROW):
        expected = activation_bwd(dy_SF, h_SN, RELU2, format=format, backend="reference")
        actual = kernel.activation_bwd(dy_SF, h_SN, RELU2, format=format, config=config)
        assert_same_bits(actual, expected)


@EACH_FORMAT
@EACH_CASE
def test_random_bits_are_the_reference_s(case, format, kernel_device, assert_equals_reference):
    # Groups of random numbers reach from the gate's columns into up's where 4 divides no width.
    dy_SF, h_SN = make_inputs(case, RELU2_GATED, kernel_device)
    assert_equals_reference(activation_bwd, dy_SF, h_SN, RELU2_GATED, format=format, seed=21)


@EACH_PAIR
@EACH_CASE
def test_both_equal_the_reference(case, pair, kernel_device, assert_equals_reference):
    dy_SF, h_SN = make_inputs(case, RELU2_GATED, kernel_device)
    arguments = (dy_SF, h_SN, RELU2_GATED, *pair)
    for options in ({"row_layout": GEMM_READY}, {"column_layout": INTERLEAVED, "seed": 22}):
        assert_equals_reference(activation_bwd_both, *arguments, **options)


@EACH_PAIR
@pytest.mark.parametrize("name", EXACT)
def test_both_of_what_is_no_number(name, pair, kernel_device, assert_equals_reference):
    activation = Activation.parse(name)
    dy_SF, h_SN = make_inputs((37, 256), activation, kernel_device)
    h_SN[3, 5], h_SN[4, 5], h_SN[7, -3], dy_SF[9, 2] = torch.nan, torch.inf, 1e30, -torch.inf
    assert_equals_reference(activation_bwd_both, dy_SF, h_SN, activation, *pair)


@pytest.mark.parametrize("name", ["relu2", "relu2:ungated"])
@pytest.mark.parametrize("config", [TileConfig(128, 128, 8), TileConfig(32, 256, 8)])
def test_any_tile_gives_the_same_bits_of_both(config, name, kernel_device, assert_same_bits):
    from octomoe.kernels import activation_bwd as kernel

    activation = Activation.parse(name)
    dy_SF, h_SN = make_inputs((130, 144), activation, kernel_device)
    for seed in (None, torch.tensor(23, device=kernel_device)):
        for pair in PAIRS:
            arguments = (dy_SF, h_SN, activation, *pair)
            expected = activation_bwd_both(*arguments, seed=seed, backend="reference")
            actual = kernel.activation_bwd_both(*arguments, seed=seed, config=config)
            for a, e in zip(actual, expected, strict=True):
                assert_same_bits(a, e)


def test_rows_longer_than_a_tile(kernel_device, assert_equals_reference):
    dy_SF, h_SN = make_inputs((2, 16500), RELU2_GATED, kernel_device)
    assert_equals_reference(activation_bwd, dy_SF, h_SN, RELU2_GATED, format=FP8_ROW)
