"""Layers of block-scaled FP8 experts to time, tokens for them, and what must come out.

Weights have a scale per 128 x 128, activations one per 1 x 128. SwiGLU; router weights are applied
after the experts, then a scaling factor.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import silu

from octomoe import FP8_BLOCK128, FP8_GROUP128, ExpertWeights, QTensor, fused_moe, quantize

SCALING: Final = 2.5


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer as one GPU holds it.

    Attributes:
        model: whose layer, and how many GPUs share the width of its experts.
        num_experts, width, hidden_size, num_choices: E, F, D, A.
        has_shared: every token chooses the last expert.
    """

    model: str
    num_experts: int
    width: int
    hidden_size: int
    num_choices: int
    has_shared: bool = False


SHAPES: Final = {
    "Q3N": Shape("Qwen3-Next-80B-A3B, 4 GPUs", 512, 128, 2048, 10),
    "DSV": Shape("DeepSeek-V3, 8 GPUs", 257, 256, 7168, 9, has_shared=True),
    "Q235": Shape("Qwen3-235B-A22B, 4 GPUs", 128, 384, 4096, 8),
    "Q30": Shape("Qwen3-30B-A3B, 1 GPU", 128, 768, 2048, 8),
}


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer and tokens for it; `x` are the hidden states, quantised."""

    hidden_TD: Tensor
    x: QTensor
    experts: ExpertWeights
    topk_weights_TA: Tensor
    topk_ids_TA: Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.hidden_TD.shape[0]


@dataclass(frozen=True, slots=True)
class Work:
    """What no kernel can avoid: bytes of active experts and of rows in and out; operations."""

    num_active: int
    num_bytes: int
    num_flops: int

    def floor_us(self, tb_per_s: float, tflop_per_s: float) -> float:
        """Microseconds of whichever takes longer."""
        return max(self.num_bytes / tb_per_s, self.num_flops / tflop_per_s) / 1e6


def make_experts(shape: Shape, device: torch.device | str) -> ExpertWeights:
    """Random weights, made in FP8; outputs are of order one."""

    def weight(rows: int, columns: int) -> QTensor:
        size = (shape.num_experts, rows, columns)
        data = torch.randn(size, dtype=torch.bfloat16, device=device).to(torch.float8_e4m3fn)
        scale = torch.rand(FP8_BLOCK128.scale_shape(size), device=device) * 0.01 + 0.005
        return QTensor(data, scale, FP8_BLOCK128)

    w13 = weight(2 * shape.width, shape.hidden_size)
    return ExpertWeights(w13, weight(shape.hidden_size, shape.width))


def make_problem(shape: Shape, experts: ExpertWeights, num_tokens: int) -> Problem:
    """Random rows, each for random experts of equal chance."""
    device, num_routed = experts.device, shape.num_experts - shape.has_shared
    hidden_TD = torch.randn(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
    scores_TE = torch.rand(num_tokens, num_routed, device=device)
    ids_TA = scores_TE.topk(shape.num_choices - shape.has_shared, dim=1).indices
    if shape.has_shared:
        shared_T1 = ids_TA.new_full((num_tokens, 1), num_routed)
        ids_TA = torch.cat([ids_TA, shared_T1], dim=1)
    weights_TA = torch.randn(num_tokens, shape.num_choices, device=device).softmax(dim=1)
    x = quantize(hidden_TD, FP8_GROUP128)
    return Problem(hidden_TD, x, experts, weights_TA, ids_TA.int())


def work_of(problem: Problem) -> Work:
    """Each active expert's weights are read once; rows come in with a byte per element and go out
    with two. Scales are left out."""
    experts = problem.experts
    per_expert = 3 * experts.intermediate_size * experts.hidden_size
    num_active = problem.topk_ids_TA.unique().numel()
    num_bytes = num_active * per_expert + 3 * problem.hidden_TD.numel()
    return Work(num_active, num_bytes, 2 * problem.topk_ids_TA.numel() * per_expert)


def some_tokens(problem: Problem, count: int = 16) -> Tensor:
    """Numbers of random tokens, of all if there are fewer."""
    return torch.randperm(problem.num_tokens, device=problem.hidden_TD.device)[:count]


def in_float32(problem: Problem, tokens: Tensor) -> Tensor:
    """Outputs of `tokens` by definition, the intermediate left in float32.

    Of this library nothing is used but dequantisation.
    """
    w13, w2 = problem.experts.w13, problem.experts.w2
    assert isinstance(w13, QTensor)
    assert isinstance(w2, QTensor)
    x_TD = problem.x.dequantize()[tokens]
    y_TD = torch.zeros_like(x_TD)
    for row, token in enumerate(tokens.tolist()):
        ids, weights = problem.topk_ids_TA[token].tolist(), problem.topk_weights_TA[token]
        for expert, weight in zip(ids, weights, strict=True):
            gate_F, up_F = (w13.expert(expert).dequantize() @ x_TD[row]).chunk(2)
            y_TD[row] += weight * (w2.expert(expert).dequantize() @ (silu(gate_F) * up_F))
    return SCALING * y_TD


def by_reference(problem: Problem, tokens: Tensor) -> Tensor:
    """Outputs of `tokens` as the library means them, the intermediate quantised; float32."""
    return fused_moe(
        problem.hidden_TD[tokens].float(),
        problem.experts,
        problem.topk_weights_TA[tokens],
        problem.topk_ids_TA[tokens],
        activation_format=FP8_GROUP128,
        routed_scaling_factor=SCALING,
        backend="reference",
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((actual.float() - expected).norm() / expected.norm()).item()
