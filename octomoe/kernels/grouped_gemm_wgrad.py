"""Gradient of a grouped GEMM for the weights: ``dw[e] = dy[rows of e].T @ x[rows of e]``.

The sum runs over the slots of an expert, in steps that start at multiples of their size, as scale
blocks over slots do; what belongs to the neighbours is masked. Both sides lie along their out: bf16
is turned by the tensor cores, bytes by the threads that load them. Bound by tensor cores; by the
bytes of the result below some 200 slots per expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.device import target_of
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.products import (
    _product,
    expert_offsets,
    is_odd,
    is_scaled_by_column,
    item_bytes,
    scale_span,
    sides,
)
from octomoe.tune.configs import GemmConfig
from octomoe.tune.lookup import grouped_gemm_wgrad_config


@triton.jit
def _grouped_gemm_wgrad_kernel(
    a,
    b,
    dw_ptr,
    offsets_ptr,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_PLAIN: tl.constexpr,
):
    # Locate the tile: tiles of one expert are neighbours in the grid.
    num_row_tiles, num_column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    num_tiles = num_row_tiles * num_column_tiles
    expert, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    first_row = tile // num_column_tiles * ROWS
    first_column = tile % num_column_tiles * COLUMNS
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)

    # Multiply; an expert without slots gets exact zeros, whatever its scales are.
    dw = tl.zeros([ROWS, COLUMNS], dw_ptr.dtype.element_ty)
    if start < end:
        product = _product(
            a,
            b,
            expert,
            first_row,
            num_rows,
            first_column,
            num_columns,
            start,
            end,
            ROWS,
            COLUMNS,
            DEPTH,
            PARTS,
            DTYPE,
            IS_PLAIN,
            False,
        )
        dw = product.to(dw.dtype)

    # Store.
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    offset = (expert.to(tl.int64) * num_rows + row)[:, None] * num_columns + column[None, :]
    mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    tl.store(dw_ptr + offset, dw, mask=mask)


def grouped_gemm_wgrad(
    dy: Tensor | QTensor,
    x: Tensor | QTensor,
    routing_or_offsets: Routing | Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    config: GemmConfig | None = None,
) -> Tensor:
    """``[S, N] x [S, K] -> [E, N, K]``; see `octomoe.grouped_gemm_wgrad`."""
    offsets = expert_offsets(routing_or_offsets)
    num_experts, num_rows, num_columns = offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    dw = torch.empty((num_experts, num_rows, num_columns), dtype=out_dtype, device=dy.device)
    if dw.numel() == 0:
        return dw
    config = config or grouped_gemm_wgrad_config(
        item_bytes=item_bytes(dy, x),
        span=scale_span((dy, x), (-1, -1)),
        is_scaled_by_column=is_scaled_by_column(x, -1, 2),
        is_odd=is_odd(dy) or is_odd(x),
        target=target_of(dy.device),
    )
    a, b, constants = sides(
        dy, x, axes=(-1, -1), tiles=(config.rows, config.columns), config=config
    )
    num_tiles = triton.cdiv(num_rows, config.rows) * triton.cdiv(num_columns, config.columns)
    _grouped_gemm_wgrad_kernel[(num_experts * num_tiles,)](
        a,
        b,
        dw,
        offsets,
        num_rows,
        num_columns,
        ROWS=config.rows,
        COLUMNS=config.columns,
        **constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dw
