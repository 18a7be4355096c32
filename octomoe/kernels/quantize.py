"""Quantise: ``scale = round(amax(block) / target_max)``, ``data = cast(x * (1 / scale))``.

Bound by bytes: x is read once, data and scales are written once. Where a scale block fits into a
tile, one kernel does it all, and writes the scales in the layout asked for. A row that has one
scale is a tile of its own up to 16384 columns, and is read twice beyond. Any other block (the
whole tensor, an expert, a column, a size that is no power of two) takes two kernels: the first
finds the largest magnitudes with atomic maxima, whose order does not matter.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.formats import ALL, Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.kernels.layouts import _scale_offset, as_bytes, empty_scale, scale_strides
from octomoe.kernels.scaling import (
    _encode,
    _loaded_scale,
    _magnitude_bits,
    _scale_of_amax,
    _stored_scale,
    scaling_arguments,
)
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
    # Locate: neighbours in the grid are neighbours along a row.
    num_column_tiles = tl.cdiv(num_columns, TILE_COLUMNS)
    tile_row = tl.program_id(0) // num_column_tiles
    tile_column = tl.program_id(0) % num_column_tiles
    expert = tl.program_id(1).to(tl.int64)
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    is_inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]

    # Load.
    x_offset = (
        row.to(tl.int64)[:, None] * x_stride_row + column.to(tl.int64)[None, :] * x_stride_column
    )
    x = tl.load(x_ptr + expert * x_stride_expert + x_offset, mask=is_inside, other=0.0)

    # Compute: [block row, row in block, block column, column in block].
    NUM_ROWS: tl.constexpr = TILE_ROWS // BLOCK_ROWS
    NUM_COLUMNS: tl.constexpr = TILE_COLUMNS // BLOCK_COLUMNS
    blocks = tl.reshape(x, [NUM_ROWS, BLOCK_ROWS, NUM_COLUMNS, BLOCK_COLUMNS])
    amax_bits = tl.max(tl.max(_magnitude_bits(blocks), axis=3), axis=1)
    scale = _scale_of_amax(amax_bits, TARGET, TARGET_EXPONENT, TARGET_MANTISSA, IS_POW2, IS_E8M0)
    data = _encode(blocks, scale[:, None, :, None], LIMIT, IS_E5M2, HAS_NAN)

    # Store. Data is contiguous.
    data_offset = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    data_ptr += expert * num_rows * num_columns
    tl.store(data_ptr + data_offset, tl.reshape(data, [TILE_ROWS, TILE_COLUMNS]), mask=is_inside)
    block_row = tile_row * NUM_ROWS + tl.arange(0, NUM_ROWS)
    block_column = tile_column * NUM_COLUMNS + tl.arange(0, NUM_COLUMNS)
    scale_offset = _scale_offset(
        block_row[:, None],
        block_column[None, :],
        scale_stride_row,
        scale_stride_column,
        num_column_atoms,
        IS_INTERLEAVED,
    )
    has_rows = block_row * BLOCK_ROWS < num_rows
    has_columns = block_column * BLOCK_COLUMNS < num_columns
    tl.store(
        scale_ptr + expert * scale_stride_expert + scale_offset,
        _stored_scale(scale, IS_E8M0),
        mask=has_rows[:, None] & has_columns[None, :],
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
    num_column_tiles = tl.cdiv(num_columns, TILE_COLUMNS)
    row = tl.program_id(0) // num_column_tiles * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(0) % num_column_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    expert = tl.program_id(1).to(tl.int64)
    # Without experts one program runs, since a scale that they share is written all the same.
    is_row = (row < num_rows) & (row + expert < row + num_experts)
    is_inside = is_row[:, None] & (column < num_columns)[None, :]
    x_offset = (
        row.to(tl.int64)[:, None] * x_stride_row + column.to(tl.int64)[None, :] * x_stride_column
    )
    x = tl.load(x_ptr + expert * x_stride_expert + x_offset, mask=is_inside, other=0.0)
    bits = _magnitude_bits(x)

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
        block_column = (column // BLOCK_COLUMNS).to(tl.int64)
    if BLOCK_EXPERTS != 0:
        amax_ptr += expert // BLOCK_EXPERTS * amax_stride_expert
    offset = block_row[:, None] * amax_stride_row + block_column[None, :] * amax_stride_column
    tl.atomic_max(amax_ptr + offset, bits, mask=is_written, sem="relaxed")


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
    num_column_tiles = tl.cdiv(num_columns, TILE_COLUMNS)
    row = tl.program_id(0) // num_column_tiles * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(0) % num_column_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    expert = tl.program_id(1).to(tl.int64)
    # Without experts one program runs, since a scale that they share is written all the same.
    is_row = (row < num_rows) & (row + expert < row + num_experts)
    is_inside = is_row[:, None] & (column < num_columns)[None, :]
    x_offset = (
        row.to(tl.int64)[:, None] * x_stride_row + column.to(tl.int64)[None, :] * x_stride_column
    )
    x = tl.load(x_ptr + expert * x_stride_expert + x_offset, mask=is_inside, other=0.0)

    # A block that spans an axis has one scale there: it is loaded once, not per element.
    is_first_row = row == 0
    is_first_column = column == 0
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
        block_column = (column // BLOCK_COLUMNS).to(tl.int64)
        has_column = column < num_columns
        is_first_column = column % BLOCK_COLUMNS == 0
    if BLOCK_EXPERTS == 0:
        block_expert = expert * 0
        rest = expert
    else:
        block_expert = expert // BLOCK_EXPERTS
        rest = expert % BLOCK_EXPERTS
    has_scale = has_row[:, None] & has_column[None, :]
    given_ptr += block_expert * given_stride_expert
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
        nan_ptr += block_expert * nan_stride_expert
        nan_offset = block_row[:, None] * nan_stride_row + block_column[None, :] * nan_stride_column
        own_bits = _magnitude_bits(tl.load(nan_ptr + nan_offset, mask=has_scale, other=0))
        scale = tl.where(own_bits > 0x7F800000, float("nan"), scale)

    data = _encode(x, scale, LIMIT, IS_E5M2, HAS_NAN)
    data_offset = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    data_ptr += expert * num_rows * num_columns
    tl.store(data_ptr + data_offset, data, mask=is_inside)
    # The first element of a block writes its scale.
    scale_offset = _scale_offset(
        block_row[:, None],
        block_column[None, :],
        scale_stride_row,
        scale_stride_column,
        num_column_atoms,
        IS_INTERLEAVED,
    )
    is_first = is_first_row[:, None] & is_first_column[None, :] & has_scale
    is_first = is_first & (row + rest == row)[:, None]
    scale_ptr += block_expert * scale_stride_expert
    tl.store(
        scale_ptr + tl.broadcast_to(scale_offset, [TILE_ROWS, TILE_COLUMNS]),
        tl.broadcast_to(_stored_scale(scale, IS_E8M0), [TILE_ROWS, TILE_COLUMNS]),
        mask=is_first,
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
    config = config or quantize_config(shape, format)
    given = amax if scale is None else scale
    if given is None and _fits(format, config, shape):
        _quantize_tile_kernel[_grid(x, config)](
            x,
            q.data,
            as_bytes(q.scale),
            *x.shape[-2:],
            *_strides(x),
            *scale_strides(q),
            **_tile_blocks(format, config),
            **_arguments(q, config),
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
        **_blocks(format),
        **_arguments(q, config),
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
        **_blocks(format),
        TILE_ROWS=config.rows,
        TILE_COLUMNS=config.columns,
        num_warps=config.num_warps,
    )
    return bits.view(torch.float32)


def _fits(format: Format, config: TileConfig, shape: tuple[int, ...]) -> bool:
    """Whether every scale block lies in one tile."""
    experts, rows, columns = format.block
    if experts != 1 or rows == ALL or config.rows % rows:
        return False
    return config.columns % columns == 0 if columns != ALL else shape[-1] <= config.columns


def _tile_blocks(format: Format, config: TileConfig) -> dict[str, int]:
    _, rows, columns = format.block
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_COLUMNS": config.columns if columns == ALL else columns,
    }


def _blocks(format: Format) -> dict[str, int]:
    names = ("BLOCK_EXPERTS", "BLOCK_ROWS", "BLOCK_COLUMNS")
    return {name: max(size, 0) for name, size in zip(names, format.block, strict=True)}


def _arguments(q: QTensor, config: TileConfig) -> dict[str, Any]:
    return {
        "TILE_ROWS": config.rows,
        "TILE_COLUMNS": config.columns,
        "IS_INTERLEAVED": q.layout == ScaleLayout.INTERLEAVED,
        **scaling_arguments(q.format),
    }


def _grid(x: Tensor, config: TileConfig) -> tuple[int, int]:
    """Programs; at least one, since an empty tensor may have a scale."""
    rows, columns = x.shape[-2:]
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns)
    return max(tiles, 1), max(x.shape[0], 1) if x.dim() == 3 else 1


def _sizes(x: Tensor) -> tuple[int, ...]:
    """Experts, rows and columns."""
    return tuple(x.shape) if x.dim() == 3 else (1, *x.shape)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of expert, row and column."""
    return x.stride() if x.dim() == 3 else (0, *x.stride())
