"""A layer of experts on Hopper, for few rows: up, down and combine, and nothing around them.

    h[c]   = act(quantize(x[token of c]) @ w13[e of c].T + b13[e])     decode_up_sm90
    y[c]   = quantize(h[c]) @ w2[e of c].T + b2[e]                     decode_down_sm90
    out[t] = factor * sum over a of weight[t, a] * y[t, a]             _combine_kernel

Every kernel is launched before its predecessor ends. Rows are in the order of choices c = (t, a).
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.experts import ExpertWeights, Weight, static_scale
from octomoe.core.formats import ALL, MXFP8, Format
from octomoe.core.layouts import ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.build_routing import Ids, _load_experts, build_blocks, ids_of
from octomoe.kernels.chain import _wait_for_predecessor, chain_arguments
from octomoe.kernels.decode_choices_sm90 import MOST_SORTED, sorted_inside, tables_of
from octomoe.kernels.decode_down_sm90 import decode_down
from octomoe.kernels.decode_up_sm90 import decode_up
from octomoe.kernels.expert_tiles import STEP, has_steps
from octomoe.kernels.quantize import quantize
from octomoe.kernels.route_and_quantize import route_and_quantize
from octomoe.kernels.tiles_sm90 import has_tiles
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
    y_stride_part,
    HAS_MAP: tl.constexpr,
    PARTS: tl.constexpr,
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
        for part in tl.static_range(PARTS):
            total += _weighted_row(
                y_ptr + part * y_stride_part + column,
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
    activation_format: Format | None,
    routed_scaling_factor: float,
    expert_map: Tensor | None,
    config: DecodeConfig,
) -> Tensor:
    """``[T, D] -> [T, D]``; see `octomoe.fused_moe`."""
    is_sorted = sorts_before(topk_ids, config)
    rows = hidden_states.contiguous()
    x: Tensor | QTensor = rows
    routed = None
    options: dict[str, Any] = {"align": config.rows, "expert_map": expert_map}
    if encodes_before(experts, activation_format, config):
        assert activation_format is not None
        scale = static_scale(experts.w13_input_scale, activation_format)
        if is_sorted:
            x, routed = route_and_quantize(
                rows,
                activation_format,
                scale,
                topk_ids,
                experts.num_experts,
                **options,
                is_chained=True,
            )
        else:
            x = quantize(rows, activation_format, scale=scale)
    elif is_sorted:
        routed = build_blocks(topk_ids, experts.num_experts, **options)
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


def encodes_before(experts: ExpertWeights, format: Format | None, config: DecodeConfig) -> bool:
    """Whether rows are quantised before."""
    if format is None or format.scale_dtype != torch.float32:
        return False
    # A scale that is a row's own comes from all of it.
    is_late = not has_steps(format) and static_scale(experts.w13_input_scale, format) is None
    return config.is_encoded or is_late


def experts_forward(
    x: Tensor | QTensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    routed: tuple[Routing, Tensor] | None,
    *,
    activation_format: Format | None,
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
    """``y [parts, T * A, D] -> [T, D]`` in bf16: the weighted sum over a token's choices."""
    num_tokens, num_columns = topk_weights.shape[0], y.shape[2]
    out = y.new_empty((num_tokens, num_columns), dtype=torch.bfloat16)
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
        y.stride(0),
        HAS_MAP=ids.has_map,
        PARTS=y.shape[0],
        CHOICES=topk_weights.shape[1],
        TILE_COLUMNS=columns,
        num_warps=max(min(columns // 256, 8), 1),
        enable_fp_fusion=False,
        **chain_arguments(True),
    )
    return out


def why_not(experts: ExpertWeights, num_choices: int, format: Format | None) -> str | None:
    """What keeps these kernels from a layer that those for many rows can do."""
    if num_choices > _MOST_CHOICES:
        return f"tokens make {num_choices} choices, more than {_MOST_CHOICES}"
    weights, width = (experts.w13, experts.w2), experts.intermediate_size
    if format is None:
        steps = [all(has_tiles(w, steps) for w in weights) for steps in (True, False)]
        if not any(steps) or (steps[0] and width % STEP):
            return "weights are not E4M3 with float32 scales of rows, or of 128 x 128 blocks"
        return None
    if format.scale_dtype == torch.float8_e8m0fnu:
        if format != MXFP8 or not all(_is_mxfp8(w) for w in weights):
            return "weights and activations are not both MXFP8 with E4M3"
        if width % STEP or experts.hidden_size % STEP:
            return f"sizes {experts.hidden_size} and {width} are no multiples of {STEP}"
        return None
    if format.block[1] == ALL and static_scale(experts.w2_input_scale, format) is None:
        return "the intermediate has one scale, which all of its rows make"
    return None


def _is_mxfp8(w: Weight) -> bool:
    is_plain = isinstance(w, QTensor) and w.format == MXFP8 and w.layout != ScaleLayout.INTERLEAVED
    return is_plain and w.data.is_contiguous() and w.data.data_ptr() % 16 == 0
