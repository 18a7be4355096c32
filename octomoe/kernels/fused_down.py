"""The second half of a layer of experts: ``y[s] = h[s] @ w2[e].T + b2[e]``, and the sum over slots.

Bound by the bytes of w2 up to some 64 rows per expert; then by those of y, which is written once
and read once by `_combine_kernel`. A program computes several tiles of the same slots. Where the
depth is short their rows stay; else one loop goes over the steps of all tiles, so that the loads of
a tile start before the one in front of it ends. A single tile of a short depth has its weights
loaded while the first half still runs.

Tried on an H200 and lost: bringing w2 to the L2 cache while the first half still runs (nothing
gained), storing y by TMA (2 to 4 % slower).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.experts import ExpertWeights
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.chain import (
    _start_dependents,
    _wait_for_predecessor,
    chain_arguments,
)
from octomoe.kernels.expert_tiles import (
    STEP,
    _add_bias,
    _load_step,
    _load_weights,
    _multiply_step,
    _part_rows,
    _row_scale,
    _scaled,
    row_scale,
    tile_arguments,
    weight_scale,
    weight_source,
)
from octomoe.kernels.unpermute import _weighted_row
from octomoe.tune.configs import FusedMoeConfig, PrefillConfig


@triton.jit
def _store_product(
    product,
    y_ptr,
    h_scale_ptrs,
    w_scale_ptr,
    bias_ptr,
    slot,
    is_row,
    first_column,
    num_columns,
    w_scale_stride_row,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_LATE_SCALE: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    IS_ONE_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SWAPPED: tl.constexpr,
):
    """Scale a finished product, where scales do not change by the step, add biases, and store."""
    ROWS: tl.constexpr = product.shape[0] if IS_SWAPPED else product.shape[1]
    row, has_row = _part_rows(0, first_column, num_columns, 1, ROWS)
    if HAS_LATE_SCALE:
        product = _scaled(
            product,
            _row_scale(h_scale_ptrs, is_row, HAS_ROW_SCALE),
            w_scale_ptr,
            row,
            has_row,
            w_scale_stride_row,
            SCALE_ROWS,
            IS_ONE_SCALE,
            IS_SWAPPED,
        )
    if HAS_BIAS:
        product = _add_bias(product, bias_ptr, row, has_row, IS_SWAPPED)
    y = product.to(y_ptr.dtype.element_ty)
    if IS_SWAPPED:
        y = tl.trans(y)
    ptrs = y_ptr + slot[:, None] * num_columns + row[None, :]
    tl.store(ptrs, y, mask=is_row[:, None] & has_row[None, :])


@triton.jit
def _down_kernel(
    h_ptr,
    h_scale_ptr,
    w_source,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    choice_of_slot_ptr,
    expert_of_block_ptr,
    depth,
    num_columns,
    h_scale_stride_row,
    h_scale_stride_step,
    w_scale_stride_expert,
    w_scale_stride_row,
    w_scale_stride_step,
    BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    TILES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HELD_STEPS: tl.constexpr,
    IS_SWAPPED: tl.constexpr,
    IS_CHAINED: tl.constexpr,
    HAS_DESCRIPTOR: tl.constexpr,
    IS_DIVISIBLE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_WEIGHT_SCALE: tl.constexpr,
    HAS_STEP_SCALE: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    IS_ONE_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    _start_dependents(IS_CHAINED)
    num_programs = tl.cdiv(num_columns, BLOCK_COLUMNS * TILES)
    block, part = tl.program_id(0) // num_programs, tl.program_id(0) % num_programs
    expert = tl.load(expert_of_block_ptr + block // BLOCKS)
    if expert < 0:
        return
    slot = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = tl.load(choice_of_slot_ptr + slot) >= 0
    if BLOCKS > 1 and tl.max(is_row.to(tl.int32), axis=0) == 0:
        return
    h_ptrs = h_ptr + slot[:, None] * depth + tl.arange(0, BLOCK_DEPTH)[None, :]
    h_scale_ptrs = h_scale_ptr + slot * h_scale_stride_row
    w_scale_ptr += expert.to(tl.int64) * w_scale_stride_expert
    bias_ptr += expert.to(tl.int64) * num_columns
    first_tile = part * TILES
    weights = tl.tuple([])
    IS_EARLY: tl.constexpr = HELD_STEPS > 0 and TILES == 1
    if IS_EARLY:
        first_column = first_tile * BLOCK_COLUMNS
        row, has_row = _part_rows(0, first_column, num_columns, 1, BLOCK_COLUMNS)
        for i in tl.static_range(HELD_STEPS):
            w = _load_weights(
                w_source,
                expert,
                first_column,
                num_columns,
                i * BLOCK_DEPTH,
                depth,
                has_row,
                1,
                BLOCK_DEPTH,
                HAS_DESCRIPTOR,
                IS_DIVISIBLE,
            )
            weights += (w,)
    _wait_for_predecessor(IS_CHAINED)

    SHAPE: tl.constexpr = [BLOCK_COLUMNS, BLOCK_ROWS] if IS_SWAPPED else [BLOCK_ROWS, BLOCK_COLUMNS]
    if HELD_STEPS:
        rows = tl.tuple([])
        scales = tl.tuple([])
        for i in tl.static_range(HELD_STEPS):
            h, h_scale = _load_step(
                h_ptrs,
                h_scale_ptrs,
                i * BLOCK_DEPTH,
                depth,
                is_row,
                h_scale_stride_step,
                BLOCK_DEPTH,
                IS_DIVISIBLE,
                HAS_ROW_SCALE and HAS_STEP_SCALE,
            )
            rows += (h,)
            scales += (h_scale,)
        for tile in tl.range(first_tile, first_tile + TILES, num_stages=NUM_STAGES):
            first_column = tile * BLOCK_COLUMNS
            row, has_row = _part_rows(0, first_column, num_columns, 1, BLOCK_COLUMNS)
            y = tl.zeros(SHAPE, tl.float32)
            for i in tl.static_range(HELD_STEPS):
                if IS_EARLY:
                    w = weights[i]
                else:
                    w = _load_weights(
                        w_source,
                        expert,
                        first_column,
                        num_columns,
                        i * BLOCK_DEPTH,
                        depth,
                        has_row,
                        1,
                        BLOCK_DEPTH,
                        HAS_DESCRIPTOR,
                        IS_DIVISIBLE,
                    )
                y += _multiply_step(
                    rows[i],
                    scales[i],
                    w,
                    w_scale_ptr,
                    i * BLOCK_DEPTH,
                    row,
                    has_row,
                    w_scale_stride_row,
                    w_scale_stride_step,
                    BLOCK_DEPTH,
                    HAS_STEP_SCALE,
                    SCALE_ROWS,
                    IS_ONE_SCALE,
                    IS_SWAPPED,
                )
            _store_product(
                y,
                y_ptr,
                h_scale_ptrs,
                w_scale_ptr,
                bias_ptr,
                slot,
                is_row,
                first_column,
                num_columns,
                w_scale_stride_row,
                HAS_ROW_SCALE,
                HAS_WEIGHT_SCALE and not HAS_STEP_SCALE,
                SCALE_ROWS,
                IS_ONE_SCALE,
                HAS_BIAS,
                IS_SWAPPED,
            )
    else:
        num_steps = tl.cdiv(depth, BLOCK_DEPTH)
        y = tl.zeros(SHAPE, tl.float32)
        for i in tl.range(TILES * num_steps, num_stages=NUM_STAGES):
            k = i % num_steps * BLOCK_DEPTH
            first_column = (first_tile + i // num_steps) * BLOCK_COLUMNS
            row, has_row = _part_rows(0, first_column, num_columns, 1, BLOCK_COLUMNS)
            h, h_scale = _load_step(
                h_ptrs,
                h_scale_ptrs,
                k,
                depth,
                is_row,
                h_scale_stride_step,
                BLOCK_DEPTH,
                IS_DIVISIBLE,
                HAS_ROW_SCALE and HAS_STEP_SCALE,
            )
            w = _load_weights(
                w_source,
                expert,
                first_column,
                num_columns,
                k,
                depth,
                has_row,
                1,
                BLOCK_DEPTH,
                HAS_DESCRIPTOR,
                IS_DIVISIBLE,
            )
            y += _multiply_step(
                h,
                h_scale,
                w,
                w_scale_ptr,
                k,
                row,
                has_row,
                w_scale_stride_row,
                w_scale_stride_step,
                BLOCK_DEPTH,
                HAS_STEP_SCALE,
                SCALE_ROWS,
                IS_ONE_SCALE,
                IS_SWAPPED,
            )
            if k + BLOCK_DEPTH >= depth:
                _store_product(
                    y,
                    y_ptr,
                    h_scale_ptrs,
                    w_scale_ptr,
                    bias_ptr,
                    slot,
                    is_row,
                    first_column,
                    num_columns,
                    w_scale_stride_row,
                    HAS_ROW_SCALE,
                    HAS_WEIGHT_SCALE and not HAS_STEP_SCALE,
                    SCALE_ROWS,
                    IS_ONE_SCALE,
                    HAS_BIAS,
                    IS_SWAPPED,
                )
                y = tl.zeros(SHAPE, tl.float32)


@triton.jit
def _combine_kernel(
    y_ptr,
    weights_ptr,
    slot_of_choice_ptr,
    out_ptr,
    num_columns,
    num_choices,
    weights_stride_token,
    weights_stride_choice,
    factor,
    TILE_COLUMNS: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """``out[t] = factor * sum over a of weights[t, a] * y[slot of (t, a)]``, in that order."""
    num_tiles = tl.cdiv(num_columns, TILE_COLUMNS)
    token = (tl.program_id(0) // num_tiles).to(tl.int64)
    column = tl.program_id(0) % num_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    is_inside = column < num_columns
    _wait_for_predecessor(IS_CHAINED)
    total = tl.zeros([TILE_COLUMNS], tl.float32)
    for choice in tl.range(0, num_choices, loop_unroll_factor=8):
        slot = tl.load(slot_of_choice_ptr + token * num_choices + choice).to(tl.int64)
        total += _weighted_row(
            y_ptr + column,
            weights_ptr,
            slot,
            is_inside,
            num_columns,
            token * weights_stride_token + choice * weights_stride_choice,
            True,
        )
    out = (total * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * num_columns + column, out, mask=is_inside)


def fused_down(
    h: Tensor | QTensor,
    experts: ExpertWeights,
    routing: Routing,
    expert_of_block: Tensor,
    out_dtype: torch.dtype,
    config: FusedMoeConfig,
) -> Tensor:
    """``h [S, F] -> y [S, D]``; rows of no token hold anything."""
    w, tile = experts.w2, config.down
    data = h.data if isinstance(h, QTensor) else h
    _, num_columns, depth = w.shape
    y = data.new_empty((routing.num_slots, num_columns), dtype=out_dtype)
    if y.numel() == 0:
        return y
    h_scale, *h_strides = row_scale(h)
    w_scale, *w_strides = weight_scale(w)
    num_programs = triton.cdiv(num_columns, tile.columns * tile.tiles)
    _down_kernel[(routing.num_slots // tile.rows * num_programs,)](
        data,
        h_scale,
        weight_source(w, 1, 1, tile, config),
        w_scale,
        data if experts.w2_bias is None else experts.w2_bias,
        y,
        routing.choice_of_slot_S,
        expert_of_block,
        depth,
        num_columns,
        *h_strides,
        *w_strides,
        TILES=tile.tiles,
        HELD_STEPS=triton.cdiv(depth, STEP) if depth <= tile.held else 0,
        **tile_arguments(
            w,
            experts.w2_bias,
            1,
            routing.align,
            tile,
            config,
            has_row_scale=isinstance(h, QTensor),
        ),
        **chain_arguments(config.is_chained),
    )
    return y


def combine(
    y: Tensor,
    topk_weights: Tensor,
    routing: Routing,
    factor: float,
    out_dtype: torch.dtype,
    config: FusedMoeConfig | PrefillConfig,
) -> Tensor:
    """``y [S, D] -> [T, D]``: the weighted sum over the choices of a token, times `factor`."""
    num_columns = y.shape[1]
    out = y.new_empty((routing.num_tokens, num_columns), dtype=out_dtype)
    if out.numel():
        columns = min(triton.next_power_of_2(num_columns), config.combined)
        _combine_kernel[(routing.num_tokens * triton.cdiv(num_columns, columns),)](
            y,
            topk_weights,
            routing.slot_of_choice_TA,
            out,
            num_columns,
            routing.num_choices,
            *topk_weights.stride(),
            factor,
            TILE_COLUMNS=columns,
            IS_CHAINED=config.is_chained,
            num_warps=max(min(columns // 256, 8), 1),
            enable_fp_fusion=False,
            **chain_arguments(config.is_chained),
        )
    return out
