"""Two formats of the same numbers: ``quantize(x, row_format), quantize(x, column_format)``."""

from torch import Tensor

from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.reference.quantize import quantize


def quantize_both(
    x: Tensor,
    row_format: Format,
    column_format: Format,
    *,
    row_layout: ScaleLayout = COMPACT,
    column_layout: ScaleLayout = COMPACT,
    seed: Tensor | None = None,
) -> tuple[QTensor, QTensor]:
    """Quantise twice; see `octomoe.quantize_both`."""
    return (
        quantize(x, row_format, layout=row_layout, seed=seed),
        quantize(x, column_format, layout=column_layout, seed=seed),
    )
