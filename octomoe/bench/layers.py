"""Layers of experts to time, tokens for them, and what no kernel can avoid doing.

SwiGLU; router weights are applied after the experts, then a scaling factor.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import sqrt
from typing import Final

import torch
from torch import Tensor

from octomoe import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_TENSOR,
    FP8_TOKEN,
    MXFP8,
    ExpertWeights,
    Format,
    QTensor,
    append_shared_experts,
    quantize,
)
from octomoe.core.experts import Weight, static_scale

SCALING: Final = 2.5
# Mean of squares of the scales that `make_experts` draws.
_SCALE_SQUARED: Final = 0.0105**2


class Mode(StrEnum):
    """What is timed: from quantised rows and sorted choices on, or from bf16 rows and logits on."""

    KERNEL = "kernel"
    LAYER = "layer"


class Skew(StrEnum):
    """Which experts are chosen: each as often as any other, or the first by half of the tokens."""

    BALANCED = "balanced"
    SKEWED = "skewed"


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


@dataclass(frozen=True, slots=True)
class Recipe:
    """What weights and activations are stored as.

    Attributes:
        weights: format of both weights.
        activations: of hidden states and intermediate; None leaves them in bf16.
        is_static: activations have a scale that is known before them.
    """

    weights: Format
    activations: Format | None
    is_static: bool = False


RECIPES: Final = {
    "block128": Recipe(FP8_BLOCK128, FP8_GROUP128),
    "tensor": Recipe(FP8_TENSOR, FP8_TENSOR),
    "tensor-static": Recipe(FP8_TENSOR, FP8_TENSOR, is_static=True),
    "channel": Recipe(FP8_CHANNEL, FP8_TOKEN),
    "expert": Recipe(FP8_EXPERT, FP8_TOKEN),
    "mxfp8": Recipe(MXFP8, MXFP8),
    "weight-only": Recipe(FP8_BLOCK128, None),
}


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer and tokens for it.

    Attributes:
        hidden_TD: bf16.
        x: the same, quantised where the recipe says so.
        logits_TR: float32 scores of the experts that the router knows; ids and weights are theirs.
        has_shared: every token chooses the last expert too, which the router does not know.
    """

    hidden_TD: Tensor
    x: QTensor | Tensor
    experts: ExpertWeights
    topk_weights_TA: Tensor
    topk_ids_TA: Tensor
    logits_TR: Tensor
    recipe: Recipe
    has_shared: bool = False

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.hidden_TD.shape[0]

    @property
    def num_choices(self) -> int:
        """A."""
        return self.topk_ids_TA.shape[1]

    @property
    def weights(self) -> tuple[QTensor, QTensor]:
        """w13 and w2."""
        w13, w2 = self.experts.w13, self.experts.w2
        assert isinstance(w13, QTensor)
        assert isinstance(w2, QTensor)
        return w13, w2


@dataclass(frozen=True, slots=True)
class Work:
    """What no kernel can avoid: bytes of active experts and of rows in and out; operations."""

    num_active: int
    num_bytes: int
    num_flops: int

    def floor_us(self, tb_per_s: float, tflop_per_s: float) -> float:
        """Microseconds of whichever takes longer."""
        return max(self.num_bytes / tb_per_s, self.num_flops / tflop_per_s) / 1e6


def make_experts(
    shape: Shape, device: torch.device | str, recipe: Recipe = RECIPES["block128"]
) -> ExpertWeights:
    """Random weights, made in 8 bits."""
    num_experts, width, depth = shape.num_experts, shape.width, shape.hidden_size
    w13 = _weight((num_experts, 2 * width, depth), recipe.weights, device)
    w2 = _weight((num_experts, depth, width), recipe.weights, device)
    if not recipe.is_static:
        return ExpertWeights(w13, w2)
    # Rows hold normal numbers, none of which is larger than 6. Gate and up do too, once they are
    # divided by `deviation`.
    deviation = sqrt(depth * _SCALE_SQUARED)
    largest = torch.tensor([6.0, (6.0 * deviation) ** 2], device=device)
    x_scale, h_scale = (largest / FP8_TENSOR.target_max).chunk(2)
    return ExpertWeights(w13, w2, w13_input_scale=x_scale, w2_input_scale=h_scale)


def _weight(size: tuple[int, ...], format: Format, device: torch.device | str) -> Weight:
    data = torch.randn(size, dtype=torch.bfloat16, device=device).to(format.element.dtype)
    scale_shape = format.scale_shape(size)
    if format.scale_dtype == torch.float8_e8m0fnu:
        # Bytes of 2^-8 to 2^-6.
        codes = torch.randint(119, 122, scale_shape, dtype=torch.uint8, device=device)
        return QTensor(data, codes.view(format.scale_dtype), format)
    scale = torch.rand(scale_shape, device=device) * 0.01 + 0.005
    return QTensor(data, scale, format)


def make_problem(
    shape: Shape,
    experts: ExpertWeights,
    num_tokens: int,
    recipe: Recipe = RECIPES["block128"],
    skew: Skew = Skew.BALANCED,
) -> Problem:
    """Random rows, each for random experts."""
    device = experts.device
    hidden_TD = torch.randn(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
    logits_TR = torch.randn(num_tokens, shape.num_experts - shape.has_shared, device=device)
    if skew is Skew.SKEWED:
        logits_TR = _skew(logits_TR)
    weights_TA, ids_TA = choose(logits_TR, shape.num_choices, has_shared=shape.has_shared)
    x: QTensor | Tensor = hidden_TD
    if recipe.activations is not None:
        scale = static_scale(experts.w13_input_scale, recipe.activations)
        x = quantize(hidden_TD, recipe.activations, scale=scale)
    return Problem(hidden_TD, x, experts, weights_TA, ids_TA, logits_TR, recipe, shape.has_shared)


def _skew(logits_TR: Tensor) -> Tensor:
    """Half of the tokens like the first expert a little more than any other, the rest least."""
    num_tokens = logits_TR.shape[0]
    is_first_T = torch.randperm(num_tokens, device=logits_TR.device) < (num_tokens + 1) // 2
    low_T, high_T = logits_TR.aminmax(dim=1)
    first_T = torch.where(is_first_T, high_T + 0.1, low_T - 0.1)
    return torch.cat([first_T.unsqueeze(1), logits_TR[:, 1:]], dim=1)


def choose(logits_TR: Tensor, num_choices: int, *, has_shared: bool) -> tuple[Tensor, Tensor]:
    """Router weights ``[T, A]`` float32 and ids int32, as all contenders compute them."""
    top = logits_TR.topk(num_choices - has_shared, dim=1)
    weights_TA, ids_TA = top.values.softmax(dim=1), top.indices.int()
    if not has_shared:
        return weights_TA, ids_TA
    num_routed = logits_TR.shape[1]
    return append_shared_experts(
        weights_TA, ids_TA, num_experts=num_routed, num_shared=1, weight=1 / SCALING
    )


def choices_of(problem: Problem) -> tuple[Tensor, Tensor]:
    """Weights and ids, from the router's scores."""
    return choose(problem.logits_TR, problem.num_choices, has_shared=problem.has_shared)


def active_experts(problem: Problem) -> Tensor:
    """``[n]`` int32, those that a token chose."""
    counts_E = problem.topk_ids_TA.flatten().long().bincount(minlength=1)
    return counts_E.nonzero().flatten().int()


def work_of(problem: Problem, mode: Mode = Mode.KERNEL) -> Work:
    """Each active expert's weights are read once; rows come in once, with a byte per element if
    they are quantised, and go out with two. Scales are left out."""
    per_expert = 3 * problem.experts.intermediate_size * problem.experts.hidden_size
    num_active = active_experts(problem).numel()
    row_bytes = 1 if mode is Mode.KERNEL and isinstance(problem.x, QTensor) else 2
    num_bytes = num_active * per_expert + (row_bytes + 2) * problem.hidden_TD.numel()
    return Work(num_active, num_bytes, 2 * problem.topk_ids_TA.numel() * per_expert)
