"""Argument checks that several ops share. Shapes, dtypes and devices only: they cost nothing.

Values are looked at where they lie on the CPU (`check_ids`); on a GPU that would wait for it.
"""

from typing import Final

import torch
from torch import Tensor

from octomoe.core.formats import ALL, Format, is_gemm_pair
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.errors import refusal

_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
_MAX_SLOTS: Final = 2**31 - 1


def check_float(op: str, name: str, x: Tensor) -> None:
    """Refuse anything but float32, bf16 and fp16."""
    if not isinstance(x, Tensor):
        raise TypeError(refusal(op, name, f"is a {type(x).__name__}", "a tensor"))
    if x.dtype not in _FLOATS:
        do = "dequantize it first" if x.dtype.itemsize == 1 and x.is_floating_point() else ""
        needs = "float32, bfloat16 or float16"
        raise TypeError(refusal(op, name, f"has dtype {x.dtype}", needs, do))


def check_rank(op: str, name: str, x: Tensor | QTensor, ranks: tuple[int, ...], axes: str) -> None:
    """Refuse a tensor of another rank; `axes` says what is needed, e.g. ``"[T, D]"``."""
    if len(x.shape) not in ranks:
        raise ValueError(refusal(op, name, f"has shape {tuple(x.shape)}", axes))


def check_same_device(op: str, device: torch.device, **tensors: Tensor | QTensor | None) -> None:
    """Refuse tensors that are not where the op's first tensor is."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            needs = f"the other tensors' device {device}"
            raise ValueError(refusal(op, name, f"is on {tensor.device}", needs))


def check_format(op: str, name: str, format: Format) -> None:
    """Refuse what is no `Format`; a name is parsed by the caller with `Format.parse`."""
    if not isinstance(format, Format):
        do = f"use octomoe.Format.parse({format!r})" if isinstance(format, str) else ""
        raise TypeError(refusal(op, name, f"is a {type(format).__name__}", "a Format", do))


def check_given(
    op: str,
    name: str,
    given: Tensor | None,
    dtype: torch.dtype,
    format: Format,
    shape: tuple[int, ...],
) -> Tensor | None:
    """Refuse a given scale or amax that is neither one element nor one per block of `shape`.

    Returns:
        What was given, one element as a tensor of the data's rank.
    """
    if given is None:
        return None
    if given.dtype != dtype:
        raise TypeError(refusal(op, name, f"has dtype {given.dtype}", str(dtype)))
    scale_shape = format.scale_shape(shape)
    if tuple(given.shape) != scale_shape and given.numel() != 1:
        needs = f"{scale_shape} for {format.name} on shape {shape}, or one element"
        raise ValueError(refusal(op, name, f"has shape {tuple(given.shape)}", needs))
    return given.reshape([1] * len(shape)) if given.numel() == 1 else given


def check_pair(op: str, weight: Format | None, activation: Format | None) -> None:
    """Refuse operands whose scales change at different places along K."""
    if not is_gemm_pair(weight, activation):
        assert activation is not None
        got = f"are {'unquantised' if weight is None else weight.name} x {activation.name}"
        if weight is None:
            needs = "quantised weights with quantised activations"
        else:
            size = "the whole axis" if weight.block[2] == ALL else f"blocks of {weight.block[2]}"
            needs = f"activations scaled along K by {size}, as the weights are"
        do = "leave the activations unquantised, or requantize the weights"
        raise ValueError(refusal(op, "formats of w and x", got, needs, do))


def check_int(op: str, name: str, x: Tensor) -> None:
    """Refuse anything but int32 and int64."""
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(refusal(op, name, f"has dtype {x.dtype}", "int32 or int64"))


def check_expert_map(op: str, expert_map: Tensor) -> None:
    """Refuse what is no ``[E]`` of integers."""
    check_int(op, "expert_map", expert_map)
    check_rank(op, "expert_map", expert_map, (1,), "[E]")


def check_ids(op: str, name: str, ids: Tensor, num_experts: int) -> None:
    """Refuse expert ids out of range where they lie on the CPU.

    On a GPU, ids outside ``-1 .. num_experts - 1`` count as -1.
    """
    if ids.device.type == "cpu" and ids.numel():
        low, high = ids.min().item(), ids.max().item()
        if low < -1 or high >= num_experts:
            got = f"holds ids from {low} to {high}"
            needs = f"ids from 0 to {num_experts - 1}, or -1 for none"
            raise ValueError(refusal(op, name, got, needs))


def check_slots(op: str, num_slots: int) -> None:
    """Refuse more slots than int32 index maps can number."""
    if num_slots > _MAX_SLOTS:
        do = "split the batch"
        needs = f"at most {_MAX_SLOTS} slots"
        raise ValueError(refusal(op, "topk_ids", f"needs {num_slots} slots", needs, do))


def check_rows(op: str, name: str, x: Tensor | QTensor, num_rows: int, whose: str) -> None:
    """Refuse a 2-D tensor with another number of rows."""
    check_rank(op, name, x, (2,), "[rows, columns]")
    if x.shape[0] != num_rows:
        needs = f"{num_rows} rows, the {whose} of the routing"
        raise ValueError(refusal(op, name, f"has shape {tuple(x.shape)}", needs))


def check_routing(op: str, routing: Routing) -> None:
    """Refuse what is no `Routing`."""
    if not isinstance(routing, Routing):
        got = f"is a {type(routing).__name__}"
        raise TypeError(refusal(op, "routing", got, "a Routing, from build_routing"))


def check_offsets(
    op: str, routing_or_offsets: Routing | Tensor, num_experts: int | None = None
) -> Tensor:
    """The offsets of a routing, or offsets given as such: ``[E + 1]`` int32, first one 0."""
    if isinstance(routing_or_offsets, Routing):
        offsets = routing_or_offsets.expert_offsets
    elif isinstance(routing_or_offsets, Tensor):
        offsets = routing_or_offsets
    else:
        got = f"is a {type(routing_or_offsets).__name__}"
        raise TypeError(refusal(op, "routing_or_offsets", got, "a Routing or an int32 tensor"))
    is_list = offsets.dim() == 1 and offsets.shape[0] > 0
    is_sized = is_list and num_experts in (None, offsets.shape[0] - 1)
    if offsets.dtype != torch.int32 or not is_sized:
        got = f"are {offsets.dtype} of shape {tuple(offsets.shape)}"
        shape = "(E + 1,)" if num_experts is None else f"({num_experts + 1},)"
        needs = f"int32 of shape {shape}, one more than the experts, the first 0"
        raise ValueError(refusal(op, "offsets", got, needs))
    return offsets


def check_offset_values(op: str, offsets: Tensor, num_rows: int) -> None:
    """Refuse offsets that leave the rows or run backwards, where they lie on the CPU."""
    if offsets.device.type != "cpu":
        return
    values = offsets.tolist()
    if values[0] != 0 or values[-1] > num_rows or values != sorted(values):
        needs = f"a rising list from 0 to at most {num_rows}, the rows"
        raise ValueError(refusal(op, "offsets", f"are {values}", needs))


def check_shape(op: str, name: str, got: tuple[int, ...], needs: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape."""
    if tuple(got) != tuple(needs):
        raise ValueError(refusal(op, name, f"has shape {tuple(got)}", str(tuple(needs))))
