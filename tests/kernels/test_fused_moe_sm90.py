"""A layer of experts on Hopper, for many rows, against the reference; GPU only, but for choices.

Claimed: within rounding the reference's result for every pair of formats and activation that the
kernels take, whatever the routing; two runs, a replay and another order of experts have the same
bits. What they do not take is refused with its reason.
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
    MXFP8_2D,
    MXFP8_E5M2,
    SILU,
    SWIGLU_OAI,
    Activation,
    ExpertWeights,
    Target,
    fused_moe,
    quantize_experts,
)
from octomoe.core.formats import E5M2
from octomoe.kernels import decode_moe_sm90 as decode
from octomoe.kernels import fused_moe as portable
from octomoe.kernels import fused_moe_sm90 as sm90
from octomoe.kernels import fused_moe_wide_sm90 as wide
from octomoe.kernels.fused_moe_sm90 import choose, meets_in_8_bits, why_not
from octomoe.kernels.fused_moe_sm90 import fused_moe as fused_moe_sm90
from octomoe.reference.fused_moe import fused_moe as fused_moe_reference
from octomoe.tune.configs import DecodeConfig
from octomoe.tune.fused_moe import (
    PREFILL_CONFIGS,
    WIDE_CONFIGS,
    decode_config,
    fused_moe_config,
    prefill_config,
)

PAIRS = {
    "block x group": (FP8_BLOCK128, FP8_GROUP128),
    "channel x token": (FP8_CHANNEL, FP8_TOKEN),
    "tensor x tensor": (FP8_TENSOR, FP8_TENSOR),
    "tensor x static": (FP8_TENSOR, FP8_TENSOR),
    "expert x token": (FP8_EXPERT, FP8_TOKEN),
}
# Whose operands meet in bf16.
WIDE_PAIRS = {
    "mxfp8 x mxfp8": (MXFP8, MXFP8),
    "mxfp8_2d x mxfp8_e5m2": (MXFP8_2D, MXFP8_E5M2),
    "block": (FP8_BLOCK128, None),
    "channel e5m2": (FP8_CHANNEL.derive(element=E5M2), None),
}
# tokens, experts, choices, hidden size, width
MANY = (300, 8, 2, 512, 256)
ODD_ROWS, ODD_WIDTH = (3, 4, 2, 136, 128), (3, 4, 2, 512, 200)
# Widths of gated experts are padded to whole blocks.
ODD_STEPS, UNGATED = (300, 8, 2, 512, 208), Activation.parse("relu2:ungated")
# Tensor cores keep some 14 bits of a sum in FP8, so that a value of h may be rounded to its
# neighbour: of a hundred values, one that is large brings 35 dB.
AGREES_DB = 40.0
HOPPER = Target("NVIDIA H200", arch=90, sms=132)

EACH_PAIR = pytest.mark.parametrize("pair", PAIRS)
EACH_CONFIG = pytest.mark.parametrize(
    "config", PREFILL_CONFIGS, ids=lambda config: f"{config.rows} rows"
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
    experts = quantize_experts(experts, (PAIRS | WIDE_PAIRS)[pair][0])
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


@pytest.fixture
def assert_agrees(sqnr_db):
    def check(inputs, experts, pair, config, **options):
        x_TD, weights_TA, ids_TA = inputs
        options = options | {"activation_format": PAIRS[pair][1], "routed_scaling_factor": 1.5}
        expected = fused_moe_reference(x_TD, experts, weights_TA, ids_TA, **options)
        actual = fused_moe_sm90(x_TD, experts, weights_TA, ids_TA, **options, config=config)
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.isfinite().all()
        if expected.any():
            assert sqnr_db(expected, actual) > AGREES_DB
        else:
            assert not actual.any()

    return check


@pytest.mark.gpu
@EACH_PAIR
@EACH_CONFIG
@pytest.mark.parametrize("pattern", ["any", "one", "hole", "dropped", "none", "twice"])
def test_any_routing(pattern, config, pair, draw_ids, assert_agrees):
    experts = make_layer(MANY, pair)
    assert_agrees(make_inputs(MANY, draw_ids, pattern), experts, pair, config)


@pytest.mark.gpu
@EACH_CONFIG
@EACH_PAIR
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
        # Of scales that change by the step, a width is a multiple of 128.
        *product([(333, 7, 3, 400, 208)], ["channel x token", "tensor x tensor"]),
        *product([(0, 4, 2, 128, 128)], PAIRS),
    ],
)
def test_sizes(case, pair, config, draw_ids, assert_agrees):
    experts = make_layer(case, pair, has_bias=True)
    assert_agrees(make_inputs(case, draw_ids), experts, pair, config)


@pytest.mark.gpu
@EACH_CONFIG
def test_local_experts(config, draw_ids, assert_agrees):
    case = (500, 4, 3, 384, 256)
    expert_map = torch.tensor([-1, 2, 0, -1, 3, 1, -1], device="cuda")
    inputs = make_inputs(case, draw_ids, "dropped", num_global=7)
    experts = make_layer(case, "block x group")
    assert_agrees(inputs, experts, "block x group", config, expert_map=expert_map)


@pytest.mark.gpu
@EACH_CONFIG
def test_runs_and_orders_of_experts_have_the_same_bits(config, draw_ids, assert_same_bits):
    experts = make_layer(MANY, "block x group")
    x_TD, weights_TA, ids_TA = make_inputs(MANY, draw_ids)
    options = {"activation_format": FP8_GROUP128, "config": config}
    expected = fused_moe_sm90(x_TD, experts, weights_TA, ids_TA, **options)
    assert_same_bits(fused_moe_sm90(x_TD, experts, weights_TA, ids_TA, **options), expected)
    order = torch.randperm(MANY[1], device="cuda")
    moved = replace(
        experts,
        w13=replace(experts.w13, data=experts.w13.data[order], scale=experts.w13.scale[order]),
        w2=replace(experts.w2, data=experts.w2.data[order], scale=experts.w2.scale[order]),
    )
    place = torch.argsort(order)
    assert_same_bits(fused_moe_sm90(x_TD, moved, weights_TA, place[ids_TA], **options), expected)


@pytest.mark.gpu
@EACH_CONFIG
def test_a_graph_follows_the_routing(config, draw_ids, assert_same_bits):
    experts = make_layer(MANY, "block x group")
    x_TD, weights_TA, ids_TA = make_inputs(MANY, draw_ids)
    options = {"activation_format": FP8_GROUP128, "config": config}
    fused_moe_sm90(x_TD, experts, weights_TA, ids_TA, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = fused_moe_sm90(x_TD, experts, weights_TA, ids_TA, **options)
    for pattern in ("one", "dropped", "none"):
        new_x_TD, new_weights_TA, new_ids_TA = make_inputs(MANY, draw_ids, pattern)
        x_TD.copy_(new_x_TD.flip(0))
        weights_TA.copy_(new_weights_TA)
        ids_TA.copy_(new_ids_TA.expand_as(ids_TA))
        graph.replay()
        expected = fused_moe_sm90(x_TD, experts, weights_TA, ids_TA, **options)
        assert_same_bits(out_TD, expected)


@pytest.mark.gpu
def test_a_nan_stays_in_its_token(draw_ids, assert_same_bits):
    experts = make_layer(MANY, "block x group")
    x_TD, weights_TA, ids_TA = make_inputs(MANY, draw_ids)
    options = {"activation_format": FP8_GROUP128, "config": PREFILL_CONFIGS[0]}
    clean_TD = fused_moe_sm90(x_TD, experts, weights_TA, ids_TA, **options)
    # Slots of no token take the first token's row.
    x_TD[0, 7] = torch.nan
    y_TD = fused_moe_sm90(x_TD, experts, weights_TA, ids_TA, **options)
    assert y_TD[0].isnan().all()
    assert_same_bits(y_TD[1:], clean_TD[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [4, 20, 3000])
def test_auto_takes_it_where_it_can(num_tokens, draw_ids, sqnr_db):
    case = (num_tokens, 8, 2, 512, 256)
    x_TD, weights_TA, ids_TA = make_inputs(case, draw_ids)
    for pair, (_, activation_format) in (PAIRS | WIDE_PAIRS).items():
        experts = make_layer(case, pair)
        options = {"activation_format": activation_format}
        expected = fused_moe_reference(x_TD, experts, weights_TA, ids_TA, **options)
        for backend in ("auto", "sm90"):
            y_TD = fused_moe(x_TD, experts, weights_TA, ids_TA, **options, backend=backend)
            # Of few values of h, one that is rounded to its neighbour weighs more.
            assert sqnr_db(expected, y_TD) > (AGREES_DB if num_tokens > 20 else 33.0)


@pytest.mark.gpu
def test_auto_goes_on_where_it_cannot(draw_ids, sqnr_db):
    x_TD, weights_TA, ids_TA = make_inputs(ODD_STEPS, draw_ids)
    experts = make_layer(ODD_STEPS, "block x group", UNGATED)
    options = {"activation_format": FP8_GROUP128}
    expected = fused_moe_reference(x_TD, experts, weights_TA, ids_TA, **options)
    assert sqnr_db(expected, fused_moe(x_TD, experts, weights_TA, ids_TA, **options)) > AGREES_DB
    with pytest.raises(NotImplementedError, match="sm90 cannot, a width of 208 is no multiple of"):
        fused_moe(x_TD, experts, weights_TA, ids_TA, **options, backend="sm90")


def reason(
    case=MANY,
    pair="block x group",
    activation=SILU,
    dtype=torch.bfloat16,
    format=None,
    **options,
):
    experts = make_layer(case, pair, activation, device="cpu")
    x_TD = torch.empty(case[0], case[3], dtype=dtype)
    is_weighted_first = options.get("is_weighted_first", False)
    format = format or (PAIRS | WIDE_PAIRS)[pair][1]
    return why_not(x_TD, experts, case[2], format, is_weighted_first)


@EACH_PAIR
def test_no_reason_against_what_it_takes(pair):
    assert reason(pair=pair) is None
    assert reason((3000, 8, 2, 144, 384), pair) is None


@pytest.mark.parametrize("pair", WIDE_PAIRS)
def test_no_reason_against_what_meets_in_bf16(pair):
    assert reason(pair=pair) is None
    # A step may be no whole tile.
    assert reason((3000, 8, 2, 144, 208), pair) is None


@pytest.mark.parametrize("pair", PAIRS | WIDE_PAIRS)
def test_in_how_many_bits_operands_meet(pair):
    assert meets_in_8_bits((PAIRS | WIDE_PAIRS)[pair][1]) is (pair in PAIRS)


@pytest.mark.parametrize("pair", ["channel x token", "mxfp8 x mxfp8", "channel e5m2"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": torch.float16}, "hidden states are torch.float16, not bfloat16"),
        ({"is_weighted_first": True}, "rows are weighted before the experts"),
        ({"case": ODD_ROWS}, "sizes 136 and 128 are no multiples of 16"),
        ({"case": ODD_WIDTH}, "sizes 512 and 200 are no multiples of 16"),
        # What is said first.
        ({"dtype": torch.float16, "is_weighted_first": True}, "hidden states are"),
        ({"is_weighted_first": True, "case": ODD_ROWS}, "rows are weighted before the experts"),
    ],
)
def test_reasons_against_any_formats(options, said, pair):
    assert said in reason(pair=pair, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"case": ODD_STEPS, "activation": UNGATED}, "a width of 208 is no multiple of 128"),
        ({"pair": "channel x token", "format": FP8_GROUP128}, "weights are not E4M3 with"),
        # Nor do these meet in bf16.
        ({"format": FP8_GROUP128.derive(element=E5M2)}, "activations are not E4M3 with float32"),
        ({"pair": "channel e5m2", "format": FP8_TOKEN}, "weights are not E4M3 with float32"),
        ({"pair": "mxfp8 x mxfp8", "format": FP8_GROUP128}, "weights are not E4M3 with float32"),
    ],
)
def test_reasons(options, said):
    assert said in reason(**options)


@pytest.mark.parametrize("pair", ["block x group", "mxfp8 x mxfp8", "block"])
def test_places_must_fit_32_bits(pair):
    experts = make_layer(MANY, pair, device="cpu")
    rows_TD = torch.empty(1, 512, dtype=torch.bfloat16).expand(2**22, 512)
    format = (PAIRS | WIDE_PAIRS)[pair][1]
    assert "32 bits" in why_not(rows_TD, experts, 2, format, False)


def test_unquantised_weights_are_refused():
    experts = ExpertWeights(torch.zeros(2, 256, 128), torch.zeros(2, 128, 128))
    rows_TD = torch.empty(3, 128, dtype=torch.bfloat16)
    assert "weights are not" in why_not(rows_TD, experts, 2, FP8_GROUP128, False)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU that is made up, of which nothing was measured."""
    device = replace(HOPPER, name="a GPU that nobody has")
    monkeypatch.setattr(sm90, "target_of", lambda _: device)
    return device


def chosen(num_tokens, pair, num_choices=2):
    experts = make_layer(MANY, pair, device="cpu")
    x_TD = torch.empty(num_tokens, MANY[3], dtype=torch.bfloat16)
    return choose(x_TD, experts, num_choices, (PAIRS | WIDE_PAIRS)[pair][1])


@EACH_PAIR
def test_rows_of_an_expert_choose_the_kernels(pair, hopper):
    few = None if pair == "tensor x tensor" else decode_config(4, 2, 8, 256, 512, hopper)
    assert chosen(4, pair) == few
    assert chosen(100, pair) is None
    assert chosen(0, pair) is None
    assert [chosen(n, pair) for n in (400, 8192)] == [*PREFILL_CONFIGS]


@pytest.mark.parametrize("pair", WIDE_PAIRS)
def test_rows_of_an_expert_choose_the_kernels_where_operands_meet_in_bf16(pair, hopper):
    has_room = pair in ("mxfp8 x mxfp8", "mxfp8_2d x mxfp8_e5m2", "channel e5m2")
    pieces = {"block": 2, "mxfp8 x mxfp8": 4}.get(pair)
    few = pieces and decode_config(4, 2, 8, 256, 512, hopper, pieces=pieces)
    assert [chosen(n, pair) for n in (0, 4, 80)] == [None, few, None]
    assert [chosen(n, pair) for n in (400, 8192)] == [WIDE_CONFIGS[0], WIDE_CONFIGS[has_room]]


@pytest.mark.parametrize(
    ("pair", "num_choices", "kinds"),
    [
        ("block x group", 2, ("portable", "prefill", "decode")),
        ("tensor x static", 2, ("portable", "prefill", "decode")),
        # A scale that all rows of the intermediate make; more choices than kernels count.
        ("tensor x tensor", 2, ("portable", "prefill")),
        ("block x group", 63, ("portable", "prefill")),
    ],
)
def test_a_table_is_asked_for_what_can_run(pair, num_choices, kinds, hopper, monkeypatch):
    tuned, asked = DecodeConfig(16), []

    def table_config(*sizes, kinds):
        asked.append((sizes, kinds))
        return tuned

    monkeypatch.setattr(sm90, "table_config", table_config)
    assert chosen(4, pair, num_choices) is tuned
    scales = "block" if pair == "block x group" else "late"
    assert asked == [((4, num_choices, 8, 256, 512, scales, hopper), kinds)]


@pytest.mark.parametrize(
    ("pair", "config", "runs"),
    [
        ("block x group", DecodeConfig(), "decode"),
        ("block x group", PREFILL_CONFIGS[0], "prefill"),
        ("mxfp8 x mxfp8", WIDE_CONFIGS[0], "wide"),
        ("block", WIDE_CONFIGS[0], "wide"),
        ("block", fused_moe_config(4, 2, 8, 256, target=HOPPER), "portable"),
        ("mxfp8_2d x mxfp8_e5m2", None, "portable"),
    ],
)
def test_a_configuration_says_whose_kernels_run(pair, config, runs, hopper, monkeypatch):
    calls = []
    modules = {"decode": decode, "prefill": sm90, "wide": wide, "portable": portable}
    for name, module in modules.items():
        function = "_prefill" if name == "prefill" else "fused_moe"
        monkeypatch.setattr(
            module, function, lambda *args, name=name, **options: calls.append((name, options))
        )
    x_TD = torch.empty(4, MANY[3], dtype=torch.bfloat16)
    weights_TA, ids_TA = torch.empty(4, 2), torch.zeros(4, 2, dtype=torch.int32)
    expert_map = torch.arange(8)
    options = {
        "activation_format": (PAIRS | WIDE_PAIRS)[pair][1],
        "routed_scaling_factor": 1.5,
        "expert_map": expert_map,
        "config": config,
    }
    fused_moe_sm90(x_TD, make_layer(MANY, pair, device="cpu"), weights_TA, ids_TA, **options)
    assert calls == [(runs, options)]


def test_few_rows_and_other_devices_have_no_prefill():
    assert prefill_config(8192, 8, 128, HOPPER) == PREFILL_CONFIGS[1]
    assert prefill_config(2048, 8, 128, HOPPER) == PREFILL_CONFIGS[0]
    assert prefill_config(512, 8, 128, HOPPER) is None
    assert prefill_config(0, 8, 0, HOPPER) is None
    assert prefill_config(8192, 8, 128, replace(HOPPER, arch=100)) is None
