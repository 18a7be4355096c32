"""From a tile of values to bytes and scales: what every kernel that quantises does with its tile.

A kernel loads or computes the values of a tile, in whatever way; then either each scale block lies
in the tile (`_tile_amax`, `_store_tile`), or a first kernel shares magnitudes between tiles by
atomic maxima, whose order does not matter (`_share_amax`), and a second one encodes under these, or
under given scales (`_store_encoded`). Blocks of 0 span their axis.
"""

from typing import Any

import triton
import triton.language as tl

from octomoe.core.formats import ALL, Format
from octomoe.core.layouts import ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.kernels.layouts import _scale_offset
from octomoe.kernels.scaling import (
    _encode,
    _encode_own,
    _loaded_scale,
    _magnitude_bits,
    _scale_of_amax,
    _stored_scale,
    scaling_arguments,
)
from octomoe.tune.configs import TileConfig


def fits_tile(format: Format, config: TileConfig, num_columns: int) -> bool:
    """Whether every scale block lies in one tile."""
    experts, rows, columns = format.block
    if experts != 1 or rows == ALL or config.rows % rows:
        return False
    return config.columns % columns == 0 if columns != ALL else num_columns <= config.columns


def tile_arguments(q: QTensor, config: TileConfig) -> dict[str, Any]:
    """Compile-time arguments of a kernel whose tiles hold whole scale blocks."""
    _, rows, columns = q.format.block
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_COLUMNS": config.columns if columns == ALL else columns,
        **_arguments(q, config),
    }


def encode_arguments(q: QTensor, config: TileConfig) -> dict[str, Any]:
    """Compile-time arguments of a kernel that encodes under scales of blocks of any size."""
    return {**block_arguments(q.format), **_arguments(q, config)}


def block_arguments(format: Format) -> dict[str, int]:
    """Rows and columns of a scale block of any size."""
    _, rows, columns = format.block
    return {"BLOCK_ROWS": max(rows, 0), "BLOCK_COLUMNS": max(columns, 0)}


def _arguments(q: QTensor, config: TileConfig) -> dict[str, Any]:
    return {
        "TILE_ROWS": config.rows,
        "TILE_COLUMNS": config.columns,
        "IS_INTERLEAVED": q.layout == ScaleLayout.INTERLEAVED,
        **scaling_arguments(q.format),
    }


def num_tiles(num_rows: int, num_columns: int, config: TileConfig) -> int:
    """Programs; at least one per row of tiles and one at all: where no data is, a scale may be."""
    rows = max(triton.cdiv(num_rows, config.rows), 1)
    return rows * max(triton.cdiv(num_columns, config.columns), 1)


@triton.jit
def _tile(num_columns, TILE_COLUMNS: tl.constexpr):
    """Row and column of this program's tile, in tiles: neighbours in the grid share a row."""
    num_column_tiles = tl.maximum(tl.cdiv(num_columns, TILE_COLUMNS), 1)
    return tl.program_id(0) // num_column_tiles, tl.program_id(0) % num_column_tiles


@triton.jit
def _tile_amax(x, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Largest magnitude of each scale block of a tile, as bits: [block row, block column]."""
    NUM_ROWS: tl.constexpr = x.shape[0] // BLOCK_ROWS
    NUM_COLUMNS: tl.constexpr = x.shape[1] // BLOCK_COLUMNS
    # [block row, row in block, block column, column in block]
    blocks = tl.reshape(x, [NUM_ROWS, BLOCK_ROWS, NUM_COLUMNS, BLOCK_COLUMNS])
    return tl.max(tl.max(_magnitude_bits(blocks), axis=3), axis=1)


@triton.jit
def _store_tile(
    x,
    amax_bits,
    tile_row,
    tile_column,
    num_rows,
    num_columns,
    data_ptr,
    data_stride_row,
    scale_ptr,
    scale_stride_row,
    scale_stride_column,
    first_scale,
    num_column_atoms,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    TARGET: tl.constexpr,
    TARGET_EXPONENT: tl.constexpr,
    TARGET_MANTISSA: tl.constexpr,
    IS_POW2: tl.constexpr,
    IS_E8M0: tl.constexpr,
    IS_E5M2: tl.constexpr,
):
    """Store a tile under the scales of its magnitudes, and these scales.

    `num_columns` is where the tile's matrix ends; in memory it may be part of longer rows, whose
    scales then start at column `first_scale`.
    """
    TILE_ROWS: tl.constexpr = x.shape[0]
    TILE_COLUMNS: tl.constexpr = x.shape[1]
    NUM_ROWS: tl.constexpr = TILE_ROWS // BLOCK_ROWS
    NUM_COLUMNS: tl.constexpr = TILE_COLUMNS // BLOCK_COLUMNS
    scale = _scale_of_amax(amax_bits, TARGET, TARGET_EXPONENT, TARGET_MANTISSA, IS_POW2, IS_E8M0)
    blocks = tl.reshape(x, [NUM_ROWS, BLOCK_ROWS, NUM_COLUMNS, BLOCK_COLUMNS])
    data = _encode_own(blocks, scale[:, None, :, None], IS_POW2, IS_E5M2)

    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    tl.store(
        data_ptr + row.to(tl.int64)[:, None] * data_stride_row + column[None, :],
        tl.reshape(data, [TILE_ROWS, TILE_COLUMNS]),
        mask=(row < num_rows)[:, None] & (column < num_columns)[None, :],
    )
    block_row = tile_row * NUM_ROWS + tl.arange(0, NUM_ROWS)
    block_column = tile_column * NUM_COLUMNS + tl.arange(0, NUM_COLUMNS)
    # A row of no columns has a scale all the same.
    has_columns = (block_column == 0) | (block_column * BLOCK_COLUMNS < num_columns)
    scale_offset = _scale_offset(
        block_row[:, None],
        first_scale + block_column[None, :],
        scale_stride_row,
        scale_stride_column,
        num_column_atoms,
        IS_INTERLEAVED,
    )
    tl.store(
        scale_ptr + scale_offset,
        _stored_scale(scale, IS_E8M0),
        mask=(block_row * BLOCK_ROWS < num_rows)[:, None] & has_columns[None, :],
    )


@triton.jit
def _share_amax(
    x,
    is_inside,
    tile_row,
    tile_column,
    num_columns,
    first_column,
    amax_ptr,
    amax_stride_row,
    amax_stride_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Raise the shared magnitudes, as bits, of the scale blocks that a tile touches.

    `num_columns` and `first_column` as in `_store_encoded`.
    """
    bits = _magnitude_bits(x)
    row = tile_row * x.shape[0] + tl.arange(0, x.shape[0])
    column = tile_column * x.shape[1] + tl.arange(0, x.shape[1])
    # Axes that a block spans are reduced before anything is shared.
    is_written = is_inside
    if BLOCK_ROWS == 0:
        bits = tl.max(bits, axis=0, keep_dims=True)
        block_row = tl.zeros([1], tl.int64)
        is_written = (column < num_columns)[None, :]
    else:
        block_row = (row // BLOCK_ROWS).to(tl.int64)
    if BLOCK_COLUMNS == 0:
        bits = tl.max(bits, axis=1, keep_dims=True)
        block_column = tl.zeros([1], tl.int64)
        is_written = tl.max(is_written.to(tl.int32), axis=1, keep_dims=True) != 0
    else:
        block_column = ((first_column + column) // BLOCK_COLUMNS).to(tl.int64)
    offset = block_row[:, None] * amax_stride_row + block_column[None, :] * amax_stride_column
    tl.atomic_max(amax_ptr + offset, bits, mask=is_written, sem="relaxed")


@triton.jit
def _store_encoded(
    x,
    is_inside,
    expert_in_block,
    tile_row,
    tile_column,
    num_rows,
    num_columns,
    first_column,
    data_ptr,
    data_stride_row,
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
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
    """Store a tile under given scales, or under those of given magnitudes, and these scales.

    The tile's matrix has `num_columns`; in memory it may be part of longer rows, from
    `first_column` on. Where the element has no NaN, `nan_ptr` has the magnitudes of the data, whose
    NaN goes into the scale.
    """
    TILE_ROWS: tl.constexpr = x.shape[0]
    TILE_COLUMNS: tl.constexpr = x.shape[1]
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    place = first_column + column

    # A block that spans an axis has one scale there: it is loaded once, not per element.
    is_first_row = row == 0
    is_first_column = place == 0
    if BLOCK_ROWS == 0:
        block_row = tl.zeros([1], tl.int64)
        has_row = block_row == 0
    else:
        block_row = (row // BLOCK_ROWS).to(tl.int64)
        has_row = row < num_rows
        is_first_row = row % BLOCK_ROWS == 0
    if BLOCK_COLUMNS == 0:
        block_column = tl.zeros([1], tl.int64)
        has_column = block_column == 0
    else:
        block_column = (place // BLOCK_COLUMNS).to(tl.int64)
        has_column = column < num_columns
        is_first_column = place % BLOCK_COLUMNS == 0
    has_scale = has_row[:, None] & has_column[None, :]
    given_offset = (
        block_row[:, None] * given_stride_row + block_column[None, :] * given_stride_column
    )
    given = tl.load(given_ptr + given_offset, mask=has_scale, other=0)
    if IS_SCALE_GIVEN:
        scale = _loaded_scale(given, IS_E8M0)
    else:
        amax_bits = _magnitude_bits(given)
        scale = _scale_of_amax(
            amax_bits, TARGET, TARGET_EXPONENT, TARGET_MANTISSA, IS_POW2, IS_E8M0
        )
    if not HAS_NAN:
        nan_offset = block_row[:, None] * nan_stride_row + block_column[None, :] * nan_stride_column
        own_bits = _magnitude_bits(tl.load(nan_ptr + nan_offset, mask=has_scale, other=0))
        scale = tl.where(own_bits > 0x7F800000, float("nan"), scale)

    data_offset = row.to(tl.int64)[:, None] * data_stride_row + place[None, :]
    tl.store(data_ptr + data_offset, _encode(x, scale, LIMIT, IS_E5M2, HAS_NAN), mask=is_inside)
    # The first element of a block writes its scale.
    scale_offset = _scale_offset(
        block_row[:, None],
        block_column[None, :],
        scale_stride_row,
        scale_stride_column,
        num_column_atoms,
        IS_INTERLEAVED,
    )
    is_first_row = is_first_row & (row + expert_in_block == row)
    is_first = is_first_row[:, None] & is_first_column[None, :] & has_scale
    tl.store(
        scale_ptr + tl.broadcast_to(scale_offset, [TILE_ROWS, TILE_COLUMNS]),
        tl.broadcast_to(_stored_scale(scale, IS_E8M0), [TILE_ROWS, TILE_COLUMNS]),
        mask=is_first,
    )
