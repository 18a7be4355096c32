"""How much each format loses on Gaussian numbers, to a twentieth of a decibel.

Claimed: the formats' noise; that power-of-two scales make requantisation and the change to the
240-limited element free where exact scales lose 3 dB; that rounding is unbiased.
"""

import pytest
import torch

from octomoe.core.formats import (
    E4M3_240,
    E4M3FN,
    E5M2,
    FP8_BLOCK128,
    FP8_COLUMN128,
    FP8_GROUP128,
    FP8_ROW,
    MXFP8,
    MXFP8_2D,
)
from octomoe.reference.quantize import quantize
from octomoe.reference.requantize import requantize

GROUP128_POW2 = FP8_GROUP128.derive(rounding="pow2")
COLUMN128_POW2 = FP8_COLUMN128.derive(rounding="pow2")

# Signal to noise in dB of 4096 x 4096 normal numbers in bf16; a quarter of them is within 0.01.
CASES = [
    (MXFP8, 31.48),
    (FP8_GROUP128, 31.79),
    (GROUP128_POW2, 31.48),
    (FP8_BLOCK128, 31.55),
]
TOLERANCE_DB = 0.05
FREE_DB = 0.01


@pytest.fixture(scope="module")
def x_TD():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2048, 2048, generator=generator).to(torch.bfloat16)


@pytest.fixture(scope="module")
def pow2(x_TD):
    return quantize(x_TD, GROUP128_POW2)


@pytest.mark.parametrize(("format", "expected_db"), CASES, ids=lambda v: getattr(v, "name", None))
def test_noise_of_a_format(x_TD, format, expected_db, sqnr_db):
    measured_db = sqnr_db(x_TD, quantize(x_TD, format).dequantize())
    assert measured_db == pytest.approx(expected_db, abs=TOLERANCE_DB)


def test_requantizing_is_free_with_pow2_scales(x_TD, pow2, sqnr_db):
    before_db = sqnr_db(x_TD, pow2.dequantize())
    after_db = sqnr_db(x_TD, requantize(pow2, COLUMN128_POW2).dequantize())
    assert after_db == pytest.approx(before_db, abs=FREE_DB)


def test_requantizing_costs_3_db_with_exact_scales(x_TD, sqnr_db):
    columns = requantize(quantize(x_TD, FP8_GROUP128), FP8_COLUMN128)
    assert sqnr_db(x_TD, columns.dequantize()) == pytest.approx(28.78, abs=TOLERANCE_DB)


def test_240_limited_conversion_is_free_with_pow2_scales(x_TD, pow2, sqnr_db):
    narrow = requantize(pow2, GROUP128_POW2.derive(element=E4M3_240))
    before_db, after_db = (sqnr_db(x_TD, q.dequantize()) for q in (pow2, narrow))
    assert after_db == pytest.approx(before_db, abs=FREE_DB)


def test_one_copy_in_squares_serves_both_orientations(x_TD):
    # The same numbers whether read by rows or by columns: that is what MXFP8_2D is for.
    tile_TD = x_TD[:256, :256]
    by_rows, by_columns = quantize(tile_TD, MXFP8_2D), quantize(tile_TD.T, MXFP8_2D)
    assert torch.equal(by_rows.dequantize(), by_columns.dequantize().T)


@pytest.mark.parametrize("element", [E4M3FN, E5M2, E4M3_240], ids=lambda e: e.name)
def test_rounding_is_unbiased(element):
    # The error of one element is uniform over a step, so the mean of n has a deviation of
    # step / sqrt(12 n); five deviations happen to nobody.
    num_samples = 1 << 20
    x_TD = 1 + torch.rand(1024, num_samples // 1024)
    q = quantize(x_TD, FP8_ROW.derive(element=element), scale=torch.ones(1, 1))
    step = 2.0**-2 if element == E5M2 else 2.0**-3
    mean_error = (q.dequantize().double() - x_TD.double()).mean().item()
    assert abs(mean_error) < 5 * step / (12 * num_samples) ** 0.5
