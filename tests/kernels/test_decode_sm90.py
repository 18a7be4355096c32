"""A layer of experts on Hopper, for few rows, against the reference; GPU only, but for choices.

Claimed: within rounding the reference's result for every pair of formats and activation that the
kernels take, whatever the routing, who sorts it and who quantises rows; two runs, a replay and
another order of experts have the same bits. What they do not take is refused with its reason.
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
    FP8_TOKEN,
    MXFP8,
    MXFP8_E5M2,
    SILU,
    SWIGLU_OAI,
    Activation,
    ExpertWeights,
    Target,
    quantize_experts,
)
from octomoe.kernels.decode_moe_sm90 import fused_moe as decode
from octomoe.kernels.decode_moe_sm90 import why_not
from octomoe.reference.fused_moe import fused_moe as fused_moe_reference
from octomoe.tune.configs import DecodeConfig
from octomoe.tune.fused_moe import decode_config

PAIRS = {
    "block x group": (FP8_BLOCK128, FP8_GROUP128),
    "channel x token": (FP8_CHANNEL, FP8_TOKEN),
    "tensor x static": (FP8_TENSOR, FP8_TENSOR),
    "expert x token": (FP8_EXPERT, FP8_TOKEN),
    "block x bf16": (FP8_BLOCK128, None),
    "channel x bf16": (FP8_CHANNEL, None),
    "mxfp8 x mxfp8": (MXFP8, MXFP8),
}
CONFIGS = {
    "two parts": DecodeConfig(8, 128, splits=2, up_stages=4, down_stages=2, combined=128),
    "four parts, quantised before": DecodeConfig(
        8, 128, splits=4, up_stages=4, down_stages=2, combined=128, is_encoded=True
    ),
    "sorted before": DecodeConfig(8, 256, up_stages=4, down_stages=3, is_sorted=True),
    "few rows": DecodeConfig(8, 256, up_stages=6, down_stages=3, is_encoded=True, is_sorted=True),
    "some rows": DecodeConfig(16, 256, up_stages=5, down_stages=3, is_encoded=True, is_sorted=True),
    "parts of both depths": DecodeConfig(
        8, 128, splits=2, up_stages=4, down_stages=3, combined=128, down_splits=2
    ),
}
# tokens, experts, choices, hidden size, width
FEW = (40, 8, 2, 512, 256)
HOPPER = Target("NVIDIA H200", arch=90, sms=132)
# A value of h may be rounded to its neighbour; of few, one weighs more.
AGREES_DB, AGREES_OF_FEW_DB = 38.0, 33.0

MX = "mxfp8 x mxfp8"
NOT_MX = [pair for pair in PAIRS if pair != MX]
EACH_PAIR = pytest.mark.parametrize("pair", PAIRS)
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def config_for(pair, config):
    """Of 16 rows in four pieces, products fill the registers."""
    return replace(config, rows=8) if PAIRS[pair][1] == MXFP8 else config


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
    experts = quantize_experts(experts, PAIRS[pair][0])
    if pair == "tensor x static":
        scale, scale_mid = torch.tensor([[0.012], [0.03]], device=device)
        experts = replace(experts, w13_input_scale=scale, w2_input_scale=scale_mid)
    return experts


def make_inputs(case, draw_ids, pattern="any", num_global=None):
    num_tokens, num_experts, num_choices, hidden_size, _ = case
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(num_tokens, hidden_size, generator=generator).to("cuda", torch.bfloat16)
    weights_TA = torch.rand(num_tokens, num_choices, generator=generator)
    ids_TA = draw_ids(num_tokens, num_global or num_experts, num_choices, pattern, 3)
    # The weight of a dropped choice is never looked at.
    weights_TA[ids_TA < 0] = torch.nan
    return x_TD, weights_TA.cuda(), ids_TA.cuda()


def options_of(pair, expert_map=None):
    return {
        "activation_format": PAIRS[pair][1],
        "routed_scaling_factor": 1.5,
        "expert_map": expert_map,
    }


@pytest.fixture
def assert_agrees(sqnr_db):
    def check(inputs, experts, pair, config, expert_map=None):
        x_TD, weights_TA, ids_TA = inputs
        options, config = options_of(pair, expert_map), config_for(pair, config)
        expected = fused_moe_reference(x_TD, experts, weights_TA, ids_TA, **options)
        actual = decode(x_TD, experts, weights_TA, ids_TA, **options, config=config)
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.isfinite().all()
        if expected.any():
            least = AGREES_DB if x_TD.shape[0] > 8 else AGREES_OF_FEW_DB
            assert sqnr_db(expected, actual) > least
        else:
            assert not actual.any()

    return check


@pytest.mark.gpu
@EACH_PAIR
@EACH_CONFIG
@pytest.mark.parametrize("pattern", ["any", "one", "hole", "dropped", "none", "twice"])
def test_any_routing(pattern, config, pair, draw_ids, assert_agrees):
    experts = make_layer(FEW, pair)
    assert_agrees(make_inputs(FEW, draw_ids, pattern), experts, pair, config)


@pytest.mark.gpu
@EACH_PAIR
@pytest.mark.parametrize("config", [CONFIGS["two parts"], CONFIGS["few rows"]], ids=["sums", "h"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "activation",
    [
        SWIGLU_OAI,
        *map(Activation.parse, ("gelu", "gelu_tanh", "silu:output_limit=0.5", "relu2:ungated")),
    ],
    ids=lambda activation: activation.name,
)
def test_activations(activation, has_bias, pair, config, draw_ids, assert_agrees):
    experts = make_layer(FEW, pair, activation, has_bias=has_bias)
    assert_agrees(make_inputs(FEW, draw_ids), experts, pair, config)


@pytest.mark.gpu
@EACH_CONFIG
@pytest.mark.parametrize(
    ("case", "pair"),
    [
        *product([(1, 5, 3, 1040, 640), (9, 300, 10, 2048, 128), (333, 7, 3, 272, 384)], NOT_MX),
        *product([(1, 5, 3, 1024, 640), (9, 300, 10, 2048, 128), (333, 7, 3, 256, 384)], [MX]),
        # A depth of fewer steps than it has parts.
        *product([(50, 4, 3, 128, 256)], PAIRS),
        # Of scales that change by the step, a width is a multiple of 128.
        *product([(13, 7, 3, 400, 208)], ["channel x token", "tensor x static", "channel x bf16"]),
    ],
)
def test_sizes(case, pair, config, draw_ids, assert_agrees):
    experts = make_layer(case, pair, has_bias=True)
    assert_agrees(make_inputs(case, draw_ids), experts, pair, config)


@pytest.mark.gpu
@EACH_CONFIG
def test_local_experts(config, draw_ids, assert_agrees):
    case = (50, 4, 3, 384, 256)
    expert_map = torch.tensor([-1, 2, 0, -1, 3, 1, -1], device="cuda")
    inputs = make_inputs(case, draw_ids, "dropped", num_global=7)
    experts = make_layer(case, "block x group")
    assert_agrees(inputs, experts, "block x group", config, expert_map)


@pytest.mark.gpu
@EACH_CONFIG
@EACH_PAIR
def test_runs_and_orders_of_experts_have_the_same_bits(pair, config, draw_ids, assert_same_bits):
    experts = make_layer(FEW, pair)
    x_TD, weights_TA, ids_TA = make_inputs(FEW, draw_ids)
    options = options_of(pair) | {"config": config_for(pair, config)}
    expected = decode(x_TD, experts, weights_TA, ids_TA, **options)
    for _ in range(20):
        assert_same_bits(decode(x_TD, experts, weights_TA, ids_TA, **options), expected)
    if pair == "tensor x static":
        return
    order = torch.randperm(FEW[1], device="cuda")
    moved = replace(
        experts,
        w13=replace(experts.w13, data=experts.w13.data[order], scale=experts.w13.scale[order]),
        w2=replace(experts.w2, data=experts.w2.data[order], scale=experts.w2.scale[order]),
    )
    place = torch.argsort(order)
    assert_same_bits(decode(x_TD, moved, weights_TA, place[ids_TA], **options), expected)


@pytest.mark.gpu
@EACH_CONFIG
def test_a_graph_follows_the_routing(config, draw_ids, assert_same_bits):
    experts = make_layer(FEW, "block x group")
    x_TD, weights_TA, ids_TA = make_inputs(FEW, draw_ids)
    options = options_of("block x group") | {"config": config}
    decode(x_TD, experts, weights_TA, ids_TA, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = decode(x_TD, experts, weights_TA, ids_TA, **options)
    for pattern in ("one", "dropped", "none"):
        new_x_TD, new_weights_TA, new_ids_TA = make_inputs(FEW, draw_ids, pattern)
        x_TD.copy_(new_x_TD.flip(0))
        weights_TA.copy_(new_weights_TA)
        ids_TA.copy_(new_ids_TA)
        graph.replay()
        expected = decode(x_TD, experts, weights_TA, ids_TA, **options)
        assert_same_bits(out_TD, expected)


@pytest.mark.gpu
@EACH_CONFIG
@pytest.mark.parametrize("pair", ["block x group", "block x bf16", "mxfp8 x mxfp8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nan_stays_in_its_token(value, pair, config, draw_ids, assert_same_bits):
    experts = make_layer(FEW, pair)
    x_TD, weights_TA, ids_TA = make_inputs(FEW, draw_ids)
    options = options_of(pair) | {"config": config_for(pair, config)}
    clean_TD = decode(x_TD, experts, weights_TA, ids_TA, **options)
    x_TD[0, 7] = value
    y_TD = decode(x_TD, experts, weights_TA, ids_TA, **options)
    assert y_TD[0].isnan().all()
    assert_same_bits(y_TD[1:], clean_TD[1:])


@pytest.mark.gpu
def test_hidden_states_may_be_part_of_something(draw_ids, assert_same_bits):
    experts = make_layer(FEW, "block x group")
    x_TD, weights_TA, ids_TA = make_inputs(FEW, draw_ids)
    options = options_of("block x group") | {"config": CONFIGS["two parts"]}
    expected = decode(x_TD, experts, weights_TA, ids_TA, **options)
    wide = torch.full((FEW[0], FEW[3] + 8), torch.nan, dtype=x_TD.dtype, device="cuda")
    wide[:, 3:-5] = x_TD
    turned = weights_TA.T.contiguous().T, ids_TA.int().T.contiguous().T
    assert_same_bits(decode(wide[:, 3:-5], experts, *turned, **options), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("pair", ["block x bf16", "channel x bf16", "mxfp8 x mxfp8"])
def test_rows_of_any_magnitude(pair, draw_ids, assert_agrees):
    x_TD, weights_TA, ids_TA = make_inputs(FEW, draw_ids)
    # Over 60 octaves from row to row, over 12 within each.
    x_TD *= torch.logspace(-30, 30, FEW[0], base=2, device="cuda").unsqueeze(1)
    x_TD *= torch.logspace(-6, 6, FEW[3], base=2, device="cuda")
    x_TD[3] = 0
    experts = make_layer(FEW, pair, Activation.parse("relu2"))
    for row in range(FEW[0]):
        inputs = x_TD[row : row + 1], weights_TA[row : row + 1], ids_TA[row : row + 1]
        assert_agrees(inputs, experts, pair, CONFIGS["two parts"])


@pytest.mark.gpu
def test_a_scale_that_is_nan_spoils_its_row(draw_ids):
    experts = make_layer(FEW, MX)
    experts.w2.scale.view(torch.uint8)[:, 5, 1] = 0xFF
    x_TD, weights_TA, ids_TA = make_inputs(FEW, draw_ids)
    options = options_of(MX) | {"config": CONFIGS["two parts"]}
    y_TD = decode(x_TD, experts, weights_TA, ids_TA, **options)
    assert y_TD[:, 5].isnan().all()
    y_TD[:, 5] = 0
    assert y_TD.isfinite().all()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # tokens, choices, experts, width, depth
        ((1, 8, 128, 384, 4096), DecodeConfig(8, 128, 2, 4, 2, combined=128)),
        ((1, 9, 257, 256, 7168), DecodeConfig(8, 128, 4, 4, 2, combined=128)),
        ((3, 8, 128, 768, 2048), DecodeConfig(8, 128, 1, 4, 2, combined=128)),
        ((1, 8, 128, 768, 256), DecodeConfig(8, 128, 1, 4, 2, combined=128)),
        (
            (32, 8, 128, 384, 4096),
            DecodeConfig(8, 256, 1, 6, 3, is_encoded=True, is_sorted=True),
        ),
        (
            (512, 10, 512, 128, 2048),
            DecodeConfig(16, 256, 1, 5, 3, is_encoded=True, is_sorted=True),
        ),
        # Few wide experts: parts of both depths.
        ((1, 2, 8, 14336, 4096), DecodeConfig(8, 128, 1, 4, 5, combined=128, down_splits=4)),
        ((512, 8, 128, 384, 4096), None),
        ((0, 8, 128, 384, 4096), None),
        ((1, 0, 128, 384, 4096), None),
    ],
)
def test_what_a_heuristic_chooses(sizes, expected):
    assert decode_config(*sizes, HOPPER) == expected
    assert decode_config(*sizes, Target("NVIDIA A100", arch=80, sms=108)) is None


def test_rows_in_pieces_are_sorted_before():
    sizes = (32, 8, 128, 384, 4096)
    for pieces in (2, 4):
        expected = DecodeConfig(8, 256, 1, 5, 3, is_sorted=True)
        assert decode_config(*sizes, HOPPER, pieces=pieces) == expected
    many = (128, *sizes[1:])
    expected = DecodeConfig(16, 128, 1, 5, 4, is_sorted=True)
    assert decode_config(*many, HOPPER, pieces=2) == expected
    assert decode_config(*many, HOPPER, pieces=4) is None


def test_reasons():
    experts = make_layer(FEW, "tensor x static", device="cpu")
    assert why_not(experts, 8, FP8_TENSOR) is None
    assert why_not(experts, 63, FP8_TENSOR) == "tokens make 63 choices, more than 62"
    dynamic = replace(experts, w2_input_scale=None)
    said = "the intermediate has one scale, which all of its rows make"
    assert why_not(dynamic, 8, FP8_TENSOR) == said
    assert why_not(make_layer(FEW, "channel x token", device="cpu"), 8, FP8_TOKEN) is None
    assert why_not(experts, 8, None) is None
    assert why_not(make_layer(FEW, MX, device="cpu"), 8, MXFP8) is None
    said = "weights and activations are not both MXFP8 with E4M3"
    assert why_not(make_layer(FEW, MX, device="cpu"), 8, MXFP8_E5M2) == said
    said = "weights are not E4M3 with float32 scales of rows, or of 128 x 128 blocks"
    assert why_not(make_layer(FEW, MX, device="cpu"), 8, None) == said
    said = "sizes 512 and 224 are no multiples of 128"
    assert why_not(make_layer((40, 8, 2, 512, 224), MX, device="cpu"), 8, MXFP8) == said
