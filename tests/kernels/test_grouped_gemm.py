"""`grouped_gemm` and its gradients in Triton: the sums of the reference, for every pair of formats.

Claimed: float32 sums of the numbers that formats stand for, whatever the way through the kernel;
rows of no expert and experts of no rows are zero; a NaN goes where the reference lets it go; the
same bits at every run and for every layout of the scales.
"""

from dataclasses import replace

import pytest
import torch

from octomoe import (
    E5M2,
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_COLUMN128,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_TENSOR,
    FP8_TOKEN,
    GEMM_READY,
    INTERLEAVED,
    MXFP8,
    MXFP8_2D,
    MXFP8_E5M2,
    Format,
    QTensor,
    grouped_gemm,
    grouped_gemm_dgrad,
    grouped_gemm_wgrad,
    quantize,
)
from octomoe.core.device import Target
from octomoe.core.formats import E4M3FN
from octomoe.core.routing import routing_of_slots
from octomoe.tune.configs import GemmConfig
from octomoe.tune.lookup import grouped_gemm_config, grouped_gemm_wgrad_config

# rows of each expert, rows of none, N, K
RAGGED = ([13, 1, 0, 29], 3, 37, 131)
FEW = ([9, 0, 22], 3, 48, 160)
MANY = ([70, 0, 130], 5, 48, 160)
CASES = {
    "zero tokens": ([0, 0, 0], 0, 24, 32),
    "one token": ([0, 1, 0], 0, 24, 32),
    "all to one": ([0, 0, 12], 0, 24, 160),
    "rows of no expert only": ([0, 0], 5, 24, 32),
    "no depth": ([2, 3], 1, 24, 0),
    "no columns": ([2, 3], 1, 0, 32),
    "no experts": ([], 4, 24, 32),
    "real": pytest.param(([13, 0, 30, 5, 8, 1, 7, 6], 14, 384, 512), marks=pytest.mark.full),
}
PLAIN = (torch.bfloat16, torch.float16, torch.float32)
POW2 = {f: f.derive(rounding="pow2") for f in (FP8_BLOCK128, FP8_GROUP128, FP8_COLUMN128)}
# weights, rows
PAIRS = (
    (None, None),
    (FP8_TENSOR, FP8_TENSOR),
    (FP8_EXPERT, FP8_TOKEN),
    (FP8_CHANNEL, FP8_TOKEN.derive(element=E5M2)),
    (FP8_BLOCK128, FP8_GROUP128),
    (POW2[FP8_BLOCK128], POW2[FP8_GROUP128]),
    (FP8_GROUP128, FP8_GROUP128),
    (FP8_COLUMN128, FP8_COLUMN128),
    (MXFP8, MXFP8),
    (MXFP8_2D, MXFP8_E5M2),
    (Format.parse("fp8[2,3,5]"), Format.parse("fp8[1,1,5]")),
    (FP8_CHANNEL, None),
    (FP8_BLOCK128, None),
    (MXFP8, None),
)
ROW_FORMATS = (
    None,
    FP8_TENSOR,
    FP8_TOKEN,
    POW2[FP8_GROUP128],
    FP8_COLUMN128,
    POW2[FP8_COLUMN128],
    MXFP8,
    MXFP8_2D,
    Format.parse("fp8[1,3,5]"),
)
RAGGED_OR_FEW = pytest.mark.parametrize("case", [RAGGED, FEW], ids=["ragged", "few"])
RAGGED_OR_MANY = pytest.mark.parametrize("case", [RAGGED, MANY], ids=["ragged", "many"])
FEW_OR_MANY = pytest.mark.parametrize("case", [FEW, MANY], ids=["few", "many"])


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
    return x if format is None else quantize(x, format, backend="reference")


def pair_name(pair):
    return " x ".join("plain" if f is None else f.name for f in pair)


def format_name(format):
    return "plain" if format is None else format.name


def values(x):
    return (x.dequantize() if isinstance(x, QTensor) else x).double().cpu()


def groups(offsets):
    bounds = offsets.tolist()
    return [(e, slice(bounds[e], bounds[e + 1])) for e in range(len(bounds) - 1)]


def forward_of(x_SK, w_ENK, offsets):
    y_SN = torch.zeros(x_SK.shape[0], w_ENK.shape[1], dtype=torch.float64)
    for e, rows in groups(offsets):
        y_SN[rows] = x_SK[rows] @ w_ENK[e].T
    return y_SN


def dgrad_of(dy_SN, w_ENK, offsets):
    return forward_of(dy_SN, w_ENK.mT, offsets)


def wgrad_of(dy_SN, x_SK, offsets):
    shape = (offsets.shape[0] - 1, dy_SN.shape[1], x_SK.shape[1])
    dw_ENK = torch.zeros(shape, dtype=torch.float64)
    for e, rows in groups(offsets):
        dw_ENK[e] = dy_SN[rows].T @ x_SK[rows]
    return dw_ENK


EXPECTED = {
    grouped_gemm: forward_of,
    grouped_gemm_dgrad: dgrad_of,
    grouped_gemm_wgrad: wgrad_of,
}


@pytest.fixture(scope="session")
def assert_product_close(assert_gemm_close, sqnr_db):
    """Run an op in Triton and compare it with the float64 result for the same operands.

    The interpreter sums in float32 (`assert_gemm_close`). Tensor cores lose more, in proportion to
    the sum of magnitudes M = sum |a| |b|:

    - bytes: of 32 products and the sum so far, each is cut to 13 bits below the largest of them,
      toward zero. At most 33 * 2^-13 of that one are lost, which is an eighth of what lies there,
      and the next 32 may lose as much; of M, that is 2^-11.
    - float32 made of bytes and exact scales, as TF32: 2^-10 of each value, 2^-9 of M.
    - bf16 and fp16: cut below 24 bits; 2^-20 of M.

    These are bounds. Errors of many values cancel: the noise stays 40 dB below the signal.
    """

    def check(op, a, b, offsets, depth, **options):
        actual = op(a, b, offsets, out_dtype=torch.float32, backend="triton", **options)
        expected = EXPECTED[op](values(a), values(b), offsets.cpu())
        if actual.device.type == "cpu":
            assert_gemm_close(actual, expected, depth)
        else:
            lost = 2.0**-20
            if isinstance(a, QTensor) or isinstance(b, QTensor):
                formats = [x.format for x in (a, b) if isinstance(x, QTensor)]
                is_exact = any(format.rounding == "exact" for format in formats)
                lost = 2.0**-9 if is_exact else 2.0**-11
            bound = lost * EXPECTED[op](values(a).abs(), values(b).abs(), offsets.cpu())
            assert ((actual.double().cpu() - expected).abs() <= bound).all()
        if expected.any():
            assert sqnr_db(expected, actual) > 40

    return check


@pytest.mark.parametrize("case", [RAGGED, FEW, MANY], ids=["ragged", "few", "many"])
@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
def test_forward_of_every_pair(pair, case, kernel_device, assert_product_close):
    x_SK, w_ENK, _, offsets = make_inputs(case, kernel_device, seed=1)
    x, w = in_format(x_SK, pair[1]), in_format(w_ENK, pair[0])
    assert_product_close(grouped_gemm, x, w, offsets, case[3])


@RAGGED_OR_MANY
@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
def test_dgrad_of_every_pair(pair, case, kernel_device, assert_product_close):
    _, w_ENK, dy_SN, offsets = make_inputs(case, kernel_device, seed=2)
    dy, w = in_format(dy_SN, pair[1]), in_format(w_ENK, pair[0])
    assert_product_close(grouped_gemm_dgrad, dy, w, offsets, case[2])


@RAGGED_OR_FEW
@pytest.mark.parametrize("format", ROW_FORMATS, ids=format_name)
def test_wgrad_of_every_format(format, case, kernel_device, assert_product_close):
    x_SK, _, dy_SN, offsets = make_inputs(case, kernel_device, seed=3)
    dy, x = in_format(dy_SN, format), in_format(x_SK, format)
    assert_product_close(grouped_gemm_wgrad, dy, x, offsets, max(case[0]))


@pytest.mark.parametrize("pair", [(None, None), (FP8_BLOCK128, FP8_GROUP128), (MXFP8, MXFP8)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_shape(case, pair, kernel_device, assert_product_close):
    x_SK, w_ENK, dy_SN, offsets = make_inputs(case, kernel_device, seed=4)
    x, w, dy = in_format(x_SK, pair[1]), in_format(w_ENK, pair[0]), in_format(dy_SN, pair[1])
    assert_product_close(grouped_gemm, x, w, offsets, case[3])
    assert_product_close(grouped_gemm_dgrad, dy, w, offsets, case[2])
    assert_product_close(grouped_gemm_wgrad, dy, x, offsets, max(case[0], default=0))


@pytest.mark.parametrize("x_dtype", PLAIN, ids=str)
@pytest.mark.parametrize("w_dtype", [*PLAIN, FP8_BLOCK128, MXFP8], ids=str)
def test_plain_rows_of_every_dtype(w_dtype, x_dtype, kernel_device, assert_product_close):
    x_SK, w_ENK, _, offsets = make_inputs(FEW, kernel_device, seed=5, dtype=torch.float32)
    w = quantize(w_ENK, w_dtype) if isinstance(w_dtype, Format) else w_ENK.to(w_dtype)
    assert_product_close(grouped_gemm, x_SK.to(x_dtype), w, offsets, FEW[3])


@pytest.mark.parametrize("out_dtype", PLAIN, ids=str)
@FEW_OR_MANY
def test_bias_and_dtype_of_the_result(case, out_dtype, kernel_device):
    x_SK, w_ENK, _, offsets = make_inputs(case, kernel_device, seed=6)
    bias_NE = torch.randn(w_ENK.shape[1], w_ENK.shape[0], device=kernel_device)
    x, w = quantize(x_SK, FP8_GROUP128), quantize(w_ENK, FP8_BLOCK128)
    bias_EN = bias_NE.to(torch.bfloat16).T
    y_SN = grouped_gemm(x, w, offsets, bias=bias_EN, out_dtype=out_dtype, backend="triton")
    assert y_SN.dtype == out_dtype
    expected_SN = grouped_gemm(x, w, offsets, out_dtype=torch.float32, backend="triton")
    for e, rows in groups(offsets):
        expected_SN[rows] += bias_EN[e].float()
    assert torch.equal(y_SN, expected_SN.to(out_dtype))


@pytest.mark.parametrize("layout", [GEMM_READY, INTERLEAVED])
@pytest.mark.parametrize(
    ("case", "pair"),
    [(MANY, (FP8_BLOCK128, FP8_GROUP128)), (FEW, (MXFP8, MXFP8))],
    ids=["many", "few"],
)
def test_layouts_change_no_bit(case, pair, layout, kernel_device, assert_same_bits):
    x_SK, w_ENK, dy_SN, offsets = make_inputs(case, kernel_device, seed=7)
    x, w, dy = in_format(x_SK, pair[1]), in_format(w_ENK, pair[0]), in_format(dy_SN, pair[1])
    laid_w, laid_x, laid_dy = (q.relayout(layout) for q in (w, x, dy))
    for op, laid, plain in (
        (grouped_gemm, (laid_x, laid_w), (x, w)),
        (grouped_gemm_dgrad, (laid_dy, laid_w), (dy, w)),
        (grouped_gemm_wgrad, (laid_dy, laid_x), (dy, x)),
    ):
        expected = op(*plain, offsets, backend="triton")
        assert_same_bits(op(*laid, offsets, backend="triton"), expected)


def turned(x):
    """The same value, whose neighbours in memory are those of the other axis."""
    if isinstance(x, QTensor):
        return QTensor(turned(x.data), turned(x.scale), x.format)
    return x.mT.clone(memory_format=torch.contiguous_format).mT


@pytest.mark.parametrize("pair", [(None, None), (FP8_BLOCK128, FP8_GROUP128), (MXFP8, MXFP8)])
@FEW_OR_MANY
def test_operands_are_read_through_their_strides(case, pair, kernel_device, assert_product_close):
    x_SK, w_ENK, dy_SN, offsets = make_inputs(case, kernel_device, seed=8)
    x, w, dy = in_format(x_SK, pair[1]), in_format(w_ENK, pair[0]), in_format(dy_SN, pair[1])
    assert_product_close(grouped_gemm, x, turned(w), offsets, case[3])
    assert_product_close(grouped_gemm, turned(x), turned(w), offsets, case[3])
    assert_product_close(grouped_gemm_dgrad, dy, turned(w), offsets, case[2])
    assert_product_close(grouped_gemm_wgrad, turned(dy), turned(x), offsets, max(case[0]))


@pytest.mark.parametrize("pair", [(None, None), (FP8_BLOCK128, FP8_GROUP128), (MXFP8, MXFP8)])
def test_any_configuration_gives_the_same_sums(pair, kernel_device, assert_gemm_close):
    from octomoe.kernels.grouped_gemm import grouped_gemm as kernel

    x_SK, w_ENK, _, offsets = make_inputs(FEW, kernel_device, seed=9)
    x, w = in_format(x_SK, pair[1]), in_format(w_ENK, pair[0])
    expected_SN = forward_of(values(x), values(w), offsets)
    for config in (
        GemmConfig(16, 32, 64, group=1, is_swapped=True),
        GemmConfig(32, 16, 128, parts=2, is_swapped=True),
        GemmConfig(16, 64, 128, parts=4, group=3),
        GemmConfig(64, 16, 32, num_warps=8),
    ):
        y_SN = kernel(x, w, offsets, out_dtype=torch.float32, config=config)
        if kernel_device.type == "cpu":
            assert_gemm_close(y_SN, expected_SN, FEW[3])
        torch.testing.assert_close(y_SN.double().cpu(), expected_SN, rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("pair", [(FP8_BLOCK128, FP8_GROUP128), (MXFP8, MXFP8)], ids=pair_name)
def test_two_runs_give_the_same_bits(pair, kernel_device, assert_same_bits):
    x_SK, w_ENK, dy_SN, offsets = make_inputs(FEW, kernel_device, seed=10)
    x, w, dy = in_format(x_SK, pair[1]), in_format(w_ENK, pair[0]), in_format(dy_SN, pair[1])
    for op, a, b in (
        (grouped_gemm, x, w),
        (grouped_gemm_dgrad, dy, w),
        (grouped_gemm_wgrad, dy, x),
    ):
        first = op(a, b, offsets, backend="triton")
        assert_same_bits(op(a, b, offsets, backend="triton"), first)


@pytest.mark.parametrize(
    ("which", "where"),
    [("weights", "scale"), ("rows", "scale"), ("rows", "data"), ("rows of none", "scale")],
)
@pytest.mark.parametrize(
    "pair",
    [(FP8_CHANNEL, FP8_TOKEN), (FP8_BLOCK128, FP8_GROUP128), (MXFP8, MXFP8)],
    ids=pair_name,
)
def test_a_nan_goes_where_the_reference_lets_it_go(pair, which, where, kernel_device):
    case = ([9, 0, 5], 2, 24, 160)
    x_SK, w_ENK, dy_SN, offsets = make_inputs(case, kernel_device, seed=11)
    x, w, dy = in_format(x_SK, pair[1]), in_format(w_ENK, pair[0]), in_format(dy_SN, pair[1])
    # Row 8 is the first expert's last: steps over slots of the third expert begin with it.
    row = {"weights": 5, "rows": 8, "rows of none": offsets[-1].item()}[which]
    for q in (w,) if which == "weights" else (x, dy):
        spoiled = getattr(q, where).view(torch.uint8)
        spoiled = spoiled[0] if which == "weights" else spoiled
        spoiled[min(row, spoiled.shape[0] - 1), -4:] = 0xFF
    for op, a, b in (
        (grouped_gemm, x, w),
        (grouped_gemm_dgrad, dy, w),
        (grouped_gemm_wgrad, dy, x),
    ):
        expected = op(a, b, offsets, backend="reference").isnan()
        assert torch.equal(op(a, b, offsets, backend="triton").isnan(), expected)


def test_wrong_scale_is_noticed(kernel_device, assert_product_close):
    x_SK, w_ENK, _, offsets = make_inputs(FEW, kernel_device, seed=12)
    w, x = quantize(w_ENK, FP8_BLOCK128), quantize(x_SK, FP8_GROUP128)
    scale_Enk = w.scale.clone()
    scale_Enk[2, 0, 1] *= 2

    def wrong_gemm(x, w, offsets, **options):
        return grouped_gemm(x, QTensor(w.data, scale_Enk, w.format), offsets, **options)

    EXPECTED[wrong_gemm] = forward_of
    with pytest.raises(AssertionError):
        assert_product_close(wrong_gemm, x, w, offsets, FEW[3])


def test_a_routing_is_as_good_as_its_offsets(kernel_device, assert_same_bits):
    from octomoe.kernels import grouped_gemm as kernels

    x_SK, w_ENK, dy_SN, offsets = make_inputs(FEW, kernel_device, seed=14)
    routing = replace(routing_of_slots(torch.zeros(1, 1).int(), 1), expert_offsets=offsets)
    for kernel, a, b in (
        (kernels.grouped_gemm, x_SK, w_ENK),
        (kernels.grouped_gemm_dgrad, dy_SN, w_ENK),
        (kernels.grouped_gemm_wgrad, dy_SN, x_SK),
    ):
        assert_same_bits(kernel(a, b, routing), kernel(a, b, offsets))


def test_more_experts_than_are_looked_at_together(kernel_device, assert_product_close):
    counts = [0] * 2100
    counts[3], counts[1023], counts[1024], counts[2099] = 5, 1, 18, 2
    case = (counts, 2, 16, 32)
    x_SK, w_ENK, dy_SN, offsets = make_inputs(case, kernel_device, seed=13)
    assert_product_close(grouped_gemm, x_SK, w_ENK, offsets, 32)
    assert_product_close(grouped_gemm_dgrad, dy_SN, w_ENK, offsets, 16)


@pytest.mark.parametrize("smem", [0, 64 << 10, 99 << 10, 227 << 10])
@pytest.mark.parametrize("item_bytes", [(1, 1), (2, 1), (2, 2), (4, 1), (4, 4)])
def test_configurations_are_legal(item_bytes, smem):
    target = Target("", sms=132, smem=smem)
    for span in (0, 1, 32, 64, 128, 384) if 1 in item_bytes else (0,):
        options = {"item_bytes": item_bytes, "span": span, "target": target}
        configs = [grouped_gemm_wgrad_config(**options, is_odd=odd) for odd in (False, True)]
        for num_rows in (1, 1000, 3000, 100_000):
            for flag in ("is_turned", "is_scaled_by_column", "is_odd"):
                flags = {flag: True}
                configs.append(grouped_gemm_config(num_rows, 60, 1000, **options, **flags))
        for config in configs:
            is_scaled_before = span % (config.depth // config.parts) != 0
            product_bytes = 4 if is_scaled_before else max(item_bytes)
            assert config.is_legal(*item_bytes, product_bytes, smem or 227 << 10)


def test_what_cannot_run_is_not_legal():
    config = GemmConfig(128, 128, 128)
    assert config.is_legal(1, 1, 1, 227 << 10)
    assert not config.is_legal(1, 1, 1, 99 << 10)
    assert not replace(config, num_stages=7).is_legal(1, 1, 1, 227 << 10)
    assert not replace(config, rows=8).is_legal(1, 1, 1, 227 << 10)
    assert not replace(config, columns=96).is_legal(1, 1, 1, 227 << 10)
    assert not replace(config, parts=8).is_legal(1, 1, 1, 227 << 10)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.plain_memory
def test_more_elements_than_int32_counts(kernel_device):
    # x [S, K], w [E, N, K], y [S, N] and dw [E, N, K] of more than 2^31 elements, one by one.
    for num_slots, num_experts, num_rows, depth in (
        (262_144, 1, 16, 8_208),
        (3, 2, 65_600, 16_400),
        (262_144, 1, 8_208, 16),
    ):
        offsets = torch.tensor([0] * num_experts + [num_slots], dtype=torch.int32)
        offsets = offsets.to(kernel_device)
        x, w, dy = (
            QTensor(
                torch.zeros(shape, dtype=torch.uint8, device=kernel_device).view(E4M3FN.dtype),
                torch.ones([1] * len(shape), device=kernel_device),
                FP8_TENSOR,
            )
            for shape in (
                (num_slots, depth),
                (num_experts, num_rows, depth),
                (num_slots, num_rows),
            )
        )
        x.data[-1], w.data[-1, -1], dy.data[-1, -1] = 1.0, 1.0, 1.0
        y_SN = grouped_gemm(x, w, offsets, out_dtype=torch.float32)
        assert y_SN.count_nonzero() == 1
        assert y_SN[-1, -1] == depth
        dx_SK = grouped_gemm_dgrad(dy, w, offsets)
        assert torch.equal(dx_SK, x.data.to(torch.bfloat16))
        dw_ENK = grouped_gemm_wgrad(dy, x, offsets)
        assert torch.equal(dw_ENK, w.data.to(torch.bfloat16))
