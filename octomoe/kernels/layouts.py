"""Where a kernel finds the scale (row, column), in every layout of `octomoe.core.layouts`."""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.formats import Format
from octomoe.core.layouts import ScaleLayout
from octomoe.core.qtensor import QTensor, packed_scale_shape
from octomoe.kernels.chain import _start_dependents

# Scales of a square that is brought into another order.
_TILE: Final = 64


@triton.jit
def _scale_offset(
    row,
    column,
    stride_row,
    stride_column,
    num_column_atoms,
    IS_INTERLEAVED: tl.constexpr,
):
    """Where the scale (row, column) lies, in elements; int64."""
    row, column = row.to(tl.int64), column.to(tl.int64)
    if IS_INTERLEAVED:
        atom = (row // 128) * num_column_atoms + column // 4
        offset = atom * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4
    else:
        offset = row * stride_row + column * stride_column
    return offset


@triton.jit
def _compact_kernel(
    packed_ptr,
    compact_ptr,
    num_rows,
    num_columns,
    stride_row,
    stride_column,
    num_column_atoms,
    IS_INTERLEAVED: tl.constexpr,
    STARTS_DEPENDENTS: tl.constexpr,
    TILE: tl.constexpr,
):
    _start_dependents(STARTS_DEPENDENTS)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    is_inside = (row < num_rows) & (column < num_columns)
    offset = _scale_offset(row, column, stride_row, stride_column, num_column_atoms, IS_INTERLEAVED)
    scale = tl.load(packed_ptr + offset, mask=is_inside, other=0)
    tl.store(compact_ptr + row.to(tl.int64) * num_columns + column, scale, mask=is_inside)


def compact_bytes(q: QTensor, *, starts_dependents: bool = False) -> Tensor:
    """The COMPACT scale of a matrix, as Triton takes it.

    `starts_dependents`: the kernel after it is launched at once, and waits for it by itself.
    torch needs 24 us to transpose the one-byte scales of 16384 x 7168 MXFP8 values on an H200.
    """
    scale = as_bytes(q.scale)
    if q.layout == ScaleLayout.COMPACT:
        return scale.contiguous()
    rows, columns = q.format.scale_shape(tuple(q.shape))
    compact = torch.empty((rows, columns), dtype=scale.dtype, device=scale.device)
    if compact.numel():
        _compact_kernel[(triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))](
            scale,
            compact,
            rows,
            columns,
            *scale_strides(q)[1:],
            IS_INTERLEAVED=q.layout == ScaleLayout.INTERLEAVED,
            STARTS_DEPENDENTS=starts_dependents,
            TILE=_TILE,
        )
    return compact


def empty_scale(
    format: Format, layout: ScaleLayout, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Memory for the scales of data of `shape`; what the layout pads with is zero already."""
    packed = packed_scale_shape(format, layout, shape)
    *_, rows, _ = format.scale_shape(shape)
    is_padded = layout == ScaleLayout.INTERLEAVED
    is_padded |= layout == ScaleLayout.GEMM_READY and packed[-1] != rows
    allocate = torch.zeros if is_padded else torch.empty
    return allocate(packed, dtype=format.scale_dtype, device=device)


def as_bytes(scale: Tensor) -> Tensor:
    """A scale as Triton takes it, which has no E8M0: that is read and written as bytes."""
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale


def scale_strides(q: QTensor) -> tuple[int, int, int, int]:
    """Of the scale: strides of expert, row and column; how many atoms lie side by side."""
    scale, is_stack = q.scale, q.data.dim() == 3
    expert = scale.stride(0) if is_stack else 0
    match q.layout:
        case ScaleLayout.COMPACT:
            return expert, scale.stride(-2), scale.stride(-1), 0
        case ScaleLayout.GEMM_READY:
            return expert, scale.stride(-1), scale.stride(-2), 0
        case ScaleLayout.INTERLEAVED:
            return expert, 0, 0, scale.shape[-3]
