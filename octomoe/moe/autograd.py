"""Gradients of the ops, each defined once; of plain tensors only, as torch gives them to no others.

For a routing and weights w:

    Permute    y = permute(x)        dx = unpermute(dy)
    Unpermute  x = unpermute(y, w)   dy, dw = unpermute_bwd(dx, y, w), or dy = permute(dx) without w
"""

from typing import Any

import torch
from torch import Tensor

from octomoe.core.routing import Routing
from octomoe.ops.permute import permute
from octomoe.ops.unpermute import unpermute
from octomoe.ops.unpermute_bwd import unpermute_bwd


class Permute(torch.autograd.Function):
    """`octomoe.permute` of a plain tensor: ``Permute.apply(x_TD, routing, backend)``.

    A token's gradient is the float32 sum over its slots, in the order of its choices.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, routing: Routing, backend: str = "auto") -> Tensor:
        """``[T, D]`` -> ``[S, D]``."""
        _save(ctx, routing, backend)
        y_SD = permute(x_TD, routing, backend=backend)
        assert isinstance(y_SD, Tensor)
        return y_SD

    @staticmethod
    def backward(ctx: Any, dy_SD: Tensor) -> tuple[Tensor, None, None]:
        """``[S, D]`` -> ``[T, D]``."""
        routing, _ = _saved(ctx)
        return unpermute(dy_SD, routing, backend=ctx.backend), None, None


class Unpermute(torch.autograd.Function):
    """`octomoe.unpermute`: ``Unpermute.apply(y_SD, routing, weights_TA, backend)``.

    Slots of no token get a gradient of zero, and so do the weights of dropped choices.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_SD: Tensor,
        routing: Routing,
        weights_TA: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """``[S, D]``, ``[T, A]`` -> ``[T, D]``."""
        _save(ctx, routing, backend, *(() if weights_TA is None else (y_SD, weights_TA)))
        return unpermute(y_SD, routing, weights_TA, backend=backend)

    @staticmethod
    def backward(ctx: Any, dx_TD: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        """``[T, D]`` -> ``[S, D]``, ``[T, A]``."""
        routing, weighted = _saved(ctx)
        if not weighted:
            dy_SD = permute(dx_TD, routing, backend=ctx.backend)
            assert isinstance(dy_SD, Tensor)
            return dy_SD, None, None, None
        y_SD, weights_TA = weighted
        dy_SD, dweights_TA = unpermute_bwd(dx_TD, y_SD, routing, weights_TA, backend=ctx.backend)
        return dy_SD, None, dweights_TA.to(weights_TA.dtype), None


def _save(ctx: Any, routing: Routing, backend: str, *tensors: Tensor) -> None:
    index = (routing.expert_offsets, routing.slot_of_choice_TA, routing.choice_of_slot_S)
    ctx.save_for_backward(*index, *tensors)
    ctx.align, ctx.backend = routing.align, backend


def _saved(ctx: Any) -> tuple[Routing, tuple[Tensor, ...]]:
    expert_offsets, slot_of_choice_TA, choice_of_slot_S, *tensors = ctx.saved_tensors
    return Routing(expert_offsets, slot_of_choice_TA, choice_of_slot_S, ctx.align), tuple(tensors)
