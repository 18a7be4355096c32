"""What Hopper's kernels for bf16 rows and 8-bit weights share: weights become bf16 in registers.

A tile is 128 rows of one or of two matrices of weights times 64 or 128 slots, so that weights are
the operand that tensor cores take from registers; a group of four warps has 64 rows of each. A byte
in a register has three neighbours along the depth, whose partners in the operand lie elsewhere:
rows of x and h are stored in the order in which weights arrive (`place_of`).
"""

from typing import Any, NamedTuple

from torch import Tensor

from octomoe.core.device import num_sms
from octomoe.core.formats import E5M2, MXFP8
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.chain import chain_arguments
from octomoe.kernels.expert_tiles import STEP, has_steps, scale_rows, weight_scale
from octomoe.kernels.gluon_shim import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    multiply,
    seen_as,
    wait_for_product,
)
from octomoe.kernels.layouts import as_bytes
from octomoe.kernels.tiles_sm90 import _promote
from octomoe.tune.configs import PrefillConfig

WIDTH = gl.constexpr(STEP)
# Rows of weights that a group of warps has of a matrix.
GROUP_ROWS = gl.constexpr(64)
# Of the depth, under one E8M0 scale.
MX = gl.constexpr(MXFP8.block[2])


# PTX: two pairs of fp16 from four bytes, bf16 by way of float32, a scale.
_BEGIN = gl.constexpr("""{
.reg .b16 l, h, a, b, c, d;
.reg .b32 u, v;
.reg .f32 p, q, r, s;
""")
_HALVES_OF_E4M3 = gl.constexpr("""mov.b32 {l, h}, $2;
cvt.rn.f16x2.e4m3x2 u, l;
cvt.rn.f16x2.e4m3x2 v, h;
""")
_HALVES_OF_E5M2 = gl.constexpr("""prmt.b32 u, $2, 0, 0x1404;
prmt.b32 v, $2, 0, 0x3424;
""")
_FLOATS = gl.constexpr("""mov.b32 {a, b}, u;
mov.b32 {c, d}, v;
cvt.f32.f16 p, a;
cvt.f32.f16 q, b;
cvt.f32.f16 r, c;
cvt.f32.f16 s, d;
cvt.rn.bf16x2.f32 $0, q, p;
cvt.rn.bf16x2.f32 $1, s, r;
""")
_TIMES = gl.constexpr("""mul.rn.bf16x2 $0, $0, $3;
mul.rn.bf16x2 $1, $1, $4;
""")


class Scales(NamedTuple):
    """Scales of weights, what lies between those of experts, rows and blocks of the depth, how many
    of these there are, and biases.
    """

    scale: Tensor
    stride_expert: int
    stride_row: int
    stride_block: int
    num_blocks: int
    bias: Tensor


class Plan(NamedTuple):
    """What is known about a problem when its kernel is compiled.

    A tile has `ROWS` slots, a product `PIECE` of them, and rows of `STRIPS` matrices.

    Scales change within a step of the depth (`IS_E8M0`; `HAS_WORDS`: those of a step are a word in
    memory), by the step, or not at all; one serves `SCALE_ROWS` rows of weights (0: all).
    """

    ROWS: int
    PIECE: int
    STAGES: int
    GROUP: int
    STRIPS: int
    IS_E5M2: bool
    IS_E8M0: bool
    HAS_WORDS: bool
    HAS_STEP_SCALE: bool
    SCALE_ROWS: int
    HAS_BIAS: bool


class Ring(NamedTuple):
    """Stages in shared memory, barriers (which are full, which are empty), and a place to store
    from.
    """

    rows: Any
    weights: Any
    full: Any
    empty: Any
    out: Any


def scales_of(w: QTensor, bias: Tensor | None) -> Scales:
    """Scales of ``w [E, rows, depth]`` and biases as kernels see them."""
    scale, stride_expert, stride_row, stride_block = weight_scale(w)
    num_blocks = w.format.scale_shape(w.shape)[-1]
    bias = w.data if bias is None else bias
    return Scales(as_bytes(scale), stride_expert, stride_row, stride_block, num_blocks, bias)


def plan_of(
    w: QTensor, bias: Tensor | None, rows: int, num_stages: int, group: int, strips: int
) -> Plan:
    """How to run with these weights."""
    is_e8m0 = w.format.block[2] == MX.value
    return Plan(
        rows,
        64 if has_steps(w.format) else rows,
        num_stages,
        group,
        strips,
        w.format.element == E5M2,
        is_e8m0,
        is_e8m0 and has_words(w),
        has_steps(w.format),
        scale_rows(w),
        bias is not None,
    )


def has_words(w: QTensor) -> bool:
    """Whether four scales of a byte, of a step of the depth, are an aligned word."""
    _, _, stride_row, stride_block = weight_scale(w)
    places = (w.scale.data_ptr(), w.scale.stride(0), stride_row)
    return stride_block == 1 and all(place % 4 == 0 for place in places)


def grid_of(routing: Routing, config: PrefillConfig, num_tiles: int) -> tuple[int]:
    """A program per multiprocessor, or as many as there can be tiles."""
    num_blocks = routing.num_slots // config.rows
    return (min(num_sms(routing.expert_offsets.device), num_blocks * num_tiles),)


def launch_of(config: PrefillConfig) -> dict[str, Any]:
    """Warps of a group that multiplies, and registers of a thread until roles are taken."""
    options = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
    return options | chain_arguments(config.is_chained)


@gluon.jit
def _as_bf16(w, scale, IS_E5M2: gl.constexpr):
    """8-bit floats exactly in bf16, four neighbours at a time; times a scale, if there is one."""
    HALVES: gl.constexpr = _HALVES_OF_E5M2 if IS_E5M2 else _HALVES_OF_E4M3
    if scale is None:
        value = gl.inline_asm_elementwise(
            _BEGIN + HALVES + _FLOATS + "}",
            "=r,=r,r",
            [w],
            dtype=gl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        value = gl.inline_asm_elementwise(
            _BEGIN + HALVES + _FLOATS + _TIMES + "}",
            "=r,=r,r,r,r",
            [w, scale],
            dtype=gl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return value


@gluon.jit
def _operand(w, scale, PLAN: gl.constexpr):
    """64 rows of weights as the operand of a product in bf16, neighbours along the depth apart.

    `w`: bytes ``[64, 4, 32]`` as `_bytes` has them; `scale`: ``[64, 4, 1]`` in bf16, or none.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.PIECE, 16])
    layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    value = _as_bf16(w, scale, PLAN.IS_E5M2).reshape([GROUP_ROWS, WIDTH // 16, 4, 2, 2])
    value = value.permute((0, 1, 3, 2, 4)).reshape([GROUP_ROWS, WIDTH])
    return gl.convert_layout(value, layout, assert_trivial=True)


@gluon.jit
def _bytes(ring, stage, STRIP: gl.constexpr, NUMBER: gl.constexpr, PLAN: gl.constexpr):
    """64 rows of a matrix of a stage, ``[64, 4, 32]``: four neighbours in a register."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.PIECE, 32])
    layout: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    w = ring.weights.index(stage * PLAN.STRIPS + STRIP)
    w = seen_as(w, gl.uint8, [WIDTH, WIDTH], gl.NVMMASharedLayout(WIDTH, 8, 2))
    w = w.slice(NUMBER * GROUP_ROWS, GROUP_ROWS, dim=0).load(layout)
    return w.reshape([GROUP_ROWS, WIDTH // MX, MX])


@gluon.jit
def _row_of(place, IS_SPREAD: gl.constexpr):
    """Which row of weights lies at a place of a tile: in order, or as `_operand` has a depth."""
    row = place
    if IS_SPREAD:
        row = place // 16 * 16 + place // 2 % 4 * 4 + place // 8 % 2 * 2 + place % 2
    return row


@gluon.jit
def _scale_offset(first_row, num_rows, w, layout: gl.constexpr, IS_SPREAD: gl.constexpr, PLAN):
    """Where scales of 64 rows of weights lie in those of an expert; past the last row, its own."""
    SCALE_ROWS: gl.constexpr = PLAN.SCALE_ROWS
    place = gl.arange(0, GROUP_ROWS, layout=layout)
    row = gl.minimum(first_row + _row_of(place, IS_SPREAD), num_rows - 1)
    if SCALE_ROWS == 0:
        offset = row * 0
    else:
        offset = row // SCALE_ROWS * w.stride_row
    return offset


@gluon.jit
def _load_words(ptr, offset, step, w, PLAN: gl.constexpr):
    """The four E8M0 scales that each of 64 rows has in a step, in a word."""
    if PLAN.HAS_WORDS:
        word = gl.load((ptr + (offset + step * 4)).to(gl.pointer_type(gl.int32)))
    else:
        layout: gl.constexpr = offset.type.layout.parent
        part = gl.arange(0, 4, layout=gl.SliceLayout(0, layout))
        block = step * 4 + part
        offset = offset[:, None] + (block * w.stride_block)[None, :]
        byte = gl.load(ptr + offset, mask=(block < w.num_blocks)[None, :], other=0)
        word = gl.sum(byte.to(gl.int32) << (part * 8)[None, :], axis=1)
    return word


@gluon.jit
def _in_bf16(word):
    """E8M0 scales of 64 rows, from a word each, ``[64, 4, 1]`` in bf16."""
    layout: gl.constexpr = word.type.layout.parent
    shift = gl.arange(0, 4, layout=gl.SliceLayout(0, layout)) * 8
    byte = (word[:, None] >> shift[None, :]) & 0xFF
    # 2^-127 is subnormal.
    bits = gl.where(byte == 0, 0x40, byte << 7)
    bits = gl.where(byte == 0xFF, 0x7FC0, bits)
    return bits.to(gl.int16).to(gl.bfloat16, bitcast=True)[:, :, None]


@gluon.jit
def _multiply_tile(
    ring,
    first_count,
    num_steps,
    expert_ptr,
    first_row_0,
    first_row_1,
    end_0,
    end_1,
    w,
    NUMBER: gl.constexpr,
    IS_SPREAD: gl.constexpr,
    PLAN: gl.constexpr,
):
    """Sums over the depth of 64 rows of each matrix, ``[64, slots]`` float32.

    `first_row_*`, `end_*`: which rows of weights the 64 are, and where the last one is.
    """
    scale_ptr = w.scale
    if PLAN.HAS_STEP_SCALE or PLAN.IS_E8M0:
        scale_ptr += gl.load(expert_ptr).to(gl.int64) * w.stride_expert
    if PLAN.HAS_STEP_SCALE:
        mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.PIECE, 16])
        layout: gl.constexpr = gl.SliceLayout(1, mma)
        first, second = _sum_steps(
            ring,
            first_count,
            num_steps,
            scale_ptr,
            _scale_offset(first_row_0, end_0, w, layout, IS_SPREAD, PLAN),
            _scale_offset(first_row_1, end_1, w, layout, IS_SPREAD, PLAN),
            w,
            NUMBER,
            PLAN,
        )
    else:
        # Scales within a step lie where the bytes are that they multiply.
        dot: gl.constexpr = gl.DotOperandLayout(
            0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.PIECE, 32]), 4
        )
        bytes = gl.zeros([GROUP_ROWS, WIDTH], gl.uint8, dot).reshape([GROUP_ROWS, 4, MX])
        places: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, bytes.type.layout))
        first, second = _sum(
            ring,
            first_count,
            num_steps,
            scale_ptr,
            _scale_offset(first_row_0, end_0, w, places, IS_SPREAD, PLAN),
            _scale_offset(first_row_1, end_1, w, places, IS_SPREAD, PLAN),
            w,
            NUMBER,
            PLAN,
        )
    return first, second


@gluon.jit
def _sum(
    ring,
    first_count,
    num_steps,
    scale_ptr,
    offset_0,
    offset_1,
    w,
    NUMBER: gl.constexpr,
    PLAN: gl.constexpr,
):
    """Sums where weights take their scales with them, if these change along the depth."""
    ROWS: gl.constexpr = PLAN.ROWS
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    first = gl.zeros([GROUP_ROWS, ROWS], gl.float32, mma)
    second = first
    if PLAN.IS_E8M0:
        # Scales of a step are loaded during the one before.
        next_0 = _load_words(scale_ptr, offset_0, 0, w, PLAN)
        next_1 = _load_words(scale_ptr, offset_1, 0, w, PLAN)
    for step in range(num_steps):
        stage = (first_count + step) % PLAN.STAGES
        phase = ((first_count + step) // PLAN.STAGES) & 1
        if PLAN.IS_E8M0:
            word_0 = next_0
            word_1 = next_1
            ahead = gl.minimum(step + 1, num_steps - 1)
            next_0 = _load_words(scale_ptr, offset_0, ahead, w, PLAN)
            next_1 = _load_words(scale_ptr, offset_1, ahead, w, PLAN)
        mbarrier.wait(ring.full.index(stage), phase)
        # The rows were not brought by TMA.
        fence_async_shared()
        rows = ring.rows.index(stage).permute((1, 0))
        if PLAN.IS_E8M0:
            operand = _operand(_bytes(ring, stage, 0, NUMBER, PLAN), _in_bf16(word_0), PLAN)
        else:
            operand = _operand(_bytes(ring, stage, 0, NUMBER, PLAN), None, PLAN)
        first = multiply(operand, rows, first, is_async=True)
        if PLAN.STRIPS == 2:
            # The second operand is made while the first is multiplied.
            if PLAN.IS_E8M0:
                operand = _operand(_bytes(ring, stage, 1, NUMBER, PLAN), _in_bf16(word_1), PLAN)
            else:
                operand = _operand(_bytes(ring, stage, 1, NUMBER, PLAN), None, PLAN)
            second = multiply(operand, rows, second, is_async=True)
            first, second = wait_for_product(0, deps=[first, second])
        else:
            first = wait_for_product(0, deps=[first])
        mbarrier.arrive(ring.empty.index(stage))
    return first, second


@gluon.jit
def _sum_steps(
    ring,
    first_count,
    num_steps,
    scale_ptr,
    offset_0,
    offset_1,
    w,
    NUMBER: gl.constexpr,
    PLAN: gl.constexpr,
):
    """Sums where scales change by the step: they multiply its product, of 64 slots at a time."""
    PIECE: gl.constexpr = PLAN.PIECE
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    zero = gl.zeros([GROUP_ROWS, PIECE], gl.float32, mma)
    left_0 = zero
    right_0 = zero
    left_1 = zero
    right_1 = zero
    next_0 = gl.load(scale_ptr + offset_0)
    next_1 = gl.load(scale_ptr + offset_1)
    for step in range(num_steps):
        stage = (first_count + step) % PLAN.STAGES
        phase = ((first_count + step) // PLAN.STAGES) & 1
        scale_0 = next_0[:, None]
        scale_1 = next_1[:, None]
        ahead = gl.minimum(step + 1, num_steps - 1) * w.stride_block
        next_0 = gl.load(scale_ptr + (offset_0 + ahead))
        next_1 = gl.load(scale_ptr + (offset_1 + ahead))
        mbarrier.wait(ring.full.index(stage), phase)
        fence_async_shared()
        rows = ring.rows.index(stage)
        operand = _operand(_bytes(ring, stage, 0, NUMBER, PLAN), None, PLAN)
        left_0 = _add_product(operand, rows.slice(0, PIECE, dim=0), scale_0, left_0, zero)
        if PLAN.ROWS > PIECE:
            # A wait between products: the registers of one of them serve all.
            mbarrier.wait(ring.full.index(stage), phase)
            right_0 = _add_product(operand, rows.slice(PIECE, PIECE, dim=0), scale_0, right_0, zero)
        if PLAN.STRIPS == 2:
            mbarrier.wait(ring.full.index(stage), phase)
            operand = _operand(_bytes(ring, stage, 1, NUMBER, PLAN), None, PLAN)
            left_1 = _add_product(operand, rows.slice(0, PIECE, dim=0), scale_1, left_1, zero)
            if PLAN.ROWS > PIECE:
                mbarrier.wait(ring.full.index(stage), phase)
                right_1 = _add_product(
                    operand, rows.slice(PIECE, PIECE, dim=0), scale_1, right_1, zero
                )
        mbarrier.arrive(ring.empty.index(stage))
    return _joined(left_0, right_0, PLAN), _joined(left_1, right_1, PLAN)


@gluon.jit
def _add_product(operand, rows, scale, total, zero):
    """``total + operand @ rows.T * scale``."""
    product = multiply(operand, rows.permute((1, 0)), zero, use_acc=False, is_async=True)
    return _promote(wait_for_product(0, deps=[product]), scale, total)


@gluon.jit
def _joined(left, right, PLAN: gl.constexpr):
    """Sums of a tile, of which there are one or two pieces."""
    total = left
    if PLAN.ROWS > PLAN.PIECE:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.ROWS, 16])
        total = gl.join(left, right).permute((0, 2, 1)).reshape([GROUP_ROWS, PLAN.ROWS])
        total = gl.convert_layout(total, layout, assert_trivial=True)
    return total


@gluon.jit
def _finished(
    product,
    expert_ptr,
    first_row,
    end,
    num_rows,
    w,
    IS_SPREAD: gl.constexpr,
    PLAN: gl.constexpr,
):
    """Scale a product, where scales do not change along the depth, and add biases.

    An expert has `num_rows` of weights. What is loaded is volatile, or it would be loaded while the
    tile is multiplied, and fill the registers.
    """
    layout: gl.constexpr = gl.SliceLayout(1, product.type.layout)
    if not PLAN.IS_E8M0 and not PLAN.HAS_STEP_SCALE:
        scale_ptr = w.scale + gl.load(expert_ptr, volatile=True).to(gl.int64) * w.stride_expert
        offset = _scale_offset(first_row, end, w, layout, IS_SPREAD, PLAN)
        scale = gl.load(scale_ptr + offset, volatile=True)[:, None]
        product = _promote(product, scale, 0.0)
    if PLAN.HAS_BIAS:
        bias_ptr = w.bias + gl.load(expert_ptr, volatile=True).to(gl.int64) * num_rows
        place = gl.arange(0, GROUP_ROWS, layout=layout)
        row = gl.minimum(first_row + _row_of(place, IS_SPREAD), end - 1)
        bias = gl.load(bias_ptr + row, volatile=True).to(gl.float32)[:, None]
        product = _promote(bias, 1.0, product)
    return product
