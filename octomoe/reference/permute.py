"""Permute: row s of the result is row ``token_of_slot[s]`` of x, payload and scales together."""

import torch
from torch import Tensor

from octomoe.core.formats import ALL
from octomoe.core.layouts import ScaleLayout, pack
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing


def permute(
    x: Tensor | QTensor, routing: Routing, *, layout: ScaleLayout | None = None
) -> Tensor | QTensor:
    """Rows ``[T, D]`` in the order of the slots, ``[S, D]``; see `octomoe.permute`."""
    token_S = routing.token_of_slot_S.long()
    if isinstance(x, Tensor):
        return _take_rows(x, token_S)
    data = _take_rows(x.data, token_S)
    if x.format.block[-2] == ALL:
        return QTensor(data, x.scale, x.format, x.layout)
    scale = _take_rows(x.compact_scale, token_S)
    # Rows of no token read as a quantised row of zeros would.
    is_padding_S1 = (token_S < 0).unsqueeze(1)
    smallest = torch.tensor(x.format.min_scale, device=x.device).to(scale.dtype)
    scale = torch.where(is_padding_S1, _as_bytes(smallest), _as_bytes(scale)).view(scale.dtype)
    layout = x.layout if layout is None else layout
    return QTensor(data, pack(scale, layout), x.format, layout)


def _take_rows(x_TD: Tensor, token_S: Tensor) -> Tensor:
    """Rows of x by token, zero bytes where the token is -1."""
    bytes_TD = _as_bytes(x_TD)
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros((token_S.shape[0], x_TD.shape[1]))
    rows_SD = bytes_TD[token_S.clamp_min(0)]
    zero = torch.zeros((), dtype=rows_SD.dtype, device=rows_SD.device)
    return torch.where((token_S < 0).unsqueeze(1), zero, rows_SD).view(x_TD.dtype)


def _as_bytes(x: Tensor) -> Tensor:
    """One-byte floats as uint8, which every torch indexing operation takes; others as they are."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
