"""What both halves of a layer of experts do at a step along the depth: load, multiply, scale.

A step is `BLOCK_DEPTH` of the depth. Scales of both operands are constant over it; they multiply
the step's own product, which starts at zero and is added in float32: the FP8 tensor cores of Hopper
keep some 14 bits of a sum.

Weights are ``[E, PARTS, rows, depth]``: gate and up are two parts, which a tile may hold both.
Where experts have few rows, weight rows take the side of the tensor core's tile that has 64 at
least, rows of x the one that may have 16: `IS_SWAPPED`, products are then ``[weight rows, rows]``.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octomoe.core.experts import Weight
from octomoe.core.formats import ALL, Format
from octomoe.core.qtensor import QTensor
from octomoe.kernels.layouts import scale_strides
from octomoe.tune.configs import ExpertTileConfig, FusedMoeConfig

# Of the depth, in a step: scales that change do so here.
STEP = 128


def has_steps(format: Format | None) -> bool:
    """Whether scales change by the step."""
    return format is not None and format.block[2] == STEP


def scale_rows(w: Weight) -> int:
    """Rows that a scale of weights serves; 0 if that is all, or if there is none."""
    return max(w.format.block[1], 0) if isinstance(w, QTensor) else 0


def tile_arguments(
    w: Weight,
    bias: Tensor | None,
    parts: int,
    align: int,
    tile: ExpertTileConfig,
    config: FusedMoeConfig,
    *,
    has_row_scale: bool,
) -> dict[str, Any]:
    """Compile-time arguments that both halves have, and how they are launched.

    Args:
        w: ``[E, PARTS * rows, depth]``.
        parts: that a tile holds.
        align: what the slots of an expert are a multiple of.
    """
    format = w.format if isinstance(w, QTensor) else None
    served = scale_rows(w)
    is_one = served % tile.columns == 0 and w.shape[1] % max(2 * served, 1) == 0
    return {
        "BLOCKS": align // tile.rows,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_DEPTH": STEP,
        "NUM_STAGES": tile.num_stages,
        "IS_SWAPPED": config.is_swapped,
        "IS_CHAINED": config.is_chained,
        "HAS_DESCRIPTOR": config.has_descriptors,
        "IS_DIVISIBLE": w.shape[2] % STEP == 0,
        "HAS_ROW_SCALE": has_row_scale,
        "HAS_WEIGHT_SCALE": format is not None,
        "HAS_STEP_SCALE": has_steps(format),
        "SCALE_ROWS": served,
        "IS_ONE_SCALE": not served or (is_one and parts == 1),
        "HAS_BIAS": bias is not None,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def weight_source(
    w: Weight, parts: int, held: int, tile: ExpertTileConfig, config: FusedMoeConfig
) -> Tensor | TensorDescriptor:
    """Where a kernel loads tiles of ``w [E, parts * rows, depth]`` from, `held` parts at once."""
    data = w.data if isinstance(w, QTensor) else w
    if not config.has_descriptors:
        return data
    num_experts, rows, depth = data.shape
    matrices = data.view(num_experts * parts, rows // parts, depth)
    return TensorDescriptor.from_tensor(matrices, [held, tile.columns, STEP])


def row_scale(x: Tensor | QTensor) -> tuple[Tensor, int, int]:
    """Scales of rows, and what lies between those of neighbouring rows and steps."""
    if not isinstance(x, QTensor):
        return x, 0, 0
    _, row, step, _ = scale_strides(x)
    _, rows, columns = x.format.block
    return x.scale, 0 if rows == ALL else row, 0 if columns == ALL else step


def weight_scale(w: Weight) -> tuple[Tensor, int, int, int]:
    """Scales of weights, and what lies between those of experts, of rows and of steps."""
    if not isinstance(w, QTensor):
        return w, 0, 0, 0
    expert, row, step, _ = scale_strides(w)
    return w.scale, 0 if w.format.block[0] == ALL else expert, row, step


@triton.jit
def _load_step(
    x_ptrs,
    x_scale_ptrs,
    k,
    depth,
    is_row,
    x_scale_stride_step,
    BLOCK_DEPTH: tl.constexpr,
    IS_DIVISIBLE: tl.constexpr,
    HAS_STEP_SCALE: tl.constexpr,
):
    """Rows of x in a step, and a scale for each: 1 where scales do not change by the step."""
    mask = is_row[:, None]
    if not IS_DIVISIBLE:
        mask = mask & (k + tl.arange(0, BLOCK_DEPTH) < depth)[None, :]
    x = tl.load(x_ptrs + k, mask=mask, other=0.0)
    if HAS_STEP_SCALE:
        offset = k // BLOCK_DEPTH * x_scale_stride_step
        scale = tl.load(x_scale_ptrs + offset, mask=is_row, other=0.0)
    else:
        scale = tl.full(is_row.shape, 1.0, tl.float32)
    return x, scale


@triton.jit
def _row_scale(scale_ptrs, is_row, HAS_ROW_SCALE: tl.constexpr):
    """A scale for each row of x, 1 where x has none."""
    if HAS_ROW_SCALE:
        scale = tl.load(scale_ptrs, mask=is_row, other=0.0)
    else:
        scale = tl.full(is_row.shape, 1.0, tl.float32)
    return scale


@triton.jit
def _part_rows(first_part, first_row, num_rows, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """Numbers, in an expert, of the rows of a weight tile, and which of them exist."""
    index = tl.arange(0, PARTS * ROWS)
    row = first_row + index % ROWS
    return (first_part + index // ROWS) * num_rows + row, row < num_rows


@triton.jit
def _load_weights(
    w_source,
    matrix,
    first_row,
    num_rows,
    k,
    depth,
    has_row,
    PARTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    HAS_DESCRIPTOR: tl.constexpr,
    IS_DIVISIBLE: tl.constexpr,
):
    """Weights of a step: from row `first_row` of `matrix`, and of the next part.

    `has_row`: from `_part_rows`. Of rows that do not exist nothing is said.
    """
    TILE_ROWS: tl.constexpr = has_row.shape[0]
    if HAS_DESCRIPTOR:
        w = w_source.load([matrix, first_row, k]).reshape([TILE_ROWS, BLOCK_DEPTH])
    else:
        step = k + tl.arange(0, BLOCK_DEPTH)
        mask = has_row[:, None]
        if not IS_DIVISIBLE:
            mask = mask & (step < depth)[None, :]
        index = tl.arange(0, TILE_ROWS)
        ROWS: tl.constexpr = TILE_ROWS // PARTS
        offset = (matrix + index // ROWS).to(tl.int64) * num_rows + first_row + index % ROWS
        w = tl.load(w_source + offset[:, None] * depth + step[None, :], mask=mask, other=0.0)
    return w


@triton.jit
def _multiply_step(
    x,
    x_scale,
    w,
    w_scale_ptr,
    k,
    row,
    has_row,
    w_scale_stride_row,
    w_scale_stride_step,
    BLOCK_DEPTH: tl.constexpr,
    HAS_STEP_SCALE: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    IS_ONE_SCALE: tl.constexpr,
    IS_SWAPPED: tl.constexpr,
):
    """``x @ w.T`` of a step, scaled. `row`, `has_row`: from `_part_rows`."""
    if x.dtype.primitive_bitwidth > 8:
        # Plain x multiplies bytes in its own dtype, which has their values.
        w = w.to(x.dtype)
    if IS_SWAPPED:
        product = tl.dot(w, tl.trans(x), input_precision="ieee")
    else:
        product = tl.dot(x, tl.trans(w), input_precision="ieee")
    if HAS_STEP_SCALE:
        w_scale_ptr += k // BLOCK_DEPTH * w_scale_stride_step
        product = _scaled(
            product,
            x_scale,
            w_scale_ptr,
            row,
            has_row,
            w_scale_stride_row,
            SCALE_ROWS,
            IS_ONE_SCALE,
            IS_SWAPPED,
        )
    return product


@triton.jit
def _scaled(
    product,
    x_scale,
    w_scale_ptr,
    row,
    has_row,
    w_scale_stride_row,
    SCALE_ROWS: tl.constexpr,
    IS_ONE_SCALE: tl.constexpr,
    IS_SWAPPED: tl.constexpr,
):
    """A product under the scales of its rows of x and its rows of weights.

    A scale serves `SCALE_ROWS` rows of weights (0: all), and all of a tile if `IS_ONE_SCALE`.
    """
    if IS_ONE_SCALE:
        if SCALE_ROWS:
            w_scale_ptr += tl.min(row, axis=0) // SCALE_ROWS * w_scale_stride_row
        scale = x_scale * tl.load(w_scale_ptr)
        product = product * (scale[None, :] if IS_SWAPPED else scale[:, None])
    else:
        offset = row // SCALE_ROWS * w_scale_stride_row
        w_scale = tl.load(w_scale_ptr + offset, mask=has_row, other=0.0)
        if IS_SWAPPED:
            product = product * (w_scale[:, None] * x_scale[None, :])
        else:
            product = product * (x_scale[:, None] * w_scale[None, :])
    return product


@triton.jit
def _add_bias(product, bias_ptr, row, has_row, IS_SWAPPED: tl.constexpr):
    """A product plus the biases of its rows of weights."""
    bias = tl.load(bias_ptr + row, mask=has_row, other=0.0).to(tl.float32)
    return product + (bias[:, None] if IS_SWAPPED else bias[None, :])
