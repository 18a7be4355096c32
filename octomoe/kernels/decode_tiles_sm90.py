"""What both halves of Hopper's kernels for few rows share: values, the ring, rows on their way in.

A persistent program is four warps that multiply, a warp that brings weights by TMA, and four that
bring rows and encode them, or one that copies encoded ones, meeting in a ring in shared memory.
Weight rows take the side of the tensor core's tile that has 64 at least.

Code is short, and in loops: between two layers of a model it leaves the caches, and comes back more
slowly than it runs.
"""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from octomoe.core.formats import Format
from octomoe.core.qtensor import QTensor
from octomoe.kernels.chain import chain_arguments
from octomoe.kernels.decode_choices_sm90 import _sort_choices
from octomoe.kernels.decode_pieces_sm90 import (
    _encode_blocks,
    _encode_halves,
    _scaled_sum,
    _sum_of_blocks,
    _whole,
)
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
from octomoe.kernels.tiles_sm90 import Scales

WIDTH = gl.constexpr(STEP)
# How rows are brought: as they are, or encoded under a scale of each step's own, of the whole row's
# own, or under one that is given; bf16 in halves, MXFP8 in blocks.
GIVEN, PER_STEP, PER_ROW, STATIC, HALVES, IN_BLOCKS = (gl.constexpr(i) for i in range(6))
_REGISTERS: Final = 65536


class Plan(NamedTuple):
    """What is known about a problem when its kernel is compiled.

    Weights of `GROUP` steps are asked for together. A tile takes one of `SPLITS` parts of the depth
    of w13, of `DOWN_SPLITS` of that of w2. `COUNT` choices are sorted inside (0: a routing's tables
    say where they are). `SOURCE` says how rows are brought, in `PIECES` rows each.
    Scales of weights change by the step, or multiply sums; each serves `SCALE_ROWS` rows (0: all).
    """

    ROWS: int
    COLUMNS: int
    STAGES: int
    GROUP: int
    SPLITS: int
    DOWN_SPLITS: int
    COUNT: int
    HAS_MAP: bool
    SOURCE: int
    PIECES: int
    HAS_STEP_SCALE: bool
    HAS_LATE_SCALE: bool
    SCALE_ROWS: int
    HAS_BIAS: bool


class Ring(NamedTuple):
    """Stages in shared memory, and barriers: weights are there, rows are there, all are read.

    Of a stage's three rows of scales one is x's, two are those of halves of the weights' rows.
    Weights with a scale for each block of 32 have `words` instead.
    """

    w: Any
    x: Any
    scale: Any
    words: Any
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


def source_of(x: Tensor | QTensor, format: Format | None, is_static: bool) -> int:
    """How rows that are to be of `format` are brought."""
    if isinstance(x, QTensor):
        return GIVEN.value
    if format is None:
        return HALVES.value
    if format.scale_dtype == torch.float8_e8m0fnu:
        return IN_BLOCKS.value
    if has_steps(format):
        return PER_STEP.value
    return STATIC.value if is_static else PER_ROW.value


def pieces_of(source: int) -> int:
    """Rows that a row becomes."""
    return {HALVES.value: 2, IN_BLOCKS.value: 4}.get(source, 1)


def block_scales(w: QTensor, bias: Tensor | None) -> Scales:
    """Scales of blocks of 32 as kernels see them: those of a row and a step are one int32."""
    words = w.scale.view(torch.uint8).view(torch.int32)
    expert, row, step = words.stride()
    return Scales(words, expert, row, step, words if bias is None else bias)


def launch_of(num_warps: int, resident: int) -> dict[str, Any]:
    """How a program of `num_warps` in all is launched, and its registers until roles are taken.

    A multiprocessor is to hold `resident` of them.
    """
    num_registers = min(_REGISTERS // (32 * num_warps * resident) // 8 * 8, 168)
    return {"num_warps": 4, "maxnreg": num_registers} | chain_arguments(True)


@gluon.jit
def _allocate_ring(w_desc, PLAN: gl.constexpr):
    """A ring whose stages are empty."""
    ROWS: gl.constexpr = PLAN.ROWS * PLAN.PIECES
    STAGES: gl.constexpr = PLAN.STAGES
    dtype: gl.constexpr = w_desc.dtype
    w_shape: gl.constexpr = [STAGES] + w_desc.block_type.shape  # noqa: RUF005
    w = gl.allocate_shared_memory(dtype, w_shape, w_desc.layout)
    x_layout: gl.constexpr = gl.NVMMASharedLayout(WIDTH, 8, 2)
    x = gl.allocate_shared_memory(dtype, [STAGES, ROWS, WIDTH], x_layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # Blocks of a row have scales of their own.
    SCALES: gl.constexpr = ROWS if PLAN.SOURCE == IN_BLOCKS else PLAN.ROWS
    scale = gl.allocate_shared_memory(gl.float32, [STAGES * 3, SCALES], plain)
    words = scale
    if PLAN.SOURCE == IN_BLOCKS:
        WEIGHT_ROWS: gl.constexpr = w_desc.block_type.nbytes // WIDTH
        words = gl.allocate_shared_memory(gl.int32, [STAGES, WEIGHT_ROWS], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_x = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        # Every thread that copies arrives by itself.
        mbarrier.init(full_x.index(i), count=32 if PLAN.SOURCE == GIVEN else 1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    return Ring(w, x, scale, words, full, full_x, empty)


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
def _locate(number, sizes, SPLITS: gl.constexpr):
    """Block, tile, first and last step of a tile's number."""
    split = number % SPLITS
    first, last = sizes.steps * split // SPLITS, sizes.steps * (split + 1) // SPLITS
    return number // SPLITS // sizes.tiles, number // SPLITS % sizes.tiles, first, last


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
def _weight_scales(ptrs_0, ptrs_1, offset, PLAN: gl.constexpr):
    """What is put beside a step of rows: scales of both halves of its weights, or all words."""
    if PLAN.SOURCE == IN_BLOCKS:
        first = gl.load(ptrs_0 + offset)
        second = first
    elif PLAN.HAS_STEP_SCALE:
        first = gl.load(ptrs_0 + offset)
        second = gl.load(ptrs_1 + offset)
    else:
        first = gl.full(ptrs_0.shape, 1.0, gl.float32, ptrs_0.type.layout)
        second = first
    return first, second


@gluon.jit
def _encode_step(value, scale, SOURCE: gl.constexpr, ENCODING: gl.constexpr):
    """A step of rows in 8 bits, and the scales of these rows; `scale` is what they bring along."""
    if SOURCE == HALVES:
        encoded, scale = _encode_halves(value)
    elif SOURCE == IN_BLOCKS:
        encoded, scale = _encode_blocks(value, ENCODING)
    else:
        encoded, scale = _encode_whole(value, scale, SOURCE, ENCODING)
    return encoded, scale


@gluon.jit
def _encode_whole(value, scale, SOURCE: gl.constexpr, ENCODING: gl.constexpr):
    """The same for rows of one piece."""
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
    if PLAN.HAS_STEP_SCALE or PLAN.PIECES > 1 or PLAN.SOURCE == PER_ROW:
        ring.scale.index(stage * 3).store(scale)
    if PLAN.SOURCE == IN_BLOCKS:
        ring.words.index(stage).store(w_scale_0)
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
def _product(w, ring, stage, zero, PLAN: gl.constexpr):
    """``w @ x.T`` of a step, ``[weight rows, rows]``; where scales are blocks', scaled."""
    # Rows were put there by threads, past which tensor cores read. Those threads do not wait for
    # it: they would for all of their loads.
    fence_async_shared()
    x = ring.x.index(stage).permute((1, 0))
    product = multiply(w, x, zero, use_acc=False, is_async=True)
    product = wait_for_product(0, deps=[product])
    return _of_pieces(product, ring, stage, PLAN)


@gluon.jit
def _unscaled(product, PLAN: gl.constexpr):
    """A product whose rows are whole again."""
    if PLAN.SOURCE == HALVES:
        product = _whole(product, PLAN.ROWS)
    if PLAN.SOURCE == IN_BLOCKS:
        product = _sum_of_blocks(product, PLAN.ROWS)
    return product


@gluon.jit
def _of_pieces(product, ring, stage, PLAN: gl.constexpr):
    """The same; where scales are blocks', times these."""
    if PLAN.SOURCE == IN_BLOCKS:
        scale = ring.scale.index(stage * 3).load(gl.SliceLayout(0, product.type.layout))
        words = ring.words.index(stage).load(gl.SliceLayout(1, product.type.layout))
        product = _scaled_sum(product, scale, words, PLAN.ROWS)
    else:
        product = _unscaled(product, PLAN)
    return product


@gluon.jit
def _of_rows(ptr, row, num_rows):
    """A value for each weight row, a scale or a bias, as a column."""
    value = gl.load(ptr + row, mask=row < num_rows, other=0.0)
    return value.to(gl.float32)[:, None]
