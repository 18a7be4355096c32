"""The counter for `requantize`."""

from torch import Tensor

from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor, packed_scale_shape
from octomoe.errors import refusal
from octomoe.ops.check import check_format
from octomoe.ops.dispatch import implementation
from octomoe.ops.register import register
from octomoe.ops.schema import put_together, take_apart


def requantize(
    q: QTensor, format: Format, *, layout: ScaleLayout = COMPACT, backend: str = "auto"
) -> QTensor:
    """The values of one format quantised to another, by way of float32.

    From power-of-two scales to power-of-two scales only elements that become subnormal change;
    from exact scales about 3 dB are lost (two roundings of the same size).

    Args:
        q: the quantised tensor, in any layout.
        format: what to store.
        layout: where to lay the new scales.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        A QTensor of q's shape.

    Raises:
        TypeError: q is no QTensor or format no Format.
        NotImplementedError: the backend cannot run this.

    >>> import torch, octomoe
    >>> q = octomoe.quantize(torch.tensor([[1.0, 3.0]]), octomoe.MXFP8)
    >>> octomoe.requantize(q, octomoe.MXFP8_2D).dequantize()
    tensor([[1., 3.]])
    """
    if not isinstance(q, QTensor):
        do = "use octomoe.quantize"
        raise TypeError(refusal("requantize", "q", f"is a {type(q).__name__}", "a QTensor", do))
    check_format("requantize", "format", format)
    parts = take_apart(q)
    assert parts.scale is not None
    data, scale = _requantize_op(
        parts.data, parts.scale, parts.format, parts.layout, format.name, layout, backend
    )
    return QTensor(data, scale, format, layout)


@register("requantize")
def _requantize_op(
    data: Tensor,
    scale: Tensor,
    format: str,
    layout: str,
    new_format: str,
    new_layout: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = implementation("requantize", backend, data.device)
    q: QTensor = run(
        put_together(data, scale, format, layout),
        Format.parse(new_format),
        layout=ScaleLayout(new_layout),
    )
    return q.data, q.scale


@_requantize_op.register_fake
def _(
    data: Tensor,
    scale: Tensor,
    format: str,
    layout: str,
    new_format: str,
    new_layout: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    fmt = Format.parse(new_format)
    shape = packed_scale_shape(fmt, ScaleLayout(new_layout), tuple(data.shape))
    return (
        data.new_empty(data.shape, dtype=fmt.element.dtype),
        data.new_empty(shape, dtype=fmt.scale_dtype),
    )
