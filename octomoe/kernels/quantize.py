"""Quantise: ``scale = round(amax(block) / target_max)``, ``data = cast(x * (1 / scale))``.

Bound by bytes: x is read once, data and scales are written once. Where a scale block fits into a
tile, one kernel does it all, and writes the scales in the layout asked for; it may write a second
format of the same tile. A row that has one scale is a tile of its own up to 16384 columns, and is
read twice beyond. Any other block (the whole tensor, an expert, a column, a size that is no power
of two) takes two kernels: the first finds the largest magnitudes with atomic maxima, whose order
does not matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.device import num_sms
from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.kernels.chain import _wait_for_predecessor, chain_arguments
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
    tile_arguments,
)
from octomoe.kernels.stochastic_rounding import _random_bits
from octomoe.tune.configs import TileConfig
from octomoe.tune.lookup import quantize_config


@triton.jit
def _load_tile(
    x_ptr,
    expert,
    tile_row,
    tile_column,
    num_experts,
    num_rows,
    num_columns,
    x_stride_expert,
    x_stride_row,
    x_stride_column,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    NEIGHBORS: tl.constexpr,
):
    """A tile, zero outside, and which elements are inside."""
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = _columns(tile_column, TILE_COLUMNS, NEIGHBORS)
    # Without experts one program runs, since a scale that they share is written all the same.
    is_row = (row < num_rows) & (row + expert < row + num_experts)
    is_inside = is_row[:, None] & (column < num_columns)[None, :]
    x_offset = (
        row.to(tl.int64)[:, None] * x_stride_row + column.to(tl.int64)[None, :] * x_stride_column
    )
    x = tl.load(x_ptr + expert * x_stride_expert + x_offset, mask=is_inside, other=0.0)
    return x, is_inside


@triton.jit
def _quantize_tile_kernel(
    x_ptr,
    seed_ptr,
    num_experts,
    num_rows,
    num_columns,
    x_stride_expert,
    x_stride_row,
    x_stride_column,
    out,
    second_out,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ENCODING: tl.constexpr,
    SECOND_ENCODING: tl.constexpr,
    NEIGHBORS: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """Encode tiles that hold whole scale blocks; `second_out` may be None, and so may the seed.

    Chained, it ends when the kernel before has ended, too: what comes next waits for this one only.
    """
    tile_row, tile_column = _tile(num_columns, TILE_COLUMNS)
    expert = tl.program_id(1).to(tl.int64)
    x, _ = _load_tile(
        x_ptr,
        expert,
        tile_row,
        tile_column,
        num_experts,
        num_rows,
        num_columns,
        x_stride_expert,
        x_stride_row,
        x_stride_column,
        TILE_ROWS,
        TILE_COLUMNS,
        NEIGHBORS,
    )
    amax = _own_amax(x, ENCODING)
    # Random bits are drawn when all that the warps wait for is done: they hold registers.
    second_amax = amax if second_out is None else _own_amax(x, SECOND_ENCODING)
    random = None
    if seed_ptr is not None:
        first_row = expert * num_rows + tile_row * TILE_ROWS
        first_column = tile_column * TILE_COLUMNS
        random = _random_bits(x, seed_ptr, first_row, first_column, num_columns, True)
    _store_own(
        x,
        amax,
        random,
        expert,
        tile_row,
        tile_column,
        num_rows,
        num_columns,
        0,
        num_columns,
        out,
        ENCODING,
        NEIGHBORS,
    )
    if second_out is not None:
        _store_own(
            x,
            second_amax,
            random,
            expert,
            tile_row,
            tile_column,
            num_rows,
            num_columns,
            0,
            num_columns,
            second_out,
            SECOND_ENCODING,
            NEIGHBORS,
        )
    _wait_for_predecessor(IS_CHAINED)


@triton.jit
def _amax_kernel(
    x_ptr,
    amax,
    num_experts,
    num_rows,
    num_columns,
    x_stride_expert,
    x_stride_row,
    x_stride_column,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ENCODING: tl.constexpr,
):
    """Largest magnitudes of scale blocks of any size, as bits."""
    tile_row, tile_column = _tile(num_columns, TILE_COLUMNS)
    expert = tl.program_id(1).to(tl.int64)
    x, is_inside = _load_tile(
        x_ptr,
        expert,
        tile_row,
        tile_column,
        num_experts,
        num_rows,
        num_columns,
        x_stride_expert,
        x_stride_row,
        x_stride_column,
        TILE_ROWS,
        TILE_COLUMNS,
        16,
    )
    _share_amax(x, is_inside, expert, tile_row, tile_column, num_columns, 0, amax, ENCODING)


@triton.jit
def _encode_kernel(
    x_ptr,
    given,
    own_amax,
    out,
    seed_ptr,
    num_experts,
    num_rows,
    num_columns,
    x_stride_expert,
    x_stride_row,
    x_stride_column,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    IS_SCALE_GIVEN: tl.constexpr,
    ENCODING: tl.constexpr,
):
    """Encode under given scales, or under those of given magnitudes, of blocks of any size."""
    tile_row, tile_column = _tile(num_columns, TILE_COLUMNS)
    expert = tl.program_id(1).to(tl.int64)
    x, is_inside = _load_tile(
        x_ptr,
        expert,
        tile_row,
        tile_column,
        num_experts,
        num_rows,
        num_columns,
        x_stride_expert,
        x_stride_row,
        x_stride_column,
        TILE_ROWS,
        TILE_COLUMNS,
        16,
    )
    random = None
    if seed_ptr is not None:
        first_row = expert * num_rows + tile_row * TILE_ROWS
        first_column = tile_column * TILE_COLUMNS
        random = _random_bits(x, seed_ptr, first_row, first_column, num_columns, True)
    _store_encoded(
        x,
        random,
        is_inside,
        expert,
        tile_row,
        tile_column,
        num_rows,
        num_columns,
        0,
        num_columns,
        given,
        own_amax,
        out,
        IS_SCALE_GIVEN,
        ENCODING,
    )


def quantize(
    x: Tensor,
    format: Format,
    *,
    layout: ScaleLayout = COMPACT,
    amax: Tensor | None = None,
    scale: Tensor | None = None,
    seed: Tensor | None = None,
    config: TileConfig | None = None,
    out: QTensor | None = None,
    is_chained: bool = False,
) -> QTensor:
    """Quantise ``[rows, columns]`` or ``[experts, rows, columns]``; see `octomoe.quantize`.

    `is_chained`: it may run beside the kernel before, and end after it. That kernel must not make
    x, nor may `out` be memory that it uses.
    """
    shape = tuple(x.shape)
    q = empty_quantized(shape, format, layout, x.device) if out is None else out
    if q.scale.numel() == 0:
        return q
    config = config or quantize_config(
        shape, format, layout, is_seeded=seed is not None, sms=num_sms(x.device)
    )
    given = amax if scale is None else scale
    if given is None and fits_tile(format, config, shape[-1]):
        quantize_tiles(x, q, None, seed, config, is_chained=is_chained)
        return q
    own = None
    if given is None or not format.element.has_nan:
        own = _block_amax(x, q, config)
    given = own if given is None else given.expand(format.scale_shape(shape))
    assert given is not None
    _encode_kernel[_grid(x, config)](
        x,
        blocks_of(given),
        blocks_of(given if own is None else own),
        output_of(q),
        seed,
        *_sizes(x),
        *_strides(x),
        TILE_ROWS=config.rows,
        TILE_COLUMNS=config.columns,
        IS_SCALE_GIVEN=scale is not None,
        ENCODING=encoding_of(q),
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return q


def quantize_tiles(
    x: Tensor,
    q: QTensor,
    second: QTensor | None,
    seed: Tensor | None,
    config: TileConfig,
    *,
    is_chained: bool = False,
) -> None:
    """Write one or two values of x whose scale blocks lie in one tile each."""
    _quantize_tile_kernel[_grid(x, config)](
        x,
        seed,
        *_sizes(x),
        *_strides(x),
        **tile_arguments(q, second),
        TILE_ROWS=config.rows,
        TILE_COLUMNS=config.columns,
        IS_CHAINED=is_chained,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **chain_arguments(is_chained),
    )


def _block_amax(x: Tensor, q: QTensor, config: TileConfig) -> Tensor:
    """Largest magnitude of each scale block of q, as the int32 bits of its float32."""
    shape = q.format.scale_shape(tuple(x.shape))
    bits = torch.zeros(shape, dtype=torch.int32, device=x.device)
    _amax_kernel[_grid(x, config)](
        x,
        blocks_of(bits),
        *_sizes(x),
        *_strides(x),
        TILE_ROWS=config.rows,
        TILE_COLUMNS=config.columns,
        ENCODING=encoding_of(q),
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return bits.view(torch.float32)


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
