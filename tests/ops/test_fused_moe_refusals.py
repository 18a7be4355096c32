"""`fused_moe` refuses what does not fit, and says which argument, what came and what is needed."""

import pytest
import torch

from octomoe import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_GROUP128,
    FP8_TENSOR,
    FP8_TOKEN,
    MXFP8,
    ExpertWeights,
    fused_moe,
    quantize_experts,
)

X_TD, WEIGHTS_TA, IDS_TA = torch.ones(3, 128), torch.ones(3, 2), torch.tensor([[0, 1]] * 3)
EXPERTS = ExpertWeights(w13=torch.ones(2, 256, 128), w2=torch.ones(2, 128, 128))
META = torch.device("meta")


def call(x=X_TD, experts=EXPERTS, weights=WEIGHTS_TA, ids=IDS_TA, weight_format=None, **options):
    if weight_format is not None:
        experts = quantize_experts(experts, weight_format)
    return lambda: fused_moe(x, experts, weights, ids, **options)


def on_meta():
    return ExpertWeights(w13=EXPERTS.w13.to(META), w2=EXPERTS.w2.to(META))


CASES = {
    "experts": (
        TypeError,
        "fused_moe: experts is a dict, but needs an ExpertWeights",
        call(experts={}),
    ),
    "hidden dtype": (TypeError, "hidden_states has dtype torch.int32, but ne", call(X_TD.int())),
    "hidden fp8": (
        TypeError,
        "hidden_states has dtype .*; dequantize it first",
        call(X_TD.to(torch.float8_e4m3fn)),
    ),
    "hidden rank": (
        ValueError,
        r"hidden_states has shape \(1, 3, 128\), but needs \[T, D\]",
        call(X_TD[None]),
    ),
    "hidden width": (
        ValueError,
        r"hidden_states has shape \(3, 64\), but needs \(3, 128\)",
        call(X_TD[:, :64]),
    ),
    "ids rank": (ValueError, r"topk_ids has shape \(2,\), but needs \[T, A\]", call(ids=IDS_TA[0])),
    "ids dtype": (
        TypeError,
        "topk_ids has dtype torch.float32, but needs int32 or int64",
        call(ids=IDS_TA.float()),
    ),
    "ids rows": (
        ValueError,
        r"topk_ids has shape \(2, 2\), but needs \(3, 2\)",
        call(ids=IDS_TA[:2]),
    ),
    "id too large": (
        ValueError,
        "fused_moe: topk_ids holds ids from 1 to 2, but needs ids from 0 to 1, or -1",
        call(ids=IDS_TA + 1),
    ),
    "id too small": (ValueError, "topk_ids holds ids from -2 to -1", call(ids=IDS_TA - 2)),
    "id past the map": (
        ValueError,
        "topk_ids holds ids from 0 to 1, but needs ids from 0 to 0",
        call(expert_map=torch.tensor([0])),
    ),
    "weights dtype": (
        TypeError,
        "topk_weights has dtype torch.int32",
        call(weights=WEIGHTS_TA.int()),
    ),
    "weights shape": (
        ValueError,
        r"topk_weights has shape \(3, 1\), but needs \(3, 2\)",
        call(weights=WEIGHTS_TA[:, :1]),
    ),
    "too many choices": (
        ValueError,
        "topk_ids needs 4294967296 slots, but needs at most 2147483647 slots",
        call(
            X_TD[:1].expand(2**31, 128),
            weights=WEIGHTS_TA[:1].expand(2**31, 2),
            ids=IDS_TA[:1].expand(2**31, 2),
        ),
    ),
    "format's name": (
        TypeError,
        "activation_format is a str.*Format.parse..mxfp8",
        call(activation_format="mxfp8"),
    ),
    "tokens share scales": (
        ValueError,
        "activation_format is fp8_block128, but needs scales that no two tokens share, or one",
        call(weight_format=FP8_BLOCK128, activation_format=FP8_BLOCK128),
    ),
    "unquantised x token": (
        ValueError,
        "fused_moe: formats of w and x are unquantised x fp8_row, but needs quantised weights",
        call(activation_format=FP8_TOKEN),
    ),
    "block x token": (
        ValueError,
        "are fp8_block128 x fp8_row, but needs activations scaled along K by blocks of 128",
        call(weight_format=FP8_BLOCK128, activation_format=FP8_TOKEN),
    ),
    "channel x group": (
        ValueError,
        "are fp8_row x fp8_group128, but needs activations scaled along K by the whole axis",
        call(weight_format=FP8_CHANNEL, activation_format=FP8_GROUP128),
    ),
    "mx x tensor": (
        ValueError,
        "are mxfp8 x fp8_tensor, but needs activations scaled along K by blocks of 32",
        call(weight_format=MXFP8, activation_format=FP8_TENSOR),
    ),
    "experts' device": (
        ValueError,
        "experts is on meta, but needs the other tensors' device cpu",
        call(experts=on_meta()),
    ),
    "weights' device": (ValueError, "topk_weights is on meta", call(weights=WEIGHTS_TA.to(META))),
    "ids' device": (ValueError, "topk_ids is on meta", call(ids=IDS_TA.to(META))),
    "map's device": (
        ValueError,
        "expert_map is on meta",
        call(expert_map=torch.tensor([0, 1]).to(META)),
    ),
    "map's dtype": (
        TypeError,
        "fused_moe: expert_map has dtype torch.float32, but needs int32 or int64",
        call(expert_map=torch.tensor([0.0, 1.0])),
    ),
    "map's rank": (
        ValueError,
        r"fused_moe: expert_map has shape \(2, 1\), but needs \[E\]",
        call(expert_map=torch.tensor([[0], [1]])),
    ),
    "out's device": (ValueError, "out is on meta", call(out=torch.ones(3, 128, device=META))),
    "out's shape": (
        ValueError,
        r"out has shape \(4, 128\), but needs \(3, 128\)",
        call(out=torch.ones(4, 128)),
    ),
    "out's dtype": (
        TypeError,
        "out has dtype torch.bfloat16, but needs hidden_states' torch.float32",
        call(out=torch.ones(3, 128).bfloat16()),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), CASES.values(), ids=CASES)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
