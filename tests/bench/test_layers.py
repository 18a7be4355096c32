"""The layers to time: floors are those of the formula, choices those of the skew asked for, and the
float32 outputs those of the library, in every format.
"""

import pytest
import torch

from octomoe import FP8_BLOCK128, FP8_GROUP128, ExpertWeights, QTensor, fused_moe
from octomoe.bench.check import by_reference, in_float32, relative_error, some_tokens
from octomoe.bench.layers import (
    RECIPES,
    SCALING,
    SHAPES,
    Mode,
    Problem,
    Shape,
    Skew,
    Work,
    choices_of,
    make_experts,
    make_problem,
    work_of,
)

CASES = {
    "shared": Shape("", 5, 128, 256, 3, has_shared=True),
    "sizes that divide nothing": Shape("", 4, 96, 200, 2),
    "one choice": Shape("", 3, 64, 128, 1),
}


def on_meta(*size: int) -> QTensor:
    data = torch.empty(size, dtype=torch.float8_e4m3fn, device="meta")
    format = FP8_BLOCK128 if len(size) == 3 else FP8_GROUP128
    scale = torch.empty(format.scale_shape(size), device="meta")
    return QTensor(data, scale, format)


# Microseconds on an H200, whose ceilings are 4.3 TB/s and 1500 TFLOP/s.
@pytest.mark.parametrize(
    ("name", "num_tokens", "floor_us"),
    [
        ("Q3N", 8192, 105.3),
        ("DSV", 8192, 541.2),
        ("Q235", 2048, 146.3),
        ("Q235", 8192, 412.3),
        ("Q30", 8192, 412.3),
    ],
)
def test_floor_of_every_expert_active(name, num_tokens, floor_us):
    shape = SHAPES[name]
    w13 = on_meta(shape.num_experts, 2 * shape.width, shape.hidden_size)
    w2 = on_meta(shape.num_experts, shape.hidden_size, shape.width)
    ids_TA = torch.arange(num_tokens * shape.num_choices).view(num_tokens, -1) % shape.num_experts
    x = on_meta(num_tokens, shape.hidden_size)
    experts, recipe = ExpertWeights(w13, w2), RECIPES["block128"]
    problem = Problem(x.data, x, experts, ids_TA.float(), ids_TA, ids_TA.float(), recipe)
    work = work_of(problem)
    assert work.num_active == shape.num_experts
    assert work.floor_us(4.3, 1500.0) == pytest.approx(floor_us, abs=0.05)


def test_floor_is_the_larger_of_reading_and_computing():
    assert Work(1, 4_300_000, 0).floor_us(4.3, 1500.0) == pytest.approx(1.0)
    assert Work(1, 4_300_000, 3_000_000_000).floor_us(4.3, 1500.0) == pytest.approx(2.0)


def test_only_active_experts_count():
    problem = make_problem(CASES["one choice"], make_experts(CASES["one choice"], "cpu"), 1)
    assert work_of(problem) == Work(1, 3 * 64 * 128 + 3 * 128, 2 * 3 * 64 * 128)
    # A whole layer reads rows of bf16.
    assert work_of(problem, Mode.LAYER).num_bytes == 3 * 64 * 128 + 4 * 128


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_tokens_choose_distinct_experts_and_the_shared_one(shape):
    problem = make_problem(shape, make_experts(shape, "cpu"), 40)
    ids_TA = problem.topk_ids_TA
    assert ids_TA.shape == (40, shape.num_choices)
    assert ids_TA.dtype == torch.int32
    assert all(len(set(ids)) == shape.num_choices for ids in ids_TA.tolist())
    assert ids_TA.unique().tolist() == list(range(shape.num_experts))
    if shape.has_shared:
        assert (ids_TA[:, -1] == shape.num_experts - 1).all()
        # Only the routed experts are to be scaled.
        assert (problem.topk_weights_TA[:, -1] == 1 / SCALING).all()
    routed_TA = problem.topk_weights_TA[:, : shape.num_choices - shape.has_shared]
    torch.testing.assert_close(routed_TA.sum(1), torch.ones(40))


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64])
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_half_of_the_tokens_choose_the_first_expert(shape, num_tokens):
    problem = make_problem(shape, make_experts(shape, "cpu"), num_tokens, skew=Skew.SKEWED)
    ids_TA, weights_TA = problem.topk_ids_TA, problem.topk_weights_TA
    assert (ids_TA == 0).sum() == (num_tokens + 1) // 2
    assert all(len(set(ids)) == shape.num_choices for ids in ids_TA.tolist())
    # The others have weights too.
    assert (weights_TA > 0.005).all()


def test_the_other_choices_of_skewed_tokens_are_balanced():
    shape = Shape("", 16, 32, 32, 4)
    problem = make_problem(shape, make_experts(shape, "cpu"), 4000, skew=Skew.SKEWED)
    counts = problem.topk_ids_TA.flatten().bincount(minlength=16)
    assert counts[0] == 2000
    # 933 each, six deviations.
    assert (counts[1:] - 14000 / 15).abs().max() < 6 * (14000 / 15) ** 0.5


def test_choices_are_the_routers():
    problem = make_problem(CASES["shared"], make_experts(CASES["shared"], "cpu"), 5)
    weights_TA, ids_TA = choices_of(problem)
    assert torch.equal(weights_TA, problem.topk_weights_TA)
    assert torch.equal(ids_TA, problem.topk_ids_TA)


@pytest.mark.parametrize("name", RECIPES)
def test_every_format_is_close_to_float32(name):
    shape, recipe = Shape("", 4, 128, 256, 2), RECIPES[name]
    experts = make_experts(shape, "cpu", recipe)
    problem = make_problem(shape, experts, 24, recipe)
    w13, w2 = problem.weights
    assert w13.format == w2.format == recipe.weights
    assert isinstance(problem.x, QTensor) == (recipe.activations is not None)
    assert (experts.w2_input_scale is not None) == recipe.is_static
    tokens = some_tokens(problem)
    found_TD = by_reference(problem, tokens)
    assert found_TD.shape == (16, 256)
    error = relative_error(found_TD, in_float32(problem, tokens))
    # Nothing is quantised but weights, and those alike.
    assert error < 1e-5 if recipe.activations is None else 0.01 < error < 0.04


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_float32_outputs_are_those_of_unquantised_intermediates(shape):
    problem = make_problem(shape, make_experts(shape, "cpu"), 7)
    tokens = some_tokens(problem, 4)
    # Rows that stay as they are, and with them the intermediate.
    expected_TD = fused_moe(
        problem.x.dequantize(),
        problem.experts,
        problem.topk_weights_TA,
        problem.topk_ids_TA,
        routed_scaling_factor=SCALING,
        backend="reference",
    )
    torch.testing.assert_close(in_float32(problem, tokens), expected_TD[tokens])


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_quantising_the_intermediate_costs_some_percent(shape):
    problem = make_problem(shape, make_experts(shape, "cpu"), 24)
    tokens = some_tokens(problem)
    assert len(tokens) == 16
    error = relative_error(by_reference(problem, tokens), in_float32(problem, tokens))
    assert 0.01 < error < 0.04


def test_reference_of_some_tokens_is_that_of_all():
    shape = CASES["shared"]
    problem = make_problem(shape, make_experts(shape, "cpu"), 9)
    all_TD = by_reference(problem, torch.arange(9))
    torch.testing.assert_close(by_reference(problem, torch.tensor([7, 2])), all_TD[[7, 2]])
    assert sorted(some_tokens(problem).tolist()) == list(range(9))
