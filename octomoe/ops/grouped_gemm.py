"""The counters for `grouped_gemm`, `grouped_gemm_dgrad` and `grouped_gemm_wgrad`."""

import torch
from torch import Tensor

from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.errors import refusal
from octomoe.ops.check import (
    check_float,
    check_offset_values,
    check_offsets,
    check_pair,
    check_rank,
    check_same_device,
    check_shape,
)
from octomoe.ops.dispatch import implementation
from octomoe.ops.register import register
from octomoe.ops.schema import format_of, put_together, take_apart


def grouped_gemm(
    x: Tensor | QTensor,
    w: Tensor | QTensor,
    routing_or_offsets: Routing | Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> Tensor:
    """Each expert multiplies its own rows: ``y[s] = x[s] @ w[e].T + bias[e]``, float32 sums.

    Args:
        x: ``[S, K]``, rows in slot order; float32, bf16, fp16, or a QTensor.
        w: ``[E, N, K]``; float32, bf16, fp16, or a QTensor. Scales of both operands change at the
            same places along K (`octomoe.core.formats.is_gemm_pair`).
        routing_or_offsets: a `Routing`, or ``[E + 1]`` int32 offsets of each expert's rows.
        bias: ``[E, N]`` float, or None.
        out_dtype: dtype of the result.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        ``[S, N]``; rows past the last offset are zero.

    Raises:
        TypeError: an operand is neither a QTensor nor float32, bf16 or fp16.
        ValueError: a shape, device or format pair does not fit.
        NotImplementedError: the backend cannot run this.

    >>> import octomoe
    >>> offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    >>> octomoe.grouped_gemm(torch.ones(2, 3), torch.ones(2, 1, 3), offsets).tolist()
    [[3.0], [3.0]]
    """
    op = "grouped_gemm"
    _check_operands(op, x=x, w=w)
    check_rank(op, "x", x, (2,), "[S, K]")
    check_rank(op, "w", w, (3,), "[E, N, K]")
    num_experts, width, depth = w.shape
    check_shape(op, "x", tuple(x.shape), (x.shape[0], depth))
    check_pair(op, format_of(w), format_of(x))
    offsets = check_offsets(op, routing_or_offsets, num_experts)
    if bias is not None:
        check_float(op, "bias", bias)
        check_shape(op, "bias", tuple(bias.shape), (num_experts, width))
    check_same_device(op, x.device, w=w, offsets=offsets, bias=bias)
    return _grouped_gemm_op(
        *take_apart(x), *take_apart(w), offsets, bias, _floating(op, out_dtype), backend
    )


def grouped_gemm_dgrad(
    dy: Tensor | QTensor,
    w: Tensor | QTensor,
    routing_or_offsets: Routing | Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> Tensor:
    """Gradient of `grouped_gemm` for x: ``dx[s] = dy[s] @ w[e]``, float32 sums.

    Args:
        dy: ``[S, N]``, rows in slot order; float32, bf16, fp16, or a QTensor.
        w: ``[E, N, K]``, as in the forward pass.
        routing_or_offsets: a `Routing`, or ``[E + 1]`` int32 offsets of each expert's rows.
        out_dtype: dtype of the result.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        ``[S, K]``; rows past the last offset are zero.

    Raises:
        TypeError, ValueError, NotImplementedError: as `grouped_gemm`.

    >>> import octomoe
    >>> offsets = torch.tensor([0, 1], dtype=torch.int32)
    >>> octomoe.grouped_gemm_dgrad(torch.ones(1, 2), torch.ones(1, 2, 3), offsets).tolist()
    [[2.0, 2.0, 2.0]]
    """
    op = "grouped_gemm_dgrad"
    _check_operands(op, dy=dy, w=w)
    check_rank(op, "dy", dy, (2,), "[S, N]")
    check_rank(op, "w", w, (3,), "[E, N, K]")
    check_shape(op, "dy", tuple(dy.shape), (dy.shape[0], w.shape[1]))
    offsets = check_offsets(op, routing_or_offsets, w.shape[0])
    check_same_device(op, dy.device, w=w, offsets=offsets)
    return _grouped_gemm_dgrad_op(
        *take_apart(dy), *take_apart(w), offsets, _floating(op, out_dtype), backend
    )


def grouped_gemm_wgrad(
    dy: Tensor | QTensor,
    x: Tensor | QTensor,
    routing_or_offsets: Routing | Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> Tensor:
    """Gradient of `grouped_gemm` for w: ``dw[e] = dy[rows of e].T @ x[rows of e]``, float32 sums.

    Args:
        dy: ``[S, N]``, rows in slot order; float32, bf16, fp16, or a QTensor.
        x: ``[S, K]``, as in the forward pass.
        routing_or_offsets: a `Routing`, or ``[E + 1]`` int32 offsets of each expert's rows.
        out_dtype: dtype of the result.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        ``[E, N, K]``; exactly zero for experts without rows.

    Raises:
        TypeError, ValueError, NotImplementedError: as `grouped_gemm`.

    >>> import octomoe
    >>> offsets = torch.tensor([0, 2, 2], dtype=torch.int32)
    >>> octomoe.grouped_gemm_wgrad(torch.ones(2, 1), torch.ones(2, 1), offsets).tolist()
    [[[2.0]], [[0.0]]]
    """
    op = "grouped_gemm_wgrad"
    _check_operands(op, dy=dy, x=x)
    check_rank(op, "dy", dy, (2,), "[S, N]")
    check_rank(op, "x", x, (2,), "[S, K]")
    check_shape(op, "x", tuple(x.shape), (dy.shape[0], x.shape[1]))
    offsets = check_offsets(op, routing_or_offsets)
    check_same_device(op, dy.device, x=x, offsets=offsets)
    return _grouped_gemm_wgrad_op(
        *take_apart(dy), *take_apart(x), offsets, _floating(op, out_dtype), backend
    )


def _check_operands(op: str, **operands: Tensor | QTensor) -> None:
    for name, operand in operands.items():
        if not isinstance(operand, QTensor):
            check_float(op, name, operand)


def _floating(op: str, dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        needs = "float32, bfloat16 or float16"
        raise TypeError(refusal(op, "out_dtype", f"is {dtype}", needs))
    return dtype


@register("grouped_gemm")
def _grouped_gemm_op(
    x: Tensor,
    x_scale: Tensor | None,
    x_format: str,
    x_layout: str,
    w: Tensor,
    w_scale: Tensor | None,
    w_format: str,
    w_layout: str,
    offsets: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    check_offset_values("grouped_gemm", offsets, x.shape[0])
    run = implementation("grouped_gemm", backend, x.device)
    return run(
        put_together(x, x_scale, x_format, x_layout),
        put_together(w, w_scale, w_format, w_layout),
        offsets,
        bias=bias,
        out_dtype=out_dtype,
    )


@_grouped_gemm_op.register_fake
def _(
    x: Tensor,
    x_scale: Tensor | None,
    x_format: str,
    x_layout: str,
    w: Tensor,
    w_scale: Tensor | None,
    w_format: str,
    w_layout: str,
    offsets: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]), dtype=out_dtype)


@register("grouped_gemm_dgrad")
def _grouped_gemm_dgrad_op(
    dy: Tensor,
    dy_scale: Tensor | None,
    dy_format: str,
    dy_layout: str,
    w: Tensor,
    w_scale: Tensor | None,
    w_format: str,
    w_layout: str,
    offsets: Tensor,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    check_offset_values("grouped_gemm_dgrad", offsets, dy.shape[0])
    run = implementation("grouped_gemm", backend, dy.device, "grouped_gemm_dgrad")
    return run(
        put_together(dy, dy_scale, dy_format, dy_layout),
        put_together(w, w_scale, w_format, w_layout),
        offsets,
        out_dtype=out_dtype,
    )


@_grouped_gemm_dgrad_op.register_fake
def _(
    dy: Tensor,
    dy_scale: Tensor | None,
    dy_format: str,
    dy_layout: str,
    w: Tensor,
    w_scale: Tensor | None,
    w_format: str,
    w_layout: str,
    offsets: Tensor,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return dy.new_empty((dy.shape[0], w.shape[2]), dtype=out_dtype)


@register("grouped_gemm_wgrad")
def _grouped_gemm_wgrad_op(
    dy: Tensor,
    dy_scale: Tensor | None,
    dy_format: str,
    dy_layout: str,
    x: Tensor,
    x_scale: Tensor | None,
    x_format: str,
    x_layout: str,
    offsets: Tensor,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    check_offset_values("grouped_gemm_wgrad", offsets, dy.shape[0])
    run = implementation("grouped_gemm", backend, dy.device, "grouped_gemm_wgrad")
    return run(
        put_together(dy, dy_scale, dy_format, dy_layout),
        put_together(x, x_scale, x_format, x_layout),
        offsets,
        out_dtype=out_dtype,
    )


@_grouped_gemm_wgrad_op.register_fake
def _(
    dy: Tensor,
    dy_scale: Tensor | None,
    dy_format: str,
    dy_layout: str,
    x: Tensor,
    x_scale: Tensor | None,
    x_format: str,
    x_layout: str,
    offsets: Tensor,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return dy.new_empty((offsets.shape[0] - 1, dy.shape[1], x.shape[1]), dtype=out_dtype)
