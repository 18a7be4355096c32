"""Quantise in two formats: ``quantize(x, row_format), quantize(x, column_format)``.

Bound by bytes: x is read once, data and scales of both are written once. Where scale blocks of
both fit into one tile, the tile kernel of `quantize` writes both; otherwise that launcher runs
twice, and x is read twice.
"""

from torch import Tensor

from octomoe.core.device import num_sms
from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.kernels.encoding import empty_quantized, share_tile
from octomoe.kernels.quantize import quantize, quantize_tiles
from octomoe.tune.configs import TileConfig
from octomoe.tune.lookup import quantize_both_config


def quantize_both(
    x: Tensor,
    row_format: Format,
    column_format: Format,
    *,
    row_layout: ScaleLayout = COMPACT,
    column_layout: ScaleLayout = COMPACT,
    seed: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[QTensor, QTensor]:
    """Two values of ``[rows, columns]`` or ``[experts, rows, columns]``.

    See `octomoe.quantize_both`.
    """
    shape, formats = tuple(x.shape), (row_format, column_format)
    config = config or quantize_both_config(
        shape, *formats, is_seeded=seed is not None, sms=num_sms(x.device)
    )
    if config is None or not share_tile(formats, config, shape):
        return (
            quantize(x, row_format, layout=row_layout, seed=seed),
            quantize(x, column_format, layout=column_layout, seed=seed),
        )
    rows = empty_quantized(shape, row_format, row_layout, x.device)
    columns = empty_quantized(shape, column_format, column_layout, x.device)
    quantize_tiles(x, rows, columns, seed, config)
    return rows, columns
