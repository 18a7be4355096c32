"""One matrix into a target's format: quantised, or kept, or re-laid where nothing is lost.

A quantised source is never quantised twice without being asked. Its bytes stay where the target's
scale blocks lie within the source's; otherwise its values are moved to new scales, which loses
nothing but subnormals if all scales are powers of two, and 3 dB if they are not.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

from octomoe.checkpoint.reader import Weight
from octomoe.core.formats import ALL, E4M3_240, E4M3FN, Format, Rounding
from octomoe.core.qtensor import QTensor
from octomoe.ops.quantize import quantize

# Scales tried by `search`, as multiples of the largest magnitude's. A floating-point grid repeats
# when its scale doubles, so one octave holds all that does not saturate; below one, the largest
# values saturate.
_SEARCH: Final = tuple(2.0 ** (k / 12) for k in range(-6, 12))
_MANTISSA: Final = 0x7FFFFF


class How(StrEnum):
    """What became of a weight."""

    QUANTIZED = "quantized"  # from an unquantised source
    KEPT = "kept"  # the source's bytes
    HALVED = "halved"  # E4M3FN bytes halved for a 240-limited reader
    RELAID = "relaid"  # the source's values, under other power-of-two scales
    REQUANTIZED = "requantized"  # quantised twice


@dataclass(frozen=True)
class Numerics:
    """How numbers are made.

    Attributes:
        format: for unquantised sources.
        relay_format: for quantised ones that cannot keep their bytes.
        search: whether to search each scale for the least squared error.
        device: where to compute.
    """

    format: Format
    relay_format: Format
    search: bool
    device: torch.device


@dataclass(frozen=True)
class Encoded:
    """A matrix in the target's format.

    Attributes:
        q: its value.
        how: what became of it.
        num_changed: values that differ from the quantised source's; 0 for `How.QUANTIZED`.
    """

    q: QTensor
    how: How
    num_changed: int = 0


def encode(weight: Weight, numerics: Numerics, scale: Tensor | None = None) -> Encoded:
    """Bring ``[out, in]`` to the target's format.

    Args:
        weight: unquantised, or quantised in any format.
        numerics: see there.
        scale: use this scale instead of the matrix's own.
    """
    if isinstance(weight, Tensor):
        x = weight.to(numerics.device)
        if scale is None and numerics.search:
            scale = search_scale(x, numerics.format)
        q = quantize(x, numerics.format, scale=None if scale is None else scale.to(x.device))
        return Encoded(q.to("cpu"), How.QUANTIZED)
    shape, is_rescaled = tuple(weight.shape), scale is not None
    fate = foresee(weight.format, weight.scale, shape, numerics, is_rescaled=is_rescaled)
    if fate in (How.KEPT, How.HALVED):
        return _keep(weight, numerics.format)
    values = weight.dequantize()
    q = quantize(values, numerics.relay_format, scale=scale)
    q = QTensor(q.data, q.scale, numerics.format)
    return Encoded(q, fate, int((q.dequantize() != values).sum()))


def foresee(
    source: Format,
    scale: Tensor,
    shape: tuple[int, ...],
    numerics: Numerics,
    *,
    is_rescaled: bool = False,
) -> How:
    """What `encode` does with a quantised matrix, from its scale alone.

    Args:
        source: the matrix's format.
        scale: its scale.
        shape: its shape ``(out, in)``.
        numerics: see there.
        is_rescaled: whether it must take another scale than its own.
    """
    format, has_pow2 = numerics.format, has_pow2_scales(scale)
    is_expressible = format.scale_dtype == torch.float32 or has_pow2
    if not is_rescaled and is_expressible and _is_nested(source, format, shape):
        if (source.element, format.element) == (E4M3FN, E4M3_240):
            return How.HALVED
        return How.KEPT
    is_pow2 = has_pow2 and numerics.relay_format.rounding == Rounding.POW2
    return How.RELAID if is_pow2 else How.REQUANTIZED


def has_pow2_scales(scale: Tensor) -> bool:
    """Whether every scale is a power of two."""
    if scale.dtype == torch.float8_e8m0fnu:
        return True
    return bool(((scale.to(torch.float32).view(torch.int32) & _MANTISSA) == 0).all())


def search_scale(x: Tensor, format: Format) -> Tensor:
    """The scale of each block, of the candidates `_SEARCH`, with the least squared error."""
    own = quantize(x, format).scale
    wide, best_scale = x.to(torch.float32), own.to(torch.float32)
    best_error = torch.full_like(best_scale, torch.inf)
    for factor in _SEARCH:
        if format.rounding == Rounding.POW2 and factor not in (0.5, 1.0):
            continue
        candidate = (own.to(torch.float32) * factor).clamp_min(format.min_scale)
        q = quantize(x, format, scale=candidate.to(format.scale_dtype))
        error = _block_sums(q.dequantize().sub_(wide).square_(), format)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, candidate, best_scale)
    # A block with a NaN has no better scale: it keeps its own, which says so.
    return torch.where(own.to(torch.float32).isnan(), own.to(torch.float32), best_scale).to(
        format.scale_dtype
    )


def _block_sums(x: Tensor, format: Format) -> Tensor:
    for axis, size in zip((-2, -1), format.block[1:], strict=True):
        if size == ALL:
            x = x.sum(axis, keepdim=True)
        elif size > 1:
            before = [0, 0] * (-axis - 1)
            x = torch.nn.functional.pad(x, [*before, 0, -x.shape[axis] % size])
            at = x.dim() + axis
            x = x.reshape(*x.shape[:at], -1, size, *x.shape[at + 1 :]).sum(axis)
    return x


def _is_nested(source: Format, format: Format, shape: tuple[int, ...]) -> bool:
    """Whether each of the format's scale blocks lies within one of the source's."""
    return all(
        ours == ALL or size <= ours or (theirs != ALL and ours % theirs == 0)
        for ours, theirs, size in zip(source.block[1:], format.block[1:], shape, strict=True)
    )


def _keep(weight: QTensor, format: Format) -> Encoded:
    """The same bytes under finer blocks; halved where the format's range asks for it."""
    scale = weight.scale.to(torch.float32)
    for axis, (ours, theirs) in enumerate(
        zip(weight.format.block[1:], format.block[1:], strict=True)
    ):
        count = format.scale_shape(tuple(weight.shape))[axis]
        step = 1 if theirs == ALL else theirs
        block = weight.shape[axis] if ours == ALL else ours
        index = torch.arange(count) * step // max(block, 1)
        scale = scale.index_select(axis, index)
    data, how, changed = weight.data, How.KEPT, 0
    if (weight.format.element, format.element) == (E4M3FN, E4M3_240):
        whole = data.to(torch.float32)
        data, how, scale = (whole * 0.5).to(data.dtype), How.HALVED, scale * 2.0
        changed = int((data.to(torch.float32) * 2.0 != whole).sum())
    q = QTensor(data.contiguous(), scale.to(format.scale_dtype).contiguous(), format)
    return Encoded(q, how, changed)


def encode_pair(gate: Weight, up: Weight, numerics: Numerics) -> tuple[Encoded, Encoded]:
    """Gate and up under one scale, the larger of both, where the source leaves the choice."""
    first, second = encode(gate, numerics), encode(up, numerics)
    if How.KEPT in (first.how, second.how) or How.HALVED in (first.how, second.how):
        return first, second
    scale = torch.maximum(first.q.scale.to(torch.float32), second.q.scale.to(torch.float32))
    scale = scale.to(numerics.format.scale_dtype)
    return encode(gate, numerics, scale), encode(up, numerics, scale)


def values_of(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as plain numbers of `dtype`."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)
