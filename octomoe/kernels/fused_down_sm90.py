"""The second half of a layer of experts on Hopper, for many rows: y = h @ w2.T.

A persistent program of one or two groups of four warps that multiply, 64 slots each, and a warp
that brings both operands by TMA. A tile is 64 or 128 slots times 256 columns. It leaves through
shared memory while the next one is multiplied.

Bound by tensor cores and by the bytes of y: 720 of 1480 TFLOP/s on an H200, same layer.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octomoe.core.experts import ExpertWeights
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.expert_tiles import STEP
from octomoe.kernels.gluon_shim import (
    TensorDescriptor,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
)
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
COLUMNS = gl.constexpr(2 * STEP)


class Ring(NamedTuple):
    """Stages in shared memory, barriers (which are full, which are empty), and a place for y."""

    h: Any
    w: Any
    full: Any
    empty: Any
    y: Any


@gluon.jit
def _bring(h_desc, w_desc, slots, ring, sizes, PLAN: gl.constexpr):
    """Bring rows and weights of every tile of this program, a step of the depth at a time."""
    count = 0
    for number in range(gl.program_id(0), sizes.blocks * sizes.tiles, gl.num_programs(0)):
        block, tile = _tile_of(number, sizes.blocks, sizes.tiles, PLAN.GROUP)
        expert = gl.load(slots.expert_of_block + block)
        for step in range(sizes.steps):
            stage = count % PLAN.STAGES
            mbarrier.wait(ring.empty.index(stage), ((count // PLAN.STAGES) & 1) ^ 1)
            full = ring.full.index(stage)
            mbarrier.expect(full, h_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma_load(h_desc, [block * PLAN.ROWS, step * WIDTH], full, ring.h.index(stage))
            place = [expert, tile * COLUMNS, step * WIDTH]
            tma_load(w_desc, place, full, ring.w.index(stage))
            count += 1


@gluon.jit
def _multiply_tile(
    ring,
    first_count,
    num_steps,
    h_scale_ptr,
    h_scale_offset,
    h_stride_step,
    w_scale_ptr,
    second_scale,
    w_stride_step,
    NUMBER: gl.constexpr,
    PLAN: gl.constexpr,
):
    """Sums over the depth of the two halves of a tile, ``[64, 128]`` float32 each."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    zero = gl.zeros((64, WIDTH), gl.float32, mma)
    first = zero
    second = zero
    scale_0 = gl.full((64,), 1.0, gl.float32, gl.SliceLayout(1, mma))
    scale_1 = scale_0
    if PLAN.HAS_STEP_SCALE:
        # Scales of a step are loaded during the one before.
        next_h = gl.load(h_scale_ptr + h_scale_offset)
        next_0 = gl.load(w_scale_ptr)
        next_1 = gl.load(w_scale_ptr + second_scale)
    for step in range(num_steps):
        stage = (first_count + step) % PLAN.STAGES
        phase = ((first_count + step) // PLAN.STAGES) & 1
        if PLAN.HAS_STEP_SCALE:
            scale_0 = next_h * next_0
            scale_1 = next_h * next_1
            ahead = gl.minimum(step + 1, num_steps - 1)
            next_h = gl.load(h_scale_ptr + ahead * h_stride_step + h_scale_offset)
            next_0 = gl.load(w_scale_ptr + ahead * w_stride_step)
            next_1 = gl.load(w_scale_ptr + second_scale + ahead * w_stride_step)
        mbarrier.wait(ring.full.index(stage), phase)
        h = ring.h.index(stage).slice(NUMBER * 64, 64, dim=0)
        w = _matrix(ring.w.index(stage), COLUMNS)
        product = _product(h, w.slice(0, WIDTH, dim=0), zero)
        first = _promote(product, scale_0[:, None], first)
        # A wait between the products: the registers of one of them serve both.
        mbarrier.wait(ring.full.index(stage), phase)
        product = _product(h, w.slice(WIDTH, WIDTH, dim=0), zero)
        mbarrier.arrive(ring.empty.index(stage))
        second = _promote(product, scale_1[:, None], second)
    return first, second


@gluon.jit
def _store_half(
    y,
    y_desc,
    y_buf,
    h_scale,
    scale_ptr,
    bias_ptr,
    first_slot,
    first_column,
    num_columns,
    PLAN: gl.constexpr,
):
    """Scale 128 columns, where scales do not change by the step, add biases, and store."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    column = first_column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, mma))
    if not PLAN.HAS_STEP_SCALE:
        y = _promote(y, _late_scale(h_scale, scale_ptr, column, num_columns, PLAN), 0.0)
    if PLAN.HAS_BIAS:
        bias = _of_columns(bias_ptr, column, num_columns, PLAN.IS_DIVISIBLE)
        y = _promote(bias, 1.0, y)
    # One store per half may still be under way.
    tma_store_wait(1)
    y_buf.store(y.to(y_desc.dtype))
    fence_async_shared()
    tma_store(y_desc, [first_slot, first_column], y_buf)


@gluon.jit
def _compute(
    y_desc,
    h,
    w,
    slots,
    ring,
    sizes,
    NUMBER: gl.constexpr,
    PLAN: gl.constexpr,
):
    """Multiply, scale and store 64 slots of every tile of this program."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    SCALE_ROWS: gl.constexpr = max(PLAN.SCALE_ROWS, 1)
    count = 0
    for number in range(gl.program_id(0), sizes.blocks * sizes.tiles, gl.num_programs(0)):
        block, tile = _tile_of(number, sizes.blocks, sizes.tiles, PLAN.GROUP)
        expert = gl.load(slots.expert_of_block + block).to(gl.int64)
        first_slot = block * PLAN.ROWS + NUMBER * 64
        slot = first_slot + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
        h_scale_offset = slot * h.scale_stride_row
        scale_ptr = w.scale + expert * w.stride_expert
        first_column = tile * COLUMNS
        # Past the last column there is no scale: the second half may lie there.
        second = gl.minimum(first_column + WIDTH, sizes.columns - 1) // SCALE_ROWS
        first = first_column // SCALE_ROWS
        h_scale = gl.full((64, 1), 1.0, gl.float32, mma)
        if not PLAN.HAS_STEP_SCALE:
            h_scale = _row_scale(h.scale + h_scale_offset, scale_ptr, PLAN)
        y_0, y_1 = _multiply_tile(
            ring,
            count,
            sizes.steps,
            h.scale,
            h_scale_offset,
            h.scale_stride_step,
            scale_ptr + first * w.stride_row,
            (second - first) * w.stride_row,
            w.stride_step,
            NUMBER,
            PLAN,
        )
        count += sizes.steps
        bias_ptr = w.bias
        if PLAN.HAS_BIAS:
            bias_ptr = w.bias + expert * sizes.columns
        _store_half(
            y_0,
            y_desc,
            ring.y.index(NUMBER * 2),
            h_scale,
            scale_ptr,
            bias_ptr,
            first_slot,
            first_column,
            sizes.columns,
            PLAN,
        )
        _store_half(
            y_1,
            y_desc,
            ring.y.index(NUMBER * 2 + 1),
            h_scale,
            scale_ptr,
            bias_ptr,
            first_slot,
            first_column + WIDTH,
            sizes.columns,
            PLAN,
        )
    tma_store_wait(0)


@gluon.jit
def _down_kernel(h_desc, w_desc, y_desc, h, w, slots, depth, num_columns, PLAN: gl.constexpr):
    gdc_launch_dependents()
    GROUPS: gl.constexpr = PLAN.ROWS // 64
    STAGES: gl.constexpr = PLAN.STAGES
    dtype: gl.constexpr = w_desc.dtype
    h_bufs = gl.allocate_shared_memory(dtype, [STAGES, PLAN.ROWS, WIDTH], h_desc.layout)
    w_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, COLUMNS, WIDTH], w_desc.layout)
    y_bufs = gl.allocate_shared_memory(y_desc.dtype, [GROUPS * 2, 64, WIDTH], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    ring = Ring(h_bufs, w_bufs, full, empty, y_bufs)

    blocks = gl.load(slots.num_used) // PLAN.ROWS
    tiles, steps = gl.cdiv(num_columns, COLUMNS), gl.cdiv(depth, WIDTH)
    sizes = Sizes(blocks, tiles, steps, depth, num_columns)
    gdc_wait()
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_compute, (y_desc, h, w, slots, ring, sizes, 0, PLAN)),
                (_compute, (y_desc, h, w, slots, ring, sizes, 1, PLAN)),
                (_bring, (h_desc, w_desc, slots, ring, sizes, PLAN)),
            ],
            [4, 1],
            [232, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (y_desc, h, w, slots, ring, sizes, 0, PLAN)),
                (_bring, (h_desc, w_desc, slots, ring, sizes, PLAN)),
            ],
            [1],
            [24],
        )


def fused_down(
    h: QTensor,
    experts: ExpertWeights,
    routing: Routing,
    expert_of_block: Tensor,
    config: PrefillConfig,
) -> Tensor:
    """``h [S, F] -> y [S, D]`` in bf16; rows of no token hold anything."""
    w = experts.w2
    assert isinstance(w, QTensor)
    _, num_columns, depth = w.shape
    y = h.data.new_empty((routing.num_slots, num_columns), dtype=torch.bfloat16)
    if y.numel() == 0:
        return y
    y_layout = gl.NVMMASharedLayout(STEP, 16, 2)
    num_tiles = triton.cdiv(num_columns, 2 * STEP)
    _down_kernel[grid_of(config, routing, num_tiles)](
        bytes_by_tma(h.data, [config.rows, STEP]),
        bytes_by_tma(w.data, [1, 2 * STEP, STEP]),
        TensorDescriptor.from_tensor(y, [64, STEP], y_layout),
        rows_of(h),
        scales_of(w, experts.w2_bias),
        slots_of(routing, expert_of_block),
        depth,
        num_columns,
        plan_of(w, experts.w2_bias, config.rows, config.down_stages, config.group),
        **launch_of(config),
    )
    return y
