"""What every quantising kernel does to a block: its largest magnitude, its scale, its bytes.

Bit for bit what `octomoe.reference.quantize` says. Magnitudes are compared as the bits of their
float32, sign cleared: as integers they are ordered like the numbers, with Inf above all of these
and NaN above Inf, so that a maximum never loses a NaN.
"""

from struct import pack, unpack
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from octomoe.core.formats import E5M2, Format, Rounding
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.kernels.stochastic_rounding import _round_stochastically

# Bits of float32: Inf, a NaN, the mantissa, and 2^-127, the one E8M0 value that is subnormal.
_INF = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_MANTISSA = tl.constexpr(0x7FFFFF)
_TINIEST = tl.constexpr(0x00400000)


class Encoding(NamedTuple):
    """A format and a layout as compile-time values; blocks of 0 span their axis."""

    BLOCK_EXPERTS: int
    BLOCK_ROWS: int
    BLOCK_COLUMNS: int
    IS_INTERLEAVED: bool
    TARGET: float
    TARGET_EXPONENT: int
    TARGET_MANTISSA: int
    LIMIT: float
    IS_POW2: bool
    IS_E8M0: bool
    IS_E5M2: bool
    HAS_NAN: bool


def format_encoding(format: Format, layout: ScaleLayout = COMPACT) -> Encoding:
    """How to encode in a format."""
    experts, rows, columns = (max(size, 0) for size in format.block)
    (target_bits,) = unpack("<i", pack("<f", format.target_max))
    return Encoding(
        experts,
        rows,
        columns,
        IS_INTERLEAVED=layout == ScaleLayout.INTERLEAVED,
        TARGET=format.target_max,
        TARGET_EXPONENT=target_bits >> 23,
        TARGET_MANTISSA=target_bits & 0x7FFFFF,
        LIMIT=format.element.max,
        IS_POW2=format.rounding == Rounding.POW2,
        IS_E8M0=format.scale_dtype == torch.float8_e8m0fnu,
        IS_E5M2=format.element is E5M2,
        HAS_NAN=format.element.has_nan,
    )


@triton.jit
def _magnitude_bits(x):
    """Bits of |x| as int32, ordered like the magnitudes, NaN last."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of_amax(amax_bits, ENCODING: tl.constexpr):
    """The scale for the largest magnitude of a block, as float32: NaN for NaN and Inf."""
    if ENCODING.IS_POW2:
        exponent = (amax_bits >> 23) - ENCODING.TARGET_EXPONENT + 127
        exponent += ((amax_bits & _MANTISSA) > ENCODING.TARGET_MANTISSA).to(tl.int32)
        if ENCODING.IS_E8M0:
            bits = tl.where(exponent <= 0, _TINIEST, exponent << 23)
        else:
            bits = tl.maximum(exponent, 1) << 23
    else:
        # div_rn: `/` would be off by an ulp.
        exact = tl.div_rn(amax_bits.to(tl.float32, bitcast=True), ENCODING.TARGET)
        bits = tl.maximum(exact.to(tl.int32, bitcast=True), 1 << 23)
    return tl.where(amax_bits >= _INF, _NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def _stored_scale(scale, IS_E8M0: tl.constexpr):
    """A float32 scale as it is stored: itself, or its E8M0 byte."""
    if IS_E8M0:
        bits = scale.to(tl.int32, bitcast=True)
        stored = tl.where(scale != scale, 0xFF, bits >> 23).to(tl.uint8)
    else:
        stored = scale
    return stored


@triton.jit
def _loaded_scale(stored, IS_E8M0: tl.constexpr):
    """The inverse of `_stored_scale`."""
    if IS_E8M0:
        byte = stored.to(tl.int32)
        bits = tl.where(byte == 0, _TINIEST, byte << 23)
        scale = tl.where(byte == 0xFF, _NAN, bits).to(tl.float32, bitcast=True)
    else:
        scale = stored
    return scale


@triton.jit
def _cast(scaled, random, LIMIT: tl.constexpr, IS_E5M2: tl.constexpr, MAY_BE_NAN: tl.constexpr):
    """float32 to 8-bit floats: to nearest, or by random bits if there are any."""
    if random is not None:
        code = _round_stochastically(scaled, random, LIMIT, IS_E5M2)
        if MAY_BE_NAN:
            code = tl.where(scaled != scaled, 0x7F, code).to(tl.uint8)
        if IS_E5M2:
            stored = code.to(tl.float8e5, bitcast=True)
        else:
            stored = code.to(tl.float8e4nv, bitcast=True)
    elif IS_E5M2:
        stored = scaled.to(tl.float8e5)
    else:
        stored = scaled.to(tl.float8e4nv)
    return stored


@triton.jit
def _encode_own(x, scale, ENCODING: tl.constexpr, random=None):
    """8-bit floats of x under the scale of its own block, which broadcasts to it.

    Rounded to nearest nothing saturates; rounded by random bits, what exceeds the limit by an ulp
    does. A block with a NaN or an Inf has a scale of NaN.
    """
    if ENCODING.IS_POW2:
        # 2^-n for 2^n: a division costs ten times as much.
        bits = scale.to(tl.int32, bitcast=True)
        # The reciprocal of 2^127 is the tiniest scale, and the other way round.
        inverse = tl.maximum((254 << 23) - bits, _TINIEST)
        bits = tl.where(bits == _TINIEST, 254 << 23, inverse)
        reciprocal = bits.to(tl.float32, bitcast=True)
    else:
        reciprocal = tl.div_rn(1.0, scale)
    scaled = tl.where(scale != scale, 0.0, x.to(tl.float32) * reciprocal)
    # Under a power of two nothing exceeds it.
    LIMIT: tl.constexpr = None if ENCODING.IS_POW2 else ENCODING.LIMIT
    return _cast(scaled, random, LIMIT, ENCODING.IS_E5M2, False)


@triton.jit
def _encode(x, scale, ENCODING: tl.constexpr, random=None):
    """8-bit floats of x under a scale that broadcasts to it."""
    x = x.to(tl.float32)
    reciprocal = tl.div_rn(1.0, scale)
    scaled = x * reciprocal
    # A given scale of zero or Inf makes no NaN; only the input's own are stored.
    scaled = tl.where(scaled != scaled, 0.0, scaled)
    scaled = tl.minimum(tl.maximum(scaled, -ENCODING.LIMIT), ENCODING.LIMIT)
    if ENCODING.HAS_NAN:
        scaled = tl.where(x != x, float("nan"), scaled)
    scaled = tl.where(reciprocal != reciprocal, 0.0, scaled)
    return _cast(scaled, random, None, ENCODING.IS_E5M2, ENCODING.HAS_NAN)
