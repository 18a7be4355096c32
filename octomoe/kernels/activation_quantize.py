"""Activate and quantise: ``[S, 2F] -> quantize(nonlinear(gate) * up)``, ``[S, F]`` without a gate.

Bound by bytes: the 2F columns of a row are read once, F bytes and their scales are written once.
The activation's result lives in registers only. Where a scale block fits into a tile, one kernel
does it all; a row that has one scale is a tile of its own up to 16384 columns. Any other block (the
whole tensor, a column, a size that is no power of two) takes two kernels, both of which read h:
the first finds the largest magnitudes, the second encodes. Under given scales the second one runs
alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.activations import Activation
from octomoe.core.device import num_sms
from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.kernels.activations import _activate, _load_gate_up, activation_arguments, width_of
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
from octomoe.tune.lookup import activation_quantize_config


@triton.jit
def _load_activated(
    h_ptr,
    tile_row,
    tile_column,
    num_rows,
    num_columns,
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
    """A tile of act(h), zero outside, and which elements are inside."""
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    is_inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    gate, up = _load_gate_up(
        h_ptr, row, column, is_inside, num_columns, h_stride_row, h_stride_column, IS_GATED
    )
    y = _activate(gate, up, IS_GATED, KIND, ALPHA, CLAMP, IS_OUTPUT_CLAMPED, UP_OFFSET)
    return y, is_inside


@triton.jit
def _activation_quantize_tile_kernel(
    h_ptr,
    data_ptr,
    scale_ptr,
    num_rows,
    num_columns,
    h_stride_row,
    h_stride_column,
    scale_stride_row,
    scale_stride_column,
    num_column_atoms,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
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
    y, _ = _load_activated(
        h_ptr,
        tile_row,
        tile_column,
        num_rows,
        num_columns,
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
    _store_tile(
        y,
        _tile_amax(y, BLOCK_ROWS, BLOCK_COLUMNS),
        tile_row,
        tile_column,
        num_rows,
        num_columns,
        data_ptr,
        num_columns,
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
def _activation_amax_kernel(
    h_ptr,
    amax_ptr,
    num_rows,
    num_columns,
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
    y, is_inside = _load_activated(
        h_ptr,
        tile_row,
        tile_column,
        num_rows,
        num_columns,
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
    _share_amax(
        y,
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
def _activation_encode_kernel(
    h_ptr,
    given_ptr,
    nan_ptr,
    data_ptr,
    scale_ptr,
    num_rows,
    num_columns,
    h_stride_row,
    h_stride_column,
    given_stride_row,
    given_stride_column,
    nan_stride_row,
    nan_stride_column,
    scale_stride_row,
    scale_stride_column,
    num_column_atoms,
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
    IS_GATED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    CLAMP: tl.constexpr,
    IS_OUTPUT_CLAMPED: tl.constexpr,
    UP_OFFSET: tl.constexpr,
):
    tile_row, tile_column = _tile(num_columns, TILE_COLUMNS)
    y, is_inside = _load_activated(
        h_ptr,
        tile_row,
        tile_column,
        num_rows,
        num_columns,
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
    _store_encoded(
        y,
        is_inside,
        0,
        tile_row,
        tile_column,
        num_rows,
        num_columns,
        0,
        data_ptr,
        num_columns,
        given_ptr,
        given_stride_row,
        given_stride_column,
        nan_ptr,
        nan_stride_row,
        nan_stride_column,
        scale_ptr,
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


def activation_quantize(
    h: Tensor,
    activation: Activation,
    format: Format,
    *,
    layout: ScaleLayout = COMPACT,
    scale: Tensor | None = None,
    config: TileConfig | None = None,
) -> QTensor:
    """``[S, 2F]``, or ``[S, F]`` without a gate; see `octomoe.activation_quantize`."""
    shape = (h.shape[0], width_of(h, activation))
    data = torch.empty(shape, dtype=format.element.dtype, device=h.device)
    q = QTensor(data, empty_scale(format, layout, shape, h.device), format, layout)
    if q.scale.numel() == 0:
        return q
    config = config or activation_quantize_config(shape, format, layout, sms=num_sms(h.device))
    grid = (num_tiles(*shape, config),)
    if scale is None and fits_tile(format, config, shape[1]):
        _activation_quantize_tile_kernel[grid](
            h,
            q.data,
            as_bytes(q.scale),
            *shape,
            *h.stride(),
            *scale_strides(q)[1:],
            **tile_arguments(q, config),
            **activation_arguments(activation),
            num_warps=config.num_warps,
        )
        return q
    own = None
    if scale is None or not format.element.has_nan:
        own = _block_amax(h, activation, q, config)
    given = own if scale is None else as_bytes(scale.expand(format.scale_shape(shape)))
    assert given is not None
    own = given if own is None else own
    _activation_encode_kernel[grid](
        h,
        given,
        own,
        q.data,
        as_bytes(q.scale),
        *shape,
        *h.stride(),
        *given.stride(),
        *own.stride(),
        *scale_strides(q)[1:],
        **encode_arguments(q, config),
        **activation_arguments(activation),
        IS_SCALE_GIVEN=scale is not None,
        num_warps=config.num_warps,
    )
    return q


def _block_amax(h: Tensor, activation: Activation, q: QTensor, config: TileConfig) -> Tensor:
    """Largest magnitude of each scale block of act(h), as the int32 bits of its float32."""
    shape = (q.shape[0], q.shape[1])
    bits = torch.zeros(q.format.scale_shape(shape), dtype=torch.int32, device=h.device)
    _activation_amax_kernel[(num_tiles(*shape, config),)](
        h,
        bits,
        *shape,
        *h.stride(),
        *bits.stride(),
        **block_arguments(q.format),
        **activation_arguments(activation),
        TILE_ROWS=config.rows,
        TILE_COLUMNS=config.columns,
        num_warps=config.num_warps,
    )
    return bits.view(torch.float32)
