"""The compared schemes are valid pairs, and averaging scales does the damage it is shown for."""

import torch

import octomoe
from octomoe.core.formats import is_gemm_pair
from octomoe.evaluate.metrics import sqnr_db
from octomoe.evaluate.schemes import FP8_CHANNEL_SHARED, SCHEMES, average_expert_scales


def make_experts():
    gain_E11 = torch.tensor([0.5, 1.0, 2.0, 4.0])[:, None, None]
    return octomoe.ExpertWeights(torch.randn(4, 96, 64) * gain_E11, torch.randn(4, 64, 48))


def test_schemes_are_valid_pairs_with_names_of_their_own():
    assert all(is_gemm_pair(scheme.weights, scheme.activations) for scheme in SCHEMES)
    assert len({scheme.name for scheme in SCHEMES}) == len(SCHEMES) >= 10


def test_averaged_scales_multiply_each_expert_by_a_wrong_gain():
    experts = make_experts()
    quantized = octomoe.quantize_experts(experts, octomoe.FP8_CHANNEL)
    averaged = average_expert_scales(quantized)
    assert torch.equal(averaged.w13.data.float(), quantized.w13.data.float())
    gain_EN1 = quantized.w13.scale.mean(0, keepdim=True) / quantized.w13.scale
    torch.testing.assert_close(
        averaged.w13.dequantize(), quantized.w13.dequantize() * gain_EN1, rtol=1e-5, atol=1e-6
    )


def test_sharing_a_scale_is_harmless_where_data_is_requantized():
    experts = make_experts()
    shared = octomoe.quantize_experts(experts, FP8_CHANNEL_SHARED)
    assert shared.w13.scale.shape == (1, 96, 1)
    assert sqnr_db(experts.w13, shared.w13.dequantize()) > 31
    averaged = average_expert_scales(octomoe.quantize_experts(experts, octomoe.FP8_CHANNEL))
    assert sqnr_db(experts.w13, averaged.w13.dequantize()) < 10
