"""The counter for `moe_align_block_size`."""

import torch
from torch import Tensor

from octomoe.core.routing import BlockRouting, slot_capacity
from octomoe.errors import refusal
from octomoe.ops.check import (
    check_expert_map,
    check_ids,
    check_int,
    check_rank,
    check_same_device,
    check_slots,
)
from octomoe.ops.dispatch import implementation
from octomoe.ops.register import register


def moe_align_block_size(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    *,
    expert_map: Tensor | None = None,
    backend: str = "auto",
) -> BlockRouting:
    """Sort the choices by expert, stably, in blocks of one expert: the form of vLLM and SGLang.

    It is `build_routing` with ``align=block_size``, written for kernels that look up the expert of
    each block and skip rows whose number is ``T * A``.

    Args:
        topk_ids: ``[T, A]`` int32 or int64; -1 drops a choice. On a CPU ids out of range are
            refused; on a GPU they are dropped, since looking would wait for the device.
        block_size: rows of a block; every expert's choices are padded to a multiple of it.
        num_experts: L, the experts on this rank.
        expert_map: ``[E]`` int32 or int64, local id of every global expert, -1 if not on this
            rank; `topk_ids` are then global, the ids in the result local.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        A `BlockRouting` with ``slot_capacity(T, A, L, block_size)`` rows.

    Raises:
        TypeError: a tensor is not int32 or int64.
        ValueError: a shape, device or id does not fit, or there are more than 2^31 - 1 rows.
        NotImplementedError: the backend cannot run this.

    >>> import octomoe
    >>> octomoe.moe_align_block_size(torch.tensor([[2, 0], [0, -1]]), 2, 3).sorted_token_ids
    tensor([1, 2, 0, 4, 4, 4], dtype=torch.int32)
    """
    op = "moe_align_block_size"
    for name, size in (("num_experts", num_experts), ("block_size", block_size)):
        if size < 1:
            raise ValueError(refusal(op, name, f"is {size}", "at least one"))
    check_int(op, "topk_ids", topk_ids)
    check_rank(op, "topk_ids", topk_ids, (2,), "[T, A]")
    if expert_map is not None:
        check_expert_map(op, expert_map)
        check_same_device(op, topk_ids.device, expert_map=expert_map)
    num_tokens, num_choices = topk_ids.shape
    check_slots(op, slot_capacity(num_tokens, num_choices, num_experts, block_size))
    return BlockRouting(
        *_moe_align_block_size_op(topk_ids, block_size, num_experts, expert_map, backend)
    )


@register("moe_align_block_size")
def _moe_align_block_size_op(
    topk_ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    op = "moe_align_block_size"
    num_global = num_experts if expert_map is None else expert_map.shape[0]
    check_ids(op, "topk_ids", topk_ids, num_global)
    if expert_map is not None:
        check_ids(op, "expert_map", expert_map, num_experts)
    run = implementation(op, backend, topk_ids.device)
    blocks: BlockRouting = run(topk_ids, block_size, num_experts, expert_map=expert_map)
    return blocks.sorted_token_ids, blocks.expert_ids, blocks.num_tokens_post_padded


@_moe_align_block_size_op.register_fake
def _(
    topk_ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    num_slots = slot_capacity(topk_ids.shape[0], topk_ids.shape[1], num_experts, block_size)
    return (
        topk_ids.new_empty((num_slots,), dtype=torch.int32),
        topk_ids.new_empty((num_slots // block_size,), dtype=torch.int32),
        topk_ids.new_empty((1,), dtype=torch.int32),
    )
