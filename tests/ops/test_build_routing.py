"""`build_routing`: choices sorted by expert, stably, with offsets that are multiples of `align`.

Claimed: offsets and maps equal those of a naive loop; the maps are inverses of each other; dropped,
repeated and remote choices are ordinary input.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octomoe import build_routing
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
    "one expert": (7, 1, 1, "any"),
    "more experts than choices": (3, 60, 2, "any"),
    "real": (70, 8, 3, "any"),
    "wide": pytest.param((4096, 256, 8, "any"), marks=pytest.mark.full),
}
ALIGNMENTS = (1, 3, 8, 128)


def make_inputs(case, device, seed, draw_ids):
    num_tokens, num_experts, num_choices, pattern = case
    ids_TA = draw_ids(num_tokens, num_experts, num_choices, pattern, seed)
    return ids_TA.to(device), num_experts


def naive_routing(ids_TA, num_experts, align, expert_map=None):
    """Offsets, slot of each choice, choice of each slot: three lists."""
    choices_of_expert = [[] for _ in range(num_experts)]
    flat = ids_TA.reshape(-1).tolist()
    for choice, expert in enumerate(flat):
        local = expert if expert_map is None or expert < 0 else expert_map[expert].item()
        if local >= 0:
            choices_of_expert[local].append(choice)
    offsets, choice_of_slot, slot_of_choice = [0], [], [-1] * len(flat)
    for choices in choices_of_expert:
        for choice in choices:
            slot_of_choice[choice] = len(choice_of_slot)
            choice_of_slot.append(choice)
        while len(choice_of_slot) % align:
            choice_of_slot.append(-1)
        offsets.append(len(choice_of_slot))
    num_slots = slot_capacity(*ids_TA.shape, num_experts, align)
    return offsets, slot_of_choice, choice_of_slot + [-1] * (num_slots - len(choice_of_slot))


def assert_is(routing, expected):
    offsets, slot_of_choice, choice_of_slot = expected
    assert routing.expert_offsets.tolist() == offsets
    assert routing.slot_of_choice_TA.flatten().tolist() == slot_of_choice
    assert routing.choice_of_slot_S.tolist() == choice_of_slot


@pytest.mark.parametrize("align", ALIGNMENTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_a_naive_loop(case, align, device, draw_ids):
    ids_TA, num_experts = make_inputs(case, device, 1, draw_ids)
    routing = build_routing(ids_TA, num_experts, align=align)
    assert_is(routing, naive_routing(ids_TA, num_experts, align))
    assert routing.align == align
    assert routing.num_experts == num_experts
    assert (routing.num_tokens, routing.num_choices) == ids_TA.shape
    assert routing.expert_offsets.device == ids_TA.device


@given(data=st.data())
def test_invariants(data, device):
    num_tokens, num_choices = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 4))
    num_global, align = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    ids = data.draw(
        st.lists(
            st.integers(-1, num_global - 1),
            min_size=num_tokens * num_choices,
            max_size=num_tokens * num_choices,
        )
    )
    ids_TA = torch.tensor(ids, dtype=torch.int64).view(num_tokens, num_choices).to(device)
    num_experts, expert_map = num_global, None
    if data.draw(st.booleans()):
        num_experts = data.draw(st.integers(1, num_global))
        order = data.draw(
            st.permutations([*range(num_experts), *[-1] * (num_global - num_experts)])
        )
        expert_map = torch.tensor(order, device=device)

    routing = build_routing(ids_TA, num_experts, align=align, expert_map=expert_map)
    assert_is(routing, naive_routing(ids_TA, num_experts, align, expert_map))

    offsets = routing.expert_offsets.long()
    assert offsets[0] == 0
    assert (offsets.diff() >= 0).all()
    assert not (offsets % align).any()
    assert offsets[-1] <= routing.num_slots
    slot_C, choice_S = routing.slot_of_choice_TA.flatten().long(), routing.choice_of_slot_S.long()
    has_slot_C, has_choice_S = slot_C >= 0, choice_S >= 0
    assert has_slot_C.sum() == has_choice_S.sum()
    assert torch.equal(choice_S[slot_C[has_slot_C]], has_slot_C.nonzero().flatten())
    assert torch.equal(slot_C[choice_S[has_choice_S]], has_choice_S.nonzero().flatten())
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        own = choice_S[start:end]
        own = own[own >= 0]
        assert (own.diff() > 0).all()
        assert end - start - own.numel() < align
    assert not has_choice_S[offsets[-1] :].any()


def test_int32_and_int64_ids_agree(device, draw_ids, assert_same_bits):
    ids_TA, num_experts = make_inputs(CASES["dropped"], device, 2, draw_ids)
    wide, narrow = (build_routing(ids, num_experts, align=4) for ids in (ids_TA, ids_TA.int()))
    assert_same_bits(narrow.expert_offsets, wide.expert_offsets)
    assert_same_bits(narrow.slot_of_choice_TA, wide.slot_of_choice_TA)
    assert_same_bits(narrow.choice_of_slot_S, wide.choice_of_slot_S)


def test_ids_are_read_through_their_strides(device, draw_ids):
    ids_TA, num_experts = make_inputs(CASES["real"], device, 3, draw_ids)
    column_major_TA = ids_TA.T.contiguous().T
    expected = naive_routing(ids_TA, num_experts, 1)
    assert_is(build_routing(column_major_TA, num_experts), expected)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_share_the_choices(num_ranks, device, draw_ids):
    ids_TA, num_experts = make_inputs(CASES["real"], device, 4, draw_ids)
    num_local = num_experts // num_ranks
    has_slot = []
    for rank in range(num_ranks):
        expert_map = torch.full((num_experts,), -1, dtype=torch.int32, device=device)
        expert_map[rank * num_local : (rank + 1) * num_local] = torch.arange(num_local).int()
        routing = build_routing(ids_TA, num_local, expert_map=expert_map)
        assert_is(routing, naive_routing(ids_TA, num_local, 1, expert_map))
        has_slot.append(routing.slot_of_choice_TA >= 0)
    assert (torch.stack(has_slot).sum(0) == 1).all()


def test_token_of_slot(device, draw_ids):
    ids_TA, num_experts = make_inputs(CASES["dropped"], device, 5, draw_ids)
    routing = build_routing(ids_TA, num_experts, align=8)
    expected = [c // 3 if c >= 0 else -1 for c in routing.choice_of_slot_S.tolist()]
    assert routing.token_of_slot_S.tolist() == expected


IDS_TA = torch.tensor([[0, 2], [1, -1]])
REFUSALS = {
    "map's values": (
        ValueError,
        "expert_map holds ids from 0 to 3, but needs ids from 0 to 2, or -1 for none",
        lambda: build_routing(IDS_TA, 3, expert_map=torch.arange(4)),
    ),
    "no experts": (
        ValueError,
        "num_experts is 0, but needs at least one",
        lambda: build_routing(IDS_TA, 0),
    ),
    "no alignment": (
        ValueError,
        "align is 0, but needs a positive",
        lambda: build_routing(IDS_TA, 3, align=0),
    ),
    "float ids": (
        TypeError,
        "topk_ids has dtype torch.float32, but needs int32 or int64",
        lambda: build_routing(IDS_TA.float(), 3),
    ),
    "rank 1": (
        ValueError,
        r"topk_ids has shape \(2,\), but needs \[T, A\]",
        lambda: build_routing(IDS_TA[0], 3),
    ),
    "id too large": (
        ValueError,
        "build_routing: topk_ids holds ids from -1 to 2, but needs ids from 0 to 1, or -1",
        lambda: build_routing(IDS_TA, 2),
    ),
    "id too small": (
        ValueError,
        "topk_ids holds ids from -2 to 1",
        lambda: build_routing(IDS_TA - 1, 3),
    ),
    "id past the map": (
        ValueError,
        "needs ids from 0 to 1",
        lambda: build_routing(IDS_TA, 3, expert_map=torch.tensor([0, 1])),
    ),
    "float map": (
        TypeError,
        "expert_map has dtype torch.float32, but needs int32 or int64",
        lambda: build_routing(IDS_TA, 3, expert_map=torch.zeros(3)),
    ),
    "map of rank 2": (
        ValueError,
        r"expert_map has shape \(3, 1\), but needs \[E\]",
        lambda: build_routing(IDS_TA, 3, expert_map=torch.zeros(3, 1).long()),
    ),
    "map elsewhere": (
        ValueError,
        "expert_map is on meta, but needs the other tensors' device cpu",
        lambda: build_routing(IDS_TA, 3, expert_map=torch.zeros(3).long().to("meta")),
    ),
    "too many slots": (
        ValueError,
        "needs 2147483648 slots, but needs at most 2147483647 slots; split the batch",
        lambda: build_routing(torch.zeros(1, 1).long().expand(2**31, 1), 3),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
