"""`unpermute_bwd` in Triton: slots have the reference's bits, weights a float32 sum's error.

Claimed: nothing is read where there is no choice, all of the results is written, runs agree.
"""

import pytest
import torch

from octomoe import build_routing, unpermute_bwd
from octomoe.core.routing import routing_of_slots, slots_of_mask
from octomoe.kernels import unpermute_bwd as kernel
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
    "more choices than are looked at at once": (7, 80, 70, "dropped"),
}
EACH_ROUTING = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make_inputs(routing, device, draw_ids, width=131, align=4, dtype=torch.bfloat16):
    """Numbers of all magnitudes; where nothing may be read, slots and weights are NaN."""
    num_tokens, num_experts, num_choices, pattern = routing
    ids_TA = draw_ids(num_tokens, num_experts, num_choices, pattern).to(device)
    return with_routing(build_routing(ids_TA, num_experts, align=align), width, dtype)


def with_routing(routing, width=131, dtype=torch.bfloat16):
    def draw(*shape):
        magnitudes = torch.exp2(torch.randint(-6, 6, shape).float())
        return (torch.randn(shape) * magnitudes).to(routing.expert_offsets.device, dtype)

    dy_TD, y_SD = draw(routing.num_tokens, width), draw(routing.num_slots, width)
    weights_TA = torch.rand(routing.slot_of_choice_TA.shape).to(dy_TD.device)
    y_SD[routing.choice_of_slot_S < 0] = torch.nan
    weights_TA[routing.slot_of_choice_TA < 0] = torch.nan
    return dy_TD, y_SD, routing, weights_TA


@pytest.fixture
def assert_equals_reference(assert_same_bits, assert_gemm_close):
    def check(dy_TD, y_SD, routing, weights_TA, run=None):
        inputs = dy_TD, y_SD, routing, weights_TA
        actual_SD, actual_TA = run(*inputs) if run else unpermute_bwd(*inputs, backend="triton")
        expected_SD, _ = unpermute_bwd(*inputs, backend="reference")
        assert_same_bits(actual_SD, expected_SD)
        assert (actual_TA.dtype, actual_TA.shape) == (torch.float32, weights_TA.shape)
        slots_TA = routing.slot_of_choice_TA
        assert not actual_TA[slots_TA < 0].any()
        token_C, choice_C = (slots_TA >= 0).nonzero(as_tuple=True)
        products = y_SD[slots_TA[token_C, choice_C].long()].double() * dy_TD[token_C].double()
        assert_gemm_close(actual_TA[token_C, choice_C], products.sum(dim=1), dy_TD.shape[1])

    return check


@pytest.mark.parametrize("align", [1, 4, 16])
@EACH_ROUTING
def test_equals_the_reference(routing, align, kernel_device, draw_ids, assert_equals_reference):
    assert_equals_reference(*make_inputs(routing, kernel_device, draw_ids, align=align))


@pytest.mark.parametrize("width", [0, 1, 5000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_float_dtype(dtype, width, kernel_device, draw_ids, assert_equals_reference):
    case = ROUTINGS["divides nothing"]
    dy_TD, y_SD, routing, weights_TA = make_inputs(
        case, kernel_device, draw_ids, width, dtype=dtype
    )
    for other in FLOATS:
        assert_equals_reference(dy_TD, y_SD.to(other), routing, weights_TA.to(other))


@pytest.mark.parametrize("num_experts", [17, 40])
def test_masks(num_experts, kernel_device, assert_equals_reference):
    mask_TE = torch.rand(19, num_experts, device=kernel_device) < 0.2
    mask_TE[3], mask_TE[4] = False, True
    for num_slots in (5, int(mask_TE.sum()) + 3):
        routing = routing_of_slots(slots_of_mask(mask_TE), num_slots)
        assert_equals_reference(*with_routing(routing))


def test_numbers_that_are_not_finite(kernel_device, draw_ids, assert_same_bits):
    inputs = make_inputs(ROUTINGS["eight choices"], kernel_device, draw_ids, dtype=torch.float32)
    dy_TD, y_SD, _, weights_TA = inputs
    dy_TD[:5, 7], weights_TA[6:9, 2], y_SD[:20, 3] = torch.inf, torch.nan, -torch.inf
    actual, expected = (unpermute_bwd(*inputs, backend=name) for name in ("triton", "reference"))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.isinf(), other.isinf())
    is_number = ~expected[0].isnan()
    assert_same_bits(actual[0][is_number], expected[0][is_number])


def test_inputs_are_read_through_their_strides(kernel_device, draw_ids, assert_equals_reference):
    dy_TD, y_SD, routing, weights_TA = make_inputs(
        ROUTINGS["divides nothing"], kernel_device, draw_ids
    )
    weights_TA = weights_TA.T.contiguous().T
    assert_equals_reference(dy_TD.T.contiguous().T, y_SD.T.contiguous().T, routing, weights_TA)
    spread = y_SD.new_empty(2 * y_SD.shape[0], 3 * y_SD.shape[1])[::2, ::3].copy_(y_SD)
    assert_equals_reference(dy_TD[:1].expand_as(dy_TD), spread, routing, weights_TA)


@pytest.mark.parametrize(
    "config", [PermuteConfig(32, num_warps=1), PermuteConfig(1024, slots=4, scales=256)], ids=str
)
def test_any_config_is_as_exact(config, kernel_device, draw_ids, assert_equals_reference):
    inputs = make_inputs(ROUTINGS["an expert twice"], kernel_device, draw_ids, 300, 8)
    assert_equals_reference(
        *inputs, run=lambda *inputs: kernel.unpermute_bwd(*inputs, config=config)
    )


def test_two_runs_are_identical(kernel_device, draw_ids, assert_same_bits):
    inputs = make_inputs(ROUTINGS["eight choices"], kernel_device, draw_ids, 3000)
    first, second = (unpermute_bwd(*inputs, backend="triton") for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other)
