"""What `octomoe bench moe` times of ours is what the op runs, whatever kernels a layer takes.

Hopper is made up: its kernels are not run here, only called.
"""

from dataclasses import asdict
from itertools import product

import pytest

from octomoe.bench import ours
from octomoe.bench.layers import RECIPES, SCALING, Shape, make_experts, make_problem
from octomoe.core.device import Target
from octomoe.core.qtensor import QTensor
from octomoe.kernels import decode_moe_sm90 as decode
from octomoe.kernels import fused_moe as portable
from octomoe.kernels import fused_moe_sm90 as sm90
from octomoe.kernels import fused_moe_wide_sm90 as wide
from octomoe.kernels.fused_rows_wide_sm90 import rows_in_order
from octomoe.tune.configs import DecodeConfig, FusedMoeConfig
from octomoe.tune.fused_moe import PREFILL_CONFIGS, WIDE_CONFIGS, decode_config

SHAPE = Shape("", 3, 128, 128, 2)
HOPPER = Target("a GPU that nobody has", arch=90, sms=132, smem=232448)


@pytest.fixture
def hopper(monkeypatch):
    for module in (ours, sm90):
        monkeypatch.setattr(module, "target_of", lambda _: HOPPER)


@pytest.fixture
def make(kernel_device):
    def make(recipe, num_tokens):
        experts = make_experts(SHAPE, kernel_device, RECIPES[recipe])
        return make_problem(SHAPE, experts, num_tokens, RECIPES[recipe])

    return make


@pytest.mark.parametrize("num_tokens", [64, 65], ids=["128 choices", "130 choices"])
@pytest.mark.parametrize(
    "recipe", ["block128", "tensor-static", "channel", "expert", "mxfp8", "weight-only"]
)
def test_few_rows_are_prepared_as_by_the_op(recipe, num_tokens, make, monkeypatch):
    problem, calls = make(recipe, num_tokens), []

    def forward(x, experts, topk_weights, topk_ids, routed, *, config, **options):
        options.pop("expert_map", None)
        calls.append((isinstance(x, QTensor), routed is None, config, options))

    monkeypatch.setattr(decode, "experts_forward", forward)
    monkeypatch.setattr(decode, "quantize", lambda *args, **options: problem.x)
    monkeypatch.setattr(decode, "build_blocks", lambda *args, **options: ())
    monkeypatch.setattr(decode, "route_and_quantize", lambda *args, **options: (problem.x, ()))
    options = {"activation_format": RECIPES[recipe].activations, "routed_scaling_factor": SCALING}
    for is_encoded, is_sorted in product((False, True), repeat=2):
        config = DecodeConfig(is_encoded=is_encoded, is_sorted=is_sorted)
        ours.run_config(problem, config)()
        decode.fused_moe(
            problem.hidden_TD,
            problem.experts,
            problem.topk_weights_TA,
            problem.topk_ids_TA,
            **options,
            expert_map=None,
            config=config,
        )
        timed, run = calls[-2:]
        assert timed == run


def test_rows_that_meet_in_8_bits_are_quantised_before(make):
    problem = make("block128", 5)
    run = ours.run_config(problem, PREFILL_CONFIGS[0])
    assert run.func is sm90.experts_forward
    assert run.args[0] is problem.x


@pytest.mark.parametrize("recipe", ["mxfp8", "weight-only"])
def test_rows_that_meet_in_bf16_are_in_order(recipe, make, assert_same_bits):
    problem = make(recipe, 5)
    run = ours.run_config(problem, WIDE_CONFIGS[0])
    assert run.func is wide.experts_forward
    assert_same_bits(run.args[0], rows_in_order(problem.hidden_TD, RECIPES[recipe].activations))


@pytest.mark.parametrize(
    ("recipe", "num_tokens", "config", "is_fused"),
    [
        ("block128", 1, decode_config(1, 2, 3, 128, 128, HOPPER), True),
        ("block128", 20, None, True),
        ("block128", 200, PREFILL_CONFIGS[0], True),
        ("tensor", 1, None, True),
        ("weight-only", 1, decode_config(1, 2, 3, 128, 128, HOPPER, pieces=2), True),
        ("weight-only", 40, WIDE_CONFIGS[0], True),
        ("mxfp8", 1, decode_config(1, 2, 3, 128, 128, HOPPER, pieces=4), False),
        ("mxfp8", 40, WIDE_CONFIGS[0], False),
    ],
)
def test_hoppers_kernels_are_timed_beside_those_for_any_device(
    recipe, num_tokens, config, is_fused, make, hopper
):
    problem = make(recipe, num_tokens)
    any_device = ours.portable_config(problem)
    assert isinstance(any_device, FusedMoeConfig) is is_fused
    assert ours.looked_up(problem) == (config or any_device)
    found = ours.kernel_contenders(problem)
    said = asdict(any_device) if is_fused else "op by op"
    expected = {"octomoe": asdict(config) if config else said}
    expected |= {"portable": said} if config else {}
    assert {name: c.config for name, c in found.items() if name != "octomoe op"} == expected
    if is_fused:
        assert found["portable" if config else "octomoe"].run.func is portable.experts_forward
    assert ("portable" in ours.layer_contenders(problem)) is (config is not None)
