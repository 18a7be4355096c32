"""The counter for `build_routing`."""

import torch
from torch import Tensor

from octomoe.core.routing import Routing, slot_capacity
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


def build_routing(
    topk_ids: Tensor,
    num_experts: int,
    *,
    align: int = 1,
    expert_map: Tensor | None = None,
    backend: str = "auto",
) -> Routing:
    """Sort the choices by expert, stably: offsets and index maps, once for the whole layer.

    Args:
        topk_ids: ``[T, A]`` int32 or int64; -1 drops a choice. On a CPU ids out of range are
            refused; on a GPU they are dropped, since looking would wait for the device.
        num_experts: L, the experts on this rank.
        align: every expert's slots start and end at a multiple of it; 1 wastes none.
        expert_map: ``[E]`` int32 or int64, local id of every global expert, -1 if not on this
            rank; `topk_ids` are then global.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        A `Routing` with ``slot_capacity(T, A, L, align)`` slots.

    Raises:
        TypeError: a tensor is not int32 or int64.
        ValueError: a shape, device or id does not fit, or there are more than 2^31 - 1 slots.
        NotImplementedError: the backend cannot run this.

    >>> import octomoe
    >>> octomoe.build_routing(torch.tensor([[2, 0], [0, -1]]), 3).expert_offsets
    tensor([0, 2, 2, 3], dtype=torch.int32)
    """
    op = "build_routing"
    if num_experts < 1:
        raise ValueError(refusal(op, "num_experts", f"is {num_experts}", "at least one"))
    if align < 1:
        raise ValueError(refusal(op, "align", f"is {align}", "a positive multiple"))
    check_int(op, "topk_ids", topk_ids)
    check_rank(op, "topk_ids", topk_ids, (2,), "[T, A]")
    if expert_map is not None:
        check_expert_map(op, expert_map)
        check_same_device(op, topk_ids.device, expert_map=expert_map)
    num_tokens, num_choices = topk_ids.shape
    check_slots(op, slot_capacity(num_tokens, num_choices, num_experts, align))
    offsets, slot_of_choice, choice_of_slot = _build_routing_op(
        topk_ids, num_experts, align, expert_map, backend
    )
    return Routing(offsets, slot_of_choice, choice_of_slot, align)


@register("build_routing")
def _build_routing_op(
    topk_ids: Tensor, num_experts: int, align: int, expert_map: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    num_global = num_experts if expert_map is None else expert_map.shape[0]
    check_ids("build_routing", "topk_ids", topk_ids, num_global)
    if expert_map is not None:
        check_ids("build_routing", "expert_map", expert_map, num_experts)
    run = implementation("build_routing", backend, topk_ids.device)
    routing: Routing = run(topk_ids, num_experts, align=align, expert_map=expert_map)
    return routing.expert_offsets, routing.slot_of_choice_TA, routing.choice_of_slot_S


@_build_routing_op.register_fake
def _(
    topk_ids: Tensor, num_experts: int, align: int, expert_map: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    num_slots = slot_capacity(topk_ids.shape[0], topk_ids.shape[1], num_experts, align)
    return (
        topk_ids.new_empty((num_experts + 1,), dtype=torch.int32),
        topk_ids.new_empty(topk_ids.shape, dtype=torch.int32),
        topk_ids.new_empty((num_slots,), dtype=torch.int32),
    )
