"""What Hopper's kernels for many rows share: values, the order of tiles, how products are added."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from octomoe.core.device import num_sms
from octomoe.core.experts import Weight
from octomoe.core.formats import ALL, Format
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.chain import chain_arguments
from octomoe.kernels.expert_tiles import STEP, has_steps, row_scale, scale_rows, weight_scale
from octomoe.kernels.fused_moe import has_steps_only
from octomoe.kernels.gluon_shim import (
    TensorDescriptor,
    gl,
    gluon,
    multiply,
    seen_as,
    wait_for_product,
)
from octomoe.tune.configs import PrefillConfig


class Rows(NamedTuple):
    """Quantised rows: bytes, scales, and what lies between neighbours."""

    data: Tensor
    stride_row: int
    scale: Tensor
    scale_stride_row: int
    scale_stride_step: int


class Scales(NamedTuple):
    """Scales of weights, what lies between those of experts, rows and steps, and biases."""

    scale: Tensor
    stride_expert: int
    stride_row: int
    stride_step: int
    bias: Tensor


class Slots(NamedTuple):
    """A routing: choices of slots, experts of blocks, slots in use."""

    choice: Tensor
    expert_of_block: Tensor
    num_used: Tensor
    num_choices: int


class Sizes(NamedTuple):
    """Blocks of slots and tiles of columns; steps of the depth, the depth, and columns."""

    blocks: Any
    tiles: Any
    steps: Any
    depth: Any
    columns: Any


class Plan(NamedTuple):
    """What is known about a problem when its kernel is compiled.

    A scale of weights serves `SCALE_ROWS` rows (0: all).
    """

    ROWS: int
    STAGES: int
    GROUP: int
    HAS_STEP_SCALE: bool
    SCALE_ROWS: int
    HAS_BIAS: bool
    IS_DIVISIBLE: bool


def rows_of(x: Tensor | QTensor) -> Rows:
    """Rows as kernels see them; without scales, these are never read."""
    data = x.data if isinstance(x, QTensor) else x
    return Rows(data, data.stride(0), *row_scale(x))


def scales_of(w: QTensor, bias: Tensor | None) -> Scales:
    """Scales of ``w [E, rows, depth]`` and biases as kernels see them."""
    return Scales(*weight_scale(w), w.scale if bias is None else bias)


def slots_of(routing: Routing, expert_of_block: Tensor) -> Slots:
    """A routing as kernels see it."""
    num_used = routing.expert_offsets[-1:]
    return Slots(routing.choice_of_slot_S, expert_of_block, num_used, routing.num_choices)


def plan_of(w: QTensor, bias: Tensor | None, rows: int, num_stages: int, group: int) -> Plan:
    """How to run with these weights."""
    return Plan(
        rows,
        num_stages,
        group,
        has_steps(w.format),
        scale_rows(w),
        bias is not None,
        w.shape[1] % (2 * STEP) == 0,
    )


def is_known(format: Format) -> bool:
    """Whether it is E4M3 with float32 scales."""
    return format.element.dtype == torch.float8_e4m3fn and format.scale_dtype == torch.float32


def has_tiles(w: Weight, steps: bool) -> bool:
    """Whether w is E4M3, by TMA, under float32 scales of 128 x 128, without `steps` of rows."""
    if not has_steps_only(w) or not isinstance(w, QTensor) or not is_known(w.format):
        return False
    return w.data.data_ptr() % 16 == 0 and w.format.block[1] in ((STEP,) if steps else (1, ALL))


def bytes_by_tma(data: Tensor, box: list[int]) -> TensorDescriptor:
    """Tiles of 8-bit matrices, whose last axis is a step."""
    return TensorDescriptor.from_tensor(data, box, gl.NVMMASharedLayout(STEP, 8, len(box)))


def grid_of(config: PrefillConfig, routing: Routing, num_tiles: int) -> tuple[int]:
    """Programs that fill the device, or as many as there can be tiles."""
    device = routing.expert_offsets.device
    num_blocks = routing.num_slots // config.rows
    return (min(config.resident * num_sms(device), num_blocks * num_tiles),)


def launch_of(config: PrefillConfig) -> dict[str, Any]:
    """Warps of a group that multiplies, and registers of a thread until roles are taken."""
    num_registers = 168 if config.rows == 128 else 128
    options = {"num_warps": 4, "maxnreg": num_registers, "enable_fp_fusion": True}
    return options | chain_arguments(config.is_chained)


@gluon.jit
def _tile_of(number, num_blocks, num_columns, GROUP: gl.constexpr):
    """Block of slots and block of columns of a tile.

    `GROUP` blocks of slots take turns over all columns, so that what they share stays in L2.
    """
    first = number // (GROUP * num_columns) * GROUP
    size = gl.minimum(num_blocks - first, GROUP)
    rest = number % (GROUP * num_columns)
    return first + rest % size, rest // size


@gluon.jit
def _product(x, w, zero):
    """``x @ w.T`` of a step, of which one is under way at a time."""
    product = multiply(x, w.permute((1, 0)), zero, use_acc=False, is_async=True)
    return wait_for_product(0, deps=[product])


@gluon.jit
def _matrix(w, ROWS: gl.constexpr):
    """A step of an expert's weights ``[1, ROWS, STEP]`` in shared memory, as a matrix."""
    depth: gl.constexpr = w.shape[2]
    return seen_as(w, w.dtype, [ROWS, depth], gl.NVMMASharedLayout(depth, 8, 2))


@gluon.jit
def _promote(part, scale, total):
    """``total + part * scale``, here and now.

    Left alone, LLVM moves all of them behind the next product, two of which then fill the
    registers; it does not move what is volatile.
    """
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;",
        "=f,f,f,f",
        [part, scale, total],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _of_columns(ptr, column, num_columns, IS_DIVISIBLE: gl.constexpr):
    """A value for each column, a scale or a bias, as a row.

    Volatile, or all that a tile needs would be loaded at once, and fill the registers.
    """
    if IS_DIVISIBLE:
        value = gl.load(ptr + column, volatile=True)
    else:
        value = gl.load(ptr + column, mask=column < num_columns, other=0.0, volatile=True)
    return value.to(gl.float32)[None, :]


@gluon.jit
def _row_scale(x_scale_ptrs, w_scale_ptr, PLAN: gl.constexpr):
    """Of each row, as a column: its scale, times that of the weights where they have one for all.

    It is loaded before there is a product.
    """
    scale = gl.load(x_scale_ptrs)
    if PLAN.SCALE_ROWS == 0:
        scale = scale * gl.load(w_scale_ptr)
    return scale[:, None]


@gluon.jit
def _late_scale(x_scale, w_scale_ptr, column, num_columns, PLAN: gl.constexpr):
    """What multiplies a finished product, where scales do not change by the step.

    `x_scale`: of rows, `_row_scale`.
    """
    scale = x_scale
    if PLAN.SCALE_ROWS > 0:
        scale = x_scale * _of_columns(w_scale_ptr, column, num_columns, PLAN.IS_DIVISIBLE)
    return scale
