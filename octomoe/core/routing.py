"""Which token goes to which expert: offsets and index maps, built once and passed along."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from octomoe.errors import refusal

_MAX_CHOICES = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Routing:
    """Tokens sorted by expert. A *choice* is one (token, position) pair of ``topk_ids``, numbered
    ``token * A + position``; a *slot* is a row of the permuted tensors.

    Slots of one expert are contiguous and in the order of their choices. Slots past
    ``expert_offsets[-1]`` and the padding at the end of an expert's range belong to no token.
    For ``topk_ids = [[2, 0], [0, -1]]`` and three experts::

        expert_offsets    = [0, 2, 2, 3]       expert 1 is empty
        slot_of_choice_TA = [[2, 0], [1, -1]]  the dropped choice has no slot
        choice_of_slot_S  = [1, 2, 0, -1]      slot 3 belongs to no token

    Attributes:
        expert_offsets: ``[L + 1]`` int32; expert e owns slots ``offsets[e] .. offsets[e + 1] - 1``.
        slot_of_choice_TA: ``[T, A]`` int32; -1 where the choice was dropped.
        choice_of_slot_S: ``[S]`` int32; -1 where the slot belongs to no token.
        align: every expert's range starts and ends at a multiple of it (1 = ragged).
    """

    expert_offsets: Tensor
    slot_of_choice_TA: Tensor
    choice_of_slot_S: Tensor
    align: int = 1

    def __post_init__(self) -> None:
        for name, tensor, rank in (
            ("expert_offsets", self.expert_offsets, 1),
            ("slot_of_choice_TA", self.slot_of_choice_TA, 2),
            ("choice_of_slot_S", self.choice_of_slot_S, 1),
        ):
            if tensor.dtype != torch.int32 or tensor.dim() != rank:
                got = f"is {tensor.dtype} of rank {tensor.dim()}"
                raise TypeError(refusal("Routing", name, got, f"int32 of rank {rank}"))

    @property
    def num_experts(self) -> int:
        """L, the experts on this rank."""
        return self.expert_offsets.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.slot_of_choice_TA.shape[0]

    @property
    def num_choices(self) -> int:
        """A, the choices per token."""
        return self.slot_of_choice_TA.shape[1]

    @property
    def num_slots(self) -> int:
        """S, the rows of a permuted tensor: the most that this routing's shape can need."""
        return self.choice_of_slot_S.shape[0]

    @property
    def token_of_slot_S(self) -> Tensor:
        """``[S]`` int32; -1 where the slot belongs to no token."""
        return torch.div(self.choice_of_slot_S, max(self.num_choices, 1), rounding_mode="floor")


@dataclass(frozen=True, eq=False)
class BlockRouting:
    """Choices sorted by expert and cut into blocks of one expert each, as vLLM's and SGLang's
    kernels take them. For ``topk_ids = [[2, 0], [0, -1]]``, three experts and blocks of two::

        sorted_token_ids       = [1, 2, 0, 4, 4, 4]  4 is no choice
        expert_ids             = [0, 2, -1]
        num_tokens_post_padded = [4]

    Attributes:
        sorted_token_ids: ``[S]`` int32; numbers of choices, ``T * A`` where a row has none.
        expert_ids: ``[S / block size]`` int32; expert of each block, -1 past the last expert.
        num_tokens_post_padded: ``[1]`` int32; rows that belong to an expert, padding included.
    """

    sorted_token_ids: Tensor
    expert_ids: Tensor
    num_tokens_post_padded: Tensor


def slot_capacity(num_tokens: int, num_choices: int, num_experts: int, align: int) -> int:
    """Slots that hold any routing of this shape: known without looking at the ids.

    Each expert that receives a choice wastes at most ``align - 1`` slots.

    >>> slot_capacity(num_tokens=10, num_choices=2, num_experts=4, align=8)
    48
    """
    num_choices_total = num_tokens * num_choices
    waste = min(num_experts, num_choices_total) * (align - 1)
    return (num_choices_total + waste) // align * align


def append_shared_experts(
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    num_experts: int,
    num_shared: int,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Let every token choose the shared experts too, which lie after the routed ones.

    Args:
        topk_weights: ``[T, A]`` float.
        topk_ids: ``[T, A]`` int32 or int64.
        num_experts: E, the routed experts; shared ones get ids ``E .. E + num_shared - 1``.
        num_shared: how many shared experts.
        weight: weight of each; give ``1 / routed_scaling_factor`` where that factor is applied to
            the sum of all experts, so that shared experts are not scaled by it.

    Returns:
        Weights and ids of shape ``[T, A + num_shared]``.

    >>> append_shared_experts(
    ...     torch.ones(1, 1), torch.tensor([[3]]), num_experts=8, num_shared=1)[1]
    tensor([[3, 8]])
    """
    num_tokens = topk_ids.shape[0]
    ids = torch.arange(
        num_experts, num_experts + num_shared, dtype=topk_ids.dtype, device=topk_ids.device
    )
    weights = topk_weights.new_full((num_tokens, num_shared), weight)
    return (
        torch.cat([topk_weights, weights], dim=1),
        torch.cat([topk_ids, ids.expand(num_tokens, num_shared)], dim=1),
    )


def routing_of_slots(slot_of_choice_TA: Tensor, num_slots: int) -> Routing:
    """The routing that puts every choice into the slot given for it.

    Experts are not told apart: one owns all slots. Slots past the last one are dropped, so that no
    map makes anyone read or write past a tensor's end.

    Args:
        slot_of_choice_TA: ``[T, A]`` int; no slot twice, -1 for none.
        num_slots: S.

    Raises:
        ValueError: there are more choices than int32 can number.

    >>> routing_of_slots(torch.tensor([[2, 0], [1, 3]]), num_slots=3).choice_of_slot_S.tolist()
    [1, 2, 0]
    """
    num_choices = slot_of_choice_TA.numel()
    if num_choices > _MAX_CHOICES:
        got, needs = f"holds {num_choices} choices", f"at most {_MAX_CHOICES}"
        do = "split the batch"
        raise ValueError(refusal("routing_of_slots", "slot_of_choice_TA", got, needs, do))
    device = slot_of_choice_TA.device
    is_held_TA = (slot_of_choice_TA >= 0) & (slot_of_choice_TA < num_slots)
    # The extra last element takes what dropped choices write, and is cut off.
    slot_C = torch.where(is_held_TA, slot_of_choice_TA, num_slots).reshape(-1).long()
    choice_C = torch.arange(num_choices, dtype=torch.int32, device=device)
    choice_of_slot = torch.full((num_slots + 1,), -1, dtype=torch.int32, device=device)
    choice_of_slot = choice_of_slot.scatter(0, slot_C, choice_C)[:num_slots]
    return Routing(
        # Not made from a list, which would wait for the device.
        expert_offsets=torch.arange(2, dtype=torch.int32, device=device) * num_slots,
        slot_of_choice_TA=torch.where(is_held_TA, slot_of_choice_TA, -1).int().contiguous(),
        choice_of_slot_S=choice_of_slot,
    )


def slots_of_mask(mask_TE: Tensor) -> Tensor:
    """``[T, E]`` int32: the slot of every token at every expert of a mask, -1 where it has none.

    Slots are in the order of the experts, those of one expert in the order of the tokens.

    >>> slots_of_mask(torch.tensor([[True, True], [False, True], [True, False]])).tolist()
    [[0, 2], [-1, 3], [1, -1]]
    """
    # One sum over all, expert by expert: on a GPU torch sums columns with a thread for each.
    is_routed_ET = mask_TE.bool().T.contiguous()
    slot_ET = is_routed_ET.flatten().cumsum(0, dtype=torch.int32).view(is_routed_ET.shape) - 1
    return torch.where(is_routed_ET, slot_ET, -1).T.contiguous()


def slots_of_ids(ids_TA: Tensor) -> Tensor:
    """``[T, A]`` int32: the slot of every choice, sorted by id, then by choice; -1 for ids below 0.

    It is what `octomoe.build_routing` does, for a number of experts that nobody has told.

    >>> slots_of_ids(torch.tensor([[7, 0], [0, -1]])).tolist()
    [[2, 0], [1, -1]]
    """
    id_C = ids_TA.reshape(-1)
    last = torch.iinfo(id_C.dtype).max
    choice_of_slot_C = torch.where(id_C < 0, last, id_C).argsort(stable=True)
    slot_C = torch.arange(id_C.shape[0], device=id_C.device)
    slot_of_choice_C = torch.zeros_like(slot_C).scatter(0, choice_of_slot_C, slot_C)
    return torch.where(id_C < 0, -1, slot_of_choice_C).int().view(ids_TA.shape)


def slots_of_sorted_chunks(chunk_sizes: Tensor, chunk_order: Tensor, num_rows: int) -> Tensor:
    """``[T, 1]`` int32: where each row goes when the chunks it lies in are put in another order.

    Rows past the last chunk stay where they are.

    Args:
        chunk_sizes: ``[chunks]`` int, how many rows each has, in the order in which they lie.
        chunk_order: ``[chunks]`` int, which chunk comes first, second, ...
        num_rows: T.

    >>> slots_of_sorted_chunks(torch.tensor([1, 2]), torch.tensor([1, 0]), 4).flatten().tolist()
    [2, 0, 1, 3]
    """
    sizes, order = chunk_sizes.long(), chunk_order.long()
    ends = sizes.cumsum(0)
    sorted_sizes = sizes[order]
    starts = torch.zeros_like(ends).scatter(0, order, sorted_sizes.cumsum(0) - sorted_sizes)
    row_T = torch.arange(num_rows, device=sizes.device)
    chunk_T = torch.searchsorted(ends, row_T, right=True)
    # How far each chunk moves; the extra last element is for rows past the chunks.
    shifts = pad(starts - (ends - sizes), (0, 1))
    return (row_T + shifts[chunk_T]).int().unsqueeze(1)


def weights_of_slots(weights_TA: Tensor, routing: Routing) -> Tensor:
    """``[S]``: the weight of each slot's choice, zero for slots of no token; differentiable.

    >>> routing = routing_of_slots(torch.tensor([[2, 0], [1, -1]]), num_slots=4)
    >>> weights_of_slots(torch.tensor([[0.25, 0.5], [1.0, 2.0]]), routing).tolist()
    [0.5, 1.0, 0.25, 0.0]
    """
    # An element more, which -1 finds.
    return pad(weights_TA.reshape(-1), (0, 1))[routing.choice_of_slot_S.long()]


def padding_before(counts_E: Tensor, align: int) -> Tensor:
    """``[E]`` int64: slots of no token before each expert's, if all start at multiples of `align`.

    >>> padding_before(torch.tensor([3, 4, 0, 1]), align=4).tolist()
    [0, 1, 1, 1]
    """
    padding_E = -counts_E.long() % align
    return padding_E.cumsum(0) - padding_E
