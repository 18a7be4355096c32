"""Layers of experts in memory that nobody reads, for the programs that compile kernels."""

import torch
from torch import Tensor

from octomoe.core.activations import SILU, Activation
from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import Format
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing


def in_memory(shape: tuple[int, ...], format: Format | torch.dtype) -> Tensor | QTensor:
    """A tensor, or a quantised one."""
    if isinstance(format, torch.dtype):
        return torch.empty(shape, dtype=format)
    scale = torch.empty(format.scale_shape(shape), dtype=format.scale_dtype)
    return QTensor(torch.empty(shape, dtype=format.element.dtype), scale, format)


def experts_in_memory(
    num_experts: int,
    hidden_size: int,
    width: int,
    format: Format,
    activation: Activation = SILU,
    *,
    has_bias: bool = False,
    is_static: bool = False,
) -> ExpertWeights:
    """Weights of a layer; `is_static`: activations have scales that are given."""
    rows = width * (2 if activation.gated else 1)
    scale = torch.ones(1, 1) if is_static else None
    return ExpertWeights(
        in_memory((num_experts, rows, hidden_size), format),
        in_memory((num_experts, hidden_size, width), format),
        activation,
        torch.empty(num_experts, rows) if has_bias else None,
        torch.empty(num_experts, hidden_size) if has_bias else None,
        scale,
        scale,
    )


def blocks_in_memory(
    num_tokens: int, num_choices: int, num_experts: int, num_slots: int, align: int
) -> tuple[Routing, Tensor]:
    """A routing, and the expert of each of its blocks of `align` slots."""
    routing = Routing(
        torch.empty(num_experts + 1, dtype=torch.int32),
        torch.empty(num_tokens, num_choices, dtype=torch.int32),
        torch.empty(num_slots, dtype=torch.int32),
        align,
    )
    return routing, torch.empty(num_slots // align, dtype=torch.int32)
