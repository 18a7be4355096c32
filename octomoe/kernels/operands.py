"""Sides of a product of matrices: from what lies in memory to what tensor cores multiply.

A product ``a @ b.T`` sums over the *depth*; what is left of a side is its *out*. A step of the
depth is a tile ``[out, depth]``, read through strides, so that any matrix is a side: transposed or
not, quantised or not. Its scales multiply one of three things (`Scaled`).
"""

from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.formats import Format
from octomoe.core.layouts import ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.kernels.layouts import _scale_offset, as_bytes
from octomoe.kernels.layouts import scale_strides as strides_of_scale
from octomoe.kernels.scaling import _loaded_scale

# Neighbouring bytes of out that a thread turns.
_RUN = tl.constexpr(16)


class Scaled(StrEnum):
    """What a side's scales multiply.

    Attributes:
        SUM: the sum, once; they span the depth.
        PART: the product of a part of a step, over which they are constant. It starts at zero.
        VALUE: values, before the product.
        NOTHING: there are none.
    """

    SUM = "sum"
    PART = "part"
    VALUE = "value"
    NOTHING = "nothing"


class Operand(NamedTuple):
    """A side of a product, as kernels take it. Upper case is known when they are compiled.

    Attributes:
        data: ``[rows, columns]`` or ``[experts, rows, columns]``.
        stride_expert, stride_out, stride_depth: of the data.
        scale: or None.
        scale_stride_expert, scale_stride_row, scale_stride_column: of the scale.
        scale_atoms: how many lie side by side.
        BLOCK_EXPERTS, BLOCK_OUT, BLOCK_DEPTH: of a scale block; 0 spans the axis.
        SCALES_OUT, SCALES_DEPTH: that a tile has along its axes.
        SCALED: what they multiply.
        IS_E8M0, IS_INTERLEAVED: how they are stored.
        IS_OUT_COLUMNS: whether out is the columns, and the depth the rows.
        IS_TURNED: FP8 whose neighbours lie along out; tensor cores take neighbours along the depth.
    """

    data: Tensor
    stride_expert: int
    stride_out: int
    stride_depth: int
    scale: Tensor | None
    scale_stride_expert: int
    scale_stride_row: int
    scale_stride_column: int
    scale_atoms: int
    BLOCK_EXPERTS: Any
    BLOCK_OUT: Any
    BLOCK_DEPTH: Any
    SCALES_OUT: Any
    SCALES_DEPTH: Any
    SCALED: Any
    IS_E8M0: Any
    IS_INTERLEAVED: Any
    IS_OUT_COLUMNS: Any
    IS_TURNED: Any


def operand(
    x: Tensor | QTensor,
    *,
    out_axis: int,
    tile: int,
    part: int,
    scaled: Scaled,
    is_turned: bool = False,
) -> Operand:
    """`x` as a side of a product.

    Args:
        x: ``[rows, columns]`` or ``[experts, rows, columns]``.
        out_axis: -2 (rows) or -1 (columns); the other one is the depth.
        tile, part: sizes of a tile along out and depth.
        scaled: what its scales multiply.
        is_turned: see `Operand`.
    """
    if isinstance(x, Tensor):
        data, format, layout, scale, scale_strides = x, None, None, None, (0, 0, 0, 0)
    else:
        data, format, layout = x.data, x.format, x.layout
        scale, scale_strides = as_bytes(x.scale), strides_of_scale(x)
    is_stack = data.dim() == 3
    return Operand(
        data,
        data.stride(0) if is_stack else 0,
        data.stride(out_axis),
        data.stride(-3 - out_axis),
        scale,
        *scale_strides,
        *_constants(format, layout, is_stack, out_axis, tile, part, scaled, is_turned),
    )


# Kept: Triton compares arguments with those of kernels it has, the same ones at once.
@cache
def _constants(
    format: Format | None,
    layout: ScaleLayout | None,
    is_stack: bool,
    out_axis: int,
    tile: int,
    part: int,
    scaled: Scaled,
    is_turned: bool,
) -> tuple[Any, ...]:
    """What `Operand` has in upper case."""
    block_experts, block_out, block_depth = block_along(format, out_axis)
    # The rows of an expert start anywhere, so that scales over several of them are read for each.
    is_aligned = is_stack or out_axis == -1 or block_out == 0
    scales_out = num_scales(block_out, tile) if is_aligned else tile
    if scaled != Scaled.VALUE and scales_out > 1:
        # A vector is read in full: that costs less than to spread it.
        scales_out = tile
    constants = (
        block_experts,
        block_out,
        block_depth,
        scales_out,
        num_scales(block_depth, part),
        str(scaled),
        format is not None and format.scale_dtype == torch.float8_e8m0fnu,
        layout == ScaleLayout.INTERLEAVED,
        out_axis == -1,
        is_turned,
    )
    return tuple(map(tl.constexpr, constants))


def block_along(format: Format | None, out_axis: int) -> tuple[int, int, int]:
    """Scale block over experts, out and depth; 0 spans an axis, as what has no scales does."""
    if format is None:
        return 0, 0, 0
    block = [max(size, 0) for size in format.block]
    return block[0], block[out_axis], block[-3 - out_axis]


def num_scales(block: int, size: int) -> int:
    """Scales along `size` elements of which the first is a multiple of it; `size` if any number.

    >>> [num_scales(block, 128) for block in (0, 256, 128, 32, 1, 5)]
    [1, 1, 1, 4, 128, 128]
    """
    if block == 0 or block % size == 0:
        return 1
    return size // block if size % block == 0 else size


@triton.jit
def _out_of_tile(first_out, OUTS: tl.constexpr, IS_TURNED: tl.constexpr):
    """Which out each row of a tile is: in order, but for turned ones."""
    place = tl.arange(0, OUTS)
    if IS_TURNED:
        place = place % (OUTS // _RUN) * _RUN + place // (OUTS // _RUN)
    return first_out + place


@triton.jit
def _in_order(product, IS_TURNED: tl.constexpr):
    """A product ``[out of a, out of b]`` of a side b that may be turned, in order."""
    if IS_TURNED:
        A: tl.constexpr = product.shape[0]
        B: tl.constexpr = product.shape[1]
        product = tl.permute(tl.reshape(product, [A, _RUN, B // _RUN]), [0, 2, 1])
        product = tl.reshape(product, [A, B])
    return product


@triton.jit
def _tile_pointers(x, expert, first_out, first_depth, OUTS: tl.constexpr, PART: tl.constexpr):
    """Where the elements of a tile lie, ``[out, depth]``; of a turned one ``[depth / 4, out]``, the
    first of every four.
    """
    out = (first_out + tl.arange(0, OUTS)).to(tl.int64) * x.stride_out
    if x.IS_TURNED:
        depth = (first_depth + 4 * tl.arange(0, PART // 4)).to(tl.int64) * x.stride_depth
        offset = depth[:, None] + out[None, :]
    else:
        depth = (first_depth + tl.arange(0, PART)).to(tl.int64) * x.stride_depth
        offset = out[:, None] + depth[None, :]
    return x.data + expert.to(tl.int64) * x.stride_expert + offset


@triton.jit
def _ahead(x, count):
    """How far apart elements `count` steps along the depth lie; int64."""
    return tl.full([], count, tl.int64) * x.stride_depth


@triton.jit
def _load_tile(
    x,
    ptrs,
    first_out,
    end_out,
    first_depth,
    start_depth,
    end_depth,
    OUTS: tl.constexpr,
    PART: tl.constexpr,
    IS_DIVISIBLE: tl.constexpr,
):
    """A tile ``[out, depth]``, zero past the ends."""
    is_out = first_out + tl.arange(0, OUTS) < end_out
    if x.IS_TURNED:
        t0 = _load_fourth(x, ptrs, 0, is_out, first_depth, end_depth, PART, IS_DIVISIBLE)
        t1 = _load_fourth(x, ptrs, 1, is_out, first_depth, end_depth, PART, IS_DIVISIBLE)
        t2 = _load_fourth(x, ptrs, 2, is_out, first_depth, end_depth, PART, IS_DIVISIBLE)
        t3 = _load_fourth(x, ptrs, 3, is_out, first_depth, end_depth, PART, IS_DIVISIBLE)
        # [depth / 4, out, 4]: a thread has four neighbours along the depth, which are a word. On
        # sm90 it stores 16 words of 128 x 128, not 64 bytes, and loads can run ahead.
        fours = tl.join(tl.join(t0, t2), tl.join(t1, t3))
        # Threads side by side hold runs of out, but rows of shared memory that are 16 apart lie in
        # the same banks. Runs are interleaved, so that these threads store to rows side by side.
        fours = tl.reshape(fours, [PART // 4, OUTS // _RUN, _RUN, 4])
        tile = tl.reshape(tl.permute(fours, [2, 1, 0, 3]), [OUTS, PART])
    elif IS_DIVISIBLE:
        tile = tl.load(ptrs, mask=is_out[:, None], other=0.0)
    else:
        # Counted from the tile's first: from zero, LLVM of Triton 3.6 shifted this and another
        # thread's number as a pair and let one overflow into the other (a misaligned address).
        depth = tl.arange(0, PART)
        is_depth = (depth >= start_depth - first_depth) & (depth < end_depth - first_depth)
        tile = tl.load(ptrs, mask=is_out[:, None] & is_depth[None, :], other=0.0)
    return tile


@triton.jit
def _load_fourth(
    x,
    ptrs,
    NUMBER: tl.constexpr,
    is_out,
    first_depth,
    end_depth,
    PART: tl.constexpr,
    IS_DIVISIBLE: tl.constexpr,
):
    """Every fourth step of a depth that starts with the tile's, ``[depth / 4, out]``."""
    mask = is_out[None, :]
    if not IS_DIVISIBLE:
        depth = first_depth + 4 * tl.arange(0, PART // 4) + NUMBER
        mask = mask & (depth < end_depth)[:, None]
    return tl.load(ptrs + _ahead(x, NUMBER), mask=mask, other=0.0)


@triton.jit
def _load_scales(
    x,
    expert,
    first_out,
    end_out,
    first_depth,
    start_depth,
    end_depth,
    OUTS: tl.constexpr,
    PART: tl.constexpr,
):
    """Scales ``[SCALES_OUT, SCALES_DEPTH]`` of a tile, in float32."""
    SPAN: tl.constexpr = PART // x.SCALES_DEPTH
    if x.SCALES_OUT == OUTS:
        out = _out_of_tile(first_out, OUTS, x.IS_TURNED)[:, None]
    else:
        out = (first_out + tl.arange(0, x.SCALES_OUT) * (OUTS // x.SCALES_OUT))[:, None]
    depth = (first_depth + tl.arange(0, x.SCALES_DEPTH) * SPAN)[None, :]
    # What lies before the start is another expert's: a NaN there must not come in.
    mask = (out < end_out) & (depth < end_depth) & (depth + SPAN > start_depth)
    block_out, block_depth, block_expert = out * 0, depth * 0, expert * 0
    if x.BLOCK_OUT:
        block_out = out // x.BLOCK_OUT
    if x.BLOCK_DEPTH:
        block_depth = depth // x.BLOCK_DEPTH
    if x.BLOCK_EXPERTS:
        block_expert = expert // x.BLOCK_EXPERTS
    row, column = block_out, block_depth
    if x.IS_OUT_COLUMNS:
        row, column = block_depth, block_out
    offset = block_expert.to(tl.int64) * x.scale_stride_expert + _scale_offset(
        row,
        column,
        x.scale_stride_row,
        x.scale_stride_column,
        x.scale_atoms,
        x.IS_INTERLEAVED,
    )
    return _loaded_scale(tl.load(x.scale + offset, mask=mask, other=0), x.IS_E8M0)


@triton.jit
def _scaled(tile, scale):
    """Values of a tile under a scale for each of its blocks, in float32."""
    OUTS: tl.constexpr = tile.shape[0]
    DEPTH: tl.constexpr = tile.shape[1]
    ROWS: tl.constexpr = scale.shape[0]
    COLUMNS: tl.constexpr = scale.shape[1]
    if (ROWS != 1 and ROWS != OUTS) or (COLUMNS != 1 and COLUMNS != DEPTH):
        # Scales are spread, not values cut into blocks: these keep their layout so.
        shape: tl.constexpr = [ROWS, OUTS // ROWS, COLUMNS, DEPTH // COLUMNS]
        scale = tl.reshape(tl.broadcast_to(scale[:, None, :, None], shape), [OUTS, DEPTH])
    return tile.to(tl.float32) * scale


@triton.jit
def _in_dtype(tile, DTYPE: tl.constexpr):
    """A tile as tensor cores take it. 8-bit floats of either kind are one dtype to them."""
    if tile.dtype.primitive_bitwidth != DTYPE.primitive_bitwidth:
        if tile.dtype.primitive_bitwidth == 8 and DTYPE.is_bf16():
            # Straight to bf16, sm90 takes an instruction of a quarter of the speed per value.
            tile = tile.to(tl.float32)
        tile = tile.to(DTYPE)
    return tile
