"""The second half of a layer of experts on Hopper, in bf16, for many rows: y = h @ w2.T.

A persistent program of two groups of four warps that multiply, and a warp that brings both operands
by TMA. A tile is 256 columns, 64 of either half for a group, times 64 or 128 slots. What makes
8-bit weights bf16 is in `wide_tiles_sm90`.
"""

import triton
from torch import Tensor, uint8
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
from octomoe.kernels.tiles_sm90 import Sizes, _tile_of, bytes_by_tma, slots_of
from octomoe.kernels.wide_tiles_sm90 import (
    GROUP_ROWS,
    WIDTH,
    Ring,
    _finished,
    _multiply_tile,
    grid_of,
    launch_of,
    plan_of,
    scales_of,
)
from octomoe.tune.configs import PrefillConfig

COLUMNS = gl.constexpr(2 * STEP)


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
            mbarrier.expect(full, h_desc.block_type.nbytes + 2 * w_desc.block_type.nbytes)
            tma_load(h_desc, [block * PLAN.ROWS, step * WIDTH], full, ring.rows.index(stage))
            for strip in gl.static_range(2):
                place = [expert, tile * COLUMNS + strip * WIDTH, step * WIDTH]
                tma_load(w_desc, place, full, ring.weights.index(stage * 2 + strip))
            count += 1


@gluon.jit
def _store(y, y_desc, y_buf, first_slot, first_column):
    """Store 64 columns, in bf16."""
    tma_store_wait(0)
    y_buf.permute((1, 0)).store(y.to(gl.bfloat16))
    fence_async_shared()
    tma_store(y_desc, [first_slot, first_column], y_buf)


@gluon.jit
def _compute(y_desc, w, slots, ring, sizes, NUMBER: gl.constexpr, PLAN: gl.constexpr):
    """Multiply, scale and store 64 columns of either half of every tile of this program."""
    count = 0
    for number in range(gl.program_id(0), sizes.blocks * sizes.tiles, gl.num_programs(0)):
        block, tile = _tile_of(number, sizes.blocks, sizes.tiles, PLAN.GROUP)
        expert_ptr = slots.expert_of_block + block
        column = tile * COLUMNS + NUMBER * GROUP_ROWS
        end = sizes.columns
        first, second = _multiply_tile(
            ring,
            count,
            sizes.steps,
            expert_ptr,
            column,
            column + WIDTH,
            end,
            end,
            w,
            NUMBER,
            False,
            PLAN,
        )
        count += sizes.steps
        y_buf = ring.out.index(NUMBER)
        first = _finished(first, expert_ptr, column, end, end, w, False, PLAN)
        _store(first, y_desc, y_buf, block * PLAN.ROWS, column)
        column += WIDTH
        second = _finished(second, expert_ptr, column, end, end, w, False, PLAN)
        _store(second, y_desc, y_buf, block * PLAN.ROWS, column)
    tma_store_wait(0)


@gluon.jit
def _down_kernel(h_desc, w_desc, y_desc, w, slots, depth, num_columns, PLAN: gl.constexpr):
    gdc_launch_dependents()
    STAGES: gl.constexpr = PLAN.STAGES
    h_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, PLAN.ROWS, WIDTH], h_desc.layout)
    w_bufs = gl.allocate_shared_memory(gl.uint8, [STAGES * 2, 1, WIDTH, WIDTH], w_desc.layout)
    y_bufs = gl.allocate_shared_memory(gl.bfloat16, [2, PLAN.ROWS, GROUP_ROWS], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    ring = Ring(h_bufs, w_bufs, full, empty, y_bufs)

    blocks = gl.load(slots.num_used) // PLAN.ROWS
    tiles, steps = gl.cdiv(num_columns, COLUMNS), gl.cdiv(depth, WIDTH)
    sizes = Sizes(blocks, tiles, steps, depth, num_columns)
    gdc_wait()
    gl.warp_specialize(
        [
            (_compute, (y_desc, w, slots, ring, sizes, 0, PLAN)),
            (_compute, (y_desc, w, slots, ring, sizes, 1, PLAN)),
            (_bring, (h_desc, w_desc, slots, ring, sizes, PLAN)),
        ],
        [4, 1],
        [240, 24],
    )


def fused_down(
    h: Tensor,
    experts: ExpertWeights,
    routing: Routing,
    expert_of_block: Tensor,
    config: PrefillConfig,
) -> Tensor:
    """``h [S, F] -> y [S, D]`` in bf16, h in the order of `rows_in_order`.

    Rows of no token hold anything.
    """
    w = experts.w2
    assert isinstance(w, QTensor)
    _, num_columns, depth = w.shape
    y = h.new_empty((routing.num_slots, num_columns))
    if y.numel() == 0:
        return y
    layout = gl.NVMMASharedLayout(STEP, 16, 2)
    _down_kernel[grid_of(routing, config, triton.cdiv(num_columns, COLUMNS.value))](
        TensorDescriptor.from_tensor(h, [config.rows, STEP], layout),
        bytes_by_tma(w.data.view(uint8), [1, STEP, STEP]),
        TensorDescriptor.from_tensor(y, [config.rows, GROUP_ROWS.value], layout),
        scales_of(w, experts.w2_bias),
        slots_of(routing, expert_of_block),
        depth,
        num_columns,
        plan_of(w, experts.w2_bias, config.rows, config.down_stages, config.group, 2),
        **launch_of(config),
    )
    return y
