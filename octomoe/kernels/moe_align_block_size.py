"""Choices sorted by expert in blocks, for kernels that take one expert per block.

Bound by latency: after `build_routing`, one launch gives padding its number and finds the expert of
each block by halving the list of offsets.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.routing import BlockRouting
from octomoe.kernels.build_routing import build_routing


@triton.jit
def _blocks_kernel(
    choice_of_slot_ptr,
    offsets_ptr,
    expert_ids_ptr,
    num_choices,
    num_experts,
    num_slots,
    num_blocks,
    block_size,
    num_halvings,
    SLOTS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    is_slot = index < num_slots
    choice = tl.load(choice_of_slot_ptr + index, mask=is_slot, other=0)
    padding = tl.full([SLOTS], 0, tl.int32) + num_choices
    tl.store(choice_of_slot_ptr + index, padding, mask=is_slot & (choice < 0))

    # An expert's block starts before the expert's end and not before the end of the one in front.
    is_block = index < num_blocks
    first_slot = index * block_size
    low = tl.zeros([SLOTS], tl.int32)
    high = low + num_experts
    for _ in range(num_halvings):
        middle = (low + high) // 2
        is_open = is_block & (low < high)
        end = tl.load(offsets_ptr + middle + 1, mask=is_open, other=0)
        is_past = first_slot >= end
        low = tl.where(is_open & is_past, middle + 1, low)
        high = tl.where(is_open & is_past, high, tl.where(is_open, middle, high))
    expert = tl.where(low < num_experts, low, -1)
    tl.store(expert_ids_ptr + index, expert, mask=is_block)


def moe_align_block_size(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    *,
    expert_map: Tensor | None = None,
) -> BlockRouting:
    """Blocks of the choices ``topk_ids [T, A]``; see `octomoe.moe_align_block_size`."""
    routing = build_routing(topk_ids, num_experts, align=block_size, expert_map=expert_map)
    num_blocks = routing.num_slots // block_size
    expert_ids = torch.empty(num_blocks, dtype=torch.int32, device=topk_ids.device)
    # Nobody else has this routing: padding is renumbered in place, and the last offset is a view.
    blocks = BlockRouting(routing.choice_of_slot_S, expert_ids, routing.expert_offsets[-1:])
    if num_blocks == 0:
        return blocks
    slots = 512
    _blocks_kernel[(triton.cdiv(routing.num_slots, slots),)](
        routing.choice_of_slot_S,
        routing.expert_offsets,
        expert_ids,
        topk_ids.numel(),
        num_experts,
        routing.num_slots,
        num_blocks,
        block_size,
        num_experts.bit_length(),
        SLOTS=slots,
        num_warps=4,
    )
    return blocks
