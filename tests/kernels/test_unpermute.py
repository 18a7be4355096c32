"""`unpermute` in Triton equals the reference bit for bit: dtypes, routings, NaN and -0."""

import pytest
import torch

from octomoe import build_routing, unpermute
from octomoe.core.routing import routing_of_slots, slots_of_mask
from octomoe.kernels import unpermute as kernel
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
    "more choices than are unrolled": (5, 32, 11, "dropped"),
}
EACH_ROUTING = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make_inputs(routing, device, draw_ids, width=131, align=4, dtype=torch.bfloat16):
    """Slots and weights of all magnitudes; where nothing may be read, both are NaN."""
    num_tokens, num_experts, num_choices, pattern = routing
    ids_TA = draw_ids(num_tokens, num_experts, num_choices, pattern).to(device)
    routing = build_routing(ids_TA, num_experts, align=align)
    shape = (routing.num_slots, width)
    y_SD = torch.randn(shape) * torch.exp2(torch.randint(-6, 6, shape).float())
    y_SD = y_SD.to(device, dtype)
    y_SD[routing.choice_of_slot_S < 0] = torch.nan
    weights_TA = torch.rand(num_tokens, num_choices).to(device)
    weights_TA[routing.slot_of_choice_TA < 0] = torch.nan
    return y_SD, routing, weights_TA


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("align", [1, 4, 16])
@EACH_ROUTING
def test_equals_the_reference(
    routing, align, is_weighted, kernel_device, draw_ids, assert_equals_reference
):
    y_SD, routing, weights_TA = make_inputs(routing, kernel_device, draw_ids, align=align)
    assert_equals_reference(unpermute, y_SD, routing, weights_TA if is_weighted else None)


@pytest.mark.parametrize("width", [0, 1, 3000])
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_float_dtype(
    dtype, weight_dtype, width, kernel_device, draw_ids, assert_equals_reference
):
    case = ROUTINGS["more choices than are unrolled"]
    y_SD, routing, weights_TA = make_inputs(case, kernel_device, draw_ids, width, dtype=dtype)
    assert_equals_reference(unpermute, y_SD, routing, weights_TA.to(weight_dtype))
    assert_equals_reference(unpermute, y_SD, routing)


@pytest.mark.parametrize("value", [0.0, -0.0, torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_rows(dtype, value, kernel_device, draw_ids, assert_same_bits):
    case = ROUTINGS["divides nothing"]
    y_SD, routing, weights_TA = make_inputs(case, kernel_device, draw_ids, dtype=dtype)
    y_SD[:, 7] = value
    y_SD[routing.choice_of_slot_S == 0] = value
    for weights in (weights_TA, -weights_TA, None):
        actual, expected = (
            unpermute(y_SD, routing, weights, backend=backend)
            for backend in ("triton", "reference")
        )
        # Torch has two NaN of fp16 on a CPU, one of them in the last elements of a tensor.
        assert torch.equal(actual.isnan(), expected.isnan())
        assert_same_bits(
            torch.where(actual.isnan(), 0.0, actual), torch.where(expected.isnan(), 0.0, expected)
        )


@pytest.mark.parametrize("num_experts", [17, 40])
def test_masks(num_experts, kernel_device, assert_equals_reference):
    mask_TE = torch.rand(19, num_experts, device=kernel_device) < 0.2
    mask_TE[3], mask_TE[4] = False, True
    weights_TE = torch.rand(mask_TE.shape, device=kernel_device).masked_fill(~mask_TE, torch.nan)
    for num_slots in (5, int(mask_TE.sum()) + 3):
        routing = routing_of_slots(slots_of_mask(mask_TE), num_slots)
        y_SD = torch.randn(num_slots, 300).to(kernel_device, torch.bfloat16)
        for weights in (weights_TE, None):
            assert_equals_reference(unpermute, y_SD, routing, weights)


def test_inputs_are_read_through_their_strides(kernel_device, draw_ids, assert_equals_reference):
    y_SD, routing, weights_TA = make_inputs(ROUTINGS["eight choices"], kernel_device, draw_ids)
    spread = y_SD.new_empty(2 * y_SD.shape[0], 3 * y_SD.shape[1])[::2, ::3].copy_(y_SD)
    for y in (y_SD.T.contiguous().T, spread, y_SD[:1].expand_as(y_SD)):
        for weights in (weights_TA.T.contiguous().T, weights_TA[:, :1].expand_as(weights_TA)):
            assert_equals_reference(unpermute, y, routing, weights)


CONFIGS = [PermuteConfig(32, num_warps=1), PermuteConfig(1024), PermuteConfig(64, is_sparse=True)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_any_config_gives_the_same_bits(config, kernel_device, draw_ids, assert_same_bits):
    y_SD, routing, weights_TA = make_inputs(ROUTINGS["eight choices"], kernel_device, draw_ids)
    for weights in (weights_TA, None):
        expected = unpermute(y_SD, routing, weights, backend="reference")
        assert_same_bits(kernel.unpermute(y_SD, routing, weights, config=config), expected)
