"""Static activation scales from text: how large what enters each expert's projections becomes.

An expert's scale is the largest magnitude among the rows that were routed to it, over 448; hidden
states for gate and up, the activation's output for down. An expert that saw no token gets the
layer's scale: never zero, never infinite.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import FP8_TENSOR, FP8_TOKEN
from octomoe.errors import refusal
from octomoe.ops.activation_quantize import activation_quantize
from octomoe.ops.build_routing import build_routing
from octomoe.ops.grouped_gemm import grouped_gemm
from octomoe.ops.permute import permute
from octomoe.ops.quantize import quantize


@dataclass(frozen=True)
class LayerScales:
    """Static scales of one layer.

    Attributes:
        w13_E, w2_E: scale of what enters each expert's up- and down-projection.
        unseen: experts that saw no token; they have the layer's scale.
    """

    w13_E: tuple[float, ...]
    w2_E: tuple[float, ...]
    unseen: tuple[int, ...]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    originals: dict[str, ExpertWeights],
    batches: list[Tensor],
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, LayerScales]:
    """Run text through an unquantised model and measure every expert's inputs.

    Args:
        model: called with token ids ``[B, L]``.
        originals: name of each experts module, which takes ``(hidden_states [T, D], ids [T, A],
            weights [T, A])`` -> its weights.
        batches: token ids.
        on_batch: called after each batch.

    Returns:
        Module name -> its scales.

    Raises:
        ValueError: a layer saw no token, or a magnitude is not finite.
    """
    amax = {name: torch.zeros(2, experts.num_experts) for name, experts in originals.items()}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(_measure(experts, amax[name]))
        for name, experts in originals.items()
    ]
    try:
        for tokens_BL in batches:
            model(tokens_BL)
            on_batch()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _scales(name, scales) for name, scales in amax.items()}


def _measure(experts: ExpertWeights, amax_2E: Tensor) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_TD, ids_TA = inputs[0].reshape(-1, experts.hidden_size), inputs[1]
        ids_TA = torch.where(ids_TA < experts.num_experts, ids_TA, -1)
        routing = build_routing(ids_TA, experts.num_experts)
        x_SD = permute(x_TD, routing)
        assert isinstance(x_SD, Tensor)
        h_SF = grouped_gemm(
            x_SD, experts.w13, routing, bias=experts.w13_bias, out_dtype=torch.float32
        )
        counts = routing.expert_offsets.diff()
        expert_S = torch.repeat_interleave(torch.arange(experts.num_experts), counts)
        for row, q in enumerate(
            (quantize(x_SD, FP8_TOKEN), activation_quantize(h_SF, experts.activation, FP8_TOKEN))
        ):
            scale_S = q.scale[: expert_S.numel(), 0]
            amax_2E[row].scatter_reduce_(0, expert_S, scale_S, "amax")

    return hook


def _scales(name: str, scale_2E: Tensor) -> LayerScales:
    smallest = FP8_TENSOR.min_scale
    if not scale_2E.isfinite().all() or not (scale_2E.amax(dim=1) > smallest).all():
        got = f"give {name} no finite scale"
        needs = "text that reaches every layer with finite hidden states"
        raise ValueError(refusal("calibrate", "batches", got, needs))
    unseen = (scale_2E[0] == 0).nonzero().flatten().tolist()
    # What saw tokens, but only zeros, is treated alike.
    filled = torch.where(scale_2E > smallest, scale_2E, scale_2E.amax(1, keepdim=True))
    return LayerScales(tuple(filled[0].tolist()), tuple(filled[1].tolist()), tuple(unseen))
