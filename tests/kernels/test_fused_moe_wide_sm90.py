"""What Hopper's kernels whose operands meet in bf16 take, and the order of their rows.

Claimed: rows are put in order, and rounded, bit for bit; what the kernels do not take is refused
with its reason. `test_layers_sm90.py` has what they compute.
"""

from dataclasses import replace

import pytest
import torch

from octomoe import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_TENSOR,
    MXFP8,
    MXFP8_2D,
    MXFP8_E5M2,
    ExpertWeights,
    Target,
    quantize_experts,
)
from octomoe.core.formats import E5M2
from octomoe.core.layouts import INTERLEAVED
from octomoe.kernels.fused_moe_sm90 import fused_moe as fused_moe_sm90
from octomoe.kernels.fused_moe_wide_sm90 import has_room, why_not
from octomoe.kernels.fused_rows_wide_sm90 import rows_in_order
from octomoe.reference.dequantize import dequantize
from octomoe.reference.fused_moe import fused_moe as fused_moe_reference
from octomoe.reference.quantize import quantize
from octomoe.tune.fused_moe import WIDE_CONFIGS, wide_config

PAIRS = {
    "tensor": (FP8_TENSOR, None),
    "expert": (FP8_EXPERT, None),
    "channel": (FP8_CHANNEL, None),
    "channel e5m2": (FP8_CHANNEL.derive(element=E5M2), None),
    "block": (FP8_BLOCK128, None),
    "mxfp8": (MXFP8, None),
    "mxfp8 x mxfp8": (MXFP8, MXFP8),
    "mxfp8_2d x mxfp8_e5m2": (MXFP8_2D, MXFP8_E5M2),
}
# tokens, experts, choices, hidden size, width
MANY = (300, 8, 2, 512, 256)
# As of `test_layers_sm90.py`.
AGREES_DB, AGREES_OF_FEW_DB = 40.0, 33.0
HOPPER = Target("NVIDIA H200", arch=90, sms=132)

EACH_PAIR = pytest.mark.parametrize("pair", PAIRS)
EACH_CONFIG = pytest.mark.parametrize(
    "config", WIDE_CONFIGS, ids=lambda config: f"{config.rows} rows"
)


@pytest.fixture
def make_layer(make_experts):
    return lambda case, pair, **options: make_experts(case, PAIRS[pair][0], **options)


def in_order(x_TD):
    """What `rows_in_order` says, in torch."""
    parts = x_TD.reshape(x_TD.shape[0], x_TD.shape[1] // 16, 4, 2, 2)
    return parts.transpose(2, 3).reshape(x_TD.shape)


@pytest.mark.parametrize("shape", [(37, 400), (1, 16), (9, 512), (0, 32)])
@pytest.mark.parametrize("format", [None, MXFP8, MXFP8_E5M2], ids=["bf16", "mxfp8", "e5m2"])
def test_rows_in_order(shape, format, kernel_device, assert_same_bits):
    x_TD = torch.randn(shape).to(kernel_device, torch.bfloat16)
    if x_TD.shape[0] > 8:
        x_TD[1, 40], x_TD[2, 100] = torch.nan, torch.inf
        x_TD[3, :64] = 0.0
        x_TD[4] *= 1e30
        x_TD[5] *= 1e-37
    expected = x_TD
    if format is not None:
        expected = dequantize(quantize(x_TD, format), dtype=torch.bfloat16)
    assert_same_bits(rows_in_order(x_TD, format), in_order(expected))


def test_rows_in_order_of_any_strides(kernel_device, assert_same_bits):
    x_TD = torch.randn(64, 40).to(kernel_device, torch.bfloat16)
    assert_same_bits(rows_in_order(x_TD.T, None), in_order(x_TD.T))
    assert_same_bits(rows_in_order(x_TD[:, :32], MXFP8), rows_in_order(x_TD[:, :32].clone(), MXFP8))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [20, 300, 3000])
@EACH_PAIR
def test_a_configuration_is_chosen(pair, num_tokens, make_layer, make_layer_inputs, assert_agrees):
    case = (num_tokens, 8, 2, 512, 256)
    x_TD, weights_TA, ids_TA = make_layer_inputs(case)
    experts = make_layer(case, pair)
    options = {"activation_format": PAIRS[pair][1]}
    expected = fused_moe_reference(x_TD, experts, weights_TA, ids_TA, **options)
    y_TD = fused_moe_sm90(x_TD, experts, weights_TA, ids_TA, **options)
    # Of few values of h, one that is rounded to its neighbour weighs more.
    is_few = num_tokens <= 20 and PAIRS[pair][1] is not None
    assert_agrees(y_TD, expected, AGREES_OF_FEW_DB if is_few else AGREES_DB)


@EACH_PAIR
@pytest.mark.parametrize("case", [MANY, (3000, 8, 2, 144, 208)], ids=["many", "odd"])
def test_no_reason_against_what_it_takes(case, pair, make_layer):
    assert why_not(make_layer(case, pair, device="cpu"), PAIRS[pair][1]) is None


@pytest.mark.parametrize("format", [FP8_GROUP128, FP8_TENSOR], ids=["group", "tensor"])
def test_activations_must_be_known(format, make_layer):
    experts = make_layer(MANY, "block", device="cpu")
    assert "activations are neither bf16 nor MXFP8" in why_not(experts, format)


def test_weights_must_be_known():
    experts = ExpertWeights(torch.zeros(2, 256, 128), torch.zeros(2, 128, 128))
    assert "weights are not" in why_not(experts, None)
    experts = quantize_experts(experts, MXFP8)
    w13 = experts.w13.relayout(INTERLEAVED)
    assert "weights are not" in why_not(replace(experts, w13=w13), MXFP8)
    scattered = replace(experts.w2, data=experts.w2.data.mT)
    assert "weights are not" in why_not(replace(experts, w2=scattered), MXFP8)


def test_rows_and_scales_choose_the_tile(make_layer):
    few, many = WIDE_CONFIGS
    experts = make_layer(MANY, "mxfp8 x mxfp8", device="cpu")
    room = {"has_room": has_room(experts)}
    assert wide_config(8192, 2, 8, HOPPER, **room) == many
    assert wide_config(512, 2, 8, HOPPER, **room) == few
    assert wide_config(32, 2, 8, HOPPER, **room) is None
    assert wide_config(0, 2, 0, HOPPER, **room) is None
    assert wide_config(8192, 2, 8, replace(HOPPER, arch=100), **room) is None
    assert wide_config(8192, 2, 8, HOPPER, has_room=False) == few


@pytest.mark.parametrize(
    ("case", "pair", "expected"),
    [
        (MANY, "mxfp8 x mxfp8", True),
        (MANY, "channel", True),
        (MANY, "tensor", True),
        # Scales of a step are no word, or change by the step.
        ((0, 8, 2, 400, 256), "mxfp8 x mxfp8", False),
        (MANY, "block", False),
    ],
)
def test_room_for_a_large_tile(case, pair, expected, make_layer):
    assert has_room(make_layer(case, pair, device="cpu")) is expected
