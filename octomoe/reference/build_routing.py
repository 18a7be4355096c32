"""Sort choices by expert, stably, and note where each one went."""

import torch
from torch import Tensor

from octomoe.core.routing import Routing, slot_capacity


def build_routing(
    topk_ids: Tensor,
    num_experts: int,
    *,
    align: int = 1,
    expert_map: Tensor | None = None,
) -> Routing:
    """Offsets and index maps of ``topk_ids [T, A]``; see `octomoe.build_routing`."""
    num_tokens, num_choices = topk_ids.shape
    num_slots = slot_capacity(num_tokens, num_choices, num_experts, align)
    # Dropped choices sort behind the last expert.
    expert_C = _local_experts(topk_ids.reshape(-1).long(), num_experts, expert_map)
    counts_E = torch.bincount(expert_C, minlength=num_experts + 1)[:num_experts]
    padded_E = (counts_E + align - 1) // align * align
    offsets = torch.nn.functional.pad(padded_E.cumsum(0), (1, 0))
    first_rank_E = torch.nn.functional.pad(counts_E.cumsum(0), (1, 0))

    choice_of_rank_C = torch.argsort(expert_C, stable=True)
    expert_of_rank_C = expert_C[choice_of_rank_C]
    rank_C = torch.arange(expert_C.shape[0], device=topk_ids.device)
    slot_of_rank_C = offsets[expert_of_rank_C] + rank_C - first_rank_E[expert_of_rank_C]
    slot_of_rank_C = torch.where(expert_of_rank_C < num_experts, slot_of_rank_C, -1)

    slot_of_choice_C = torch.empty_like(slot_of_rank_C)
    slot_of_choice_C[choice_of_rank_C] = slot_of_rank_C
    # The extra last element takes what dropped choices write, and is cut off.
    choice_of_slot = torch.full((num_slots + 1,), -1, device=topk_ids.device)
    choice_of_slot[slot_of_rank_C] = torch.where(slot_of_rank_C < 0, -1, choice_of_rank_C)
    return Routing(
        expert_offsets=offsets.int(),
        slot_of_choice_TA=slot_of_choice_C.int().view(num_tokens, num_choices),
        choice_of_slot_S=choice_of_slot[:num_slots].int(),
        align=align,
    )


def _local_experts(expert_C: Tensor, num_experts: int, expert_map: Tensor | None) -> Tensor:
    """Local id of each choice's expert, `num_experts` for those dropped or not local."""
    num_global = num_experts if expert_map is None else expert_map.shape[0]
    is_valid_C = (expert_C >= 0) & (expert_C < num_global)
    if expert_map is not None and num_global > 0:
        expert_C = expert_map.long()[torch.where(is_valid_C, expert_C, 0)]
        is_valid_C = is_valid_C & (expert_C >= 0) & (expert_C < num_experts)
    return torch.where(is_valid_C, expert_C, num_experts)
