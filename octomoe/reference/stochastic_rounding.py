"""Rounding to an 8-bit float at random: up with the probability of the distance from below.

    goes up  where  bits < distance * 2^32

with the distance in steps of the grid and 32 random bits for each element: exact for normal
numbers, to 2^-32 of a step for subnormal ones. A number on the grid stays.

Bits come from Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2,
3; 2011), whose key is the seed. A counter of 64 bits numbers groups of four neighbours in a row,
row after row; the last group of a row may be incomplete. So the bits of an element depend on its
place in the tensor alone.

Words of 32 bits are kept in int64, products of two of them wrap around.
"""

from typing import Final

import torch
from torch import Tensor

from octomoe.core.formats import Element

_WORD: Final = 0xFFFFFFFF
_ROUNDS: Final = 10
# Factors of the state and summands of the key.
_FACTORS: Final = (0xD2511F53, 0xCD9E8D57)
_SUMMANDS: Final = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox 4x32-10: four random words for four of a counter and two of a key."""
    word_0, word_1, word_2, word_3 = counter
    key_low, key_high = key
    for _ in range(_ROUNDS):
        product_0, product_2 = word_0 * _FACTORS[0], word_2 * _FACTORS[1]
        word_0 = ((product_2 >> 32) & _WORD) ^ word_1 ^ key_low
        word_1 = product_2 & _WORD
        word_2 = ((product_0 >> 32) & _WORD) ^ word_3 ^ key_high
        word_3 = product_0 & _WORD
        key_low, key_high = (key_low + _SUMMANDS[0]) & _WORD, (key_high + _SUMMANDS[1]) & _WORD
    return word_0, word_1, word_2, word_3


def random_bits(seed: Tensor, rows: range, num_columns: int) -> Tensor:
    """32 random bits, as int64, for each element of consecutive rows of `num_columns`.

    Args:
        seed: one int64.
        rows: of the tensor; those of an expert follow those of the one before.
        num_columns: of a row.
    """
    seed, num_groups = seed.reshape(()), -(-num_columns // 4)
    first, last = rows.start * num_groups, rows.stop * num_groups
    counter = torch.arange(first, last, device=seed.device)
    zero = torch.zeros_like(counter)
    words = philox(
        (counter & _WORD, counter >> 32, zero, zero), (seed & _WORD, (seed >> 32) & _WORD)
    )
    return torch.stack(words, dim=-1).view(len(rows), 4 * num_groups)[:, :num_columns]


def round_stochastically(x: Tensor, bits: Tensor, element: Element) -> Tensor:
    """Codes, as uint8, of float32 values that lie in the element's range, or are NaN."""
    mantissa_bits, first = (2, 113) if element.dtype == torch.float8_e5m2 else (3, 121)
    x_bits = x.view(torch.int32).to(torch.int64)
    magnitude = x_bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | 0x800000
    # Steps of the grid in fixed point, with 32 bits of a fraction; below the least normal number,
    # whose exponent is `first`, steps become no smaller.
    steps = (significand << (9 + mantissa_bits)) >> (first - exponent).clamp(0, 63)
    code = ((exponent - first).clamp_min(0) << mantissa_bits) + (steps >> 32)
    code = code + (bits < (steps & _WORD))
    code = torch.where(x.isnan(), 0x7F, code | ((x_bits >> 24) & 0x80))
    return code.to(torch.uint8)
