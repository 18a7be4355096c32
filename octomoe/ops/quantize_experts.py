"""Quantise the experts of a layer."""

from dataclasses import replace

from torch import Tensor

from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import ALL, Format
from octomoe.core.qtensor import QTensor
from octomoe.errors import refusal
from octomoe.ops.check import check_format
from octomoe.ops.quantize import quantize


def quantize_experts(
    experts: ExpertWeights, format: Format, *, backend: str = "auto"
) -> ExpertWeights:
    """The same experts with both weights in `format`.

    Where scale blocks cover several rows, F is first rounded up to the block by zeros, so that no
    block holds gate and up rows at once, as in a checkpoint that stores them apart.

    Args:
        experts: unquantised experts.
        format: what to store; each expert and projection is quantised on its own unless the block
            spans the experts.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Raises:
        TypeError: format is no Format.
        ValueError: the experts are quantised already.
        NotImplementedError: the backend cannot run this.

    >>> import torch
    >>> from octomoe import FP8_BLOCK128
    >>> experts = ExpertWeights(w13=torch.randn(2, 2 * 96, 64), w2=torch.randn(2, 64, 96))
    >>> quantize_experts(experts, FP8_BLOCK128).intermediate_size
    128
    """
    check_format("quantize_experts", "format", format)
    for name, weight in (("w13", experts.w13), ("w2", experts.w2)):
        if isinstance(weight, QTensor):
            do = "use octomoe.requantize on its weights"
            needs = "unquantised weights"
            raise ValueError(
                refusal("quantize_experts", name, f"is {weight.format.name}", needs, do)
            )
    experts = fit_width(experts, format)
    assert isinstance(experts.w13, Tensor)
    assert isinstance(experts.w2, Tensor)
    return replace(
        experts,
        w13=quantize(experts.w13, format, backend=backend),
        w2=quantize(experts.w2, format, backend=backend),
    )


def fit_width(experts: ExpertWeights, format: Format) -> ExpertWeights:
    """Unquantised experts with F rounded up, by zeros, so that `format` keeps gate and up apart."""
    rows = format.block[1]
    return experts if rows in (1, ALL) or not experts.activation.gated else experts.pad_width(rows)
