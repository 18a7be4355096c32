"""The first half of a layer of experts on Hopper, for few rows: h = act(x @ w13.T), in float32.

A tile is 64 gate and the same 64 up rows of weights, interleaved by 8 on their way, times 8 or 16
rows of tokens, which may be quantised on theirs. It takes a part of the depth where a GPU has more
multiprocessors than there are tiles: sums of parts are then what is stored.

Bound by the bytes of w13.
"""

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
    GIVEN,
    HALVES,
    IN_BLOCKS,
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
from octomoe.kernels.gluon_shim import (
    copy_rows,
    gl,
    gluon,
    mbarrier,
    rows_arrive,
    seen_as,
)
from octomoe.kernels.scaling import format_encoding
from octomoe.kernels.tiles_sm90 import bytes_by_tma, rows_of, scales_of
from octomoe.tune.configs import DecodeConfig


@gluon.jit
def _bring_weights(w_desc, places, ring, sizes, PLAN: gl.constexpr):
    """Bring a tile's weights, a few steps of the depth at a time."""
    EIGHTS: gl.constexpr = PLAN.COLUMNS // 8
    GROUP: gl.constexpr = PLAN.GROUP
    count = 0
    ahead = gl.minimum(gl.program_id(0), sizes.total - 1)
    next_expert = _expert_of(ahead // PLAN.SPLITS // sizes.tiles, places, PLAN)
    for number in range(gl.program_id(0), sizes.total, gl.num_programs(0)):
        _, tile, first, last = _locate(number, sizes, PLAN.SPLITS)
        expert = next_expert
        ahead = gl.minimum(number + gl.num_programs(0), sizes.total - 1)
        next_expert = _expert_of(ahead // PLAN.SPLITS // sizes.tiles, places, PLAN)
        for step in range(first, last, GROUP):
            # Steps of a row are neighbours in memory, and are asked for together.
            for i in gl.static_range(GROUP):
                if step + i < last:
                    _wait_for_room(ring, count + i, PLAN)
            for i in gl.static_range(GROUP):
                if step + i < last:
                    place = [expert, tile * EIGHTS, 0, 0, (step + i) * WIDTH]
                    _bring_step(w_desc, place, ring, count + i, PLAN)
            count += gl.minimum(last - step, GROUP)


@gluon.jit
def _scale_ptrs(block, tile, w, places, sizes, rows, PARTS: gl.constexpr, PLAN: gl.constexpr):
    """Where the scales of a tile's gate and up rows are, for each of its `rows`.

    As many pointers as rows: what all threads agree on goes to registers that wait for it.
    """
    SCALE_ROWS: gl.constexpr = max(PLAN.SCALE_ROWS, 1)
    gate_ptrs = w.scale + rows * 0
    up_ptrs = gate_ptrs
    if PLAN.HAS_STEP_SCALE:
        expert = _expert_of(block, places, PLAN).to(gl.int64)
        gate_ptrs += expert * w.stride_expert
        gate_ptrs += tile * PLAN.COLUMNS // SCALE_ROWS * w.stride_row
        up_ptrs = gate_ptrs
        if PARTS == 2:
            up_ptrs += sizes.columns // SCALE_ROWS * w.stride_row
    return gate_ptrs, up_ptrs


@gluon.jit
def _copy_rows(x, w, ids, places, ring, sizes, PARTS: gl.constexpr, PLAN: gl.constexpr):
    """Copy the encoded rows of a tile's tokens, a step of the depth at a time; by one warp."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [1, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    count = 0
    for number in range(gl.program_id(0), sizes.total, gl.num_programs(0)):
        block, tile, first, last = _locate(number, sizes, PLAN.SPLITS)
        choice = _choices_of(block, places, gl.SliceLayout(1, layout), PLAN)
        is_row = (choice >= 0)[:, None]
        token = gl.maximum(choice, 0) // ids.num_choices
        ptrs = x.data + (token.to(gl.int64)[:, None] * x.stride_row + column[None, :])
        # Scales of rows of no token are never looked at.
        token = gl.convert_layout(token, flat)
        scale_ptrs = x.scale + token * x.scale_stride_row
        gate_ptrs, up_ptrs = _scale_ptrs(block, tile, w, places, sizes, token, PARTS, PLAN)
        for step in range(first, last):
            stage = count % PLAN.STAGES
            _wait_for_room(ring, count, PLAN)
            mask = is_row & (step * WIDTH + column < sizes.depth)[None, :]
            copy_rows(ring.x.index(stage), ptrs + step * WIDTH, mask=mask)
            if PLAN.HAS_STEP_SCALE:
                copy_rows(ring.scale.index(stage * 3), scale_ptrs + step * x.scale_stride_step)
                copy_rows(ring.scale.index(stage * 3 + 1), gate_ptrs + step * w.stride_step)
                copy_rows(ring.scale.index(stage * 3 + 2), up_ptrs + step * w.stride_step)
            rows_arrive(ring.full_x.index(stage), increment_count=False)
            count += 1


@gluon.jit
def _word_ptrs(block, tile, w, places, sizes, PARTS: gl.constexpr, PLAN: gl.constexpr):
    """Where the scales of blocks of each of a tile's weight rows are."""
    rows: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row = gl.arange(0, PLAN.COLUMNS * PARTS, layout=rows)
    if PARTS == 2:
        # Gate and up are interleaved by 8.
        row = row // 16 * 8 + row % 8 + row // 8 % 2 * sizes.columns
    row += tile * PLAN.COLUMNS
    expert = _expert_of(block, places, PLAN).to(gl.int64)
    return w.scale + expert * w.stride_expert + row * w.stride_row


@gluon.jit
def _load_step(ptrs, is_row, column, gate_ptrs, up_ptrs, step, sizes, w, PLAN: gl.constexpr):
    """Rows in a step, and the scales of their weights."""
    mask = is_row[:, None] & (step * WIDTH + column < sizes.depth)[None, :]
    value = gl.load(ptrs + step * WIDTH, mask=mask, other=0.0)
    gate_scale, up_scale = _weight_scales(gate_ptrs, up_ptrs, step * w.stride_step, PLAN)
    return value, gate_scale, up_scale


@gluon.jit
def _encode_rows(
    x, w, ids, places, ring, sizes, PARTS: gl.constexpr, ENCODING: gl.constexpr, PLAN: gl.constexpr
):
    """Encode the rows of a tile's tokens, a step of the depth at a time, the next on its way."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    SLOTS: gl.constexpr = PLAN.ROWS
    scale = gl.full((SLOTS,), 1.0, gl.float32, row_layout)
    if PLAN.SOURCE == STATIC:
        scale = scale * gl.load(x.scale)
    count = 0
    for number in range(gl.program_id(0), sizes.total, gl.num_programs(0)):
        block, tile, first, last = _locate(number, sizes, PLAN.SPLITS)
        choice = _choices_of(block, places, row_layout, PLAN)
        is_row = choice >= 0
        token = gl.maximum(choice, 0) // ids.num_choices
        ptrs = x.data + token.to(gl.int64)[:, None] * x.stride_row + column[None, :]
        if PLAN.SOURCE == IN_BLOCKS:
            gate_ptrs = _word_ptrs(block, tile, w, places, sizes, PARTS, PLAN)
            up_ptrs = gate_ptrs
        else:
            gate_ptrs, up_ptrs = _scale_ptrs(block, tile, w, places, sizes, token, PARTS, PLAN)
        # Two by two: what is moved from variable to variable is waited for.
        value_0, gate_0, up_0 = _load_step(
            ptrs, is_row, column, gate_ptrs, up_ptrs, first, sizes, w, PLAN
        )
        for step in range(first, last, 2):
            odd = gl.minimum(step + 1, last - 1)
            value_1, gate_1, up_1 = _load_step(
                ptrs, is_row, column, gate_ptrs, up_ptrs, odd, sizes, w, PLAN
            )
            encoded, row_scale = _encode_step(value_0, scale, PLAN.SOURCE, ENCODING)
            _put_step(ring, count, encoded, row_scale, gate_0, up_0, PLAN)
            count += 1
            even = gl.minimum(step + 2, last - 1)
            value_0, gate_0, up_0 = _load_step(
                ptrs, is_row, column, gate_ptrs, up_ptrs, even, sizes, w, PLAN
            )
            if step + 1 < last:
                encoded, row_scale = _encode_step(value_1, scale, PLAN.SOURCE, ENCODING)
                _put_step(ring, count, encoded, row_scale, gate_1, up_1, PLAN)
                count += 1


@gluon.jit
def _parts(product, PARTS: gl.constexpr):
    """Gate and up of a product, whose rows are interleaved by 8; without a gate both are one."""
    if PARTS == 2:
        ROWS: gl.constexpr = product.shape[0] // 2
        SLOTS: gl.constexpr = product.shape[1]
        both = product.reshape([ROWS // 8, 2, 8, SLOTS]).permute((0, 2, 3, 1))
        gate, up = both.split()
        gate = gate.reshape([ROWS, SLOTS])
        up = up.reshape([ROWS, SLOTS])
    else:
        gate = product
        up = product
    return gate, up


@gluon.jit
def _compute(
    x,
    w,
    h_ptr,
    ids,
    places,
    ring,
    sizes,
    PARTS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PLAN: gl.constexpr,
):
    """Multiply and scale; activate, and store what is finished."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.ROWS * PLAN.PIECES, 32])
    flat: gl.constexpr = gl.NVMMASharedLayout(WIDTH, 8, 2)
    ROWS: gl.constexpr = PLAN.COLUMNS * PARTS
    SLOTS: gl.constexpr = PLAN.ROWS
    zero = gl.zeros((ROWS, SLOTS * PLAN.PIECES), gl.float32, mma)
    nothing = _parts(_unscaled(zero, PLAN), PARTS)[0]
    tile_layout: gl.constexpr = nothing.type.layout
    slot_layout: gl.constexpr = gl.SliceLayout(0, tile_layout)
    count = 0
    for number in range(gl.program_id(0), sizes.total, gl.num_programs(0)):
        block, tile, first, last = _locate(number, sizes, PLAN.SPLITS)
        gate = nothing
        up = nothing
        for _step in range(first, last):
            stage = count % PLAN.STAGES
            phase = (count // PLAN.STAGES) & 1
            mbarrier.wait(ring.full_x.index(stage), phase)
            mbarrier.wait(ring.full.index(stage), phase)
            matrix = seen_as(ring.w.index(stage), ring.w.dtype, [ROWS, WIDTH], flat)
            gate_part, up_part = _parts(_product(matrix, ring, stage, zero, PLAN), PARTS)
            if PLAN.HAS_STEP_SCALE:
                gate_scale, up_scale = _step_scales(ring, stage, slot_layout)
                gate += gate_part * gate_scale
                if PARTS == 2:
                    up += up_part * up_scale
            else:
                if PLAN.SOURCE == HALVES:
                    scale = ring.scale.index(stage * 3).load(slot_layout)[None, :]
                    gate_part *= scale
                    up_part *= scale
                gate += gate_part
                if PARTS == 2:
                    up += up_part
            mbarrier.arrive(ring.empty.index(stage))
            count += 1

        # Scale, where scales do not change by the step, and add biases.
        choice = _choices_of(block, places, slot_layout, PLAN)
        row = tile * PLAN.COLUMNS
        row += gl.arange(0, PLAN.COLUMNS, layout=gl.SliceLayout(1, tile_layout))
        if PLAN.HAS_BIAS or PLAN.HAS_LATE_SCALE:
            expert = _expert_of(block, places, PLAN).to(gl.int64)
        if PLAN.HAS_LATE_SCALE:
            token = gl.maximum(choice, 0) // ids.num_choices
            x_scale = gl.full((1, SLOTS), 1.0, gl.float32, tile_layout)
            if PLAN.SOURCE != HALVES:
                x_scale = gl.load(x.scale + token * x.scale_stride_row)[None, :]
            w_scale_ptr = w.scale + expert * w.stride_expert
            if PLAN.SCALE_ROWS == 0:
                x_scale = x_scale * gl.load(w_scale_ptr)
                gate = gate * x_scale
                up = up * x_scale
            else:
                gate = gate * (_of_rows(w_scale_ptr, row, sizes.columns) * x_scale)
                w_scale_ptr += sizes.columns
                if PARTS == 2:
                    up = up * (_of_rows(w_scale_ptr, row, sizes.columns) * x_scale)
        # Known by its number: of a short depth, the first part has no steps.
        if PLAN.HAS_BIAS and number % PLAN.SPLITS == 0:
            bias_ptr = w.bias + expert * (sizes.columns * PARTS)
            gate += _of_rows(bias_ptr, row, sizes.columns)
            if PARTS == 2:
                up += _of_rows(bias_ptr + sizes.columns, row, sizes.columns)

        # Activate, and store.
        is_inside = (choice >= 0)[None, :] & (row < sizes.columns)[:, None]
        place = gl.maximum(choice, 0).to(gl.int64)
        if PLAN.SPLITS == 1:
            h = _activate(gate, up, ACTIVATION)
            gl.store(h_ptr + place[None, :] * sizes.columns + row[:, None], h, mask=is_inside)
        else:
            place += number % PLAN.SPLITS * sizes.choices
            ptrs = h_ptr + place[None, :] * (sizes.columns * PARTS) + row[:, None]
            gl.store(ptrs, gate, mask=is_inside)
            if PARTS == 2:
                gl.store(ptrs + sizes.columns, up, mask=is_inside)


@gluon.jit
def _decode_up_kernel(
    w_desc,
    x,
    w,
    h_ptr,
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
    PARTS: gl.constexpr = 2 if ACTIVATION.IS_GATED else 1
    ring = _allocate_ring(w_desc, PLAN)
    places = _allocate_places(tables, PLAN)

    # What follows reads ids before it waits for this: they must be there.
    gdc_wait()
    gdc_launch_dependents()
    sizes = _sizes_of(ids, places, num_tokens, num_experts, depth, num_columns, PLAN.SPLITS, PLAN)
    if PLAN.SOURCE == GIVEN:
        gl.warp_specialize(
            [
                (_compute, (x, w, h_ptr, ids, places, ring, sizes, PARTS, ACTIVATION, PLAN)),
                (_bring_weights, (w_desc, places, ring, sizes, PLAN)),
                (_copy_rows, (x, w, ids, places, ring, sizes, PARTS, PLAN)),
            ],
            [1, 1],
            [64, 64],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (x, w, h_ptr, ids, places, ring, sizes, PARTS, ACTIVATION, PLAN)),
                (_bring_weights, (w_desc, places, ring, sizes, PLAN)),
                (_encode_rows, (x, w, ids, places, ring, sizes, PARTS, ENCODING, PLAN)),
            ],
            [1, 4],
            [80, 80],
        )


def decode_up(
    x: Tensor | QTensor,
    experts: ExpertWeights,
    ids: Ids,
    tables: Tables,
    num_tokens: int,
    count: int,
    format: Format | None,
    config: DecodeConfig,
) -> Tensor:
    """``x [T, D] -> h``: float32 ``[T * A, F]`` activated, or sums ``[splits, T * A, 2F]``.

    Rows are in the order of choices; those of dropped ones hold anything. Programs sort `count`
    choices by themselves; if that is 0, `tables` say where they are. A format that x does not have
    yet has scales for each row and step, or a static one.
    """
    w = experts.w13
    assert isinstance(w, QTensor)
    data = x.data if isinstance(x, QTensor) else x
    num_experts, _, depth = w.shape
    width = experts.w2.shape[2]
    parts = 2 if experts.activation.gated else 1
    num_choices = num_tokens * ids.num_choices
    sums = (config.splits, num_choices, width * parts)
    h = data.new_empty(sums if config.splits > 1 else (num_choices, width), dtype=torch.float32)
    columns = 128 // parts
    num_tiles = triton.cdiv(width, columns) * config.splits
    num_blocks = min(num_choices, num_choices // config.rows + num_experts)
    eights = w.data.view(num_experts, parts, width // 8, 8, depth).permute(0, 2, 1, 3, 4)
    input_scale = experts.w13_input_scale
    source = source_of(x, format, input_scale is not None)
    is_in_blocks = source == IN_BLOCKS.value
    rows = rows_of(x)
    if input_scale is not None and source == STATIC.value:
        rows = rows._replace(scale=input_scale)
    plan = Plan(
        config.rows,
        columns,
        config.up_stages,
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
        experts.w13_bias is not None,
    )
    _decode_up_kernel[(min(config.resident * num_sms(data.device), num_blocks * num_tiles),)](
        bytes_by_tma(eights, [1, columns // 8, parts, 8, STEP]),
        rows,
        (block_scales if is_in_blocks else scales_of)(w, experts.w13_bias),
        h,
        ids,
        tables,
        num_tokens,
        num_experts,
        depth,
        width,
        None if format is None else format_encoding(format),
        nonlinearity_of(experts.activation),
        plan,
        **launch_of(8 if source == GIVEN.value else 12, config.resident),
    )
    return h
