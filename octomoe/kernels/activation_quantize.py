"""Activate and quantise: ``[S, 2F] -> quantize(nonlinear(gate) * up)``, ``[S, F]`` without a gate.

Bound by bytes: the 2F columns of a row are read once, F bytes and their scales are written once.
The activation's result lives in registers only. Where a scale block fits into a tile, one kernel
does it all, and may write a second format of the same tile; a row that has one scale is a tile of
its own up to 16384 columns. Any other block (the whole tensor, a column, a size that is no power of
two) takes two kernels, both of which read h: the first finds the largest magnitudes, the second
encodes. Under given scales the second one runs alone.

Multiplications and additions may be fused, whatever Triton's default: without, a kernel takes 4 to
6 % longer on an H200.
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
from octomoe.kernels.activations import _activate, _load_gate_up, nonlinearity_of, width_of
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
from octomoe.tune.lookup import activation_quantize_both_config, activation_quantize_config


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
    NEIGHBORS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """A tile of act(h), zero outside, and which elements are inside."""
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = _columns(tile_column, TILE_COLUMNS, NEIGHBORS)
    is_inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    gate, up = _load_gate_up(
        h_ptr,
        row,
        column,
        is_inside,
        num_columns,
        h_stride_row,
        h_stride_column,
        ACTIVATION.IS_GATED,
    )
    y = _activate(gate, up, ACTIVATION)
    return y, is_inside


@triton.jit
def _activation_quantize_tile_kernel(
    h_ptr,
    seed_ptr,
    num_rows,
    num_columns,
    h_stride_row,
    h_stride_column,
    out,
    second_out,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ENCODING: tl.constexpr,
    SECOND_ENCODING: tl.constexpr,
    NEIGHBORS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Encode tiles that hold whole scale blocks; `second_out` may be None, and so may the seed."""
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
        NEIGHBORS,
        ACTIVATION,
    )
    amax = _own_amax(y, ENCODING)
    # Random bits are drawn when all that the warps wait for is done: they hold registers.
    second_amax = amax if second_out is None else _own_amax(y, SECOND_ENCODING)
    random = None
    if seed_ptr is not None:
        first_row, first_column = tile_row * TILE_ROWS, tile_column * TILE_COLUMNS
        random = _random_bits(y, seed_ptr, first_row, first_column, num_columns, True)
    _store_own(
        y,
        amax,
        random,
        0,
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
            y,
            second_amax,
            random,
            0,
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


@triton.jit
def _activation_amax_kernel(
    h_ptr,
    amax,
    num_rows,
    num_columns,
    h_stride_row,
    h_stride_column,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ENCODING: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Largest magnitudes of scale blocks of any size, as bits."""
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
        16,
        ACTIVATION,
    )
    _share_amax(y, is_inside, 0, tile_row, tile_column, num_columns, 0, amax, ENCODING)


@triton.jit
def _activation_encode_kernel(
    h_ptr,
    given,
    own_amax,
    out,
    seed_ptr,
    num_rows,
    num_columns,
    h_stride_row,
    h_stride_column,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    IS_SCALE_GIVEN: tl.constexpr,
    ENCODING: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Encode under given scales, or under those of given magnitudes, of blocks of any size."""
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
        16,
        ACTIVATION,
    )
    random = None
    if seed_ptr is not None:
        first_row, first_column = tile_row * TILE_ROWS, tile_column * TILE_COLUMNS
        random = _random_bits(y, seed_ptr, first_row, first_column, num_columns, True)
    _store_encoded(
        y,
        random,
        is_inside,
        0,
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


def activation_quantize(
    h: Tensor,
    activation: Activation,
    format: Format,
    *,
    layout: ScaleLayout = COMPACT,
    scale: Tensor | None = None,
    seed: Tensor | None = None,
    config: TileConfig | None = None,
) -> QTensor:
    """``[S, 2F]``, or ``[S, F]`` without a gate; see `octomoe.activation_quantize`."""
    shape = (h.shape[0], width_of(h, activation))
    q = empty_quantized(shape, format, layout, h.device)
    if q.scale.numel() == 0:
        return q
    config = config or activation_quantize_config(shape, format, layout, sms=num_sms(h.device))
    if scale is None and fits_tile(format, config, shape[1]):
        _quantize_tiles(h, activation, q, None, seed, config)
        return q
    own = None
    if scale is None or not format.element.has_nan:
        own = _block_amax(h, activation, q, config)
    given = own if scale is None else scale.expand(format.scale_shape(shape))
    assert given is not None
    _activation_encode_kernel[(num_tiles(*shape, config),)](
        h,
        blocks_of(given),
        blocks_of(given if own is None else own),
        output_of(q),
        seed,
        *shape,
        *h.stride(),
        TILE_ROWS=config.rows,
        TILE_COLUMNS=config.columns,
        IS_SCALE_GIVEN=scale is not None,
        ENCODING=encoding_of(q),
        ACTIVATION=nonlinearity_of(activation),
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return q


def activation_quantize_both(
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
    """``act(h)`` in two formats; see `octomoe.activation_quantize_both`."""
    shape = (h.shape[0], width_of(h, activation))
    formats = (row_format, column_format)
    config = config or activation_quantize_both_config(
        shape, *formats, is_seeded=seed is not None, sms=num_sms(h.device)
    )
    if config is None or not share_tile(formats, config, shape):
        return (
            activation_quantize(h, activation, row_format, layout=row_layout, seed=seed),
            activation_quantize(h, activation, column_format, layout=column_layout, seed=seed),
        )
    rows = empty_quantized(shape, row_format, row_layout, h.device)
    columns = empty_quantized(shape, column_format, column_layout, h.device)
    _quantize_tiles(h, activation, rows, columns, seed, config)
    return rows, columns


def _quantize_tiles(
    h: Tensor,
    activation: Activation,
    q: QTensor,
    second: QTensor | None,
    seed: Tensor | None,
    config: TileConfig,
) -> None:
    """Write one or two values of act(h) whose scale blocks lie in one tile each."""
    shape = (q.shape[0], q.shape[1])
    _activation_quantize_tile_kernel[(num_tiles(*shape, config),)](
        h,
        seed,
        *shape,
        *h.stride(),
        **tile_arguments(q, second),
        TILE_ROWS=config.rows,
        TILE_COLUMNS=config.columns,
        ACTIVATION=nonlinearity_of(activation),
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )


def _block_amax(h: Tensor, activation: Activation, q: QTensor, config: TileConfig) -> Tensor:
    """Largest magnitude of each scale block of act(h), as the int32 bits of its float32."""
    shape = (q.shape[0], q.shape[1])
    bits = torch.zeros(q.format.scale_shape(shape), dtype=torch.int32, device=h.device)
    _activation_amax_kernel[(num_tiles(*shape, config),)](
        h,
        blocks_of(bits),
        *shape,
        *h.stride(),
        TILE_ROWS=config.rows,
        TILE_COLUMNS=config.columns,
        ENCODING=encoding_of(q),
        ACTIVATION=nonlinearity_of(activation),
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return bits.view(torch.float32)
