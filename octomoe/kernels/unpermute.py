"""Unpermute: ``y[t] = sum over a of weights[t, a] * y_slots[slot_of_choice[t, a]]``.

Bound by bytes: every slot is read once. Sums are float32, over the choices of a token in their
order, each product rounded before it is added: the kernel is compiled without fused multiply-add.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.routing import Routing
from octomoe.kernels.rows import _load_slots, _next_choice
from octomoe.tune.configs import PermuteConfig
from octomoe.tune.lookup import permute_config


@triton.jit
def _weighted_row(
    y_ptr, weights_ptr, slot, is_inside, y_stride_row, weight_offset, HAS_WEIGHTS: tl.constexpr
):
    """A slot's row times its weight, in float32; zeros for a choice without a slot."""
    # Of one element, since Triton 3.9's interpreter cannot spread the truth of a scalar.
    has_slot = slot + tl.zeros([1], tl.int64) >= 0
    row = tl.load(y_ptr + slot * y_stride_row, mask=is_inside & has_slot, other=0.0)
    row = row.to(tl.float32)
    if HAS_WEIGHTS:
        row = row * tl.load(weights_ptr + weight_offset).to(tl.float32)
        # The weight of a dropped choice may be NaN.
        row = tl.where(has_slot, row, 0.0)
    return row


@triton.jit
def _unpermute_kernel(
    y_ptr,
    weights_ptr,
    slot_of_choice_ptr,
    out_ptr,
    num_columns,
    num_choices,
    y_stride_row,
    y_stride_column,
    weights_stride_token,
    weights_stride_choice,
    HAS_WEIGHTS: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    num_column_tiles = tl.cdiv(num_columns, TILE_COLUMNS)
    token = (tl.program_id(0) // num_column_tiles).to(tl.int64)
    column = tl.program_id(0) % num_column_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    is_inside = column < num_columns
    # Outside the loop: within, ptxas of Triton 3.9 spilled a register.
    y_ptr += column.to(tl.int64) * y_stride_column
    total = tl.zeros([TILE_COLUMNS], tl.float32)
    if IS_SPARSE:
        for first in range(0, num_choices, 32):
            choices, slots = _load_slots(slot_of_choice_ptr, token, first, num_choices, 32)
            num_read = tl.sum((slots >= 0).to(tl.int32), axis=0)
            choice = first - 1
            for _ in tl.range(0, num_read, loop_unroll_factor=UNROLL):
                choice = _next_choice(choices, slots, choice)
                slot = tl.load(slot_of_choice_ptr + token * num_choices + choice).to(tl.int64)
                total += _weighted_row(
                    y_ptr,
                    weights_ptr,
                    slot,
                    is_inside,
                    y_stride_row,
                    token * weights_stride_token + choice * weights_stride_choice,
                    HAS_WEIGHTS,
                )
    else:
        for choice in tl.range(0, num_choices, loop_unroll_factor=UNROLL):
            slot = tl.load(slot_of_choice_ptr + token * num_choices + choice).to(tl.int64)
            total += _weighted_row(
                y_ptr,
                weights_ptr,
                slot,
                is_inside,
                y_stride_row,
                token * weights_stride_token + choice * weights_stride_choice,
                HAS_WEIGHTS,
            )
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * num_columns + column, out, mask=is_inside)


def unpermute(
    y: Tensor,
    routing: Routing,
    weights: Tensor | None = None,
    *,
    config: PermuteConfig | None = None,
) -> Tensor:
    """Combine slots ``[S, D]`` into tokens ``[T, D]``; see `octomoe.unpermute`."""
    num_columns = y.shape[1]
    out = torch.empty((routing.num_tokens, num_columns), dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    config = config or permute_config(
        num_columns, y.dtype.itemsize, num_choices=routing.num_choices
    )
    _unpermute_kernel[(routing.num_tokens * triton.cdiv(num_columns, config.columns),)](
        y,
        y if weights is None else weights,
        routing.slot_of_choice_TA,
        out,
        num_columns,
        routing.num_choices,
        *y.stride(),
        *((0, 0) if weights is None else weights.stride()),
        HAS_WEIGHTS=weights is not None,
        IS_SPARSE=config.is_sparse,
        TILE_COLUMNS=config.columns,
        UNROLL=8,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return out
