"""Gradient of an activation: ``dy [S, F], h [S, 2F] -> dh [S, 2F]``, gate columns then up columns.

Bound by bytes: dy and h are read once, dh and its scales are written once. A program computes a
tile of the gate's gradient and the tile of up's that goes with it, which share their loads and the
nonlinear function. Quantised, this takes one kernel where each scale block lies in one tile of
either, or spans the rows of both up to 16384 columns each; otherwise two kernels, both of which
read dy and h: the first finds the largest magnitudes, the second encodes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.activations import Activation
from octomoe.core.device import num_sms
from octomoe.core.formats import ALL, Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.kernels.activations import _activate_bwd, _load_gate_up, activation_arguments
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
from octomoe.tune.lookup import activation_bwd_config


@triton.jit
def _gradients(
    dy_ptr,
    h_ptr,
    tile_row,
    tile_column,
    num_rows,
    num_columns,
    dy_stride_row,
    dy_stride_column,
    h_stride_row,
    h_stride_column,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    IS_GATED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    CLAMP: tl.constexpr,
    IS_OUTPUT_CLAMPED: tl.constexpr,
    UP_OFFSET: tl.constexpr,
):
    """Tiles of the gradients of the gate and of up, zero outside, and which elements are inside."""
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    is_inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    dy_offset = (
        row.to(tl.int64)[:, None] * dy_stride_row + column.to(tl.int64)[None, :] * dy_stride_column
    )
    dy = tl.load(dy_ptr + dy_offset, mask=is_inside, other=0.0).to(tl.float32)
    gate, up = _load_gate_up(
        h_ptr, row, column, is_inside, num_columns, h_stride_row, h_stride_column, IS_GATED
    )
    dgate, dup = _activate_bwd(
        dy, gate, up, IS_GATED, KIND, ALPHA, CLAMP, IS_OUTPUT_CLAMPED, UP_OFFSET
    )
    return dgate, dup, is_inside


@triton.jit
def _activation_bwd_kernel(
    dy_ptr,
    h_ptr,
    dh_ptr,
    num_rows,
    num_columns,
    dy_stride_row,
    dy_stride_column,
    h_stride_row,
    h_stride_column,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    IS_GATED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    CLAMP: tl.constexpr,
    IS_OUTPUT_CLAMPED: tl.constexpr,
    UP_OFFSET: tl.constexpr,
):
    tile_row, tile_column = _tile(num_columns, TILE_COLUMNS)
    dgate, dup, is_inside = _gradients(
        dy_ptr,
        h_ptr,
        tile_row,
        tile_column,
        num_rows,
        num_columns,
        dy_stride_row,
        dy_stride_column,
        h_stride_row,
        h_stride_column,
        TILE_ROWS,
        TILE_COLUMNS,
        IS_GATED,
        KIND,
        ALPHA,
        CLAMP,
        IS_OUTPUT_CLAMPED,
        UP_OFFSET,
    )
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    if IS_GATED:
        dh_ptr += row.to(tl.int64)[:, None] * (2 * num_columns) + column[None, :]
        tl.store(dh_ptr + num_columns, dup.to(dh_ptr.dtype.element_ty), mask=is_inside)
    else:
        dh_ptr += row.to(tl.int64)[:, None] * num_columns + column[None, :]
    tl.store(dh_ptr, dgate.to(dh_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def _activation_bwd_tile_kernel(
    dy_ptr,
    h_ptr,
    data_ptr,
    scale_ptr,
    num_rows,
    num_columns,
    dy_stride_row,
    dy_stride_column,
    h_stride_row,
    h_stride_column,
    scale_stride_row,
    scale_stride_column,
    num_column_atoms,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    IS_ROW_SHARED: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    TARGET: tl.constexpr,
    TARGET_EXPONENT: tl.constexpr,
    TARGET_MANTISSA: tl.constexpr,
    LIMIT: tl.constexpr,
    IS_POW2: tl.constexpr,
    IS_E8M0: tl.constexpr,
    IS_E5M2: tl.constexpr,
    HAS_NAN: tl.constexpr,
    IS_GATED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    CLAMP: tl.constexpr,
    IS_OUTPUT_CLAMPED: tl.constexpr,
    UP_OFFSET: tl.constexpr,
):
    tile_row, tile_column = _tile(num_columns, TILE_COLUMNS)
    dgate, dup, _ = _gradients(
        dy_ptr,
        h_ptr,
        tile_row,
        tile_column,
        num_rows,
        num_columns,
        dy_stride_row,
        dy_stride_column,
        h_stride_row,
        h_stride_column,
        TILE_ROWS,
        TILE_COLUMNS,
        IS_GATED,
        KIND,
        ALPHA,
        CLAMP,
        IS_OUTPUT_CLAMPED,
        UP_OFFSET,
    )
    gate_amax = _tile_amax(dgate, BLOCK_ROWS, BLOCK_COLUMNS)
    data_stride_row = num_columns
    if IS_GATED:
        data_stride_row = 2 * num_columns
        up_amax = _tile_amax(dup, BLOCK_ROWS, BLOCK_COLUMNS)
        if IS_ROW_SHARED:
            gate_amax = tl.maximum(gate_amax, up_amax)
            up_amax = gate_amax
            first_scale = 0
        else:
            first_scale = num_columns // BLOCK_COLUMNS
        _store_tile(
            dup,
            up_amax,
            tile_row,
            tile_column,
            num_rows,
            num_columns,
            data_ptr + num_columns,
            data_stride_row,
            scale_ptr,
            scale_stride_row,
            scale_stride_column,
            first_scale,
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
    _store_tile(
        dgate,
        gate_amax,
        tile_row,
        tile_column,
        num_rows,
        num_columns,
        data_ptr,
        data_stride_row,
        scale_ptr,
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
def _activation_bwd_amax_kernel(
    dy_ptr,
    h_ptr,
    amax_ptr,
    num_rows,
    num_columns,
    dy_stride_row,
    dy_stride_column,
    h_stride_row,
    h_stride_column,
    amax_stride_row,
    amax_stride_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    IS_GATED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    CLAMP: tl.constexpr,
    IS_OUTPUT_CLAMPED: tl.constexpr,
    UP_OFFSET: tl.constexpr,
):
    tile_row, tile_column = _tile(num_columns, TILE_COLUMNS)
    dgate, dup, is_inside = _gradients(
        dy_ptr,
        h_ptr,
        tile_row,
        tile_column,
        num_rows,
        num_columns,
        dy_stride_row,
        dy_stride_column,
        h_stride_row,
        h_stride_column,
        TILE_ROWS,
        TILE_COLUMNS,
        IS_GATED,
        KIND,
        ALPHA,
        CLAMP,
        IS_OUTPUT_CLAMPED,
        UP_OFFSET,
    )
    for part in tl.static_range(1 + IS_GATED):
        _share_amax(
            dgate if part == 0 else dup,
            is_inside,
            tile_row,
            tile_column,
            num_columns,
            part * num_columns,
            amax_ptr,
            amax_stride_row,
            amax_stride_column,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )


@triton.jit
def _activation_bwd_encode_kernel(
    dy_ptr,
    h_ptr,
    amax_ptr,
    data_ptr,
    scale_ptr,
    num_rows,
    num_columns,
    dy_stride_row,
    dy_stride_column,
    h_stride_row,
    h_stride_column,
    amax_stride_row,
    amax_stride_column,
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
    IS_GATED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    CLAMP: tl.constexpr,
    IS_OUTPUT_CLAMPED: tl.constexpr,
    UP_OFFSET: tl.constexpr,
):
    tile_row, tile_column = _tile(num_columns, TILE_COLUMNS)
    dgate, dup, is_inside = _gradients(
        dy_ptr,
        h_ptr,
        tile_row,
        tile_column,
        num_rows,
        num_columns,
        dy_stride_row,
        dy_stride_column,
        h_stride_row,
        h_stride_column,
        TILE_ROWS,
        TILE_COLUMNS,
        IS_GATED,
        KIND,
        ALPHA,
        CLAMP,
        IS_OUTPUT_CLAMPED,
        UP_OFFSET,
    )
    for part in tl.static_range(1 + IS_GATED):
        _store_encoded(
            dgate if part == 0 else dup,
            is_inside,
            0,
            tile_row,
            tile_column,
            num_rows,
            num_columns,
            part * num_columns,
            data_ptr,
            (1 + IS_GATED) * num_columns,
            amax_ptr,
            amax_stride_row,
            amax_stride_column,
            amax_ptr,
            amax_stride_row,
            amax_stride_column,
            scale_ptr,
            scale_stride_row,
            scale_stride_column,
            num_column_atoms,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            False,
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


def activation_bwd(
    dy: Tensor,
    h: Tensor,
    activation: Activation,
    *,
    format: Format | None = None,
    layout: ScaleLayout = COMPACT,
    out_dtype: torch.dtype | None = None,
    config: TileConfig | None = None,
) -> Tensor | QTensor:
    """``[S, F] -> [S, 2F]``, or ``[S, F]`` without a gate; see `octomoe.activation_bwd`."""
    shape = (dy.shape[0], dy.shape[1])
    config = config or activation_bwd_config(shape, format, layout, sms=num_sms(h.device))
    if format is not None:
        return _quantized(dy, h, activation, format, layout, config)
    dtype = dy.dtype if out_dtype is None else out_dtype
    dh = torch.empty(h.shape, dtype=dtype, device=h.device)
    if dh.numel():
        _activation_bwd_kernel[(num_tiles(*shape, config),)](
            dy,
            h,
            dh,
            *shape,
            *dy.stride(),
            *h.stride(),
            TILE_ROWS=config.rows,
            TILE_COLUMNS=config.columns,
            **activation_arguments(activation),
            num_warps=config.num_warps,
        )
    return dh


def _quantized(
    dy: Tensor,
    h: Tensor,
    activation: Activation,
    format: Format,
    layout: ScaleLayout,
    config: TileConfig,
) -> QTensor:
    data = torch.empty(h.shape, dtype=format.element.dtype, device=h.device)
    dh_shape = tuple(h.shape)
    q = QTensor(data, empty_scale(format, layout, dh_shape, h.device), format, layout)
    if q.scale.numel() == 0:
        return q
    shape = (dy.shape[0], dy.shape[1])
    grid = (num_tiles(*shape, config),)
    inputs = (*shape, *dy.stride(), *h.stride())
    options = {**activation_arguments(activation), "num_warps": config.num_warps}
    block_columns = format.block[2]
    # No block may reach from the gate's columns into up's, unless it has both.
    is_apart = block_columns == ALL or not activation.gated or shape[1] % block_columns == 0
    if is_apart and fits_tile(format, config, shape[1]):
        _activation_bwd_tile_kernel[grid](
            dy,
            h,
            q.data,
            as_bytes(q.scale),
            *inputs,
            *scale_strides(q)[1:],
            **tile_arguments(q, config),
            **options,
            IS_ROW_SHARED=block_columns == ALL,
        )
        return q
    bits = torch.zeros(format.scale_shape(dh_shape), dtype=torch.int32, device=h.device)
    _activation_bwd_amax_kernel[grid](
        dy,
        h,
        bits,
        *inputs,
        *bits.stride(),
        **block_arguments(format),
        **options,
        TILE_ROWS=config.rows,
        TILE_COLUMNS=config.columns,
    )
    _activation_bwd_encode_kernel[grid](
        dy,
        h,
        bits.view(torch.float32),
        q.data,
        as_bytes(q.scale),
        *inputs,
        *bits.stride(),
        *scale_strides(q)[1:],
        **encode_arguments(q, config),
        **options,
    )
    return q
