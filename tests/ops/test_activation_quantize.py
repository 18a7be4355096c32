"""`activation_quantize`: the activation in float32 and one rounding to 8 bits, nothing between.

Claimed: every stored number is the textbook value to half a step; scales are those of `quantize`.
"""

import pytest
import torch

from octomoe import (
    FP8_BLOCK128,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    GELU,
    GELU_TANH,
    GEMM_READY,
    INTERLEAVED,
    MXFP8,
    RELU2,
    SILU,
    SWIGLU_OAI,
    Activation,
    ScaleLayout,
    activation_quantize,
    activation_quantize_both,
    quantize,
)
from octomoe.reference import activate

# rows, width after the gate
CASES = {
    "zero tokens": (0, 192),
    "one token": (1, 192),
    "no width": (3, 0),
    "divides nothing": (37, 67),
    "real": (210, 192),
    "wide": pytest.param((2000, 1024), marks=pytest.mark.full),
}
ACTIVATIONS = (
    SILU,
    GELU,
    GELU_TANH,
    SWIGLU_OAI,
    RELU2,
    Activation.parse("silu:limit=1.0"),
    Activation.parse("silu:output_limit=1.0"),
    Activation.parse("relu2"),
    Activation.parse("gelu:ungated"),
    Activation.parse("silu:ungated,alpha=1.702"),
)
FORMATS = (FP8_TENSOR, FP8_ROW, FP8_GROUP128, FP8_GROUP128.derive(rounding="pow2"), MXFP8)


def make_inputs(case, activation, device, seed, dtype=torch.float32):
    num_rows, width = case
    generator = torch.Generator().manual_seed(seed)
    columns = 2 * width if activation.gated else width
    # Some beyond every limit, some where exp is large.
    return (6 * torch.randn(num_rows, columns, generator=generator)).to(device, dtype)


def assert_half_a_step(values, expected, scale):
    """E4M3 keeps 4 bits, 2^-9 at least. float32 evaluates an activation to 1e-6, which in the tails
    of gelu, where 1 + erf cancels, is 1e-4 of a scale that serves values up to 20.
    """
    half_step = (expected.abs() * 2.0**-4).clamp_min(scale * 2.0**-10)
    assert (values - expected).abs().le(half_step * (1 + 1e-4) + 1e-4 * scale).all()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_textbook(case, activation, device, naive_activation, naive_values):
    h = make_inputs(case, activation, device, seed=1)
    q = activation_quantize(h, activation, FP8_ROW)
    expected_SF = naive_activation(h.cpu(), activation)
    assert q.shape == expected_SF.shape
    if expected_SF.numel():
        scale_S1 = expected_SF.abs().amax(1, keepdim=True) / 448
        torch.testing.assert_close(q.scale.double().cpu(), scale_S1, rtol=1e-5, atol=2.0**-126)
        assert_half_a_step(naive_values(q), expected_SF, scale_S1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_every_format_and_dtype(
    format, dtype, device, naive_activation, naive_quantize, naive_values, sqnr_db
):
    h_SN = make_inputs(CASES["divides nothing"], SILU, device, seed=2, dtype=dtype)
    q = activation_quantize(h_SN, SILU, format)
    expected = naive_quantize(naive_activation(h_SN.cpu(), SILU), format)
    assert q.format == format
    # A value next to a tie may round the other way, and no more than that.
    assert sqnr_db(naive_values(expected), naive_values(q)) > 50


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_layout_moves_scales_and_nothing_else(format, layout, device, assert_same_bits):
    h_SN = make_inputs(CASES["divides nothing"], SILU, device, seed=3)
    q = activation_quantize(h_SN, SILU, format, layout=layout)
    assert_same_bits(q, activation_quantize(h_SN, SILU, format).relayout(layout))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_static_scale_is_used_as_it_is(shape, device, naive_activation, naive_quantize):
    h_SN = make_inputs(CASES["divides nothing"], SILU, device, seed=4)
    scale = torch.full(shape, 0.0625, device=device)
    q = activation_quantize(h_SN, SILU, FP8_TENSOR, scale=scale)
    expected = naive_quantize(naive_activation(h_SN.cpu(), SILU), FP8_TENSOR, scale=0.0625)
    assert q.scale.tolist() == [[0.0625]]
    # Static scales saturate: the largest of these values needs a larger one.
    assert q.data.float().abs().max() == 448
    changed = q.data.float().cpu() != expected.data.float()
    assert changed.float().mean() < 1e-3


def test_scale_of_every_block_may_be_given(device, assert_same_bits):
    h_SN = make_inputs(CASES["divides nothing"], SILU, device, seed=5)
    q = activation_quantize(h_SN, SILU, MXFP8)
    assert_same_bits(activation_quantize(h_SN, SILU, MXFP8, scale=q.scale), q)


def test_zero_gate_gives_zero(device):
    h_SN = torch.zeros(3, 8, device=device)
    h_SN[:, 4:] = 5.0
    for activation in (SILU, GELU, GELU_TANH, SWIGLU_OAI):
        assert not activation_quantize(h_SN, activation, FP8_ROW).dequantize().any()


def test_nan_spoils_its_own_block_only(device):
    h_SN = make_inputs((4, 256), SILU, device, seed=6)
    h_SN[1, 3] = torch.nan
    is_nan_SF = activation_quantize(h_SN, SILU, FP8_GROUP128).dequantize().isnan()
    assert is_nan_SF[1, :128].all()
    assert is_nan_SF.sum() == 128


def test_two_runs_are_identical(device, assert_same_bits):
    h_SN = make_inputs(CASES["real"], SILU, device, seed=7)
    q = activation_quantize(h_SN, SILU, MXFP8)
    assert_same_bits(activation_quantize(h_SN, SILU, MXFP8), q)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_a_seed_rounds_as_in_quantize(format, device, assert_same_bits):
    h_SN = make_inputs(CASES["divides nothing"], SILU, device, seed=8)
    q = activation_quantize(h_SN, SILU, format, seed=1)
    assert_same_bits(q, quantize(activate(h_SN, SILU), format, seed=1))


@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize("pair", [(FP8_GROUP128, MXFP8), (MXFP8, FP8_BLOCK128)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_are_activation_quantize_twice(case, pair, seed, device, assert_same_bits):
    h_SN = make_inputs(case, SILU, device, seed=9)
    layouts = (GEMM_READY, INTERLEAVED)
    options = {"row_layout": layouts[0], "column_layout": layouts[1], "seed": seed}
    both = activation_quantize_both(h_SN, SILU, *pair, **options)
    for format, layout, q in zip(pair, layouts, both, strict=True):
        assert_same_bits(q, activation_quantize(h_SN, SILU, format, layout=layout, seed=seed))


H_SN = torch.ones(4, 256)
OP = activation_quantize
REFUSALS = {
    "dtype": (
        TypeError,
        "activation_quantize: h has dtype torch.int32, but needs float32",
        lambda: OP(H_SN.int(), SILU, FP8_ROW),
    ),
    "quantised": (
        TypeError,
        "h is a QTensor, but needs a tensor",
        lambda: OP(quantize(H_SN, FP8_ROW), SILU, FP8_ROW),
    ),
    "rank": (
        ValueError,
        r"h has shape \(1, 4, 256\), but needs \[S, 2F\], or \[S, F\] without a gate",
        lambda: OP(H_SN[None], SILU, FP8_ROW),
    ),
    "activation's name": (
        TypeError,
        "activation is a str, but needs an Activation",
        lambda: OP(H_SN, "silu", FP8_ROW),
    ),
    "format's name": (
        TypeError,
        "format is a str.*Format.parse..mxfp8",
        lambda: OP(H_SN, SILU, "mxfp8"),
    ),
    "odd under a gate": (
        ValueError,
        r"h has shape \(4, 255\), but needs an even number of columns, gate then up, for silu",
        lambda: OP(H_SN[:, :255], SILU, FP8_ROW),
    ),
    "scale shape": (
        ValueError,
        r"scale has shape \(4,\), but needs \(4, 1\)",
        lambda: OP(H_SN, SILU, FP8_GROUP128, scale=torch.ones(4)),
    ),
    "scale shape of a block": (
        ValueError,
        r"scale has shape \(4, 1\), but needs \(1, 1\)",
        lambda: OP(H_SN, SILU, FP8_BLOCK128, scale=torch.ones(4, 1)),
    ),
    "scale dtype": (
        TypeError,
        "scale has dtype torch.bfloat16, but needs torch.float32",
        lambda: OP(H_SN, SILU, FP8_TENSOR, scale=torch.ones(1).bfloat16()),
    ),
    "scale dtype of MX": (
        TypeError,
        "scale has dtype torch.float32, but needs torch.float8_e8m0fnu",
        lambda: OP(H_SN, SILU, MXFP8, scale=torch.ones(4, 4)),
    ),
    "seed": (
        TypeError,
        "activation_quantize: seed has dtype torch.float32, but needs torch.int64",
        lambda: OP(H_SN, SILU, FP8_ROW, seed=torch.ones(1)),
    ),
    "both, dtype": (
        TypeError,
        "activation_quantize_both: h has dtype torch.int32, but needs float32",
        lambda: activation_quantize_both(H_SN.int(), SILU, FP8_ROW, MXFP8),
    ),
    "both, odd under a gate": (
        ValueError,
        r"activation_quantize_both: h has shape \(4, 255\), but needs an even number of columns",
        lambda: activation_quantize_both(H_SN[:, :255], SILU, FP8_ROW, MXFP8),
    ),
    "both, format's name": (
        TypeError,
        "column_format is a str.*Format.parse..mxfp8",
        lambda: activation_quantize_both(H_SN, SILU, FP8_ROW, "mxfp8"),
    ),
    "both, seed": (
        ValueError,
        r"activation_quantize_both: seed has shape \(2,\), but needs one element",
        lambda: activation_quantize_both(H_SN, SILU, FP8_ROW, MXFP8, seed=torch.tensor([1, 2])),
    ),
    "scale device": (
        ValueError,
        "scale is on meta, but needs the other tensors' device cpu",
        lambda: OP(H_SN, SILU, FP8_TENSOR, scale=torch.ones(1, device="meta")),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
