"""`unpermute`: each token is the weighted float32 sum of its slots, in the order of its choices."""

import pytest
import torch

from octomoe import build_routing, permute, unpermute

# tokens, experts, choices, pattern of the ids, width of a row
CASES = {
    "zero tokens": (0, 4, 2, "any", 256),
    "no choices": (3, 2, 0, "any", 32),
    "one token": (1, 4, 2, "any", 256),
    "an empty expert": (9, 4, 2, "hole", 128),
    "all to one": (9, 4, 1, "one", 128),
    "divides nothing": (37, 5, 3, "dropped", 131),
    "an expert twice": (37, 5, 3, "twice", 131),
    "real": (70, 8, 3, "any", 256),
    "wide": pytest.param((1000, 64, 8, "any", 1024), marks=pytest.mark.full),
}


def make_inputs(case, device, seed, draw_ids, align=1, dtype=torch.float32):
    num_tokens, num_experts, num_choices, pattern, width = case
    ids_TA = draw_ids(num_tokens, num_experts, num_choices, pattern, seed).to(device)
    routing = build_routing(ids_TA, num_experts, align=align)
    generator = torch.Generator().manual_seed(seed)
    y_SD = torch.randn(routing.num_slots, width, generator=generator).to(device, dtype)
    weights_TA = torch.rand(num_tokens, num_choices, generator=generator).to(device)
    return y_SD, routing, weights_TA


def naive_unpermute(y_SD, routing, weights_TA=None):
    """One choice at a time; float32, whose rounding in this order is promised."""
    y_TD = torch.zeros(routing.num_tokens, y_SD.shape[1], device=y_SD.device)
    for t, slots in enumerate(routing.slot_of_choice_TA.tolist()):
        for a, s in enumerate(slots):
            if s >= 0:
                weight = 1.0 if weights_TA is None else weights_TA[t, a].float()
                y_TD[t] += y_SD[s].float() * weight
    return y_TD.to(y_SD.dtype)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_a_naive_loop(case, align, is_weighted, device, draw_ids, assert_same_bits):
    y_SD, routing, weights_TA = make_inputs(case, device, 1, draw_ids, align)
    weights = weights_TA if is_weighted else None
    assert_same_bits(unpermute(y_SD, routing, weights), naive_unpermute(y_SD, routing, weights))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_in_float32_and_rounds_once(dtype, weight_dtype, device, draw_ids, assert_same_bits):
    case = CASES["divides nothing"]
    y_SD, routing, weights_TA = make_inputs(case, device, 2, draw_ids, dtype=dtype)
    weights_TA = weights_TA.to(weight_dtype)
    expected_TD = naive_unpermute(y_SD, routing, weights_TA)
    assert_same_bits(unpermute(y_SD, routing, weights_TA), expected_TD)


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undoes_permute_of_one_choice(dtype, align, device, draw_ids, assert_same_bits):
    ids_TA = draw_ids(70, 8, 1, "any", 3).to(device)
    routing = build_routing(ids_TA, 8, align=align)
    x_TD = torch.randn(70, 131).to(device, dtype)
    assert_same_bits(unpermute(permute(x_TD, routing), routing), x_TD)


def test_slots_of_no_token_are_never_read(device, draw_ids, assert_same_bits):
    y_SD, routing, weights_TA = make_inputs(CASES["divides nothing"], device, 4, draw_ids, align=8)
    expected_TD = unpermute(y_SD, routing, weights_TA)
    y_SD[routing.choice_of_slot_S < 0] = torch.nan
    assert_same_bits(unpermute(y_SD, routing, weights_TA), expected_TD)


def test_dropped_choices_add_nothing_whatever_their_weight(device, draw_ids, assert_same_bits):
    y_SD, routing, weights_TA = make_inputs(CASES["divides nothing"], device, 5, draw_ids)
    expected_TD = unpermute(y_SD, routing, weights_TA)
    weights_TA[routing.slot_of_choice_TA < 0] = torch.nan
    assert_same_bits(unpermute(y_SD, routing, weights_TA), expected_TD)
    all_dropped = build_routing(torch.full((3, 2), -1, device=device), 4)
    assert not unpermute(torch.full((6, 8), torch.nan, device=device), all_dropped).any()


def test_wrong_weight_is_noticed(device, draw_ids):
    y_SD, routing, weights_TA = make_inputs(CASES["real"], device, 6, draw_ids)
    right_TD = unpermute(y_SD, routing, weights_TA)
    weights_TA[11, 2] *= 1.25
    is_changed_T = (unpermute(y_SD, routing, weights_TA) != right_TD).any(1)
    assert is_changed_T.nonzero().flatten().tolist() == [11]


def test_two_runs_are_identical(device, draw_ids, assert_same_bits):
    y_SD, routing, weights_TA = make_inputs(CASES["real"], device, 7, draw_ids)
    assert_same_bits(unpermute(y_SD, routing, weights_TA), unpermute(y_SD, routing, weights_TA))


Y_SD, ROUTING = torch.ones(4, 8), build_routing(torch.tensor([[0, 1], [1, 0]]), 2)
REFUSALS = {
    "routing": (
        TypeError,
        "unpermute: routing is a NoneType, but needs a Routing, from build_routing",
        lambda: unpermute(Y_SD, None),
    ),
    "dtype": (
        TypeError,
        "unpermute: y has dtype torch.int32, but needs float32",
        lambda: unpermute(Y_SD.int(), ROUTING),
    ),
    "quantised": (
        TypeError,
        "y has dtype torch.float8_e4m3fn.*dequantize it first",
        lambda: unpermute(Y_SD.to(torch.float8_e4m3fn), ROUTING),
    ),
    "rows": (
        ValueError,
        r"y has shape \(3, 8\), but needs 4 rows, the slots of the routing",
        lambda: unpermute(Y_SD[:3], ROUTING),
    ),
    "rank": (
        ValueError,
        r"y has shape \(8,\), but needs \[rows, columns\]",
        lambda: unpermute(Y_SD[0], ROUTING),
    ),
    "device": (
        ValueError,
        "routing is on cpu, but needs the other tensors' device meta",
        lambda: unpermute(Y_SD.to("meta"), ROUTING),
    ),
    "weights dtype": (
        TypeError,
        "weights has dtype torch.int32, but needs float32",
        lambda: unpermute(Y_SD, ROUTING, torch.ones(2, 2).int()),
    ),
    "weights shape": (
        ValueError,
        r"weights has shape \(2, 3\), but needs \(2, 2\)",
        lambda: unpermute(Y_SD, ROUTING, torch.ones(2, 3)),
    ),
    "weights device": (
        ValueError,
        "weights is on meta, but needs the other tensors' device cpu",
        lambda: unpermute(Y_SD, ROUTING, torch.ones(2, 2).to("meta")),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
