"""The counter for `dequantize`."""

import torch
from torch import Tensor

from octomoe.core.qtensor import QTensor
from octomoe.errors import refusal
from octomoe.ops.dispatch import implementation
from octomoe.ops.register import register
from octomoe.ops.schema import put_together, take_apart


def dequantize(q: QTensor, *, dtype: torch.dtype = torch.float32, backend: str = "auto") -> Tensor:
    """The values of a quantised tensor: ``data * scale`` in float32, rounded once to `dtype`.

    Args:
        q: the quantised tensor, in any layout.
        dtype: floating-point dtype of the result.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        A tensor of q's shape.

    Raises:
        TypeError: q is no QTensor, or dtype is not floating-point.
        NotImplementedError: the backend cannot run this.

    >>> import octomoe
    >>> octomoe.dequantize(octomoe.quantize(torch.tensor([[1.0, 3.0]]), octomoe.MXFP8))
    tensor([[1., 3.]])
    """
    if not isinstance(q, QTensor):
        raise TypeError(refusal("dequantize", "q", f"is a {type(q).__name__}", "a QTensor"))
    if not dtype.is_floating_point:
        raise TypeError(refusal("dequantize", "dtype", f"is {dtype}", "a floating-point dtype"))
    data, scale, format, layout = take_apart(q)
    assert scale is not None
    return _dequantize_op(data, scale, format, layout, dtype, backend)


@register("dequantize")
def _dequantize_op(
    data: Tensor, scale: Tensor, format: str, layout: str, dtype: torch.dtype, backend: str
) -> Tensor:
    q = put_together(data, scale, format, layout)
    return implementation("dequantize", backend, data.device)(q, dtype=dtype).contiguous()


@_dequantize_op.register_fake
def _(
    data: Tensor, scale: Tensor, format: str, layout: str, dtype: torch.dtype, backend: str
) -> Tensor:
    return data.new_empty(data.shape, dtype=dtype)
