"""A layer of experts on Hopper: which kernels run it, and those for many rows in 8 bits.

    h[s]   = quantize(act(x[token of s] @ w13[e].T + b13[e]))     fused_up_sm90
    y[s]   = h[s] @ w2[e].T + b2[e]                               fused_down_sm90
    out[t] = factor * sum over a of weight[t, a] * y[slot of (t, a)]

Few rows per expert have kernels that quantise on their way (`decode_moe_sm90`); where operands meet
in bf16, `fused_moe_wide_sm90` serves many rows. For what is left the kernels for any device, in
`octomoe.kernels.fused_moe`, are faster.
"""

import torch
from torch import Tensor

from octomoe.core.device import target_of
from octomoe.core.experts import ExpertWeights, static_scale
from octomoe.core.formats import Format
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels import decode_moe_sm90 as decode
from octomoe.kernels import fused_moe as portable
from octomoe.kernels import fused_moe_wide_sm90 as wide
from octomoe.kernels.expert_tiles import STEP, has_steps
from octomoe.kernels.fused_down import combine
from octomoe.kernels.fused_down_sm90 import fused_down
from octomoe.kernels.fused_up_sm90 import fused_up
from octomoe.kernels.quantize import quantize
from octomoe.kernels.route_and_quantize import route_and_quantize
from octomoe.kernels.tiles_sm90 import has_tiles, is_known
from octomoe.tune.configs import DecodeConfig, PrefillConfig
from octomoe.tune.fused_moe import decode_config, prefill_config, wide_config
from octomoe.tune.kinds import Config
from octomoe.tune.tables import scales_of, table_config

# Places in rows and slots are 32-bit numbers here.
_MAX_ELEMENTS = 2**31


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
    config: Config | None = None,
) -> Tensor:
    """``[T, D] -> [T, D]``; see `octomoe.fused_moe`."""
    num_choices = topk_ids.shape[1]
    config = config or choose(hidden_states, experts, num_choices, activation_format)
    arguments = (hidden_states, experts, topk_weights, topk_ids)
    match config:
        case DecodeConfig():
            return decode.fused_moe(
                *arguments,
                activation_format=activation_format,
                routed_scaling_factor=routed_scaling_factor,
                expert_map=expert_map,
                config=config,
            )
        case PrefillConfig():
            run = _prefill if meets_in_8_bits(activation_format) else wide.fused_moe
            return run(
                *arguments,
                activation_format=activation_format,
                routed_scaling_factor=routed_scaling_factor,
                expert_map=expert_map,
                config=config,
            )
    return portable.fused_moe(
        *arguments,
        activation_format=activation_format,
        routed_scaling_factor=routed_scaling_factor,
        expert_map=expert_map,
        config=config,
    )


def choose(
    hidden_states: Tensor, experts: ExpertWeights, num_choices: int, format: Format | None
) -> Config | None:
    """What a layer runs with that these kernels can do: as a table says, or else a heuristic.

    None: the kernels for any device, as they see fit.
    """
    num_tokens, depth = hidden_states.shape
    num_experts, width = experts.num_experts, experts.intermediate_size
    target = target_of(hidden_states.device)
    sizes = (num_tokens, num_choices, num_experts)
    can_decode = decode.why_not(experts, num_choices, format) is None
    if not meets_in_8_bits(format):
        few = None
        if can_decode:
            pieces = 2 if format is None else 4
            few = decode_config(*sizes, width, depth, target, pieces=pieces)
        return few or wide_config(*sizes, target, has_room=wide.has_room(experts))
    assert format is not None
    kinds = ("portable", "prefill", "decode") if can_decode else ("portable", "prefill")
    tuned = table_config(*sizes, width, depth, scales_of(format), target, kinds=kinds)
    if tuned is not None:
        return tuned
    few = decode_config(*sizes, width, depth, target) if can_decode else None
    return few or prefill_config(*sizes, target)


def _prefill(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation_format: Format | None,
    routed_scaling_factor: float,
    expert_map: Tensor | None,
    config: PrefillConfig,
) -> Tensor:
    assert activation_format is not None
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
        out_dtype=hidden_states.dtype,
        routed_scaling_factor=routed_scaling_factor,
        config=config,
    )


def experts_forward(
    x: QTensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    routing: Routing,
    expert_of_block: Tensor,
    *,
    out_dtype: torch.dtype,
    routed_scaling_factor: float,
    config: PrefillConfig,
) -> Tensor:
    """What follows quantisation and routing, for many rows: ``x [T, D] -> [T, D]``.

    Slots of an expert start at multiples of ``config.rows``.
    """
    h = fused_up(x, experts, routing, expert_of_block, config)
    if not isinstance(h, QTensor):
        h = quantize(h, x.format, scale=static_scale(experts.w2_input_scale, x.format))
    y = fused_down(h, experts, routing, expert_of_block, config)
    return combine(y, topk_weights, routing, routed_scaling_factor, out_dtype, config)


def why_not(
    hidden_states: Tensor,
    experts: ExpertWeights,
    num_choices: int,
    format: Format | None,
    is_weighted_first: bool,
) -> str | None:
    """What keeps these kernels from a layer, whatever the number of rows; None if nothing does."""
    num_tokens, depth = hidden_states.shape
    width = experts.intermediate_size
    if hidden_states.dtype != torch.bfloat16:
        return f"hidden states are {hidden_states.dtype}, not bfloat16"
    if is_weighted_first:
        return "rows are weighted before the experts"
    # TMA wants rows at multiples of 16 bytes.
    if depth % 16 or width % 16:
        return f"sizes {depth} and {width} are no multiples of 16"
    if num_tokens * max(depth, num_choices * width) >= _MAX_ELEMENTS:
        return "places in rows do not fit 32 bits"
    reason = _why_not_8_bits(experts, format)
    return None if reason is None or wide.why_not(experts, format) is None else reason


def meets_in_8_bits(format: Format | None) -> bool:
    """Whether tensor cores get both operands in 8 bits, of a layer that these kernels can do."""
    return format is not None and is_known(format)


def _why_not_8_bits(experts: ExpertWeights, format: Format | None) -> str | None:
    """What keeps the operands from meeting in 8 bits."""
    steps = has_steps(format)
    if not meets_in_8_bits(format):
        return "activations are not E4M3 with float32 scales"
    if not all(has_tiles(w, steps) for w in (experts.w13, experts.w2)):
        return "weights are not E4M3 with float32 scales of rows, or of 128 x 128 blocks, in place"
    # In a tile of w13, scales of a step are one.
    if steps and experts.intermediate_size % STEP:
        return f"a width of {experts.intermediate_size} is no multiple of {STEP}"
    return None
