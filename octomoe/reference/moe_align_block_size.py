"""Cut the choices sorted by expert into blocks that have one expert each."""

import torch
from torch import Tensor

from octomoe.core.routing import BlockRouting
from octomoe.reference.build_routing import build_routing


def moe_align_block_size(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    *,
    expert_map: Tensor | None = None,
) -> BlockRouting:
    """Blocks of the choices ``topk_ids [T, A]``; see `octomoe.moe_align_block_size`."""
    routing = build_routing(topk_ids, num_experts, align=block_size, expert_map=expert_map)
    choice_S = routing.choice_of_slot_S
    first_slot = torch.arange(0, routing.num_slots, block_size, device=topk_ids.device)
    # An expert's block starts before the expert's end and not before the end of the one in front.
    expert = torch.searchsorted(routing.expert_offsets[1:].long(), first_slot, right=True)
    return BlockRouting(
        sorted_token_ids=torch.where(choice_S < 0, topk_ids.numel(), choice_S).int(),
        expert_ids=torch.where(expert < num_experts, expert, -1).int(),
        num_tokens_post_padded=routing.expert_offsets[-1:].clone(),
    )
