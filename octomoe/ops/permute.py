"""The counter for `permute`."""

from torch import Tensor

from octomoe.core.formats import ALL, Format
from octomoe.core.layouts import ScaleLayout
from octomoe.core.qtensor import QTensor, packed_scale_shape
from octomoe.core.routing import Routing
from octomoe.errors import refusal
from octomoe.ops.check import check_routing, check_rows, check_same_device
from octomoe.ops.dispatch import implementation
from octomoe.ops.register import register
from octomoe.ops.schema import put_together, take_apart


def permute(
    x: Tensor | QTensor,
    routing: Routing,
    *,
    layout: ScaleLayout | None = None,
    backend: str = "auto",
) -> Tensor | QTensor:
    """Bring rows into slot order, payload and scales together: ``y[s] = x[token_of_slot[s]]``.

    Bytes are copied, never recomputed: permuting a quantised tensor equals quantising the permuted
    one bit for bit. Slots of no token are zero (with the format's smallest scale).

    Args:
        x: ``[T, D]``, any dtype, or a QTensor with one scale per row, per part of a row, or for
            the whole tensor.
        routing: from `build_routing`.
        layout: of the result's scales; None keeps that of x.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        ``[S, D]`` of the same dtype, or a QTensor of the same format.

    Raises:
        ValueError: x has another number of rows than the routing has tokens, lies on another
            device, shares scales between rows, or has none although a layout is given.
        NotImplementedError: the backend cannot run this.

    >>> import torch, octomoe
    >>> routing = octomoe.build_routing(torch.tensor([[1], [0]]), 2)
    >>> octomoe.permute(torch.tensor([[1.0], [2.0]]), routing).tolist()
    [[2.0], [1.0]]
    """
    check_routing("permute", routing)
    check_rows("permute", "x", x, routing.num_tokens, "tokens")
    check_same_device("permute", routing.expert_offsets.device, x=x)
    routed = (routing.expert_offsets, routing.slot_of_choice_TA, routing.choice_of_slot_S)
    data, scale, format, layout_in = take_apart(x)
    if not isinstance(x, QTensor):
        if layout is not None:
            needs = "None for a tensor without scales"
            raise ValueError(refusal("permute", "layout", f"is {layout}", needs))
        return _permute_op(data, None, "", layout_in, *routed, routing.align, layout_in, backend)[0]
    rows = x.format.block[1]
    if rows not in (1, ALL) or (rows == ALL and x.format.block[2] != ALL):
        needs = "a scale per row, per part of a row, or for the whole tensor"
        do = "requantize it, for instance to fp8_group128 or mxfp8"
        raise ValueError(refusal("permute", "x", f"is {x.format.name}", needs, do))
    layout = x.layout if layout is None else ScaleLayout(layout)
    options = (*routed, routing.align, str(layout), backend)
    if rows == ALL:
        data = _permute_op(data, None, "", layout_in, *options)[0]
        return QTensor(data, x.scale, x.format, x.layout).relayout(layout)
    data, scale = _permute_op(data, scale, format, layout_in, *options)
    return QTensor(data, scale, x.format, layout)


@register("permute")
def _permute_op(
    data: Tensor,
    scale: Tensor | None,
    format: str,
    layout: str,
    expert_offsets: Tensor,
    slot_of_choice: Tensor,
    choice_of_slot: Tensor,
    align: int,
    layout_out: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    routing = Routing(expert_offsets, slot_of_choice, choice_of_slot, align)
    run = implementation("permute", backend, data.device)
    x = put_together(data, scale, format, layout)
    y = run(x, routing, layout=ScaleLayout(layout_out))
    return (y.data, y.scale) if isinstance(y, QTensor) else (y, data.new_empty(0))


@_permute_op.register_fake
def _(
    data: Tensor,
    scale: Tensor | None,
    format: str,
    layout: str,
    expert_offsets: Tensor,
    slot_of_choice: Tensor,
    choice_of_slot: Tensor,
    align: int,
    layout_out: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (choice_of_slot.shape[0], data.shape[1])
    if scale is None:
        return data.new_empty(shape), data.new_empty(0)
    scale_shape = packed_scale_shape(Format.parse(format), ScaleLayout(layout_out), shape)
    return data.new_empty(shape), scale.new_empty(scale_shape)
