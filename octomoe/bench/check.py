"""Whether what a contender computes is the layer: against float32, and against the reference."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import silu

from octomoe import QTensor, fused_moe
from octomoe.bench.layers import SCALING, Problem
from octomoe.core.formats import ALL

# How far an output may be from float32, whose intermediate is not quantised. Quantising it costs
# 0.02 to 0.027; Alpha-MoE, which adds up choices in bf16, came to 0.032 on an H200.
MAX_ERROR: Final = 0.04
# How far ours may be from the reference, whose intermediate is quantised.
MIN_SNR_DB: Final = 40.0


def some_tokens(problem: Problem, count: int = 16) -> Tensor:
    """Numbers of random tokens, of all if there are fewer."""
    return torch.randperm(problem.num_tokens, device=problem.hidden_TD.device)[:count]


def in_float32(problem: Problem, tokens: Tensor) -> Tensor:
    """Outputs of `tokens` by definition, the intermediate left in float32.

    Of this library nothing is used but dequantisation.
    """
    w13, w2 = problem.weights
    x = problem.x
    x_TD = (x.dequantize() if isinstance(x, QTensor) else x.float())[tokens]
    y_TD = torch.zeros_like(x_TD)
    for row, token in enumerate(tokens.tolist()):
        ids, weights = problem.topk_ids_TA[token].tolist(), problem.topk_weights_TA[token]
        for expert, weight in zip(ids, weights, strict=True):
            gate_F, up_F = (w13.expert(expert).dequantize() @ x_TD[row]).chunk(2)
            y_TD[row] += weight * (w2.expert(expert).dequantize() @ (silu(gate_F) * up_F))
    return SCALING * y_TD


def by_reference(problem: Problem, tokens: Tensor) -> Tensor:
    """Outputs of `tokens` as the library means them, the intermediate quantised; float32."""
    recipe = problem.recipe
    # A scale that all tokens share is found by looking at all of them.
    is_shared = recipe.activations is not None and recipe.activations.block[1] == ALL
    rows = slice(None) if is_shared and not recipe.is_static else tokens
    y_TD = fused_moe(
        problem.hidden_TD[rows].float(),
        problem.experts,
        problem.topk_weights_TA[rows],
        problem.topk_ids_TA[rows],
        activation_format=recipe.activations,
        routed_scaling_factor=SCALING,
        backend="reference",
    )
    return y_TD[tokens] if isinstance(rows, slice) else y_TD


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((actual.float() - expected).norm() / expected.norm()).item()


@dataclass(frozen=True, eq=False)
class Expected:
    """What must come out for some tokens: by definition, and as the library means it."""

    tokens: Tensor
    float32_TD: Tensor
    reference_TD: Tensor


# Those who search for the best configuration check many outputs of a problem, or of two in turn.
@lru_cache(maxsize=2)
def expected_of(problem: Problem) -> Expected:
    """Of random tokens, the same ones for all contenders."""
    tokens = some_tokens(problem)
    return Expected(tokens, in_float32(problem, tokens), by_reference(problem, tokens))


def errors_of(problem: Problem, outputs: dict[str, Tensor]) -> dict[str, float]:
    """How far each output is from float32.

    Raises:
        AssertionError: one is too far, or not finite somewhere.
    """
    expected = expected_of(problem)
    errors = {}
    for name, y_TD in outputs.items():
        assert y_TD.isfinite().all(), f"{name}: not all of the output is finite"
        error = relative_error(y_TD[expected.tokens], expected.float32_TD)
        assert error <= MAX_ERROR, f"{name}: relative error {error:.4f}"
        errors[name] = round(error, 4)
    return errors


def snr_of(problem: Problem, outputs: dict[str, Tensor]) -> dict[str, float]:
    """How far each output is from the reference, in dB.

    Raises:
        AssertionError: one is too far.
    """
    expected = expected_of(problem)
    found = {}
    for name, y_TD in outputs.items():
        error = relative_error(y_TD[expected.tokens], expected.reference_TD)
        snr_db = -20 * math.log10(max(error, 1e-12))
        assert snr_db > MIN_SNR_DB, f"{name}: {snr_db:.1f} dB from the reference"
        found[name] = round(snr_db, 1)
    return found


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory allocated meanwhile is full of NaN, so that what nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
