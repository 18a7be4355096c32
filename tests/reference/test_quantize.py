"""The reference quantiser is the format's definition, bit for bit.

Claimed: it agrees with a naive loop over blocks for every format; power-of-two scales are the exact
ceiling; exact scales are the rounded quotient; no byte is produced that its reader takes for
another number; numbers that are none, empty axes and ragged edges mean what the docstring says.
"""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad

from octomoe.core.formats import (
    ALL,
    E4M3_240,
    E5M2,
    FORMATS,
    FP8_BLOCK128,
    FP8_COLUMN128,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    MXFP8,
    MXFP8_2D,
    MXFP8_E5M2,
    Format,
    Rounding,
)
from octomoe.reference.quantize import block_amax, quantize

VARIANTS = tuple(
    dict.fromkeys(
        base.derive(element=element, rounding=rounding)
        for base in FORMATS
        for element in (base.element, E5M2, E4M3_240)
        for rounding in (base.rounding, Rounding.POW2)
    )
)
CASES = {
    "no rows": (0, 40),
    "no columns": (3, 0),
    "no experts": (0, 4, 32),
    "an expert without rows": (2, 0, 32),
    "one": (1, 1),
    "one token": (1, 256),
    "divides nothing": (131, 67),
    "divides nothing, experts": (3, 129, 37),
    "divides all": (2, 128, 128),
}
E8M0_FORMATS = (
    MXFP8,
    MXFP8_E5M2,
    MXFP8.derive(element=E4M3_240),
    MXFP8.derive(target_max=256.0),
    MXFP8.derive(target_max=2.0),
)
SINGLE = Format((1, 1, 1))


def make_inputs(shape, seed, dtype=torch.float32, spread=8.0):
    """Numbers of many magnitudes, zeros and exact halves between them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * torch.exp2((spread * torch.randn(shape, generator=generator)).round())
    kind = torch.randint(8, shape, generator=generator)
    x = torch.where(kind == 0, 0.0, x)
    # Few mantissa bits: under power-of-two scales these land on ties.
    mantissa, exponent = torch.frexp(x)
    tie = torch.ldexp((mantissa * 32).round() / 32, exponent)
    return torch.where(kind < 4, tie, x).to(dtype)


def many_amax(format):
    """Positive float32: around every threshold, subnormals, random bit patterns."""
    powers = torch.exp2(torch.arange(-149, 128, dtype=torch.float64))
    thresholds = (format.target_max * powers).float()
    bits = thresholds[thresholds.isfinite()].view(torch.int32)
    near = torch.cat([bits + ulp for ulp in range(-3, 4)])
    patterns = torch.randint(1, 0x7F800000, (4000,), dtype=torch.int32)
    subnormals = torch.cat([torch.arange(1, 9), torch.randint(1, 1 << 23, (500,))]).int()
    return torch.cat([near[near > 0], patterns, subnormals]).view(torch.float32).unsqueeze(1)


def exact_power(amax, target):
    """The least k with ``amax <= target * 2^k``, by integers."""
    (mantissa, exponent), (target_mantissa, target_exponent) = map(math.frexp, (amax, target))
    k = exponent - target_exponent + (mantissa > target_mantissa)
    assert Fraction(target) * Fraction(2) ** (k - 1) < Fraction(amax)
    assert Fraction(amax) <= Fraction(target) * Fraction(2) ** k
    return k


def bytes_of(x):
    return x.view(torch.uint8)


@pytest.mark.parametrize("format", VARIANTS, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_agrees_with_a_naive_loop(shape, format, device, naive_quantize, assert_same_bits):
    x = make_inputs(shape, seed=1).to(device)
    assert_same_bits(quantize(x, format).to("cpu"), naive_quantize(x, format))


@given(
    format=st.sampled_from(VARIANTS),
    shape=st.one_of(
        st.tuples(st.integers(1, 140), st.integers(1, 140)),
        st.tuples(st.integers(1, 3), st.integers(1, 140), st.integers(1, 70)),
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.sampled_from([0.0, 3.0, 50.0]),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_a_naive_loop_on_ragged_shapes(
    format, shape, dtype, spread, seed, naive_quantize, assert_same_bits
):
    x = make_inputs(shape, seed, dtype, spread)
    x = torch.where(x.isfinite(), x, 0.0)
    assert_same_bits(quantize(x, format), naive_quantize(x, format))


@pytest.mark.parametrize("format", E8M0_FORMATS, ids=lambda f: f.name)
def test_e8m0_scale_is_the_exact_ceiling(format, device):
    amax_T1 = many_amax(format)
    expected = [
        min(max(exact_power(a, format.target_max), -127), 127) + 127
        for a in amax_T1.double().flatten().tolist()
    ]
    code_T = bytes_of(quantize(amax_T1.to(device), format).scale).flatten().int().cpu()
    wrong = (code_T != torch.tensor(expected)).nonzero().flatten()
    listed = [(float.hex(amax_T1[i].item()), code_T[i].item(), expected[i]) for i in wrong]
    assert not listed, f"(amax, byte, exact byte): {listed[:8]}"


@pytest.mark.parametrize("format", E8M0_FORMATS, ids=lambda f: f.name)
def test_e8m0_scale_of_no_number(format, device):
    amax_T1 = torch.tensor([[0.0], [-0.0], [math.nan], [math.inf], [-math.inf]], device=device)
    assert bytes_of(quantize(amax_T1, format).scale).flatten().tolist() == [0, 0, 255, 255, 255]


@pytest.mark.parametrize("element", [FP8_ROW.element, E5M2, E4M3_240], ids=lambda e: e.name)
def test_pow2_scale_is_a_power_of_two_and_never_saturates(element, device):
    format = FP8_ROW.derive(element=element, rounding="pow2")
    amax_T1 = many_amax(format)
    scale_T1 = quantize(amax_T1.to(device), format).scale.cpu()
    assert not (scale_T1.view(torch.int32) & 0x007FFFFF).any()
    for a, scale in zip(amax_T1.flatten().tolist(), scale_T1.flatten().tolist(), strict=True):
        assert Fraction(a) <= Fraction(format.target_max) * Fraction(scale)
        assert scale == 2.0 ** max(exact_power(a, format.target_max), -126)


@pytest.mark.parametrize("element", [FP8_ROW.element, E5M2, E4M3_240], ids=lambda e: e.name)
def test_exact_scale_is_the_rounded_quotient(element, device):
    format = FP8_ROW.derive(element=element)
    amax_T1 = many_amax(format)
    # A quotient of float32 rounded to float64 and then to float32 is rounded as if once.
    quotient_T1 = (amax_T1.double() / element.max).float().clamp_min(2.0**-126)
    assert torch.equal(quantize(amax_T1.to(device), format).scale.cpu(), quotient_T1)


@pytest.mark.parametrize("format", VARIANTS, ids=lambda f: f.name)
def test_zeros_get_the_smallest_scale(format):
    q = quantize(torch.zeros(130, 130), format)
    assert set(q.scale.double().flatten().tolist()) == {format.min_scale}
    assert not bytes_of(q.data).any()
    assert torch.equal(q.dequantize(), torch.zeros(130, 130))


@pytest.mark.parametrize("format", VARIANTS, ids=lambda f: f.name)
def test_ragged_edge_equals_zero_padding(format, assert_same_bits):
    x_ENK = make_inputs((2, 150, 70), seed=2)
    q, padded = quantize(x_ENK, format), quantize(pad(x_ENK, (0, 58, 0, 106)), format)
    assert_same_bits(q.data, padded.data[:, :150, :70].contiguous())
    rows, columns = q.scale.shape[1:]
    assert_same_bits(q.scale, padded.scale[:, :rows, :columns].contiguous())


@pytest.mark.parametrize("format", VARIANTS, ids=lambda f: f.name)
def test_experts_are_quantised_apart(format, assert_same_bits):
    x_ENK = make_inputs((3, 65, 40), seed=3)
    q = quantize(x_ENK, format)
    if format.block[0] == ALL:
        assert_same_bits(q.scale, quantize(x_ENK.reshape(1, -1), format).scale.unsqueeze(0))
    for e in range(3):
        alone = quantize(x_ENK[e], format)
        if format.block[0] == ALL:
            alone = quantize(x_ENK[e], format, scale=q.scale[0])
        else:
            assert_same_bits(q.scale[e], alone.scale)
        assert_same_bits(q.data[e], alone.data)


@pytest.mark.parametrize("format", VARIANTS, ids=lambda f: f.name)
def test_own_amax_and_own_scale_change_nothing(format, assert_same_bits):
    x_TD = make_inputs((140, 67), seed=4)
    q = quantize(x_TD, format)
    assert_same_bits(quantize(x_TD, format, amax=block_amax(x_TD, format)), q)
    assert_same_bits(quantize(x_TD, format, scale=q.scale), q)


def test_given_amax_and_scale_hold_for_every_block(naive_quantize, assert_same_bits):
    x_TD = make_inputs((5, 300), seed=5)
    by_amax = quantize(x_TD, FP8_GROUP128, amax=torch.tensor([[112.0]]))
    assert_same_bits(by_amax, naive_quantize(x_TD, FP8_GROUP128, scale=0.25))
    by_scale = quantize(x_TD, FP8_GROUP128, scale=torch.tensor([[0.3]]))
    assert_same_bits(by_scale, naive_quantize(x_TD, FP8_GROUP128, scale=0.3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format", VARIANTS, ids=lambda f: f.name)
def test_block_with_no_number_reads_back_as_nan(format, value):
    x_ENK = make_inputs((2, 140, 140), seed=6)
    spoiled_ENK = x_ENK.clone()
    spoiled_ENK[1, 130, 5] = value
    q, clean = quantize(spoiled_ENK, format), quantize(x_ENK, format)
    is_hit_ENK = block_amax(spoiled_ENK, format).isfinite().logical_not()
    assert is_hit_ENK.sum() == 1
    assert q.scale.double().isnan().equal(is_hit_ENK)
    assert q.dequantize().isnan().sum() == (~(q.dequantize() == clean.dequantize())).sum()
    assert q.dequantize()[1, 130, 5].isnan()
    assert not bytes_of(q.data)[q.dequantize().isnan()].any()
    if format.scale_dtype == torch.float8_e8m0fnu:
        assert (bytes_of(q.scale)[is_hit_ENK] == 0xFF).all()


@pytest.mark.parametrize("given", ["amax", "scale"])
@pytest.mark.parametrize("format", VARIANTS, ids=lambda f: f.name)
def test_under_a_given_scale_inf_saturates_and_nan_stays(format, given):
    format = Format((1, 1, 4), format.scale_dtype, format.element, format.rounding)
    x_TD = torch.tensor([[1.0, 1e30, math.inf, -math.inf], [1.0, math.nan, -math.nan, 2.0]])
    if given == "amax":
        q = quantize(x_TD, format, amax=torch.tensor([[format.target_max]]))
    else:
        q = quantize(x_TD, format, scale=torch.ones(1, 1).to(format.scale_dtype))
    limit = format.element.max
    assert q.dequantize()[0].tolist() == [1.0, limit, limit, -limit]
    if format.element.has_nan:
        assert bytes_of(q.data)[1, 1:3].tolist() == [0x7F, 0x7F]
        assert q.dequantize()[1, ::3].tolist() == [1.0, 2.0]
    else:
        assert bytes_of(q.data)[1].tolist() == [0, 0, 0, 0]
        assert q.dequantize()[1].isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_given_amax_that_is_no_number_gives_a_nan_scale(value):
    for format in (FP8_ROW, FP8_BLOCK128.derive(rounding="pow2"), MXFP8, MXFP8_2D):
        q = quantize(torch.ones(2, 3), format, amax=torch.tensor([[value]]))
        assert q.scale.double().isnan().all()
        assert not bytes_of(q.data).any()


@pytest.mark.parametrize("rounding", Rounding)
def test_240_limited_bytes_are_never_inf_or_nan(rounding):
    format = SINGLE.derive(element=E4M3_240, rounding=rounding)
    x_TD = torch.arange(65536).to(torch.uint16).view(torch.bfloat16).view(256, 256)
    quantised = [quantize(x_TD, format)]
    for value in (2.0**-126, 1e-3, 0.75, 1.0, 1.5, 3.0, 2.0**100):
        quantised.append(quantize(x_TD, format, scale=torch.tensor([[value]])))
        quantised.append(quantize(x_TD, format, amax=torch.tensor([[value]])))
    for q in quantised:
        assert (bytes_of(q.data) & 0x7F).max() < 0x78
        assert q.dequantize().isnan().equal(q.scale.isnan())
        assert q.dequantize()[x_TD.isnan()].isnan().all()


@pytest.mark.parametrize("element", [FP8_ROW.element, E5M2, E4M3_240], ids=lambda e: e.name)
@pytest.mark.parametrize("scale", [0.0, 2.0**-149, math.inf])
def test_a_degenerate_scale_makes_no_nan_bytes(scale, element):
    x_TD = torch.tensor([[0.0, 1.0, -1.0, math.inf]])
    q = quantize(x_TD, FP8_ROW.derive(element=element), scale=torch.tensor([[scale]]))
    assert not q.data.float().isnan().any()
    assert element.has_nan or (bytes_of(q.data) & 0x7F).max() < 0x78


@pytest.mark.parametrize("base", [FP8_ROW, FP8_BLOCK128, FP8_EXPERT, FP8_TENSOR, MXFP8, MXFP8_2D])
def test_e4m3fn_becomes_240_limited_by_halving(base):
    format = base.derive(rounding="pow2")
    assert format.derive(element=E4M3_240).target_max == 224.0
    x_ENK = make_inputs((2, 40, 300), seed=7, spread=1.0)
    wide, narrow = (quantize(x_ENK, f) for f in (format, format.derive(element=E4M3_240)))
    assert torch.equal(narrow.scale.double(), 2 * wide.scale.double())
    half_ENK = wide.data.float() / 2
    is_normal_ENK = half_ENK.abs() >= 2.0**-6
    assert is_normal_ENK.float().mean() > 0.5
    assert torch.equal(narrow.data.float()[is_normal_ENK], half_ENK[is_normal_ENK])


def test_column_scales_are_row_scales_of_the_transpose(assert_same_bits):
    x_TD = make_inputs((300, 40), seed=8)
    columns, rows = quantize(x_TD, FP8_COLUMN128), quantize(x_TD.T, FP8_GROUP128)
    assert_same_bits(columns.data, rows.data.T.contiguous())
    assert_same_bits(columns.scale, rows.scale.T.contiguous())
