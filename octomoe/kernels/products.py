"""``a @ b.T`` of a tile: the loop over the depth that all grouped GEMMs share.

Tried, in instructions per thread and 128 of the depth (sm90, Triton 3.6, compiled offline):

- MXFP8, few rows, values under their scales as bf16: 797 and 187 registers; by parts 606 and 114.
- MXFP8, many rows, by parts: a scale per column and part spills; as bf16 698.
- bytes of weight gradients turned on both sides: 458, as bf16 563. Not kept: it serves formats of
  one scale only, and side a goes by way of registers.
"""

from math import gcd
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.formats import Format, Rounding
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.operands import (
    Operand,
    Scaled,
    _ahead,
    _in_dtype,
    _load_scales,
    _load_tile,
    _scaled,
    _tile_pointers,
    block_along,
    num_scales,
    operand,
)
from octomoe.tune.configs import GemmConfig

_BYTE: Final = tl.float8e4nv
_PLAIN: Final = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _part_scales(
    x, expert, first_out, end_out, first_depth, start_depth, end_depth, OUTS, PART: tl.constexpr
):
    """Scales ``[out, 1]`` that are constant over a part of a step, or 1."""
    if x.SCALED == "part":
        scale = _load_scales(
            x, expert, first_out, end_out, first_depth, start_depth, end_depth, OUTS, PART
        )
    else:
        scale = tl.full([1, 1], 1.0, tl.float32)
    return scale


@triton.jit
def _multiplicand(
    x,
    ptrs,
    expert,
    first_out,
    end_out,
    first_depth,
    start_depth,
    end_depth,
    OUTS: tl.constexpr,
    PART: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_DIVISIBLE: tl.constexpr,
):
    """A tile as tensor cores take it, under its scales if these change within it."""
    tile = _load_tile(
        x,
        ptrs,
        first_out,
        end_out,
        first_depth,
        start_depth,
        end_depth,
        OUTS,
        PART,
        IS_DIVISIBLE,
    )
    if x.SCALED == "value":
        tile = _scaled(
            tile,
            _load_scales(
                x, expert, first_out, end_out, first_depth, start_depth, end_depth, OUTS, PART
            ),
        )
    return _in_dtype(tile, DTYPE)


@triton.jit
def _product(
    a,
    b,
    expert,
    first_a,
    end_a,
    first_b,
    end_b,
    start_depth,
    end_depth,
    A: tl.constexpr,
    B: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_PLAIN: tl.constexpr,
    IS_DIVISIBLE: tl.constexpr,
):
    """``[A, B]`` in float32, scaled; `_in_order` if side b is turned.

    Steps of the depth start at multiples of their size, as scale blocks do: the first one may begin
    before `start_depth`.
    """
    PART: tl.constexpr = DEPTH // PARTS
    # TF32 has all bits of bytes, bf16 and fp16; values under exact scales lose some, an error of
    # 2^-10 each. AMD's tensor cores take float32 as it is.
    IS_TF32: tl.constexpr = not IS_PLAIN and tl.target_info.is_cuda()
    PRECISION: tl.constexpr = "tf32" if IS_TF32 else "ieee"
    IS_SCALED: tl.constexpr = a.SCALED == "part" or b.SCALED == "part"
    first = start_depth // DEPTH * DEPTH
    a_ptrs = _tile_pointers(a, expert, first_a, first, A, PART)
    b_ptrs = _tile_pointers(b, expert, first_b, first, B, PART)
    if IS_SCALED:
        a_scale = _part_scales(a, expert, first_a, end_a, first, start_depth, end_depth, A, PART)
        b_scale = _part_scales(b, expert, first_b, end_b, first, start_depth, end_depth, B, PART)
    total = tl.zeros([A, B], tl.float32)
    for step in range(first, end_depth, DEPTH):
        for part in tl.static_range(PARTS):
            depth = step + part * PART
            a_tile = _multiplicand(
                a,
                a_ptrs + _ahead(a, part * PART),
                expert,
                first_a,
                end_a,
                depth,
                start_depth,
                end_depth,
                A,
                PART,
                DTYPE,
                IS_DIVISIBLE,
            )
            b_tile = _multiplicand(
                b,
                b_ptrs + _ahead(b, part * PART),
                expert,
                first_b,
                end_b,
                depth,
                start_depth,
                end_depth,
                B,
                PART,
                DTYPE,
                IS_DIVISIBLE,
            )
            if IS_SCALED:
                product = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION)
                total = tl.fma(product, a_scale * tl.trans(b_scale), total)
                # Of the next part: no product waits for them then.
                depth += PART
                a_scale = _part_scales(
                    a, expert, first_a, end_a, depth, start_depth, end_depth, A, PART
                )
                b_scale = _part_scales(
                    b, expert, first_b, end_b, depth, start_depth, end_depth, B, PART
                )
            elif DTYPE.primitive_bitwidth == 8:
                total += tl.dot(a_tile, tl.trans(b_tile))
            else:
                total = tl.dot(a_tile, tl.trans(b_tile), total, input_precision=PRECISION)
        a_ptrs += _ahead(a, DEPTH)
        b_ptrs += _ahead(b, DEPTH)
    if a.SCALED == "sum":
        total *= _load_scales(a, expert, first_a, end_a, 0, 0, end_depth, A, PART)
    if b.SCALED == "sum":
        total *= tl.trans(_load_scales(b, expert, first_b, end_b, 0, 0, end_depth, B, PART))
    return total


def sides(
    a: Tensor | QTensor,
    b: Tensor | QTensor,
    *,
    axes: tuple[int, int],
    tiles: tuple[int, int],
    config: GemmConfig,
) -> tuple[Operand, Operand, dict[str, Any]]:
    """Both sides of a product, and compile-time arguments of `_product`.

    Args:
        a, b: matrices, or stacks of them.
        axes: which axis of each is its out: -2 rows, -1 columns.
        tiles: sizes of a tile along these.
        config: how the depth is cut.
    """
    part = config.depth // config.parts
    dtypes_a, dtypes_b = (_dtypes(x, axis, part) for x, axis in zip((a, b), axes, strict=True))
    if lies_along(a, axes[0]):
        # Side a would be turned by way of registers, at the cost of a product in bf16.
        dtypes_a = tuple(dtype for dtype in dtypes_a if dtype != _BYTE)
    dtype = next(dtype for dtype in dtypes_a if dtype in dtypes_b)
    is_plain = any(isinstance(x, Tensor) and x.dtype == torch.float32 for x in (a, b))
    scaled_a, scaled_b = (
        _scaled_at(format_of(x), axis, part, dtype, is_plain, tile * part <= tiles[0] * tiles[1])
        for x, axis, tile in zip((a, b), axes, tiles, strict=True)
    )
    is_turned = dtype == _BYTE and lies_along(b, axes[1])
    constants = {
        "DEPTH": config.depth,
        "PARTS": config.parts,
        "DTYPE": dtype,
        "IS_PLAIN": is_plain,
    }
    return (
        operand(a, out_axis=axes[0], tile=tiles[0], part=part, scaled=scaled_a),
        operand(
            b, out_axis=axes[1], tile=tiles[1], part=part, scaled=scaled_b, is_turned=is_turned
        ),
        constants,
    )


def _dtypes(x: Tensor | QTensor, out_axis: int, part: int) -> tuple[tl.dtype, ...]:
    """In which a side's values are exact, or as exact as they get; the fastest first."""
    if isinstance(x, Tensor):
        return (_PLAIN[x.dtype], tl.float32)
    if num_scales(block_along(x.format, out_axis)[2], part) == 1:
        # Bytes, which are scaled after the product.
        return (_BYTE, tl.bfloat16, tl.float16, tl.float32)
    # Four bits of a byte times a power of two are a bf16.
    return (tl.bfloat16, tl.float32) if x.format.rounding == Rounding.POW2 else (tl.float32,)


def _scaled_at(
    format: Format | None,
    out_axis: int,
    part: int,
    dtype: tl.dtype,
    is_plain: bool,
    is_product_larger: bool,
) -> Scaled:
    """What a side's scales multiply: as late as can be, or as few numbers as can be."""
    if format is None:
        return Scaled.NOTHING
    block_depth = block_along(format, out_axis)[2]
    if block_depth == 0:
        return Scaled.SUM
    is_exact = is_plain or (dtype == tl.bfloat16 and format.rounding == Rounding.POW2)
    if num_scales(block_depth, part) > 1 or (is_exact and is_product_larger):
        return Scaled.VALUE
    return Scaled.PART


def scale_span(sides: tuple[Tensor | QTensor, ...], axes: tuple[int, ...]) -> int:
    """How much of the depth all scales are constant over; 0 for all of it."""
    blocks = (block_along(format_of(x), axis) for x, axis in zip(sides, axes, strict=True))
    return gcd(*(depth for _, _, depth in blocks))


def is_scaled_by_column(b: Tensor | QTensor, axis: int, product_bytes: int) -> bool:
    """Whether side b has a scale for each of its columns that a product must be multiplied by."""
    format = format_of(b)
    if format is None:
        return False
    _, block_out, block_depth = block_along(format, axis)
    is_exact = format.rounding == Rounding.POW2 and product_bytes == 2
    return block_depth != 0 and block_out % 128 != 0 and not is_exact


def item_bytes(a: Tensor | QTensor, b: Tensor | QTensor) -> tuple[int, int]:
    """Bytes per element of each side."""
    return _data(a).dtype.itemsize, _data(b).dtype.itemsize


def lies_along(x: Tensor | QTensor, axis: int) -> bool:
    """Whether neighbours in memory are neighbours along this axis, and not along the other one."""
    strides = _data(x).stride()
    return strides[axis] == 1 and strides[-3 - axis] != 1


def is_odd(x: Tensor | QTensor) -> bool:
    """Whether single elements must be loaded, since rows do not start at multiples of 16."""
    data = _data(x)
    return data.data_ptr() % 16 != 0 or any(step % 16 for step in data.stride() if step > 1)


def expert_offsets(routing_or_offsets: Routing | Tensor) -> Tensor:
    """``[E + 1]`` int32."""
    if isinstance(routing_or_offsets, Routing):
        return routing_or_offsets.expert_offsets
    return routing_or_offsets.contiguous()


def format_of(x: Tensor | QTensor) -> Format | None:
    """The format of a side, None if it is plain."""
    return x.format if isinstance(x, QTensor) else None


def _data(x: Tensor | QTensor) -> Tensor:
    return x if isinstance(x, Tensor) else x.data
