"""Permute: row s of the result is row ``token_of_slot[s]`` of x, payload and scales together.

Bound by bytes: every row of x is read once and written to its slots, so programs walk over the
tokens. Scales, and slots of no token, are the work of other programs of the same launch, which walk
over the slots: only so are scale-major scales written in runs. Where scales are brought to rows
first, NVIDIA's chips since Hopper copy payload meanwhile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.device import target_of
from octomoe.core.formats import ALL
from octomoe.core.layouts import ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.chain import _wait_for_predecessor, chain_arguments
from octomoe.kernels.layouts import (
    _scale_offset,
    as_bytes,
    compact_bytes,
    empty_scale,
    scale_strides,
)
from octomoe.kernels.rows import _clear_padding, _load_slots, _next_choice, _work_of_program
from octomoe.tune.configs import PermuteConfig
from octomoe.tune.lookup import permute_config


@triton.jit
def _store_once(ptrs, row, mask):
    """Store what is not read again soon: 1 % faster on an H200 than to keep it in the cache."""
    tl.store(ptrs, row, mask=mask, eviction_policy="evict_first")


@triton.jit
def _copy_row(
    x_ptr,
    y_ptr,
    slot_of_choice_ptr,
    token,
    first_column,
    num_choices,
    num_columns,
    x_stride_row,
    x_stride_column,
    IS_SPARSE: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Read a part of a token's row, write it to every slot of the token."""
    token = token.to(tl.int64)
    column = first_column + tl.arange(0, TILE_COLUMNS)
    is_inside = column < num_columns
    x_offset = token * x_stride_row + column.to(tl.int64) * x_stride_column
    row = tl.load(x_ptr + x_offset, mask=is_inside, other=0)
    if IS_SPARSE:
        for first in range(0, num_choices, 32):
            choices, slots = _load_slots(slot_of_choice_ptr, token, first, num_choices, 32)
            choice = first - 1
            for _ in range(tl.sum((slots >= 0).to(tl.int32), axis=0)):
                choice = _next_choice(choices, slots, choice)
                slot = tl.load(slot_of_choice_ptr + token * num_choices + choice).to(tl.int64)
                _store_once(y_ptr + slot * num_columns + column, row, is_inside)
    else:
        for choice in range(num_choices):
            slot = tl.load(slot_of_choice_ptr + token * num_choices + choice).to(tl.int64)
            # Of one element, since Triton 3.9's interpreter cannot spread the truth of a scalar.
            has_slot = slot + tl.zeros([1], tl.int64) >= 0
            _store_once(y_ptr + slot * num_columns + column, row, is_inside & has_slot)


@triton.jit
def _permute_kernel(
    x_ptr,
    y_ptr,
    slot_of_choice_ptr,
    choice_of_slot_ptr,
    num_choices,
    num_slots,
    num_columns,
    x_stride_row,
    x_stride_column,
    x_scale_ptr,
    y_scale_ptr,
    num_scales,
    y_scale_stride_row,
    y_scale_stride_column,
    y_scale_atoms,
    smallest_scale,
    IS_INTERLEAVED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    IS_CHAINED: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE_SCALES: tl.constexpr,
):
    serves_slots, number = _work_of_program(tl.cdiv(num_slots, SLOTS))
    if not serves_slots:
        num_column_tiles = tl.cdiv(num_columns, TILE_COLUMNS)
        _copy_row(
            x_ptr,
            y_ptr,
            slot_of_choice_ptr,
            number // num_column_tiles,
            number % num_column_tiles * TILE_COLUMNS,
            num_choices,
            num_columns,
            x_stride_row,
            x_stride_column,
            IS_SPARSE,
            TILE_COLUMNS,
        )
    else:
        slot = number * SLOTS + tl.arange(0, SLOTS)
        is_slot = slot < num_slots
        choice = tl.load(choice_of_slot_ptr + slot, mask=is_slot, other=0)
        is_padding = is_slot & (choice < 0)
        _clear_padding(y_ptr, slot, is_padding, num_columns, SLOTS, TILE_SCALES)
        if HAS_SCALE:
            token = tl.maximum(choice, 0) // tl.maximum(num_choices, 1)
            _wait_for_predecessor(IS_CHAINED)
            for first in range(0, num_scales, TILE_SCALES):
                column = first + tl.arange(0, TILE_SCALES)
                is_inside = is_slot[:, None] & (column < num_scales)[None, :]
                x_offset = token.to(tl.int64)[:, None] * num_scales + column[None, :]
                has_scale = is_inside & (choice >= 0)[:, None]
                scale = tl.load(x_scale_ptr + x_offset, mask=has_scale, other=0)
                # A row of no token reads as a quantised row of zeros would.
                smallest = tl.full([1, 1], smallest_scale, scale.dtype)
                scale = tl.where(is_padding[:, None], smallest, scale)
                y_offset = _scale_offset(
                    slot[:, None],
                    column[None, :],
                    y_scale_stride_row,
                    y_scale_stride_column,
                    y_scale_atoms,
                    IS_INTERLEAVED,
                )
                tl.store(y_scale_ptr + y_offset, scale, mask=is_inside)


def permute(
    x: Tensor | QTensor,
    routing: Routing,
    *,
    layout: ScaleLayout | None = None,
    config: PermuteConfig | None = None,
) -> Tensor | QTensor:
    """Rows ``[T, D]`` in the order of the slots, ``[S, D]``; see `octomoe.permute`."""
    payload = x if isinstance(x, Tensor) else x.data
    shape = (routing.num_slots, payload.shape[1])
    y = torch.empty(shape, dtype=payload.dtype, device=payload.device)
    if isinstance(x, Tensor):
        _launch(payload, y, None, None, routing, config)
        return y
    if x.format.block[1] == ALL:
        _launch(payload, y, None, None, routing, config)
        return QTensor(y, x.scale, x.format, x.layout)
    layout = x.layout if layout is None else layout
    permuted = QTensor(y, empty_scale(x.format, layout, shape, x.device), x.format, layout)
    _launch(payload, y, x, permuted, routing, config)
    return permuted


def _launch(
    payload: Tensor,
    permuted: Tensor,
    x: QTensor | None,
    y: QTensor | None,
    routing: Routing,
    config: PermuteConfig | None,
) -> None:
    """Start the kernel; `x` and `y` are given if they have a scale per row."""
    words = _words(payload)
    num_scales = 0 if x is None else x.format.scale_shape(tuple(x.shape))[-1]
    config = config or permute_config(
        words.shape[1],
        words.dtype.itemsize,
        num_scales,
        routing.num_choices,
        target=target_of(words.device),
    )
    row_programs = routing.num_tokens * triton.cdiv(words.shape[1], config.columns)
    programs = row_programs + triton.cdiv(routing.num_slots, config.slots)
    if programs == 0:
        return
    has_scale = x is not None and y is not None
    # Compact scales are gathered in runs. Bringing x's to that form first costs an A-th of the
    # permutation's scales; gathering scale-major ones byte by byte made it 1.1 to 1.4 times slower.
    # The payload and the routing are older than the kernel that does so, and need not wait for it.
    is_chained = config.is_chained and x is not None and _is_moved(x)
    x_scale = words if x is None else compact_bytes(x, starts_dependents=is_chained)
    y_scale = as_bytes(y.scale) if y is not None else words
    is_e8m0 = x is not None and x.scale.dtype == torch.float8_e8m0fnu
    _permute_kernel[(programs,)](
        words,
        _words(permuted),
        routing.slot_of_choice_TA,
        routing.choice_of_slot_S,
        routing.num_choices,
        routing.num_slots,
        words.shape[1],
        *words.stride(),
        x_scale,
        y_scale,
        num_scales,
        *(scale_strides(y)[1:] if y is not None else (0, 0, 0)),
        0.0 if x is None or is_e8m0 else x.format.min_scale,
        IS_INTERLEAVED=y is not None and y.layout == ScaleLayout.INTERLEAVED,
        HAS_SCALE=has_scale,
        IS_SPARSE=config.is_sparse,
        IS_CHAINED=is_chained,
        TILE_COLUMNS=config.columns,
        SLOTS=config.slots,
        TILE_SCALES=config.scales,
        num_warps=config.num_warps,
        **chain_arguments(is_chained),
    )


def _is_moved(x: QTensor) -> bool:
    """Whether a kernel brings scales to rows."""
    return x.layout != ScaleLayout.COMPACT and x.data.numel() > 0


def _words(x: Tensor) -> Tensor:
    """The same memory as integers, which are copied as they are; two for 16 bytes."""
    # What torch notes beside the memory is brought into it.
    x = x.resolve_conj().resolve_neg()
    if x.dtype == torch.complex128:
        x = torch.view_as_real(x).flatten(1)
    dtypes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(dtypes[x.dtype.itemsize])
