"""Claims: `pack` and `unpack` are exact inverses in every layout; GEMM_READY is the padded
transpose; INTERLEAVED puts every scale where the module's formula says; padding is zero bytes.

Letters: n and k are rows and columns of scales, X any leading axes.
"""

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octomoe.core.layouts import (
    COMPACT,
    GEMM_READY,
    INTERLEAVED,
    ScaleLayout,
    pack,
    packed_shape,
    unpack,
)

E8M0 = torch.float8_e8m0fnu
DTYPES = (torch.float32, E8M0)

# scale shape, its GEMM_READY shape as float32 and as E8M0, its INTERLEAVED shape
CASES = [
    ((0, 3), (3, 0), (3, 0), (0, 1, 32, 16)),
    ((1, 1), (1, 4), (1, 16), (1, 1, 32, 16)),
    ((4, 1), (1, 4), (1, 16), (1, 1, 32, 16)),
    ((5, 3), (3, 8), (3, 16), (1, 1, 32, 16)),
    ((128, 4), (4, 128), (4, 128), (1, 1, 32, 16)),
    ((130, 5), (5, 132), (5, 144), (2, 2, 32, 16)),
    ((3, 33, 9), (3, 9, 36), (3, 9, 48), (3, 1, 3, 32, 16)),
    ((2, 0, 7, 2), (2, 0, 2, 8), (2, 0, 2, 16), (2, 0, 1, 1, 32, 16)),
    ((8, 56, 16), (8, 16, 56), (8, 16, 64), (8, 1, 4, 32, 16)),
]
SHAPES = [case[0] for case in CASES]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Scales without a zero byte pattern, so that padding is told apart; NaN patterns included."""
    number = torch.arange(1, prod(shape) + 1)
    if dtype == E8M0:
        return (number * 37 % 255 + 1).to(torch.uint8).view(E8M0).reshape(shape)
    # An odd factor permutes the 32-bit patterns and leaves zero to zero.
    return (number * 0x9E3779B1 % 2**32).to(torch.uint32).view(torch.float32).reshape(shape)


def bits(scale: Tensor) -> Tensor:
    return scale.view(torch.uint8 if scale.dtype == E8M0 else torch.int32)


@given(
    lead=st.lists(st.integers(0, 3), max_size=2),
    rows=st.one_of(st.integers(0, 9), st.integers(120, 270)),
    columns=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(ScaleLayout),
)
def test_unpack_inverts_pack(
    lead: list[int], rows: int, columns: int, dtype: torch.dtype, layout: ScaleLayout
):
    scale_Xnk = make_inputs((*lead, rows, columns), dtype)
    packed = pack(scale_Xnk, layout)
    assert packed.dtype == dtype
    assert packed.shape == packed_shape(tuple(scale_Xnk.shape), layout, dtype)
    assert packed.is_contiguous()

    unpacked_Xnk = unpack(packed, layout, tuple(scale_Xnk.shape))
    assert unpacked_Xnk.is_contiguous()
    assert torch.equal(bits(unpacked_Xnk), bits(scale_Xnk))
    # No scale is zero and each came back, so what else is not zero would be padding.
    assert torch.count_nonzero(bits(packed)) == scale_Xnk.numel()


@pytest.mark.parametrize(("shape", "gemm_ready", "gemm_ready_e8m0", "interleaved"), CASES)
def test_packed_shape(
    shape: tuple[int, ...],
    gemm_ready: tuple[int, ...],
    gemm_ready_e8m0: tuple[int, ...],
    interleaved: tuple[int, ...],
):
    assert packed_shape(shape, GEMM_READY, torch.float32) == gemm_ready
    assert packed_shape(shape, GEMM_READY, E8M0) == gemm_ready_e8m0
    for dtype in DTYPES:
        assert packed_shape(shape, COMPACT, dtype) == shape
        assert packed_shape(shape, INTERLEAVED, dtype) == interleaved


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_compact_is_the_scale_itself(shape: tuple[int, ...], dtype: torch.dtype):
    scale_Xnk = make_inputs(shape, dtype)
    assert torch.equal(bits(pack(scale_Xnk, COMPACT)), bits(scale_Xnk))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gemm_ready_is_the_padded_transpose(shape: tuple[int, ...], dtype: torch.dtype):
    scale_Xnk = make_inputs(shape, dtype)
    packed_Xkn = bits(pack(scale_Xnk, GEMM_READY))
    num_rows = shape[-2]
    assert torch.equal(packed_Xkn[..., :num_rows], bits(scale_Xnk).transpose(-1, -2))
    assert not packed_Xkn[..., num_rows:].any()
    assert packed_Xkn.shape[-1] * dtype.itemsize % 16 == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_interleaved_puts_each_scale_where_the_formula_says(
    shape: tuple[int, ...], dtype: torch.dtype
):
    scale_Xnk = make_inputs(shape, dtype)
    packed = bits(pack(scale_Xnk, INTERLEAVED))
    # 512 scales to an atom: bytes for E8M0, words for float32.
    atoms = packed.reshape(*packed.shape[:-2], 512)
    expected = torch.zeros_like(atoms)
    scales = bits(scale_Xnk)
    for *lead, row, column in product(*map(range, shape)):
        atom_row, atom_column = row % 128, column % 4
        at = (atom_row % 32) * 16 + (atom_row // 32) * 4 + atom_column
        expected[(*lead, row // 128, column // 4, at)] = scales[(*lead, row, column)]
    assert torch.equal(atoms, expected)


@pytest.mark.parametrize("layout", [GEMM_READY, INTERLEAVED])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if prod(shape)])
def test_packed_strides_are_those_of_a_fresh_tensor(shape: tuple[int, ...], layout: ScaleLayout):
    # Also along axes of size one, which `is_contiguous` ignores: tensor maps are built from
    # strides, and a kernel that writes a layout directly allocates it fresh.
    scale_Xnk = make_inputs(shape, torch.float32)
    transposed_Xnk = scale_Xnk.transpose(-1, -2).contiguous().transpose(-1, -2)
    for source_Xnk in (scale_Xnk, transposed_Xnk):
        packed = pack(source_Xnk, layout)
        assert packed.stride() == torch.empty(packed.shape).stride()


@pytest.mark.parametrize("layout", [GEMM_READY, INTERLEAVED])
def test_packing_a_view_leaves_it_untouched(layout: ScaleLayout):
    scale_nk = make_inputs((10, 6), E8M0)
    view_nk = scale_nk[::2, 1:4]
    before = bits(scale_nk).clone()
    packed = pack(view_nk, layout)
    bits(packed).fill_(7)
    assert torch.equal(bits(scale_nk), before)


@pytest.mark.parametrize(
    ("layout", "shape", "needs"),
    [
        (COMPACT, (5, 4), r"\(5, 3\) for a compact scale"),
        (GEMM_READY, (5, 3), r"\(3, 8\) for a gemm_ready scale"),
        (INTERLEAVED, (1, 1, 512), r"\(1, 1, 32, 16\) for a interleaved scale"),
    ],
)
def test_unpack_refuses_another_shape(layout: ScaleLayout, shape: tuple[int, ...], needs: str):
    with pytest.raises(ValueError, match=rf"unpack: packed has shape .* needs {needs} of \(5, 3\)"):
        unpack(torch.ones(shape), layout, (5, 3))
