"""Gradient of an activation: ``dy [S, F], h [S, 2F] -> dh [S, 2F]``, gate columns then up columns.

Bound by bytes: dy and h are read once, dh and its scales are written once. A program computes a
tile of the gate's gradient and the tile of up's that goes with it, which share their loads and the
nonlinear function. Quantised, this takes one kernel where each scale block lies in one tile of
either, or spans the rows of both up to 16384 columns each; it may write a second format of the same
tiles. Otherwise two kernels read dy and h: the first finds the largest magnitudes, the second
encodes.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.activations import Activation
from octomoe.core.device import num_sms
from octomoe.core.formats import ALL, Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.kernels.activations import _activate_bwd, _load_gate_up, nonlinearity_of
from octomoe.kernels.encoding import (
    _columns,
    _own_amax,
    _share_amax,
    _store_encoded,
    _store_own,
    _tile,
    blocks_of,
    empty_quantized,
    encoding_of,
    fits_tile,
    num_tiles,
    output_of,
    share_tile,
    tile_arguments,
)
from octomoe.kernels.stochastic_rounding import _random_bits
from octomoe.tune.configs import TileConfig
from octomoe.tune.lookup import activation_bwd_both_config, activation_bwd_config

# Elements of a tile of the gate that a program holds together with up's, where it draws random bits
# or writes two formats.
_MOST_OF_BOTH: Final = 8192


class Inputs(NamedTuple):
    """What a kernel reads; rows and columns are dy's."""

    dy: Tensor
    h: Tensor
    num_rows: int
    num_columns: int
    dy_stride_row: int
    dy_stride_column: int
    h_stride_row: int
    h_stride_column: int


@triton.jit
def _gradients(
    inputs,
    tile_row,
    tile_column,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    NEIGHBORS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Tiles of the gradients of the gate and of up, zero outside, and which elements are inside."""
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = _columns(tile_column, TILE_COLUMNS, NEIGHBORS)
    is_inside = (row < inputs.num_rows)[:, None] & (column < inputs.num_columns)[None, :]
    dy_offset = (
        row.to(tl.int64)[:, None] * inputs.dy_stride_row
        + column.to(tl.int64)[None, :] * inputs.dy_stride_column
    )
    dy = tl.load(inputs.dy + dy_offset, mask=is_inside, other=0.0).to(tl.float32)
    gate, up = _load_gate_up(
        inputs.h,
        row,
        column,
        is_inside,
        inputs.num_columns,
        inputs.h_stride_row,
        inputs.h_stride_column,
        ACTIVATION.IS_GATED,
    )
    dgate, dup = _activate_bwd(dy, gate, up, ACTIVATION)
    return dgate, dup, is_inside


@triton.jit
def _activation_bwd_kernel(
    inputs,
    dh_ptr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    tile_row, tile_column = _tile(inputs.num_columns, TILE_COLUMNS)
    dgate, dup, is_inside = _gradients(
        inputs, tile_row, tile_column, TILE_ROWS, TILE_COLUMNS, 16, ACTIVATION
    )
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    if ACTIVATION.IS_GATED:
        dh_ptr += row.to(tl.int64)[:, None] * (2 * inputs.num_columns) + column[None, :]
        tl.store(dh_ptr + inputs.num_columns, dup.to(dh_ptr.dtype.element_ty), mask=is_inside)
    else:
        dh_ptr += row.to(tl.int64)[:, None] * inputs.num_columns + column[None, :]
    tl.store(dh_ptr, dgate.to(dh_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def _gradient_amax(dgate, dup, ENCODING: tl.constexpr, HAS_UP: tl.constexpr):
    """Magnitudes of the scale blocks of both tiles; a scale of whole rows serves both."""
    gate_amax = _own_amax(dgate, ENCODING)
    up_amax = gate_amax
    if HAS_UP:
        up_amax = _own_amax(dup, ENCODING)
        if ENCODING.BLOCK_COLUMNS == 0:
            gate_amax = tl.maximum(gate_amax, up_amax)
            up_amax = gate_amax
    return gate_amax, up_amax


@triton.jit
def _activation_bwd_tile_kernel(
    inputs,
    seed_ptr,
    out,
    second_out,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ENCODING: tl.constexpr,
    SECOND_ENCODING: tl.constexpr,
    NEIGHBORS: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Encode tiles that hold whole scale blocks; `second_out` may be None, and so may the seed.

    `IS_SPLIT`: tiles of the gate and of up have a program each, since registers do not suffice for
    both; the neighbour finds in the cache what it reads, too.
    """
    NUM_PROGRAMS: tl.constexpr = 2 if IS_SPLIT else 1
    tile_row, tile_column = _tile(inputs.num_columns, TILE_COLUMNS, NUM_PROGRAMS)
    dgate, dup, _ = _gradients(
        inputs, tile_row, tile_column, TILE_ROWS, TILE_COLUMNS, NEIGHBORS, ACTIVATION
    )
    HAS_UP: tl.constexpr = ACTIVATION.IS_GATED and not IS_SPLIT
    first_part = 0
    if IS_SPLIT:
        first_part = tl.program_id(0) % 2
        dgate = tl.where(first_part == 0, dgate, dup)
    gate_amax, up_amax = _gradient_amax(dgate, dup, ENCODING, HAS_UP)
    second_gate_amax, second_up_amax = gate_amax, up_amax
    if second_out is not None:
        second_gate_amax, second_up_amax = _gradient_amax(dgate, dup, SECOND_ENCODING, HAS_UP)
    data_stride_row = (1 + ACTIVATION.IS_GATED) * inputs.num_columns
    for part in tl.static_range(1 + HAS_UP):
        values = dgate if part == 0 else dup
        first_column = (first_part + part) * inputs.num_columns
        random = None
        if seed_ptr is not None:
            random = _random_bits(
                values,
                seed_ptr,
                tile_row * TILE_ROWS,
                first_column + tile_column * TILE_COLUMNS,
                data_stride_row,
                IS_GROUPED,
            )
        _store_own(
            values,
            gate_amax if part == 0 else up_amax,
            random,
            0,
            tile_row,
            tile_column,
            inputs.num_rows,
            inputs.num_columns,
            first_column,
            data_stride_row,
            out,
            ENCODING,
            NEIGHBORS,
        )
        if second_out is not None:
            _store_own(
                values,
                second_gate_amax if part == 0 else second_up_amax,
                random,
                0,
                tile_row,
                tile_column,
                inputs.num_rows,
                inputs.num_columns,
                first_column,
                data_stride_row,
                second_out,
                SECOND_ENCODING,
                NEIGHBORS,
            )


@triton.jit
def _activation_bwd_amax_kernel(
    inputs,
    amax,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ENCODING: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Largest magnitudes of scale blocks of any size, as bits."""
    tile_row, tile_column = _tile(inputs.num_columns, TILE_COLUMNS)
    dgate, dup, is_inside = _gradients(
        inputs, tile_row, tile_column, TILE_ROWS, TILE_COLUMNS, 16, ACTIVATION
    )
    for part in tl.static_range(1 + ACTIVATION.IS_GATED):
        _share_amax(
            dgate if part == 0 else dup,
            is_inside,
            0,
            tile_row,
            tile_column,
            inputs.num_columns,
            part * inputs.num_columns,
            amax,
            ENCODING,
        )


@triton.jit
def _activation_bwd_encode_kernel(
    inputs,
    amax,
    out,
    seed_ptr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ENCODING: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Encode under the scales of magnitudes of blocks of any size."""
    tile_row, tile_column = _tile(inputs.num_columns, TILE_COLUMNS)
    dgate, dup, is_inside = _gradients(
        inputs, tile_row, tile_column, TILE_ROWS, TILE_COLUMNS, 16, ACTIVATION
    )
    data_stride_row = (1 + ACTIVATION.IS_GATED) * inputs.num_columns
    for part in tl.static_range(1 + ACTIVATION.IS_GATED):
        values = dgate if part == 0 else dup
        first_column = part * inputs.num_columns
        random = None
        if seed_ptr is not None:
            random = _random_bits(
                values,
                seed_ptr,
                tile_row * TILE_ROWS,
                first_column + tile_column * TILE_COLUMNS,
                data_stride_row,
                IS_GROUPED,
            )
        _store_encoded(
            values,
            random,
            is_inside,
            0,
            tile_row,
            tile_column,
            inputs.num_rows,
            inputs.num_columns,
            first_column,
            data_stride_row,
            amax,
            amax,
            out,
            False,
            ENCODING,
        )


def activation_bwd(
    dy: Tensor,
    h: Tensor,
    activation: Activation,
    *,
    format: Format | None = None,
    layout: ScaleLayout = COMPACT,
    out_dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor | QTensor:
    """``[S, F] -> [S, 2F]``, or ``[S, F]`` without a gate; see `octomoe.activation_bwd`."""
    shape = (dy.shape[0], dy.shape[1])
    config = config or activation_bwd_config(shape, format, layout, sms=num_sms(h.device))
    if format is not None:
        return _quantized(dy, h, activation, format, layout, seed, config)
    dtype = dy.dtype if out_dtype is None else out_dtype
    dh = torch.empty(h.shape, dtype=dtype, device=h.device)
    if dh.numel():
        _activation_bwd_kernel[(num_tiles(*shape, config),)](
            _inputs(dy, h),
            dh,
            TILE_ROWS=config.rows,
            TILE_COLUMNS=config.columns,
            ACTIVATION=nonlinearity_of(activation),
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return dh


def activation_bwd_both(
    dy: Tensor,
    h: Tensor,
    activation: Activation,
    row_format: Format,
    column_format: Format,
    *,
    row_layout: ScaleLayout = COMPACT,
    column_layout: ScaleLayout = COMPACT,
    seed: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[QTensor, QTensor]:
    """The gradient in two formats; see `octomoe.activation_bwd_both`."""
    shape, formats = (dy.shape[0], dy.shape[1]), (row_format, column_format)
    sms = num_sms(h.device)
    config = config or activation_bwd_both_config(
        shape, *formats, is_seeded=seed is not None, sms=sms
    )
    are_apart = all(_is_apart(format, activation, shape[1]) for format in formats)
    if config is None or not (are_apart and share_tile(formats, config, shape)):
        row_config = activation_bwd_config(shape, row_format, row_layout, sms=sms)
        column_config = activation_bwd_config(shape, column_format, column_layout, sms=sms)
        return (
            _quantized(dy, h, activation, row_format, row_layout, seed, row_config),
            _quantized(dy, h, activation, column_format, column_layout, seed, column_config),
        )
    rows = empty_quantized(tuple(h.shape), row_format, row_layout, h.device)
    columns = empty_quantized(tuple(h.shape), column_format, column_layout, h.device)
    _quantize_tiles(dy, h, activation, rows, columns, seed, config)
    return rows, columns


def _is_apart(format: Format, activation: Activation, num_columns: int) -> bool:
    """Whether no scale block reaches from the gate's columns into up's, unless it has both."""
    block_columns = format.block[2]
    return block_columns == ALL or not activation.gated or num_columns % block_columns == 0


def _quantized(
    dy: Tensor,
    h: Tensor,
    activation: Activation,
    format: Format,
    layout: ScaleLayout,
    seed: Tensor | None,
    config: TileConfig,
) -> QTensor:
    q = empty_quantized(tuple(h.shape), format, layout, h.device)
    if q.scale.numel() == 0:
        return q
    shape = (dy.shape[0], dy.shape[1])
    if _is_apart(format, activation, shape[1]) and fits_tile(format, config, shape[1]):
        _quantize_tiles(dy, h, activation, q, None, seed, config)
        return q
    grid = (num_tiles(*shape, config),)
    inputs = _inputs(dy, h)
    options = {
        "TILE_ROWS": config.rows,
        "TILE_COLUMNS": config.columns,
        "ENCODING": encoding_of(q),
        "ACTIVATION": nonlinearity_of(activation),
        "num_warps": config.num_warps,
        "enable_fp_fusion": True,
    }
    bits = torch.zeros(format.scale_shape(q.shape), dtype=torch.int32, device=h.device)
    _activation_bwd_amax_kernel[grid](inputs, blocks_of(bits), **options)
    _activation_bwd_encode_kernel[grid](
        inputs,
        blocks_of(bits.view(torch.float32)),
        output_of(q),
        seed,
        IS_GROUPED=_is_grouped(seed, shape[1]),
        **options,
    )
    return q


def _quantize_tiles(
    dy: Tensor,
    h: Tensor,
    activation: Activation,
    q: QTensor,
    second: QTensor | None,
    seed: Tensor | None,
    config: TileConfig,
) -> None:
    """Write one or two values of the gradient whose scale blocks lie in one tile each."""
    shape = (dy.shape[0], dy.shape[1])
    is_split = activation.gated and config.rows * config.columns > _MOST_OF_BOTH
    is_split &= second is not None or seed is not None
    # Rows of one scale need the magnitudes of both.
    is_split &= all(output.format.block[2] != ALL for output in (q, second or q))
    _activation_bwd_tile_kernel[(num_tiles(*shape, config) * (1 + is_split),)](
        _inputs(dy, h),
        seed,
        **tile_arguments(q, second),
        TILE_ROWS=config.rows,
        TILE_COLUMNS=config.columns,
        IS_GROUPED=_is_grouped(seed, shape[1]),
        IS_SPLIT=is_split,
        ACTIVATION=nonlinearity_of(activation),
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )


def _inputs(dy: Tensor, h: Tensor) -> Inputs:
    return Inputs(dy, h, *dy.shape, *dy.stride(), *h.stride())


def _is_grouped(seed: Tensor | None, num_columns: int) -> bool:
    """Whether up's columns begin with a group of random numbers; without a seed they may."""
    return seed is None or num_columns % 4 == 0
