"""The counter for `unpermute`."""

from torch import Tensor

from octomoe.core.routing import Routing
from octomoe.ops.check import check_float, check_routing, check_rows, check_same_device, check_shape
from octomoe.ops.dispatch import implementation
from octomoe.ops.register import register


def unpermute(
    y: Tensor, routing: Routing, weights: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Combine slots into tokens: ``out[t] = sum over a of weights[t, a] * y[slot[t, a]]``.

    The sum is float32 and in the order of the choices; dropped choices add nothing.

    Args:
        y: ``[S, D]`` float32, bf16 or fp16, rows in slot order.
        routing: from `build_routing`.
        weights: ``[T, A]`` float, or None for weights of one.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        ``[T, D]`` in the dtype of y.

    Raises:
        TypeError: y or weights is not float32, bf16 or fp16.
        ValueError: a shape or device does not fit the routing.
        NotImplementedError: the backend cannot run this.

    >>> import torch, octomoe
    >>> routing = octomoe.build_routing(torch.tensor([[1, 0]]), 2)
    >>> octomoe.unpermute(torch.tensor([[1.0], [2.0]]), routing, torch.tensor([[0.5, 1.0]]))
    tensor([[2.]])
    """
    check_float("unpermute", "y", y)
    check_routing("unpermute", routing)
    check_rows("unpermute", "y", y, routing.num_slots, "slots")
    check_same_device("unpermute", y.device, routing=routing.slot_of_choice_TA, weights=weights)
    if weights is not None:
        check_float("unpermute", "weights", weights)
        needs = (routing.num_tokens, routing.num_choices)
        check_shape("unpermute", "weights", tuple(weights.shape), needs)
    index = (routing.expert_offsets, routing.slot_of_choice_TA, routing.choice_of_slot_S)
    return _unpermute_op(y, *index, routing.align, weights, backend)


@register("unpermute")
def _unpermute_op(
    y: Tensor,
    expert_offsets: Tensor,
    slot_of_choice: Tensor,
    choice_of_slot: Tensor,
    align: int,
    weights: Tensor | None,
    backend: str,
) -> Tensor:
    routing = Routing(expert_offsets, slot_of_choice, choice_of_slot, align)
    return implementation("unpermute", backend, y.device)(y, routing, weights)


@_unpermute_op.register_fake
def _(
    y: Tensor,
    expert_offsets: Tensor,
    slot_of_choice: Tensor,
    choice_of_slot: Tensor,
    align: int,
    weights: Tensor | None,
    backend: str,
) -> Tensor:
    return y.new_empty((slot_of_choice.shape[0], y.shape[1]))
