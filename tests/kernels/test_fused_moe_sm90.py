"""What Hopper's kernels for layers of experts take, and which of them run it.

Claimed: what they do not take is refused with its reason, or goes elsewhere; what they take is the
reference's result on a GPU. `test_layers_sm90.py` has each family of them.
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
    FP8_TOKEN,
    MXFP8,
    MXFP8_2D,
    MXFP8_E5M2,
    SILU,
    Activation,
    ExpertWeights,
    Target,
    fused_moe,
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
# As of `test_layers_sm90.py`.
AGREES_DB, AGREES_OF_FEW_DB = 40.0, 33.0
HOPPER = Target("NVIDIA H200", arch=90, sms=132)

EACH_PAIR = pytest.mark.parametrize("pair", PAIRS)
EACH_CONFIG = pytest.mark.parametrize(
    "config", PREFILL_CONFIGS, ids=lambda config: f"{config.rows} rows"
)


@pytest.fixture
def make_layer(make_experts):
    def make(case, pair, activation=SILU, **options):
        options["is_static"] = pair == "tensor x static"
        return make_experts(case, (PAIRS | WIDE_PAIRS)[pair][0], activation, **options)

    return make


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [4, 20, 3000])
def test_auto_takes_it_where_it_can(num_tokens, make_layer, make_layer_inputs, assert_agrees):
    case = (num_tokens, 8, 2, 512, 256)
    x_TD, weights_TA, ids_TA = make_layer_inputs(case)
    for pair, (_, activation_format) in (PAIRS | WIDE_PAIRS).items():
        experts = make_layer(case, pair)
        options = {"activation_format": activation_format}
        expected = fused_moe_reference(x_TD, experts, weights_TA, ids_TA, **options)
        for backend in ("auto", "sm90"):
            y_TD = fused_moe(x_TD, experts, weights_TA, ids_TA, **options, backend=backend)
            # Of few values of h, one that is rounded to its neighbour weighs more.
            is_few = num_tokens <= (20 if activation_format in (MXFP8, MXFP8_E5M2) else 4)
            assert_agrees(y_TD, expected, AGREES_OF_FEW_DB if is_few else AGREES_DB)


@pytest.mark.gpu
def test_auto_goes_on_where_it_cannot(make_layer, make_layer_inputs, sqnr_db):
    x_TD, weights_TA, ids_TA = make_layer_inputs(ODD_STEPS)
    experts = make_layer(ODD_STEPS, "block x group", UNGATED)
    options = {"activation_format": FP8_GROUP128}
    expected = fused_moe_reference(x_TD, experts, weights_TA, ids_TA, **options)
    assert sqnr_db(expected, fused_moe(x_TD, experts, weights_TA, ids_TA, **options)) > AGREES_DB
    with pytest.raises(NotImplementedError, match="sm90 cannot, a width of 208 is no multiple of"):
        fused_moe(x_TD, experts, weights_TA, ids_TA, **options, backend="sm90")


@pytest.fixture
def reason(make_layer):
    def reason_of(
        case=MANY,
        pair="block x group",
        activation=SILU,
        dtype=torch.bfloat16,
        format=None,
        is_weighted_first=False,
    ):
        experts = make_layer(case, pair, activation, device="cpu")
        x_TD = torch.empty(case[0], case[3], dtype=dtype)
        format = format or (PAIRS | WIDE_PAIRS)[pair][1]
        return why_not(x_TD, experts, case[2], format, is_weighted_first)

    return reason_of


@EACH_PAIR
def test_no_reason_against_what_it_takes(pair, reason):
    assert reason(pair=pair) is None
    assert reason((3000, 8, 2, 144, 384), pair) is None


@pytest.mark.parametrize("pair", WIDE_PAIRS)
def test_no_reason_against_what_meets_in_bf16(pair, reason):
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
def test_reasons_against_any_formats(options, said, pair, reason):
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
def test_reasons(options, said, reason):
    assert said in reason(**options)


@pytest.mark.parametrize("pair", ["block x group", "mxfp8 x mxfp8", "block"])
def test_places_must_fit_32_bits(pair, make_layer):
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


@pytest.fixture
def chosen(make_layer, hopper):
    def config_of(num_tokens, pair, num_choices=2):
        experts = make_layer(MANY, pair, device="cpu")
        x_TD = torch.empty(num_tokens, MANY[3], dtype=torch.bfloat16)
        return choose(x_TD, experts, num_choices, (PAIRS | WIDE_PAIRS)[pair][1])

    return config_of


@EACH_PAIR
def test_rows_of_an_expert_choose_the_kernels(pair, chosen, hopper):
    few = None if pair == "tensor x tensor" else decode_config(4, 2, 8, 256, 512, hopper)
    assert chosen(4, pair) == few
    assert chosen(100, pair) is None
    assert chosen(0, pair) is None
    assert [chosen(n, pair) for n in (400, 8192)] == [*PREFILL_CONFIGS]


@pytest.mark.parametrize("pair", WIDE_PAIRS)
def test_rows_of_an_expert_choose_the_kernels_where_operands_meet_in_bf16(pair, chosen, hopper):
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
def test_a_table_is_asked_for_what_can_run(pair, num_choices, kinds, chosen, hopper, monkeypatch):
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
def test_a_configuration_says_whose_kernels_run(
    pair, config, runs, make_layer, hopper, monkeypatch
):
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
