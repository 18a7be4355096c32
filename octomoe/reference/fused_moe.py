"""A whole MoE layer: what `fused_moe` means, in terms of the other reference ops.

    y[t] = routed_scaling_factor * sum over a of weight[t, a] * expert(topk_ids[t, a])(x[t])
    expert(x) = act(x @ w13.T + b13) @ w2.T + b2

Hidden states and intermediate values are quantised once each. Two more values are rounded, to the
dtype of the hidden states: the intermediate of weight-only experts, and rows that are weighted
before the experts. Sums are float32, over the choices of a token in their order.
"""

import torch
from torch import Tensor

from octomoe.core.experts import ExpertWeights, static_scale
from octomoe.core.formats import Format
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing, weights_of_slots
from octomoe.reference.activation_quantize import activate, activation_quantize
from octomoe.reference.build_routing import build_routing
from octomoe.reference.grouped_gemm import grouped_gemm
from octomoe.reference.permute import permute
from octomoe.reference.quantize import quantize
from octomoe.reference.unpermute import unpermute


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
) -> Tensor:
    """``[T, D] -> [T, D]``; see `octomoe.fused_moe`."""
    routing = build_routing(topk_ids, experts.num_experts, expert_map=expert_map)
    if apply_router_weight_on_input:
        x_SD = _weighted_rows(hidden_states, topk_weights, routing)
        x = x_SD if activation_format is None else _quantize_in(x_SD, experts, activation_format)
        topk_weights = torch.ones_like(topk_weights)
    elif activation_format is None:
        x = permute(hidden_states, routing)
    else:
        x = permute(_quantize_in(hidden_states, experts, activation_format), routing)

    h_SN = grouped_gemm(x, experts.w13, routing, bias=experts.w13_bias, out_dtype=torch.float32)
    if activation_format is None:
        h: Tensor | QTensor = activate(h_SN, experts.activation).to(hidden_states.dtype)
    else:
        scale = static_scale(experts.w2_input_scale, activation_format)
        h = activation_quantize(h_SN, experts.activation, activation_format, scale=scale)
    y_SD = grouped_gemm(h, experts.w2, routing, bias=experts.w2_bias, out_dtype=torch.float32)

    y_TD = unpermute(y_SD, routing, topk_weights)
    return (y_TD * routed_scaling_factor).to(hidden_states.dtype)


def _quantize_in(x: Tensor, experts: ExpertWeights, format: Format) -> QTensor:
    return quantize(x, format, scale=static_scale(experts.w13_input_scale, format))


def _weighted_rows(x_TD: Tensor, topk_weights_TA: Tensor, routing: Routing) -> Tensor:
    """Rows in slot order, each multiplied by its router weight, in the dtype of x."""
    x_SD = permute(x_TD, routing)
    assert isinstance(x_SD, Tensor)
    weight_S = weights_of_slots(topk_weights_TA.to(torch.float32), routing)
    return (x_SD.to(torch.float32) * weight_S.unsqueeze(1)).to(x_TD.dtype)
