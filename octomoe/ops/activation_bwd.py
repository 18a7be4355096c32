"""The counters for `activation_bwd` and `activation_bwd_both`."""

import torch
from torch import Tensor

from octomoe.core.activations import Activation
from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.errors import refusal
from octomoe.ops.check import check_float, check_format, check_rank, check_same_device, check_shape
from octomoe.ops.dispatch import implementation
from octomoe.ops.quantize import empty_quantized, seed_tensor
from octomoe.ops.register import register


def activation_bwd(
    dy: Tensor,
    h: Tensor,
    activation: Activation,
    *,
    format: Format | None = None,
    layout: ScaleLayout = COMPACT,
    out_dtype: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor | QTensor:
    """Gradient of ``act(h)`` for h: ``dh = dy * act'(h)``, float32 until it is stored or quantised.

    A clamp passes the gradient on at its limits and stops it beyond them. Rows of dh are quantised
    as what they are, gate columns then up columns: a scale of a row serves both.

    Args:
        dy: ``[S, F]`` float32, bf16 or fp16, gradient of act(h).
        h: ``[S, 2F]`` gate columns then up columns, or ``[S, F]`` without a gate; float32, bf16 or
            fp16.
        activation: see `octomoe.Activation`.
        format: what to store; None stores plain numbers.
        layout: where to lay the scales.
        out_dtype: dtype of plain numbers; None takes that of dy.
        seed: rounds to the format stochastically; see `octomoe.quantize`.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        Of h's shape, a tensor, or a QTensor if a format is given.

    Raises:
        TypeError: dy or h is not float32, bf16 or fp16, or an argument is of another type than
            said.
        ValueError: h does not fit dy, or an option is given that has no use: out_dtype with a
            format, a layout or a seed without one.
        NotImplementedError: the backend cannot run this.

    >>> import octomoe
    >>> h = torch.tensor([[3.0, -1.0]])
    >>> octomoe.activation_bwd(torch.ones(1, 2), h, octomoe.RELU2)
    tensor([[6., 0.]])
    """
    op = "activation_bwd"
    _check(op, dy, h, activation)
    if format is not None:
        check_format(op, "format", format)
        if out_dtype is not None:
            needs = f"None with a format: {format.name} says what is stored"
            raise ValueError(refusal(op, "out_dtype", f"is {out_dtype}", needs))
    elif layout != COMPACT:
        raise ValueError(refusal(op, "layout", f"is {layout}", "a format, whose scales it lays"))
    elif seed is not None:
        raise ValueError(refusal(op, "seed", "is given", "a format, to which it rounds"))
    out_dtype = dy.dtype if out_dtype is None else out_dtype
    if out_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        needs = "float32, bfloat16 or float16"
        raise TypeError(refusal(op, "out_dtype", f"is {out_dtype}", needs))
    seed = seed_tensor(op, seed, dy.device)
    name = "" if format is None else format.name
    dh, scale = _activation_bwd_op(dy, h, activation.name, name, layout, out_dtype, backend, seed)
    return dh if format is None else QTensor(dh, scale, format, layout)


def activation_bwd_both(
    dy: Tensor,
    h: Tensor,
    activation: Activation,
    row_format: Format,
    column_format: Format,
    *,
    row_layout: ScaleLayout = COMPACT,
    column_layout: ScaleLayout = COMPACT,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[QTensor, QTensor]:
    """``quantize_both(activation_bwd(dy, h))``, float32 until the casts: for both GEMMs behind it.

    dy and h are read once, where `octomoe.quantize_both` reads its x once.

    Args:
        dy: ``[S, F]`` float32, bf16 or fp16, gradient of act(h).
        h: ``[S, 2F]`` gate columns then up columns, or ``[S, F]`` without a gate; float32, bf16 or
            fp16.
        activation: see `octomoe.Activation`.
        row_format: of the first result.
        column_format: of the second.
        row_layout: where to lay the first one's scales.
        column_layout: where to lay the second one's.
        seed: rounds both stochastically, by the same random bits; see `octomoe.quantize`.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        Two QTensors of h's shape.

    Raises:
        TypeError: dy or h is not float32, bf16 or fp16, or an argument is of another type than
            said.
        ValueError: h does not fit dy, or the seed does not fit.
        NotImplementedError: the backend cannot run this.

    >>> import octomoe
    >>> formats = octomoe.FP8_GROUP128, octomoe.FP8_COLUMN128
    >>> dy, h = torch.ones(4, 256), torch.ones(4, 512)
    >>> rows, columns = activation_bwd_both(dy, h, octomoe.SILU, *formats)
    >>> tuple(rows.scale.shape), tuple(columns.scale.shape)
    ((4, 4), (1, 512))
    """
    op = "activation_bwd_both"
    _check(op, dy, h, activation)
    check_format(op, "row_format", row_format)
    check_format(op, "column_format", column_format)
    seed = seed_tensor(op, seed, dy.device)
    row_data, row_scale, column_data, column_scale = _activation_bwd_both_op(
        dy,
        h,
        activation.name,
        row_format.name,
        column_format.name,
        row_layout,
        column_layout,
        seed,
        backend,
    )
    return (
        QTensor(row_data, row_scale, row_format, row_layout),
        QTensor(column_data, column_scale, column_format, column_layout),
    )


def _check(op: str, dy: Tensor, h: Tensor, activation: Activation) -> None:
    """Refuse what has no gradient."""
    check_float(op, "dy", dy)
    check_float(op, "h", h)
    check_rank(op, "dy", dy, (2,), "[S, F]")
    if not isinstance(activation, Activation):
        got = f"is a {type(activation).__name__}"
        raise TypeError(refusal(op, "activation", got, "an Activation"))
    rows, width = dy.shape
    check_shape(op, "h", tuple(h.shape), (rows, 2 * width if activation.gated else width))
    check_same_device(op, dy.device, h=h)


@register("activation_bwd")
def _activation_bwd_op(
    dy: Tensor,
    h: Tensor,
    activation: str,
    format: str,
    layout: str,
    out_dtype: torch.dtype,
    backend: str,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    run = implementation("activation_bwd", backend, dy.device)
    dh = run(
        dy,
        h,
        Activation.parse(activation),
        format=Format.parse(format) if format else None,
        layout=ScaleLayout(layout),
        out_dtype=out_dtype,
        seed=seed,
    )
    return (dh.data, dh.scale) if isinstance(dh, QTensor) else (dh, dh.new_empty(0))


@_activation_bwd_op.register_fake
def _(
    dy: Tensor,
    h: Tensor,
    activation: str,
    format: str,
    layout: str,
    out_dtype: torch.dtype,
    backend: str,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (h.shape[0], h.shape[1])
    if not format:
        return h.new_empty(shape, dtype=out_dtype), h.new_empty(0, dtype=out_dtype)
    return empty_quantized(h, shape, format, layout)


@register("activation_bwd_both")
def _activation_bwd_both_op(
    dy: Tensor,
    h: Tensor,
    activation: str,
    row_format: str,
    column_format: str,
    row_layout: str,
    column_layout: str,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = implementation("activation_bwd", backend, dy.device, "activation_bwd_both")
    rows, columns = run(
        dy,
        h,
        Activation.parse(activation),
        Format.parse(row_format),
        Format.parse(column_format),
        row_layout=ScaleLayout(row_layout),
        column_layout=ScaleLayout(column_layout),
        seed=seed,
    )
    return rows.data, rows.scale, columns.data, columns.scale


@_activation_bwd_both_op.register_fake
def _(
    dy: Tensor,
    h: Tensor,
    activation: str,
    row_format: str,
    column_format: str,
    row_layout: str,
    column_layout: str,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (h.shape[0], h.shape[1])
    return (
        *empty_quantized(h, shape, row_format, row_layout),
        *empty_quantized(h, shape, column_format, column_layout),
    )
