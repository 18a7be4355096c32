"""Quantise: ``scale = round(amax(block) / target_max)``, ``data = cast(x * (1 / scale))``.

All arithmetic is float32. The reciprocal is rounded once per block and multiplied, so that a kernel
needs one division per block; for power-of-two scales it is exact. The cast rounds to nearest, ties
to even, and saturates. With a seed it rounds up or down at random instead
(`octomoe.reference.stochastic_rounding`), and saturates all the same.

Values that are no numbers: a block with a NaN or an Inf gets a NaN scale (E8M0: byte 0xFF) and
zero data, so each of its values reads back as NaN. Under a given `amax` or `scale` an Inf
saturates like any value that is too large, and a NaN is stored as the element's NaN (byte 0x7F),
or in the scale where the element has none. An all-zero block gets the smallest scale.
"""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from octomoe.core.formats import ALL, Format, Rounding
from octomoe.core.layouts import COMPACT, ScaleLayout, pack
from octomoe.core.qtensor import QTensor, expand_scale
from octomoe.reference.stochastic_rounding import random_bits, round_stochastically

# Elements quantised at once on a CPU: their float32 values fit in a core's cache.
_PART: Final = 1 << 18
# The mantissa of a float32.
_MANTISSA: Final = 0x7FFFFF


def quantize(
    x: Tensor,
    format: Format,
    *,
    layout: ScaleLayout = COMPACT,
    amax: Tensor | None = None,
    scale: Tensor | None = None,
    seed: Tensor | None = None,
) -> QTensor:
    """Quantise ``[rows, columns]`` or ``[experts, rows, columns]``; see `octomoe.quantize`."""
    data = torch.empty(x.shape, dtype=format.element.dtype, device=x.device)
    scale_shape = format.scale_shape(tuple(x.shape))
    scale_out = torch.empty(scale_shape, dtype=format.scale_dtype, device=x.device)
    given_amax = None if amax is None else amax.expand(scale_shape)
    given_scale = None if scale is None else scale.expand(scale_shape)
    # One expert at a time where scales allow: temporaries stay small.
    one_by_one = x.dim() == 3 and format.block[0] == 1
    for index in range(x.shape[0]) if one_by_one else [...]:
        scale_out[index] = _scale(
            x[index],
            format,
            None if given_amax is None else given_amax[index],
            None if given_scale is None else given_scale[index],
        )
        if seed is None:
            is_own = amax is None and scale is None
            _encode(x[index], scale_out[index], format, data[index], is_own=is_own)
    if seed is not None:
        _encode_at_random(x, scale_out, format, data, seed)
    return QTensor(data, pack(scale_out, layout), format, layout)


def block_amax(x: Tensor, format: Format) -> Tensor:
    """Largest magnitude of each scale block, float32, NaN where the block holds one.

    Args:
        x: ``[rows, columns]`` or ``[experts, rows, columns]``.

    Returns:
        Shape ``format.scale_shape(x.shape)``; zero for blocks without elements.
    """
    if x.numel() == 0:
        return x.new_zeros(format.scale_shape(tuple(x.shape)), dtype=torch.float32)
    if x.dim() == 2 and x.device.type == "cpu" and x.numel() > _PART:
        step = _rows_per_part(x, format)
        parts = [_block_amax(x[i : i + step], format) for i in range(0, x.shape[0], step)]
        joined = torch.cat(parts)
        return joined.amax(0, keepdim=True) if format.block[1] == ALL else joined
    return _block_amax(x, format)


def _block_amax(x: Tensor, format: Format) -> Tensor:
    amax = x.abs()
    # Columns last: a CPU takes maxima over rows four times as fast as along them.
    for axis in range(-x.dim(), 0):
        size = format.block[axis]
        if size == ALL:
            amax = amax.amax(axis, keepdim=True)
        elif size > 1:
            before = [0, 0] * (-axis - 1)
            amax = pad(amax, [*before, 0, -amax.shape[axis] % size])
            amax = _split_axis(amax, axis, size)
            # Halving is four times as fast as reducing 32 columns at once.
            while axis == -1 and amax.shape[-1] % 2 == 0:
                amax = torch.maximum(*amax.chunk(2, dim=-1))
            amax = amax.amax(axis)
    return amax.to(torch.float32)


def scale_of(amax: Tensor, format: Format) -> Tensor:
    """The scale for a block of largest magnitude `amax`, in the format's scale dtype.

    A power-of-two scale is the exact ceiling of ``log2(amax / target_max)``, from the bits of both:
    the difference of the exponents, plus one if amax has the larger mantissa. (A quotient taken
    first would be rounded; among subnormal ones that can lose the step up.)
    """
    amax = amax.to(torch.float32)
    # Inf is treated as NaN: no scale makes it representable.
    amax = torch.where(torch.isfinite(amax), amax, torch.nan)
    # A tensor: CUDA divides by a Python number as if multiplying by its rounded reciprocal.
    target = torch.tensor(format.target_max, dtype=torch.float32, device=amax.device)
    if format.rounding == Rounding.EXACT:
        return (amax / target).clamp_min(format.min_scale)
    bits, target_bits = amax.view(torch.int32), target.view(torch.int32)
    # Subnormal magnitudes are far below the smallest scale times any target; their exponent of 0
    # ends up there whatever their mantissa.
    exponent = (bits >> 23) - (target_bits >> 23) + 127
    exponent = exponent + ((bits & _MANTISSA) > (target_bits & _MANTISSA))
    if format.scale_dtype == torch.float8_e8m0fnu:
        exponent = torch.where(amax.isnan(), 0xFF, exponent.clamp_min(0))
        return exponent.to(torch.uint8).view(torch.float8_e8m0fnu)
    power = (exponent.clamp_min(1) << 23).view(torch.float32)
    return torch.where(amax.isnan(), torch.nan, power)


def _split_axis(x: Tensor, axis: int, size: int) -> Tensor:
    """Split an axis, counted from the end, into blocks of `size`; they become axis `axis`."""
    at = x.dim() + axis
    return x.reshape(*x.shape[:at], -1, size, *x.shape[at + 1 :])


def _scale(x: Tensor, format: Format, amax: Tensor | None, scale: Tensor | None) -> Tensor:
    if amax is None and scale is None:
        return scale_of(block_amax(x, format), format)
    if scale is None:
        assert amax is not None
        scale = scale_of(amax, format)
    if format.element.has_nan:
        return scale
    # This element cannot say NaN, so the scale of the block must.
    has_nan = block_amax(x, format).isnan()
    return torch.where(has_nan, torch.nan, scale.to(torch.float32)).to(scale.dtype)


def _encode(x: Tensor, scale: Tensor, format: Format, out: Tensor, *, is_own: bool) -> None:
    reciprocal = 1.0 / scale.to(torch.float32)
    limit = format.element.max
    # Its own scale is a number only if all of a block are.
    has_numbers = x.numel() > 0 and (is_own or bool(x.abs().amax().isfinite()))
    if x.device.type == "cpu" and has_numbers and reciprocal.isfinite().all():
        for part, factor in _row_parts(x, reciprocal, format):
            out[part] = (x[part] * factor).clamp_(-limit, limit)
        return
    out.copy_(_scaled(x, expand_scale(reciprocal, format, tuple(x.shape)), format))


def _scaled(x: Tensor, factor: Tensor, format: Format) -> Tensor:
    """What is cast, in float32, of any values under any factors of their elements."""
    limit = format.element.max
    scaled = torch.clamp(x.to(torch.float32) * factor, -limit, limit)
    # NaN is stored for NaN only, in one pattern whatever its sign: a given scale of zero or Inf
    # makes none.
    scaled = torch.where(scaled.isnan(), 0.0, scaled)
    if format.element.has_nan:
        scaled = torch.where(x.isnan(), torch.nan, scaled)
    return torch.where(factor.isnan(), 0.0, scaled)


def _encode_at_random(
    x: Tensor, scale: Tensor, format: Format, out: Tensor, seed: Tensor, first_row: int = 0
) -> None:
    """Round stochastically; x starts at row `first_row` of a tensor, counted through experts."""
    num_rows, num_columns = x.shape[-2:]
    if x.dim() == 3:
        experts = format.block[0]
        for e in range(x.shape[0]):
            of_expert = scale[0 if experts == ALL else e // experts]
            _encode_at_random(x[e], of_expert, format, out[e], seed, first_row + e * num_rows)
        return
    for part, factor in _row_parts(x, 1.0 / scale.to(torch.float32), format):
        start, stop, _ = part.indices(num_rows)
        bits = random_bits(seed, range(first_row + start, first_row + stop), num_columns)
        scaled = _scaled(x[part], factor, format)
        out[part] = round_stochastically(scaled, bits, format.element).view(out.dtype)


def _rows_per_part(x: Tensor, format: Format) -> int:
    """Rows of a matrix whose float32 values fit in cache; whole scale blocks."""
    unit = max(format.block[1], 1)
    return unit * max(_PART // (unit * max(x.shape[1], 1)), 1)


def _row_parts(x: Tensor, factor: Tensor, format: Format) -> Iterator[tuple[Any, Tensor]]:
    """Runs of rows with the factors of their elements: float32 values of a run fit in cache."""
    rows = format.block[1]
    if x.dim() == 3:
        yield ..., expand_scale(factor, format, tuple(x.shape))
        return
    step = _rows_per_part(x, format)
    for first in range(0, x.shape[0], step):
        part = x[first : first + step]
        of_part = factor
        if rows != ALL:
            of_part = factor[first // rows : -(-(first + step) // rows)]
        yield slice(first, first + step), expand_scale(of_part, format, tuple(part.shape))
