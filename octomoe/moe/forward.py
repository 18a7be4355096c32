"""The walk of a hidden state through a layer of experts, op by op.

`octomoe.fused_moe` is the same walk in one call, for a backend that fuses it. Here each step is an
op of its own, so that a dispatch or a combine across ranks can stand between them.
"""

import torch
from torch import Tensor

from octomoe.core.experts import ExpertWeights, static_scale
from octomoe.core.formats import Format
from octomoe.ops.activation_quantize import activation_quantize
from octomoe.ops.build_routing import build_routing
from octomoe.ops.grouped_gemm import grouped_gemm
from octomoe.ops.permute import permute
from octomoe.ops.quantize import quantize
from octomoe.ops.unpermute import unpermute


def moe_forward(
    hidden_states_TD: Tensor,
    experts: ExpertWeights,
    topk_weights_TA: Tensor,
    topk_ids_TA: Tensor,
    *,
    activation_format: Format,
    expert_map: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One layer of quantised experts: quantised twice, never dequantised, never copied to align.

    Args:
        hidden_states_TD: ``[T, D]`` bf16, fp16 or float32.
        experts: quantised experts.
        topk_weights_TA: ``[T, A]`` float.
        topk_ids_TA: ``[T, A]`` int32 or int64; -1 drops a choice.
        activation_format: what hidden states and intermediate are quantised to.
        expert_map: ``[E]`` int, local id of every global expert or -1.
        backend: of every op.

    Returns:
        ``[T, D]`` in the dtype of hidden_states.

    Raises:
        TypeError, ValueError, NotImplementedError: as the ops.
    """
    x_scale = static_scale(experts.w13_input_scale, activation_format)
    h_scale = static_scale(experts.w2_input_scale, activation_format)

    routing = build_routing(
        topk_ids_TA, experts.num_experts, expert_map=expert_map, backend=backend
    )
    x_TD = quantize(hidden_states_TD, activation_format, scale=x_scale, backend=backend)
    x_SD = permute(x_TD, routing, backend=backend)
    h_SN = grouped_gemm(
        x_SD, experts.w13, routing, bias=experts.w13_bias, out_dtype=torch.float32, backend=backend
    )
    h_SF = activation_quantize(
        h_SN, experts.activation, activation_format, scale=h_scale, backend=backend
    )
    y_SD = grouped_gemm(
        h_SF, experts.w2, routing, bias=experts.w2_bias, out_dtype=torch.float32, backend=backend
    )
    return unpermute(y_SD, routing, topk_weights_TA, backend=backend).to(hidden_states_TD.dtype)
