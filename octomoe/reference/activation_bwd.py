"""The gradient of `activate`, as torch's autograd gives it: float32, stored or quantised."""

from math import pi, sqrt

import torch
from torch import Tensor

from octomoe.core.activations import Activation, ActivationKind, LimitOn
from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.reference.activation_quantize import nonlinear
from octomoe.reference.quantize import quantize
from octomoe.reference.quantize_both import quantize_both


def activation_bwd(
    dy: Tensor,
    h: Tensor,
    activation: Activation,
    *,
    format: Format | None = None,
    layout: ScaleLayout = COMPACT,
    out_dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
) -> Tensor | QTensor:
    """``[S, F] -> [S, 2F]`` if gated, else ``[S, F]``; see `octomoe.activation_bwd`."""
    dh = activate_bwd(dy, h, activation)
    if format is not None:
        return quantize(dh, format, layout=layout, seed=seed)
    return dh.to(dy.dtype if out_dtype is None else out_dtype).contiguous()


def activation_bwd_both(
    dy: Tensor,
    h: Tensor,
    activation: Activation,
    row_format: Format,
    column_format: Format,
    *,
    row_layout: ScaleLayout = COMPACT,
    column_layout: ScaleLayout = COMPACT,
    seed: Tensor | None = None,
) -> tuple[QTensor, QTensor]:
    """The gradient in two formats; see `octomoe.activation_bwd_both`."""
    return quantize_both(
        activate_bwd(dy, h, activation),
        row_format,
        column_format,
        row_layout=row_layout,
        column_layout=column_layout,
        seed=seed,
    )


def activate_bwd(dy: Tensor, h: Tensor, activation: Activation) -> Tensor:
    """The gradient of ``activate(h, activation)`` with respect to h, given that of its result.

    A clamp passes the gradient on at its limits, and stops it beyond them and at NaN.
    """
    dy, h = dy.to(torch.float32), h.to(torch.float32)
    if not activation.gated:
        return _nonlinear_bwd(dy, h, activation)
    gate_SF, up_SF = h.chunk(2, dim=-1)
    limit = activation.limit
    if limit is None:
        dgate_SF = dy * (up_SF + activation.up_offset)
        dgate_SF = _nonlinear_bwd(dgate_SF, gate_SF, activation)
        return torch.cat([dgate_SF, dy * nonlinear(gate_SF, activation)], dim=-1)
    on_input = activation.limit_on == LimitOn.INPUT
    gate_in_SF = gate_SF.clamp(max=limit) if on_input else gate_SF
    y_SF = nonlinear(gate_in_SF, activation)
    dgate_SF = dy * (up_SF.clamp(-limit, limit) + activation.up_offset)
    if not on_input:
        dgate_SF = torch.where(y_SF <= limit, dgate_SF, 0.0)
        y_SF = y_SF.clamp(max=limit)
    dgate_SF = _nonlinear_bwd(dgate_SF, gate_in_SF, activation)
    if on_input:
        dgate_SF = torch.where(gate_SF <= limit, dgate_SF, 0.0)
    dup_SF = torch.where(up_SF.abs() <= limit, dy * y_SF, 0.0)
    return torch.cat([dgate_SF, dup_SF], dim=-1)


def _nonlinear_bwd(dy: Tensor, x: Tensor, activation: Activation) -> Tensor:
    match activation.kind:
        case ActivationKind.SILU:
            s = torch.sigmoid(activation.alpha * x)
            # x meets (1 - s) first: alpha * x alone may overflow.
            return dy * (s + activation.alpha * (x * (s * (1 - s))))
        case ActivationKind.GELU:
            cumulative = 0.5 * (1 + torch.erf(x * sqrt(0.5)))
            return dy * (cumulative + x * (torch.exp(-0.5 * (x * x)) / sqrt(2 * pi)))
        case ActivationKind.GELU_TANH:
            inner = sqrt(2 / pi) * (x + 0.044715 * (x * x * x))
            # 1 + tanh(u) is 2 * sigmoid(2 * u).
            s = torch.sigmoid(2 * inner)
            slope = 2 * sqrt(2 / pi) * (1 + 3 * 0.044715 * (x * x))
            return dy * (s + x * (s * (1 - s)) * slope)
        case ActivationKind.RELU2:
            return torch.where(x <= 0, 0.0, dy * (2 * x))
