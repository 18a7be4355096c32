"""Activations and their derivatives, in float32: what `octomoe.reference` has, element by element.

A tile of h is a tile of the gate and the tile of up that goes with it. NaN is kept as torch keeps
it: comparisons choose between values here, since a maximum may lose a NaN.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.activations import Activation, LimitOn

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


class Nonlinearity(NamedTuple):
    """An activation as compile-time values: what `_activate` and `_activate_bwd` take."""

    IS_GATED: bool
    KIND: str
    ALPHA: float
    CLAMP: float | None
    IS_OUTPUT_CLAMPED: bool
    UP_OFFSET: float


def nonlinearity_of(activation: Activation) -> Nonlinearity:
    """An activation as kernels see it."""
    return Nonlinearity(
        activation.gated,
        str(activation.kind),
        activation.alpha,
        activation.limit,
        activation.limit_on == LimitOn.OUTPUT,
        activation.up_offset,
    )


def width_of(h: Tensor, activation: Activation) -> int:
    """Columns of the activation's result."""
    return h.shape[1] // 2 if activation.gated else h.shape[1]


@triton.jit
def _load_gate_up(
    h_ptr,
    row,
    column,
    is_inside,
    num_columns,
    h_stride_row,
    h_stride_column,
    IS_GATED: tl.constexpr,
):
    """Tiles of the gate and of up in float32; without a gate both are the tile of h."""
    h_ptr += row.to(tl.int64)[:, None] * h_stride_row
    column = column.to(tl.int64)[None, :]
    gate = tl.load(h_ptr + column * h_stride_column, mask=is_inside, other=0.0)
    if IS_GATED:
        up = tl.load(h_ptr + (column + num_columns) * h_stride_column, mask=is_inside, other=0.0)
    else:
        up = gate
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def _gelu_tanh_argument(x):
    """1 + tanh(u) is 2 * sigmoid(2 * u): this is 2 * u. exp overflows to the right limits there."""
    return (x + x * x * x * _CUBIC) * _TWO_SQRT_2_OVER_PI


@triton.jit
def _nonlinear(x, ACTIVATION: tl.constexpr):
    # Triton 3.6 compares a string only if it has a name.
    KIND: tl.constexpr = ACTIVATION.KIND
    if KIND == "silu":
        y = x * tl.sigmoid(ACTIVATION.ALPHA * x)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif KIND == "gelu_tanh":
        y = x * tl.sigmoid(_gelu_tanh_argument(x))
    else:
        tl.static_assert(KIND == "relu2")
        positive = tl.where(x <= 0.0, 0.0, x)
        y = positive * positive
    return y


@triton.jit
def _nonlinear_bwd(dy, x, ACTIVATION: tl.constexpr):
    # Triton 3.6 compares a string only if it has a name.
    KIND: tl.constexpr = ACTIVATION.KIND
    if KIND == "silu":
        sigmoid = tl.sigmoid(ACTIVATION.ALPHA * x)
        # x meets (1 - sigmoid) first: their product is a number where alpha * x has overflown.
        dx = dy * (sigmoid + ACTIVATION.ALPHA * (x * (sigmoid * (1.0 - sigmoid))))
    elif KIND == "gelu":
        cumulative = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        dx = dy * (cumulative + x * (tl.exp(-0.5 * (x * x)) * _INV_SQRT_2_PI))
    elif KIND == "gelu_tanh":
        sigmoid = tl.sigmoid(_gelu_tanh_argument(x))
        slope = (1.0 + 3.0 * (x * x) * _CUBIC) * _TWO_SQRT_2_OVER_PI
        dx = dy * (sigmoid + x * (sigmoid * (1.0 - sigmoid)) * slope)
    else:
        tl.static_assert(KIND == "relu2")
        dx = tl.where(x <= 0.0, 0.0, dy * (2.0 * x))
    return dx


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr):
    """act(h) of tiles of gate and up; a `Nonlinearity` says which."""
    CLAMP: tl.constexpr = ACTIVATION.CLAMP
    if CLAMP is not None:
        up = tl.where(up < -CLAMP, -CLAMP, tl.where(up > CLAMP, CLAMP, up))
        if not ACTIVATION.IS_OUTPUT_CLAMPED:
            gate = tl.where(gate > CLAMP, CLAMP, gate)
    y = _nonlinear(gate, ACTIVATION)
    if CLAMP is not None and ACTIVATION.IS_OUTPUT_CLAMPED:
        y = tl.where(y > CLAMP, CLAMP, y)
    if ACTIVATION.IS_GATED:
        y = y * (up + ACTIVATION.UP_OFFSET)
    return y


@triton.jit
def _activate_bwd(dy, gate, up, ACTIVATION: tl.constexpr):
    """Gradients of the gate and of up; without a gate both are that of h.

    A clamp passes the gradient on at its limits, and stops it beyond them and at NaN.
    """
    CLAMP: tl.constexpr = ACTIVATION.CLAMP
    if ACTIVATION.IS_GATED:
        gate_in, up_in = gate, up
        if CLAMP is not None:
            up_in = tl.where(up < -CLAMP, -CLAMP, tl.where(up > CLAMP, CLAMP, up))
            if not ACTIVATION.IS_OUTPUT_CLAMPED:
                gate_in = tl.where(gate > CLAMP, CLAMP, gate)
        y = _nonlinear(gate_in, ACTIVATION)
        dgate = dy * (up_in + ACTIVATION.UP_OFFSET)
        if CLAMP is not None and ACTIVATION.IS_OUTPUT_CLAMPED:
            dgate = tl.where(y <= CLAMP, dgate, 0.0)
            y = tl.where(y > CLAMP, CLAMP, y)
        dgate = _nonlinear_bwd(dgate, gate_in, ACTIVATION)
        dup = dy * y
        if CLAMP is not None:
            dup = tl.where(tl.abs(up) <= CLAMP, dup, 0.0)
            if not ACTIVATION.IS_OUTPUT_CLAMPED:
                dgate = tl.where(gate <= CLAMP, dgate, 0.0)
    else:
        dgate = _nonlinear_bwd(dy, gate, ACTIVATION)
        dup = dgate
    return dgate, dup
