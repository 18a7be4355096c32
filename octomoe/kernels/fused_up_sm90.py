"""The first half of a layer of experts on Hopper, for many rows: h = act(x @ w13.T), encoded.

A persistent program of one or two groups of four warps that multiply, 64 slots each, a warp that
brings weights by TMA, and two that gather the tokens' rows, meeting in a ring in shared memory. A
tile is 64 or 128 slots times 128 gate and the same 128 up columns, so that a group holds all of
what it activates and quantises. Tensor cores keep some 14 bits of a sum in FP8: the product of each
128 of the depth is added in float32.

Bound by tensor cores: 910 of 1480 TFLOP/s on an H200, 8192 tokens of Qwen3-235B on 4 GPUs.
"""

from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octomoe.core.experts import ExpertWeights
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.activations import _activate, nonlinearity_of
from octomoe.kernels.encoding import encoding_of
from octomoe.kernels.expert_tiles import STEP
from octomoe.kernels.fused_up import empty_h
from octomoe.kernels.gluon_shim import (
    copy_rows,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    rows_arrive,
    tma_load,
    tma_store,
    tma_store_wait,
)
from octomoe.kernels.scaling import _encode, _encode_own, _magnitude_bits, _scale_of_amax
from octomoe.kernels.tiles_sm90 import (
    Sizes,
    _late_scale,
    _matrix,
    _of_columns,
    _product,
    _promote,
    _row_scale,
    _tile_of,
    bytes_by_tma,
    grid_of,
    launch_of,
    plan_of,
    rows_of,
    scales_of,
    slots_of,
)
from octomoe.tune.configs import PrefillConfig

WIDTH = gl.constexpr(STEP)
GATHERERS = gl.constexpr(2)


class Ring(NamedTuple):
    """Stages in shared memory, barriers (which are full, which are empty), and a place for h."""

    x: Any
    gate: Any
    up: Any
    full: Any
    full_up: Any
    empty: Any
    h: Any


@gluon.jit
def _gather_rows(x, slots, ring, sizes, PLAN: gl.constexpr):
    """Bring the rows of a tile's tokens, a step of the depth at a time."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [GATHERERS, 1], [1, 0])
    row = gl.arange(0, PLAN.ROWS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    count = 0
    for number in range(gl.program_id(0), sizes.blocks * sizes.tiles, gl.num_programs(0)):
        block, _ = _tile_of(number, sizes.blocks, sizes.tiles, PLAN.GROUP)
        choice = gl.load(slots.choice + block * PLAN.ROWS + row)
        # Slots of no token take the first one's row, and nobody looks.
        token = gl.maximum(choice, 0) // slots.num_choices
        offset = token[:, None] * x.stride_row + column[None, :]
        for step in range(sizes.steps):
            stage = count % PLAN.STAGES
            mbarrier.wait(ring.empty.index(stage), ((count // PLAN.STAGES) & 1) ^ 1)
            is_inside = (step * WIDTH + column < sizes.depth)[None, :]
            copy_rows(ring.x.index(stage), x.data + step * WIDTH + offset, mask=is_inside)
            rows_arrive(ring.full.index(stage), increment_count=False)
            count += 1


@gluon.jit
def _bring_weights(w_desc, slots, ring, sizes, PARTS: gl.constexpr, PLAN: gl.constexpr):
    """Bring the gate rows and the up rows of a tile's columns, a step of the depth at a time."""
    count = 0
    for number in range(gl.program_id(0), sizes.blocks * sizes.tiles, gl.num_programs(0)):
        block, tile = _tile_of(number, sizes.blocks, sizes.tiles, PLAN.GROUP)
        matrix = gl.load(slots.expert_of_block + block) * PARTS
        for step in range(sizes.steps):
            stage = count % PLAN.STAGES
            mbarrier.wait(ring.empty.index(stage), ((count // PLAN.STAGES) & 1) ^ 1)
            full = ring.full.index(stage)
            mbarrier.expect(full, w_desc.block_type.nbytes)
            place = [matrix, tile * WIDTH, step * WIDTH]
            tma_load(w_desc, place, full, ring.gate.index(stage))
            if PARTS == 2:
                full_up = ring.full_up.index(stage)
                mbarrier.expect(full_up, w_desc.block_type.nbytes)
                place = [matrix + 1, tile * WIDTH, step * WIDTH]
                tma_load(w_desc, place, full_up, ring.up.index(stage))
            count += 1


@gluon.jit
def _multiply_tile(
    ring,
    first_count,
    num_steps,
    x_scale_ptr,
    x_scale_offset,
    x_stride_step,
    gate_scale_ptr,
    up_scale_ptr,
    w_stride_step,
    NUMBER: gl.constexpr,
    PARTS: gl.constexpr,
    PLAN: gl.constexpr,
):
    """Sums over the depth of gate and up of 64 slots, ``[64, 128]`` float32 each."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    zero = gl.zeros((64, WIDTH), gl.float32, mma)
    gate = zero
    up = zero
    gate_scale = gl.full((64,), 1.0, gl.float32, gl.SliceLayout(1, mma))
    up_scale = gate_scale
    if PLAN.HAS_STEP_SCALE:
        # Scales of a step are loaded during the one before.
        next_x = gl.load(x_scale_ptr + x_scale_offset)
        next_gate = gl.load(gate_scale_ptr)
        next_up = gl.load(up_scale_ptr)
    for step in range(num_steps):
        stage = (first_count + step) % PLAN.STAGES
        phase = ((first_count + step) // PLAN.STAGES) & 1
        if PLAN.HAS_STEP_SCALE:
            gate_scale = next_x * next_gate
            up_scale = next_x * next_up
            ahead = gl.minimum(step + 1, num_steps - 1)
            next_x = gl.load(x_scale_ptr + ahead * x_stride_step + x_scale_offset)
            next_gate = gl.load(gate_scale_ptr + ahead * w_stride_step)
            next_up = gl.load(up_scale_ptr + ahead * w_stride_step)
        mbarrier.wait(ring.full.index(stage), phase)
        # The rows were not brought by TMA.
        fence_async_shared()
        x = ring.x.index(stage).slice(NUMBER * 64, 64, dim=0)
        product = _product(x, _matrix(ring.gate.index(stage), WIDTH), zero)
        if PARTS == 2:
            gate = _promote(product, gate_scale[:, None], gate)
            # A wait between the products: the registers of one of them serve both.
            mbarrier.wait(ring.full_up.index(stage), phase)
            product = _product(x, _matrix(ring.up.index(stage), WIDTH), zero)
            mbarrier.arrive(ring.empty.index(stage))
            up = _promote(product, up_scale[:, None], up)
        else:
            mbarrier.arrive(ring.empty.index(stage))
            gate = _promote(product, gate_scale[:, None], gate)
    return gate, up


@gluon.jit
def _compute(
    h_desc,
    x,
    w,
    h,
    slots,
    ring,
    sizes,
    NUMBER: gl.constexpr,
    ENCODING: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PLAN: gl.constexpr,
):
    """Multiply, scale, activate, encode and store 64 slots of every tile of this program."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    PARTS: gl.constexpr = 2 if ACTIVATION.IS_GATED else 1
    SCALE_ROWS: gl.constexpr = max(PLAN.SCALE_ROWS, 1)
    count = 0
    for number in range(gl.program_id(0), sizes.blocks * sizes.tiles, gl.num_programs(0)):
        # Locate the tile.
        block, tile = _tile_of(number, sizes.blocks, sizes.tiles, PLAN.GROUP)
        expert = gl.load(slots.expert_of_block + block).to(gl.int64)
        first_slot = block * PLAN.ROWS + NUMBER * 64
        slot = first_slot + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
        choice = gl.load(slots.choice + slot)
        x_scale_offset = gl.maximum(choice, 0) // slots.num_choices * x.scale_stride_row
        gate_scale_ptr = w.scale + expert * w.stride_expert
        up_scale_ptr = gate_scale_ptr
        if PLAN.SCALE_ROWS > 0:
            up_scale_ptr += sizes.columns // SCALE_ROWS * w.stride_row

        # Multiply.
        x_scale = gl.full((64, 1), 1.0, gl.float32, mma)
        if not PLAN.HAS_STEP_SCALE:
            x_scale = _row_scale(x.scale + x_scale_offset, gate_scale_ptr, PLAN)
        first_scale = tile * WIDTH // SCALE_ROWS * w.stride_row
        gate, up = _multiply_tile(
            ring,
            count,
            sizes.steps,
            x.scale,
            x_scale_offset,
            x.scale_stride_step,
            gate_scale_ptr + first_scale,
            up_scale_ptr + first_scale,
            w.stride_step,
            NUMBER,
            PARTS,
            PLAN,
        )
        count += sizes.steps

        # Scale, where scales do not change by the step, and add biases.
        column = tile * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, mma))
        if not PLAN.HAS_STEP_SCALE:
            scale = _late_scale(x_scale, gate_scale_ptr, column, sizes.columns, PLAN)
            gate = _promote(gate, scale, 0.0)
            if PARTS == 2:
                scale = _late_scale(x_scale, up_scale_ptr, column, sizes.columns, PLAN)
                up = _promote(up, scale, 0.0)
        if PLAN.HAS_BIAS:
            bias_ptr = w.bias + expert * (sizes.columns * PARTS)
            bias = _of_columns(bias_ptr, column, sizes.columns, PLAN.IS_DIVISIBLE)
            gate = _promote(bias, 1.0, gate)
            if PARTS == 2:
                bias_ptr += sizes.columns
                bias = _of_columns(bias_ptr, column, sizes.columns, PLAN.IS_DIVISIBLE)
                up = _promote(bias, 1.0, up)

        # Activate, and store.
        y = _activate(gate, up, ACTIVATION)
        if ENCODING is not None:
            if ENCODING.BLOCK_COLUMNS > 0:
                scale = _scale_of_amax(gl.max(_magnitude_bits(y), axis=1), ENCODING)
                encoded = _encode_own(y, scale[:, None], ENCODING)
                place = slot * h.scale_stride_row + tile * h.scale_stride_step
                gl.store(h.scale + place, scale)
            else:
                encoded = _encode(y, gl.load(h.scale), ENCODING)
            h_buf = ring.h.index(NUMBER)
            tma_store_wait(0)
            h_buf.store(encoded)
            fence_async_shared()
            tma_store(h_desc, [first_slot, tile * WIDTH], h_buf)
        else:
            is_inside = (choice >= 0)[:, None]
            if not PLAN.IS_DIVISIBLE:
                is_inside = is_inside & (column < sizes.columns)[None, :]
            offset = (slot - first_slot)[:, None] * h.stride_row + column[None, :]
            gl.store(h.data + first_slot.to(gl.int64) * h.stride_row + offset, y, mask=is_inside)
    if ENCODING is not None:
        tma_store_wait(0)


@gluon.jit
def _up_kernel(
    w_desc,
    h_desc,
    x,
    w,
    h,
    slots,
    depth,
    num_columns,
    ENCODING: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PLAN: gl.constexpr,
):
    PARTS: gl.constexpr = 2 if ACTIVATION.IS_GATED else 1
    GROUPS: gl.constexpr = PLAN.ROWS // 64
    dtype: gl.constexpr = w_desc.dtype
    x_layout: gl.constexpr = gl.NVMMASharedLayout(WIDTH, 8, 2)
    x_bufs = gl.allocate_shared_memory(dtype, [PLAN.STAGES, PLAN.ROWS, WIDTH], x_layout)
    w_shape: gl.constexpr = [PLAN.STAGES, 1, WIDTH, WIDTH]
    gate_bufs = gl.allocate_shared_memory(dtype, w_shape, w_desc.layout)
    up_bufs = gate_bufs
    if PARTS == 2:
        up_bufs = gl.allocate_shared_memory(dtype, w_shape, w_desc.layout)
    h_bufs = x_bufs
    if ENCODING is not None:
        h_bufs = gl.allocate_shared_memory(dtype, [GROUPS, 64, WIDTH], h_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLAN.STAGES, 1], mbarrier.MBarrierLayout())
    full_up = gl.allocate_shared_memory(gl.int64, [PLAN.STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PLAN.STAGES, 1], mbarrier.MBarrierLayout())
    STAGES: gl.constexpr = PLAN.STAGES
    for i in gl.static_range(STAGES):
        # Every thread that gathers arrives, and so does the one that starts TMA.
        mbarrier.init(full.index(i), count=32 * GATHERERS + 1)
        mbarrier.init(full_up.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    ring = Ring(x_bufs, gate_bufs, up_bufs, full, full_up, empty, h_bufs)

    gdc_wait()
    gdc_launch_dependents()
    blocks = gl.load(slots.num_used) // PLAN.ROWS
    tiles, steps = gl.cdiv(num_columns, WIDTH), gl.cdiv(depth, WIDTH)
    sizes = Sizes(blocks, tiles, steps, depth, num_columns)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_compute, (h_desc, x, w, h, slots, ring, sizes, 0, ENCODING, ACTIVATION, PLAN)),
                (_compute, (h_desc, x, w, h, slots, ring, sizes, 1, ENCODING, ACTIVATION, PLAN)),
                (_bring_weights, (w_desc, slots, ring, sizes, PARTS, PLAN)),
                (_gather_rows, (x, slots, ring, sizes, PLAN)),
            ],
            [4, 1, GATHERERS],
            [224, 56, 56],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (h_desc, x, w, h, slots, ring, sizes, 0, ENCODING, ACTIVATION, PLAN)),
                (_bring_weights, (w_desc, slots, ring, sizes, PARTS, PLAN)),
                (_gather_rows, (x, slots, ring, sizes, PLAN)),
            ],
            [1, GATHERERS],
            [32, 32],
        )


def fused_up(
    x: QTensor,
    experts: ExpertWeights,
    routing: Routing,
    expert_of_block: Tensor,
    config: PrefillConfig,
) -> Tensor | QTensor:
    """``x [T, D] -> h [S, F]``; see `octomoe.kernels.fused_up.fused_up`."""
    w = experts.w13
    assert isinstance(w, QTensor)
    num_experts, _, depth = w.shape
    width = experts.w2.shape[2]
    h = empty_h(routing.num_slots, width, x.data, x.format, experts.w2_input_scale)
    if routing.num_slots == 0:
        return h
    parts = 2 if experts.activation.gated else 1
    h_data = h.data if isinstance(h, QTensor) else h
    _up_kernel[grid_of(config, routing, triton.cdiv(width, STEP))](
        bytes_by_tma(w.data.view(num_experts * parts, width, depth), [1, STEP, STEP]),
        bytes_by_tma(h_data, [64, STEP]) if isinstance(h, QTensor) else None,
        rows_of(x),
        scales_of(w, experts.w13_bias),
        rows_of(h),
        slots_of(routing, expert_of_block),
        depth,
        width,
        encoding_of(h) if isinstance(h, QTensor) else None,
        nonlinearity_of(experts.activation),
        plan_of(w, experts.w13_bias, config.rows, config.up_stages, config.group),
        **launch_of(config),
    )
    return h
