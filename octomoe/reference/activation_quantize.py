"""The activation between the two GEMMs, and its result quantised: ``quantize(act(h))``."""

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu

from octomoe.core.activations import Activation, ActivationKind, LimitOn
from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.reference.quantize import quantize
from octomoe.reference.quantize_both import quantize_both


def activate(h: Tensor, activation: Activation) -> Tensor:
    """``[S, 2F] -> [S, F]`` if gated, else ``[S, F] -> [S, F]``; float32."""
    h = h.to(torch.float32)
    if not activation.gated:
        return nonlinear(h, activation)
    gate_SF, up_SF = h.chunk(2, dim=-1)
    limit = activation.limit
    if limit is not None:
        up_SF = up_SF.clamp(-limit, limit)
    if limit is not None and activation.limit_on == LimitOn.INPUT:
        gate_SF = gate_SF.clamp(max=limit)
    gate_SF = nonlinear(gate_SF, activation)
    if limit is not None and activation.limit_on == LimitOn.OUTPUT:
        gate_SF = gate_SF.clamp(max=limit)
    return gate_SF * (up_SF + activation.up_offset)


def nonlinear(x: Tensor, activation: Activation) -> Tensor:
    """The function of the gate, or of h without one: no limit, no up."""
    match activation.kind:
        case ActivationKind.SILU:
            return x * torch.sigmoid(activation.alpha * x)
        case ActivationKind.GELU:
            return gelu(x)
        case ActivationKind.GELU_TANH:
            return gelu(x, approximate="tanh")
        case ActivationKind.RELU2:
            return relu(x).square()


def activation_quantize(
    h: Tensor,
    activation: Activation,
    format: Format,
    *,
    layout: ScaleLayout = COMPACT,
    scale: Tensor | None = None,
    seed: Tensor | None = None,
) -> QTensor:
    """``quantize(act(h))`` with no rounding in between; see `octomoe.activation_quantize`."""
    return quantize(activate(h, activation), format, layout=layout, scale=scale, seed=seed)


def activation_quantize_both(
    h: Tensor,
    activation: Activation,
    row_format: Format,
    column_format: Format,
    *,
    row_layout: ScaleLayout = COMPACT,
    column_layout: ScaleLayout = COMPACT,
    seed: Tensor | None = None,
) -> tuple[QTensor, QTensor]:
    """``quantize_both(act(h))``; see `octomoe.activation_quantize_both`."""
    return quantize_both(
        activate(h, activation),
        row_format,
        column_format,
        row_layout=row_layout,
        column_layout=column_layout,
        seed=seed,
    )
