"""A layer of experts by each of Hopper's families of kernels, against the reference; GPU only.

Claimed: within rounding the reference's result for every pair of formats and activation that the
kernels take, whatever the routing, who sorts it and who quantises rows; two runs, a replay and
another order of experts have the same bits; a NaN stays in its token.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

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
)
from octomoe.core.formats import E5M2
from octomoe.core.layouts import GEMM_READY
from octomoe.kernels.decode_moe_sm90 import fused_moe as decode
from octomoe.kernels.fused_moe_sm90 import fused_moe as fused_moe_sm90
from octomoe.kernels.fused_moe_wide_sm90 import fused_moe as wide
from octomoe.kernels.fused_moe_wide_sm90 import has_room
from octomoe.reference.fused_moe import fused_moe as fused_moe_reference
from octomoe.tune.configs import DecodeConfig
from octomoe.tune.fused_moe import PREFILL_CONFIGS, WIDE_CONFIGS

pytestmark = pytest.mark.gpu

# Tensor cores keep some 14 bits of a sum in FP8, so that a value of h may be rounded to its
# neighbour: of few tokens' values, as of `decode`, one that is large weighs more.
AGREES_DB, DECODE_AGREES_DB, FEWEST_AGREE_DB = 40.0, 38.0, 33.0


@dataclass(frozen=True)
class Family:
    """Kernels that run a layer.

    Attributes:
        run: takes what the reference takes, and a configuration.
        pairs: formats of weights and of activations.
        configs: what heuristics choose, and what tables may.
        case: tokens, experts, choices, hidden size and width of most tests.
        sizes: the same of `test_sizes`, and the pairs that can do them, all if none is named.
    """

    run: Callable[..., torch.Tensor]
    pairs: dict[str, tuple]
    configs: dict[str, object]
    case: tuple[int, ...]
    sizes: dict[tuple[int, ...], tuple[str, ...]]


MANY = (300, 8, 2, 512, 256)
MX = "mxfp8 x mxfp8"
# Of what kernels for few rows take, which needs sizes of whole tiles in MXFP8.
NOT_MX = (
    "block x group",
    "channel x token",
    "tensor x static",
    "expert x token",
    "block x bf16",
    "channel x bf16",
)
FAMILIES = {
    "prefill": Family(
        fused_moe_sm90,
        {
            "block x group": (FP8_BLOCK128, FP8_GROUP128),
            "channel x token": (FP8_CHANNEL, FP8_TOKEN),
            "tensor x tensor": (FP8_TENSOR, FP8_TENSOR),
            "tensor x static": (FP8_TENSOR, FP8_TENSOR),
            "expert x token": (FP8_EXPERT, FP8_TOKEN),
        },
        {f"{config.rows} rows": config for config in PREFILL_CONFIGS},
        MANY,
        {
            (1, 5, 3, 1040, 640): (),
            (333, 7, 3, 272, 384): (),
            # Of scales that change by the step, a width is a multiple of 128.
            (333, 7, 3, 400, 208): ("channel x token", "tensor x tensor"),
            (0, 4, 2, 128, 128): (),
        },
    ),
    "wide": Family(
        wide,
        {
            "tensor": (FP8_TENSOR, None),
            "expert": (FP8_EXPERT, None),
            "channel": (FP8_CHANNEL, None),
            "channel e5m2": (FP8_CHANNEL.derive(element=E5M2), None),
            "block": (FP8_BLOCK128, None),
            "mxfp8": (MXFP8, None),
            MX: (MXFP8, MXFP8),
            "mxfp8_2d x mxfp8_e5m2": (MXFP8_2D, MXFP8_E5M2),
        },
        {f"{config.rows} rows": config for config in WIDE_CONFIGS},
        MANY,
        {
            (1, 5, 3, 1040, 640): (),
            (333, 7, 3, 272, 384): (),
            (333, 7, 3, 400, 208): (),
            (0, 4, 2, 128, 128): (),
        },
    ),
    "decode": Family(
        decode,
        {
            "block x group": (FP8_BLOCK128, FP8_GROUP128),
            "channel x token": (FP8_CHANNEL, FP8_TOKEN),
            "tensor x static": (FP8_TENSOR, FP8_TENSOR),
            "expert x token": (FP8_EXPERT, FP8_TOKEN),
            "block x bf16": (FP8_BLOCK128, None),
            "channel x bf16": (FP8_CHANNEL, None),
            MX: (MXFP8, MXFP8),
        },
        {
            "two parts": DecodeConfig(8, 128, 2, 4, 2, combined=128),
            "four parts, quantised before": DecodeConfig(
                8, 128, 4, 4, 2, combined=128, is_encoded=True
            ),
            "sorted before": DecodeConfig(8, 256, 1, 4, 3, is_sorted=True),
            "few rows": DecodeConfig(8, 256, 1, 6, 3, is_encoded=True, is_sorted=True),
            "some rows": DecodeConfig(16, 256, 1, 5, 3, is_encoded=True, is_sorted=True),
            "parts of both depths": DecodeConfig(8, 128, 2, 4, 3, combined=128, down_splits=2),
        },
        (40, 8, 2, 512, 256),
        {
            (1, 5, 3, 1040, 640): NOT_MX,
            (1, 5, 3, 1024, 640): (MX,),
            (9, 300, 10, 2048, 128): (),
            (333, 7, 3, 272, 384): NOT_MX,
            (333, 7, 3, 256, 384): (MX,),
            # A depth of fewer steps than it has parts.
            (50, 4, 3, 128, 256): (),
            # Of scales that change by the step, a width is a multiple of 128.
            (13, 7, 3, 400, 208): ("channel x token", "tensor x static", "channel x bf16"),
        },
    ),
}


class Kernels(NamedTuple):
    """What runs a layer, by names: of a family, of two formats, of a configuration."""

    family: str
    pair: str
    config: str

    @property
    def case(self):
        return FAMILIES[self.family].case

    @property
    def formats(self):
        return FAMILIES[self.family].pairs[self.pair]

    def __call__(self, x_TD, experts, weights_TA, ids_TA, **options):
        family = FAMILIES[self.family]
        config = family.configs[self.config]
        if self.family == "decode" and self.pair == MX:
            # Of 16 rows in four pieces, products fill the registers.
            config = replace(config, rows=8)
        options |= {"activation_format": self.formats[1], "config": config}
        return family.run(x_TD, experts, weights_TA, ids_TA, **options)


def kernels_of(name, pairs=(), configs=()):
    family = FAMILIES[name]
    return [
        Kernels(name, pair, config)
        for pair in pairs or family.pairs
        for config in configs or family.configs
    ]


EVERY = [kernels for family in FAMILIES for kernels in kernels_of(family)]
ACTIVATED = [
    *kernels_of("prefill"),
    *kernels_of("wide", pairs=("channel", "block", MX)),
    # Of configurations, where sums are put together, and where h is.
    *kernels_of("decode", configs=("two parts", "few rows")),
]
SAMPLES = [
    *kernels_of("prefill", pairs=("block x group",)),
    *kernels_of("wide", pairs=("channel", MX)),
    *kernels_of("decode", pairs=("block x group",)),
]
SIZED = [
    pytest.param(case, kernels, id=f"{'x'.join(map(str, case))}-{'-'.join(kernels)}")
    for name, family in FAMILIES.items()
    for case, pairs in family.sizes.items()
    for kernels in kernels_of(name, pairs)
]


# An infinity becomes NaN where rows are quantised, in pieces too.
SPOILED = [
    pytest.param(value, kernels, id=f"{value}-{'-'.join(kernels)}")
    for value, chosen in (
        (torch.nan, SAMPLES),
        (torch.nan, kernels_of("decode", pairs=("block x bf16", MX))),
        (torch.inf, kernels_of("decode", pairs=("block x group", "block x bf16", MX))),
    )
    for kernels in chosen
]


def each(kernels):
    return pytest.mark.parametrize("kernels", kernels, ids="-".join)


@pytest.fixture
def make_layer(make_experts):
    def make(kernels, case=None, activation=SILU, *, has_bias=False):
        is_static = kernels.pair == "tensor x static"
        options = {"has_bias": has_bias, "is_static": is_static}
        return make_experts(case or kernels.case, kernels.formats[0], activation, **options)

    return make


@pytest.fixture
def assert_right(assert_agrees):
    """Run a layer, and compare it with the reference."""

    def check(kernels, inputs, experts, **options):
        if kernels.config == "128 rows" and kernels.family == "wide" and not has_room(experts):
            pytest.skip("registers do not hold this tile and its scales")
        x_TD, weights_TA, ids_TA = inputs
        options |= {"routed_scaling_factor": 1.5}
        actual = kernels(x_TD, experts, weights_TA, ids_TA, **options)
        options |= {"activation_format": kernels.formats[1]}
        expected = fused_moe_reference(x_TD, experts, weights_TA, ids_TA, **options)
        least_db = AGREES_DB
        if kernels.family == "decode":
            least_db = DECODE_AGREES_DB if x_TD.shape[0] > 8 else FEWEST_AGREE_DB
        assert_agrees(actual, expected, least_db)

    return check


@each(EVERY)
@pytest.mark.parametrize("pattern", ["any", "one", "hole", "dropped", "none", "twice"])
def test_any_routing(pattern, kernels, make_layer, make_layer_inputs, assert_right):
    assert_right(kernels, make_layer_inputs(kernels.case, pattern), make_layer(kernels))


# SiLU is the other tests'.
@each(ACTIVATED)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "activation",
    [
        SWIGLU_OAI,
        *map(Activation.parse, ("gelu", "gelu_tanh", "silu:output_limit=0.5", "relu2:ungated")),
    ],
    ids=lambda activation: activation.name,
)
def test_activations(activation, has_bias, kernels, make_layer, make_layer_inputs, assert_right):
    experts = make_layer(kernels, activation=activation, has_bias=has_bias)
    assert_right(kernels, make_layer_inputs(kernels.case), experts)


@pytest.mark.parametrize(("case", "kernels"), SIZED)
def test_sizes(case, kernels, make_layer, make_layer_inputs, assert_right):
    assert_right(kernels, make_layer_inputs(case), make_layer(kernels, case, has_bias=True))


@each(SAMPLES)
def test_local_experts(kernels, kernel_device, make_layer, make_layer_inputs, assert_right):
    case = (50 if kernels.family == "decode" else 500, 4, 3, 384, 256)
    expert_map = torch.tensor([-1, 2, 0, -1, 3, 1, -1], device=kernel_device)
    inputs = make_layer_inputs(case, "dropped", num_global=7)
    assert_right(kernels, inputs, make_layer(kernels, case), expert_map=expert_map)


@each([*SAMPLES, *(one for one in kernels_of("decode") if one not in SAMPLES)])
def test_runs_and_orders_of_experts_have_the_same_bits(
    kernels, make_layer, make_layer_inputs, assert_same_bits
):
    experts = make_layer(kernels)
    x_TD, weights_TA, ids_TA = make_layer_inputs(kernels.case)
    expected = kernels(x_TD, experts, weights_TA, ids_TA)
    for _ in range(20):
        assert_same_bits(kernels(x_TD, experts, weights_TA, ids_TA), expected)
    order = torch.randperm(experts.num_experts, device=x_TD.device)

    def moved(w):
        # All experts may have one scale.
        scale = w.scale[order] if w.scale.shape[0] > 1 else w.scale
        return replace(w, data=w.data[order], scale=scale)

    experts = replace(experts, w13=moved(experts.w13), w2=moved(experts.w2))
    place = torch.argsort(order)
    assert_same_bits(kernels(x_TD, experts, weights_TA, place[ids_TA]), expected)


@each(SAMPLES)
def test_a_graph_follows_the_routing(kernels, make_layer, make_layer_inputs, assert_same_bits):
    experts = make_layer(kernels)
    x_TD, weights_TA, ids_TA = make_layer_inputs(kernels.case)
    kernels(x_TD, experts, weights_TA, ids_TA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = kernels(x_TD, experts, weights_TA, ids_TA)
    for pattern in ("one", "dropped", "none"):
        new_x_TD, new_weights_TA, new_ids_TA = make_layer_inputs(kernels.case, pattern)
        x_TD.copy_(new_x_TD.flip(0))
        weights_TA.copy_(new_weights_TA)
        ids_TA.copy_(new_ids_TA)
        graph.replay()
        assert_same_bits(out_TD, kernels(x_TD, experts, weights_TA, ids_TA))


@pytest.mark.parametrize(("value", "kernels"), SPOILED)
def test_a_nan_stays_in_its_token(value, kernels, make_layer, make_layer_inputs, assert_same_bits):
    experts = make_layer(kernels)
    x_TD, weights_TA, ids_TA = make_layer_inputs(kernels.case)
    clean_TD = kernels(x_TD, experts, weights_TA, ids_TA)
    # Slots of no token take the first token's row.
    x_TD[0, 7] = value
    y_TD = kernels(x_TD, experts, weights_TA, ids_TA)
    assert y_TD[0].isnan().all()
    assert_same_bits(y_TD[1:], clean_TD[1:])


def test_scales_in_another_layout(make_layer, make_layer_inputs, assert_right):
    kernels = Kernels("wide", MX, "64 rows")
    experts = make_layer(kernels)
    w13, w2 = (w.relayout(GEMM_READY) for w in (experts.w13, experts.w2))
    assert_right(kernels, make_layer_inputs(MANY), replace(experts, w13=w13, w2=w2))


@each(kernels_of("wide", pairs=("channel", "mxfp8"), configs=("128 rows",)))
def test_every_byte_of_a_weight_has_its_value(
    kernels, kernel_device, make_layer, make_layer_inputs, assert_right
):
    experts = make_layer(kernels)
    codes = torch.arange(256, dtype=torch.uint8, device=kernel_device)
    # NaN and its negative are no weights here.
    codes[[127, 255]] = 0
    data = codes.repeat(2).roll(1).view(experts.w13.data.dtype)
    data = data.expand(experts.w13.shape).contiguous()
    experts = replace(experts, w13=replace(experts.w13, data=data))
    assert_right(kernels, make_layer_inputs(MANY), experts)


def test_hidden_states_may_be_part_of_something(make_layer, make_layer_inputs, assert_same_bits):
    kernels = Kernels("decode", "block x group", "two parts")
    experts = make_layer(kernels)
    x_TD, weights_TA, ids_TA = make_layer_inputs(kernels.case)
    expected = kernels(x_TD, experts, weights_TA, ids_TA)
    broad = torch.full((len(x_TD), x_TD.shape[1] + 8), torch.nan, dtype=x_TD.dtype)
    broad = broad.to(x_TD.device)
    broad[:, 3:-5] = x_TD
    turned = weights_TA.T.contiguous().T, ids_TA.int().T.contiguous().T
    assert_same_bits(kernels(broad[:, 3:-5], experts, *turned), expected)


@pytest.mark.parametrize("pair", ["block x bf16", "channel x bf16", MX])
def test_rows_of_any_magnitude(pair, make_layer, make_layer_inputs, assert_right):
    kernels = Kernels("decode", pair, "two parts")
    x_TD, weights_TA, ids_TA = make_layer_inputs(kernels.case)
    # Over 60 octaves from row to row, over 12 within each.
    x_TD *= torch.logspace(-30, 30, x_TD.shape[0], base=2, device=x_TD.device).unsqueeze(1)
    x_TD *= torch.logspace(-6, 6, x_TD.shape[1], base=2, device=x_TD.device)
    x_TD[3] = 0
    experts = make_layer(kernels, activation=Activation.parse("relu2"))
    for row in range(x_TD.shape[0]):
        one = slice(row, row + 1)
        assert_right(kernels, (x_TD[one], weights_TA[one], ids_TA[one]), experts)


def test_a_scale_that_is_nan_spoils_its_row(make_layer, make_layer_inputs):
    kernels = Kernels("decode", MX, "two parts")
    experts = make_layer(kernels)
    experts.w2.scale.view(torch.uint8)[:, 5, 1] = 0xFF
    x_TD, weights_TA, ids_TA = make_layer_inputs(kernels.case)
    y_TD = kernels(x_TD, experts, weights_TA, ids_TA, routed_scaling_factor=1.5)
    assert y_TD[:, 5].isnan().all()
    y_TD[:, 5] = 0
    assert y_TD.isfinite().all()
