"""Grouped GEMM: each expert multiplies its own rows, ``y[s] = x[s] @ w[e].T + bias[e]``.

The gradient for x is the same product with the weights' rows for the depth. Bound by the bytes of
the weights up to some 64 rows per expert, by tensor cores beyond. A tile of rows belongs to one
expert and starts where its rows do, so nothing is padded. How many there are the CPU does not know:
the grid has as many as there may be, and each program finds its expert from the offsets.

Where experts have few rows, sides are swapped: tensor cores take 64 rows of their first side at
least, and 16 of the second.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.device import target_of
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.grouped_gemm_wgrad import grouped_gemm_wgrad
from octomoe.kernels.operands import _in_order, _out_of_tile
from octomoe.kernels.products import (
    _product,
    expert_offsets,
    is_odd,
    is_scaled_by_column,
    item_bytes,
    lies_along,
    scale_span,
    sides,
)
from octomoe.tune.configs import GemmConfig
from octomoe.tune.lookup import grouped_gemm_config

__all__ = ["grouped_gemm", "grouped_gemm_dgrad", "grouped_gemm_wgrad"]

# Experts that are looked at together.
_MOST_BINS = 1024


@triton.jit
def _find_rows(offsets_ptr, tile, num_experts, num_rows, ROWS: tl.constexpr, BINS: tl.constexpr):
    """Expert of a tile of rows, its first row, and where its rows end.

    After the last expert come the rows of none, as if they were another expert's.
    """
    expert, tiles_before, tiles = tile * 0, tile * 0, tile * 0
    for first in range(0, num_experts, BINS):
        e = first + tl.arange(0, BINS)
        is_expert = e < num_experts
        start = tl.load(offsets_ptr + e, mask=is_expert, other=0)
        end = tl.load(offsets_ptr + e + 1, mask=is_expert, other=0)
        tiles_up_to = tiles + tl.cumsum(tl.cdiv(end - start, ROWS), axis=0)
        is_before = is_expert & (tiles_up_to <= tile)
        expert += tl.sum(is_before.to(tl.int32), axis=0)
        tiles_before = tl.maximum(tiles_before, tl.max(tl.where(is_before, tiles_up_to, 0), axis=0))
        tiles = tl.max(tiles_up_to, axis=0)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < num_experts, other=num_rows)
    return expert, start + (tile - tiles_before).to(tl.int64) * ROWS, end


@triton.jit
def _find_tile(num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """Row and column of this program's tile, in tiles.

    Programs that run at the same time share `GROUP` tiles of rows, and their weights, in L2.
    """
    num_programs = GROUP * num_column_tiles
    first = tl.program_id(0) // num_programs * GROUP
    group = tl.minimum(num_row_tiles - first, GROUP)
    place = tl.program_id(0) % num_programs
    return first + place % group, place // group


@triton.jit(do_not_specialize=["num_rows", "num_row_tiles"])
def _grouped_gemm_kernel(
    a,
    b,
    bias_ptr,
    y_ptr,
    offsets_ptr,
    num_rows,
    num_columns,
    depth,
    num_experts,
    num_row_tiles,
    bias_stride_expert,
    bias_stride_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BINS: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_PLAIN: tl.constexpr,
    IS_SWAPPED: tl.constexpr,
    IS_DIVISIBLE: tl.constexpr,
):
    # Locate the tile.
    row_tile, column_tile = _find_tile(num_row_tiles, tl.cdiv(num_columns, COLUMNS), GROUP)
    expert, first_row, end_row = _find_rows(
        offsets_ptr, row_tile, num_experts, num_rows, ROWS, BINS
    )
    first_column = column_tile * COLUMNS

    # Multiply, and add the bias.
    y = tl.zeros([ROWS, COLUMNS], y_ptr.dtype.element_ty)
    if expert < num_experts:
        if IS_SWAPPED:
            product = _product(
                a,
                b,
                expert,
                first_column,
                num_columns,
                first_row,
                end_row,
                0,
                depth,
                COLUMNS,
                ROWS,
                DEPTH,
                PARTS,
                DTYPE,
                IS_PLAIN,
                IS_DIVISIBLE,
            )
        else:
            product = _product(
                a,
                b,
                expert,
                first_row,
                end_row,
                first_column,
                num_columns,
                0,
                depth,
                ROWS,
                COLUMNS,
                DEPTH,
                PARTS,
                DTYPE,
                IS_PLAIN,
                IS_DIVISIBLE,
            )
        if bias_ptr is not None:
            column = _out_of_tile(first_column, COLUMNS, not IS_SWAPPED and b.IS_TURNED)
            bias = tl.load(
                bias_ptr
                + expert.to(tl.int64) * bias_stride_expert
                + column.to(tl.int64) * bias_stride_column,
                mask=column < num_columns,
                other=0.0,
            ).to(tl.float32)
            product += bias[:, None] if IS_SWAPPED else bias[None, :]
        product = _in_order(product.to(y.dtype), b.IS_TURNED)
        y = tl.trans(product) if IS_SWAPPED else product

    # Store; rows of no expert are zero.
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    tl.store(
        y_ptr + row[:, None] * num_columns + column[None, :],
        y,
        mask=(row < end_row)[:, None] & (column < num_columns)[None, :],
    )


def grouped_gemm(
    x: Tensor | QTensor,
    w: Tensor | QTensor,
    routing_or_offsets: Routing | Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    config: GemmConfig | None = None,
) -> Tensor:
    """``[S, K] x [E, N, K] -> [S, N]``; see `octomoe.grouped_gemm`."""
    return _multiply(x, w, -2, routing_or_offsets, bias, out_dtype, config)


def grouped_gemm_dgrad(
    dy: Tensor | QTensor,
    w: Tensor | QTensor,
    routing_or_offsets: Routing | Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    config: GemmConfig | None = None,
) -> Tensor:
    """``[S, N] x [E, N, K] -> [S, K]``; see `octomoe.grouped_gemm_dgrad`."""
    return _multiply(dy, w, -1, routing_or_offsets, None, out_dtype, config)


def _multiply(
    x: Tensor | QTensor,
    w: Tensor | QTensor,
    w_axis: int,
    routing_or_offsets: Routing | Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    config: GemmConfig | None,
) -> Tensor:
    """Rows of x times weights, of which `w_axis` is the columns of the result."""
    num_rows, depth = x.shape
    num_experts, num_columns = w.shape[0], w.shape[w_axis]
    y = torch.empty((num_rows, num_columns), dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    sizes = item_bytes(x, w)
    config = config or grouped_gemm_config(
        num_rows,
        num_experts,
        num_columns,
        item_bytes=sizes,
        span=scale_span((x, w), (-2, w_axis)),
        is_turned=lies_along(w, w_axis),
        is_scaled_by_column=is_scaled_by_column(w, w_axis, max(sizes)),
        is_odd=is_odd(x) or is_odd(w),
        target=target_of(x.device),
    )
    if config.is_swapped:
        a, b, constants = sides(
            w, x, axes=(w_axis, -2), tiles=(config.columns, config.rows), config=config
        )
    else:
        a, b, constants = sides(
            x, w, axes=(-2, w_axis), tiles=(config.rows, config.columns), config=config
        )
    # Experts that have rows, and the rows of none, each waste a part of a tile.
    num_groups = min(num_experts + 1, num_rows)
    num_row_tiles = (num_rows - num_groups) // config.rows + num_groups
    offsets = expert_offsets(routing_or_offsets)
    _grouped_gemm_kernel[(num_row_tiles * triton.cdiv(num_columns, config.columns),)](
        a,
        b,
        bias,
        y,
        offsets,
        num_rows,
        num_columns,
        depth,
        num_experts,
        num_row_tiles,
        *((0, 0) if bias is None else bias.stride()),
        ROWS=config.rows,
        COLUMNS=config.columns,
        GROUP=config.group,
        BINS=min(triton.next_power_of_2(max(num_experts, 1)), _MOST_BINS),
        IS_SWAPPED=config.is_swapped,
        IS_DIVISIBLE=depth % config.depth == 0,
        **constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
