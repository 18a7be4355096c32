"""The counter for `activation_quantize`."""

from torch import Tensor

from octomoe.core.activations import Activation
from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor, packed_scale_shape
from octomoe.errors import refusal
from octomoe.ops.check import check_float, check_format, check_given, check_rank, check_same_device
from octomoe.ops.dispatch import implementation
from octomoe.ops.register import register


def activation_quantize(
    h: Tensor,
    activation: Activation,
    format: Format,
    *,
    layout: ScaleLayout = COMPACT,
    scale: Tensor | None = None,
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
    check_float(op, "h", h)
    check_rank(op, "h", h, (2,), "[S, 2F], or [S, F] without a gate")
    if not isinstance(activation, Activation):
        got = f"is a {type(activation).__name__}"
        raise TypeError(refusal(op, "activation", got, "an Activation"))
    check_format(op, "format", format)
    if activation.gated and h.shape[1] % 2:
        got = f"has shape {tuple(h.shape)}"
        needs = f"an even number of columns, gate then up, for {activation.name}"
        raise ValueError(refusal(op, "h", got, needs))
    check_same_device(op, h.device, scale=scale)
    shape = (h.shape[0], _width(h, activation))
    scale = check_given(op, "scale", scale, format.scale_dtype, format, shape)
    data, scale_out = _activation_quantize_op(
        h, activation.name, format.name, layout, scale, backend
    )
    return QTensor(data, scale_out, format, layout)


def _width(h: Tensor, activation: Activation) -> int:
    return h.shape[1] // 2 if activation.gated else h.shape[1]


@register("activation_quantize")
def _activation_quantize_op(
    h: Tensor, activation: str, format: str, layout: str, scale: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    run = implementation("activation_quantize", backend, h.device)
    q: QTensor = run(
        h,
        Activation.parse(activation),
        Format.parse(format),
        layout=ScaleLayout(layout),
        scale=scale,
    )
    return q.data, q.scale


@_activation_quantize_op.register_fake
def _(
    h: Tensor, activation: str, format: str, layout: str, scale: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    fmt = Format.parse(format)
    shape = (h.shape[0], _width(h, Activation.parse(activation)))
    scale_shape = packed_scale_shape(fmt, ScaleLayout(layout), shape)
    return (
        h.new_empty(shape, dtype=fmt.element.dtype),
        h.new_empty(scale_shape, dtype=fmt.scale_dtype),
    )
