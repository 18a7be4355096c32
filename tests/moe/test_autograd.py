"""Gradients of permute and unpermute are those that torch finds through naive indexing.

Claimed: rows of no token neither get a gradient nor give one, whatever they hold.
"""

import pytest
import torch

from octomoe import build_routing
from octomoe.core.routing import weights_of_slots
from octomoe.moe.autograd import Permute, Unpermute

# tokens, experts, choices, pattern of the ids, width of a row
CASES = {
    "zero tokens": (0, 4, 2, "any", 24),
    "no choices": (3, 2, 0, "any", 24),
    "one token": (1, 4, 2, "any", 24),
    "an empty expert": (9, 4, 2, "hole", 24),
    "all to one": (9, 4, 1, "one", 24),
    "divides nothing": (37, 5, 3, "dropped", 131),
    "an expert twice": (37, 5, 3, "twice", 131),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_inputs(case, device, seed, draw_ids, dtype=torch.float32):
    """Numbers of few bits, so that sums are exact whatever their order."""
    num_tokens, num_experts, num_choices, pattern, width = case
    ids_TA = draw_ids(num_tokens, num_experts, num_choices, pattern, seed).to(device)
    routing = build_routing(ids_TA, num_experts, align=4)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-4, 5, shape, generator=generator).to(device, dtype).requires_grad_()

    x_TD, y_SD = draw(num_tokens, width), draw(routing.num_slots, width)
    return x_TD, y_SD, draw(num_tokens, num_choices), routing


def naive_permute(x_TD, routing):
    """By a matrix of zeros and ones, which torch differentiates by itself."""
    return slots_of_tokens(routing, x_TD.dtype).sum(1) @ x_TD


def naive_unpermute(y_SD, routing, weights_TA):
    return torch.einsum("sat,sd,ta->td", slots_of_tokens(routing, y_SD.dtype), y_SD, weights_TA)


def slots_of_tokens(routing, dtype):
    """``[S, A, T]``: one where the choice of the token has the slot."""
    slots_TA = routing.slot_of_choice_TA.T
    slot_S = torch.arange(routing.num_slots, device=slots_TA.device)
    return (slots_TA == slot_S[:, None, None]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_CASE
def test_permute(case, dtype, device, draw_ids):
    x_TD, dy_SD, _, routing = make_inputs(case, device, 1, draw_ids, dtype)
    y_SD = Permute.apply(x_TD, routing)
    expected_SD = naive_permute(x_TD, routing)
    torch.testing.assert_close(y_SD, expected_SD, rtol=0, atol=0)
    assert_same_gradients(y_SD, expected_SD, dy_SD, [x_TD])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_CASE
def test_unpermute_with_weights(case, dtype, device, draw_ids):
    dx_TD, y_SD, weights_TA, routing = make_inputs(case, device, 2, draw_ids, dtype)
    x_TD = Unpermute.apply(y_SD, routing, weights_TA)
    expected_TD = naive_unpermute(y_SD, routing, weights_TA)
    torch.testing.assert_close(x_TD, expected_TD, rtol=0, atol=0)
    assert_same_gradients(x_TD, expected_TD, dx_TD, [y_SD, weights_TA])


@EACH_CASE
def test_unpermute_without_weights(case, device, draw_ids):
    dx_TD, y_SD, weights_TA, routing = make_inputs(case, device, 3, draw_ids)
    x_TD = Unpermute.apply(y_SD, routing)
    expected_TD = naive_unpermute(y_SD, routing, torch.ones_like(weights_TA))
    assert_same_gradients(x_TD, expected_TD, dx_TD, [y_SD])


@EACH_CASE
def test_weights_of_slots(case, device, draw_ids):
    _, y_SD, weights_TA, routing = make_inputs(case, device, 4, draw_ids)
    weights_S = weights_of_slots(weights_TA, routing)
    expected_S = torch.einsum("sat,ta->s", slots_of_tokens(routing, weights_TA.dtype), weights_TA)
    assert torch.equal(weights_S, expected_S)
    assert_same_gradients(weights_S, expected_S, y_SD[:, 0], [weights_TA])


def test_rows_of_no_token_neither_get_nor_give_gradients(device, draw_ids):
    x_TD, y_SD, weights_TA, routing = make_inputs(CASES["divides nothing"], device, 5, draw_ids)
    is_empty_S = routing.choice_of_slot_S < 0
    assert is_empty_S.any()
    poisoned_SD = y_SD.detach().masked_fill(is_empty_S[:, None], torch.nan).requires_grad_()
    Permute.apply(x_TD, routing).backward(poisoned_SD.detach())
    Unpermute.apply(poisoned_SD, routing, weights_TA).sum().backward()
    weights_of_slots(weights_TA, routing).nansum().backward()
    for gradient in (x_TD.grad, poisoned_SD.grad, weights_TA.grad):
        assert gradient.isfinite().all()
    assert not poisoned_SD.grad[is_empty_S].any()


def test_weights_keep_their_dtype(device, draw_ids):
    _, y_SD, weights_TA, routing = make_inputs(CASES["one token"], device, 6, draw_ids)
    for dtype in DTYPES:
        weights = weights_TA.detach().to(dtype).requires_grad_()
        Unpermute.apply(y_SD.bfloat16(), routing, weights).sum().backward()
        assert weights.grad.dtype == dtype


def test_gradients_of_gradients_are_refused(device, draw_ids):
    x_TD, _, _, routing = make_inputs(CASES["one token"], device, 7, draw_ids)
    y_SD = Permute.apply(x_TD, routing)
    dy_SD = torch.ones_like(y_SD, requires_grad=True)
    (dx_TD,) = torch.autograd.grad(y_SD, x_TD, dy_SD, create_graph=True)
    with pytest.raises(NotImplementedError, match="unpermute: backward reached this op"):
        dx_TD.sum().backward()


def assert_same_gradients(actual, expected, gradient, inputs):
    found = torch.autograd.grad(actual, inputs, gradient.detach())
    wanted = torch.autograd.grad(expected, inputs, gradient.detach())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
