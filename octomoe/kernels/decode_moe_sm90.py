"""A layer of experts on Hopper, for few rows: up, down and combine, and nothing around them.

    h[c]   = act(quantize(x[token of c]) @ w13[e of c].T + b13[e])     decode_up_sm90
    y[c]   = quantize(h[c]) @ w2[e of c].T + b2[e]                     decode_down_sm90
    out[t] = factor * sum over a of weight[t, a] * y[t, a]             _combine_kernel

Every kernel is launched before its predecessor ends. Rows are in the order of choices c = (t, a).
"""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.experts import ExpertWeights, static_scale
from octomoe.core.formats import ALL, Format
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.build_routing import Ids, _load_experts, build_blocks, ids_of
from octomoe.kernels.chain import _wait_for_predecessor, chain_arguments
from octomoe.kernels.decode_choices_sm90 import MOST_SORTED, sorted_inside, tables_of
from octomoe.kernels.decode_down_sm90 import decode_down
from octomoe.kernels.decode_up_sm90 import decode_up
from octomoe.kernels.expert_tiles import has_steps
from octomoe.kernels.quantize import quantize
from octomoe.kernels.unpermute import _weighted_row
from octomoe.tune.configs import DecodeConfig

# Choices of a token whose truth fits a number.
_MOST_CHOICES: Final = 62


@triton.jit
def _combine_kernel(
    y_ptr,
    weights_ptr,
    ids,
    out_ptr,
    num_experts,
    num_columns,
    weights_stride_token,
    weights_stride_choice,
    factor,
    HAS_MAP: tl.constexpr,
    CHOICES: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """``out[t] = factor * sum over a of weights[t, a] * y[t, a]``, in that order."""
    num_tiles = tl.cdiv(num_columns, TILE_COLUMNS)
    token = (tl.program_id(0) // num_tiles).to(tl.int64)
    column = tl.program_id(0) % num_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    is_inside = column < num_columns
    # Which choices count is known before there is a y.
    kept = token * 0
    for a in tl.static_range(CHOICES):
        choice = token * CHOICES + a
        expert = _load_experts(ids, choice, choice + 1, num_experts, HAS_MAP)
        kept |= (expert < num_experts).to(tl.int64) << a
    _wait_for_predecessor(True)
    total = tl.zeros([TILE_COLUMNS], tl.float32)
    for a in tl.static_range(CHOICES):
        row = tl.where((kept >> a) & 1 != 0, token * CHOICES + a, -1)
        total += _weighted_row(
            y_ptr + column,
            weights_ptr,
            row,
            is_inside,
            num_columns,
            token * weights_stride_token + a * weights_stride_choice,
            True,
        )
    out = (total * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * num_columns + column, out, mask=is_inside)


def fused_moe(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation_format: Format,
    routed_scaling_factor: float,
    expert_map: Tensor | None,
    config: DecodeConfig,
) -> Tensor:
    """``[T, D] -> [T, D]``; see `octomoe.fused_moe`."""
    routed = None
    if is_sorted := sorts_before(topk_ids, config):
        routed = build_blocks(
            topk_ids, experts.num_experts, align=config.rows, expert_map=expert_map
        )
    x: Tensor | QTensor = hidden_states.contiguous()
    if encodes_before(experts, activation_format, config):
        scale = static_scale(experts.w13_input_scale, activation_format)
        x = quantize(hidden_states, activation_format, scale=scale, is_chained=is_sorted)
    return experts_forward(
        x,
        experts,
        topk_weights,
        topk_ids,
        routed,
        activation_format=activation_format,
        routed_scaling_factor=routed_scaling_factor,
        expert_map=expert_map,
        config=config,
    )


def sorts_before(topk_ids: Tensor, config: DecodeConfig) -> bool:
    """Whether choices are sorted before the three kernels, and not by each of their programs."""
    return config.is_sorted or topk_ids.numel() > MOST_SORTED


def encodes_before(experts: ExpertWeights, format: Format, config: DecodeConfig) -> bool:
    """Whether rows are quantised before the three kernels, and not on their way."""
    # A scale that is a row's own comes from all of it.
    is_static = static_scale(experts.w13_input_scale, format) is not None
    return config.is_encoded or not (has_steps(format) or is_static)


def experts_forward(
    x: Tensor | QTensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    routed: tuple[Routing, Tensor] | None,
    *,
    activation_format: Format,
    routed_scaling_factor: float,
    config: DecodeConfig,
    expert_map: Tensor | None = None,
) -> Tensor:
    """The three kernels: ``x [T, D] -> [T, D]`` in bf16; x may be quantised.

    `routed`: a routing, whose slots of an expert start at multiples of ``config.rows``, and the
    experts of its blocks; without it, programs sort the choices.
    """
    tables = tables_of(routed, topk_ids)
    ids = ids_of(topk_ids, expert_map, experts.num_experts)
    num_tokens = topk_ids.shape[0]
    count = sorted_inside(topk_ids.numel()) if routed is None else 0
    h = decode_up(x, experts, ids, tables, num_tokens, count, activation_format, config)
    y = decode_down(h, experts, ids, tables, num_tokens, count, activation_format, config)
    return combine(
        y, topk_weights, ids, experts.num_experts, routed_scaling_factor, config.combined
    )


def combine(
    y: Tensor, topk_weights: Tensor, ids: Ids, num_experts: int, factor: float, columns: int
) -> Tensor:
    """``y [T * A, D] -> [T, D]``: the weighted sum over the choices of a token, times `factor`."""
    num_tokens, num_columns = topk_weights.shape[0], y.shape[1]
    out = y.new_empty((num_tokens, num_columns))
    columns = min(triton.next_power_of_2(num_columns), columns)
    _combine_kernel[(num_tokens * triton.cdiv(num_columns, columns),)](
        y,
        topk_weights,
        ids,
        out,
        num_experts,
        num_columns,
        *topk_weights.stride(),
        factor,
        HAS_MAP=ids.has_map,
        CHOICES=topk_weights.shape[1],
        TILE_COLUMNS=columns,
        num_warps=max(min(columns // 256, 8), 1),
        enable_fp_fusion=False,
        **chain_arguments(True),
    )
    return out


def why_not(experts: ExpertWeights, num_choices: int, format: Format) -> str | None:
    """What keeps these kernels from a layer that those for many rows can do."""
    if num_choices > _MOST_CHOICES:
        return f"tokens make {num_choices} choices, more than {_MOST_CHOICES}"
    if format.block[1] == ALL and static_scale(experts.w2_input_scale, format) is None:
        return "the intermediate has one scale, which all of its rows make"
    return None
