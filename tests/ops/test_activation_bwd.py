"""`activation_bwd`: the derivative of the textbook formula, one rounding; clamps as in torch."""

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
    QTensor,
    ScaleLayout,
    activation_bwd,
    activation_bwd_both,
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
    Activation.parse("gelu:limit=1.0,up_offset=0.5"),
    Activation.parse("gelu_tanh:output_limit=0.5"),
    Activation.parse("relu2"),
    Activation.parse("relu2:output_limit=1.0"),
    Activation.parse("gelu:ungated"),
    Activation.parse("gelu_tanh:ungated"),
    Activation.parse("silu:ungated,alpha=1.702"),
)
EACH_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)


def make_inputs(case, activation, device, seed, dtype=torch.float32):
    num_rows, width = case
    generator = torch.Generator().manual_seed(seed)
    columns = 2 * width if activation.gated else width
    dy_SF = torch.randn(num_rows, width, generator=generator)
    # Some beyond every limit, some where exp is large.
    h_SN = 6 * torch.randn(num_rows, columns, generator=generator)
    return dy_SF.to(device, dtype), h_SN.to(device, dtype)


def gradient(function, dy_SF, h_SN, activation):
    """What torch's autograd makes of `function`."""
    h_SN = h_SN.detach().requires_grad_()
    y_SF = function(h_SN, activation)
    return torch.autograd.grad(y_SF, h_SN, dy_SF.to(y_SF.dtype))[0]


@EACH_ACTIVATION
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_autograd_of_the_textbook(case, activation, device, naive_activation):
    dy_SF, h_SN = make_inputs(case, activation, device, seed=1)
    dh_SN = activation_bwd(dy_SF, h_SN, activation)
    assert (dh_SN.shape, dh_SN.dtype) == (h_SN.shape, torch.float32)
    expected_SN = gradient(naive_activation, dy_SF.cpu(), h_SN.cpu().double(), activation)
    # Terms up to 100 cancel, each of them good to 1e-7.
    torch.testing.assert_close(dh_SN.cpu().double(), expected_SN, rtol=1e-5, atol=1e-5)


@EACH_ACTIVATION
def test_limits_and_what_is_no_number_are_as_in_torch(activation, device):
    values = (0.0, 0.5, 1.0, 7.0, 8.0, 100.0, 1e4, torch.inf, torch.nan)
    values = torch.tensor([*values, *(-value for value in values)], device=device)
    h_SN = torch.cartesian_prod(values, values) if activation.gated else values[:, None]
    for gradient_value in (1.0, -2.0, 0.0, torch.nan):
        dy_SF = torch.full((h_SN.shape[0], 1), gradient_value, device=device)
        # Autograd adds terms that may be Inf - Inf where their sum is Inf: either is no number.
        dh_SN, expected_SN = (
            torch.where(result_SN.isfinite(), result_SN, torch.nan)
            for result_SN in (
                activation_bwd(dy_SF, h_SN, activation),
                gradient(activate, dy_SF, h_SN, activation),
            )
        )
        torch.testing.assert_close(dh_SN, expected_SN, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_rounded_once(dtype, device, assert_same_bits):
    dy_SF, h_SN = make_inputs(CASES["divides nothing"], SILU, device, seed=2, dtype=dtype)
    plain_SN = activation_bwd(dy_SF.float(), h_SN.float(), SILU)
    assert_same_bits(activation_bwd(dy_SF, h_SN, SILU), plain_SN.to(dtype))
    assert_same_bits(activation_bwd(dy_SF, h_SN, SILU, out_dtype=torch.float32), plain_SN)
    assert_same_bits(activation_bwd(dy_SF.float(), h_SN, SILU, out_dtype=dtype), plain_SN.to(dtype))


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize("format", [FP8_TENSOR, FP8_ROW, FP8_GROUP128, FP8_BLOCK128, MXFP8])
def test_a_format_quantises_whole_rows(format, layout, device, assert_same_bits):
    dy_SF, h_SN = make_inputs(CASES["divides nothing"], SILU, device, seed=3)
    expected = quantize(activation_bwd(dy_SF, h_SN, SILU), format, layout=layout)
    actual = activation_bwd(dy_SF, h_SN, SILU, format=format, layout=layout)
    assert isinstance(actual, QTensor)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("format", [FP8_TENSOR, FP8_ROW, FP8_GROUP128, FP8_BLOCK128, MXFP8])
def test_a_seed_rounds_as_in_quantize(format, device, assert_same_bits):
    dy_SF, h_SN = make_inputs(CASES["divides nothing"], SILU, device, seed=5)
    expected = quantize(activation_bwd(dy_SF, h_SN, SILU), format, seed=1)
    assert_same_bits(activation_bwd(dy_SF, h_SN, SILU, format=format, seed=1), expected)


@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize("pair", [(FP8_GROUP128, MXFP8), (MXFP8, FP8_BLOCK128)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_are_activation_bwd_twice(case, pair, seed, device, assert_same_bits):
    dy_SF, h_SN = make_inputs(case, SILU, device, seed=6)
    layouts = (GEMM_READY, INTERLEAVED)
    options = {"row_layout": layouts[0], "column_layout": layouts[1], "seed": seed}
    both = activation_bwd_both(dy_SF, h_SN, SILU, *pair, **options)
    for format, layout, q in zip(pair, layouts, both, strict=True):
        options = {"format": format, "layout": layout, "seed": seed}
        assert_same_bits(q, activation_bwd(dy_SF, h_SN, SILU, **options))


def test_strides_of_the_inputs_do_not_matter(device, assert_same_bits):
    dy_SF, h_SN = make_inputs(CASES["divides nothing"], SILU, device, seed=4)
    expected_SN = activation_bwd(dy_SF, h_SN, SILU)
    actual_SN = activation_bwd(dy_SF.T.contiguous().T, h_SN.T.contiguous().T, SILU)
    torch.testing.assert_close(actual_SN, expected_SN, rtol=1e-6, atol=1e-6)
    assert actual_SN.is_contiguous()
    assert activation_bwd(dy_SF.T, dy_SF.T, RELU2).is_contiguous()


DY_SF, H_SN = torch.ones(4, 128), torch.ones(4, 256)
OP = activation_bwd
REFUSALS = {
    "dtype of dy": (
        TypeError,
        "activation_bwd: dy has dtype torch.int32, but needs float32",
        lambda: OP(DY_SF.int(), H_SN, SILU),
    ),
    "dtype of h": (
        TypeError,
        "activation_bwd: h has dtype torch.float64, but needs float32",
        lambda: OP(DY_SF, H_SN.double(), SILU),
    ),
    "quantised": (
        TypeError,
        "dy is a QTensor, but needs a tensor",
        lambda: OP(quantize(DY_SF, FP8_ROW), H_SN, SILU),
    ),
    "rank": (
        ValueError,
        r"dy has shape \(1, 4, 128\), but needs \[S, F\]",
        lambda: OP(DY_SF[None], H_SN, SILU),
    ),
    "activation's name": (
        TypeError,
        "activation is a str, but needs an Activation",
        lambda: OP(DY_SF, H_SN, "silu"),
    ),
    "width under a gate": (
        ValueError,
        r"h has shape \(4, 128\), but needs \(4, 256\)",
        lambda: OP(DY_SF, DY_SF, SILU),
    ),
    "width without a gate": (
        ValueError,
        r"h has shape \(4, 256\), but needs \(4, 128\)",
        lambda: OP(DY_SF, H_SN, RELU2),
    ),
    "rows": (
        ValueError,
        r"h has shape \(3, 256\), but needs \(4, 256\)",
        lambda: OP(DY_SF, H_SN[:3], SILU),
    ),
    "device": (
        ValueError,
        "h is on meta, but needs the other tensors' device cpu",
        lambda: OP(DY_SF, H_SN.to("meta"), SILU),
    ),
    "format's name": (
        TypeError,
        "format is a str.*Format.parse..mxfp8",
        lambda: OP(DY_SF, H_SN, SILU, format="mxfp8"),
    ),
    "out_dtype": (
        TypeError,
        "out_dtype is torch.float64, but needs float32, bfloat16 or float16",
        lambda: OP(DY_SF, H_SN, SILU, out_dtype=torch.float64),
    ),
    "out_dtype of a format": (
        ValueError,
        "out_dtype is torch.bfloat16, but needs None with a format: mxfp8 says what is stored",
        lambda: OP(DY_SF, H_SN, SILU, format=MXFP8, out_dtype=torch.bfloat16),
    ),
    "seed of no format": (
        ValueError,
        "activation_bwd: seed is given, but needs a format, to which it rounds",
        lambda: OP(DY_SF, H_SN, SILU, seed=1),
    ),
    "seed": (
        TypeError,
        "activation_bwd: seed is a str, but needs an int",
        lambda: OP(DY_SF, H_SN, SILU, format=MXFP8, seed="1"),
    ),
    "both, rows": (
        ValueError,
        r"activation_bwd_both: h has shape \(3, 256\), but needs \(4, 256\)",
        lambda: activation_bwd_both(DY_SF, H_SN[:3], SILU, FP8_ROW, MXFP8),
    ),
    "both, activation's name": (
        TypeError,
        "activation_bwd_both: activation is a str, but needs an Activation",
        lambda: activation_bwd_both(DY_SF, H_SN, "silu", FP8_ROW, MXFP8),
    ),
    "both, format's name": (
        TypeError,
        "row_format is a str.*Format.parse..mxfp8",
        lambda: activation_bwd_both(DY_SF, H_SN, SILU, "mxfp8", MXFP8),
    ),
    "both, seed": (
        ValueError,
        "activation_bwd_both: seed is on meta, but needs the other tensors' device cpu",
        lambda: activation_bwd_both(
            DY_SF, H_SN, SILU, FP8_ROW, MXFP8, seed=torch.tensor(1, device="meta")
        ),
    ),
    "layout of no format": (
        ValueError,
        "layout is gemm_ready, but needs a format, whose scales it lays",
        lambda: OP(DY_SF, H_SN, SILU, layout=GEMM_READY),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
