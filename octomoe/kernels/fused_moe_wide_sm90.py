"""A layer of experts on Hopper whose operands meet in bf16, for many rows of an expert.

    h[s]   = act(x[token of s] @ w13[e].T + b13[e])               fused_up_wide_sm90
    y[s]   = h[s] @ w2[e].T + b2[e]                               fused_down_wide_sm90
    out[t] = factor * sum over a of weight[t, a] * y[slot of (t, a)]

For 8-bit weights and bf16 rows, and for MXFP8, of which Hopper's tensor cores know no scales: a
value of 8 bits times a power of two is a bf16. x and h are then rounded to MXFP8 as in any backend.
Where an expert has few rows, the kernels of `octomoe.kernels.fused_moe` are faster.
"""

from typing import Final

import torch
from torch import Tensor

from octomoe.core.experts import ExpertWeights, Weight
from octomoe.core.formats import ALL, MXFP8, Format
from octomoe.core.layouts import ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.build_routing import build_blocks
from octomoe.kernels.expert_tiles import STEP, has_steps
from octomoe.kernels.fused_down import combine
from octomoe.kernels.fused_down_wide_sm90 import fused_down
from octomoe.kernels.fused_rows_wide_sm90 import rows_in_order
from octomoe.kernels.fused_up_wide_sm90 import fused_up
from octomoe.kernels.wide_tiles_sm90 import has_words
from octomoe.tune.configs import PrefillConfig

_MX: Final = (MXFP8.scale_dtype, MXFP8.block)


def fused_moe(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation_format: Format | None = None,
    routed_scaling_factor: float = 1.0,
    expert_map: Tensor | None = None,
    config: PrefillConfig,
) -> Tensor:
    """``[T, D] -> [T, D]``; see `octomoe.fused_moe`."""
    routed = build_blocks(topk_ids, experts.num_experts, align=config.rows, expert_map=expert_map)
    x = rows_in_order(hidden_states, activation_format, is_chained=config.is_chained)
    return experts_forward(
        x,
        experts,
        topk_weights,
        *routed,
        activation_format=activation_format,
        out_dtype=hidden_states.dtype,
        routed_scaling_factor=routed_scaling_factor,
        config=config,
    )


def experts_forward(
    x: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    routing: Routing,
    expert_of_block: Tensor,
    *,
    activation_format: Format | None,
    out_dtype: torch.dtype,
    routed_scaling_factor: float,
    config: PrefillConfig,
) -> Tensor:
    """What follows routing: ``x [T, D] -> [T, D]``, x as `rows_in_order` makes it."""
    h = fused_up(x, experts, routing, expert_of_block, activation_format, config)
    y = fused_down(h, experts, routing, expert_of_block, config)
    return combine(y, topk_weights, routing, routed_scaling_factor, out_dtype, config)


def has_room(experts: ExpertWeights) -> bool:
    """Whether registers hold a tile of 128 slots and scales of its weights."""
    return all(
        not has_steps(w.format) and (w.format.scale_dtype == torch.float32 or has_words(w))
        for w in (experts.w13, experts.w2)
        if isinstance(w, QTensor)
    )


def why_not(experts: ExpertWeights, format: Format | None) -> str | None:
    """What keeps these kernels from weights and activations; None if nothing does."""
    if format is not None and (format.scale_dtype, format.block) != _MX:
        return "activations are neither bf16 nor MXFP8"
    if not all(_is_known(w) for w in (experts.w13, experts.w2)):
        return "weights are not in 8 bits, in place, with scales of rows, steps of 128, or MXFP8"
    return None


def _is_known(w: Weight) -> bool:
    if not isinstance(w, QTensor) or w.layout == ScaleLayout.INTERLEAVED:
        return False
    steps = (ALL, STEP) if w.format.scale_dtype == torch.float32 else (MXFP8.block[2],)
    is_in_place = w.data.is_contiguous() and w.data.data_ptr() % 16 == 0
    return is_in_place and w.format.block[2] in steps
