"""Gradients of unpermute: ``dy_slots[s] = weight * dy[token]``, ``dweights = <y[slot], dy>``.

Bound by bytes: a program owns a token, reads its row of dy once (once per 32 choices), reads every
slot of the token once and writes it once. An inner product is the float32 sum of one program, tile
of columns by tile and within them in the order of a tree: the same in every run. Slots of no token
are the work of other programs of the same launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.routing import Routing
from octomoe.kernels.rows import _clear_padding, _load_slots, _next_choice, _work_of_program
from octomoe.tune.configs import PermuteConfig
from octomoe.tune.lookup import unpermute_bwd_config


@triton.jit
def _unpermute_bwd_kernel(
    dy_ptr,
    y_ptr,
    weights_ptr,
    slot_of_choice_ptr,
    choice_of_slot_ptr,
    dy_slots_ptr,
    dweights_ptr,
    num_choices,
    num_slots,
    num_columns,
    dy_stride_row,
    dy_stride_column,
    y_stride_row,
    y_stride_column,
    weights_stride_token,
    weights_stride_choice,
    SLOTS: tl.constexpr,
    TILE_PADDING: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    serves_slots, number = _work_of_program(tl.cdiv(num_slots, SLOTS))
    if serves_slots:
        slot = number * SLOTS + tl.arange(0, SLOTS)
        is_slot = slot < num_slots
        is_padding = is_slot & (tl.load(choice_of_slot_ptr + slot, mask=is_slot, other=0) < 0)
        _clear_padding(dy_slots_ptr, slot, is_padding, num_columns, SLOTS, TILE_PADDING)
    else:
        token = number.to(tl.int64)
        dy_ptr += token * dy_stride_row
        weights_ptr += token * weights_stride_token
        for first in range(0, num_choices, 32):
            choices, slots = _load_slots(slot_of_choice_ptr, token, first, num_choices, 32)
            num_read = tl.sum((slots >= 0).to(tl.int32), axis=0)
            dweights = tl.zeros([32], tl.float32)
            for first_column in range(0, num_columns, TILE_COLUMNS):
                column = first_column + tl.arange(0, TILE_COLUMNS).to(tl.int64)
                is_inside = column < num_columns
                dy = tl.load(dy_ptr + column * dy_stride_column, mask=is_inside, other=0.0)
                dy = dy.to(tl.float32)
                choice = first - 1
                for _ in range(num_read):
                    choice = _next_choice(choices, slots, choice)
                    slot = tl.load(slot_of_choice_ptr + token * num_choices + choice).to(tl.int64)
                    weight = tl.load(weights_ptr + choice * weights_stride_choice).to(tl.float32)
                    y_offset = slot * y_stride_row + column * y_stride_column
                    y = tl.load(y_ptr + y_offset, mask=is_inside, other=0.0).to(tl.float32)
                    dy_slot = (dy * weight).to(dy_slots_ptr.dtype.element_ty)
                    tl.store(dy_slots_ptr + slot * num_columns + column, dy_slot, mask=is_inside)
                    dweight = tl.sum(y * dy, axis=0)
                    dweights += tl.where(choices == choice, dweight, 0.0)
            offset = token * num_choices + choices
            tl.store(dweights_ptr + offset, dweights, mask=choices < num_choices)


def unpermute_bwd(
    dy: Tensor,
    y: Tensor,
    routing: Routing,
    weights: Tensor,
    *,
    config: PermuteConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``[S, D]`` and ``[T, A]`` of ``dy [T, D]`` and ``y [S, D]``; see `octomoe.unpermute_bwd`."""
    num_columns = dy.shape[1]
    dy_slots = torch.empty((routing.num_slots, num_columns), dtype=dy.dtype, device=dy.device)
    dweights = torch.empty(weights.shape, dtype=torch.float32, device=dy.device)
    config = config or unpermute_bwd_config(num_columns)
    programs = routing.num_tokens + triton.cdiv(routing.num_slots, config.slots)
    if programs == 0:
        return dy_slots, dweights
    _unpermute_bwd_kernel[(programs,)](
        dy,
        y,
        weights,
        routing.slot_of_choice_TA,
        routing.choice_of_slot_S,
        dy_slots,
        dweights,
        routing.num_choices,
        routing.num_slots,
        num_columns,
        *dy.stride(),
        *y.stride(),
        *weights.stride(),
        SLOTS=config.slots,
        TILE_PADDING=config.scales,
        TILE_COLUMNS=config.columns,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return dy_slots, dweights
