"""The first half of a layer of experts: ``h[s] = act(x[token of s] @ w13[e].T + b13[e])``.

One kernel gathers the tokens' rows and multiplies them with gate and up rows of the same columns.
It then either activates, and quantises if a scale block of the result lies in one tile; or, where
few tokens leave most of a GPU idle, it does a part of the depth and stores float32 sums, which
`_finish_kernel` adds up. Bound by the bytes of w13 up to some 64 rows per expert, by tensor cores
beyond.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.activations import Activation
from octomoe.core.experts import ExpertWeights, static_scale
from octomoe.core.formats import ALL, Format
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.activations import _activate, nonlinearity_of, width_of
from octomoe.kernels.chain import (
    _start_dependents,
    _wait_for_predecessor,
    chain_arguments,
)
from octomoe.kernels.encoding import _own_amax, _store_own, encoding_of, output_of
from octomoe.kernels.expert_tiles import (
    STEP,
    _add_bias,
    _load_step,
    _load_weights,
    _multiply_step,
    _part_rows,
    _row_scale,
    _scaled,
    has_steps,
    row_scale,
    tile_arguments,
    weight_scale,
    weight_source,
)
from octomoe.kernels.scaling import _encode
from octomoe.tune.configs import FusedMoeConfig

# Columns that a program of `_finish_kernel` has at most.
_COLUMNS = 256


@triton.jit
def _store_activated(
    gate,
    up,
    is_inside,
    tile_row,
    tile_column,
    num_rows,
    num_columns,
    h_ptr,
    out,
    ENCODING: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Store a tile of act(gate, up): encoded if there is an encoding, else as h has it."""
    y = _activate(gate, up, ACTIVATION)
    y = tl.where(is_inside, y, 0.0)
    row = tl.cast(tile_row, tl.int64) * y.shape[0] + tl.arange(0, y.shape[0])
    column = tile_column * y.shape[1] + tl.arange(0, y.shape[1])
    ptrs = h_ptr + row[:, None] * num_columns + column[None, :]
    if ENCODING is None:
        tl.store(ptrs, y.to(h_ptr.dtype.element_ty), mask=is_inside)
    elif ENCODING.BLOCK_COLUMNS > 0:
        _store_own(
            y,
            _own_amax(y, ENCODING),
            None,
            0,
            tile_row,
            tile_column,
            num_rows,
            num_columns,
            0,
            num_columns,
            out,
            ENCODING,
            16,
        )
    else:
        # The scale of all is known before.
        tl.store(ptrs, _encode(y, tl.load(out.scale), ENCODING), mask=is_inside)


@triton.jit
def _up_kernel(
    x_ptr,
    x_scale_ptr,
    w_source,
    w_scale_ptr,
    bias_ptr,
    h_ptr,
    choice_of_slot_ptr,
    expert_of_block_ptr,
    num_choices,
    depth,
    num_columns,
    num_slots,
    x_stride_row,
    x_scale_stride_row,
    x_scale_stride_step,
    w_scale_stride_expert,
    w_scale_stride_row,
    w_scale_stride_step,
    out,
    BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
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
    IS_FINISHED: tl.constexpr,
    ENCODING: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    _wait_for_predecessor(IS_CHAINED)
    _start_dependents(IS_CHAINED)
    # Locate the tile: columns of one block of slots are neighbours in the grid.
    num_tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS % num_tiles
    block = tl.program_id(0) // SPLITS // num_tiles
    expert = tl.load(expert_of_block_ptr + block // BLOCKS)
    if expert < 0:
        return
    slot = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    choice = tl.load(choice_of_slot_ptr + slot)
    is_row = choice >= 0
    if BLOCKS > 1 and tl.max(is_row.to(tl.int32), axis=0) == 0:
        return
    token = tl.where(is_row, choice // num_choices, 0).to(tl.int64)
    x_ptrs = x_ptr + token[:, None] * x_stride_row + tl.arange(0, BLOCK_DEPTH)[None, :]
    x_scale_ptrs = x_scale_ptr + token * x_scale_stride_row
    PARTS: tl.constexpr = 2 if ACTIVATION.IS_GATED else 1
    # Swapped, gate and up rows are one operand: one wait for the tensor core instead of two.
    HELD: tl.constexpr = PARTS if IS_SWAPPED else 1
    first_column = tile * BLOCK_COLUMNS
    row, has_row = _part_rows(0, first_column, num_columns, HELD, BLOCK_COLUMNS)
    w_scale_ptr += expert.to(tl.int64) * w_scale_stride_expert

    # Multiply.
    if IS_SWAPPED:
        gate = tl.zeros([HELD * BLOCK_COLUMNS, BLOCK_ROWS], tl.float32)
    else:
        gate = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    up = gate
    num_steps = tl.cdiv(depth, BLOCK_DEPTH)
    first_step, last_step = num_steps * split // SPLITS, num_steps * (split + 1) // SPLITS
    for step in tl.range(first_step, last_step, num_stages=NUM_STAGES, loop_unroll_factor=UNROLL):
        k = step * BLOCK_DEPTH
        x, x_scale = _load_step(
            x_ptrs,
            x_scale_ptrs,
            k,
            depth,
            is_row,
            x_scale_stride_step,
            BLOCK_DEPTH,
            IS_DIVISIBLE,
            HAS_ROW_SCALE and HAS_STEP_SCALE,
        )
        w = _load_weights(
            w_source,
            expert * PARTS,
            first_column,
            num_columns,
            k,
            depth,
            has_row,
            HELD,
            BLOCK_DEPTH,
            HAS_DESCRIPTOR,
            IS_DIVISIBLE,
        )
        gate += _multiply_step(
            x,
            x_scale,
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
        if HELD < PARTS:
            w = _load_weights(
                w_source,
                expert * PARTS + 1,
                first_column,
                num_columns,
                k,
                depth,
                has_row,
                HELD,
                BLOCK_DEPTH,
                HAS_DESCRIPTOR,
                IS_DIVISIBLE,
            )
            up += _multiply_step(
                x,
                x_scale,
                w,
                w_scale_ptr,
                k,
                row + num_columns,
                has_row,
                w_scale_stride_row,
                w_scale_stride_step,
                BLOCK_DEPTH,
                HAS_STEP_SCALE,
                SCALE_ROWS,
                IS_ONE_SCALE,
                IS_SWAPPED,
            )

    # Scale, where scales do not change by the step, and add biases.
    if HAS_WEIGHT_SCALE and not HAS_STEP_SCALE:
        x_scale = _row_scale(x_scale_ptrs, is_row, HAS_ROW_SCALE)
        gate = _scaled(
            gate,
            x_scale,
            w_scale_ptr,
            row,
            has_row,
            w_scale_stride_row,
            SCALE_ROWS,
            IS_ONE_SCALE,
            IS_SWAPPED,
        )
        if HELD < PARTS:
            up = _scaled(
                up,
                x_scale,
                w_scale_ptr,
                row + num_columns,
                has_row,
                w_scale_stride_row,
                SCALE_ROWS,
                IS_ONE_SCALE,
                IS_SWAPPED,
            )
    if HAS_BIAS and split == 0:
        bias_ptr += expert.to(tl.int64) * (num_columns * PARTS)
        gate = _add_bias(gate, bias_ptr, row, has_row, IS_SWAPPED)
        if HELD < PARTS:
            up = _add_bias(up, bias_ptr, row + num_columns, has_row, IS_SWAPPED)

    # Activate, and store.
    if IS_SWAPPED:
        if ACTIVATION.IS_GATED:
            both = tl.reshape(gate, [2, BLOCK_COLUMNS, BLOCK_ROWS])
            gate, up = tl.split(tl.permute(both, (2, 1, 0)))
        else:
            gate = tl.trans(gate)
            up = gate
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    is_inside = is_row[:, None] & (column < num_columns)[None, :]
    if IS_FINISHED:
        _store_activated(
            gate,
            up,
            is_inside,
            block,
            tile,
            num_slots,
            num_columns,
            h_ptr,
            out,
            ENCODING,
            ACTIVATION,
        )
    else:
        h_ptr += (split * num_slots + slot)[:, None] * (num_columns * PARTS) + column[None, :]
        tl.store(h_ptr, gate, mask=is_inside)
        if ACTIVATION.IS_GATED:
            tl.store(h_ptr + num_columns, up, mask=is_inside)


@triton.jit
def _finish_kernel(
    sums_ptr,
    h_ptr,
    slot_of_choice_ptr,
    num_columns,
    num_slots,
    out,
    BLOCK_COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_CHAINED: tl.constexpr,
    ENCODING: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Add up the sums over parts of the depth, in their order, activate, and store one choice."""
    _start_dependents(IS_CHAINED)
    slot = tl.load(slot_of_choice_ptr + tl.program_id(0))
    if slot < 0:
        return
    PARTS: tl.constexpr = 2 if ACTIVATION.IS_GATED else 1
    tile = tl.program_id(1)
    column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_inside = column < num_columns
    _wait_for_predecessor(IS_CHAINED)
    gate = tl.zeros([BLOCK_COLUMNS], tl.float32)
    up = gate
    for split in tl.static_range(SPLITS):
        row = tl.cast(slot, tl.int64) + split * num_slots
        ptrs = sums_ptr + row * (num_columns * PARTS) + column
        gate += tl.load(ptrs, mask=is_inside, other=0.0)
        if ACTIVATION.IS_GATED:
            up += tl.load(ptrs + num_columns, mask=is_inside, other=0.0)
    _store_activated(
        gate[None, :],
        up[None, :],
        is_inside[None, :],
        slot,
        tile,
        num_slots,
        num_columns,
        h_ptr,
        out,
        ENCODING,
        ACTIVATION,
    )


def fused_up(
    x: Tensor | QTensor,
    experts: ExpertWeights,
    routing: Routing,
    expert_of_block: Tensor,
    format: Format | None,
    config: FusedMoeConfig,
) -> Tensor | QTensor:
    """``x [T, D] -> h [S, F]``: a QTensor if `format` has scales of 128 columns, or a static one.

    Without a format h has the dtype of x, under any other one float32: its rows then wait to be
    quantised.
    """
    w, tile, num_slots = experts.w13, config.up, routing.num_slots
    data = x.data if isinstance(x, QTensor) else x
    width = experts.w2.shape[2]
    is_finished = tile.splits == 1 and (not has_steps(format) or tile.columns % STEP == 0)
    h = empty_h(num_slots, width, data, format, experts.w2_input_scale)
    if num_slots == 0 or width == 0:
        return h
    h_data = h.data if isinstance(h, QTensor) else h
    sums = h_data
    if not is_finished:
        sums = data.new_empty((tile.splits, num_slots, w.shape[1]), dtype=torch.float32)
    parts = 2 if experts.activation.gated else 1
    held = parts if config.is_swapped else 1
    x_scale, *x_strides = row_scale(x)
    w_scale, *w_strides = weight_scale(w)
    stored = {
        "out": output_of(h) if isinstance(h, QTensor) else None,
        "ENCODING": encoding_of(h) if isinstance(h, QTensor) else None,
        "ACTIVATION": nonlinearity_of(experts.activation),
    }
    num_tiles = triton.cdiv(width, tile.columns)
    _up_kernel[(num_slots // tile.rows * num_tiles * tile.splits,)](
        data,
        x_scale,
        weight_source(w, parts, held, tile, config),
        w_scale,
        data if experts.w13_bias is None else experts.w13_bias,
        sums,
        routing.choice_of_slot_S,
        expert_of_block,
        routing.num_choices,
        data.shape[1],
        width,
        num_slots,
        data.stride(0),
        *x_strides,
        *w_strides,
        SPLITS=tile.splits,
        UNROLL=tile.unroll,
        IS_FINISHED=is_finished,
        **chain_arguments(config.is_chained),
        **stored,
        **tile_arguments(
            w,
            experts.w13_bias,
            held,
            routing.align,
            tile,
            config,
            has_row_scale=isinstance(x, QTensor),
        ),
    )
    if not is_finished:
        columns = max(min(triton.next_power_of_2(width), _COLUMNS), STEP)
        _finish_kernel[(routing.slot_of_choice_TA.numel(), triton.cdiv(width, columns))](
            sums,
            h_data,
            routing.slot_of_choice_TA,
            width,
            num_slots,
            BLOCK_COLUMNS=columns,
            SPLITS=tile.splits,
            IS_CHAINED=config.is_chained,
            **stored,
            **chain_arguments(config.is_chained),
            num_warps=columns // STEP,
        )
    return h


def empty_h(
    num_slots: int, width: int, data: Tensor, format: Format | None, input_scale: Tensor | None
) -> Tensor | QTensor:
    """Memory for what `fused_up` returns, beside its rows' `data`."""
    shape = (num_slots, width)
    if format is None:
        return data.new_empty(shape)
    scale = static_scale(input_scale, format)
    if scale is not None:
        return QTensor(data.new_empty(shape, dtype=format.element.dtype), scale, format)
    if not has_steps(format):
        # Where one scale serves all rows, those of no token are to be no reason for it.
        new = data.new_zeros if format.block[1] == ALL else data.new_empty
        return new(shape, dtype=torch.float32)
    # Scales of a column of blocks lie side by side: that is how the other half reads them.
    scale = data.new_empty((triton.cdiv(width, STEP), num_slots), dtype=torch.float32)
    return QTensor(data.new_empty(shape, dtype=format.element.dtype), scale.T, format)


def activate(h: Tensor, activation: Activation, routing: Routing, dtype: torch.dtype) -> Tensor:
    """``act(h)`` of float32 ``h [S, 2F]`` in `dtype`; zero in rows of no token."""
    width = width_of(h, activation)
    out = h.new_zeros((h.shape[0], width), dtype=dtype)
    columns = min(triton.next_power_of_2(max(width, 1)), _COLUMNS)
    grid = (routing.slot_of_choice_TA.numel(), triton.cdiv(width, columns))
    if grid[0] and grid[1]:
        _finish_kernel[grid](
            h,
            out,
            routing.slot_of_choice_TA,
            width,
            h.shape[0],
            out=None,
            BLOCK_COLUMNS=columns,
            SPLITS=1,
            IS_CHAINED=False,
            ENCODING=None,
            ACTIVATION=nonlinearity_of(activation),
            num_warps=1,
        )
    return out
