"""Metrics say what they claim: ratios in dB, saturation, flush to zero, spread of scales."""

from math import inf, nan

import pytest
import torch

import octomoe
from octomoe.evaluate.metrics import ratio_db, sqnr_db, weight_quality


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(100.0, 1.0, 20.0), (1.0, 0.0, inf), (0.0, 1.0, -inf), (1.0, nan, -inf), (1.0, inf, -inf)],
)
def test_ratio_in_db(signal, noise, expected):
    assert ratio_db(signal, noise) == expected


def test_sqnr_of_a_known_error():
    x = torch.randn(1000)
    assert sqnr_db(x, 1.01 * x) == pytest.approx(40.0, abs=1e-3)
    assert sqnr_db(x, x) == inf
    assert sqnr_db(x, torch.full_like(x, nan)) == -inf


def test_saturated_and_flushed_elements_are_counted_per_expert():
    w_ERC = torch.full((2, 1, 8), 1.0)
    w_ERC[0, 0, :2] = 1000.0  # above 448 under a scale of one: saturates
    w_ERC[1, 0, :3] = 2.0**-11  # below half of the smallest subnormal, 2^-9: flushed
    w_ERC[1, 0, 3] = 0.0  # a true zero is not flushed
    q = octomoe.quantize(w_ERC, octomoe.FP8_EXPERT, scale=torch.tensor(1.0))
    quality = weight_quality("layer", "w13", w_ERC, q)
    assert quality.saturated == [2 / 8, 0.0]
    assert quality.flushed == [0.0, 3 / 8]


def test_quantising_with_its_own_scales_saturates_nothing():
    w_ERC = torch.randn(3, 40, 50) * torch.logspace(-3, 3, 3)[:, None, None]
    for format in (octomoe.FP8_TENSOR, octomoe.FP8_BLOCK128, octomoe.MXFP8):
        quality = weight_quality("layer", "w2", w_ERC, octomoe.quantize(w_ERC, format))
        assert quality.saturated == [0.0, 0.0, 0.0]


def test_spread_of_scales_per_expert():
    w_ERC = torch.tensor([[[1.0], [2.0], [8.0]], [[3.0], [3.0], [3.0]]]) * 448
    q = octomoe.quantize(w_ERC, octomoe.FP8_CHANNEL)
    quality = weight_quality("layer", "w2", w_ERC, q)
    assert (quality.scale_min, quality.scale_median, quality.scale_max) == (
        [1.0, 3.0],
        [2.0, 3.0],
        [8.0, 3.0],
    )
