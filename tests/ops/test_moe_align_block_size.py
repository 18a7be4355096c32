"""`moe_align_block_size`: choices sorted by expert, in blocks that have one expert each.

Claimed: rows and blocks equal those of a naive loop; rows without a choice hold ``T * A``.
"""

import pytest
import torch

from octomoe import build_routing, moe_align_block_size
from octomoe.core.routing import slot_capacity

# tokens, experts, choices, pattern of the ids
CASES = {
    "zero tokens": (0, 4, 2, "any"),
    "no choices": (5, 4, 0, "any"),
    "one token": (1, 4, 2, "any"),
    "an empty expert": (9, 4, 2, "hole"),
    "all to one": (9, 4, 1, "one"),
    "divides nothing": (37, 5, 3, "any"),
    "dropped": (37, 5, 3, "dropped"),
    "an expert twice": (37, 5, 3, "twice"),
    "more experts than choices": (3, 60, 2, "any"),
    "real": (70, 8, 3, "any"),
}


def make_inputs(case, device, seed, draw_ids):
    num_tokens, num_experts, num_choices, pattern = case
    ids_TA = draw_ids(num_tokens, num_experts, num_choices, pattern, seed)
    return ids_TA.to(device), num_experts


def naive_blocks(ids_TA, block_size, num_experts, expert_map=None):
    """Row numbers, expert of each block, number of rows: two lists and a number."""
    rows, expert_ids, flat = [], [], ids_TA.reshape(-1).tolist()
    if expert_map is not None:
        flat = [expert_map[expert].item() if expert >= 0 else -1 for expert in flat]
    for expert in range(num_experts):
        own = [choice for choice, e in enumerate(flat) if e == expert]
        while len(own) % block_size:
            own.append(len(flat))
        rows += own
        expert_ids += [expert] * (len(own) // block_size)
    num_rows = len(rows)
    rest = slot_capacity(*ids_TA.shape, num_experts, block_size) - num_rows
    return rows + [len(flat)] * rest, expert_ids + [-1] * (rest // block_size), num_rows


def assert_is(blocks, expected):
    rows, expert_ids, num_rows = expected
    assert blocks.sorted_token_ids.tolist() == rows
    assert blocks.expert_ids.tolist() == expert_ids
    assert blocks.num_tokens_post_padded.tolist() == [num_rows]


@pytest.mark.parametrize("block_size", [1, 3, 16, 128])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_a_naive_loop(case, block_size, device, draw_ids):
    ids_TA, num_experts = make_inputs(case, device, 1, draw_ids)
    for ids in (ids_TA, ids_TA.int(), ids_TA.T.contiguous().T):
        blocks = moe_align_block_size(ids, block_size, num_experts)
        assert_is(blocks, naive_blocks(ids_TA, block_size, num_experts))
        for tensor in vars(blocks).values():
            assert (tensor.dtype, tensor.device) == (torch.int32, ids_TA.device)


def test_ids_in_the_result_are_local(device, draw_ids):
    ids_TA, _ = make_inputs(CASES["dropped"], device, 2, draw_ids)
    expert_map = torch.tensor([-1, 1, 0, -1, 2], device=device)
    blocks = moe_align_block_size(ids_TA, 4, 3, expert_map=expert_map)
    assert_is(blocks, naive_blocks(ids_TA, 4, 3, expert_map))


def test_rows_are_the_slots_of_a_routing(device, draw_ids):
    ids_TA, num_experts = make_inputs(CASES["real"], device, 3, draw_ids)
    routing = build_routing(ids_TA, num_experts, align=16)
    blocks = moe_align_block_size(ids_TA, 16, num_experts)
    is_choice_S = routing.choice_of_slot_S >= 0
    expected_S = torch.where(is_choice_S, routing.choice_of_slot_S, ids_TA.numel())
    assert torch.equal(blocks.sorted_token_ids, expected_S)


IDS_TA = torch.tensor([[0, 2], [1, -1]])
REFUSALS = {
    "no experts": (
        ValueError,
        "moe_align_block_size: num_experts is 0, but needs at least one",
        lambda: moe_align_block_size(IDS_TA, 4, 0),
    ),
    "no block": (
        ValueError,
        "moe_align_block_size: block_size is 0, but needs at least one",
        lambda: moe_align_block_size(IDS_TA, 0, 3),
    ),
    "float ids": (
        TypeError,
        "moe_align_block_size: topk_ids has dtype torch.float32, but needs int32 or int64",
        lambda: moe_align_block_size(IDS_TA.float(), 4, 3),
    ),
    "rank 1": (
        ValueError,
        r"topk_ids has shape \(2,\), but needs \[T, A\]",
        lambda: moe_align_block_size(IDS_TA[0], 4, 3),
    ),
    "id too large": (
        ValueError,
        "moe_align_block_size: topk_ids holds ids from -1 to 2, but needs ids from 0 to 1, or -1",
        lambda: moe_align_block_size(IDS_TA, 4, 2),
    ),
    "map's values": (
        ValueError,
        "moe_align_block_size: expert_map holds ids from 0 to 3, but needs ids from 0 to 2",
        lambda: moe_align_block_size(IDS_TA, 4, 3, expert_map=torch.arange(4)),
    ),
    "map of rank 2": (
        ValueError,
        r"expert_map has shape \(3, 1\), but needs \[E\]",
        lambda: moe_align_block_size(IDS_TA, 4, 3, expert_map=torch.zeros(3, 1).long()),
    ),
    "map elsewhere": (
        ValueError,
        "expert_map is on meta, but needs the other tensors' device cpu",
        lambda: moe_align_block_size(IDS_TA, 4, 3, expert_map=torch.zeros(3).long().to("meta")),
    ),
    "too many rows": (
        ValueError,
        "needs 2147483648 slots, but needs at most 2147483647 slots; split the batch",
        lambda: moe_align_block_size(torch.zeros(1, 1).long().expand(2**31, 1), 1, 3),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
