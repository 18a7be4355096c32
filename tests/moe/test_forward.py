"""The walk op by op and the fused call are the same arithmetic, bit for bit on the reference."""

import dataclasses

import pytest
import torch

import octomoe
from octomoe.moe.forward import moe_forward

CASES = [
    pytest.param(octomoe.FP8_TENSOR, octomoe.FP8_TENSOR, id="tensor-tensor"),
    pytest.param(octomoe.FP8_CHANNEL, octomoe.FP8_TOKEN, id="channel-token"),
    pytest.param(octomoe.FP8_BLOCK128, octomoe.FP8_GROUP128, id="block128-group128"),
    pytest.param(octomoe.MXFP8, octomoe.MXFP8, id="mxfp8-mxfp8"),
]


def make_inputs(num_tokens, weight_format):
    experts = octomoe.ExpertWeights(
        w13=torch.randn(6, 2 * 48, 160) / 12,
        w2=torch.randn(6, 160, 48) / 7,
        w13_bias=torch.randn(6, 2 * 48),
        w2_bias=torch.randn(6, 160),
    )
    x_TD = torch.randn(num_tokens, 160).to(torch.bfloat16)
    weights_TA = torch.rand(num_tokens, 3)
    ids_TA = torch.randint(-1, 6, (num_tokens, 3))
    return x_TD, octomoe.quantize_experts(experts, weight_format), weights_TA, ids_TA


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
@pytest.mark.parametrize(("weight_format", "activation_format"), CASES)
def test_walk_equals_fused_call(weight_format, activation_format, num_tokens):
    inputs = make_inputs(num_tokens, weight_format)
    walked_TD = moe_forward(*inputs, activation_format=activation_format)
    fused_TD = octomoe.fused_moe(*inputs, activation_format=activation_format)
    assert torch.equal(walked_TD, fused_TD)


def test_static_scales_are_used_as_given():
    x_TD, experts, weights_TA, ids_TA = make_inputs(37, octomoe.FP8_TENSOR)
    static = dataclasses.replace(
        experts, w13_input_scale=torch.tensor(0.02), w2_input_scale=torch.tensor([0.03])
    )
    walked_TD = moe_forward(x_TD, static, weights_TA, ids_TA, activation_format=octomoe.FP8_TENSOR)
    fused_TD = octomoe.fused_moe(
        x_TD, static, weights_TA, ids_TA, activation_format=octomoe.FP8_TENSOR
    )
    dynamic_TD = moe_forward(
        x_TD, experts, weights_TA, ids_TA, activation_format=octomoe.FP8_TENSOR
    )
    assert torch.equal(walked_TD, fused_TD)
    assert not torch.equal(walked_TD, dynamic_TD)


def test_expert_parallel_parts_sum_to_the_whole():
    x_TD, experts, weights_TA, ids_TA = make_inputs(37, octomoe.MXFP8)
    x_TD = x_TD.float()
    whole_TD = moe_forward(x_TD, experts, weights_TA, ids_TA, activation_format=octomoe.MXFP8)
    parts = []
    for first in (0, 3):
        local = slice(first, first + 3)
        expert_map = torch.full((6,), -1)
        expert_map[local] = torch.arange(3)
        mine = dataclasses.replace(
            experts,
            w13=_slice(experts.w13, local),
            w2=_slice(experts.w2, local),
            w13_bias=experts.w13_bias[local],
            w2_bias=experts.w2_bias[local],
        )
        parts.append(
            moe_forward(
                x_TD,
                mine,
                weights_TA,
                ids_TA,
                activation_format=octomoe.MXFP8,
                expert_map=expert_map,
            )
        )
    torch.testing.assert_close(parts[0] + parts[1], whole_TD)


def _slice(weight, local):
    return octomoe.QTensor(weight.data[local], weight.scale[local], weight.format)
