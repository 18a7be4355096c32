"""Claims: every named format is the one of the design table; a format's name says all of it and is
read back; the scale's shape is ``ceil(shape / block)``; a GEMM takes exactly the documented pairs.
"""

from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octomoe
from octomoe.core.formats import (
    ALL,
    E4M3_240,
    E4M3FN,
    E5M2,
    FORMATS,
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_COLUMN128,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    FP8_TOKEN,
    MXFP8,
    MXFP8_2D,
    MXFP8_E5M2,
    Format,
    Rounding,
    is_gemm_pair,
)

E8M0 = torch.float8_e8m0fnu
F32 = torch.float32

# constant, block, scale dtype, element, scale shape for a real shape and for one that no block
# divides.
REAL, RAGGED = (8, 7168, 2048), (3, 130, 70)
CASES = {
    "FP8_TENSOR": ((ALL, ALL, ALL), F32, E4M3FN, (1, 1, 1), (1, 1, 1)),
    "FP8_EXPERT": ((1, ALL, ALL), F32, E4M3FN, (8, 1, 1), (3, 1, 1)),
    "FP8_ROW": ((1, 1, ALL), F32, E4M3FN, (8, 7168, 1), (3, 130, 1)),
    "FP8_TOKEN": ((1, 1, ALL), F32, E4M3FN, (8, 7168, 1), (3, 130, 1)),
    "FP8_CHANNEL": ((1, 1, ALL), F32, E4M3FN, (8, 7168, 1), (3, 130, 1)),
    "FP8_GROUP128": ((1, 1, 128), F32, E4M3FN, (8, 7168, 16), (3, 130, 1)),
    "FP8_BLOCK128": ((1, 128, 128), F32, E4M3FN, (8, 56, 16), (3, 2, 1)),
    "FP8_COLUMN128": ((1, 128, 1), F32, E4M3FN, (8, 56, 2048), (3, 2, 70)),
    "MXFP8": ((1, 1, 32), E8M0, E4M3FN, (8, 7168, 64), (3, 130, 3)),
    "MXFP8_E5M2": ((1, 1, 32), E8M0, E5M2, (8, 7168, 64), (3, 130, 3)),
    "MXFP8_2D": ((1, 32, 32), E8M0, E4M3FN, (8, 224, 64), (3, 5, 3)),
}
NAMES = {
    "fp8_tensor": FP8_TENSOR,
    "fp8_expert": FP8_EXPERT,
    "fp8_row": FP8_ROW,
    "fp8_group128": FP8_GROUP128,
    "fp8_block128": FP8_BLOCK128,
    "fp8_column128": FP8_COLUMN128,
    "mxfp8": MXFP8,
    "mxfp8_2d": MXFP8_2D,
}
SPELLINGS = {
    "fp8_token": FP8_ROW,
    "fp8_channel": FP8_ROW,
    "channel": FP8_ROW,
    "block128": FP8_BLOCK128,
    " Block128-POW2 ": FP8_BLOCK128.derive(rounding=Rounding.POW2),
    "fp8[1,128,128]": FP8_BLOCK128,
    "mxfp8[1,1,32]": MXFP8,
    "mxfp8-pow2": MXFP8,
    "mxfp8-e5m2": MXFP8_E5M2,
    "fp8[all,1,all]": Format((ALL, 1, ALL)),
    "tensor-e4m3_240-pow2": FP8_TENSOR.derive(element=E4M3_240, rounding="pow2"),
    "row-max240": FP8_ROW.derive(target_max=240.0),
}
# The weight x activation pairs that a grouped GEMM takes; all others are refused.
WEIGHTS = (FP8_TENSOR, FP8_EXPERT, FP8_CHANNEL, FP8_BLOCK128, MXFP8, MXFP8_2D)
ACTIVATIONS = (FP8_TENSOR, FP8_TOKEN, FP8_GROUP128, MXFP8)
PAIRS = {
    ("fp8_tensor", "fp8_tensor"),
    ("fp8_tensor", "fp8_row"),
    ("fp8_row", "fp8_tensor"),
    ("fp8_row", "fp8_row"),
    ("fp8_expert", "fp8_tensor"),
    ("fp8_expert", "fp8_row"),
    ("fp8_block128", "fp8_group128"),
    ("mxfp8", "mxfp8"),
    ("mxfp8_2d", "mxfp8"),
}

SIZES = st.one_of(st.sampled_from([ALL, 1, 32, 128]), st.integers(1, 10**6))


@st.composite
def formats(draw: st.DrawFn) -> Format:
    scale_dtype = draw(st.sampled_from([F32, E8M0]))
    element = draw(st.sampled_from([E4M3FN, E5M2, E4M3_240]))
    rounding = draw(st.sampled_from(Rounding)) if scale_dtype == F32 else Rounding.POW2
    # Zero asks for the element's own.
    target_max = draw(st.floats(2.0, element.max) | st.just(0.0))
    block = draw(st.tuples(SIZES, SIZES, SIZES))
    return Format(block, scale_dtype, element, rounding, target_max)


@pytest.mark.parametrize("constant", CASES)
def test_constants_are_the_design_table(constant: str):
    block, scale_dtype, element, *expected = CASES[constant]
    format = getattr(octomoe, constant)
    assert (format.block, format.scale_dtype, format.element) == (block, scale_dtype, element)
    is_mx = scale_dtype == E8M0
    assert format.rounding == (Rounding.POW2 if is_mx else Rounding.EXACT)
    assert format.target_max == element.max
    assert format.min_scale == (2.0**-127 if is_mx else 2.0**-126)

    assert [format.scale_shape(REAL), format.scale_shape(RAGGED)] == expected


@given(format=formats(), shape=st.lists(st.integers(0, 300), min_size=2, max_size=3).map(tuple))
def test_scale_shape_counts_the_blocks_of_each_axis(format: Format, shape: tuple[int, ...]):
    counts = []
    for size, block in zip(shape, format.block[-len(shape) :], strict=True):
        counts.append(1 if block == ALL else len({at // block for at in range(size)}))
    assert format.scale_shape(shape) == tuple(counts)


@given(format=formats())
def test_name_is_read_back(format: Format):
    assert Format.parse(format.name) == format


@given(format=formats())
def test_derive_changes_what_is_said_and_nothing_else(format: Format):
    other = format.derive(element=E5M2)
    assert (other.block, other.scale_dtype, other.element) == (
        format.block,
        format.scale_dtype,
        E5M2,
    )
    assert other.rounding == format.rounding
    assert other.target_max == E5M2.max
    assert format.derive(target_max=format.target_max) == format
    assert format.derive(rounding="pow2").rounding == Rounding.POW2


@pytest.mark.parametrize("name", NAMES)
def test_named_formats_have_the_documented_name(name: str):
    assert NAMES[name].name == name
    assert Format.parse(name) == NAMES[name]


def test_formats_lists_every_name_once():
    assert [format.name for format in FORMATS] == list(NAMES)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings(spelling: str):
    assert Format.parse(spelling) == SPELLINGS[spelling]


def test_aliases_are_the_same_value():
    assert FP8_TOKEN == FP8_CHANNEL == FP8_ROW
    assert hash(FP8_TOKEN) == hash(Format((1, 1, ALL)))


def test_default_target_follows_element_and_rounding():
    assert FP8_ROW.derive(element=E4M3_240).target_max == 240.0
    # 448 / 2: data of E4M3FN converts by halving.
    assert FP8_ROW.derive(element=E4M3_240, rounding="pow2").target_max == 224.0
    assert FP8_ROW.derive(element=E5M2).target_max == 57344.0


def test_a_format_is_frozen():
    with pytest.raises(FrozenInstanceError, match="block"):
        FP8_ROW.block = (1, 1, 1)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.name)
@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda f: f.name)
def test_gemm_takes_exactly_the_documented_pairs(weight: Format, activation: Format):
    assert is_gemm_pair(weight, activation) == ((weight.name, activation.name) in PAIRS)


def test_weight_only_takes_any_weight_and_quantised_activations_need_quantised_weights():
    assert all(is_gemm_pair(weight, None) for weight in (*FORMATS, None))
    assert not any(is_gemm_pair(None, activation) for activation in FORMATS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": (1, 0, 128)}, r"Format: block is \(1, 0, 128\), but needs three positive sizes"),
        ({"block": (1, 1, -2)}, r"Format: block is \(1, 1, -2\)"),
        ({"block": (128, 128)}, r"Format: block is \(128, 128\), but needs three positive sizes"),
        (
            {"block": (1, 1, 32), "scale_dtype": torch.bfloat16},
            r"Format: scale_dtype is torch.bfloat16, but needs torch.float32 or",
        ),
        (
            {"block": (1, 1, 32), "scale_dtype": E8M0},
            r'Format: rounding is exact with E8M0 scales, but needs rounding "pow2"',
        ),
        (
            {"block": (1, 1, ALL), "target_max": 449.0},
            r"Format: target_max is 449, but needs a value in \[2, 448\] for e4m3fn",
        ),
        ({"block": (1, 1, ALL), "target_max": -1.0}, r"Format: target_max is -1"),
        ({"block": (1, 1, ALL), "target_max": float("nan")}, r"Format: target_max is nan"),
        ({"block": (1, 1, ALL), "rounding": "up"}, r"Format: rounding is 'up', but needs exact or"),
    ],
)
def test_impossible_formats_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Format(**arguments)


@pytest.mark.parametrize(
    "name", ["", "fp9", "fp8_row-pow3", "fp8_row-max", "fp8[1,1]", "fp8[1,x,1]", "fp8_mxfp8", "all"]
)
def test_unknown_names_are_refused_with_the_known_ones(name: str):
    with pytest.raises(ValueError, match=r"Format.parse: name is .* needs one of: fp8_tensor, "):
        Format.parse(name)


@pytest.mark.parametrize("shape", [(), (5,), (1, 2, 3, 4)])
def test_other_ranks_are_refused(shape: tuple[int, ...]):
    message = r"Format fp8_row: shape is .* needs \(rows, columns\) or \(experts, rows, columns\)"
    with pytest.raises(ValueError, match=message):
        FP8_ROW.scale_shape(shape)
