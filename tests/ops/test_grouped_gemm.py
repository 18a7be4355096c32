"""`grouped_gemm` and its two gradients: each expert multiplies its own rows, in float32.

Claimed: the result is that of a naive loop over rows for every pair of formats; the gradients are
those of autograd; what belongs to no expert is exactly zero, whatever lies there.
"""

from functools import partial

import pytest
import torch

import octomoe
from octomoe import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_COLUMN128,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_TENSOR,
    FP8_TOKEN,
    MXFP8,
    MXFP8_2D,
    QTensor,
    ScaleLayout,
    build_routing,
    quantize,
)

# Kernels have tests of their own: tensor cores sum less exactly.
grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad = (
    partial(op, backend="reference")
    for op in (octomoe.grouped_gemm, octomoe.grouped_gemm_dgrad, octomoe.grouped_gemm_wgrad)
)

# rows of each expert, rows of none, N, K
CASES = {
    "zero tokens": ([0, 0, 0], 0, 24, 32),
    "one token": ([0, 1, 0], 0, 24, 32),
    "an empty expert": ([5, 0, 7], 0, 24, 160),
    "all to one": ([0, 0, 12], 0, 24, 160),
    "divides nothing": ([13, 1, 0, 29], 3, 37, 131),
    "rows of no expert only": ([0, 0], 5, 24, 32),
    "real": ([13, 0, 30, 5, 8, 1, 7, 6], 14, 192, 256),
    "wide": pytest.param(([300, 0, 513, 77], 41, 768, 1024), marks=pytest.mark.full),
}
# weights, rows
PAIRS = (
    (None, None),
    (FP8_TENSOR, FP8_TENSOR),
    (FP8_TENSOR, FP8_TOKEN),
    (FP8_CHANNEL, FP8_TOKEN),
    (FP8_EXPERT, FP8_TOKEN),
    (FP8_BLOCK128, FP8_GROUP128),
    (FP8_BLOCK128.derive(rounding="pow2"), FP8_GROUP128.derive(rounding="pow2")),
    (MXFP8, MXFP8),
    (MXFP8_2D, MXFP8),
    (FP8_TENSOR, None),
    (FP8_CHANNEL, None),
    (FP8_BLOCK128, None),
    (MXFP8, None),
)


def make_inputs(case, device, seed, dtype=torch.bfloat16):
    counts, num_tail, num_rows, depth = case
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    num_slots = sum(counts) + num_tail
    x_SK = torch.randn(num_slots, depth, generator=generator).to(device, dtype)
    w_ENK = torch.randn(len(counts), num_rows, depth, generator=generator).to(device, dtype)
    dy_SN = torch.randn(num_slots, num_rows, generator=generator).to(device, dtype)
    return x_SK, w_ENK, dy_SN, offsets


def in_format(x, format):
    return x if format is None else quantize(x, format)


def expert_of_rows(offsets):
    """(row, expert) of every row that belongs to one."""
    bounds = offsets.tolist()
    for e in range(len(bounds) - 1):
        for s in range(bounds[e], bounds[e + 1]):
            yield s, e


def pair_name(pair):
    return " x ".join("bf16" if f is None else f.name for f in pair)


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_equals_a_naive_loop(case, pair, device, naive_values, assert_gemm_close):
    x_SK, w_ENK, _, offsets = make_inputs(case, device, seed=1)
    w, x = in_format(w_ENK, pair[0]), in_format(x_SK, pair[1])
    bias_EN = torch.randn(w_ENK.shape[:2]).to(device)
    y_SN = grouped_gemm(x, w, offsets, bias=bias_EN, out_dtype=torch.float32)
    x_SK, w_ENK, bias_EN = naive_values(x), naive_values(w), bias_EN.double().cpu()
    expected_SN = torch.zeros(y_SN.shape, dtype=torch.float64)
    for s, e in expert_of_rows(offsets):
        expected_SN[s] = w_ENK[e] @ x_SK[s] + bias_EN[e]
    assert_gemm_close(y_SN, expected_SN, x_SK.shape[1])


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_dgrad_equals_a_naive_loop(case, pair, device, naive_values, assert_gemm_close):
    _, w_ENK, dy_SN, offsets = make_inputs(case, device, seed=2)
    w, dy = in_format(w_ENK, pair[0]), in_format(dy_SN, pair[1])
    dx_SK = grouped_gemm_dgrad(dy, w, offsets, out_dtype=torch.float32)
    dy_SN, w_ENK = naive_values(dy), naive_values(w)
    expected_SK = torch.zeros(dx_SK.shape, dtype=torch.float64)
    for s, e in expert_of_rows(offsets):
        expected_SK[s] = dy_SN[s] @ w_ENK[e]
    assert_gemm_close(dx_SK, expected_SK, dy_SN.shape[1])


@pytest.mark.parametrize("format", [None, FP8_TENSOR, FP8_TOKEN, FP8_COLUMN128, MXFP8])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_wgrad_equals_a_naive_loop(case, format, device, naive_values, assert_gemm_close):
    x_SK, _, dy_SN, offsets = make_inputs(case, device, seed=3)
    x, dy = in_format(x_SK, format), in_format(dy_SN, format)
    dw_ENK = grouped_gemm_wgrad(dy, x, offsets, out_dtype=torch.float32)
    x_SK, dy_SN = naive_values(x), naive_values(dy)
    expected_ENK = torch.zeros(dw_ENK.shape, dtype=torch.float64)
    for s, e in expert_of_rows(offsets):
        expected_ENK[e] += dy_SN[s, :, None] * x_SK[s, None, :]
    assert_gemm_close(dw_ENK, expected_ENK, max(case[0]))
    is_empty_E = (offsets.diff() == 0).to(dw_ENK.device)
    assert not dw_ENK[is_empty_E].any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_those_of_autograd(case, device, assert_gemm_close):
    x_SK, w_ENK, dy_SN, offsets = make_inputs(case, device, seed=4, dtype=torch.float32)
    leaf_x_SK, leaf_w_ENK = (t.double().requires_grad_() for t in (x_SK, w_ENK))
    bounds = offsets.tolist()
    loss = 0.0 * (leaf_x_SK.sum() + leaf_w_ENK.sum())
    for e in range(len(bounds) - 1):
        rows = slice(bounds[e], bounds[e + 1])
        loss = loss + (dy_SN[rows] * (leaf_x_SK[rows] @ leaf_w_ENK[e].T)).sum()
    loss.backward()
    dx_SK = grouped_gemm_dgrad(dy_SN, w_ENK, offsets, out_dtype=torch.float32)
    dw_ENK = grouped_gemm_wgrad(dy_SN, x_SK, offsets, out_dtype=torch.float32)
    assert_gemm_close(dx_SK, leaf_x_SK.grad, w_ENK.shape[1])
    assert_gemm_close(dw_ENK, leaf_w_ENK.grad, max(case[0]))


@pytest.mark.parametrize("is_quantized", [False, True])
def test_rows_of_no_expert_are_zero_even_if_nan_lies_there(is_quantized, device, assert_same_bits):
    x_SK, w_ENK, dy_SN, offsets = make_inputs(CASES["divides nothing"], device, seed=5)
    end = offsets[-1].item()
    spoiled_SK, spoiled_SN = x_SK.clone(), dy_SN.clone()
    spoiled_SK[end:], spoiled_SN[end:] = torch.nan, torch.nan
    if is_quantized:
        x_SK, dy_SN, w_ENK = (quantize(t, MXFP8) for t in (x_SK, dy_SN, w_ENK))
        spoiled_SK, spoiled_SN = quantize(spoiled_SK, MXFP8), quantize(spoiled_SN, MXFP8)
        assert spoiled_SK.dequantize()[end:].isnan().all()
    y_SN = grouped_gemm(spoiled_SK, w_ENK, offsets)
    dx_SK = grouped_gemm_dgrad(spoiled_SN, w_ENK, offsets)
    dw_ENK = grouped_gemm_wgrad(spoiled_SN, spoiled_SK, offsets)
    assert not y_SN[end:].any()
    assert not dx_SK[end:].any()
    assert_same_bits(y_SN, grouped_gemm(x_SK, w_ENK, offsets))
    assert_same_bits(dx_SK, grouped_gemm_dgrad(dy_SN, w_ENK, offsets))
    assert_same_bits(dw_ENK, grouped_gemm_wgrad(dy_SN, x_SK, offsets))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_is_rounded_once(out_dtype, device, assert_gemm_close):
    x_SK, w_ENK, dy_SN, offsets = make_inputs(CASES["real"], device, seed=6)
    for op, args in (
        (grouped_gemm, (x_SK, w_ENK)),
        (grouped_gemm_dgrad, (dy_SN, w_ENK)),
        (grouped_gemm_wgrad, (dy_SN, x_SK)),
    ):
        exact = op(*args, offsets, out_dtype=torch.float32)
        rounded = op(*args, offsets, out_dtype=out_dtype)
        assert rounded.dtype == out_dtype
        assert_gemm_close(rounded, exact.double().cpu(), 256)


def test_a_routing_is_as_good_as_its_offsets(device, draw_ids, assert_same_bits):
    routing = build_routing(draw_ids(70, 8, 3, "hole", 7).to(device), 8, align=8)
    num_slots, offsets = routing.num_slots, routing.expert_offsets
    x_SK, dy_SN = torch.randn(num_slots, 48).to(device), torch.randn(num_slots, 32).to(device)
    w_ENK = torch.randn(8, 32, 48).to(device)
    assert_same_bits(grouped_gemm(x_SK, w_ENK, routing), grouped_gemm(x_SK, w_ENK, offsets))
    by_routing, by_offsets = (grouped_gemm_dgrad(dy_SN, w_ENK, r) for r in (routing, offsets))
    assert_same_bits(by_routing, by_offsets)
    by_routing, by_offsets = (grouped_gemm_wgrad(dy_SN, x_SK, r) for r in (routing, offsets))
    assert_same_bits(by_routing, by_offsets)


@pytest.mark.parametrize("layout", ScaleLayout)
def test_layouts_change_no_bit(layout, device, assert_same_bits):
    x_SK, w_ENK, dy_SN, offsets = make_inputs(CASES["real"], device, seed=8)
    w, x, dy = (quantize(t, MXFP8) for t in (w_ENK, x_SK, dy_SN))
    laid_w, laid_x, laid_dy = (q.relayout(layout) for q in (w, x, dy))
    assert_same_bits(grouped_gemm(laid_x, laid_w, offsets), grouped_gemm(x, w, offsets))
    laid_SK = grouped_gemm_dgrad(laid_dy, laid_w, offsets)
    assert_same_bits(laid_SK, grouped_gemm_dgrad(dy, w, offsets))
    laid_ENK = grouped_gemm_wgrad(laid_dy, laid_x, offsets)
    assert_same_bits(laid_ENK, grouped_gemm_wgrad(dy, x, offsets))


def test_wrong_scale_is_noticed(device, naive_values, assert_gemm_close):
    x_SK, w_ENK, _, offsets = make_inputs(CASES["real"], device, seed=9)
    w, x = quantize(w_ENK, FP8_BLOCK128), quantize(x_SK, FP8_GROUP128)
    expected_SN = torch.zeros(x_SK.shape[0], w_ENK.shape[1], dtype=torch.float64)
    x_SK, w_ENK = naive_values(x), naive_values(w)
    for s, e in expert_of_rows(offsets):
        expected_SN[s] = w_ENK[e] @ x_SK[s]
    scale_Enk = w.scale.clone()
    scale_Enk[3, 1, 1] *= 1.01
    wrong = QTensor(w.data, scale_Enk, w.format)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_gemm_close(grouped_gemm(x, wrong, offsets), expected_SN, 256)


X_SK, W_ENK, DY_SN = torch.ones(4, 256), torch.ones(2, 3, 256), torch.ones(4, 3)
OFFSETS, BIAS_EN = torch.tensor([0, 1, 4], dtype=torch.int32), torch.ones(2, 3)
META = torch.device("meta")


def forward(x=X_SK, w=W_ENK, offsets=OFFSETS, **options):
    return lambda: grouped_gemm(x, w, offsets, **options)


def dgrad(dy=DY_SN, w=W_ENK, offsets=OFFSETS, **options):
    return lambda: grouped_gemm_dgrad(dy, w, offsets, **options)


def wgrad(dy=DY_SN, x=X_SK, offsets=OFFSETS, **options):
    return lambda: grouped_gemm_wgrad(dy, x, offsets, **options)


REFUSALS = [
    (TypeError, "grouped_gemm: x has dtype torch.int32, but needs float32", forward(X_SK.int())),
    (TypeError, "w has dtype .*; dequantize it first", forward(w=W_ENK.to(torch.float8_e4m3fn))),
    (ValueError, r"x has shape \(1, 4, 256\), but needs \[S, K\]", forward(X_SK[None])),
    (ValueError, r"w has shape \(3, 256\), but needs \[E, N, K\]", forward(w=W_ENK[0])),
    (ValueError, r"x has shape \(4, 7\), but needs \(4, 256\)", forward(X_SK[:, :7])),
    (
        ValueError,
        "formats of w and x are unquantised x fp8_row, but needs quantised weights with",
        forward(quantize(X_SK, FP8_TOKEN)),
    ),
    (
        ValueError,
        "are fp8_block128 x fp8_row, .*scaled along K by blocks of 128, as the weights are; leave",
        forward(quantize(X_SK, FP8_TOKEN), quantize(W_ENK, FP8_BLOCK128)),
    ),
    (
        ValueError,
        "are fp8_row x fp8_group128, but needs activations scaled along K by the whole axis",
        forward(quantize(X_SK, FP8_GROUP128), quantize(W_ENK, FP8_CHANNEL)),
    ),
    (
        ValueError,
        r"offsets are torch.int64 of shape \(3,\), but needs int32 of shape \(3,\), one more than",
        forward(offsets=OFFSETS.long()),
    ),
    (ValueError, r"offsets are torch.int32 of shape \(2,\)", forward(offsets=OFFSETS[1:])),
    (
        ValueError,
        r"offsets are \[1, 1, 4\], but needs a rising list from 0 to at most 4",
        forward(offsets=OFFSETS.clamp(min=1)),
    ),
    (ValueError, r"offsets are \[0, 1, 5\], but", forward(offsets=OFFSETS + OFFSETS // 4)),
    (ValueError, r"gemm_wgrad: offsets are \[0, 1, 0\], but", wgrad(offsets=OFFSETS % 4)),
    (ValueError, "offsets is on meta, but needs the oth", forward(offsets=OFFSETS.to(META))),
    (ValueError, "w is on meta, but needs the other", forward(w=W_ENK.to(META))),
    (TypeError, "bias has dtype torch.int32", forward(bias=BIAS_EN.int())),
    (ValueError, r"bias has shape \(3,\), but needs \(2, 3\)", forward(bias=BIAS_EN[0])),
    (ValueError, "bias is on meta", forward(bias=BIAS_EN.to(META))),
    (TypeError, "out_dtype is torch.int32, but needs float32", forward(out_dtype=torch.int32)),
    (TypeError, "grouped_gemm_dgrad: dy has dtype torch.int32", dgrad(DY_SN.int())),
    (ValueError, r"dy has shape \(3,\), but needs \[S, N\]", dgrad(DY_SN[0])),
    (ValueError, r"w has shape \(3, 256\), but needs \[E, N, K\]", dgrad(w=W_ENK[0])),
    (ValueError, r"dy has shape \(4, 256\), but needs \(4, 3\)", dgrad(X_SK)),
    (ValueError, "grouped_gemm_dgrad: offsets are", dgrad(offsets=OFFSETS[1:])),
    (ValueError, "grouped_gemm_dgrad: w is on meta", dgrad(w=W_ENK.to(META))),
    (TypeError, "_dgrad: out_dtype is torch.float64", dgrad(out_dtype=torch.float64)),
    (TypeError, "grouped_gemm_wgrad: x has dtype torch.int32", wgrad(x=X_SK.int())),
    (ValueError, r"dy has shape \(3,\), but needs \[S, N\]", wgrad(DY_SN[0])),
    (ValueError, r"x has shape \(256,\), but needs \[S, K\]", wgrad(x=X_SK[0])),
    (ValueError, r"x has shape \(3, 256\), but needs \(4, 256\)", wgrad(x=X_SK[:3])),
    (ValueError, r"offsets are torch.int32 of shape \(\), but needs", wgrad(offsets=OFFSETS[0])),
    (TypeError, "wgrad: routing_or_offsets is a list, but needs a Rout", wgrad(offsets=[0, 1])),
    (ValueError, "grouped_gemm_wgrad: offsets are torch.int64", wgrad(offsets=OFFSETS.long())),
    (ValueError, "grouped_gemm_wgrad: x is on meta", wgrad(x=X_SK.to(META))),
    (TypeError, "_wgrad: out_dtype is torch.int8", wgrad(out_dtype=torch.int8)),
]


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
