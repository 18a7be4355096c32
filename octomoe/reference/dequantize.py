"""Dequantise: ``value = data * scale``, in float32, rounded once to the wanted type."""

import torch
from torch import Tensor

from octomoe.core.qtensor import QTensor


def dequantize(q: QTensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of `q`, same shape; see `octomoe.dequantize`."""
    return q.dequantize(dtype)
