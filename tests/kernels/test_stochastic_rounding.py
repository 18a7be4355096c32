"""Random bits in Triton are the reference's, wherever in a tensor, whatever tile asks for them."""

import pytest
import torch
import triton
import triton.language as tl

from octomoe.kernels.stochastic_rounding import _random_bits
from octomoe.reference.stochastic_rounding import random_bits

SEEDS = (0, 1, -1, 2**31, 2**32, -(2**63), 2**63 - 1, 0x123456789ABCDEF)


@triton.jit
def _bits_kernel(
    bits_ptr,
    seed_ptr,
    first_row,
    first_column,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_GROUPED: tl.constexpr,
):
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    first_row = first_row.to(tl.int64)
    bits = _random_bits(x, seed_ptr, first_row, first_column, num_columns, IS_GROUPED)
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(bits_ptr + place, bits.to(tl.int64))


def kernel_bits(seed, first_row, first_column, num_columns, shape, device, is_grouped=True):
    bits = torch.empty(shape, dtype=torch.int64, device=device)
    seed = torch.tensor(seed, device=device)
    rows, columns = shape
    _bits_kernel[(1,)](
        bits,
        seed,
        first_row,
        first_column,
        num_columns,
        ROWS=rows,
        COLUMNS=columns,
        IS_GROUPED=is_grouped,
    )
    return bits.cpu()


@pytest.mark.parametrize("first_row", [3, 2**31 - 5, 2**32 - 3, 2**40])
@pytest.mark.parametrize("seed", SEEDS)
def test_equal_the_reference(seed, first_row, kernel_device):
    # The counter passes 2^32 within the tile, and has more than 32 bits.
    expected = random_bits(torch.tensor(seed), range(first_row, first_row + 8), 72)
    actual = kernel_bits(seed, first_row, 40, 72, (8, 32), kernel_device)
    assert torch.equal(actual, expected[:, 40:])


@pytest.mark.parametrize("num_columns", [1, 2, 3, 4, 5, 64, 131])
@pytest.mark.parametrize("columns", [1, 2, 4, 16])
def test_whatever_the_width_of_matrix_and_tile(columns, num_columns, kernel_device):
    expected = random_bits(torch.tensor(5), range(7, 15), num_columns)
    for first_column in range(0, num_columns, columns):
        bits = kernel_bits(5, 7, first_column, num_columns, (8, columns), kernel_device)
        part = expected[:, first_column : first_column + columns]
        assert torch.equal(bits[:, : part.shape[1]], part)


@pytest.mark.parametrize("first_column", [1, 2, 3, 131])
def test_tiles_may_begin_anywhere(first_column, kernel_device):
    expected = random_bits(torch.tensor(6), range(8), 262)
    bits = kernel_bits(6, 0, first_column, 262, (8, 64), kernel_device, is_grouped=False)
    assert torch.equal(bits, expected[:, first_column : first_column + 64])
