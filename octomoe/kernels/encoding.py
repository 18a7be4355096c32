"""From a tile of values to bytes and scales: what every kernel that quantises does with its tile.

A kernel loads or computes the values of a tile, in whatever way; then either each scale block lies
in the tile (`_own_amax`, `_store_own`), or a first kernel shares magnitudes between tiles by atomic
maxima, whose order does not matter (`_share_amax`), and a second one encodes under these, or under
given scales (`_store_encoded`).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.formats import ALL, Format
from octomoe.core.layouts import ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.kernels.layouts import _scale_offset, as_bytes, empty_scale, scale_strides
from octomoe.kernels.scaling import (
    Encoding,
    _encode,
    _encode_own,
    _loaded_scale,
    _magnitude_bits,
    _scale_of_amax,
    _stored_scale,
    format_encoding,
)
from octomoe.tune.configs import TileConfig


class Output(NamedTuple):
    """What a kernel writes: contiguous data, and scales where a layout has them."""

    data: Tensor
    scale: Tensor
    stride_expert: int
    stride_row: int
    stride_column: int
    num_column_atoms: int


class Blocks(NamedTuple):
    """A value for each scale block: a magnitude or a scale."""

    value: Tensor
    stride_expert: int
    stride_row: int
    stride_column: int


def empty_quantized(
    shape: tuple[int, ...], format: Format, layout: ScaleLayout, device: torch.device
) -> QTensor:
    """Memory for a quantised tensor of `shape`."""
    data = torch.empty(shape, dtype=format.element.dtype, device=device)
    return QTensor(data, empty_scale(format, layout, shape, device), format, layout)


def encoding_of(q: QTensor) -> Encoding:
    """How to encode as `q` is."""
    return format_encoding(q.format, q.layout)


def output_of(q: QTensor) -> Output:
    """Where to write `q`."""
    return Output(q.data, as_bytes(q.scale), *scale_strides(q))


def blocks_of(values: Tensor) -> Blocks:
    """Values in the shape of a COMPACT scale."""
    strides = values.stride() if values.dim() == 3 else (0, *values.stride())
    return Blocks(as_bytes(values), *strides)


def fits_tile(format: Format, config: TileConfig, num_columns: int) -> bool:
    """Whether every scale block lies in one tile."""
    experts, rows, columns = format.block
    if experts != 1 or rows == ALL or config.rows % rows:
        return False
    return config.columns % columns == 0 if columns != ALL else num_columns <= config.columns


def share_tile(formats: tuple[Format, Format], config: TileConfig, shape: tuple[int, ...]) -> bool:
    """Whether one kernel can write both: each has scales, whose blocks lie in one tile."""
    return all(
        fits_tile(format, config, shape[-1]) and 0 not in format.scale_shape(shape)
        for format in formats
    )


def tile_arguments(q: QTensor, second: QTensor | None = None) -> dict[str, Any]:
    """Arguments of a kernel whose tiles hold whole scale blocks, and that writes one value or two.

    A thread computes the scales of its elements. Of 64 elements in rows of 16 it would divide 32
    times where each column has a scale of its own, with branches in between; in rows of 4, 8
    times. Where rows have scales besides, squares are best.
    """
    outputs = [q] if second is None else [q, second]
    is_by_column = [output.format.block[2] == 1 for output in outputs]
    return {
        "out": output_of(q),
        "second_out": None if second is None else output_of(second),
        "ENCODING": encoding_of(q),
        "SECOND_ENCODING": None if second is None else encoding_of(second),
        "NEIGHBORS": 4 if all(is_by_column) else 8 if any(is_by_column) else 16,
    }


def num_tiles(num_rows: int, num_columns: int, config: TileConfig) -> int:
    """Programs; at least one per row of tiles and one at all: where no data is, a scale may be."""
    rows = max(triton.cdiv(num_rows, config.rows), 1)
    return rows * max(triton.cdiv(num_columns, config.columns), 1)


@triton.jit
def _tile(num_columns, TILE_COLUMNS: tl.constexpr, NUM_PROGRAMS: tl.constexpr = 1):
    """Row and column of this program's tile, in tiles: neighbours in the grid share a row.

    A tile may have several programs, one after another.
    """
    num_column_tiles = tl.maximum(tl.cdiv(num_columns, TILE_COLUMNS), 1)
    tile = tl.program_id(0) // NUM_PROGRAMS
    return tile // num_column_tiles, tile % num_column_tiles


@triton.jit
def _columns(tile_column, TILE_COLUMNS: tl.constexpr, NEIGHBORS: tl.constexpr):
    """Columns of a tile, of which a thread holds `NEIGHBORS` side by side at most, or 16."""
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    if NEIGHBORS < 16 and NEIGHBORS < TILE_COLUMNS:
        column = tl.max_contiguous(column, NEIGHBORS)
    return column


@triton.jit
def _own_amax(x, ENCODING: tl.constexpr):
    """Largest magnitude of each scale block of a tile, as bits: [block row, block column].

    A tile holds whole rows where a block does.
    """
    BLOCK_COLUMNS: tl.constexpr = ENCODING.BLOCK_COLUMNS or x.shape[1]
    NUM_ROWS: tl.constexpr = x.shape[0] // ENCODING.BLOCK_ROWS
    NUM_COLUMNS: tl.constexpr = x.shape[1] // BLOCK_COLUMNS
    # [block row, row in block, block column, column in block]
    blocks = tl.reshape(x, [NUM_ROWS, ENCODING.BLOCK_ROWS, NUM_COLUMNS, BLOCK_COLUMNS])
    return tl.max(tl.max(_magnitude_bits(blocks), axis=3), axis=1)


@triton.jit
def _store_own(
    x,
    amax_bits,
    random,
    expert,
    tile_row,
    tile_column,
    num_rows,
    num_columns,
    first_column,
    data_stride_row,
    out,
    ENCODING: tl.constexpr,
    NEIGHBORS: tl.constexpr,
):
    """Store a tile under the scales of its magnitudes, and these scales.

    The tile's matrix has `num_columns`; in memory it may be part of longer rows, from
    `first_column` on. With random bits it is rounded stochastically.
    """
    TILE_ROWS: tl.constexpr = x.shape[0]
    TILE_COLUMNS: tl.constexpr = x.shape[1]
    BLOCK_ROWS: tl.constexpr = ENCODING.BLOCK_ROWS
    BLOCK_COLUMNS: tl.constexpr = ENCODING.BLOCK_COLUMNS or TILE_COLUMNS
    NUM_ROWS: tl.constexpr = TILE_ROWS // BLOCK_ROWS
    NUM_COLUMNS: tl.constexpr = TILE_COLUMNS // BLOCK_COLUMNS
    data_ptr = out.data + expert * num_rows * data_stride_row + first_column
    scale_ptr = out.scale + expert * out.stride_expert
    first_scale = first_column // BLOCK_COLUMNS if ENCODING.BLOCK_COLUMNS else 0
    scale = _scale_of_amax(amax_bits, ENCODING)
    blocks = tl.reshape(x, [NUM_ROWS, BLOCK_ROWS, NUM_COLUMNS, BLOCK_COLUMNS])
    if random is not None:
        random = tl.reshape(random, [NUM_ROWS, BLOCK_ROWS, NUM_COLUMNS, BLOCK_COLUMNS])
    data = _encode_own(blocks, scale[:, None, :, None], ENCODING, random)

    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = _columns(tile_column, TILE_COLUMNS, NEIGHBORS)
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
        out.stride_row,
        out.stride_column,
        out.num_column_atoms,
        ENCODING.IS_INTERLEAVED,
    )
    tl.store(
        scale_ptr + scale_offset,
        _stored_scale(scale, ENCODING.IS_E8M0),
        mask=(block_row * BLOCK_ROWS < num_rows)[:, None] & has_columns[None, :],
    )


@triton.jit
def _share_amax(
    x,
    is_inside,
    expert,
    tile_row,
    tile_column,
    num_columns,
    first_column,
    amax,
    ENCODING: tl.constexpr,
):
    """Raise the shared magnitudes, as bits, of the scale blocks that a tile touches.

    `num_columns` and `first_column` as in `_store_own`.
    """
    bits = _magnitude_bits(x)
    row = tile_row * x.shape[0] + tl.arange(0, x.shape[0])
    column = tile_column * x.shape[1] + tl.arange(0, x.shape[1])
    # Axes that a block spans are reduced before anything is shared.
    is_written = is_inside
    if ENCODING.BLOCK_ROWS == 0:
        bits = tl.max(bits, axis=0, keep_dims=True)
        block_row = tl.zeros([1], tl.int64)
        is_written = (column < num_columns)[None, :]
    else:
        block_row = (row // ENCODING.BLOCK_ROWS).to(tl.int64)
    if ENCODING.BLOCK_COLUMNS == 0:
        bits = tl.max(bits, axis=1, keep_dims=True)
        block_column = tl.zeros([1], tl.int64)
        is_written = tl.max(is_written.to(tl.int32), axis=1, keep_dims=True) != 0
    else:
        block_column = ((first_column + column) // ENCODING.BLOCK_COLUMNS).to(tl.int64)
    offset = block_row[:, None] * amax.stride_row + block_column[None, :] * amax.stride_column
    if ENCODING.BLOCK_EXPERTS != 0:
        offset += expert // ENCODING.BLOCK_EXPERTS * amax.stride_expert
    tl.atomic_max(amax.value + offset, bits, mask=is_written, sem="relaxed")


@triton.jit
def _store_encoded(
    x,
    random,
    is_inside,
    expert,
    tile_row,
    tile_column,
    num_rows,
    num_columns,
    first_column,
    data_stride_row,
    given,
    own_amax,
    out,
    IS_SCALE_GIVEN: tl.constexpr,
    ENCODING: tl.constexpr,
):
    """Store a tile under given scales, or under those of given magnitudes, and these scales.

    `num_columns` and `first_column` as in `_store_own`. Where the element has no NaN, `own_amax`
    has the magnitudes of the data, whose NaN goes into the scale.
    """
    TILE_ROWS: tl.constexpr = x.shape[0]
    TILE_COLUMNS: tl.constexpr = x.shape[1]
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    place = first_column + column

    # A block that spans an axis has one scale there: it is loaded once, not per element.
    is_first_row = row == 0
    is_first_column = place == 0
    if ENCODING.BLOCK_ROWS == 0:
        block_row = tl.zeros([1], tl.int64)
        has_row = block_row == 0
    else:
        block_row = (row // ENCODING.BLOCK_ROWS).to(tl.int64)
        has_row = row < num_rows
        is_first_row = row % ENCODING.BLOCK_ROWS == 0
    if ENCODING.BLOCK_COLUMNS == 0:
        block_column = tl.zeros([1], tl.int64)
        has_column = block_column == 0
    else:
        block_column = (place // ENCODING.BLOCK_COLUMNS).to(tl.int64)
        has_column = column < num_columns
        is_first_column = place % ENCODING.BLOCK_COLUMNS == 0
    if ENCODING.BLOCK_EXPERTS == 0:
        block_expert = expert * 0
        is_first_row &= row + expert == row
    else:
        block_expert = expert // ENCODING.BLOCK_EXPERTS
        is_first_row &= row + expert % ENCODING.BLOCK_EXPERTS == row
    has_scale = has_row[:, None] & has_column[None, :]
    given_offset = (
        block_expert * given.stride_expert
        + block_row[:, None] * given.stride_row
        + block_column[None, :] * given.stride_column
    )
    given_values = tl.load(given.value + given_offset, mask=has_scale, other=0)
    if IS_SCALE_GIVEN:
        scale = _loaded_scale(given_values, ENCODING.IS_E8M0)
    else:
        scale = _scale_of_amax(_magnitude_bits(given_values), ENCODING)
    if not ENCODING.HAS_NAN:
        own_offset = (
            block_expert * own_amax.stride_expert
            + block_row[:, None] * own_amax.stride_row
            + block_column[None, :] * own_amax.stride_column
        )
        own_bits = _magnitude_bits(tl.load(own_amax.value + own_offset, mask=has_scale, other=0))
        scale = tl.where(own_bits > 0x7F800000, float("nan"), scale)

    data = _encode(x, scale, ENCODING, random)
    data_row = expert * num_rows + row.to(tl.int64)
    data_offset = data_row[:, None] * data_stride_row + place[None, :]
    tl.store(out.data + data_offset, data, mask=is_inside)
    # The first element of a block writes its scale.
    scale_offset = block_expert * out.stride_expert + _scale_offset(
        block_row[:, None],
        block_column[None, :],
        out.stride_row,
        out.stride_column,
        out.num_column_atoms,
        ENCODING.IS_INTERLEAVED,
    )
    tl.store(
        out.scale + tl.broadcast_to(scale_offset, [TILE_ROWS, TILE_COLUMNS]),
        tl.broadcast_to(_stored_scale(scale, ENCODING.IS_E8M0), [TILE_ROWS, TILE_COLUMNS]),
        mask=is_first_row[:, None] & is_first_column[None, :] & has_scale,
    )
