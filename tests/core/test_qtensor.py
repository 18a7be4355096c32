"""Claims: a QTensor refuses parts that do not fit; it takes the spellings that checkpoints use and
guesses nothing; its value is ``data * scale`` block by block, whatever the layout of the scales.
"""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import product

import pytest
import torch
from torch import Tensor

from octomoe.core.formats import (
    ALL,
    E4M3_240,
    FP8_BLOCK128,
    FP8_COLUMN128,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    MXFP8,
    MXFP8_2D,
    MXFP8_E5M2,
    Format,
)
from octomoe.core.layouts import COMPACT, GEMM_READY, INTERLEAVED, ScaleLayout
from octomoe.core.qtensor import QTensor

NaiveValues = Callable[[QTensor], Tensor]

E8M0 = torch.float8_e8m0fnu
F32 = torch.float32

# format and shape of the data: zero rows, one row, sizes that no block divides, two and three axes.
CASES = [
    (FP8_TENSOR, (3, 5, 7)),
    (FP8_TENSOR, (5, 7)),
    (FP8_EXPERT, (3, 5, 7)),
    (FP8_ROW, (3, 5, 7)),
    (FP8_ROW, (1, 7)),
    (FP8_GROUP128, (3, 130)),
    (FP8_GROUP128, (0, 256)),
    (FP8_BLOCK128, (2, 130, 129)),
    (FP8_BLOCK128, (2, 0, 129)),
    (FP8_COLUMN128, (130, 3)),
    (MXFP8, (2, 3, 70)),
    (MXFP8, (0, 64)),
    (MXFP8_E5M2, (3, 64)),
    (MXFP8_2D, (33, 65)),
    (FP8_ROW.derive(element=E4M3_240), (4, 6)),
    (Format((2, 3, ALL)), (3, 7, 5)),
    (Format((2, 1, 32), E8M0, rounding=MXFP8.rounding), (3, 2, 33)),
]
IDS = [f"{format.name}-{'x'.join(map(str, shape))}" for format, shape in CASES]


def make_inputs(format: Format, shape: tuple[int, ...]) -> QTensor:
    """Any byte but zeros, NaN and Inf; scales from 2^-20 to 2^20."""
    bytes_all = torch.arange(256, dtype=torch.uint8)
    values = bytes_all.view(format.element.dtype).to(F32)
    bytes_usable = bytes_all[torch.isfinite(values) & (values != 0)]
    data = bytes_usable[torch.randint(len(bytes_usable), shape)].view(format.element.dtype)
    scale_shape = format.scale_shape(shape)
    if format.scale_dtype == E8M0:
        scale = torch.randint(107, 148, scale_shape, dtype=torch.uint8).view(E8M0)
    else:
        scale = torch.exp2(torch.rand(scale_shape) * 40 - 20)
    return QTensor(data, scale, format)


def blocks(q: QTensor) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Index of each scale and the slice of data it belongs to, worked out block by block."""
    ranges = []
    for size, block in zip(q.data.shape, q.format.block[-q.data.dim() :], strict=True):
        step = max(size, 1) if block == ALL else block
        ranges.append([slice(start, start + step) for start in range(0, size, step)])
    indices = product(*(range(len(axis)) for axis in ranges))
    return list(zip(indices, product(*ranges), strict=True))


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize(("format", "shape"), CASES, ids=IDS)
def test_value_is_data_times_scale_of_its_block(
    format: Format, shape: tuple[int, ...], layout: ScaleLayout, naive_values: NaiveValues
):
    q = make_inputs(format, shape)
    # Products of float64 are exact here, so the one rounding is that to float32.
    assert torch.equal(q.relayout(layout).dequantize(), naive_values(q).to(F32))


@pytest.mark.parametrize(("format", "shape"), CASES, ids=IDS)
def test_a_wrong_scale_changes_exactly_its_block(format: Format, shape: tuple[int, ...]):
    q = make_inputs(format, shape)
    before = q.dequantize()
    for index, region in blocks(q):
        scale = q.scale.to(F32).clone()
        scale[index] *= 2
        after = QTensor(q.data, scale.to(format.scale_dtype), format).dequantize()
        is_inside = torch.zeros(shape, dtype=torch.bool)
        is_inside[region] = True
        assert torch.equal(after != before, is_inside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantize_rounds_once_at_the_end(dtype: torch.dtype):
    q_NK = make_inputs(FP8_ROW, (64, 64))
    scale_Nk = 1 + torch.rand(64, 1) / 8
    q_NK = QTensor(q_NK.data, scale_Nk, FP8_ROW)
    w_NK = q_NK.dequantize(dtype)
    assert w_NK.dtype == dtype
    assert torch.equal(w_NK, (q_NK.data.to(F32) * scale_Nk).to(dtype))
    if dtype == torch.bfloat16:
        # Rounding the scales first would have been noticed.
        assert not torch.equal(w_NK, q_NK.data.to(dtype) * scale_Nk.to(dtype))


def test_e8m0_scales_span_their_whole_range():
    scale_nk = torch.tensor([[0, 1, 127, 254, 255]], dtype=torch.uint8).view(E8M0)
    data_NK = torch.ones(1, 160).to(torch.float8_e4m3fn)
    values = QTensor(data_NK, scale_nk, MXFP8).dequantize()[0, ::32].tolist()
    assert values[:4] == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert values[4] != values[4]


@pytest.mark.parametrize("after", ScaleLayout)
@pytest.mark.parametrize("before", ScaleLayout)
@pytest.mark.parametrize(("format", "shape"), CASES, ids=IDS)
def test_relayout_goes_anywhere_and_comes_back(
    format: Format, shape: tuple[int, ...], before: ScaleLayout, after: ScaleLayout
):
    q = make_inputs(format, shape)
    there = q.relayout(before).relayout(after)
    assert (there.layout, there.format) == (after, format)
    # Only scales move.
    assert there.data is q.data
    assert torch.equal(there.compact_scale.to(F32), q.scale.to(F32))
    assert torch.equal(there.relayout(COMPACT).scale.to(F32), q.scale.to(F32))


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize(
    "format", [FP8_TENSOR, FP8_EXPERT, FP8_ROW, FP8_BLOCK128, MXFP8, Format((2, 3, ALL))]
)
def test_expert_is_a_slice_of_the_value(format: Format, layout: ScaleLayout):
    q_ENK = make_inputs(format, (3, 7, 40)).relayout(layout)
    w_ENK = q_ENK.dequantize()
    for index in range(3):
        q_NK = q_ENK.expert(index)
        assert q_NK.layout == COMPACT
        assert torch.equal(q_NK.dequantize(), w_ENK[index])


def test_expert_shares_memory():
    q_ENK = make_inputs(FP8_ROW, (3, 7, 40))
    q_NK = q_ENK.expert(1)
    q_ENK.scale[1] *= 2
    assert torch.equal(q_NK.dequantize(), q_ENK.dequantize()[1])
    assert q_NK.data.data_ptr() == q_ENK.data[1].data_ptr()


def test_to_moves_both_parts():
    q_NK = make_inputs(MXFP8, (3, 64)).relayout(GEMM_READY)
    moved = q_NK.to("meta")
    assert (moved.device.type, moved.scale.device.type) == ("meta", "meta")
    assert (moved.shape, moved.format, moved.layout) == (q_NK.shape, MXFP8, GEMM_READY)
    assert torch.equal(q_NK.to("cpu").dequantize(), q_NK.dequantize())


@pytest.mark.parametrize(
    ("format", "layout", "num_bytes"),
    [
        (FP8_ROW, COMPACT, 3 * 130 * 70 + 3 * 130 * 4),
        (FP8_ROW, GEMM_READY, 3 * 130 * 70 + 3 * 132 * 4),
        (MXFP8, COMPACT, 3 * 130 * 70 + 3 * 130 * 3),
        (MXFP8, INTERLEAVED, 3 * 130 * 70 + 3 * 2 * 512),
    ],
)
def test_num_bytes_counts_scales_and_their_padding(
    format: Format, layout: ScaleLayout, num_bytes: int
):
    assert make_inputs(format, (3, 130, 70)).relayout(layout).num_bytes == num_bytes


def test_is_a_plain_frozen_value():
    q_NK = make_inputs(FP8_ROW, (2, 3))
    assert not isinstance(q_NK, Tensor)
    with pytest.raises(FrozenInstanceError, match="scale"):
        q_NK.scale = q_NK.scale


@pytest.mark.parametrize(
    ("format", "shape", "scale_shape"),
    [
        (FP8_TENSOR, (3, 5, 7), ()),
        (FP8_TENSOR, (3, 5, 7), (1,)),
        (FP8_TENSOR, (3, 5, 7), (1, 1)),
        (FP8_TENSOR, (5, 7), ()),
        (FP8_TENSOR, (5, 7), (1,)),
        (FP8_EXPERT, (3, 5, 7), (3,)),
        (FP8_EXPERT, (3, 5, 7), (3, 1)),
        (FP8_EXPERT, (1, 5, 7), ()),
        (FP8_ROW, (3, 5, 7), (3, 5)),
        (FP8_ROW, (5, 7), (5,)),
        (Format((1, 2, ALL)), (3, 5, 7), (3, 3)),
    ],
)
def test_from_parts_adds_only_ones(
    format: Format, shape: tuple[int, ...], scale_shape: tuple[int, ...]
):
    q = make_inputs(format, shape)
    taken = QTensor.from_parts(q.data, q.scale.reshape(scale_shape), format)
    assert taken.scale.shape == format.scale_shape(shape)
    assert torch.equal(taken.dequantize(), q.dequantize())


@pytest.mark.parametrize(("format", "shape"), CASES, ids=IDS)
def test_from_parts_reads_bytes(format: Format, shape: tuple[int, ...]):
    q = make_inputs(format, shape)
    scale = q.scale.view(torch.uint8) if format.scale_dtype == E8M0 else q.scale
    taken = QTensor.from_parts(q.data.view(torch.uint8), scale, format)
    assert torch.equal(taken.dequantize(), q.dequantize())


@pytest.mark.parametrize(
    ("format", "shape", "scale_shape"),
    [
        # One scale per expert where there is one for all; the other way round.
        (FP8_TENSOR, (3, 5, 7), (3,)),
        (FP8_EXPERT, (3, 5, 7), ()),
        (FP8_EXPERT, (3, 5, 7), (4,)),
        # A per-expert or per-tensor scale in place of one per row.
        (FP8_ROW, (3, 5, 7), (3,)),
        (FP8_ROW, (3, 5, 7), (1,)),
        (FP8_ROW, (5, 7), ()),
        (FP8_ROW, (3, 5, 7), (5, 3)),
        (FP8_ROW, (3, 5, 7), (15,)),
        # One block along K is not the whole axis: its 1 is said.
        (FP8_GROUP128, (5, 7), (5,)),
        (FP8_BLOCK128, (2, 130, 300), (2, 3, 2)),
    ],
)
def test_from_parts_guesses_nothing(
    format: Format, shape: tuple[int, ...], scale_shape: tuple[int, ...]
):
    data = make_inputs(format, shape).data
    message = r"QTensor: scale has shape \(.*\), but needs .* on data .*; was it saved for another"
    with pytest.raises(ValueError, match=message):
        QTensor.from_parts(data, torch.ones(scale_shape), format)


@pytest.mark.parametrize(
    ("data_dtype", "scale_dtype", "format", "message"),
    [
        (torch.int8, F32, FP8_ROW, "data has dtype torch.int8, but needs torch.float8_e4m3fn"),
        (torch.float8_e5m2, F32, FP8_ROW, "data has dtype torch.float8_e5m2"),
        (torch.uint8, torch.bfloat16, FP8_ROW, "scale has dtype torch.bfloat16, but needs"),
        (torch.uint8, torch.uint8, FP8_ROW, "scale has dtype torch.uint8, but needs torch.float32"),
        (torch.uint8, F32, MXFP8, "scale has dtype torch.float32, but needs torch.float8_e8m0fnu"),
    ],
)
def test_from_parts_refuses_other_dtypes(
    data_dtype: torch.dtype, scale_dtype: torch.dtype, format: Format, message: str
):
    data, scale = torch.zeros(4, 8, dtype=data_dtype), torch.ones(4, 1, dtype=scale_dtype)
    with pytest.raises(TypeError, match=f"QTensor: {message}"):
        QTensor.from_parts(data, scale, format)


def test_constructor_refuses_parts_that_do_not_fit():
    q_NK = make_inputs(MXFP8, (4, 64))
    with pytest.raises(TypeError, match=r"QTensor: data has dtype torch.uint8, but needs .* mxfp8"):
        QTensor(q_NK.data.view(torch.uint8), q_NK.scale, MXFP8)
    with pytest.raises(TypeError, match=r"QTensor: scale has dtype torch.uint8, but needs"):
        QTensor(q_NK.data, q_NK.scale.view(torch.uint8), MXFP8)
    with pytest.raises(
        ValueError, match=r"scale has shape \(4, 2\), but needs \(2, 16\) for mxfp8"
    ):
        QTensor(q_NK.data, q_NK.scale, MXFP8, GEMM_READY)
    with pytest.raises(ValueError, match=r"scale is on meta, but needs the data's device cpu"):
        QTensor(q_NK.data, q_NK.scale.to("meta"), MXFP8)
    with pytest.raises(ValueError, match=r"Format mxfp8: shape is \(64,\), but needs \(rows, col"):
        QTensor(q_NK.data[0], q_NK.scale, MXFP8)


def test_expert_refuses_two_axes():
    with pytest.raises(ValueError, match=r"QTensor.expert: data has shape \(4, 64\), but needs"):
        make_inputs(MXFP8, (4, 64)).expert(0)


@pytest.mark.parametrize("index", [-1, 2])
def test_expert_refuses_an_index_that_is_none(index: int):
    with pytest.raises(IndexError, match=rf"QTensor.expert: index is {index}, but needs 0 to 1"):
        make_inputs(MXFP8, (2, 4, 64)).expert(index)
