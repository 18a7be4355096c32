"""Rows as `wide_tiles_sm90` multiplies them: in bf16, and in the order of the weights.

    out[t, 16j + 8b + 2q + c] = x[t, 16j + 4q + 2b + c]        c, b < 2; q < 4

Quantised rows are rounded to what their format can say, which for E8M0 scales is exact in bf16.
One reading and one writing of rows, bound by their bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.formats import Format
from octomoe.kernels.chain import _start_dependents, _wait_for_predecessor, chain_arguments
from octomoe.kernels.scaling import _encode_own, _magnitude_bits, _scale_of_amax, format_encoding

_ROWS, _COLUMNS = 8, 256


@triton.jit
def _rounded(x, amax_bits, ENCODING: tl.constexpr):
    """What x would be if its blocks, with these largest magnitudes, were quantised; float32."""
    scale = _scale_of_amax(amax_bits, ENCODING)
    return _encode_own(x, scale, ENCODING).to(tl.float32) * scale


@triton.jit
def _rows_kernel(
    x_ptr,
    out_ptr,
    num_rows,
    num_columns,
    stride_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENCODING: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    _wait_for_predecessor(IS_CHAINED)
    _start_dependents(IS_CHAINED)
    num_tiles = tl.cdiv(num_columns, COLUMNS)
    row = tl.program_id(0) // num_tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % num_tiles * COLUMNS + tl.arange(0, COLUMNS)
    is_inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    offset = row.to(tl.int64)[:, None] * stride_row + column[None, :]
    x = tl.load(x_ptr + offset, mask=is_inside, other=0.0)
    if ENCODING is not None:
        BLOCK: tl.constexpr = ENCODING.BLOCK_COLUMNS
        x = tl.reshape(x, [ROWS, COLUMNS // BLOCK, BLOCK])
        amax = tl.max(_magnitude_bits(x), axis=2, keep_dims=True)
        x = _rounded(x, amax, ENCODING).to(tl.bfloat16)
    x = tl.permute(tl.reshape(x, [ROWS, COLUMNS // 16, 4, 2, 2]), [0, 1, 3, 2, 4])
    x = tl.reshape(x, [ROWS, COLUMNS])
    offset = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    tl.store(out_ptr + offset, x, mask=is_inside)


def rows_in_order(x: Tensor, format: Format | None, *, is_chained: bool = False) -> Tensor:
    """``x [T, D] -> [T, D]``, all bf16. 16 divides D."""
    num_rows, num_columns = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        grid = triton.cdiv(num_rows, _ROWS) * triton.cdiv(num_columns, _COLUMNS)
        _rows_kernel[(grid,)](
            x,
            out,
            num_rows,
            num_columns,
            x.stride(0),
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            ENCODING=None if format is None else format_encoding(format),
            IS_CHAINED=is_chained,
            num_warps=4,
            **chain_arguments(is_chained),
        )
    return out
