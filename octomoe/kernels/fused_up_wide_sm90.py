"""The first half of a layer of experts on Hopper, in bf16, for many rows: h = act(x @ w13.T).

A persistent program of two groups of four warps that multiply, 64 gate and 64 up rows of the same
columns each, and of four that bring weights by TMA and gather the tokens' rows, meeting in a ring
in shared memory. A tile is 128 columns times 64 or 128 slots. What makes 8-bit weights bf16 is in
`wide_tiles_sm90`.

The box of the TMA brings weight rows in the order in which h is to be stored, so that the product
is: h is the depth of the other half.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import Format
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.activations import _activate, nonlinearity_of
from octomoe.kernels.expert_tiles import STEP
from octomoe.kernels.fused_rows_wide_sm90 import _rounded
from octomoe.kernels.gluon_shim import (
    TensorDescriptor,
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
from octomoe.kernels.scaling import _magnitude_bits, format_encoding
from octomoe.kernels.tiles_sm90 import Sizes, _tile_of, bytes_by_tma, slots_of
from octomoe.kernels.wide_tiles_sm90 import (
    GROUP_ROWS,
    MX,
    WIDTH,
    Ring,
    _finished,
    _multiply_tile,
    _row_of,
    grid_of,
    launch_of,
    plan_of,
    scales_of,
)
from octomoe.tune.configs import PrefillConfig

GATHERERS = gl.constexpr(4)


class Rows(NamedTuple):
    """Rows, and what lies between neighbours."""

    data: Tensor
    stride_row: Any


@gluon.jit
def _bring(x, w_desc, slots, ring, sizes, PLAN: gl.constexpr):
    """Bring the gate rows and the up rows of a tile's columns and the rows of its tokens, a step of
    the depth at a time.
    """
    STRIPS: gl.constexpr = PLAN.STRIPS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [GATHERERS, 1], [1, 0])
    row = gl.arange(0, PLAN.ROWS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    count = 0
    for number in range(gl.program_id(0), sizes.blocks * sizes.tiles, gl.num_programs(0)):
        block, tile = _tile_of(number, sizes.blocks, sizes.tiles, PLAN.GROUP)
        expert = gl.load(slots.expert_of_block + block)
        first = (expert * STRIPS * sizes.columns + tile * WIDTH) // 16
        choice = gl.load(slots.choice + block * PLAN.ROWS + row)
        # Slots of no token take the first one's row, and nobody looks.
        token = gl.maximum(choice, 0) // slots.num_choices
        offset = token[:, None] * x.stride_row + column[None, :]
        for step in range(sizes.steps):
            stage = count % PLAN.STAGES
            full = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), ((count // PLAN.STAGES) & 1) ^ 1)
            mbarrier.expect(full, STRIPS * w_desc.block_type.nbytes)
            for strip in gl.static_range(STRIPS):
                place = [first + strip * (sizes.columns // 16), 0, 0, 0, step * WIDTH]
                tma_load(w_desc, place, full, ring.weights.index(stage * STRIPS + strip))
            is_inside = (step * WIDTH + column < sizes.depth)[None, :]
            copy_rows(ring.rows.index(stage), x.data + step * WIDTH + offset, mask=is_inside)
            rows_arrive(full, increment_count=False)
            count += 1


@gluon.jit
def _rounded_columns(y, ENCODING: gl.constexpr):
    """``y [columns, slots]`` under a scale for each slot and block of columns."""
    COLUMNS: gl.constexpr = y.shape[0]
    SLOTS: gl.constexpr = y.shape[1]
    if SLOTS > 64:
        # In halves: warps exchange their maxima in what the ring leaves of shared memory.
        halves = y.reshape([COLUMNS, 2, SLOTS // 2]).permute((0, 2, 1))
        left, right = gl.split(halves)
        both = gl.join(_rounded_columns(left, ENCODING), _rounded_columns(right, ENCODING))
        rounded = both.permute((0, 2, 1)).reshape([COLUMNS, SLOTS])
    else:
        blocks = y.reshape([COLUMNS // MX, MX, SLOTS])
        amax = gl.max(_magnitude_bits(blocks), axis=1)[:, None, :]
        rounded = _rounded(blocks, amax, ENCODING).reshape([COLUMNS, SLOTS])
    return rounded


@gluon.jit
def _compute(
    h_desc,
    w,
    slots,
    ring,
    sizes,
    NUMBER: gl.constexpr,
    ENCODING: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PLAN: gl.constexpr,
):
    """Multiply, scale, activate, round and store 64 columns of every tile of this program."""
    ROWS: gl.constexpr = PLAN.ROWS
    count = 0
    for number in range(gl.program_id(0), sizes.blocks * sizes.tiles, gl.num_programs(0)):
        # Locate the tile.
        block, tile = _tile_of(number, sizes.blocks, sizes.tiles, PLAN.GROUP)
        expert_ptr = slots.expert_of_block + block
        gate_row = tile * WIDTH + NUMBER * GROUP_ROWS
        up_row = gate_row
        end = sizes.columns
        if PLAN.STRIPS == 2:
            up_row += sizes.columns
            end += sizes.columns

        # Multiply.
        gate, up = _multiply_tile(
            ring,
            count,
            sizes.steps,
            expert_ptr,
            gate_row,
            up_row,
            sizes.columns,
            end,
            w,
            NUMBER,
            True,
            PLAN,
        )
        count += sizes.steps
        gate = _finished(gate, expert_ptr, gate_row, sizes.columns, end, w, True, PLAN)
        if PLAN.STRIPS == 2:
            up = _finished(up, expert_ptr, up_row, end, end, w, True, PLAN)

        # Activate, round, and store.
        y = _activate(gate, up, ACTIVATION)
        if ENCODING is not None:
            place = gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, y.type.layout))
            # Past the last column lie another matrix's.
            y = gl.where((gate_row + _row_of(place, True) < sizes.columns)[:, None], y, 0.0)
            y = _rounded_columns(y, ENCODING)
        h_buf = ring.out.index(NUMBER)
        tma_store_wait(0)
        h_buf.permute((1, 0)).store(y.to(gl.bfloat16))
        fence_async_shared()
        tma_store(h_desc, [block * ROWS, gate_row], h_buf)
    tma_store_wait(0)


@gluon.jit
def _up_kernel(
    w_desc,
    h_desc,
    x,
    w,
    slots,
    depth,
    num_columns,
    ENCODING: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PLAN: gl.constexpr,
):
    STAGES: gl.constexpr = PLAN.STAGES
    x_layout: gl.constexpr = gl.NVMMASharedLayout(WIDTH, 16, 2)
    x_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, PLAN.ROWS, WIDTH], x_layout)
    w_shape: gl.constexpr = [STAGES * PLAN.STRIPS, WIDTH // 16, 2, 4, 2, WIDTH]
    w_bufs = gl.allocate_shared_memory(gl.uint8, w_shape, w_desc.layout)
    h_bufs = gl.allocate_shared_memory(gl.bfloat16, [2, PLAN.ROWS, GROUP_ROWS], h_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # Every thread that gathers arrives, and so does the one that starts TMA.
        mbarrier.init(full.index(i), count=32 * GATHERERS + 1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    ring = Ring(x_bufs, w_bufs, full, empty, h_bufs)

    gdc_wait()
    gdc_launch_dependents()
    blocks = gl.load(slots.num_used) // PLAN.ROWS
    tiles, steps = gl.cdiv(num_columns, WIDTH), gl.cdiv(depth, WIDTH)
    sizes = Sizes(blocks, tiles, steps, depth, num_columns)
    # Sums of one matrix leave room.
    REGISTERS: gl.constexpr = [232, 40] if PLAN.STRIPS == 2 else [224, 56]
    gl.warp_specialize(
        [
            (_compute, (h_desc, w, slots, ring, sizes, 0, ENCODING, ACTIVATION, PLAN)),
            (_compute, (h_desc, w, slots, ring, sizes, 1, ENCODING, ACTIVATION, PLAN)),
            (_bring, (x, w_desc, slots, ring, sizes, PLAN)),
        ],
        [4, GATHERERS],
        REGISTERS,
    )


def fused_up(
    x: Tensor,
    experts: ExpertWeights,
    routing: Routing,
    expert_of_block: Tensor,
    format: Format | None,
    config: PrefillConfig,
) -> Tensor:
    """``x [T, D] -> h [S, F]`` in bf16, both in the order of `rows_in_order`.

    With a format, h has the values that it quantises to.
    """
    w = experts.w13
    assert isinstance(w, QTensor)
    num_experts, num_rows, depth = w.shape
    width = experts.w2.shape[2]
    h = x.new_empty((routing.num_slots, width))
    if h.numel() == 0:
        return h
    # Rows of weights, as `_row_of` orders them.
    rows = w.data.view(torch.uint8).view(num_experts * num_rows // 16, 4, 2, 2, depth)
    h_box = [config.rows, GROUP_ROWS.value]
    strips = 2 if experts.activation.gated else 1
    _up_kernel[grid_of(routing, config, triton.cdiv(width, STEP))](
        bytes_by_tma(rows.permute(0, 2, 1, 3, 4), [STEP // 16, 2, 4, 2, STEP]),
        TensorDescriptor.from_tensor(h, h_box, gl.NVMMASharedLayout(STEP, 16, 2)),
        Rows(x, x.stride(0)),
        scales_of(w, experts.w13_bias),
        slots_of(routing, expert_of_block),
        depth,
        width,
        None if format is None else format_encoding(format),
        nonlinearity_of(experts.activation),
        plan_of(w, experts.w13_bias, config.rows, config.up_stages, config.group, strips),
        **launch_of(config),
    )
    return h
