"""Choices sorted by expert in blocks, for kernels that take one expert per block."""

from torch import Tensor

from octomoe.core.routing import BlockRouting
from octomoe.kernels.build_routing import build_blocks


def moe_align_block_size(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    *,
    expert_map: Tensor | None = None,
) -> BlockRouting:
    """Blocks of the choices ``topk_ids [T, A]``; see `octomoe.moe_align_block_size`."""
    routing, expert_ids = build_blocks(
        topk_ids,
        num_experts,
        align=block_size,
        expert_map=expert_map,
        nobody=topk_ids.numel(),
    )
    # Nobody else has this routing: the last offset is a view.
    return BlockRouting(routing.choice_of_slot_S, expert_ids, routing.expert_offsets[-1:])
