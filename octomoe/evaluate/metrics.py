"""Numbers that say how far a quantised value, layer or model is from the original."""

from dataclasses import dataclass
from math import inf, log10

from torch import Tensor

from octomoe.core.qtensor import QTensor, expand_scale


@dataclass(frozen=True)
class WeightQuality:
    """How well one quantised weight of a layer keeps the original; one entry per expert.

    Attributes:
        layer: name of the experts module.
        weight: ``"w13"`` or ``"w2"``.
        sqnr_db: signal to quantisation noise ratio in dB.
        saturated: fraction of elements whose magnitude exceeded the largest the scale can express.
        flushed: fraction of elements that were not zero and became zero.
        scale_min, scale_median, scale_max: over the scales that apply to the expert.
    """

    layer: str
    weight: str
    sqnr_db: list[float]
    saturated: list[float]
    flushed: list[float]
    scale_min: list[float]
    scale_median: list[float]
    scale_max: list[float]


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """``10 log10(sum(reference^2) / sum((reference - value)^2))`` in dB, in float64.

    Infinite where both are equal; minus infinite where the value holds NaN or Inf.

    >>> import torch
    >>> round(sqnr_db(torch.ones(4), torch.full((4,), 0.9)), 3)
    20.0
    """
    reference = reference.double()
    noise = (reference - value.double()).square().sum().item()
    return ratio_db(reference.square().sum().item(), noise)


def ratio_db(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``: infinite without noise, minus infinite if it is not finite."""
    if noise == 0.0:
        return inf
    if not noise < inf or signal == 0.0:
        return -inf
    return 10.0 * log10(signal / noise)


def weight_quality(layer: str, weight: str, original_ERC: Tensor, q: QTensor) -> WeightQuality:
    """Compare a quantised weight ``[experts, rows, columns]`` with the original, per expert."""
    rows: dict[str, list[float]] = {
        name: [] for name in ("sqnr", "saturated", "flushed", "min", "median", "max")
    }
    for e in range(q.shape[0]):
        expert = q.expert(e)
        original_RC = original_ERC[e].float()
        scale = expand_scale(expert.compact_scale, expert.format, tuple(expert.shape))
        largest = expert.format.element.max * scale
        is_flushed = (original_RC != 0) & (expert.data.float() == 0)
        rows["sqnr"].append(sqnr_db(original_RC, expert.dequantize()))
        rows["saturated"].append((original_RC.abs() > largest * (1 + 2**-20)).float().mean().item())
        rows["flushed"].append(is_flushed.float().mean().item())
        scales = expert.compact_scale.float().flatten()
        rows["min"].append(scales.min().item())
        rows["median"].append(scales.median().item())
        rows["max"].append(scales.max().item())
    return WeightQuality(
        layer,
        weight,
        rows["sqnr"],
        rows["saturated"],
        rows["flushed"],
        rows["min"],
        rows["median"],
        rows["max"],
    )
