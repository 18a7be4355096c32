"""Ops under torch.compile and torch.library: no graph break, and the same bits as eager.

Claimed: every registered op has a true schema and a true fake; a layer, fused or op by op, compiles
as one graph.
"""

import importlib
import pkgutil
import shutil
import subprocess
import sys

import pytest
import torch

import octomoe.ops
from octomoe import (
    COMPACT,
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_COLUMN128,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    FP8_TOKEN,
    GEMM_READY,
    INTERLEAVED,
    MXFP8,
    RELU2,
    SILU,
    ExpertWeights,
    QTensor,
    activation_bwd,
    activation_bwd_both,
    activation_quantize,
    activation_quantize_both,
    build_routing,
    dequantize,
    fused_moe,
    grouped_gemm,
    permute,
    quantize,
    quantize_both,
    quantize_experts,
    unpermute,
)
from octomoe.ops.register import RegisteredOp
from octomoe.ops.schema import take_apart

pytestmark = [
    # Compilers allocate by themselves and look at how it is done.
    pytest.mark.plain_memory,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler"
)

# weights, activations, backend of torch.compile
CASES = {
    "mx x mx, inductor": pytest.param((MXFP8, MXFP8, "inductor"), marks=needs_compiler),
    "block x group": (FP8_BLOCK128, FP8_GROUP128, "aot_eager"),
    "channel x token": (FP8_CHANNEL, FP8_TOKEN, "aot_eager"),
    "tensor x tensor": (FP8_TENSOR, FP8_TENSOR, "aot_eager"),
    "mx": (MXFP8, None, "aot_eager"),
    "unquantised": (None, None, "aot_eager"),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make_inputs(weight_format, device, seed, draw_ids, num_tokens=17):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device)

    experts = ExpertWeights(w13=draw(4, 2 * 72, 160), w2=draw(4, 160, 72), w13_bias=draw(4, 2 * 72))
    if weight_format is not None:
        experts = quantize_experts(experts, weight_format)
    ids_TA = draw_ids(num_tokens, 4, 2, "dropped", seed).to(device)
    return draw(num_tokens, 160), experts, draw(num_tokens, 2), ids_TA


def walk(x_TD, experts, weights_TA, ids_TA, activation_format):
    """The layer op by op."""
    routing, options = build_routing(ids_TA, 4, align=8), {"out_dtype": torch.float32}
    x = x_TD if activation_format is None else quantize(x_TD, activation_format)
    bias_EN = experts.w13_bias
    h_SN = grouped_gemm(permute(x, routing), experts.w13, routing, bias=bias_EN, **options)
    h = activation_quantize(h_SN, experts.activation, activation_format or FP8_ROW)
    h = dequantize(h) if activation_format is None else h
    return unpermute(grouped_gemm(h, experts.w2, routing, **options), routing, weights_TA)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@EACH_CASE
def test_fused_moe_compiles_to_the_same_bits(case, device, draw_ids, assert_same_bits):
    weight_format, activation_format, backend = case
    inputs = make_inputs(weight_format, device, 1, draw_ids)

    def layer(x_TD, experts, weights_TA, ids_TA):
        # Something exact on both sides for the compiler to work on.
        weights_TA = weights_TA.abs()
        y_TD = fused_moe(2 * x_TD, experts, weights_TA, ids_TA, activation_format=activation_format)
        return y_TD + x_TD

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert_same_bits(compiled(*inputs), layer(*inputs))


@EACH_CASE
def test_unfused_walk_compiles_to_the_same_bits(case, device, draw_ids, assert_same_bits):
    weight_format, activation_format, backend = case
    inputs = make_inputs(weight_format, device, 2, draw_ids)
    compiled = torch.compile(walk, fullgraph=True, backend=backend)
    expected_TD = walk(*inputs, activation_format)
    assert_same_bits(compiled(*inputs, activation_format), expected_TD)


@pytest.mark.parametrize(("dynamic", "num_compiled"), [(None, 2), (True, 1)])
def test_one_graph_serves_every_number_of_tokens(
    dynamic, num_compiled, device, draw_ids, assert_same_bits
):
    compiled = torch.compile(walk, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for i, num_tokens in enumerate((17, 33, 70, 5)):
        inputs = make_inputs(MXFP8, device, 3, draw_ids, num_tokens)
        with torch.compiler.set_stance("default" if i < num_compiled else "fail_on_recompile"):
            y_TD = compiled(*inputs, MXFP8)
        assert_same_bits(y_TD, walk(*inputs, MXFP8))


def test_strided_hidden_states_compile(device, draw_ids, assert_same_bits):
    x_TD, *rest = make_inputs(MXFP8, device, 4, draw_ids)
    column_major_TD = x_TD.T.contiguous().T

    def layer(x_TD):
        return fused_moe(x_TD, *rest, activation_format=MXFP8).view(-1)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(column_major_TD), layer(column_major_TD))


def test_a_seed_changes_without_compiling_anew(device, draw_ids, assert_same_bits):
    x_TD, *_ = make_inputs(None, device, 5, draw_ids)

    def gradients(x_TD, seed):
        q = quantize(2 * x_TD, MXFP8, seed=seed)
        both = quantize_both(2 * x_TD, FP8_GROUP128, FP8_COLUMN128, seed=seed + 1)
        h = activation_quantize_both(x_TD, SILU, MXFP8, FP8_ROW, seed=seed)
        dh = activation_bwd_both(x_TD[:, :80], x_TD, SILU, MXFP8, FP8_ROW, seed=seed)
        return q, *both, *h, *dh, activation_bwd(x_TD, x_TD, RELU2, format=MXFP8, seed=seed)

    compiled = torch.compile(gradients, fullgraph=True, backend="aot_eager")
    for i in range(3):
        seed = torch.tensor(i, device=device)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            actual = compiled(x_TD, seed)
        for a, e in zip(actual, gradients(x_TD, seed), strict=True):
            assert_same_bits(a, e)


def samples():
    """True arguments of every registered op: (op, name of the sample) -> arguments."""
    x_TD, ids_TA, weights_TA = torch.randn(9, 96), torch.randint(-1, 4, (9, 2)), torch.rand(9, 2)
    none_TD, none_TA = torch.randn(0, 96), torch.empty(0, 2, dtype=torch.int64)
    routing, empty = build_routing(ids_TA, 4, align=4), build_routing(none_TA, 4)
    index, no_index = (
        (r.expert_offsets, r.slot_of_choice_TA, r.choice_of_slot_S) for r in (routing, empty)
    )
    x, x_SD = quantize(x_TD, MXFP8, layout=GEMM_READY), permute(x_TD, routing)
    w_ENK, dy_SN = torch.randn(4, 64, 96), torch.randn(routing.num_slots, 64)
    w, slots = quantize(w_ENK, MXFP8), quantize(x_SD, MXFP8)
    plain_x, plain_w, plain_dy = (take_apart(t) for t in (x_SD, w_ENK, dy_SN))
    bias_EN, offsets = torch.randn(4, 64), routing.expert_offsets
    experts = ExpertWeights(w13=torch.randn(4, 128, 96), w2=torch.randn(4, 96, 64))
    mx = quantize_experts(experts, MXFP8)
    half_TD, strided_TD = torch.randn(9, 48), x_TD.T.contiguous().T
    strided = QTensor(x.data.T.contiguous().T, x.compact_scale, MXFP8)
    one, float32 = torch.ones(1), torch.float32
    f32_w = (*take_apart(experts.w13), *take_apart(experts.w2))
    mx_w = (*take_apart(mx.w13), *take_apart(mx.w2))
    biases, no_biases = (torch.randn(4, 128), torch.randn(4, 96), one, one), (None,) * 4
    routed = ("silu", weights_TA, ids_TA)
    seed, layouts = torch.tensor([1]), (GEMM_READY, INTERLEAVED)
    both = ("fp8_group128", "fp8_column128")
    return {
        "quantize": {
            "rows": (x_TD, "fp8_row", COMPACT, None, None, "auto"),
            "experts": (w_ENK, "fp8_block128", GEMM_READY, None, None, "auto"),
            "given amax": (x_TD, "fp8_group128", INTERLEAVED, one, None, "reference"),
            "given scale": (x_TD, "fp8_tensor", COMPACT, None, one, "auto"),
            "zero tokens": (none_TD, "mxfp8", INTERLEAVED, None, None, "auto"),
            "strided": (strided_TD, "mxfp8", GEMM_READY, None, None, "auto"),
            "seed": (x_TD, "fp8_column128", GEMM_READY, None, None, "auto", seed),
        },
        "quantize_both": {
            "rows": (x_TD, "fp8_group128", "fp8_column128", *layouts, None, "auto"),
            "experts": (w_ENK, "mxfp8", "mxfp8[1,32,1]", *layouts, seed, "auto"),
            "zero tokens": (none_TD, "fp8_row", "fp8_tensor", *layouts, None, "auto"),
            "strided": (strided_TD, "mxfp8", "mxfp8_2d", *layouts, None, "auto"),
        },
        "dequantize": {
            "rows": (*take_apart(x), torch.bfloat16, "auto"),
            "zero tokens": (*take_apart(quantize(none_TD, MXFP8)), float32, "auto"),
            "strided": (*take_apart(strided), float32, "auto"),
        },
        "requantize": {
            "rows": (*take_apart(x), "fp8_group128", INTERLEAVED, "auto"),
            "strided": (*take_apart(strided), "mxfp8_2d", COMPACT, "auto"),
        },
        "build_routing": {
            "ragged": (ids_TA, 4, 1, None, "auto"),
            "map": (ids_TA, 2, 8, torch.tensor([0, -1, 1, -1]), "auto"),
            "zero tokens": (none_TA, 4, 8, None, "auto"),
        },
        "moe_align_block_size": {
            "blocks": (ids_TA, 8, 4, None, "auto"),
            "map": (ids_TA, 8, 2, torch.tensor([0, -1, 1, -1]), "auto"),
            "zero tokens": (none_TA, 8, 4, None, "auto"),
        },
        "permute": {
            "plain": (*take_apart(x_TD), *index, 4, COMPACT, "auto"),
            "rows": (*take_apart(x), *index, 4, GEMM_READY, "auto"),
            "relayout": (*take_apart(x), *index, 4, INTERLEAVED, "auto"),
            "zero tokens": (*take_apart(none_TD), *no_index, 1, COMPACT, "auto"),
            "strided": (*take_apart(strided_TD), *index, 4, COMPACT, "auto"),
        },
        "unpermute": {
            "plain": (x_SD, *index, 4, None, "auto"),
            "weights": (x_SD.bfloat16(), *index, 4, weights_TA, "auto"),
            "zero tokens": (none_TD, *no_index, 1, None, "auto"),
            "strided": (dy_SN.T.contiguous().T, *index, 4, None, "auto"),
        },
        "unpermute_bwd": {
            "plain": (x_TD, x_SD, *index, 4, weights_TA, "auto"),
            "half": (x_TD.half(), x_SD.bfloat16(), *index, 4, weights_TA.bfloat16(), "auto"),
            "zero tokens": (none_TD, none_TD, *no_index, 1, torch.rand(0, 2), "auto"),
            "strided": (strided_TD, x_SD.T.contiguous().T, *index, 4, weights_TA, "auto"),
        },
        "grouped_gemm": {
            "plain": (*plain_x, *plain_w, offsets, bias_EN, torch.bfloat16, "auto"),
            "mx": (*take_apart(slots), *take_apart(w), offsets, None, float32, "auto"),
        },
        "grouped_gemm_dgrad": {
            "plain": (*plain_dy, *plain_w, offsets, torch.bfloat16, "auto"),
            "mx": (*plain_dy, *take_apart(w), offsets, float32, "auto"),
        },
        "grouped_gemm_wgrad": {
            "plain": (*plain_dy, *plain_x, offsets, torch.bfloat16, "auto"),
            "mx": (*plain_dy, *take_apart(slots), offsets, float32, "auto"),
        },
        "activation_quantize": {
            "rows": (x_TD, "silu", "mxfp8", GEMM_READY, None, "auto"),
            "ungated": (x_TD, "relu2:ungated", "fp8_tensor", COMPACT, one.view(1, 1), "auto"),
            "zero tokens": (none_TD, "gelu", "fp8_row", COMPACT, None, "auto"),
            "seed": (x_TD, "silu", "mxfp8", COMPACT, None, "auto", seed),
        },
        "activation_quantize_both": {
            "rows": (x_TD, "silu", "mxfp8", "mxfp8[1,32,1]", *layouts, None, "auto"),
            "seed": (x_TD, "gelu", "fp8_group128", "fp8_column128", *layouts, seed, "auto"),
            "zero tokens": (none_TD, "relu2", "fp8_row", "mxfp8", *layouts, None, "auto"),
        },
        "activation_bwd": {
            "plain": (half_TD, x_TD, "silu", "", COMPACT, torch.bfloat16, "auto"),
            "rows": (half_TD, x_TD, "gelu", "mxfp8", GEMM_READY, float32, "auto"),
            "ungated": (x_TD, strided_TD, "relu2:ungated", "", COMPACT, float32, "auto"),
            "zero tokens": (none_TD, none_TD, "gelu:ungated", "fp8_row", COMPACT, float32, "auto"),
            "seed": (half_TD, x_TD, "gelu", "mxfp8", COMPACT, float32, "auto", seed),
        },
        "activation_bwd_both": {
            "rows": (half_TD, x_TD, "silu", "mxfp8", "mxfp8[1,32,1]", *layouts, None, "auto"),
            "seed": (x_TD, strided_TD, "relu2:ungated", "mxfp8", "fp8_row", *layouts, seed, "auto"),
            "zero tokens": (none_TD, none_TD, "silu:ungated", *both, *layouts, None, "auto"),
        },
        "fused_moe": {
            "plain": (x_TD, *f32_w, *no_biases, *routed, "", 1.0, False, None, "auto"),
            "mx": (x_TD, *mx_w, *biases, *routed, "mxfp8", 2.5, True, None, "auto"),
            "map": (x_TD, *f32_w, *no_biases, *routed, "", 1.0, False, torch.arange(4), "auto"),
            "strided": (strided_TD, *mx_w, *no_biases, *routed, "mxfp8", 1.0, False, None, "auto"),
        },
    }


with torch.random.fork_rng():
    torch.manual_seed(0)
    SAMPLES = {(op, name): args for op, named in samples().items() for name, args in named.items()}


EACH_SAMPLE = pytest.mark.parametrize(("op", "name"), SAMPLES, ids=lambda part: part)


def registered(op):
    return getattr(torch.ops.octomoe, op).default


def tensors_of(values):
    return [value for value in values if isinstance(value, torch.Tensor)]


@EACH_SAMPLE
def test_fake_and_registration_are_true(op, name):
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # The schema check multiplies its arguments, which torch does not do for one-byte floats; the
    # next test checks what it would.
    if all(tensor.itemsize > 1 for tensor in tensors_of(SAMPLES[op, name])):
        checks.append("test_schema")
    torch.library.opcheck(registered(op), SAMPLES[op, name], test_utils=checks)


@EACH_SAMPLE
def test_arguments_are_neither_changed_nor_returned(op, name, assert_same_bits):
    arguments = tensors_of(SAMPLES[op, name])
    before = [tensor.clone() for tensor in arguments]
    result = registered(op)(*SAMPLES[op, name])
    for argument, copy in zip(arguments, before, strict=True):
        assert_same_bits(argument, copy)
    storages = {tensor.untyped_storage().data_ptr() for tensor in arguments if tensor.numel()}
    for output in tensors_of(result if isinstance(result, tuple) else (result,)):
        assert output.untyped_storage().data_ptr() not in storages


def test_every_registered_op_has_a_sample():
    found = set()
    for module in pkgutil.iter_modules(octomoe.ops.__path__, "octomoe.ops."):
        values = vars(importlib.import_module(module.name)).values()
        found |= {value.name for value in values if isinstance(value, RegisteredOp)}
    assert found == {op for op, _ in SAMPLES}


def test_backward_is_refused():
    x = torch.ones(1, 32, requires_grad=True)
    values = dequantize(quantize(x, MXFP8))
    assert torch.equal(values, x)
    with pytest.raises(NotImplementedError, match="dequantize: backward reached this op"):
        values.sum().backward()


def test_running_an_op_does_not_import_the_compiler():
    code = (
        "import sys, torch, octomoe; octomoe.quantize(torch.ones(1, 32), octomoe.MXFP8); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
