"""Stochastic rounding is the definition: known random bits, the right neighbour, no bias.

Claimed: Philox gives its authors' answers; an element's bits depend on its place alone; a number
goes up where its bits are below its distance from the neighbour below; what is representable, too
large or no number is as under rounding to nearest.
"""

import math

import pytest
import torch

from octomoe.core.formats import (
    E4M3_240,
    E4M3FN,
    E5M2,
    FP8_COLUMN128,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    MXFP8,
    MXFP8_E5M2,
    Format,
)
from octomoe.reference.quantize import quantize
from octomoe.reference.stochastic_rounding import philox, random_bits, round_stochastically

SEED = torch.tensor(-0x123456789ABCDEF0)
# Of the authors' reference implementation (Random123, kat_vectors): counter, key, answer.
ONES = 0xFFFFFFFF
KNOWN_ANSWERS = {
    "zeros": (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    "ones": (
        (ONES, ONES, ONES, ONES),
        (ONES, ONES),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
FORMATS = (
    FP8_TENSOR,
    FP8_EXPERT,
    FP8_ROW,
    FP8_GROUP128,
    FP8_GROUP128.derive(rounding="pow2"),
    FP8_GROUP128.derive(element=E4M3_240),
    FP8_COLUMN128,
    MXFP8,
    MXFP8_E5M2,
    Format.parse("fp8[2,3,5]"),
)
EACH_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
EACH_ELEMENT = pytest.mark.parametrize("element", [E4M3FN, E5M2, E4M3_240], ids=lambda e: e.name)


def make_inputs(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.exp2((4 * torch.randn(shape, generator=generator)).round())


def grid(element):
    """What the bytes from 0 up to the largest storable number mean, in float64, ascending."""
    values = torch.arange(128, dtype=torch.uint8).view(element.dtype).double()
    return values[values <= element.max]


def bytes_of(x):
    return x.view(torch.uint8)


@pytest.mark.parametrize("case", KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_philox_gives_known_answers(case, device):
    counter, key, answer = (
        tuple(torch.tensor(word, device=device) for word in words) for words in case
    )
    assert philox(counter, key) == answer


@pytest.mark.parametrize("num_columns", [1, 2, 4, 7, 64])
def test_bits_depend_on_the_place_alone(num_columns):
    bits = random_bits(SEED, range(40), num_columns)
    assert bits.shape == (40, num_columns)
    assert torch.equal(random_bits(SEED, range(13, 29), num_columns), bits[13:29])
    assert bits.unique().numel() == bits.numel()


def test_bits_do_not_repeat_after_any_32_of_them():
    high = [
        random_bits(SEED + offset, range(first, first + 2), 64)
        for offset in (0, 1, 1 << 32)
        for first in (0, 1 << 28, 1 << 32, 1 << 40)
    ]
    assert torch.cat(high).unique().numel() == torch.cat(high).numel()


def test_bits_are_even():
    # Each bit of a million is set with a deviation of sqrt(n) / 2; five deviations happen to
    # nobody.
    bits = random_bits(SEED, range(1024), 1024)
    for i in range(32):
        excess = ((bits >> i) & 1).sum().item() - bits.numel() / 2
        assert abs(excess) < 5 * math.sqrt(bits.numel()) / 2


@EACH_ELEMENT
def test_goes_up_where_bits_are_below_the_distance(element, device):
    # All magnitudes that float32 has; far below the grid there is hardly a distance.
    patterns = torch.randint(0, 0x7F800000, (60000,), dtype=torch.int32).view(torch.float32)
    x = torch.cat([make_inputs((60000,), 1), patterns, grid(element).float()])
    x = (x * (1 - 2 * torch.randint(2, x.shape))).clamp(-element.max, element.max)
    bits = torch.randint(0, 1 << 32, x.shape)
    values = grid(element)
    size = x.double().abs()
    index = torch.searchsorted(values, size, right=True) - 1
    above = values[(index + 1).clamp(max=len(values) - 1)]
    distance = torch.where(above > size, (size - values[index]) / (above - values[index]), 0.0)
    index += bits < (distance * 2.0**32).floor().long()
    expected = index + 0x80 * torch.signbit(x)
    actual = round_stochastically(x.to(device), bits.to(device), element)
    assert torch.equal(actual.long().cpu(), expected)


@EACH_ELEMENT
@pytest.mark.parametrize("bits", [0, 0xFFFFFFFF])
def test_representable_numbers_never_change(bits, element):
    values = grid(element).float()
    x = torch.cat([values, -values])
    code = round_stochastically(x, torch.full(x.shape, bits), element)
    assert torch.equal(code, bytes_of(x.to(element.dtype)))


@EACH_FORMAT
@pytest.mark.parametrize("is_given", [False, True], ids=["own", "given"])
def test_what_saturates_or_is_no_number_is_as_ever(is_given, format):
    x = make_inputs((2, 40, 70), 2)
    x[0, 3, 5], x[1, 7, 9], x[1, 30, 60] = math.nan, math.inf, -math.inf
    options = {"amax": torch.full((1, 1, 1), 0.5)} if is_given else {}
    q, nearest = (quantize(x, format, **options, seed=seed) for seed in (SEED, None))
    assert torch.equal(bytes_of(q.scale), bytes_of(nearest.scale))
    is_kept = nearest.data.float().isnan() | nearest.dequantize().isnan()
    if is_given:
        # A power of two at most doubles the scale.
        is_kept |= x.abs() >= 1
    assert is_kept.any()
    assert torch.equal(bytes_of(q.data)[is_kept], bytes_of(nearest.data)[is_kept])
    steps = bytes_of(q.data).int() - bytes_of(nearest.data).int()
    assert steps.abs().max() <= 1


@EACH_ELEMENT
@pytest.mark.parametrize("size", [1.0, 2.0**-7, 2.0**-16], ids=["normal", "subnormal", "tiny"])
def test_rounding_is_unbiased(size, element):
    # An element at a distance p from below errs by a step with a deviation of sqrt(p (1 - p)) of
    # it, half of one at most; so the mean of n deviates by step / (2 sqrt(n)). Five deviations
    # happen to nobody. Rounded to nearest, tiny numbers would all be zero.
    num_samples = 1 << 20
    x = size * (1 + torch.rand(1024, num_samples // 1024))
    format = FP8_ROW.derive(element=element)
    q = quantize(x, format, scale=torch.ones(1, 1), seed=SEED)
    values = grid(element)
    step = (values[1:] - values[:-1])[torch.searchsorted(values, 2 * size) - 1].item()
    mean_error = (q.dequantize().double() - x.double()).mean().item()
    assert abs(mean_error) < 5 * step / (2 * math.sqrt(num_samples))


@EACH_FORMAT
def test_the_mean_of_many_seeds_is_the_input(format):
    x = make_inputs((4, 130), 3)
    num_seeds = 400
    mean = sum(
        quantize(x, format, seed=torch.tensor(i)).dequantize().double() for i in range(num_seeds)
    )
    mean /= num_seeds
    q = quantize(x, format)
    ulp = 2.0**-2 if format.element is E5M2 else 2.0**-3
    least = 2.0**-16 if format.element is E5M2 else 2.0**-9
    scale = q.dequantize().double().abs().max() / q.data.float().abs().max()
    step = (ulp * x.double().abs()).clamp_min(least * scale)
    # Five deviations of a mean, and the last ulp of what is brought below the limit.
    assert ((mean - x).abs() <= 5 * step / (2 * math.sqrt(num_seeds)) + 1e-6 * x.abs()).all()


def test_a_stack_of_experts_is_counted_through(assert_same_bits):
    x_ENK = make_inputs((3, 40, 70), 4)
    for format in (FP8_ROW, MXFP8):
        flat = quantize(x_ENK.view(120, 70), format, seed=SEED)
        assert_same_bits(quantize(x_ENK, format, seed=SEED).data.view(120, 70), flat.data)


def test_a_large_matrix_is_cut_into_parts(assert_same_bits):
    # More than one part of a CPU's cache, and an odd number of columns.
    x_TD = make_inputs((3000, 301), 5)
    whole = quantize(x_TD, FP8_ROW, seed=SEED)
    top = quantize(x_TD[:1234], FP8_ROW, seed=SEED)
    assert_same_bits(top.data, whole.data[:1234])
    for format in (FP8_COLUMN128, FP8_TENSOR):
        near = quantize(x_TD, format).dequantize()
        assert (quantize(x_TD, format, seed=SEED).dequantize() - near).abs().max() > 0


@EACH_FORMAT
def test_the_same_seed_gives_the_same_bits_and_another_others(format, assert_same_bits):
    x = make_inputs((40, 130), 6)
    q = quantize(x, format, seed=SEED)
    assert_same_bits(quantize(x, format, seed=SEED.clone()), q)
    other = quantize(x, format, seed=SEED + 1)
    assert (bytes_of(other.data) != bytes_of(q.data)).float().mean() > 0.05
