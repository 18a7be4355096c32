"""TransformerEngine's permutation calls do here what they say, for plain and for FP8 tensors.

Claimed: rows are those of naive loops, bit for bit and in both directions; gradients are those of
naive indexing; no number of tokens is special; the host looks at no value.
"""

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import octomoe.integrations.transformer_engine as te
from octomoe import (
    COMPACT,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    GEMM_READY,
    INTERLEAVED,
    MXFP8,
    MXFP8_E5M2,
    QTensor,
    dequantize,
    quantize,
    unpermute,
)
from octomoe.core.routing import routing_of_slots

# tokens, experts, choices, pattern of the ids
CASES = {
    "zero tokens": (0, 4, 2, "any"),
    "one token": (1, 4, 2, "any"),
    "an empty expert": (9, 4, 2, "hole"),
    "all to one": (9, 4, 1, "one"),
    "dropped": (37, 5, 3, "dropped"),
    "real": (70, 8, 3, "any"),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8 = {
    "per tensor": (FP8_TENSOR, COMPACT),
    "per row": (FP8_ROW, COMPACT),
    "1x128 compact": (FP8_GROUP128, COMPACT),
    "1x128 gemm ready": (FP8_GROUP128.derive(rounding="pow2"), GEMM_READY),
    "mx": (MXFP8, COMPACT),
    "mx gemm ready": (MXFP8_E5M2, GEMM_READY),
    "mx interleaved": (MXFP8, INTERLEAVED),
}
EACH_FP8 = pytest.mark.parametrize(("format", "layout"), FP8.values(), ids=FP8)


def make_inputs(case, device, seed, draw_ids, dtype=torch.float32, width=24):
    """Tokens, ids, mask and probs of few bits, so that sums are exact whatever their order."""
    num_tokens, num_experts, num_choices, pattern = case
    ids_TA = draw_ids(num_tokens, num_experts, num_choices, pattern, seed).to(device)
    mask_TE = torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool, device=device)
    mask_TE = mask_TE.scatter(1, ids_TA % (num_experts + 1), True)[:, :num_experts].contiguous()
    x_TD = draw(num_tokens, width).to(device, dtype)
    probs_TE = (draw(num_tokens, num_experts).abs() + 1).to(device, dtype)
    return x_TD, ids_TA, mask_TE, probs_TE


def draw(*shape):
    return torch.randint(-4, 5, shape).float()


def pairs_of(mask_TE):
    """(token, expert) of every row, in order."""
    num_tokens, num_experts = mask_TE.shape
    return [(t, e) for e in range(num_experts) for t in range(num_tokens) if mask_TE[t, e]]


def choices_of(ids_TA):
    """(token, choice) of every row, in order."""
    every = [(t, a) for t in range(ids_TA.shape[0]) for a in range(ids_TA.shape[1])]
    kept = [(t, a) for t, a in every if ids_TA[t, a] >= 0]
    return sorted(kept, key=lambda choice: int(ids_TA[choice]))


def take(x_TD, pairs, num_rows):
    """Rows of tokens, zeros after the last; differentiable."""
    rows = [x_TD[t] for t, _ in pairs[:num_rows]]
    return torch.stack([*rows, *[torch.zeros_like(x_TD[0])] * (num_rows - len(rows))])


def put_back(rows_SD, pairs, num_tokens, probs=None):
    """Weighted sums of each token's rows; differentiable."""
    sums = [torch.zeros(rows_SD.shape[1]).to(rows_SD) for _ in range(num_tokens)]
    for row, (t, e) in zip(rows_SD, pairs, strict=False):
        sums[t] = sums[t] + (row if probs is None else row * probs[t, e])
    return torch.stack(sums)


def assert_same_gradients(actual, expected, inputs):
    gradient = draw(*actual.shape).to(actual)
    found = torch.autograd.grad(actual, inputs, gradient)
    wanted = torch.autograd.grad(expected, inputs, gradient, allow_unused=True)
    for value, one, other in zip(inputs, found, wanted, strict=True):
        assert torch.equal(one, torch.zeros_like(value) if other is None else other)


def bytes_of_rows(q, pairs, num_rows):
    """Each row's data and scales as bytes; zero rows have the smallest scale."""
    empty = quantize(torch.zeros(1, q.shape[1], device=q.device), q.format)
    rows = [t for t, _ in pairs[:num_rows]]
    data = [*q.data.view(torch.uint8)[rows], *[empty.data.view(torch.uint8)[0]] * num_rows]
    data = torch.stack(data[:num_rows]).view(q.data.dtype)
    if q.format == FP8_TENSOR:
        return QTensor(data, q.scale, q.format, q.layout)
    scale = [
        *q.compact_scale.view(torch.uint8)[rows],
        *[empty.scale.view(torch.uint8)[0]] * num_rows,
    ]
    scale = torch.stack(scale[:num_rows])
    return QTensor(data, scale.view(q.scale.dtype), q.format).relayout(q.layout)


SIGNATURES = {
    "moe_permute": "inp routing_map num_out_tokens max_token_num=-1 map_type=mask",
    "moe_permute_with_probs": "inp probs routing_map num_out_tokens",
    "moe_permute_and_pad_with_probs": "inp probs routing_map tokens_per_expert align_size",
    "moe_unpermute": "inp row_id_map merging_probs=None restore_shape=None map_type=mask "
    "probs=None pad_offsets=None",
    "moe_sort_chunks_by_index": "inp split_sizes sorted_index",
    "moe_sort_chunks_by_index_with_probs": "inp probs split_sizes sorted_index",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_transformer_engines(name):
    parameters = inspect.signature(getattr(te, name)).parameters.values()
    spelled = (p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
    assert " ".join(spelled) == SIGNATURES[name]


@pytest.mark.parametrize("num_out_tokens", [None, 5, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_CASE
def test_mask_map_there_and_back(case, dtype, num_out_tokens, device, draw_ids):
    x_TD, _, mask_TE, probs_TE = make_inputs(case, device, 1, draw_ids, dtype)
    x_TD.requires_grad_()
    pairs = pairs_of(mask_TE)
    num_rows = num_out_tokens or max(len(pairs), 1)
    permuted_SD, row_id_map = te.moe_permute(x_TD, mask_TE.int(), num_rows)
    assert (row_id_map.dtype, row_id_map.shape) == (torch.int32, mask_TE.shape)
    if not len(x_TD):
        assert permuted_SD.shape == (0, 24)
        assert te.moe_unpermute(permuted_SD, row_id_map, probs_TE).shape == (0, 24)
        return
    expected_SD = take(x_TD, pairs, num_rows)
    assert torch.equal(permuted_SD, expected_SD)
    assert_same_gradients(permuted_SD, expected_SD, [x_TD])

    y_SD = draw(*permuted_SD.shape).to(x_TD).requires_grad_()
    for probs in (None, probs_TE.requires_grad_()):
        y_TD = te.moe_unpermute(y_SD, row_id_map, probs, restore_shape=x_TD.shape)
        expected_TD = put_back(y_SD, pairs, len(x_TD), probs)
        assert torch.equal(y_TD, expected_TD)
        assert_same_gradients(y_TD, expected_TD, [y_SD] if probs is None else [y_SD, probs])


@pytest.mark.parametrize("num_out_tokens", [0, 5, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_CASE
def test_index_map_there_and_back(case, dtype, num_out_tokens, device, draw_ids):
    x_TD, ids_TA, _, probs_TE = make_inputs(case, device, 2, draw_ids, dtype)
    x_TD.requires_grad_()
    choices, probs_TA = choices_of(ids_TA), probs_TE[:, : ids_TA.shape[1]].requires_grad_()
    num_rows = num_out_tokens or ids_TA.numel()
    permuted_SD, row_id_map = te.moe_permute(x_TD, ids_TA.int(), num_out_tokens, map_type="index")
    if not len(x_TD):
        assert permuted_SD.shape == (0, 24)
        assert te.moe_unpermute(permuted_SD, row_id_map, probs_TA, None, "index").shape == (0, 24)
        return
    expected_SD = take(x_TD, choices, num_rows)
    assert torch.equal(permuted_SD, expected_SD)
    assert_same_gradients(permuted_SD, expected_SD, [x_TD])

    y_SD = draw(*permuted_SD.shape).to(x_TD).requires_grad_()
    y_TD = te.moe_unpermute(y_SD, row_id_map, probs_TA, map_type="index")
    expected_TD = put_back(y_SD, choices, len(x_TD), probs_TA)
    assert torch.equal(y_TD, expected_TD)
    assert_same_gradients(y_TD, expected_TD, [y_SD, probs_TA])
    # Without probs every choice stays a row of its own.
    apart = te.moe_unpermute(y_SD, row_id_map, map_type="index")
    as_tokens = [(a * len(x_TD) + t, 0) for t, a in choices]
    assert torch.equal(apart, put_back(y_SD, as_tokens, ids_TA.numel()))
    apart_bwd = te.moe_unpermute_bwd(apart.detach(), row_id_map, num_rows, "index")
    assert torch.equal(apart_bwd, torch.autograd.grad(apart, y_SD, apart.detach())[0])


@pytest.mark.parametrize("num_out_tokens", [None, 5, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_CASE
def test_probs_go_with_their_rows(case, dtype, num_out_tokens, device, draw_ids):
    x_TD, _, mask_TE, probs_TE = make_inputs(case, device, 3, draw_ids, dtype)
    probs_TE = torch.where(torch.rand(mask_TE.shape, device=device) < 0.2, 0.0, probs_TE)
    x_TD, probs_TE = x_TD.requires_grad_(), probs_TE.to(dtype).requires_grad_()
    pairs = pairs_of(mask_TE)
    num_rows = num_out_tokens or max(len(pairs), 1)
    permuted_SD, probs_S, row_id_map = te.moe_permute_with_probs(x_TD, probs_TE, mask_TE, num_rows)
    assert torch.equal(row_id_map, te.moe_permute(x_TD, mask_TE, num_rows)[1])
    if not len(x_TD):
        assert (permuted_SD.shape, probs_S.shape) == ((0, 24), (0,))
        return
    zeros = [torch.zeros_like(probs_TE[0, 0])] * num_rows
    expected_S = torch.stack([*(probs_TE[t, e] for t, e in pairs), *zeros][:num_rows])
    expected_SD = take(x_TD, pairs, num_rows) * (expected_S != 0).unsqueeze(1)
    assert torch.equal(probs_S, expected_S)
    assert torch.equal(permuted_SD, expected_SD)
    assert_same_gradients(probs_S, expected_S, [probs_TE])
    assert_same_gradients(permuted_SD, expected_SD, [x_TD])


@pytest.mark.parametrize("counts_device", ["cpu", "same"])
@pytest.mark.parametrize("align_size", [1, 4, 32])
@EACH_CASE
def test_padding_there_and_back(case, align_size, counts_device, device, draw_ids):
    x_TD, _, mask_TE, probs_TE = make_inputs(case, device, 4, draw_ids)
    inputs = x_TD.requires_grad_(), probs_TE.requires_grad_()
    counts_E = mask_TE.sum(0).to("cpu" if counts_device == "cpu" else device)
    permuted_SD, probs_S, row_id_map, pad_offsets, target_E = te.moe_permute_and_pad_with_probs(
        *inputs, mask_TE, counts_E, align_size
    )
    padded = [-(-n // align_size) * align_size for n in counts_E.tolist()]
    assert target_E.tolist() == padded
    assert target_E.dtype == torch.int64
    assert permuted_SD.shape == (sum(padded), 24)
    plain_SD, plain_S, plain_map = te.moe_permute_with_probs(*inputs, mask_TE, max(sum(padded), 1))
    assert torch.equal(row_id_map, plain_map)
    # Row of the unpadded tensor for each padded one; the last row is of no token.
    first, rows = 0, []
    for count, rows_e in zip(counts_E.tolist(), padded, strict=True):
        rows += [*range(first, first + count), *[-1] * (rows_e - count)]
        first += count
    before = [sum(padded[:e]) - int(counts_E[:e].sum()) for e in range(len(padded))]
    assert pad_offsets.tolist() == before
    is_padding_S = torch.tensor(rows, device=device) < 0
    assert torch.equal(permuted_SD, plain_SD[rows].masked_fill(is_padding_S[:, None], 0))
    assert torch.equal(probs_S, plain_S[rows].masked_fill(is_padding_S, 0))
    if len(x_TD):
        expected_SD = plain_SD[rows].masked_fill(is_padding_S[:, None], 0)
        assert_same_gradients(permuted_SD, expected_SD, [x_TD])

    y_SD = draw(*permuted_SD.shape).to(device)
    y_SD[is_padding_S] = torch.nan
    y_SD.requires_grad_()
    y_TD = te.moe_unpermute(y_SD, row_id_map, probs_TE, x_TD.shape, pad_offsets=pad_offsets)
    kept = [s for s, row in enumerate(rows) if row >= 0]
    if len(x_TD):
        expected_TD = put_back(y_SD[kept], pairs_of(mask_TE), len(x_TD), probs_TE)
        assert torch.equal(y_TD, expected_TD)
        assert_same_gradients(y_TD, expected_TD, [y_SD, probs_TE])


@pytest.mark.parametrize("num_out_tokens", [None, 5, 300])
@EACH_FP8
@EACH_CASE
def test_fp8_rows_keep_their_bytes_both_ways(
    case, format, layout, num_out_tokens, device, draw_ids, assert_same_bits
):
    x_TD, ids_TA, mask_TE, probs_TE = make_inputs(case, device, 5, draw_ids, width=416)
    q = quantize(x_TD * torch.rand_like(x_TD), format, layout=layout)
    pairs, choices = pairs_of(mask_TE), choices_of(ids_TA)
    num_rows = (num_out_tokens or max(len(pairs), 1)) if len(x_TD) else 0
    permuted, row_id_map = te.moe_permute(q, mask_TE, num_rows)
    expected = te.moe_permute(x_TD, mask_TE, num_rows)[0].shape
    assert permuted.shape == expected
    if num_rows:
        assert_same_bits(permuted, bytes_of_rows(q, pairs, num_rows))
        by_index, _ = te.moe_permute(q, ids_TA, num_rows, map_type="index")
        assert_same_bits(by_index, bytes_of_rows(q, choices, num_rows))
    with_probs, _, _ = te.moe_permute_with_probs(q, probs_TE, mask_TE, num_rows)
    assert_same_bits(with_probs, permuted)
    assert_same_bits(te.moe_unpermute_bwd(q, row_id_map, num_rows), permuted)
    # A sum of rows is quantised anew.
    routing = routing_of_slots(row_id_map, num_rows)
    sums = quantize(unpermute(dequantize(permuted), routing), format, layout=layout)
    assert_same_bits(te.moe_permute_bwd(permuted, row_id_map), sums)


@EACH_FP8
def test_fp8_rows_of_no_prob_and_of_padding_are_zero(format, layout, device, draw_ids):
    x_TD, _, mask_TE, probs_TE = make_inputs(CASES["dropped"], device, 6, draw_ids, width=256)
    probs_TE[:10] = 0
    q = quantize(x_TD, format, layout=layout)
    permuted, probs_S, row_id_map, pad_offsets, _ = te.moe_permute_and_pad_with_probs(
        q, probs_TE, mask_TE, mask_TE.sum(0), 16
    )
    plain = dequantize(q), probs_TE, mask_TE, mask_TE.sum(0), 16
    assert (permuted.format, permuted.layout) == (format, layout)
    assert torch.equal(dequantize(permuted), te.moe_permute_and_pad_with_probs(*plain)[0])
    assert not dequantize(permuted)[probs_S == 0].any()
    # Gradients of padded rows: the bytes of each token, and zeros between.
    gradients = te.moe_unpermute_bwd(q, row_id_map, permuted.shape[0], pad_offsets=pad_offsets)
    assert (gradients.format, gradients.layout) == (format, layout)
    ones = torch.where(mask_TE, 1.0, 0.0)
    expected = te.moe_permute_and_pad_with_probs(dequantize(q), ones, *plain[2:])[0]
    assert torch.equal(dequantize(gradients), expected)
    back = te.moe_permute_bwd(gradients, row_id_map, pad_offsets)
    sums = dequantize(q) * mask_TE.sum(1, keepdim=True)
    assert torch.equal(dequantize(back), dequantize(quantize(sums, format)))


@pytest.mark.parametrize("num_rest", [0, 3])
@pytest.mark.parametrize("sizes", [[], [0, 0], [5], [3, 0, 4, 0, 1], [2, 9, 2]], ids=str)
def test_sorted_chunks_there_and_back(sizes, num_rest, device, assert_same_bits):
    order = torch.randperm(len(sizes)).int()
    num_rows = sum(sizes) + num_rest
    x_TD, probs_T = (draw(num_rows, 256).to(device), draw(num_rows).to(device))
    chunks = list(torch.arange(num_rows).split([*sizes, num_rest]))
    rows = torch.cat([*(chunks[c] for c in order), chunks[-1]]).to(device)
    how = torch.tensor(sizes, dtype=torch.int32).to(device), order.to(device)
    x_TD, probs_T = x_TD.requires_grad_(), probs_T.requires_grad_()
    sorted_TD, sorted_probs_T = te.moe_sort_chunks_by_index_with_probs(x_TD, probs_T, *how)
    assert torch.equal(sorted_TD, x_TD[rows])
    assert torch.equal(sorted_probs_T, probs_T[rows])
    assert torch.equal(te.moe_sort_chunks_by_index(x_TD, *how), sorted_TD)
    assert_same_gradients(sorted_TD, x_TD[rows], [x_TD])
    assert_same_gradients(sorted_probs_T, probs_T[rows], [probs_T])
    back = how[0][how[1].long()], how[1].argsort()
    for format, layout in FP8.values():
        q = quantize(x_TD, format, layout=layout)
        moved = te.moe_sort_chunks_by_index(q, *how)
        pairs = [(t, 0) for t in rows.tolist()]
        assert_same_bits(moved, bytes_of_rows(q, pairs, num_rows) if num_rows else q)
        assert_same_bits(te.moe_sort_chunks_by_index(moved, *back), q)


def test_num_out_tokens_may_be_a_tensor(device, draw_ids):
    x_TD, _, mask_TE, _ = make_inputs(CASES["real"], device, 7, draw_ids)
    counted, _ = te.moe_permute(x_TD, mask_TE, mask_TE.sum().cpu())
    assert torch.equal(counted, te.moe_permute(x_TD, mask_TE, int(mask_TE.sum()))[0])


def test_tokens_come_back_where_no_row_was_permuted(device):
    row_id_map = torch.full((3, 2), -1, dtype=torch.int32, device=device)
    y_TD = te.moe_unpermute(torch.empty(0, 8, device=device), row_id_map)
    assert torch.equal(y_TD, torch.zeros(3, 8, device=device))


def test_old_name_of_merging_probs(device, draw_ids):
    x_TD, _, mask_TE, probs_TE = make_inputs(CASES["real"], device, 8, draw_ids)
    permuted = te.moe_permute(x_TD, mask_TE, int(mask_TE.sum()))
    with pytest.warns(DeprecationWarning, match="probs is now called merging_probs"):
        y_TD = te.moe_unpermute(*permuted, probs=probs_TE)
    assert torch.equal(y_TD, te.moe_unpermute(*permuted, probs_TE))


def walk(x_TD, probs_TE, mask_TE, counts_E, sizes, order):
    """All calls that need no number of the device, one after the other."""
    num_rows = 3 * x_TD.shape[0]
    y_SD, probs_S, row_id_map = te.moe_permute_with_probs(x_TD, probs_TE, mask_TE, num_rows)
    y_SD, probs_S = te.moe_sort_chunks_by_index_with_probs(y_SD, probs_S, sizes, order)
    y_SD = te.moe_sort_chunks_by_index(y_SD * probs_S[:, None], sizes[order], order.argsort())
    y_TD = te.moe_unpermute(y_SD, row_id_map, probs_TE, x_TD.shape)
    y_SD, row_id_map = te.moe_permute(y_TD, mask_TE.long(), num_rows, map_type="index")
    return te.moe_unpermute(y_SD, row_id_map, probs_TE, map_type="index")


def walk_inputs(device, draw_ids):
    x_TD, _, mask_TE, probs_TE = make_inputs(CASES["real"], device, 9, draw_ids)
    sizes, order = torch.tensor([9, 0, 30]).to(device), torch.tensor([2, 0, 1]).to(device)
    return x_TD.requires_grad_(), probs_TE.requires_grad_(), mask_TE, mask_TE.sum(0), sizes, order


@pytest.mark.plain_memory
def test_no_value_is_looked_at(device, draw_ids):
    mode = FakeTensorMode()
    inputs = [mode.from_tensor(tensor) for tensor in walk_inputs(device, draw_ids)]
    with mode:
        walk(*inputs).sum().backward()
        q = quantize(inputs[0].detach(), MXFP8, layout=GEMM_READY)
        moved, row_id_map = te.moe_permute(q, inputs[2], 55)
        assert te.moe_permute_bwd(moved, row_id_map).shape == q.shape
        assert te.moe_unpermute_bwd(q, row_id_map, 55).shape == (55, 24)


@pytest.mark.plain_memory
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_calls_compile_as_one_graph_with_gradients(device, draw_ids):
    inputs = walk_inputs(device, draw_ids)
    compiled = torch.compile(walk, fullgraph=True, backend="aot_eager")
    assert_same_gradients(compiled(*inputs), walk(*inputs), [inputs[0], inputs[1]])
