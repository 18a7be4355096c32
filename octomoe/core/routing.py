"""Which token goes to which expert: offsets and index maps, built once and passed along."""

from dataclasses import dataclass

import torch
from torch import Tensor

from octomoe.errors import refusal


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
