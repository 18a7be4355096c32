"""Quantise: ``scale = round(amax(block) / target_max)``, ``data = cast(x * (1 / scale))``.

Bound by bytes: x is read once, data and scales are written once. Where a scale block fits into a
tile, one kernel does it all, and writes the scales in the layout asked for. A row that has one
scale is a tile of its own up to 16384 columns, and is read twice beyond. Any other block (the
whole tensor, an expert, a column, a size that is no power of two) takes two kernels: the first
finds the largest magnitudes with atomic maxima, whose order does not matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.device import num_sms
from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.kernels.encoding import (
    _share_amax,
    _store_encoded,
    _store_tile,
    _tile,
    _tile_amax,
    block_arguments,
    encode_arguments,
    fits_tile,
    num_tiles,
    tile_arguments,
)
from octomoe.kernels.layouts import as_bytes, empty_scale, scale_strides
from octomoe.tune.configs import TileConfig
from octomoe.tune.lookup import quantize_config


@triton.jit
def _quantize_tile_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    num_rows,
    num_columns,
    x_stride_expert,
    x_stride_row,
    x_stride_column,
    scale_stride_expert,
    scale_stride_row,
    scale_stride_column,
    num_column_atoms,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    TARGET: tl.constexpr,
    TARGET_EXPONENT: tl.constexpr,
    TARGET_MANTISSA: tl.constexpr,
    LIMIT: tl.constexpr,
    IS_POW2: tl.constexpr,
    IS_E8M0: tl.constexpr,
    IS_E5M2: tl.constexpr,
    HAS_NAN: tl.constexpr,
):
    tile_row, tile_column = _tile(num_columns, TILE_COLUMNS)
    expert = tl.program_id(1).to(tl.int64)
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    is_inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    x_offset = (
        row.to(tl.int64)[:, None] * x_stride_row + column.to(tl.int64)[None, :] * x_stride_column
    )
    x = tl.load(x_ptr + expert * x_stride_expert + x_offset, mask=is_inside, other=0.0)
    _store_tile(
        x,
        _tile_amax(x, BLOCK_ROWS, BLOCK_COLUMNS),
        tile_row,
        tile_column,
        num_rows,
        num_columns,
        data_ptr + expert * num_rows * num_columns,
        num_columns,
        scale_ptr + expert * scale_stride_expert,
        scale_stride_row,
        scale_stride_column,
        0,
        num_column_atoms,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        IS_INTERLEAVED,
        TARGET,
        TARGET_EXPONENT,
        TARGET_MANTISSA,
        IS_POW2,
        IS_E8M0,
        IS_E5M2,
    )


@triton.jit
def _amax_kernel(
    x_ptr,
    amax_ptr,
    num_experts,
    num_rows,
    num_columns,
    x_stride_expert,
    x_stride_row,
    x_stride_column,
    amax_stride_expert,
    amax_stride_row,
    amax_stride_column,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Largest magnitudes of scale blocks of any size, as bits; blocks of 0 span their axis."""
    tile_row, tile_column = _tile(num_columns, TILE_COLUMNS)
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    expert = tl.program_id(1).to(tl.int64)
    # Without experts one program runs, since a scale that they share is written all the same.
    is_row = (row < num_rows) & (row + expert < row + num_experts)
    is_inside = is_row[:, None] & (column < num_columns)[None, :]
    x_offset = (
        row.to(tl.int64)[:, None] * x_stride_row + column.to(tl.int64)[None, :] * x_stride_column
    )
    x = tl.load(x_ptr + expert * x_stride_expert + x_offset, mask=is_inside, other=0.0)
    if BLOCK_EXPERTS != 0:
        amax_ptr += expert // BLOCK_EXPERTS * amax_stride_expert
    _share_amax(
        x,
        is_inside,
        tile_row,
        tile_column,
        num_columns,
        0,
        amax_ptr,
        amax_stride_row,
        amax_stride_column,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
    )


@triton.jit
def _encode_kernel(
    x_ptr,
    given_ptr,
    nan_ptr,
    data_ptr,
    scale_ptr,
    num_experts,
    num_rows,
    num_columns,
    x_stride_expert,
    x_stride_row,
    x_stride_column,
    given_stride_expert,
    given_stride_row,
    given_stride_column,
    nan_stride_expert,
    nan_stride_row,
    nan_stride_column,
    scale_stride_expert,
    scale_stride_row,
    scale_stride_column,
    num_column_atoms,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    IS_SCALE_GIVEN: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    TARGET: tl.constexpr,
    TARGET_EXPONENT: tl.constexpr,
    TARGET_MANTISSA: tl.constexpr,
    LIMIT: tl.constexpr,
    IS_POW2: tl.constexpr,
    IS_E8M0: tl.constexpr,
    IS_E5M2: tl.constexpr,
    HAS_NAN: tl.constexpr,
):
    """Encode under given scales, or under those of given magnitudes; blocks of 0 span their axis.

    Where the element has no NaN, `nan_ptr` has the magnitudes of the data, whose NaN goes into the
    scale.
    """
    tile_row, tile_column = _tile(num_columns, TILE_COLUMNS)
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    expert = tl.program_id(1).to(tl.int64)
    # Without experts one program runs, since a scale that they share is written all the same.
    is_row = (row < num_rows) & (row + expert < row + num_experts)
    is_inside = is_row[:, None] & (column < num_columns)[None, :]
    x_offset = (
        row.to(tl.int64)[:, None] * x_stride_row + column.to(tl.int64)[None, :] * x_stride_column
    )
    x = tl.load(x_ptr + expert * x_stride_expert + x_offset, mask=is_inside, other=0.0)
    if BLOCK_EXPERTS == 0:
        block_expert = expert * 0
        expert_in_block = expert
    else:
        block_expert = expert // BLOCK_EXPERTS
        expert_in_block = expert % BLOCK_EXPERTS
    _store_encoded(
        x,
        is_inside,
        expert_in_block,
        tile_row,
        tile_column,
        num_rows,
        num_columns,
        0,
        data_ptr + expert * num_rows * num_columns,
        num_columns,
        given_ptr + block_expert * given_stride_expert,
        given_stride_row,
        given_stride_column,
        nan_ptr + block_expert * nan_stride_expert,
        nan_stride_row,
        nan_stride_column,
        scale_ptr + block_expert * scale_stride_expert,
        scale_stride_row,
        scale_stride_column,
        num_column_atoms,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        IS_SCALE_GIVEN,
        IS_INTERLEAVED,
        TARGET,
        TARGET_EXPONENT,
        TARGET_MANTISSA,
        LIMIT,
        IS_POW2,
        IS_E8M0,
        IS_E5M2,
        HAS_NAN,
    )


def quantize(
    x: Tensor,
    format: Format,
    *,
    layout: ScaleLayout = COMPACT,
    amax: Tensor | None = None,
    scale: Tensor | None = None,
    config: TileConfig | None = None,
) -> QTensor:
    """Quantise ``[rows, columns]`` or ``[experts, rows, columns]``; see `octomoe.quantize`."""
    shape = tuple(x.shape)
    data = torch.empty(shape, dtype=format.element.dtype, device=x.device)
    q = QTensor(data, empty_scale(format, layout, shape, x.device), format, layout)
    if q.scale.numel() == 0:
        return q
    config = config or quantize_config(shape, format, layout, sms=num_sms(x.device))
    given = amax if scale is None else scale
    if given is None and fits_tile(format, config, shape[-1]):
        _quantize_tile_kernel[_grid(x, config)](
            x,
            q.data,
            as_bytes(q.scale),
            *x.shape[-2:],
            *_strides(x),
            *scale_strides(q),
            **tile_arguments(q, config),
            num_warps=config.num_warps,
        )
        return q
    own = None
    if given is None or not format.element.has_nan:
        own = _block_amax(x, format, config)
    given = own if given is None else given.expand(format.scale_shape(shape))
    assert given is not None
    _encode_kernel[_grid(x, config)](
        x,
        as_bytes(given),
        as_bytes(given) if own is None else own,
        q.data,
        as_bytes(q.scale),
        *_sizes(x),
        *_strides(x),
        *_strides(given),
        *_strides(given if own is None else own),
        *scale_strides(q),
        BLOCK_EXPERTS=_block_experts(format),
        **encode_arguments(q, config),
        IS_SCALE_GIVEN=scale is not None,
        num_warps=config.num_warps,
    )
    return q


def _block_amax(x: Tensor, format: Format, config: TileConfig) -> Tensor:
    """Largest magnitude of each scale block, as the int32 bits of its float32."""
    bits = torch.zeros(format.scale_shape(tuple(x.shape)), dtype=torch.int32, device=x.device)
    _amax_kernel[_grid(x, config)](
        x,
        bits,
        *_sizes(x),
        *_strides(x),
        *_strides(bits),
        BLOCK_EXPERTS=_block_experts(format),
        **block_arguments(format),
        TILE_ROWS=config.rows,
        TILE_COLUMNS=config.columns,
        num_warps=config.num_warps,
    )
    return bits.view(torch.float32)


def _block_experts(format: Format) -> int:
    return max(format.block[0], 0)


def _grid(x: Tensor, config: TileConfig) -> tuple[int, int]:
    """Programs; at least one, since an empty tensor may have a scale."""
    rows, columns = x.shape[-2:]
    return num_tiles(rows, columns, config), max(x.shape[0], 1) if x.dim() == 3 else 1


def _sizes(x: Tensor) -> tuple[int, ...]:
    """Experts, rows and columns."""
    return tuple(x.shape) if x.dim() == 3 else (1, *x.shape)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of expert, row and column."""
    return x.stride() if x.dim() == 3 else (0, *x.stride())
