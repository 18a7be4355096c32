"""`permute` in Triton equals the reference bit for bit: dtypes, formats, layouts and routings."""

import pytest
import torch

from octomoe import (
    COMPACT,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    GEMM_READY,
    MXFP8,
    MXFP8_E5M2,
    Format,
    QTensor,
    Routing,
    ScaleLayout,
    build_routing,
    permute,
    quantize,
)
from octomoe.core.routing import routing_of_slots, slots_of_mask
from octomoe.kernels import permute as kernel
from octomoe.tune.configs import PermuteConfig

# tokens, experts, choices, pattern of the ids
ROUTINGS = {
    "zero tokens": (0, 4, 2, "any"),
    "one token": (1, 4, 2, "any"),
    "no choices": (3, 2, 0, "any"),
    "all to one": (9, 4, 1, "one"),
    "empty experts": (3, 16, 1, "any"),
    "all dropped": (5, 4, 2, "none"),
    "divides nothing": (37, 5, 3, "dropped"),
    "an expert twice": (37, 5, 3, "twice"),
    "eight choices": (21, 32, 8, "any"),
}
ROW_FORMATS = (FP8_ROW, FP8_GROUP128, MXFP8, MXFP8_E5M2, Format((1, 1, 48)))
EACH_SCALE = pytest.mark.parametrize("format", [FP8_GROUP128, MXFP8], ids=lambda f: f.name)
EACH_ROUTING = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.uint8,
    torch.int64,
    torch.complex64,
    torch.complex128,
)


def make_inputs(routing, device, draw_ids, width=131, align=4, dtype=torch.bfloat16):
    """Rows of any bits, NaN and -0 among them."""
    num_tokens, num_experts, num_choices, pattern = routing
    ids_TA = draw_ids(num_tokens, num_experts, num_choices, pattern).to(device)
    bits = torch.randint(256, (num_tokens * width * dtype.itemsize,), dtype=torch.uint8)
    x_TD = bits.view(dtype).view(num_tokens, width).to(device)
    return x_TD, build_routing(ids_TA, num_experts, align=align)


def make_quantized(routing, format, layout, device, draw_ids, align=4):
    bits_TD, routing = make_inputs(routing, device, draw_ids, 300, align)
    x_TD = bits_TD.float().nan_to_num(0.0, 1.0, -1.0)
    return quantize(x_TD, format, layout=layout, backend="reference"), routing


@pytest.mark.parametrize("align", [1, 4, 16])
@EACH_ROUTING
def test_equals_the_reference(routing, align, kernel_device, draw_ids, assert_equals_reference):
    assert_equals_reference(permute, *make_inputs(routing, kernel_device, draw_ids, align=align))


@pytest.mark.parametrize("width", [0, 1, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moves_every_dtype(dtype, width, kernel_device, draw_ids, assert_equals_reference):
    case = ROUTINGS["empty experts"]
    x_TD, routing = make_inputs(case, kernel_device, draw_ids, width, dtype=dtype)
    assert_equals_reference(permute, x_TD, routing)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_numbers_of_any_view(dtype, kernel_device, draw_ids, assert_equals_reference):
    case = ROUTINGS["divides nothing"]
    x_TD, routing = make_inputs(case, kernel_device, draw_ids, dtype=dtype)
    for view in (x_TD.conj(), x_TD.conj().imag, x_TD.T.contiguous().T, x_TD[:, ::2]):
        assert_equals_reference(permute, view, routing)


@pytest.mark.parametrize("num_experts", [17, 40])
def test_masks(num_experts, kernel_device, assert_equals_reference):
    mask_TE = torch.rand(19, num_experts, device=kernel_device) < 0.2
    mask_TE[3], mask_TE[4] = False, True
    x_TD = torch.randn(19, 300).to(kernel_device)
    for num_slots in (5, int(mask_TE.sum()) + 3):
        routing = routing_of_slots(slots_of_mask(mask_TE), num_slots)
        assert_equals_reference(permute, x_TD, routing)
        assert_equals_reference(permute, quantize(x_TD, MXFP8), routing, layout=GEMM_READY)


@pytest.mark.parametrize("align", [1, 4, 16])
@EACH_SCALE
@EACH_ROUTING
def test_scales_go_along(routing, format, align, kernel_device, draw_ids, assert_equals_reference):
    q, routing = make_quantized(routing, format, COMPACT, kernel_device, draw_ids, align)
    assert_equals_reference(permute, q, routing, layout=GEMM_READY)


@pytest.mark.parametrize("after", [None, *ScaleLayout])
@pytest.mark.parametrize("before", ScaleLayout)
@pytest.mark.parametrize("format", [*ROW_FORMATS, FP8_TENSOR, FP8_EXPERT], ids=lambda f: f.name)
def test_from_every_layout_to_every_layout(
    format, before, after, kernel_device, draw_ids, assert_equals_reference
):
    for case in ("zero tokens", "divides nothing"):
        q, routing = make_quantized(ROUTINGS[case], format, before, kernel_device, draw_ids)
        assert_equals_reference(permute, q, routing, layout=after)


def test_slots_of_no_choice(kernel_device, assert_equals_reference):
    nobody_S = torch.full((5,), -1, dtype=torch.int32, device=kernel_device)
    routing = Routing(nobody_S[:1] + 1, nobody_S.new_empty(3, 0), nobody_S)
    x_TD = torch.ones(3, 300, device=kernel_device)
    assert_equals_reference(permute, x_TD, routing)
    assert_equals_reference(permute, quantize(x_TD, MXFP8), routing)


def test_an_input_is_read_through_its_strides(
    kernel_device, draw_ids, assert_equals_reference, assert_same_bits
):
    x_TD, routing = make_inputs(ROUTINGS["divides nothing"], kernel_device, draw_ids)
    spread = x_TD.new_empty(2 * x_TD.shape[0], 3 * x_TD.shape[1])[::2, ::3].copy_(x_TD)
    for view in (x_TD.T.contiguous().T, spread, x_TD[:1].expand_as(x_TD)):
        assert_equals_reference(permute, view, routing)
    q, routing = make_quantized(
        ROUTINGS["divides nothing"], FP8_GROUP128, COMPACT, kernel_device, draw_ids
    )
    view = QTensor(q.data.T.contiguous().T, q.scale.T.contiguous().T, FP8_GROUP128)
    assert_same_bits(permute(view, routing, backend="triton"), permute(q, routing))


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize(
    "config", [PermuteConfig(128, 4, 2, 1), PermuteConfig(1024, 128, 8, 8, True)], ids=str
)
@EACH_SCALE
def test_any_config_gives_the_same_bits(
    format, config, layout, kernel_device, draw_ids, assert_same_bits
):
    case = ROUTINGS["all to one"]
    q, routing = make_quantized(case, format, layout, kernel_device, draw_ids)
    expected = permute(q, routing, backend="reference")
    assert_same_bits(kernel.permute(q, routing, layout=layout, config=config), expected)
    assert_same_bits(kernel.permute(q.data, routing, config=config), expected.data)
