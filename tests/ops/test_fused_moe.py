"""`fused_moe`: a whole layer, for every pair of weight and activation formats, with every option.

Claimed: the output is that of a naive loop over tokens fed with the same quantised weights that
quantises at the same two points; against float32 each pair keeps a floor of quality.
C is the axis of the choices that were not dropped.
"""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

import octomoe
from octomoe import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_TENSOR,
    FP8_TOKEN,
    MXFP8,
    MXFP8_2D,
    SILU,
    Activation,
    ExpertWeights,
    Format,
    QTensor,
    activation_quantize,
    append_shared_experts,
    build_routing,
    permute,
    quantize,
    quantize_experts,
    unpermute,
)

# Kernels have tests of their own: tensor cores sum less exactly.
fused_moe, grouped_gemm = (
    partial(op, backend="reference") for op in (octomoe.fused_moe, octomoe.grouped_gemm)
)

# tokens, experts, choices, pattern of the ids, D, F
CASES = {
    "zero tokens": (0, 4, 2, "any", 64, 32),
    "one token": (1, 4, 2, "any", 64, 32),
    "an empty expert": (9, 4, 2, "hole", 64, 32),
    "all to one": (9, 4, 1, "one", 64, 32),
    "all dropped": (3, 4, 2, "none", 64, 32),
    "divides nothing": (17, 5, 3, "dropped", 131, 67),
    "an expert twice": (9, 3, 2, "twice", 64, 32),
    "real": (70, 8, 3, "any", 256, 192),
    "wide": pytest.param((300, 32, 6, "any", 512, 256), marks=pytest.mark.full),
}
SMALL = (17, 4, 2, "dropped", 160, 72)


@dataclass(frozen=True)
class Pair:
    """Formats of a layer, and the least dB against float32 that it must keep."""

    weights: Format | None
    activations: Format | None
    floor_db: float
    is_static: bool = False


# Floors are half a dB below what the reference reaches on the case "real".
PAIRS = {
    "unquantised": Pair(None, None, 100.0),
    "tensor x tensor": Pair(FP8_TENSOR, FP8_TENSOR, 23.4),
    "tensor x static": Pair(FP8_TENSOR, FP8_TENSOR, 23.2, is_static=True),
    "tensor x token": Pair(FP8_TENSOR, FP8_TOKEN, 23.5),
    "channel x token": Pair(FP8_CHANNEL, FP8_TOKEN, 23.5),
    "expert x token": Pair(FP8_EXPERT, FP8_TOKEN, 23.5),
    "block x group": Pair(FP8_BLOCK128, FP8_GROUP128, 23.6),
    "mx x mx": Pair(MXFP8, MXFP8, 23.2),
    "mx squares x mx": Pair(MXFP8_2D, MXFP8, 23.2),
    "tensor": Pair(FP8_TENSOR, None, 26.3),
    "channel": Pair(FP8_CHANNEL, None, 26.4),
    "expert": Pair(FP8_EXPERT, None, 26.3),
    "block": Pair(FP8_BLOCK128, None, 26.3),
    "mx": Pair(MXFP8, None, 26.2),
}


def each(names):
    return pytest.mark.parametrize("pair", [PAIRS[name] for name in names], ids=names)


EACH_PAIR = each(list(PAIRS))
EACH_QUANTIZED = each([name for name, pair in PAIRS.items() if pair.weights is not None])
# One scale for all experts cannot be appended to; nor is one for all rows the same for fewer.
EACH_BY_EXPERT = each([n for n, p in PAIRS.items() if FP8_TENSOR not in (p.weights, p.activations)])
EACH_BY_RANK = each([n for n, p in PAIRS.items() if p.activations != FP8_TENSOR or p.is_static])
EACH_DYNAMIC = each([n for n, p in PAIRS.items() if p.activations is not None and not p.is_static])
# Both sides do the same arithmetic, but not in the same order: an intermediate value next to a tie
# may round to the other side, which alone would leave some 55 dB; so would rounding y to bf16.
AGREES_DB = 50.0
ACTIVATIONS = (
    *("silu", "gelu", "gelu_tanh", "relu2", "silu:alpha=1.702,limit=7.0,up_offset=1.0"),
    *("silu:limit=0.5", "silu:output_limit=0.5", "relu2:ungated", "gelu:ungated"),
)
MAP = torch.tensor([-1, 2, 0, -1, 3, 1, -1])
OPTIONS = {
    "scaling": {"routed_scaling_factor": 2.5},
    "weight on input": {"apply_router_weight_on_input": True},
    "local experts": {"expert_map": MAP.int()},
    "all": {"expert_map": MAP, "apply_router_weight_on_input": True, "routed_scaling_factor": 0.5},
}


def make_experts(case, device, seed, activation=SILU, has_bias=True):
    _, num_experts, _, _, hidden_size, width = case
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * width if activation.gated else width

    def draw(*shape, deviation):
        return (deviation * torch.randn(shape, generator=generator)).to(device)

    return ExpertWeights(
        # Every intermediate value is of order one, as in a trained layer.
        w13=draw(num_experts, rows, hidden_size, deviation=hidden_size**-0.5),
        w2=draw(num_experts, hidden_size, width, deviation=width**-0.5),
        activation=activation,
        w13_bias=draw(num_experts, rows, deviation=0.2) if has_bias else None,
        w2_bias=draw(num_experts, hidden_size, deviation=0.2) if has_bias else None,
    )


def make_inputs(case, device, seed, draw_ids, num_global=None, dtype=torch.float32):
    num_tokens, num_experts, num_choices, pattern, hidden_size, _ = case
    # Not the seed of the weights: rows of x would be rows of w13.
    generator = torch.Generator().manual_seed(1000 + seed)
    x_TD = torch.randn(num_tokens, hidden_size, generator=generator).to(device, dtype)
    weights_TA = torch.rand(num_tokens, num_choices, generator=generator).to(device)
    ids_TA = draw_ids(num_tokens, num_global or num_experts, num_choices, pattern, seed)
    return x_TD, weights_TA, ids_TA.to(device)


def in_formats(experts, pair):
    """The experts as the pair has them; static scales that fit what the tests draw."""
    if pair.weights is not None:
        experts = quantize_experts(experts, pair.weights)
    if pair.is_static:
        scale, scale_mid = torch.tensor([[0.012], [0.03]], device=experts.device)
        experts = replace(experts, w13_input_scale=scale, w2_input_scale=scale_mid)
    return experts


@pytest.fixture
def naive_moe(naive_quantize, naive_values, naive_activation):
    """One token and one choice at a time, in float64; on the CPU."""

    def rounded(rows_CK, format, scale, dtype):
        if format is None:
            return rows_CK.to(dtype).double()
        is_static = scale is not None and format == FP8_TENSOR
        return naive_values(naive_quantize(rows_CK, format, scale.item() if is_static else None))

    def moe(inputs, experts, format=None, expert_map=None, **options):
        is_on_input = options.get("apply_router_weight_on_input", False)
        x_TD, weights_TA, ids_TA = (tensor.cpu() for tensor in inputs)
        dtype, scale_in, scale_mid = x_TD.dtype, experts.w13_input_scale, experts.w2_input_scale
        w13_END, w2_EDF = naive_values(experts.w13), naive_values(experts.w2)
        b13_EN, b2_ED = (
            torch.zeros(w.shape[:2]) if bias is None else bias.double().cpu()
            for w, bias in ((w13_END, experts.w13_bias), (w2_EDF, experts.w2_bias))
        )
        local = range(experts.num_experts) if expert_map is None else expert_map.tolist()
        choices = [
            (t, a, local[e])
            for t, ids in enumerate(ids_TA.tolist())
            for a, e in enumerate(ids)
            if e >= 0 and local[e] >= 0
        ]
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
        if not choices:
            return y_TD
        if is_on_input:
            rows = [(x_TD[t].float() * weights_TA[t, a]).to(dtype) for t, a, _ in choices]
            x_CD = rounded(torch.stack(rows), format, scale_in, dtype)
        else:
            x_TD = rounded(x_TD, format, scale_in, dtype)
            x_CD = torch.stack([x_TD[t] for t, _, _ in choices])
        h_CF = [
            naive_activation(w13_END[e] @ x_D + b13_EN[e], experts.activation)
            for x_D, (_, _, e) in zip(x_CD, choices, strict=True)
        ]
        h_CF = rounded(torch.stack(h_CF), format, scale_mid, dtype)
        for h_F, (t, a, e) in zip(h_CF, choices, strict=True):
            weight = 1.0 if is_on_input else weights_TA[t, a].double()
            y_TD[t] += weight * (w2_EDF[e] @ h_F + b2_ED[e])
        return options.get("routed_scaling_factor", 1.0) * y_TD

    return moe


@pytest.fixture
def assert_agrees(naive_moe, sqnr_db):
    def check(inputs, experts, pair, **options):
        y_TD = run(inputs, experts, pair, **options)
        assert (y_TD.dtype, y_TD.shape) == (inputs[0].dtype, inputs[0].shape)
        assert sqnr_db(naive_moe(inputs, experts, pair.activations, **options), y_TD) > AGREES_DB

    return check


def run(inputs, experts, pair, *, expert_map=None, **options):
    x_TD, weights_TA, ids_TA = inputs
    options["expert_map"] = None if expert_map is None else expert_map.to(x_TD.device)
    options["activation_format"] = pair.activations
    return fused_moe(x_TD, experts, weights_TA, ids_TA, **options)


def walk(inputs, experts, format):
    """The same layer op by op: quantised hidden states, quantised intermediate, output."""
    x_TD, weights_TA, ids_TA = inputs
    routing, options = build_routing(ids_TA, experts.num_experts), {"out_dtype": torch.float32}
    x = quantize(x_TD, format)
    h_SN = grouped_gemm(permute(x, routing), experts.w13, routing, bias=experts.w13_bias, **options)
    h = activation_quantize(h_SN, experts.activation, format)
    y_SD = grouped_gemm(h, experts.w2, routing, bias=experts.w2_bias, **options)
    return x, h, unpermute(y_SD, routing, weights_TA)


def experts_of(experts, keep):
    """Some of the experts, as a rank of expert parallelism holds them."""

    def take(x):
        return torch.stack([x[e].view(torch.uint8) for e in keep]).view(x.dtype)

    def cut(weight):
        if not isinstance(weight, QTensor):
            return weight[keep]
        scale = weight.scale if weight.format.block[0] != 1 else take(weight.scale)
        return QTensor(take(weight.data), scale, weight.format)

    biases = {"w13_bias": experts.w13_bias[keep], "w2_bias": experts.w2_bias[keep]}
    return replace(experts, w13=cut(experts.w13), w2=cut(experts.w2), **biases)


@EACH_PAIR
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_a_naive_loop(case, pair, device, draw_ids, assert_agrees):
    experts = in_formats(make_experts(case, device, seed=1, has_bias=False), pair)
    assert_agrees(make_inputs(case, device, 1, draw_ids), experts, pair)


@EACH_PAIR
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, pair, device, draw_ids, assert_agrees):
    experts = in_formats(make_experts(SMALL, device, seed=2), pair)
    num_global = 7 if "expert_map" in options else 4
    assert_agrees(make_inputs(SMALL, device, 2, draw_ids, num_global), experts, pair, **options)


@each(["unquantised", "channel x token", "mx x mx", "block"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, pair, device, draw_ids, assert_agrees):
    experts = in_formats(make_experts(SMALL, device, 3, Activation.parse(activation)), pair)
    assert_agrees(make_inputs(SMALL, device, 3, draw_ids), experts, pair)


@EACH_PAIR
@pytest.mark.parametrize("is_on_input", [False, True], ids=["after", "on input"])
def test_weights_of_dropped_choices_do_not_matter(
    is_on_input, pair, device, draw_ids, assert_same_bits
):
    experts = in_formats(make_experts(SMALL, device, seed=13), pair)
    x_TD, weights_TA, ids_TA = make_inputs(SMALL, device, 13, draw_ids)
    ids_TA[0, 0] = -1
    options = {"apply_router_weight_on_input": is_on_input}
    weights_TA[ids_TA < 0] = 1.0
    expected_TD = run((x_TD, weights_TA, ids_TA), experts, pair, **options)
    weights_TA[ids_TA < 0] = torch.nan
    assert_same_bits(run((x_TD, weights_TA, ids_TA), experts, pair, **options), expected_TD)


@EACH_PAIR
def test_hidden_states_in_bf16(pair, device, draw_ids, assert_agrees):
    experts = in_formats(make_experts(SMALL, device, seed=4), pair)
    inputs = make_inputs(SMALL, device, 4, draw_ids, dtype=torch.bfloat16)
    assert_agrees(inputs, experts, pair, apply_router_weight_on_input=True)


@EACH_BY_RANK
def test_ranks_sum_to_the_whole(pair, device, draw_ids, sqnr_db):
    experts = in_formats(make_experts(SMALL, device, seed=5), pair)
    inputs = make_inputs(SMALL, device, 5, draw_ids)
    y_TD = torch.zeros_like(inputs[0])
    for kept in ([2, 0], [3], [1]):
        expert_map = torch.tensor([kept.index(e) if e in kept else -1 for e in range(4)])
        y_TD += run(inputs, experts_of(experts, kept), pair, expert_map=expert_map)
    assert sqnr_db(run(inputs, experts, pair), y_TD) > 100


@EACH_BY_EXPERT
def test_shared_experts_are_experts_that_all_choose(pair, device, draw_ids, naive_moe, sqnr_db):
    factor, num_shared = 2.5, 2
    routed = in_formats(make_experts(SMALL, device, seed=6), pair)
    shared = in_formats(experts_of(make_experts(SMALL, device, seed=7), [0, 1]), pair)
    x_TD, weights_TA, ids_TA = make_inputs(SMALL, device, 6, draw_ids)
    all_weights_TA, all_ids_TA = append_shared_experts(
        weights_TA, ids_TA, num_experts=4, num_shared=num_shared, weight=1 / factor
    )
    y_TD = run(
        (x_TD, all_weights_TA, all_ids_TA),
        routed.append(shared),
        pair,
        routed_scaling_factor=factor,
    )
    to_all_TA = torch.arange(num_shared).expand(x_TD.shape[0], num_shared)
    expected_TD = naive_moe(
        (x_TD, weights_TA, ids_TA), routed, pair.activations, routed_scaling_factor=factor
    ) + naive_moe((x_TD, torch.ones(to_all_TA.shape), to_all_TA), shared, pair.activations)
    assert sqnr_db(expected_TD, y_TD) > AGREES_DB


@EACH_PAIR
def test_quality_against_float32(pair, device, draw_ids, naive_moe, sqnr_db):
    experts = make_experts(CASES["real"], device, seed=8, has_bias=False)
    inputs = make_inputs(CASES["real"], device, 8, draw_ids)
    y_TD = run(inputs, in_formats(experts, pair), pair)
    assert sqnr_db(naive_moe(inputs, experts), y_TD) > pair.floor_db


@EACH_QUANTIZED
def test_wrong_scale_is_noticed(pair, device, draw_ids, naive_moe, sqnr_db):
    experts = in_formats(make_experts(SMALL, device, seed=9), pair)
    inputs = make_inputs(SMALL, device, 9, draw_ids)
    expected_TD = naive_moe(inputs, experts, pair.activations)
    for name in ("w13", "w2"):
        weight = getattr(experts, name)
        scale = weight.scale.clone()
        scale[0, 0, 0] = 2 * scale[0, 0, 0].float()
        wrong = replace(experts, **{name: QTensor(weight.data, scale, weight.format)})
        assert sqnr_db(expected_TD, run(inputs, wrong, pair)) < AGREES_DB


def test_static_scale_equals_the_dynamic_one(device, draw_ids, assert_same_bits):
    pair = PAIRS["tensor x static"]
    experts = quantize_experts(make_experts(SMALL, device, seed=10), FP8_TENSOR)
    inputs = make_inputs(SMALL, device, 10, draw_ids)
    x, h, _ = walk(inputs, experts, pair.activations)
    static = replace(experts, w13_input_scale=x.scale, w2_input_scale=h.scale.reshape(()))
    assert_same_bits(run(inputs, static, pair), run(inputs, experts, pair))
    # It is used, since a smaller one saturates; and by this format alone.
    halved = replace(static, w2_input_scale=h.scale / 2)
    assert not torch.equal(run(inputs, halved, pair), run(inputs, experts, pair))
    by_token = PAIRS["tensor x token"]
    assert_same_bits(run(inputs, static, by_token), run(inputs, experts, by_token))


@EACH_DYNAMIC
def test_equals_the_unfused_walk(pair, device, draw_ids, sqnr_db):
    experts = in_formats(make_experts(SMALL, device, seed=11), pair)
    inputs = make_inputs(SMALL, device, 11, draw_ids)
    _, _, walked_TD = walk(inputs, experts, pair.activations)
    assert sqnr_db(walked_TD, run(inputs, experts, pair)) > AGREES_DB


@EACH_PAIR
def test_two_runs_are_identical_and_out_is_written(pair, device, draw_ids, assert_same_bits):
    experts = in_formats(make_experts(SMALL, device, seed=12), pair)
    inputs = make_inputs(SMALL, device, 12, draw_ids)
    y_TD, out_TD = run(inputs, experts, pair), torch.empty_like(inputs[0])
    assert run(inputs, experts, pair, out=out_TD) is out_TD
    assert_same_bits(out_TD, y_TD)
