"""Peers that need a GPU are played by torch, in their own words: what reaches them is the layer.

Claimed: rows, weights, scales, order of gate and up, sorted choices and padding are as each takes
them, so that a peer that computes what it documents computes the layer.
"""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

from octomoe import FP8_GROUP128, quantize
from octomoe.bench.check import errors_of
from octomoe.bench.layers import SCALING, Mode, Shape, make_experts, make_problem
from octomoe.bench.peers.alpha_moe import AlphaMoE
from octomoe.bench.peers.deep_gemm import DeepGEMM
from octomoe.bench.peers.flashinfer import FlashInfer
from octomoe.bench.peers.vllm import VLLM

SHAPE = Shape("", 3, 128, 256, 2, has_shared=True)
CASES = {"one token": 1, "some": 20}


@pytest.fixture(params=CASES.values(), ids=CASES)
def problem(request, kernel_device):
    return make_problem(SHAPE, make_experts(SHAPE, kernel_device), request.param)


def spread(scale, *blocks):
    """A scale for every element."""
    for axis, block in enumerate(blocks):
        scale = scale.repeat_interleave(block, axis - len(blocks))
    return scale


def values(data, scale):
    """Weights of every expert, float32."""
    return data.float() * spread(scale, 128, 128)


def expert(x_TD, w13_ND, w2_DF):
    """Gate rows first."""
    gate_TF, up_TF = (x_TD @ w13_ND.T).chunk(2, dim=1)
    return (silu(gate_TF) * up_TF) @ w2_DF.T


def layer(x_TD, w13_END, w2_EDF, weights_TA, ids_TA):
    """By definition, in float32."""
    y_TD = torch.zeros_like(x_TD)
    for e in range(w13_END.shape[0]):
        weight_T = (weights_TA * (ids_TA == e)).sum(1, keepdim=True)
        y_TD += weight_T * expert(x_TD, w13_END[e], w2_EDF[e])
    return y_TD


def rounded(hidden_TD):
    """Rows as a peer sees them that quantises them inside."""
    return quantize(hidden_TD, FP8_GROUP128, backend="reference").dequantize()


def check(peer, problem, modes, bound=0.01):
    for mode in modes:
        build = peer.kernel if mode is Mode.KERNEL else peer.layer
        outputs = {name: contender.run() for name, contender in build(problem).items()}
        assert list(outputs) == [peer.name]
        assert outputs[peer.name].dtype == torch.bfloat16
        assert errors_of(problem, outputs)[peer.name] < bound, mode


def test_deep_gemm(problem):
    def gemm(x, w, y_SN, expert_S):
        (x_SK, x_scale_Sk), (w_ENK, w_scale) = x, w
        assert x_scale_Sk.shape == (x_SK.shape[0], x_SK.shape[1] // 128)
        # As TMA loads them.
        assert x_scale_Sk.stride() == (1, x_SK.shape[0])
        assert expert_S.dtype == torch.int32
        assert expert_S.is_contiguous()
        assert len(x_SK) == len(y_SN) == len(expert_S)
        assert len(x_SK) % 128 == 0
        assert all(len(set(block)) == 1 for block in expert_S.view(-1, 128).tolist())
        x_SK = x_SK.float() * spread(x_scale_Sk, 128)
        y_SN.fill_(torch.nan)
        for e, w_NK in enumerate(values(w_ENK, w_scale)):
            y_SN[expert_S == e] = (x_SK[expert_S == e] @ w_NK.T).to(y_SN.dtype)

    module = SimpleNamespace(
        get_mk_alignment_for_contiguous_layout=lambda: 128, m_grouped_fp8_gemm_nt_contiguous=gemm
    )
    peer = DeepGEMM(module, "2.1")
    assert peer.why_not(problem, Mode.KERNEL) is None
    # The intermediate is quantised, by our kernel.
    check(peer, problem, Mode, bound=0.03)
    assert "2.1 has" in DeepGEMM(SimpleNamespace(), "1.0").why_not(problem, Mode.KERNEL)


def test_alpha_moe(problem, tmp_path, monkeypatch):
    def kernel(x, x_scale, w13, w13_scale, w2, w2_scale, slots, experts, num_slots, *rest):
        weights_TA, y_TD, num_choices, block_m, block_n, warp_n, stages, scaling = rest
        assert (block_m, block_n, warp_n, stages) == (16, 32, 8, 3)
        assert (num_choices, scaling) == (weights_TA.shape[1], SCALING)
        # It adds.
        assert not y_TD.any()
        x_TD = x.float() * spread(x_scale, 128)
        # Rows of gate and up take turns, 8 and 8; so do their scales.
        rows = torch.arange(w13.shape[1]).view(-1, 2, 8).transpose(0, 1).flatten()
        blocks = torch.arange(w13_scale.shape[1]).view(-1, 2).T.flatten()
        w13 = values(w13.view(torch.uint8)[:, rows].view(w13.dtype), w13_scale[:, blocks])
        w2, y = values(w2, w2_scale), torch.zeros_like(x_TD)
        for block in range(int(num_slots) // block_m):
            for choice in slots[block * block_m : (block + 1) * block_m].tolist():
                if choice < weights_TA.numel():
                    token, e = choice // num_choices, int(experts[block])
                    row = expert(x_TD[token : token + 1], w13[e], w2[e])[0]
                    y[token] += scaling * weights_TA.flatten()[choice] * row
        y_TD += y.to(y_TD.dtype)

    peer = AlphaMoE("0.1")
    monkeypatch.delenv("ALPHA_MOE_CONFIG", raising=False)
    assert "ALPHA_MOE_CONFIG names no file" in peer.why_not(problem, Mode.KERNEL)
    best = {"block_m": 16, "block_n": 32, "warp_n": 8, "stages": 3}
    (tmp_path / "jit.json").write_text(json.dumps({"12": best, "4000": {}}))
    monkeypatch.setenv("ALPHA_MOE_CONFIG", str(tmp_path / "jit.json"))
    assert peer.why_not(problem, Mode.KERNEL) is None
    monkeypatch.setattr(
        torch.ops, "alpha_moe", SimpleNamespace(fused_moe_w8a8_up_down=kernel), raising=False
    )
    check(peer, problem, Mode)


def test_vllm(problem, monkeypatch):
    def fused_experts(hidden_TD, w13, w2, weights_TA, ids_TA, *, quant_config):
        assert quant_config["block_shape"] == [128, 128]
        w13, w2 = values(w13, quant_config["w1_scale"]), values(w2, quant_config["w2_scale"])
        return layer(rounded(hidden_TD), w13, w2, weights_TA, ids_TA).to(hidden_TD.dtype)

    class Context:
        def __init__(self, config):
            assert config == "defaults"

        def __enter__(self):
            return self

        def __exit__(self, *_error):
            return None

    fused_moe = "vllm.model_executor.layers.fused_moe"
    contents = {
        "vllm": {},
        "vllm.config": {"VllmConfig": lambda: "defaults", "set_current_vllm_config": Context},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        fused_moe: {"fused_experts": fused_experts},
        f"{fused_moe}.config": {"fp8_w8a8_moe_quant_config": dict},
    }
    install(monkeypatch, contents)
    peer = VLLM.load()
    assert peer.version == "unknown"
    assert peer.why_not(problem, Mode.LAYER) is None
    assert "only whole layers" in peer.why_not(problem, Mode.KERNEL)
    check(peer, problem, [Mode.LAYER])


def test_flashinfer(problem, monkeypatch):
    tunings = []

    class Autotune:
        def __init__(self, is_tuning):
            assert is_tuning

        def __enter__(self):
            tunings.append(self)

        def __exit__(self, *_error):
            return None

    def cutlass_fused_moe(
        input,
        token_selected_experts,
        token_final_scales,
        fc1_expert_weights,
        fc2_expert_weights,
        output_dtype,
        quant_scales,
        use_deepseek_fp8_block_scale,
        output,
    ):
        assert use_deepseek_fp8_block_scale
        assert (token_selected_experts.dtype, token_final_scales.dtype) == (
            torch.int32,
            torch.float32,
        )
        up_EFD, gate_EFD = values(fc1_expert_weights, quant_scales[0]).chunk(2, dim=1)
        w13, w2 = torch.cat([gate_EFD, up_EFD], 1), values(fc2_expert_weights, quant_scales[1])
        y_TD = layer(rounded(input), w13, w2, token_final_scales, token_selected_experts)
        output.copy_(y_TD.to(output_dtype))
        return [output]

    contents = {
        "flashinfer": {"autotune": Autotune},
        "flashinfer.fused_moe": {"cutlass_fused_moe": cutlass_fused_moe},
    }
    install(monkeypatch, contents)
    peer = FlashInfer.load()
    assert "only whole layers" in peer.why_not(problem, Mode.KERNEL)
    if not torch.cuda.is_available():
        assert "compute capability 9.0, not cpu" in peer.why_not(problem, Mode.LAYER)
    check(peer, problem, [Mode.LAYER])
    assert len(tunings) == 1


def install(monkeypatch, contents):
    for name, names in contents.items():
        module = ModuleType(name)
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, module)
