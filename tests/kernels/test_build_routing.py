"""`build_routing` in Triton equals the reference bit for bit, in one launch and in three.

`build_blocks` makes the same routing, and says whose each block of slots is.
"""

from dataclasses import replace

import pytest
import torch

from octomoe.core.device import Target
from octomoe.kernels.build_routing import build_blocks, build_routing
from octomoe.reference.build_routing import build_routing as reference
from octomoe.tune.configs import RoutingConfig
from octomoe.tune.lookup import routing_config

# tokens, experts, choices, pattern of the ids
CASES = {
    "zero tokens": (0, 4, 2, "any"),
    "no choices": (5, 4, 0, "any"),
    "one token": (1, 4, 2, "any"),
    "an empty expert": (9, 4, 2, "hole"),
    "all to one": (90, 4, 1, "one"),
    "dropped": (37, 5, 3, "dropped"),
    "all dropped": (37, 5, 3, "none"),
    "an expert twice": (37, 3, 3, "twice"),
    "one expert": (70, 1, 1, "any"),
    "one block exactly": (32, 8, 2, "any"),
    "several blocks": (67, 40, 3, "any"),
    "many experts": (61, 1000, 3, "any"),
    "many choices": (140, 40, 5, "dropped"),
}
# Small enough that the cases above need several blocks of them; 40 experts need two rounds of bins.
CONFIGS = {
    "default": None,
    "one launch": RoutingConfig(32, 32, is_single=True, sample=64, num_warps=1),
    "three launches": RoutingConfig(32, 32, sum_blocks=2, sum_experts=4, num_warps=1),
    "rounds": RoutingConfig(32, 32, rounds=2, sum_blocks=2, sum_experts=16, num_warps=1),
    # A block is placed in two steps, of which the second is not full.
    "many rounds": RoutingConfig(32, 32, rounds=20, sum_blocks=2, sum_experts=16, num_warps=1),
}
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def fitting(config, num_experts):
    """A configuration cut for the experts: many of them would need many programs and rounds."""
    if config is None or num_experts <= 100:
        return config
    return replace(config, choices=64, bins=512, sample=128, sum_experts=512, num_warps=2)


def make_inputs(case, device, seed, draw_ids):
    num_tokens, num_experts, num_choices, pattern = case
    ids_TA = draw_ids(num_tokens, num_experts, num_choices, pattern, seed)
    return ids_TA.to(device), num_experts


@pytest.fixture
def assert_equals_reference(assert_same_bits):
    def check(ids_TA, num_experts, config=None, **options):
        actual = build_routing(ids_TA, num_experts, config=config, **options)
        expected = reference(ids_TA, num_experts, **options)
        assert_same_bits(actual.expert_offsets, expected.expert_offsets)
        assert_same_bits(actual.slot_of_choice_TA, expected.slot_of_choice_TA)
        assert_same_bits(actual.choice_of_slot_S, expected.choice_of_slot_S)
        assert actual.align == expected.align

    return check


@EACH_CONFIG
@pytest.mark.parametrize("align", [1, 4, 16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks(case, align, config, kernel_device, draw_ids, assert_same_bits):
    ids_TA, num_experts = make_inputs(case, kernel_device, 4, draw_ids)
    config = fitting(config, num_experts)
    routing, expert_of_block = build_blocks(ids_TA, num_experts, align=align, config=config)
    expected = reference(ids_TA, num_experts, align=align)
    assert_same_bits(routing.expert_offsets, expected.expert_offsets)
    assert_same_bits(routing.slot_of_choice_TA, expected.slot_of_choice_TA)
    assert_same_bits(routing.choice_of_slot_S, expected.choice_of_slot_S)
    offsets = routing.expert_offsets.tolist()
    blocks = [-1] * (routing.num_slots // align)
    for expert in range(num_experts):
        for block in range(offsets[expert] // align, offsets[expert + 1] // align):
            blocks[block] = expert
    assert (expert_of_block.dtype, expert_of_block.tolist()) == (torch.int32, blocks)


@EACH_CONFIG
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference(case, config, kernel_device, draw_ids, assert_equals_reference):
    ids_TA, num_experts = make_inputs(case, kernel_device, 1, draw_ids)
    assert_equals_reference(ids_TA, num_experts, fitting(config, num_experts))


@EACH_CONFIG
@pytest.mark.parametrize("align", [3, 16, 128])
@pytest.mark.parametrize("name", ["zero tokens", "dropped", "several blocks"])
def test_alignments(name, align, config, kernel_device, draw_ids, assert_equals_reference):
    inputs = make_inputs(CASES[name], kernel_device, 2, draw_ids)
    assert_equals_reference(*inputs, config, align=align)


@EACH_CONFIG
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_dtypes_and_strides(dtype, config, kernel_device, draw_ids, assert_equals_reference):
    ids_TA, num_experts = make_inputs(CASES["dropped"], kernel_device, 3, draw_ids)
    ids_TA = ids_TA.to(dtype)
    assert_equals_reference(ids_TA, num_experts, config)
    assert_equals_reference(ids_TA.T.contiguous().T, num_experts, config)
    assert_equals_reference(ids_TA[::2, 1:], num_experts, config)
    assert_equals_reference(ids_TA[:1].expand(37, -1), num_experts, config)


@EACH_CONFIG
def test_ids_out_of_range_are_dropped(config, kernel_device, assert_equals_reference):
    ids_TA = torch.tensor([[-7, 3], [4, 0], [2**31 - 1, -(2**31)], [5, 1]], device=kernel_device)
    wide_TA = ids_TA * 2**31
    for ids in (ids_TA, ids_TA.int(), wide_TA):
        assert_equals_reference(ids, 4, config)
        expert_map = torch.tensor([1, 0, -1, 2, 9], device=kernel_device)
        assert_equals_reference(ids, 2, config, expert_map=expert_map)


@EACH_CONFIG
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_maps(dtype, config, kernel_device, draw_ids, assert_equals_reference):
    ids_TA, num_global = make_inputs(CASES["dropped"], kernel_device, 4, draw_ids)
    for local in ([-1, 1, 0, -1, -1], [0, -5, 7, 1, 2], [-1] * num_global):
        expert_map = torch.tensor(local, dtype=dtype, device=kernel_device)
        assert_equals_reference(ids_TA, 3, config, expert_map=expert_map, align=4)
        strided = expert_map.repeat_interleave(2)[::2]
        assert_equals_reference(ids_TA, 3, config, expert_map=strided)
    nobody = torch.empty(0, dtype=dtype, device=kernel_device)
    assert_equals_reference(ids_TA, 3, config, expert_map=nobody)


@pytest.mark.parametrize("num_choices", [0, 1, 100, 4096, 4097, 65536, 2**20, 2**24])
@pytest.mark.parametrize("num_experts", [1, 3, 256, 1000, 5000])
def test_counts_take_no_more_memory_than_the_routing_itself(num_choices, num_experts):
    config = routing_config(num_choices, num_experts, num_choices)
    if not config.is_single:
        num_blocks = -(-num_choices // (config.rounds * config.choices))
        # As `slot_of_choice` and `choice_of_slot` together.
        assert (num_blocks - 1) * (num_experts - 1) <= 2 * num_choices
        assert num_blocks <= 1024


def test_only_recent_nvidia_launches_ahead():
    sizes = 2**20, 256, 2**20
    assert not routing_config(*sizes).is_chained
    assert not routing_config(*sizes, Target("NVIDIA A100", arch=80)).is_chained
    assert routing_config(*sizes, Target("NVIDIA H200", arch=90)).is_chained
    assert not routing_config(*sizes, Target("gfx942", is_hip=True)).is_chained


@pytest.mark.parametrize("num_choices", [8, 2**20])
def test_a_program_has_no_more_threads_than_choices(num_choices):
    for target, lanes in ((Target("NVIDIA H200", arch=90), 32), (Target("gfx", is_hip=True), 64)):
        config = routing_config(num_choices, 256, num_choices, target)
        assert config.num_warps * lanes <= config.choices
