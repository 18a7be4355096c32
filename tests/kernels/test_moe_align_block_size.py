"""`moe_align_block_size` in Triton equals the reference bit for bit."""

import pytest
import torch

from octomoe.kernels.moe_align_block_size import moe_align_block_size
from octomoe.reference.moe_align_block_size import moe_align_block_size as reference

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
    "several programs": (67, 40, 3, "any"),
    "many experts": (61, 1000, 3, "any"),
}


def make_inputs(case, device, seed, draw_ids):
    num_tokens, num_experts, num_choices, pattern = case
    ids_TA = draw_ids(num_tokens, num_experts, num_choices, pattern, seed)
    return ids_TA.to(device), num_experts


@pytest.fixture
def assert_equals_reference(assert_same_bits):
    def check(ids_TA, block_size, num_experts, expert_map=None):
        actual, expected = (
            run(ids_TA, block_size, num_experts, expert_map=expert_map)
            for run in (moe_align_block_size, reference)
        )
        assert_same_bits(actual.sorted_token_ids, expected.sorted_token_ids)
        assert_same_bits(actual.expert_ids, expected.expert_ids)
        assert_same_bits(actual.num_tokens_post_padded, expected.num_tokens_post_padded)

    return check


@pytest.mark.parametrize("block_size", [1, 3, 16, 128])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference(case, block_size, kernel_device, draw_ids, assert_equals_reference):
    ids_TA, num_experts = make_inputs(case, kernel_device, 1, draw_ids)
    assert_equals_reference(ids_TA, block_size, num_experts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_maps_dtypes_and_strides(dtype, kernel_device, draw_ids, assert_equals_reference):
    ids_TA, _ = make_inputs(CASES["dropped"], kernel_device, 2, draw_ids)
    expert_map = torch.tensor([-1, 1, 0, -1, 2], dtype=dtype, device=kernel_device)
    for ids in (ids_TA.to(dtype), ids_TA.to(dtype).T.contiguous().T):
        assert_equals_reference(ids, 16, 3, expert_map)
