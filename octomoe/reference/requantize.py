"""Requantise: the values of one format, quantised to another."""

from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.reference.quantize import quantize


def requantize(q: QTensor, format: Format, *, layout: ScaleLayout = COMPACT) -> QTensor:
    """`q` in another format; see `octomoe.requantize`."""
    return quantize(q.dequantize(), format, layout=layout)
