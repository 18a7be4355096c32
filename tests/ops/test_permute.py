"""`permute`: rows and their scales go to their slots byte for byte; slots of no token are zero.

Claimed: permuting a quantised tensor equals quantising the permuted one, in every layout.
"""

import pytest
import torch

from octomoe import (
    ALL,
    COMPACT,
    FP8_BLOCK128,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    GEMM_READY,
    MXFP8,
    MXFP8_2D,
    MXFP8_E5M2,
    Format,
    QTensor,
    ScaleLayout,
    build_routing,
    permute,
    quantize,
)

# tokens, experts, choices, pattern of the ids, width of a row
CASES = {
    "zero tokens": (0, 4, 2, "any", 256),
    "one token": (1, 4, 2, "any", 256),
    "an empty expert": (9, 4, 2, "hole", 128),
    "all to one": (9, 4, 1, "one", 128),
    "divides nothing": (37, 5, 3, "dropped", 131),
    "an expert twice": (37, 5, 3, "twice", 131),
    "no choices": (3, 2, 0, "any", 32),
    "real": (70, 8, 3, "any", 256),
    "wide": pytest.param((1000, 64, 8, "any", 1024), marks=pytest.mark.full),
}
ROW_FORMATS = (
    FP8_ROW,
    FP8_GROUP128,
    FP8_GROUP128.derive(rounding="pow2"),
    MXFP8,
    MXFP8_E5M2,
    Format((1, 1, 48)),
)
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int32,
    torch.bool,
)


def make_inputs(case, device, seed, draw_ids, align=1):
    num_tokens, num_experts, num_choices, pattern, width = case
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, width, generator=generator).to(device, torch.bfloat16)
    ids_TA = draw_ids(num_tokens, num_experts, num_choices, pattern, seed).to(device)
    return x_TD, build_routing(ids_TA, num_experts, align=align)


def naive_permute(x_TD, routing):
    """One row at a time."""
    x_SD = torch.zeros(routing.num_slots, x_TD.shape[1]).to(x_TD.device, x_TD.dtype)
    for s, choice in enumerate(routing.choice_of_slot_S.tolist()):
        if choice >= 0:
            x_SD[s] = x_TD[choice // routing.num_choices]
    return x_SD


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_a_naive_loop(case, align, device, draw_ids, assert_same_bits):
    x_TD, routing = make_inputs(case, device, 1, draw_ids, align)
    assert_same_bits(permute(x_TD, routing), naive_permute(x_TD, routing))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moves_bytes_of_any_dtype(dtype, device, draw_ids, assert_same_bits):
    x_TD, routing = make_inputs(CASES["divides nothing"], device, 2, draw_ids, align=8)
    x_TD = (8 * x_TD).to(dtype)
    assert_same_bits(permute(x_TD, routing), naive_permute(x_TD, routing))


def test_nan_is_moved_and_does_not_leak_into_empty_slots(device, draw_ids):
    x_TD, routing = make_inputs(CASES["divides nothing"], device, 3, draw_ids, align=8)
    x_SD = permute(torch.full_like(x_TD, torch.nan), routing)
    assert torch.equal(x_SD.isnan().any(1), routing.choice_of_slot_S >= 0)
    assert not x_SD[routing.choice_of_slot_S < 0].any()


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("format", ROW_FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_commutes_with_quantize(case, format, align, layout, device, draw_ids, assert_same_bits):
    x_TD, routing = make_inputs(case, device, 4, draw_ids, align)
    moved = permute(quantize(x_TD, format, layout=layout), routing)
    assert_same_bits(moved, quantize(permute(x_TD, routing), format, layout=layout))


@pytest.mark.parametrize("format", [FP8_TENSOR, FP8_EXPERT], ids=lambda f: f.name)
@pytest.mark.parametrize("layout", ScaleLayout)
def test_one_scale_for_all_rows_stays(format, layout, device, draw_ids, assert_same_bits):
    x_TD, routing = make_inputs(CASES["real"], device, 5, draw_ids, align=8)
    q = quantize(x_TD, format, layout=layout)
    moved = permute(q, routing)
    assert_same_bits(moved.scale, q.scale)
    assert_same_bits(moved.data, permute(q.data, routing))
    assert moved.layout == layout


@pytest.mark.parametrize("layout_out", ScaleLayout)
@pytest.mark.parametrize("layout_in", ScaleLayout)
@pytest.mark.parametrize("format", [FP8_TENSOR, FP8_GROUP128, MXFP8], ids=lambda f: f.name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_scales_are_laid_out_as_asked(
    case, format, layout_in, layout_out, device, draw_ids, assert_same_bits
):
    x_TD, routing = make_inputs(case, device, 8, draw_ids, align=8)
    moved = permute(quantize(x_TD, format, layout=layout_in), routing, layout=layout_out)
    assert moved.layout == layout_out
    assert_same_bits(moved, permute(quantize(x_TD, format), routing).relayout(layout_out))


def test_empty_slots_have_the_smallest_scale(device, draw_ids):
    x_TD, routing = make_inputs(CASES["divides nothing"], device, 6, draw_ids, align=8)
    is_empty_S = routing.choice_of_slot_S < 0
    for format in ROW_FORMATS:
        moved = permute(quantize(x_TD, format), routing)
        assert set(moved.scale[is_empty_S].double().flatten().tolist()) == {format.min_scale}
        assert not moved.data[is_empty_S].float().any()


def test_compact_scales_are_what_dispatch_carries(device, draw_ids, assert_same_bits):
    # Scales travel with their rows, so permuting both apart gives the same value.
    x_TD, routing = make_inputs(CASES["real"], device, 7, draw_ids)
    q = quantize(x_TD, FP8_GROUP128)
    apart = QTensor(
        permute(q.data, routing), permute(q.scale, routing), FP8_GROUP128, layout=COMPACT
    )
    assert_same_bits(permute(q, routing), apart)


X_TD = torch.ones(2, 160)
ROUTING = build_routing(torch.tensor([[0], [1]]), 2)
REFUSALS = {
    "routing": (
        TypeError,
        "permute: routing is a Tensor, but needs a Routing, from build_routing",
        lambda: permute(X_TD, torch.zeros(2, 3)),
    ),
    "rows": (
        ValueError,
        r"permute: x has shape \(1, 160\), but needs 2 rows, the tokens of the routing",
        lambda: permute(X_TD[:1], ROUTING),
    ),
    "rank": (
        ValueError,
        r"x has shape \(1, 2, 160\), but needs \[rows, columns\]",
        lambda: permute(X_TD[None], ROUTING),
    ),
    "device": (
        ValueError,
        "x is on meta, but needs the other tensors' device cpu",
        lambda: permute(X_TD.to("meta"), ROUTING),
    ),
    "quantised rows": (
        ValueError,
        "needs 2 rows",
        lambda: permute(quantize(X_TD[:1], FP8_ROW), ROUTING),
    ),
    "layout of no scales": (
        ValueError,
        "permute: layout is gemm_ready, but needs None for a tensor without scales",
        lambda: permute(X_TD, ROUTING, layout=GEMM_READY),
    ),
    "layout": (
        ValueError,
        "'swizzled' is not a valid ScaleLayout",
        lambda: permute(quantize(X_TD, FP8_ROW), ROUTING, layout="swizzled"),
    ),
    "blocks of rows": (
        ValueError,
        "x is fp8_block128, but needs a scale per row.*requantize it",
        lambda: permute(quantize(X_TD, FP8_BLOCK128), ROUTING),
    ),
    "squares": (
        ValueError,
        "x is mxfp8_2d, but needs a scale per row",
        lambda: permute(quantize(X_TD, MXFP8_2D), ROUTING),
    ),
    "a scale per column": (
        ValueError,
        r"x is fp8\[1,all,1\], but needs a scale per row",
        lambda: permute(quantize(X_TD, Format((1, ALL, 1))), ROUTING),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
