"""`fused_moe` in Triton: whatever the formats, the options and the tiles, the reference's layer.

Claimed: its output is within 45 dB of the reference's fed with the same weights, routing and hidden
states (most of the noise is of y, which is rounded to bf16), and within 40 dB on a GPU; two runs
have the same bits; a token with a NaN does not touch the others. Memory that nobody wrote is NaN.
"""

from dataclasses import replace
from functools import partial

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
    RELU2,
    SILU,
    SWIGLU_OAI,
    Activation,
    Target,
    fused_moe,
)
from octomoe.core.formats import E4M3_240, E5M2
from octomoe.kernels.fused_moe import fused_moe as fused_moe_triton
from octomoe.kernels.fused_moe import is_fused
from octomoe.reference.fused_moe import fused_moe as fused_moe_reference
from octomoe.tune.configs import ExpertTileConfig, FusedMoeConfig
from octomoe.tune.fused_moe import fused_moe_config

# tokens, experts, choices, pattern of the ids, D, F
CASES = {
    "zero tokens": (0, 4, 2, "any", 64, 32),
    "one token": (1, 4, 2, "any", 256, 128),
    "all to one": (9, 4, 1, "one", 128, 32),
    "all dropped": (3, 4, 2, "none", 64, 32),
    "divides nothing": (17, 5, 3, "dropped", 131, 67),
    "two blocks": (40, 3, 1, "hole", 256, 144),
    "real": pytest.param((64, 32, 4, "any", 2048, 768), marks=pytest.mark.full),
}
MIXED, EVEN = CASES["divides nothing"], (20, 2, 1, "any", 128, 128)
PAIRS = {
    "unquantised": (None, None),
    "tensor x tensor": (FP8_TENSOR, FP8_TENSOR),
    "tensor x static": (FP8_TENSOR, FP8_TENSOR),
    "tensor x token": (FP8_TENSOR, FP8_TOKEN),
    "channel x token": (FP8_CHANNEL, FP8_TOKEN),
    "expert x token": (FP8_EXPERT, FP8_TOKEN),
    "block x group": (FP8_BLOCK128, FP8_GROUP128),
    "block x group, pow2": (
        FP8_BLOCK128.derive(rounding="pow2"),
        FP8_GROUP128.derive(rounding="pow2"),
    ),
    "block x group, e5m2": (FP8_BLOCK128.derive(element=E5M2), FP8_GROUP128.derive(element=E5M2)),
    "block x group, 240": (
        FP8_BLOCK128.derive(element=E4M3_240),
        FP8_GROUP128.derive(element=E4M3_240),
    ),
    "mx x mx": (MXFP8, MXFP8),
    "channel": (FP8_CHANNEL, None),
    "block": (FP8_BLOCK128, None),
    "mx": (MXFP8, None),
}
# On a GPU the tensor cores' sums are less exact in FP8, and more of h rounds to the other side.
AGREES_DB = 40.0 if torch.cuda.is_available() else 45.0
FEW = FusedMoeConfig(ExpertTileConfig(16, 64), ExpertTileConfig(16, 64), is_swapped=True)
MANY = FusedMoeConfig(ExpertTileConfig(64, 128), ExpertTileConfig(64, 64))
CONFIGS = {
    "few": FEW,
    "split": replace(FEW, up=ExpertTileConfig(16, 32, splits=3, unroll=2)),
    "more splits than steps": replace(FEW, up=ExpertTileConfig(16, 128, splits=4)),
    "several tiles": replace(FEW, down=ExpertTileConfig(16, 64, tiles=3)),
    "rows that stay": replace(FEW, down=ExpertTileConfig(16, 32, tiles=4, held=256)),
    "few, by TMA": replace(FEW, has_descriptors=True),
    "many": MANY,
    "many, split": replace(MANY, up=ExpertTileConfig(32, 64, splits=2)),
    "other rows below": replace(MANY, down=ExpertTileConfig(16, 64, tiles=2, held=256)),
    "other rows above": replace(MANY, up=ExpertTileConfig(32, 128)),
    "many, by TMA": replace(MANY, has_descriptors=True),
}


@pytest.fixture
def make_layer(make_experts):
    def make(case, pair, activation=SILU, dtype=torch.bfloat16, has_bias=True):
        is_static = pair == "tensor x static"
        options = {"has_bias": has_bias, "is_static": is_static, "dtype": dtype}
        return make_experts(case, PAIRS[pair][0], activation, **options)

    return make


@pytest.fixture
def make_inputs(make_layer_inputs):
    return lambda case, **options: make_layer_inputs(case, case[3], **options)


@pytest.fixture
def assert_agrees(assert_agrees):
    return partial(assert_agrees, least_db=AGREES_DB)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("pair", PAIRS)
def test_equals_the_reference(pair, case, make_layer, make_inputs, assert_agrees):
    experts = make_layer(case, pair)
    x_TD, weights_TA, ids_TA = make_inputs(case)
    options = {"activation_format": PAIRS[pair][1], "routed_scaling_factor": 2.5}
    actual = fused_moe(x_TD, experts, weights_TA, ids_TA, **options, backend="triton")
    assert_agrees(
        actual, fused_moe(x_TD, experts, weights_TA, ids_TA, **options, backend="reference")
    )


@pytest.mark.parametrize(
    ("pair", "config"),
    [
        *(("block x group", config) for config in CONFIGS),
        *(
            (pair, c)
            for pair in ("channel x token", "block", "unquantised")
            for c in ("few", "many")
        ),
    ],
)
def test_tiles_do_not_matter(pair, config, make_layer, make_inputs, assert_agrees):
    config = CONFIGS[config]
    case = (19, 3, 2, "hole", 256, 80) if config.has_descriptors else MIXED
    experts = make_layer(case, pair)
    x_TD, weights_TA, ids_TA = make_inputs(case)
    format = PAIRS[pair][1]
    actual = fused_moe_triton(
        x_TD, experts, weights_TA, ids_TA, activation_format=format, config=config
    )
    expected = fused_moe_reference(x_TD, experts, weights_TA, ids_TA, activation_format=format)
    assert_agrees(actual, expected)


@pytest.mark.parametrize("config", [CONFIGS["split"], MANY], ids=["split", "many"])
@pytest.mark.parametrize(
    "activation",
    [
        RELU2,
        SWIGLU_OAI,
        *map(Activation.parse, ("gelu", "gelu_tanh", "silu:output_limit=0.5", "relu2:ungated")),
    ],
    ids=lambda activation: activation.name,
)
def test_activations(activation, config, make_layer, make_inputs, assert_agrees):
    experts = make_layer(MIXED, "block x group", activation, has_bias=False)
    x_TD, weights_TA, ids_TA = make_inputs(MIXED)
    options = {"activation_format": FP8_GROUP128}
    actual = fused_moe_triton(x_TD, experts, weights_TA, ids_TA, **options, config=config)
    assert_agrees(actual, fused_moe_reference(x_TD, experts, weights_TA, ids_TA, **options))


@pytest.mark.parametrize("pair", ["block x group", "channel x token", "mx x mx", "block"])
@pytest.mark.parametrize(
    "options",
    [
        {"apply_router_weight_on_input": True},
        {"expert_map": [-1, 2, 0, -1, 3, 1, -1]},
        {"expert_map": [-1, 2, 0, -1, 3, 1, -1], "apply_router_weight_on_input": True},
    ],
    ids=["weight on input", "local experts", "both"],
)
def test_options(options, pair, kernel_device, make_layer, make_inputs, assert_agrees):
    case = (17, 4, 3, "dropped", 160, 72)
    experts = make_layer(case, pair)
    num_global = 7 if "expert_map" in options else 4
    x_TD, weights_TA, ids_TA = make_inputs(case, num_global=num_global)
    if "expert_map" in options:
        expert_map = torch.tensor(options["expert_map"], device=kernel_device)
        options = options | {"expert_map": expert_map}
    options = options | {"activation_format": PAIRS[pair][1]}
    actual = fused_moe(x_TD, experts, weights_TA, ids_TA, **options, backend="triton")
    assert_agrees(
        actual, fused_moe(x_TD, experts, weights_TA, ids_TA, **options, backend="reference")
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pair", ["unquantised", "block x group", "channel"])
def test_dtypes(pair, dtype, make_layer, make_inputs, assert_agrees):
    experts = make_layer(MIXED, pair, dtype=dtype)
    x_TD, weights_TA, ids_TA = make_inputs(MIXED, dtype=dtype)
    options = {"activation_format": PAIRS[pair][1]}
    actual = fused_moe(x_TD, experts, weights_TA, ids_TA, **options, backend="triton")
    assert_agrees(
        actual, fused_moe(x_TD, experts, weights_TA, ids_TA, **options, backend="reference")
    )


def test_hidden_states_and_weights_of_any_strides(make_layer, make_inputs, assert_agrees):
    experts = make_layer(MIXED, "channel")
    x_TD, weights_TA, ids_TA = make_inputs(MIXED)
    expected = fused_moe_reference(x_TD, experts, weights_TA, ids_TA)
    x_TD, weights_TA = x_TD.T.contiguous().T, weights_TA.T.contiguous().T
    assert_agrees(fused_moe_triton(x_TD, experts, weights_TA, ids_TA), expected)


@pytest.mark.parametrize("config", [CONFIGS["split"], MANY], ids=["split", "many"])
def test_two_runs_have_the_same_bits(config, make_layer, make_inputs, assert_same_bits):
    experts = make_layer(EVEN, "block x group")
    x_TD, weights_TA, ids_TA = make_inputs(EVEN)
    first, second = (
        fused_moe_triton(
            x_TD, experts, weights_TA, ids_TA, activation_format=FP8_GROUP128, config=config
        )
        for _ in range(2)
    )
    assert_same_bits(first, second)


@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
def test_a_nan_stays_in_its_token(config, make_layer, make_inputs, assert_same_bits):
    experts = make_layer(EVEN, "block x group")
    x_TD, weights_TA, ids_TA = make_inputs(EVEN)
    options = {"activation_format": FP8_GROUP128, "config": config}
    clean_TD = fused_moe_triton(x_TD, experts, weights_TA, ids_TA, **options)
    x_TD[5, 7] = torch.nan
    y_TD = fused_moe_triton(x_TD, experts, weights_TA, ids_TA, **options)
    assert y_TD[5].isnan().all()
    rest = torch.arange(len(y_TD)) != 5
    assert_same_bits(y_TD[rest], clean_TD[rest])


@pytest.mark.gpu
@pytest.mark.plain_memory
def test_more_than_two_to_the_31_elements(make_layer, make_inputs, assert_agrees):
    case = (150_000, 8, 8, "any", 2048, 128)
    experts = make_layer(case, "block x group")
    x_TD, weights_TA, ids_TA = make_inputs(case)
    y_TD = fused_moe(
        x_TD, experts, weights_TA, ids_TA, activation_format=FP8_GROUP128, backend="triton"
    )
    # Slots of the last expert lie past 2^31 elements of y_SD, and every token has one there.
    for some in (slice(16), slice(-16, None)):
        expected = fused_moe_reference(
            x_TD[some], experts, weights_TA[some], ids_TA[some], activation_format=FP8_GROUP128
        )
        assert_agrees(y_TD[some], expected)


def test_what_is_fused(kernel_device, make_layer):
    def check(pair, dtype=torch.bfloat16):
        experts = make_layer(MIXED, pair)
        x_TD = torch.empty(1, MIXED[4], dtype=dtype, device=kernel_device)
        return is_fused(x_TD, experts, PAIRS[pair][1])

    assert {pair for pair in PAIRS if not check(pair)} == {"mx x mx", "mx"}
    assert not check("block x group", torch.float32)
    # float16 rows, bf16 weights.
    assert not check("unquantised", torch.float16)


def test_the_looked_up_configuration_can_run():
    """Whatever the layer, on Hopper and where shared memory is scarce."""
    hopper, cdna3 = Target("H200", arch=90, sms=132, smem=232448), Target("x", sms=304, smem=65536)
    for target in (hopper, cdna3):
        for num_tokens in (0, 1, 8, 300, 2048, 100_000):
            for num_experts, num_choices, width in ((0, 0, 8), (8, 2, 14336), (512, 10, 128)):
                for row_bytes, weight_bytes in ((1, 1), (2, 1), (2, 2)):
                    config = fused_moe_config(
                        num_tokens,
                        num_choices,
                        num_experts,
                        width,
                        row_bytes=row_bytes,
                        weight_bytes=weight_bytes,
                        target=target,
                    )
                    assert config.has_descriptors == (target is hopper)
                    for tile, parts in ((config.up, 2), (config.down, 1)):
                        assert tile.is_legal(row_bytes, weight_bytes, parts, target.smem)
                        assert tile.columns >= 16
