"""A stored matrix against the one it was made from."""

from dataclasses import dataclass
from math import inf, isfinite, log10
from typing import Final

import torch
from torch import Tensor

from octomoe.checkpoint.reader import Weight
from octomoe.core.qtensor import QTensor, decode, expand_scale

# Below this a matrix was not merely quantised: any E4M3 data under scales that fit it has 31 to
# 32 dB, quantised twice under unrelated scales 28.5 dB; averaged scales leave 5 to 20 dB.
NOISE_FLOOR_DB: Final = 27.0
# Elements compared at once: their float32 values fit in a core's cache.
_PART: Final = 1 << 17
# Sums of squares whose terms neither overflow in float32 nor, where they count, underflow.
_SQUARES: Final = (1e-20, 1e30)
_LARGEST_240: Final = 0x77


@dataclass(frozen=True)
class WeightCheck:
    """What was found of one matrix.

    Attributes:
        problems: one clause each.
        sqnr_db: infinite where the values are equal.
        scale_min, scale_max: of its scales; 1 if it is not quantised.
        is_quantized: whether it is.
    """

    problems: tuple[str, ...]
    sqnr_db: float
    scale_min: float
    scale_max: float
    is_quantized: bool


def check_weight(made: Weight, source: Weight, is_240_limited: bool) -> WeightCheck:
    """Compare matrices ``[out, in]``; `made` may be padded with zeros at its ends."""
    problems: list[str] = []
    rows, columns = source.shape
    if any(ours < theirs for ours, theirs in zip(made.shape, source.shape, strict=True)):
        shapes = f"has shape {tuple(made.shape)}, the source {tuple(source.shape)}"
        return WeightCheck((shapes,), -inf, 1.0, 1.0, isinstance(made, QTensor))
    if isinstance(made, Tensor):
        values = source if isinstance(source, Tensor) else source.dequantize(made.dtype)
        is_equal = torch.equal(made[:rows, :columns], values.to(made.dtype))
        found = () if is_equal else ("is not quantised and differs from the source",)
        return WeightCheck(found, inf if is_equal else -inf, 1.0, 1.0, False)
    scale = made.compact_scale.to(torch.float32)
    low, high = scale.aminmax() if scale.numel() else (scale.new_ones(()),) * 2
    if not (low > 0 and high < inf):
        problems.append(f"scales reach from {low.item():g} to {high.item():g}")
    magnitudes = made.data.view(torch.uint8) & 0x7F
    largest = int(magnitudes.max()) if magnitudes.numel() else 0
    if largest == 0x7F:
        problems.append("holds NaN bytes")
    elif is_240_limited and largest > _LARGEST_240:
        problems.append("holds bytes above 240, which Neuron reads as NaN")
    if magnitudes[rows:].any() or magnitudes[:, columns:].any():
        problems.append("has padding that is not zero")
    sqnr_db = _sqnr_db(made, source)
    if not sqnr_db >= NOISE_FLOOR_DB:
        problems.append(f"SQNR {sqnr_db:.1f} dB, below {NOISE_FLOOR_DB:g} dB")
    return WeightCheck(tuple(problems), sqnr_db, low.item(), high.item(), True)


def _sqnr_db(made: QTensor, source: Weight) -> float:
    """Signal to noise in dB; minus infinite if any value is no number."""
    signal, noise = _powers(made, source, torch.float32)
    if not (_SQUARES[0] < signal < _SQUARES[1] and noise < _SQUARES[1]):
        signal, noise = _powers(made, source, torch.float64)
    if noise == 0.0:
        return inf
    if not isfinite(noise) or signal == 0.0:
        return -inf
    return 10.0 * log10(signal / noise)


def _powers(made: QTensor, source: Weight, dtype: torch.dtype) -> tuple[float, float]:
    """Sums of squares of the source's values and of the errors, a few rows at a time."""
    rows, columns = source.shape
    step = max(_PART // max(columns, 1), 1)
    data = made.data[:rows, :columns]
    scale = expand_scale(made.compact_scale, made.format, tuple(made.shape))
    scale = scale[: rows if scale.shape[0] > 1 else 1, : columns if scale.shape[1] > 1 else 1]
    plain = source if isinstance(source, Tensor) else source.dequantize()
    signal = noise = 0.0
    for first in range(0, rows, step):
        part = slice(first, first + step)
        x = plain[part].to(dtype)
        y = decode(data[part]).to(dtype)
        y.mul_(scale[part] if scale.shape[0] > 1 else scale).sub_(x)
        signal += x.square().sum().item()
        noise += y.square().sum().item()
    return signal, noise
