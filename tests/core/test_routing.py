"""Claims: a Routing refuses maps of another type; its derived numbers follow from its maps; the
slot capacity holds every routing of a shape, no slot more; every token chooses the shared experts;
slots follow from a mask, from ids and from an order of chunks as naive loops say.
"""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octomoe.core.experts import ExpertWeights
from octomoe.core.routing import (
    Routing,
    append_shared_experts,
    padding_before,
    routing_of_slots,
    slot_capacity,
    slots_of_ids,
    slots_of_mask,
    slots_of_sorted_chunks,
)
from octomoe.reference import fused_moe

# topk_ids -> offsets, slot_of_choice_TA, choice_of_slot_S, token_of_slot_S; three experts, worked
# out by hand: expert 1 is empty and a choice is dropped; every choice dropped; no token; aligned.
CASES = {
    "documented": ([0, 2, 2, 3], [[2, 0], [1, -1]], [1, 2, 0, -1], [0, 1, 0, -1], 1),
    "all to one": ([0, 0, 3, 3], [[0], [1], [2]], [0, 1, 2], [0, 1, 2], 1),
    "all dropped": ([0, 0, 0, 0], [[-1, -1]], [-1, -1], [-1, -1], 1),
    "no token": ([0, 0, 0, 0], [], [], [], 1),
    "aligned": (
        [0, 4, 4, 8],
        [[4, 0], [1, 5]],
        [1, 2, -1, -1, 0, 3, -1, -1, -1, -1, -1, -1],
        [0, 1, -1, -1, 0, 1, -1, -1, -1, -1, -1, -1],
        4,
    ),
}


def make_inputs(case: str) -> tuple[Routing, list[int]]:
    """The routing of a case and the tokens of its slots."""
    offsets, slot_of_choice, choice_of_slot, token_of_slot, align = CASES[case]
    num_choices = len(slot_of_choice[0]) if slot_of_choice else 2
    routing = Routing(
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor(slot_of_choice, dtype=torch.int32).reshape(-1, num_choices),
        torch.tensor(choice_of_slot, dtype=torch.int32),
        align,
    )
    return routing, token_of_slot


def slots_needed(counts_E: tuple[int, ...], align: int) -> int:
    return sum((count + align - 1) // align * align for count in counts_E)


@pytest.mark.parametrize("case", CASES)
def test_token_of_slot_follows_from_the_choices(case: str):
    routing, token_of_slot = make_inputs(case)
    assert routing.token_of_slot_S.dtype == torch.int32
    assert routing.token_of_slot_S.tolist() == token_of_slot


@pytest.mark.parametrize("case", CASES)
def test_the_two_maps_and_the_numbers_agree(case: str):
    routing, token_of_slot = make_inputs(case)
    slots_TA = routing.slot_of_choice_TA
    assert (routing.num_tokens, routing.num_choices) == tuple(slots_TA.shape)
    assert (routing.num_experts, routing.num_slots) == (3, len(token_of_slot))
    for token, choices in enumerate(slots_TA.tolist()):
        for slot in choices:
            assert slot == -1 or routing.token_of_slot_S[slot] == token


def test_tokens_without_choices():
    nothing_S = torch.zeros(0, dtype=torch.int32)
    slot_of_choice_TA = torch.zeros(5, 0, dtype=torch.int32)
    routing = Routing(torch.zeros(3, dtype=torch.int32), slot_of_choice_TA, nothing_S)
    assert (routing.num_tokens, routing.num_choices) == (5, 0)
    assert routing.token_of_slot_S.shape == (0,)


@pytest.mark.parametrize("name", ["expert_offsets", "slot_of_choice_TA", "choice_of_slot_S"])
def test_maps_of_another_type_are_refused(name: str):
    routing, _ = make_inputs("documented")
    maps = {
        "expert_offsets": routing.expert_offsets,
        "slot_of_choice_TA": routing.slot_of_choice_TA,
        "choice_of_slot_S": routing.choice_of_slot_S,
    }
    rank = maps[name].dim()
    with pytest.raises(TypeError, match=rf"Routing: {name} is torch.int64 .* int32 of rank {rank}"):
        Routing(**{**maps, name: maps[name].long()})
    with pytest.raises(TypeError, match=rf"Routing: {name} is torch.int32 of rank {rank + 1}"):
        Routing(**{**maps, name: maps[name].unsqueeze(0)})


@given(
    counts_E=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    num_dropped=st.integers(0, 40),
    align=st.sampled_from([1, 2, 3, 8, 128]),
)
def test_slot_capacity_holds_any_routing(counts_E: list[int], num_dropped: int, align: int):
    num_tokens = sum(counts_E) + num_dropped
    capacity = slot_capacity(num_tokens, 1, len(counts_E), align)
    assert slots_needed(tuple(counts_E), align) <= capacity
    assert capacity % align == 0
    if align == 1:
        assert capacity == num_tokens


@pytest.mark.parametrize("align", [1, 2, 3, 4])
@pytest.mark.parametrize("num_experts", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5, 6])
def test_slot_capacity_wastes_nothing(num_tokens: int, num_experts: int, align: int):
    every_counts = product(range(num_tokens + 1), repeat=num_experts)
    most = max(slots_needed(c, align) for c in every_counts if sum(c) <= num_tokens)
    assert slot_capacity(num_tokens, 1, num_experts, align) == most


def test_slot_capacity_counts_choices():
    assert slot_capacity(6, 4, 8, 16) == slot_capacity(24, 1, 8, 16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_shared_experts_come_after_the_routed_choices(num_tokens: int, dtype: torch.dtype):
    weights_TA = torch.rand(num_tokens, 2)
    ids_TA = torch.randint(-1, 8, (num_tokens, 2), dtype=dtype)
    weights, ids = append_shared_experts(
        weights_TA, ids_TA, num_experts=8, num_shared=2, weight=0.25
    )
    assert torch.equal(ids[:, :2], ids_TA)
    assert ids.dtype == dtype
    assert ids[:, 2:].tolist() == [[8, 9]] * num_tokens
    assert torch.equal(weights[:, :2], weights_TA)
    assert weights[:, 2:].tolist() == [[0.25, 0.25]] * num_tokens


def test_shared_experts_are_added_to_every_token():
    w13_END, w2_EDF = torch.randn(4, 16, 6), torch.randn(4, 6, 8)
    x_TD, weights_TA = torch.randn(5, 6), torch.rand(5, 2)
    ids_TA = torch.randint(-1, 3, (5, 2))

    def layer(experts: slice, weights: Tensor, ids: Tensor, factor: float) -> Tensor:
        weights_of = ExpertWeights(w13_END[experts], w2_EDF[experts])
        return fused_moe(x_TD, weights_of, weights, ids, routed_scaling_factor=factor)

    routed_TD = layer(slice(0, 3), weights_TA, ids_TA, 2.5)
    every_token_T1 = torch.zeros(5, 1, dtype=torch.int64)
    shared_TD = layer(slice(3, 4), torch.ones(5, 1), every_token_T1, 1.0)
    # Weighted by the factor's inverse, which the sum of all experts is multiplied by.
    weights, ids = append_shared_experts(
        weights_TA, ids_TA, num_experts=3, num_shared=1, weight=1 / 2.5
    )
    # The same float32 sum, with the factor applied before or after it.
    torch.testing.assert_close(layer(slice(0, 4), weights, ids, 2.5), routed_TD + shared_TD)


@pytest.mark.parametrize("num_slots", [0, 3, 7, 9])
def test_routing_of_slots_drops_what_has_no_slot(num_slots: int):
    slots_TA = torch.tensor([[5, -1], [0, 2], [6, 1], [-1, -1]])
    routing = routing_of_slots(slots_TA, num_slots)
    tokens = {0: 1, 1: 2, 2: 1, 5: 0, 6: 2}
    assert routing.num_slots == num_slots
    assert routing.token_of_slot_S.tolist() == [tokens.get(s, -1) for s in range(num_slots)]
    expected_TA = torch.where(slots_TA < num_slots, slots_TA, -1)
    assert torch.equal(routing.slot_of_choice_TA, expected_TA.int())
    assert routing.expert_offsets.tolist() == [0, num_slots]


def test_more_choices_than_int32_can_number_are_refused():
    slots_TA = torch.empty(2**16, 2**15, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="needs at most 2147483647; split the batch"):
        routing_of_slots(slots_TA, 8)


@given(data=st.data(), num_tokens=st.integers(0, 6), num_experts=st.integers(0, 4))
def test_slots_of_mask_equal_a_naive_loop(data: st.DataObject, num_tokens: int, num_experts: int):
    cells = num_tokens * num_experts
    bits = data.draw(st.lists(st.booleans(), min_size=cells, max_size=cells))
    mask_TE = torch.tensor(bits, dtype=torch.bool).view(num_tokens, num_experts)
    expected_TE = torch.full((num_tokens, num_experts), -1, dtype=torch.int32)
    routed = [(t, e) for e in range(num_experts) for t in range(num_tokens) if mask_TE[t, e]]
    for slot, (t, e) in enumerate(routed):
        expected_TE[t, e] = slot
    for dtype in (torch.bool, torch.int32, torch.int64):
        assert torch.equal(slots_of_mask(mask_TE.to(dtype)), expected_TE)


@given(ids=st.lists(st.integers(-2, 5), max_size=12))
def test_slots_of_ids_equal_a_naive_loop(ids: list[int]):
    ids_TA = torch.tensor(ids[: len(ids) // 2 * 2], dtype=torch.int32).view(-1, 2)
    flat = ids_TA.flatten().tolist()
    by_expert = sorted((c for c in range(len(flat)) if flat[c] >= 0), key=lambda c: flat[c])
    expected = [by_expert.index(c) if c in by_expert else -1 for c in range(len(flat))]
    assert slots_of_ids(ids_TA).flatten().tolist() == expected
    assert slots_of_ids(ids_TA).shape == ids_TA.shape


@given(data=st.data(), sizes=st.lists(st.integers(0, 4), max_size=6), num_rest=st.integers(0, 3))
def test_slots_of_sorted_chunks_equal_a_naive_loop(
    data: st.DataObject, sizes: list[int], num_rest: int
):
    order = data.draw(st.permutations(range(len(sizes))))
    num_rows = sum(sizes) + num_rest
    chunks = list(torch.arange(num_rows).split([*sizes, num_rest]))
    row_of_slot = torch.cat([*(chunks[c] for c in order), chunks[-1]]).tolist()
    slots_T1 = slots_of_sorted_chunks(
        torch.tensor(sizes, dtype=torch.int32), torch.tensor(order, dtype=torch.int32), num_rows
    )
    assert slots_T1.dtype == torch.int32
    assert slots_T1.flatten().tolist() == [row_of_slot.index(row) for row in range(num_rows)]


@given(counts=st.lists(st.integers(0, 40), max_size=8), align=st.sampled_from([1, 3, 16, 128]))
def test_padding_before_brings_every_expert_to_a_multiple(counts: list[int], align: int):
    padding_E = padding_before(torch.tensor(counts, dtype=torch.int32), align)
    padded = [(count + align - 1) // align * align for count in counts]
    expected = [sum(padded[:e]) - sum(counts[:e]) for e in range(len(counts))]
    assert padding_E.tolist() == expected
