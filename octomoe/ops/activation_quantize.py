"""The counters for `activation_quantize` and `activation_quantize_both`."""

from torch import Tensor

from octomoe.core.activations import Activation
from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.errors import refusal
from octomoe.ops.check import check_float, check_format, check_given, check_rank, check_same_device
from octomoe.ops.dispatch import implementation
from octomoe.ops.quantize import empty_quantized, seed_tensor
from octomoe.ops.register import register


def activation_quantize(
    h: Tensor,
    activation: Activation,
    format: Format,
    *,
    layout: ScaleLayout = COMPACT,
    scale: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> QTensor:
    """What stands between the two expert GEMMs: ``quantize(act(h))``, float32 until the cast.

    Args:
        h: ``[S, 2F]`` gate columns then up columns, or ``[S, F]`` without a gate; float32, bf16 or
            fp16.
        activation: see `octomoe.Activation`.
        format: what to store.
        layout: where to lay the scales.
        scale: a static scale to use as it is: one element, or of the COMPACT scale's shape.
        seed: rounds stochastically; see `octomoe.quantize`.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        A QTensor ``[S, F]``.

    Raises:
        TypeError: h is not float32, bf16 or fp16, or an argument is of another type than said.
        ValueError: h has an odd number of columns under a gate, or scale does not fit.
        NotImplementedError: the backend cannot run this.

    >>> import torch, octomoe
    >>> h = torch.tensor([[0.0, 2.0, 5.0, 1.0]])
    >>> octomoe.activation_quantize(h, octomoe.SILU, octomoe.FP8_ROW).shape
    torch.Size([1, 2])
    """
    op = "activation_quantize"
    shape = _check(op, h, activation)
    check_format(op, "format", format)
    check_same_device(op, h.device, scale=scale)
    scale = check_given(op, "scale", scale, format.scale_dtype, format, shape)
    seed = seed_tensor(op, seed, h.device)
    data, scale_out = _activation_quantize_op(
        h, activation.name, format.name, layout, scale, backend, seed
    )
    return QTensor(data, scale_out, format, layout)


def activation_quantize_both(
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
    """``quantize_both(act(h))``, float32 until the casts: for the next GEMM and for its gradient.

    h is read once, where `octomoe.quantize_both` reads its x once.

    Args:
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
        Two QTensors ``[S, F]``.

    Raises:
        TypeError: h is not float32, bf16 or fp16, or an argument is of another type than said.
        ValueError: h has an odd number of columns under a gate, or the seed does not fit.
        NotImplementedError: the backend cannot run this.

    >>> import torch, octomoe
    >>> formats = octomoe.FP8_GROUP128, octomoe.FP8_COLUMN128
    >>> rows, columns = activation_quantize_both(torch.ones(4, 512), octomoe.SILU, *formats)
    >>> tuple(rows.scale.shape), tuple(columns.scale.shape)
    ((4, 2), (1, 256))
    """
    op = "activation_quantize_both"
    _check(op, h, activation)
    check_format(op, "row_format", row_format)
    check_format(op, "column_format", column_format)
    seed = seed_tensor(op, seed, h.device)
    row_data, row_scale, column_data, column_scale = _activation_quantize_both_op(
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


def _check(op: str, h: Tensor, activation: Activation) -> tuple[int, int]:
    """Refuse what cannot be activated; the shape of what can, when it is."""
    check_float(op, "h", h)
    check_rank(op, "h", h, (2,), "[S, 2F], or [S, F] without a gate")
    if not isinstance(activation, Activation):
        got = f"is a {type(activation).__name__}"
        raise TypeError(refusal(op, "activation", got, "an Activation"))
    if activation.gated and h.shape[1] % 2:
        got = f"has shape {tuple(h.shape)}"
        needs = f"an even number of columns, gate then up, for {activation.name}"
        raise ValueError(refusal(op, "h", got, needs))
    return h.shape[0], _width(h, activation)


def _width(h: Tensor, activation: Activation) -> int:
    return h.shape[1] // 2 if activation.gated else h.shape[1]


@register("activation_quantize")
def _activation_quantize_op(
    h: Tensor,
    activation: str,
    format: str,
    layout: str,
    scale: Tensor | None,
    backend: str,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    run = implementation("activation_quantize", backend, h.device)
    q: QTensor = run(
        h,
        Activation.parse(activation),
        Format.parse(format),
        layout=ScaleLayout(layout),
        scale=scale,
        seed=seed,
    )
    return q.data, q.scale


@_activation_quantize_op.register_fake
def _(
    h: Tensor,
    activation: str,
    format: str,
    layout: str,
    scale: Tensor | None,
    backend: str,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (h.shape[0], _width(h, Activation.parse(activation)))
    return empty_quantized(h, shape, format, layout)


@register("activation_quantize_both")
def _activation_quantize_both_op(
    h: Tensor,
    activation: str,
    row_format: str,
    column_format: str,
    row_layout: str,
    column_layout: str,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = implementation("activation_quantize", backend, h.device, "activation_quantize_both")
    rows, columns = run(
        h,
        Activation.parse(activation),
        Format.parse(row_format),
        Format.parse(column_format),
        row_layout=ScaleLayout(row_layout),
        column_layout=ScaleLayout(column_layout),
        seed=seed,
    )
    return rows.data, rows.scale, columns.data, columns.scale


@_activation_quantize_both_op.register_fake
def _(
    h: Tensor,
    activation: str,
    row_format: str,
    column_format: str,
    row_layout: str,
    column_layout: str,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (h.shape[0], _width(h, Activation.parse(activation)))
    return (
        *empty_quantized(h, shape, row_format, row_layout),
        *empty_quantized(h, shape, column_format, column_layout),
    )
