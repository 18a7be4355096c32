"""What both halves of Hopper's kernels for few rows share: values, the ring, rows on their way in.

A persistent program is four warps that multiply, a warp that brings weights by TMA, and four that
bring rows and encode them, or one that copies encoded ones, meeting in a ring in shared memory.
Weight rows take the side of the tensor core's tile that has 64 at least.

Code is short, and in loops: between two layers of a model it leaves the caches, and comes back more
slowly than it runs.
"""

from typing import Any, Final, NamedTuple

from torch import Tensor

from octomoe.core.formats import Format
from octomoe.core.qtensor import QTensor
from octomoe.kernels.chain import chain_arguments
from octomoe.kernels.decode_choices_sm90 import _sort_choices
from octomoe.kernels.expert_tiles import STEP, has_steps
from octomoe.kernels.gluon_shim import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    multiply,
    tma_load,
    wait_for_product,
)
from octomoe.kernels.scaling import _encode, _encode_own, _magnitude_bits, _scale_of_amax

WIDTH = gl.constexpr(STEP)
# How rows are brought: as they are, or encoded under a scale of each step's own, of the whole row's
# own, or under one that is given.
GIVEN, PER_STEP, PER_ROW, STATIC = (gl.constexpr(i) for i in range(4))
_REGISTERS: Final = 65536


class Plan(NamedTuple):
    """What is known about a problem when its kernel is compiled.

    Weights of `GROUP` steps are asked for together. `COUNT` choices are sorted inside (0: a
    routing's tables say where they are). `SOURCE` says how rows are brought. A scale of weights
    serves `SCALE_ROWS` rows (0: all).
    """

    ROWS: int
    COLUMNS: int
    STAGES: int
    GROUP: int
    SPLITS: int
    COUNT: int
    HAS_MAP: bool
    SOURCE: int
    HAS_STEP_SCALE: bool
    SCALE_ROWS: int
    HAS_BIAS: bool


class Ring(NamedTuple):
    """Stages in shared memory, and barriers: weights are there, rows are there, all are read.

    Of a stage's three rows of scales one is x's, two are those of halves of the weights' rows.
    """

    w: Any
    x: Any
    scale: Any
    full: Any
    full_x: Any
    empty: Any


class Sizes(NamedTuple):
    """Tiles in all and of a block, steps of the depth, the depth, columns, and choices."""

    total: Any
    tiles: Any
    steps: Any
    depth: Any
    columns: Any
    choices: Any


def source_of(x: Tensor | QTensor, format: Format, is_static: bool) -> int:
    """How rows that are to be of `format` are brought."""
    if isinstance(x, QTensor):
        return GIVEN.value
    if has_steps(format):
        return PER_STEP.value
    return STATIC.value if is_static else PER_ROW.value


def launch_of(num_warps: int, resident: int) -> dict[str, Any]:
    """How a program of `num_warps` in all is launched, and its registers until roles are taken.

    A multiprocessor is to hold `resident` of them.
    """
    num_registers = min(_REGISTERS // (32 * num_warps * resident) // 8 * 8, 168)
    return {"num_warps": 4, "maxnreg": num_registers} | chain_arguments(True)


@gluon.jit
def _allocate_ring(w_desc, PLAN: gl.constexpr):
    """A ring whose stages are empty."""
    ROWS: gl.constexpr = PLAN.ROWS
    STAGES: gl.constexpr = PLAN.STAGES
    dtype: gl.constexpr = w_desc.dtype
    w_shape: gl.constexpr = [STAGES] + w_desc.block_type.shape  # noqa: RUF005
    w = gl.allocate_shared_memory(dtype, w_shape, w_desc.layout)
    x_layout: gl.constexpr = gl.NVMMASharedLayout(WIDTH, 8, 2)
    x = gl.allocate_shared_memory(dtype, [STAGES, ROWS, WIDTH], x_layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scale = gl.allocate_shared_memory(gl.float32, [STAGES * 3, ROWS], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_x = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        # Every thread that copies arrives by itself.
        mbarrier.init(full_x.index(i), count=32 if PLAN.SOURCE == GIVEN else 1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    return Ring(w, x, scale, full, full_x, empty)


@gluon.jit
def _sizes_of(
    ids,
    places,
    num_tokens,
    num_experts,
    depth,
    num_columns,
    SPLITS: gl.constexpr,
    PLAN: gl.constexpr,
):
    """How much there is to do, known when choices have their slots; by four warps."""
    num_choices = num_tokens * ids.num_choices
    if PLAN.COUNT > 0:
        blocks = _sort_choices(ids, num_choices, num_experts, places, PLAN)
    else:
        blocks = gl.load(places.tables.num_used) // PLAN.ROWS
    tiles, steps = gl.cdiv(num_columns, PLAN.COLUMNS), gl.cdiv(depth, WIDTH)
    return Sizes(blocks * tiles * SPLITS, tiles, steps, depth, num_columns, num_choices)


@gluon.jit
def _wait_for_room(ring, count, PLAN: gl.constexpr):
    """Wait until the stage of step number `count` has been read."""
    stage = count % PLAN.STAGES
    mbarrier.wait(ring.empty.index(stage), ((count // PLAN.STAGES) & 1) ^ 1)


@gluon.jit
def _bring_step(w_desc, place, ring, count, PLAN: gl.constexpr):
    """Bring weights of step number `count`."""
    full = ring.full.index(count % PLAN.STAGES)
    mbarrier.expect(full, w_desc.block_type.nbytes)
    tma_load(w_desc, place, full, ring.w.index(count % PLAN.STAGES))


@gluon.jit
def _encode_step(value, scale, SOURCE: gl.constexpr, ENCODING: gl.constexpr):
    """A step of rows in 8 bits, and the scales of these rows; `scale` is what they bring along."""
    if SOURCE == PER_STEP:
        amax = gl.max(_magnitude_bits(value), axis=1)
        # Zeros are zeros under any scale; a division that meets a tiny number takes a long way.
        largest: gl.constexpr = (ENCODING.TARGET_EXPONENT << 23) + ENCODING.TARGET_MANTISSA
        scale = _scale_of_amax(gl.where(amax == 0, largest, amax), ENCODING)
    if SOURCE == STATIC:
        encoded = _encode(value, scale[:, None], ENCODING)
    else:
        encoded = _encode_own(value, scale[:, None], ENCODING)
    return encoded, scale


@gluon.jit
def _put_step(ring, count, encoded, scale, w_scale_0, w_scale_1, PLAN: gl.constexpr):
    """Put a step of rows, and scales, where they are waited for."""
    stage = count % PLAN.STAGES
    _wait_for_room(ring, count, PLAN)
    ring.x.index(stage).store(encoded)
    if PLAN.HAS_STEP_SCALE or PLAN.SOURCE == PER_ROW:
        ring.scale.index(stage * 3).store(scale)
    if PLAN.HAS_STEP_SCALE:
        ring.scale.index(stage * 3 + 1).store(w_scale_0)
        ring.scale.index(stage * 3 + 2).store(w_scale_1)
    mbarrier.arrive(ring.full_x.index(stage))


@gluon.jit
def _step_scales(ring, stage, layout: gl.constexpr):
    """What multiplies a step's products of both halves of the weights' rows."""
    scale = ring.scale.index(stage * 3).load(layout)
    first = scale * ring.scale.index(stage * 3 + 1).load(layout)
    return first[None, :], (scale * ring.scale.index(stage * 3 + 2).load(layout))[None, :]


@gluon.jit
def _product(w, x, zero):
    """``w @ x.T`` of a step."""
    # Rows were put there by threads, past which tensor cores read. Those threads do not wait for
    # it: they would for all of their loads.
    fence_async_shared()
    product = multiply(w, x.permute((1, 0)), zero, use_acc=False, is_async=True)
    return wait_for_product(0, deps=[product])


@gluon.jit
def _of_rows(ptr, row, num_rows):
    """A value for each weight row, a scale or a bias, as a column."""
    value = gl.load(ptr + row, mask=row < num_rows, other=0.0)
    return value.to(gl.float32)[:, None]
