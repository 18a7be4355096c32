"""How values cross a torch.library schema: as plain tensors and the names of format and layout."""

from typing import NamedTuple

from torch import Tensor

from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor


class Parts(NamedTuple):
    """A tensor or QTensor taken apart; an unquantised tensor has no scale and no format name."""

    data: Tensor
    scale: Tensor | None
    format: str
    layout: str


def take_apart(x: Tensor | QTensor) -> Parts:
    """The parts of `x` that a schema can carry."""
    if isinstance(x, QTensor):
        return Parts(x.data, x.scale, x.format.name, str(x.layout))
    return Parts(x, None, "", str(COMPACT))


def put_together(data: Tensor, scale: Tensor | None, format: str, layout: str) -> Tensor | QTensor:
    """The inverse of `take_apart`."""
    if scale is None:
        return data
    return QTensor(data, scale, Format.parse(format), ScaleLayout(layout))


def format_of(x: Tensor | QTensor) -> Format | None:
    """The format of a QTensor, None for an unquantised tensor."""
    return x.format if isinstance(x, QTensor) else None
