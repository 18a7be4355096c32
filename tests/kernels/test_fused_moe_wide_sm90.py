"""A layer of experts on Hopper whose operands meet in bf16, against the reference.

Claimed: rows are put in order, and rounded, bit for bit. On a GPU, a layer is within rounding the
reference's result for every format of weights that the kernels take, with bf16 rows and with MXFP8,
whatever the routing and the activation; two runs, a replay and another order of experts have the
same bits. What they do not take is refused with its reason.
"""

from dataclasses import replace
from itertools import product

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
    SILU,
    SWIGLU_OAI,
    Activation,
    ExpertWeights,
    Target,
    quantize_experts,
)
from octomoe.core.formats import E5M2
from octomoe.core.layouts import GEMM_READY, INTERLEAVED
from octomoe.kernels.fused_moe_sm90 import fused_moe as fused_moe_sm90
from octomoe.kernels.fused_moe_wide_sm90 import fused_moe, has_room, why_not
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
AGREES_DB = 40.0
HOPPER = Target("NVIDIA H200", arch=90, sms=132)

EACH_PAIR = pytest.mark.parametrize("pair", PAIRS)
EACH_CONFIG = pytest.mark.parametrize(
    "config", WIDE_CONFIGS, ids=lambda config: f"{config.rows} rows"
)


def make_layer(case, pair, activation=SILU, *, has_bias=False, device="cuda"):
    _, num_experts, _, hidden_size, width = case
    generator = torch.Generator().manual_seed(1)
    rows = width * (2 if activation.gated else 1)

    def draw(*shape, deviation):
        values = deviation * torch.randn(shape, generator=generator)
        return values.to(device, torch.bfloat16)

    experts = ExpertWeights(
        draw(num_experts, rows, hidden_size, deviation=hidden_size**-0.5),
        draw(num_experts, hidden_size, width, deviation=width**-0.5),
        activation,
        draw(num_experts, rows, deviation=0.2) if has_bias else None,
        draw(num_experts, hidden_size, deviation=0.2) if has_bias else None,
    )
    return quantize_experts(experts, PAIRS[pair][0])


def make_inputs(case, draw_ids, pattern="any", num_global=None):
    num_tokens, num_experts, num_choices, hidden_size, _ = case
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(num_tokens, hidden_size, generator=generator).to("cuda", torch.bfloat16)
    weights_TA = torch.rand(num_tokens, num_choices, generator=generator)
    ids_TA = draw_ids(num_tokens, num_global or num_experts, num_choices, pattern, 3)
    # The weight of a dropped choice is never looked at.
    weights_TA[ids_TA < 0] = torch.nan
    return x_TD, weights_TA.cuda(), ids_TA.cuda()


def in_order(x_TD):
    """What `rows_in_order` says, in torch."""
    parts = x_TD.reshape(x_TD.shape[0], x_TD.shape[1] // 16, 4, 2, 2)
    return parts.transpose(2, 3).reshape(x_TD.shape)


@pytest.fixture
def assert_agrees(sqnr_db):
    def check(inputs, experts, pair, config, **options):
        if config.rows > 64 and not has_room(experts):
            pytest.skip("registers do not hold this tile and its scales")
        x_TD, weights_TA, ids_TA = inputs
        options = options | {"activation_format": PAIRS[pair][1], "routed_scaling_factor": 1.5}
        expected = fused_moe_reference(x_TD, experts, weights_TA, ids_TA, **options)
        actual = fused_moe(x_TD, experts, weights_TA, ids_TA, **options, config=config)
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.isfinite().all()
        if expected.any():
            assert sqnr_db(expected, actual) > AGREES_DB
        else:
            assert not actual.any()

    return check


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
@EACH_PAIR
@EACH_CONFIG
@pytest.mark.parametrize("pattern", ["any", "one", "hole", "dropped", "none", "twice"])
def test_any_routing(pattern, config, pair, draw_ids, assert_agrees):
    experts = make_layer(MANY, pair)
    assert_agrees(make_inputs(MANY, draw_ids, pattern), experts, pair, config)


@pytest.mark.gpu
@EACH_CONFIG
@pytest.mark.parametrize("pair", ["channel", "block", "mxfp8 x mxfp8"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "activation",
    [
        SILU,
        SWIGLU_OAI,
        *map(Activation.parse, ("gelu", "gelu_tanh", "silu:output_limit=0.5", "relu2:ungated")),
    ],
    ids=lambda activation: activation.name,
)
def test_activations(activation, has_bias, pair, config, draw_ids, assert_agrees):
    experts = make_layer(MANY, pair, activation, has_bias=has_bias)
    assert_agrees(make_inputs(MANY, draw_ids), experts, pair, config)


@pytest.mark.gpu
@EACH_CONFIG
@pytest.mark.parametrize(
    ("case", "pair"),
    [
        *product([(1, 5, 3, 1040, 640), (333, 7, 3, 272, 384)], PAIRS),
        *product([(333, 7, 3, 400, 208), (0, 4, 2, 128, 128)], PAIRS),
    ],
)
def test_sizes(case, pair, config, draw_ids, assert_agrees):
    experts = make_layer(case, pair, has_bias=True)
    assert_agrees(make_inputs(case, draw_ids), experts, pair, config)


@pytest.mark.gpu
def test_scales_in_another_layout(draw_ids, assert_agrees):
    experts = make_layer(MANY, "mxfp8 x mxfp8")
    w13, w2 = (w.relayout(GEMM_READY) for w in (experts.w13, experts.w2))
    experts = replace(experts, w13=w13, w2=w2)
    assert_agrees(make_inputs(MANY, draw_ids), experts, "mxfp8 x mxfp8", WIDE_CONFIGS[0])


@pytest.mark.gpu
@EACH_CONFIG
@pytest.mark.parametrize("pair", ["channel", "mxfp8 x mxfp8"])
def test_local_experts(pair, config, draw_ids, assert_agrees):
    case = (500, 4, 3, 384, 256)
    expert_map = torch.tensor([-1, 2, 0, -1, 3, 1, -1], device="cuda")
    inputs = make_inputs(case, draw_ids, "dropped", num_global=7)
    assert_agrees(inputs, make_layer(case, pair), pair, config, expert_map=expert_map)


@pytest.mark.gpu
@EACH_CONFIG
@pytest.mark.parametrize("pair", ["channel", "mxfp8 x mxfp8"])
def test_runs_and_orders_of_experts_have_the_same_bits(pair, config, draw_ids, assert_same_bits):
    experts = make_layer(MANY, pair)
    x_TD, weights_TA, ids_TA = make_inputs(MANY, draw_ids)
    options = {"activation_format": PAIRS[pair][1], "config": config}
    expected = fused_moe(x_TD, experts, weights_TA, ids_TA, **options)
    assert_same_bits(fused_moe(x_TD, experts, weights_TA, ids_TA, **options), expected)
    order = torch.randperm(MANY[1], device="cuda")
    moved = replace(
        experts,
        w13=replace(experts.w13, data=experts.w13.data[order], scale=experts.w13.scale[order]),
        w2=replace(experts.w2, data=experts.w2.data[order], scale=experts.w2.scale[order]),
    )
    place = torch.argsort(order)
    assert_same_bits(fused_moe(x_TD, moved, weights_TA, place[ids_TA], **options), expected)


@pytest.mark.gpu
@EACH_CONFIG
def test_a_graph_follows_the_routing(config, draw_ids, assert_same_bits):
    experts = make_layer(MANY, "mxfp8 x mxfp8")
    x_TD, weights_TA, ids_TA = make_inputs(MANY, draw_ids)
    options = {"activation_format": MXFP8, "config": config}
    fused_moe(x_TD, experts, weights_TA, ids_TA, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = fused_moe(x_TD, experts, weights_TA, ids_TA, **options)
    for pattern in ("one", "dropped", "none"):
        new_x_TD, new_weights_TA, new_ids_TA = make_inputs(MANY, draw_ids, pattern)
        x_TD.copy_(new_x_TD.flip(0))
        weights_TA.copy_(new_weights_TA)
        ids_TA.copy_(new_ids_TA.expand_as(ids_TA))
        graph.replay()
        expected = fused_moe(x_TD, experts, weights_TA, ids_TA, **options)
        assert_same_bits(out_TD, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("pair", ["channel", "mxfp8 x mxfp8"])
def test_a_nan_stays_in_its_token(pair, draw_ids, assert_same_bits):
    experts = make_layer(MANY, pair)
    x_TD, weights_TA, ids_TA = make_inputs(MANY, draw_ids)
    options = {"activation_format": PAIRS[pair][1], "config": WIDE_CONFIGS[0]}
    clean_TD = fused_moe(x_TD, experts, weights_TA, ids_TA, **options)
    # Slots of no token take the first token's row.
    x_TD[0, 7] = torch.nan
    y_TD = fused_moe(x_TD, experts, weights_TA, ids_TA, **options)
    assert y_TD[0].isnan().all()
    assert_same_bits(y_TD[1:], clean_TD[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("pair", ["channel", "mxfp8"])
def test_every_byte_of_a_weight_has_its_value(pair, draw_ids, assert_agrees):
    experts = make_layer(MANY, pair)
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    # NaN and its negative are no weights here.
    codes[[127, 255]] = 0
    data = codes.repeat(2).roll(1).view(experts.w13.data.dtype)
    data = data.expand(experts.w13.shape).contiguous()
    experts = replace(experts, w13=replace(experts.w13, data=data))
    assert_agrees(make_inputs(MANY, draw_ids), experts, pair, WIDE_CONFIGS[1])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [20, 300, 3000])
@EACH_PAIR
def test_a_configuration_is_chosen(pair, num_tokens, draw_ids, sqnr_db):
    case = (num_tokens, 8, 2, 512, 256)
    x_TD, weights_TA, ids_TA = make_inputs(case, draw_ids)
    experts = make_layer(case, pair)
    options = {"activation_format": PAIRS[pair][1]}
    expected = fused_moe_reference(x_TD, experts, weights_TA, ids_TA, **options)
    y_TD = fused_moe_sm90(x_TD, experts, weights_TA, ids_TA, **options)
    # Of few values of h, one that is rounded to its neighbour weighs more.
    assert sqnr_db(expected, y_TD) > (AGREES_DB if num_tokens > 20 else 33.0)


@EACH_PAIR
@pytest.mark.parametrize("case", [MANY, (3000, 8, 2, 144, 208)], ids=["many", "odd"])
def test_no_reason_against_what_it_takes(case, pair):
    assert why_not(make_layer(case, pair, device="cpu"), PAIRS[pair][1]) is None


@pytest.mark.parametrize("format", [FP8_GROUP128, FP8_TENSOR], ids=["group", "tensor"])
def test_activations_must_be_known(format):
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


def test_rows_and_scales_choose_the_tile():
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
def test_room_for_a_large_tile(case, pair, expected):
    assert has_room(make_layer(case, pair, device="cpu")) is expected
