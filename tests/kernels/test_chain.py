"""Kernels launched before their predecessors end; GPU only.

Claimed: none reads what a kernel before it is still writing, however far before, and none writes
what one before it still reads.
"""

import pytest
import torch

from octomoe import FP8_BLOCK128, FP8_GROUP128, ExpertWeights, fused_moe, quantize_experts


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "sm90"])
@pytest.mark.parametrize("activation_format", [None, FP8_GROUP128], ids=["bf16", "group128"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_choices"),
    # Of the last ones' choices three kernels make a routing, with memory of their own.
    [(2, 8, 2), (40, 8, 2), (700, 8, 2), (600, 128, 8), (2000, 128, 8)],
)
def test_choices_that_come_and_go(
    num_tokens, num_experts, num_choices, activation_format, backend, assert_same_bits
):
    width, depth = 512, 1024
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    experts = ExpertWeights(
        torch.randn(num_experts, 2 * width, depth, **options) / 32,
        torch.randn(num_experts, depth, width, **options) / 32,
    )
    experts = quantize_experts(experts, FP8_BLOCK128)
    x_TD = torch.randn(num_tokens, depth, **options)
    weights_TA = torch.rand(num_tokens, num_choices, device="cuda")
    ids_TA = torch.full((num_tokens, num_choices), -1, dtype=torch.int32, device="cuda")

    def run() -> torch.Tensor:
        return fused_moe(
            x_TD, experts, weights_TA, ids_TA, activation_format=activation_format, backend=backend
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = run()
    for _ in range(10):
        # What a replay without choices leaves behind says that there are no rows.
        ids_TA.fill_(-1)
        graph.replay()
        assert not out_TD.any()
        x_TD.normal_()
        ids_TA.copy_(torch.randint(num_experts, ids_TA.shape, device="cuda"))
        graph.replay()
        assert_same_bits(out_TD, run())
