"""`unpermute_bwd`: slots get their token's gradient times their weight, weights an inner product.

Claimed: slots have the bits of a float32 product; weights a float32 sum, the same in every run.
"""

import pytest
import torch

from octomoe import build_routing, unpermute_bwd

# tokens, experts, choices, pattern of the ids, width of a row
CASES = {
    "zero tokens": (0, 4, 2, "any", 256),
    "no choices": (3, 2, 0, "any", 32),
    "one token": (1, 4, 2, "any", 256),
    "an empty expert": (9, 4, 2, "hole", 128),
    "all to one": (9, 4, 1, "one", 128),
    "all dropped": (9, 4, 2, "none", 128),
    "divides nothing": (37, 5, 3, "dropped", 131),
    "an expert twice": (37, 5, 3, "twice", 131),
    "real": (70, 8, 3, "any", 256),
    "wide": pytest.param((1000, 64, 8, "any", 1024), marks=pytest.mark.full),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_inputs(case, device, seed, draw_ids, align=1, dtype=torch.float32):
    num_tokens, num_experts, num_choices, pattern, width = case
    ids_TA = draw_ids(num_tokens, num_experts, num_choices, pattern, seed).to(device)
    routing = build_routing(ids_TA, num_experts, align=align)
    generator = torch.Generator().manual_seed(seed)
    dy_TD = torch.randn(num_tokens, width, generator=generator).to(device, dtype)
    y_SD = torch.randn(routing.num_slots, width, generator=generator).to(device, dtype)
    weights_TA = torch.rand(num_tokens, num_choices, generator=generator).to(device)
    return dy_TD, y_SD, routing, weights_TA


def naive_unpermute_bwd(dy_TD, y_SD, routing, weights_TA):
    """One choice at a time; products in float32, inner products in float64."""
    dy_slots_SD = torch.zeros(y_SD.shape).to(dy_TD.device, dy_TD.dtype)
    dweights_TA = torch.zeros(weights_TA.shape, dtype=torch.float64, device=dy_TD.device)
    for t, slots in enumerate(routing.slot_of_choice_TA.tolist()):
        for a, s in enumerate(slots):
            if s >= 0:
                dy_slots_SD[s] = (dy_TD[t].float() * weights_TA[t, a].float()).to(dy_TD.dtype)
                dweights_TA[t, a] = (y_SD[s].double() * dy_TD[t].double()).sum()
    return dy_slots_SD, dweights_TA


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_a_naive_loop(
    case, align, dtype, device, draw_ids, assert_same_bits, assert_gemm_close
):
    inputs = make_inputs(case, device, 1, draw_ids, align, dtype)
    dy_slots_SD, dweights_TA = unpermute_bwd(*inputs)
    expected_SD, expected_TA = naive_unpermute_bwd(*inputs)
    assert_same_bits(dy_slots_SD, expected_SD)
    assert dweights_TA.dtype == torch.float32
    assert_gemm_close(dweights_TA, expected_TA, inputs[0].shape[1])


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_weights_may_have_another_dtype(weight_dtype, device, draw_ids, assert_same_bits):
    case = CASES["divides nothing"]
    dy_TD, y_SD, routing, weights_TA = make_inputs(case, device, 2, draw_ids, 1, torch.bfloat16)
    weights_TA = weights_TA.to(weight_dtype)
    dy_slots_SD, dweights_TA = unpermute_bwd(dy_TD, y_SD, routing, weights_TA)
    expected = unpermute_bwd(dy_TD, y_SD.float(), routing, weights_TA.float())
    assert_same_bits(dy_slots_SD, expected[0])
    assert_same_bits(dweights_TA, expected[1])


def test_slots_of_no_token_are_never_read(device, draw_ids, assert_same_bits):
    dy_TD, y_SD, routing, weights_TA = make_inputs(
        CASES["divides nothing"], device, 3, draw_ids, align=8
    )
    expected = unpermute_bwd(dy_TD, y_SD, routing, weights_TA)
    y_SD[routing.choice_of_slot_S < 0] = torch.nan
    weights_TA[routing.slot_of_choice_TA < 0] = torch.nan
    for actual, wanted in zip(
        unpermute_bwd(dy_TD, y_SD, routing, weights_TA), expected, strict=True
    ):
        assert_same_bits(actual, wanted)


def test_wrong_weight_and_wrong_row_are_noticed(device, draw_ids):
    dy_TD, y_SD, routing, weights_TA = make_inputs(CASES["real"], device, 4, draw_ids)
    right_SD, right_TA = unpermute_bwd(dy_TD, y_SD, routing, weights_TA)
    slot = routing.slot_of_choice_TA[11, 2].item()
    weights_TA[11, 2] *= 1.25
    y_SD[slot] *= 1.25
    wrong_SD, wrong_TA = unpermute_bwd(dy_TD, y_SD, routing, weights_TA)
    assert (wrong_SD != right_SD).any(1).nonzero().flatten().tolist() == [slot]
    assert (wrong_TA != right_TA).nonzero().tolist() == [[11, 2]]


def test_two_runs_are_identical(device, draw_ids, assert_same_bits):
    inputs = make_inputs(CASES["real"], device, 5, draw_ids, dtype=torch.bfloat16)
    for first, second in zip(unpermute_bwd(*inputs), unpermute_bwd(*inputs), strict=True):
        assert_same_bits(first, second)


DY_TD, Y_SD, WEIGHTS_TA = torch.ones(2, 8), torch.ones(4, 8), torch.ones(2, 2)
ROUTING = build_routing(torch.tensor([[0, 1], [1, 0]]), 2)
REFUSALS = {
    "routing": (
        TypeError,
        "unpermute_bwd: routing is a NoneType, but needs a Routing, from build_routing",
        lambda: unpermute_bwd(DY_TD, Y_SD, None, WEIGHTS_TA),
    ),
    "no weights": (
        TypeError,
        "unpermute_bwd: weights is a NoneType, but needs a tensor",
        lambda: unpermute_bwd(DY_TD, Y_SD, ROUTING, None),
    ),
    "dtype": (
        TypeError,
        "unpermute_bwd: dy has dtype torch.int32, but needs float32",
        lambda: unpermute_bwd(DY_TD.int(), Y_SD, ROUTING, WEIGHTS_TA),
    ),
    "quantised": (
        TypeError,
        "y has dtype torch.float8_e4m3fn.*dequantize it first",
        lambda: unpermute_bwd(DY_TD, Y_SD.to(torch.float8_e4m3fn), ROUTING, WEIGHTS_TA),
    ),
    "tokens": (
        ValueError,
        r"dy has shape \(1, 8\), but needs 2 rows, the tokens of the routing",
        lambda: unpermute_bwd(DY_TD[:1], Y_SD, ROUTING, WEIGHTS_TA),
    ),
    "slots": (
        ValueError,
        r"y has shape \(4, 7\), but needs \(4, 8\)",
        lambda: unpermute_bwd(DY_TD, Y_SD[:, 1:], ROUTING, WEIGHTS_TA),
    ),
    "weights": (
        ValueError,
        r"weights has shape \(2, 1\), but needs \(2, 2\)",
        lambda: unpermute_bwd(DY_TD, Y_SD, ROUTING, WEIGHTS_TA[:, 1:]),
    ),
    "device": (
        ValueError,
        "weights is on meta, but needs the other tensors' device cpu",
        lambda: unpermute_bwd(DY_TD, Y_SD, ROUTING, WEIGHTS_TA.to("meta")),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
