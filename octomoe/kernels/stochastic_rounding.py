"""Rounding to 8-bit floats up or down at random, bit for bit as `octomoe.reference` does it.

Four neighbours of a row share a counter, and so ten rounds of two products each.
"""

import triton
import triton.language as tl


@triton.jit
def _philox(seed, counter):
    """Philox 4x32-10: four words of random bits for each counter; seed and counter are int64."""
    key_low = seed.to(tl.uint32)
    key_high = (seed >> 32).to(tl.uint32)
    word_0 = counter.to(tl.uint32)
    word_1 = (counter >> 32).to(tl.uint32)
    word_2 = tl.zeros_like(word_0)
    word_3 = word_2
    for _ in tl.static_range(10):
        # 64 bits at once are one instruction; tl.philox takes two, for either half.
        product_0 = word_0.to(tl.uint64) * 0xD2511F53
        product_2 = word_2.to(tl.uint64) * 0xCD9E8D57
        word_0 = (product_2 >> 32).to(tl.uint32) ^ word_1 ^ key_low
        word_1 = product_2.to(tl.uint32)
        word_2 = (product_0 >> 32).to(tl.uint32) ^ word_3 ^ key_high
        word_3 = product_0.to(tl.uint32)
        key_low += 0x9E3779B9
        key_high += 0xBB67AE85
    return word_0, word_1, word_2, word_3


@triton.jit
def _random_bits(x, seed_ptr, first_row, first_column, num_columns, IS_GROUPED: tl.constexpr):
    """32 random bits for each element of the tile x, of a matrix of `num_columns`.

    `first_row` counts on from expert to expert. `IS_GROUPED`: 4 divides `first_column`.
    """
    TILE_COLUMNS: tl.constexpr = x.shape[1]
    seed = tl.load(seed_ptr)
    row = first_row + tl.arange(0, x.shape[0]).to(tl.int64)
    counter = row[:, None] * tl.cdiv(num_columns, 4)
    if IS_GROUPED and TILE_COLUMNS % 4 == 0:
        counter += (first_column // 4 + tl.arange(0, TILE_COLUMNS // 4))[None, :]
        # Zero, but made of x: so each thread draws bits for the elements that it holds. Otherwise
        # the bits change threads in shared memory, with 32 barriers per tile (SASS of sm90).
        magnitudes = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        groups = tl.reshape(magnitudes, [x.shape[0], TILE_COLUMNS // 4, 4])
        counter += tl.max(groups, axis=2) >> 31
        word_0, word_1, word_2, word_3 = _philox(seed, counter)
        groups = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
        bits = tl.reshape(groups, x.shape)
    else:
        column = (first_column + tl.arange(0, TILE_COLUMNS))[None, :]
        word_0, word_1, word_2, word_3 = _philox(seed, counter + column // 4)
        even = tl.where(column % 4 == 0, word_0, word_2)
        odd = tl.where(column % 4 == 1, word_1, word_3)
        bits = tl.where(column % 2 == 0, even, odd)
    return bits


@triton.jit
def _round_stochastically(scaled, random, LIMIT: tl.constexpr, IS_E5M2: tl.constexpr):
    """Bytes of 8-bit floats of numbers: up with the probability of the distance from below.

    Without a limit, none is too large.
    """
    MANTISSA_BITS: tl.constexpr = 2 if IS_E5M2 else 3
    # float32's biased exponent of the least normal number.
    FIRST: tl.constexpr = 113 if IS_E5M2 else 121
    magnitude = tl.abs(scaled)
    if LIMIT is not None:
        magnitude = tl.minimum(magnitude, LIMIT)
    magnitude = magnitude.to(tl.int32, bitcast=True)
    significand = (magnitude & 0x7FFFFF) | 0x800000
    # What is shifted by 63 is zero, whatever it was.
    exponent = tl.maximum(magnitude >> 23, FIRST - 63) - FIRST
    below = tl.maximum(-exponent, 0)
    # Steps of the grid in fixed point, with 32 bits of a fraction.
    steps = (significand.to(tl.uint64) << (9 + MANTISSA_BITS)) >> below.to(tl.uint64)
    goes_up = random < steps.to(tl.uint32)
    code = ((exponent + below) << MANTISSA_BITS) + (steps >> 32).to(tl.int32)
    code += goes_up.to(tl.int32)
    sign = (scaled.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)
