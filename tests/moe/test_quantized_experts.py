"""The module keeps every part of the experts, through moves, casts, copies and state dicts."""

import copy
import dataclasses

import pytest
import torch

import octomoe
from octomoe.moe.quantized_experts import QuantizedExperts

FORMATS = [octomoe.FP8_TENSOR, octomoe.FP8_CHANNEL, octomoe.FP8_BLOCK128, octomoe.MXFP8]


def make_experts(format):
    experts = octomoe.ExpertWeights(
        w13=torch.randn(4, 2 * 48, 160) / 12,
        w2=torch.randn(4, 160, 48) / 7,
        activation=octomoe.SWIGLU_OAI,
        w13_bias=torch.randn(4, 2 * 48),
        w2_bias=torch.randn(4, 160),
        w13_input_scale=torch.tensor(0.015),
        w2_input_scale=torch.tensor([0.025]),
    )
    return octomoe.quantize_experts(experts, format)


def assert_same(actual, expected):
    for name in ("w13", "w2"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert (a.format, a.layout) == (b.format, b.layout)
        assert torch.equal(a.dequantize(), b.dequantize())
    for name in ("w13_bias", "w2_bias", "w13_input_scale", "w2_input_scale"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert torch.equal(a.reshape(b.shape), b)
    assert actual.activation == expected.activation


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_every_part_is_kept(format):
    experts = make_experts(format)
    module = QuantizedExperts(experts)
    assert_same(module.experts, experts)
    assert_same(copy.deepcopy(module).experts, experts)
    other = QuantizedExperts(make_experts(format))
    other.load_state_dict(module.state_dict())
    assert_same(other.experts, experts)


@pytest.mark.parametrize("layout", octomoe.ScaleLayout)
def test_scales_stay_in_their_layout(layout):
    experts = make_experts(octomoe.FP8_CHANNEL)
    experts = dataclasses.replace(
        experts, w13=experts.w13.relayout(layout), w2=experts.w2.relayout(layout)
    )
    assert_same(QuantizedExperts(experts).experts, experts)


def test_casting_changes_biases_only():
    experts = make_experts(octomoe.MXFP8)
    cast = QuantizedExperts(experts).to(torch.bfloat16).experts
    assert cast.w13_bias.dtype == torch.bfloat16
    assert torch.equal(cast.w13.dequantize(), experts.w13.dequantize())
    assert torch.equal(cast.w2_input_scale, experts.w2_input_scale)


def test_static_scales_reach_the_layer():
    experts = make_experts(octomoe.FP8_TENSOR)
    x_TD, weights_TA, ids_TA = torch.randn(9, 160), torch.rand(9, 2), torch.randint(4, (9, 2))
    y_TD = QuantizedExperts(experts, octomoe.FP8_TENSOR)(x_TD, ids_TA, weights_TA)
    expected_TD = octomoe.fused_moe(
        x_TD, experts, weights_TA, ids_TA, activation_format=octomoe.FP8_TENSOR
    )
    assert torch.equal(y_TD, expected_TD)


def test_ids_past_the_last_expert_are_dropped():
    module = QuantizedExperts(make_experts(octomoe.MXFP8))
    x_TD = torch.randn(2, 160)
    y_TD = module(x_TD, torch.tensor([[4], [3]]), torch.ones(2, 1))
    assert torch.equal(y_TD[0], torch.zeros(160))
    assert y_TD[1].abs().max() > 0


def test_unquantised_experts_are_refused():
    experts = octomoe.ExpertWeights(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4))
    with pytest.raises(TypeError, match="w13 is not quantised, but needs a QTensor; use octomoe"):
        QuantizedExperts(experts)
