"""A layer of experts in three launches after quantisation and routing: up, down, combine.

    h[s]   = quantize(act(x[token of s] @ w13[e].T + b13[e]))     fused_up
    y[s]   = h[s] @ w2[e].T + b2[e]                               fused_down
    out[t] = factor * sum over a of weight[t, a] * y[slot of (t, a)]

h never exists in more than 8 bits, except where few tokens leave most of a GPU idle (`fused_up`)
and under scales of whole rows. y is rounded to bf16 if the hidden states are. Sums are in a fixed
order. What the two halves cannot do goes op by op: scales that change within 128 of the depth,
operands of different 8-bit types, float32 hidden states, rows weighted before the experts.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from octomoe.core.device import target_of
from octomoe.core.experts import ExpertWeights, Weight, static_scale
from octomoe.core.formats import ALL, Format
from octomoe.core.layouts import ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing, weights_of_slots
from octomoe.kernels.activation_quantize import activation_quantize
from octomoe.kernels.build_routing import build_blocks, build_routing
from octomoe.kernels.expert_tiles import STEP, has_steps
from octomoe.kernels.fused_down import combine, fused_down
from octomoe.kernels.fused_up import activate, fused_up
from octomoe.kernels.grouped_gemm import grouped_gemm
from octomoe.kernels.permute import permute
from octomoe.kernels.quantize import quantize
from octomoe.kernels.route_and_quantize import route_and_quantize
from octomoe.kernels.unpermute import unpermute
from octomoe.tune.configs import FusedMoeConfig
from octomoe.tune.fused_moe import fused_moe_config
from octomoe.tune.tables import scales_of, table_config


def fused_moe(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation_format: Format | None = None,
    routed_scaling_factor: float = 1.0,
    apply_router_weight_on_input: bool = False,
    expert_map: Tensor | None = None,
    config: FusedMoeConfig | None = None,
) -> Tensor:
    """``[T, D] -> [T, D]``; see `octomoe.fused_moe`."""
    if apply_router_weight_on_input or not is_fused(hidden_states, experts, activation_format):
        routing = build_routing(topk_ids, experts.num_experts, expert_map=expert_map)
        y_TD = _by_ops(
            hidden_states,
            experts,
            topk_weights,
            routing,
            activation_format,
            apply_router_weight_on_input,
        )
        return (y_TD * routed_scaling_factor).to(hidden_states.dtype)
    config = config or config_of(hidden_states, experts, topk_ids.shape[1], activation_format)
    x: Tensor | QTensor
    if activation_format is None:
        x = hidden_states.contiguous()
        routed = build_blocks(
            topk_ids, experts.num_experts, align=config.rows, expert_map=expert_map
        )
    else:
        x, routed = route_and_quantize(
            hidden_states,
            activation_format,
            static_scale(experts.w13_input_scale, activation_format),
            topk_ids,
            experts.num_experts,
            align=config.rows,
            expert_map=expert_map,
            is_chained=config.is_chained,
        )
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


def is_fused(hidden_states: Tensor, experts: ExpertWeights, format: Format | None) -> bool:
    """Whether the two halves can do this; else it goes op by op."""
    weights = (experts.w13, experts.w2)
    if hidden_states.dtype == torch.float32 or not all(has_steps_only(w) for w in weights):
        return False
    if format is None:
        return all(isinstance(w, QTensor) or w.dtype == hidden_states.dtype for w in weights)
    return format.scale_dtype == torch.float32 and all(
        isinstance(w, QTensor) and w.data.dtype == format.element.dtype for w in weights
    )


def has_steps_only(w: Weight) -> bool:
    """Whether the scales of w, if it has any, are constant over each step of the depth."""
    if not isinstance(w, QTensor):
        return w.is_contiguous()
    is_plain = w.layout != ScaleLayout.INTERLEAVED and w.format.scale_dtype == torch.float32
    return is_plain and w.format.block[2] in (ALL, STEP) and w.data.is_contiguous()


def config_of(
    hidden_states: Tensor, experts: ExpertWeights, num_choices: int, format: Format | None
) -> FusedMoeConfig:
    """What a layer runs with if nothing else is asked for: as a table says, or a heuristic."""
    target = target_of(hidden_states.device)
    weights = [w.data if isinstance(w, QTensor) else w for w in (experts.w13, experts.w2)]
    num_tokens, depth = hidden_states.shape
    sizes = (num_tokens, num_choices, experts.num_experts, experts.intermediate_size)
    weight_bytes = max(w.dtype.itemsize for w in weights)
    config: Any = None
    if weight_bytes == 1:
        config = table_config(*sizes, depth, scales_of(format), target, kinds=("portable",))
    config = config or fused_moe_config(
        *sizes,
        has_steps=has_steps(format),
        row_bytes=hidden_states.dtype.itemsize if format is None else 1,
        weight_bytes=weight_bytes,
        target=target,
    )
    # TMA wants rows and the first of them at multiples of 16 bytes.
    places = [place for w in weights for place in (w.shape[2] * w.itemsize, w.data_ptr())]
    is_aligned = all(place % 16 == 0 for place in places)
    return replace(config, has_descriptors=config.has_descriptors and is_aligned)


def experts_forward(
    x: Tensor | QTensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    routing: Routing,
    expert_of_block: Tensor,
    *,
    activation_format: Format | None,
    out_dtype: torch.dtype,
    routed_scaling_factor: float,
    config: FusedMoeConfig,
) -> Tensor:
    """What follows quantisation and routing: ``x [T, D] -> [T, D]``.

    Slots of an expert start at multiples of ``config.rows``.
    """
    h = fused_up(x, experts, routing, expert_of_block, activation_format, config)
    if activation_format is not None and not isinstance(h, QTensor):
        scale = static_scale(experts.w2_input_scale, activation_format)
        h = quantize(h, activation_format, scale=scale)
    y_dtype = torch.float32 if out_dtype == torch.float16 else out_dtype
    y = fused_down(h, experts, routing, expert_of_block, y_dtype, config)
    return combine(y, topk_weights, routing, routed_scaling_factor, out_dtype, config)


def _by_ops(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    routing: Routing,
    format: Format | None,
    is_weighted_first: bool,
) -> Tensor:
    """``[T, D]`` float32, an op at a time; h and y are float32 until they are quantised, summed."""
    x: Any = hidden_states
    if is_weighted_first:
        x = _weighted(permute(x, routing), topk_weights, routing)
        topk_weights = torch.ones_like(topk_weights)
    if format is not None:
        x = quantize(x, format, scale=static_scale(experts.w13_input_scale, format))
    if not is_weighted_first:
        x = permute(x, routing)
    h: Any = grouped_gemm(x, experts.w13, routing, bias=experts.w13_bias, out_dtype=torch.float32)
    if format is None:
        h = activate(h, experts.activation, routing, hidden_states.dtype)
    else:
        scale = static_scale(experts.w2_input_scale, format)
        h = activation_quantize(h, experts.activation, format, scale=scale)
    y = grouped_gemm(h, experts.w2, routing, bias=experts.w2_bias, out_dtype=torch.float32)
    return unpermute(y, routing, topk_weights)


def _weighted(x_SD: Any, weights_TA: Tensor, routing: Routing) -> Any:
    """Rows times the weights of their choices, rounded to their dtype; zero for no token."""
    weight_S = weights_of_slots(weights_TA.float(), routing)
    return (x_SD.float() * weight_S.unsqueeze(1)).to(x_SD.dtype)
