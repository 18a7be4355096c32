"""The counter for `unpermute_bwd`."""

import torch
from torch import Tensor

from octomoe.core.routing import Routing
from octomoe.ops.check import check_float, check_routing, check_rows, check_same_device, check_shape
from octomoe.ops.dispatch import implementation
from octomoe.ops.register import register


def unpermute_bwd(
    dy: Tensor, y: Tensor, routing: Routing, weights: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Gradients of `unpermute`: ``dy_slots[s] = weights[t, a] * dy[t]`` for the choice of slot s.

    ``dweights[t, a] = <y[slot[t, a]], dy[t]>``, summed in float32 in an order that is the same in
    every run. Slots of no token and dropped choices get zero, whatever y holds there. Without
    weights the gradient is ``permute(dy, routing)``.

    Args:
        dy: ``[T, D]`` float32, bf16 or fp16, gradient of what `unpermute` returned.
        y: ``[S, D]`` float32, bf16 or fp16, what `unpermute` was given.
        routing: from `build_routing`.
        weights: ``[T, A]`` float, what `unpermute` was given.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        ``dy_slots [S, D]`` in the dtype of dy, and ``dweights [T, A]`` float32.

    Raises:
        TypeError: dy, y or weights is not float32, bf16 or fp16.
        ValueError: a shape or device does not fit the routing.
        NotImplementedError: the backend cannot run this.

    >>> import octomoe
    >>> routing = octomoe.build_routing(torch.tensor([[1, 0]]), 2)
    >>> y, weights = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5, 0.25]])
    >>> octomoe.unpermute_bwd(torch.tensor([[4.0]]), y, routing, weights)
    (tensor([[1.],
            [2.]]), tensor([[8., 4.]]))
    """
    check_float("unpermute_bwd", "dy", dy)
    check_float("unpermute_bwd", "y", y)
    check_float("unpermute_bwd", "weights", weights)
    check_routing("unpermute_bwd", routing)
    check_rows("unpermute_bwd", "dy", dy, routing.num_tokens, "tokens")
    check_shape("unpermute_bwd", "y", tuple(y.shape), (routing.num_slots, dy.shape[1]))
    needs = (routing.num_tokens, routing.num_choices)
    check_shape("unpermute_bwd", "weights", tuple(weights.shape), needs)
    check_same_device(
        "unpermute_bwd", dy.device, y=y, routing=routing.slot_of_choice_TA, weights=weights
    )
    index = (routing.expert_offsets, routing.slot_of_choice_TA, routing.choice_of_slot_S)
    return _unpermute_bwd_op(dy, y, *index, routing.align, weights, backend)


@register("unpermute_bwd")
def _unpermute_bwd_op(
    dy: Tensor,
    y: Tensor,
    expert_offsets: Tensor,
    slot_of_choice: Tensor,
    choice_of_slot: Tensor,
    align: int,
    weights: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    routing = Routing(expert_offsets, slot_of_choice, choice_of_slot, align)
    return implementation("unpermute_bwd", backend, dy.device)(dy, y, routing, weights)


@_unpermute_bwd_op.register_fake
def _(
    dy: Tensor,
    y: Tensor,
    expert_offsets: Tensor,
    slot_of_choice: Tensor,
    choice_of_slot: Tensor,
    align: int,
    weights: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    slots = dy.new_empty((choice_of_slot.shape[0], dy.shape[1]))
    return slots, dy.new_empty(tuple(slot_of_choice.shape), dtype=torch.float32)
