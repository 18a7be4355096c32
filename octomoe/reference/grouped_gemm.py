"""Grouped GEMM: each expert multiplies its own rows; float32 throughout.

    forward  y[s] = x[s] @ w[e].T + bias[e]     for the slots s of expert e
    dgrad    dx[s] = dy[s] @ w[e]
    wgrad    dw[e] = sum over s of dy[s] outer x[s]; exactly zero for an expert without slots

Slots past the last offset read as zero in every result.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing


def grouped_gemm(
    x: Tensor | QTensor,
    w: Tensor | QTensor,
    routing_or_offsets: Routing | Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``[S, K] x [E, N, K] -> [S, N]``; see `octomoe.grouped_gemm`."""
    x_SK = _values(x)
    y_SN = x_SK.new_zeros((x_SK.shape[0], w.shape[1]))
    for e, start, end in _groups(routing_or_offsets):
        y_SN[start:end] = x_SK[start:end] @ _expert_values(w, e).T
        if bias is not None:
            y_SN[start:end] += bias[e].to(torch.float32)
    return y_SN.to(out_dtype)


def grouped_gemm_dgrad(
    dy: Tensor | QTensor,
    w: Tensor | QTensor,
    routing_or_offsets: Routing | Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``[S, N] x [E, N, K] -> [S, K]``; see `octomoe.grouped_gemm_dgrad`."""
    dy_SN = _values(dy)
    dx_SK = dy_SN.new_zeros((dy_SN.shape[0], w.shape[2]))
    for e, start, end in _groups(routing_or_offsets):
        dx_SK[start:end] = dy_SN[start:end] @ _expert_values(w, e)
    return dx_SK.to(out_dtype)


def grouped_gemm_wgrad(
    dy: Tensor | QTensor,
    x: Tensor | QTensor,
    routing_or_offsets: Routing | Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``[S, N] x [S, K] -> [E, N, K]``; see `octomoe.grouped_gemm_wgrad`."""
    dy_SN, x_SK = _values(dy), _values(x)
    num_experts = _offsets(routing_or_offsets).shape[0] - 1
    dw_ENK = x_SK.new_zeros((num_experts, dy_SN.shape[1], x_SK.shape[1]))
    for e, start, end in _groups(routing_or_offsets):
        dw_ENK[e] = dy_SN[start:end].T @ x_SK[start:end]
    return dw_ENK.to(out_dtype)


def _offsets(routing_or_offsets: Routing | Tensor) -> Tensor:
    if isinstance(routing_or_offsets, Routing):
        return routing_or_offsets.expert_offsets
    return routing_or_offsets


def _groups(routing_or_offsets: Routing | Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first slot, end slot) of every expert that has slots."""
    offsets = _offsets(routing_or_offsets).tolist()
    for e, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            yield e, start, end


def _values(x: Tensor | QTensor) -> Tensor:
    return x.dequantize() if isinstance(x, QTensor) else x.to(torch.float32)


def _expert_values(w: Tensor | QTensor, e: int) -> Tensor:
    return w.expert(e).dequantize() if isinstance(w, QTensor) else w[e].to(torch.float32)
