"""The second half of a layer of experts on Hopper, for few rows: y = h @ w2.T.

A tile is 128 or 256 rows of weights times 8 or 16 slots. h comes in float32, or as sums over parts
of the depth, and is activated and quantised on its way in. Weights are on their way before there is
an h. Bound by the bytes of w2.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octomoe.core.device import num_sms
from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import Format
from octomoe.core.qtensor import QTensor
from octomoe.kernels.activations import _activate, nonlinearity_of
from octomoe.kernels.build_routing import Ids
from octomoe.kernels.decode_choices_sm90 import (
    Tables,
    _allocate_places,
    _choices_of,
    _expert_of,
)
from octomoe.kernels.decode_tiles_sm90 import (
    HALVES,
    IN_BLOCKS,
    PER_ROW,
    STATIC,
    WIDTH,
    Plan,
    _allocate_ring,
    _bring_step,
    _encode_step,
    _locate,
    _of_rows,
    _product,
    _put_step,
    _sizes_of,
    _step_scales,
    _unscaled,
    _wait_for_room,
    _weight_scales,
    block_scales,
    launch_of,
    pieces_of,
    source_of,
)
from octomoe.kernels.expert_tiles import STEP, has_steps, scale_rows
from octomoe.kernels.gluon_shim import gl, gluon, mbarrier, seen_as
from octomoe.kernels.scaling import _magnitude_bits, _scale_of_amax, format_encoding
from octomoe.kernels.tiles_sm90 import bytes_by_tma, scales_of
from octomoe.tune.configs import DecodeConfig


class Sums(NamedTuple):
    """h, or sums over parts of the depth; what lies between rows and parts; pairs of parts; the
    static scale of what h is quantised to, if it has one."""

    data: Tensor
    stride_row: int
    stride_split: int
    num_pairs: int
    scale: Tensor


@gluon.jit
def _share(total):
    """The first and last of this program's tiles, which are neighbours: rows stay in L1."""
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    return total * program // num_programs, total * (program + 1) // num_programs


@gluon.jit
def _bring_weights(w_desc, places, ring, sizes, PLAN: gl.constexpr):
    """Bring a tile's weights, a few steps of the depth at a time."""
    GROUP: gl.constexpr = PLAN.GROUP
    count = 0
    first, last = _share(sizes.total)
    ahead = gl.minimum(first, sizes.total - 1)
    next_expert = _expert_of(ahead // PLAN.DOWN_SPLITS // sizes.tiles, places, PLAN)
    for number in range(first, last):
        expert = next_expert
        ahead = gl.minimum(number + 1, sizes.total - 1)
        next_expert = _expert_of(ahead // PLAN.DOWN_SPLITS // sizes.tiles, places, PLAN)
        _, tile, first_step, last_step = _locate(number, sizes, PLAN.DOWN_SPLITS)
        for step in range(first_step, last_step, GROUP):
            # Steps of a row are neighbours in memory, and are asked for together.
            for i in gl.static_range(GROUP):
                if step + i < last_step:
                    _wait_for_room(ring, count + i, PLAN)
            for i in gl.static_range(GROUP):
                if step + i < last_step:
                    place = [expert, tile * PLAN.COLUMNS, (step + i) * WIDTH]
                    _bring_step(w_desc, place, ring, count + i, PLAN)
            count += gl.minimum(last_step - step, GROUP)


@gluon.jit
def _load_h(ptrs, is_row, column, sizes, h, ACTIVATION: gl.constexpr, PLAN: gl.constexpr):
    """A step of h: as it is stored, or the activation of sums over parts of the depth."""
    mask = is_row[:, None] & (column < sizes.depth)[None, :]
    ptrs += column[None, :]
    if PLAN.SPLITS == 1:
        value = gl.load(ptrs, mask=mask, other=0.0)
    else:
        SLOTS: gl.constexpr = PLAN.ROWS
        layout: gl.constexpr = mask.type.layout
        gate = gl.zeros((SLOTS, WIDTH), gl.float32, layout)
        up = gate
        # In their order, two at a time: more would fill the registers.
        for _pair in range(h.num_pairs):
            gate += gl.load(ptrs, mask=mask, other=0.0)
            gate += gl.load(ptrs + h.stride_split, mask=mask, other=0.0)
            if ACTIVATION.IS_GATED:
                up_ptrs = ptrs + sizes.depth
                up += gl.load(up_ptrs, mask=mask, other=0.0)
                up += gl.load(up_ptrs + h.stride_split, mask=mask, other=0.0)
            ptrs += 2 * h.stride_split
        value = _activate(gate, up, ACTIVATION)
        value = gl.where(mask, value, 0.0)
    return value


@gluon.jit
def _word_ptrs(block, tile, w, places, sizes, PLAN: gl.constexpr):
    """Where the scales of blocks of each of a tile's weight rows are."""
    rows: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row = tile * PLAN.COLUMNS + gl.arange(0, PLAN.COLUMNS, layout=rows)
    expert = _expert_of(block, places, PLAN).to(gl.int64)
    # Past the last row there is no scale.
    row = gl.minimum(row, sizes.columns - 1)
    return w.scale + expert * w.stride_expert + row * w.stride_row


@gluon.jit
def _encode_rows(
    h,
    w,
    places,
    ring,
    sizes,
    ENCODING: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PLAN: gl.constexpr,
):
    """Bring the rows of a tile's slots, a step of the depth at a time."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    SLOTS: gl.constexpr = PLAN.ROWS
    SCALE_ROWS: gl.constexpr = max(PLAN.SCALE_ROWS, 1)
    count = 0
    first, last = _share(sizes.total)
    gdc_wait()
    for number in range(first, last):
        block, tile, first_step, last_step = _locate(number, sizes, PLAN.DOWN_SPLITS)
        choice = _choices_of(block, places, row_layout, PLAN)
        is_row = choice >= 0
        ptrs = h.data + gl.maximum(choice, 0).to(gl.int64)[:, None] * h.stride_row
        # As many pointers as rows: what all threads agree on goes to registers that wait for it.
        scale_ptr_0 = w.scale + choice * 0
        scale_ptr_1 = scale_ptr_0
        if PLAN.HAS_STEP_SCALE:
            expert = _expert_of(block, places, PLAN)
            scale_ptr_0 += expert.to(gl.int64) * w.stride_expert
            # Past the last row there is no scale: the second half may lie there.
            first_row = tile * PLAN.COLUMNS
            second_row = gl.minimum(first_row + WIDTH, sizes.columns - 1)
            scale_ptr_1 = scale_ptr_0 + second_row // SCALE_ROWS * w.stride_row
            scale_ptr_0 += first_row // SCALE_ROWS * w.stride_row
        if PLAN.SOURCE == IN_BLOCKS:
            scale_ptr_0 = _word_ptrs(block, tile, w, places, sizes, PLAN)
        scale = gl.full((SLOTS,), 1.0, gl.float32, row_layout)
        if PLAN.SOURCE == STATIC:
            scale = scale * gl.load(h.scale)
        if PLAN.SOURCE == PER_ROW:
            amax = gl.zeros((SLOTS,), gl.int32, row_layout)
            for step in range(sizes.steps):
                value = _load_h(ptrs, is_row, step * WIDTH + column, sizes, h, ACTIVATION, PLAN)
                amax = gl.maximum(amax, gl.max(_magnitude_bits(value), axis=1))
            scale = _scale_of_amax(amax, ENCODING)
        for step in range(first_step, last_step):
            offset = step * w.stride_step
            scale_0, scale_1 = _weight_scales(scale_ptr_0, scale_ptr_1, offset, PLAN)
            value = _load_h(ptrs, is_row, step * WIDTH + column, sizes, h, ACTIVATION, PLAN)
            if PLAN.SOURCE == HALVES:
                # As it would be stored.
                value = value.to(gl.bfloat16)
            encoded, row_scale = _encode_step(value, scale, PLAN.SOURCE, ENCODING)
            _put_step(ring, count, encoded, row_scale, scale_0, scale_1, PLAN)
            count += 1


@gluon.jit
def _halves(product):
    """A product's first and last 128 weight rows; both are the same where there are only 128."""
    if product.shape[0] == 2 * WIDTH:
        SLOTS: gl.constexpr = product.shape[1]
        first, second = product.reshape([2, WIDTH, SLOTS]).permute((1, 2, 0)).split()
    else:
        first = product
        second = product
    return first, second


@gluon.jit
def _store_rows(
    y, scale, bias_ptr, w_scale_ptr, y_ptr, choice, first_row, part, sizes, PLAN: gl.constexpr
):
    """Scale 128 weight rows' products, where scales do not change by the step; add biases; store.

    `choice`: of slots. `part`: of the depth.
    """
    layout: gl.constexpr = y.type.layout
    row = first_row + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, layout))
    if PLAN.HAS_LATE_SCALE:
        if PLAN.SCALE_ROWS == 0:
            y = y * (scale * gl.load(w_scale_ptr))[None, :]
        else:
            y = y * (_of_rows(w_scale_ptr, row, sizes.columns) * scale[None, :])
    if PLAN.HAS_BIAS:
        y += gl.where(part == 0, _of_rows(bias_ptr, row, sizes.columns), 0.0)
    # Neighbouring columns of y are a thread's.
    stored: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, 4], [0, 1])
    y = gl.convert_layout(y, stored).to(y_ptr.dtype.element_ty)
    choice = gl.convert_layout(choice, gl.SliceLayout(0, stored))
    row = first_row + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, stored))
    is_inside = (choice >= 0)[None, :] & (row < sizes.columns)[:, None]
    place = (gl.maximum(choice, 0).to(gl.int64) + part * sizes.choices)[None, :] * sizes.columns
    gl.store(y_ptr + place + row[:, None], y, mask=is_inside)


@gluon.jit
def _compute(h, w, y_ptr, places, ring, sizes, PLAN: gl.constexpr):
    """Multiply, scale and store."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.ROWS * PLAN.PIECES, 32])
    flat: gl.constexpr = gl.NVMMASharedLayout(WIDTH, 8, 2)
    COLUMNS: gl.constexpr = PLAN.COLUMNS
    SLOTS: gl.constexpr = PLAN.ROWS
    zero = gl.zeros((COLUMNS, SLOTS * PLAN.PIECES), gl.float32, mma)
    nothing = _halves(_unscaled(zero, PLAN))[0]
    slot_layout: gl.constexpr = gl.SliceLayout(0, nothing.type.layout)
    one = gl.full((SLOTS,), 1.0, gl.float32, slot_layout)
    count = 0
    first, last = _share(sizes.total)
    for number in range(first, last):
        block, tile, first_step, last_step = _locate(number, sizes, PLAN.DOWN_SPLITS)
        y_0 = nothing
        y_1 = nothing
        scale = one
        for _step in range(first_step, last_step):
            stage = count % PLAN.STAGES
            phase = (count // PLAN.STAGES) & 1
            mbarrier.wait(ring.full_x.index(stage), phase)
            mbarrier.wait(ring.full.index(stage), phase)
            matrix = seen_as(ring.w.index(stage), ring.w.dtype, [PLAN.COLUMNS, WIDTH], flat)
            part_0, part_1 = _halves(_product(matrix, ring, stage, zero, PLAN))
            if PLAN.HAS_STEP_SCALE:
                scale_0, scale_1 = _step_scales(ring, stage, slot_layout)
                y_0 += part_0 * scale_0
                if PLAN.COLUMNS > WIDTH:
                    y_1 += part_1 * scale_1
            else:
                if PLAN.SOURCE == PER_ROW:
                    scale = ring.scale.index(stage * 3).load(slot_layout)
                if PLAN.SOURCE == HALVES:
                    step_scale = ring.scale.index(stage * 3).load(slot_layout)[None, :]
                    part_0 *= step_scale
                    part_1 *= step_scale
                y_0 += part_0
                if PLAN.COLUMNS > WIDTH:
                    y_1 += part_1
            mbarrier.arrive(ring.empty.index(stage))
            count += 1
        choice = _choices_of(block, places, slot_layout, PLAN)
        w_scale_ptr = w.scale
        bias_ptr = w.bias
        if PLAN.HAS_BIAS or PLAN.HAS_LATE_SCALE:
            expert = _expert_of(block, places, PLAN).to(gl.int64)
            bias_ptr += expert * sizes.columns
            w_scale_ptr += expert * w.stride_expert
        if PLAN.SOURCE == STATIC:
            scale = one * gl.load(h.scale)
        first_row = tile * PLAN.COLUMNS
        part = number % PLAN.DOWN_SPLITS
        _store_rows(y_0, scale, bias_ptr, w_scale_ptr, y_ptr, choice, first_row, part, sizes, PLAN)
        if PLAN.COLUMNS > WIDTH:
            first_row += WIDTH
            _store_rows(
                y_1, scale, bias_ptr, w_scale_ptr, y_ptr, choice, first_row, part, sizes, PLAN
            )


@gluon.jit
def _decode_down_kernel(
    w_desc,
    h,
    w,
    y_ptr,
    ids,
    tables,
    num_tokens,
    num_experts,
    depth,
    num_columns,
    ENCODING: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PLAN: gl.constexpr,
):
    gdc_launch_dependents()
    # Of a thread that encodes, by how much it holds; four warps multiply with the rest.
    LIGHT: gl.constexpr = 80 if PLAN.SPLITS > 1 else 64
    REGISTERS: gl.constexpr = 72 if PLAN.SOURCE == PER_ROW else LIGHT
    ENCODER: gl.constexpr = 104 if PLAN.SOURCE == IN_BLOCKS else REGISTERS
    LOADER: gl.constexpr = 40 if PLAN.SOURCE == IN_BLOCKS else REGISTERS
    ring = _allocate_ring(w_desc, PLAN)
    places = _allocate_places(tables, PLAN)
    SPLITS: gl.constexpr = PLAN.DOWN_SPLITS
    sizes = _sizes_of(ids, places, num_tokens, num_experts, depth, num_columns, SPLITS, PLAN)
    gl.warp_specialize(
        [
            (_compute, (h, w, y_ptr, places, ring, sizes, PLAN)),
            (_bring_weights, (w_desc, places, ring, sizes, PLAN)),
            (_encode_rows, (h, w, places, ring, sizes, ENCODING, ACTIVATION, PLAN)),
        ],
        [1, 4],
        [LOADER, ENCODER],
    )


def decode_down(
    h: Tensor,
    experts: ExpertWeights,
    ids: Ids,
    tables: Tables,
    num_tokens: int,
    count: int,
    format: Format | None,
    config: DecodeConfig,
) -> Tensor:
    """What `decode_up` returns ``-> y [parts, T * A, D]``; rows of dropped choices hold anything.

    bf16, or float32 sums over parts of the depth. h is quantised to `format` on its way.
    """
    w = experts.w2
    assert isinstance(w, QTensor)
    num_experts, num_columns, depth = w.shape
    num_choices = num_tokens * ids.num_choices
    y_dtype = torch.float32 if config.down_splits > 1 else torch.bfloat16
    y = h.new_empty((config.down_splits, num_choices, num_columns), dtype=y_dtype)
    input_scale = experts.w2_input_scale
    source = source_of(h, format, input_scale is not None)
    is_in_blocks = source == IN_BLOCKS.value
    plan = Plan(
        config.rows,
        config.columns,
        config.down_stages,
        config.group,
        config.splits,
        config.down_splits,
        count,
        ids.has_map,
        source,
        pieces_of(source),
        has_steps(w.format),
        not (is_in_blocks or has_steps(w.format)),
        scale_rows(w),
        experts.w2_bias is not None,
    )
    num_tiles = triton.cdiv(num_columns, config.columns) * config.down_splits
    num_blocks = min(num_choices, num_choices // config.rows + num_experts)
    scale = h if input_scale is None else input_scale
    _decode_down_kernel[(min(config.resident * num_sms(h.device), num_blocks * num_tiles),)](
        bytes_by_tma(w.data, [1, config.columns, STEP]),
        Sums(h, h.stride(-2), h.stride(0), max(config.splits // 2, 1), scale),
        (block_scales if is_in_blocks else scales_of)(w, experts.w2_bias),
        y,
        ids,
        tables,
        num_tokens,
        num_experts,
        depth,
        num_columns,
        None if format is None else format_encoding(format),
        nonlinearity_of(experts.activation),
        plan,
        **launch_of(12, config.resident),
    )
    return y
