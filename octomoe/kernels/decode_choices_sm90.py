"""Which choices the rows of a block are, for Hopper's kernels for few rows.

Where there are few choices, every program sorts them by itself, in shared memory: a launch less. It
compares all pairs. Otherwise a routing's tables say it. Blocks are `ROWS` slots of one expert, in
the order of experts.
"""

from typing import Any, Final, NamedTuple

from torch import Tensor

from octomoe.core.routing import Routing
from octomoe.kernels.build_routing import _load_experts
from octomoe.kernels.gluon_shim import gl, gluon, seen_as, synchronize

# Choices of which a program compares all pairs; more of them have a routing.
MOST_SORTED: Final = 128
# Choices that a program takes at once where it compares all pairs.
CHUNK = gl.constexpr(16)


class Tables(NamedTuple):
    """A routing: choices of slots, experts of blocks, slots in use; without one, never read."""

    choice: Tensor
    expert_of_block: Tensor
    num_used: Tensor


class Places(NamedTuple):
    """What a program looks up: experts and slots of choices in shared memory, or tables."""

    expert: Any
    slot: Any
    tables: Any


def tables_of(routed: tuple[Routing, Tensor] | None, ids: Tensor) -> Tables:
    """A routing and the experts of its blocks as kernels see them."""
    if routed is None:
        return Tables(ids, ids, ids)
    routing, expert_of_block = routed
    return Tables(routing.choice_of_slot_S, expert_of_block, routing.expert_offsets[-1:])


def sorted_inside(num_choices: int) -> int:
    """Choices that programs sort by themselves, up to a power of two."""
    return max(1 << (num_choices - 1).bit_length(), CHUNK.value)


@gluon.jit
def _flat(memory, COUNT: gl.constexpr):
    """All choices' values in shared memory, that lie there in chunks."""
    return seen_as(memory, gl.int32, [COUNT], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _sort_choices(ids, num_choices, num_experts, places, PLAN: gl.constexpr):
    """Give every choice a slot, by four warps; the number of blocks.

    In loops, since code that is not in a cache yet takes longer to come than to run.
    """
    COUNT: gl.constexpr = PLAN.COUNT
    ROWS: gl.constexpr = PLAN.ROWS
    layout: gl.constexpr = gl.BlockedLayout([1, CHUNK], [32, 1], [4, 1], [1, 0])
    others: gl.constexpr = gl.SliceLayout(0, layout)
    index = gl.arange(0, COUNT, layout=gl.SliceLayout(1, layout))
    expert = _load_experts(ids, index, num_choices, num_experts, PLAN.HAS_MAP)
    _flat(places.expert, COUNT).store(expert)
    # Choices of the same expert that come before.
    rank = index * 0
    for chunk in range(COUNT // CHUNK):
        other = chunk * CHUNK + gl.arange(0, CHUNK, layout=others)
        is_same = places.expert.index(chunk).load(others)[None, :] == expert[:, None]
        rank += gl.sum((is_same & (other[None, :] < index[:, None])).to(gl.int32), axis=1)
    _flat(places.slot, COUNT).store(rank)
    # First choices of the blocks before.
    block = index * 0
    for chunk in range(COUNT // CHUNK):
        its_expert = places.expert.index(chunk).load(others)
        its_rank = places.slot.index(chunk).load(others)
        is_first = (its_rank % ROWS == 0) & (its_expert < num_experts)
        is_before = (its_expert[None, :] == expert[:, None]) & (
            (its_rank // ROWS)[None, :] < (rank // ROWS)[:, None]
        )
        is_before = is_before | (its_expert[None, :] < expert[:, None])
        block += gl.sum((is_before & is_first[None, :]).to(gl.int32), axis=1)
    is_first = (rank % ROWS == 0) & (expert < num_experts)
    num_blocks = gl.sum(is_first.to(gl.int32), axis=0)
    slot = gl.where(expert < num_experts, block * ROWS + rank % ROWS, -1)
    _flat(places.slot, COUNT).store(slot)
    # Threads read the sum where `warp_specialize` puts what its parts get to know, with no barrier
    # between: whoever is late would read that.
    synchronize()
    return num_blocks


@gluon.jit
def _expert_of(block, places, PLAN: gl.constexpr):
    """The expert of a block."""
    if PLAN.COUNT > 0:
        WARPS: gl.constexpr = gl.num_warps()
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        slot = _flat(places.slot, PLAN.COUNT).load(layout)
        is_inside = (slot >= block * PLAN.ROWS) & (slot < block * PLAN.ROWS + PLAN.ROWS)
        expert = _flat(places.expert, PLAN.COUNT).load(layout)
        expert = gl.max(gl.where(is_inside, expert, 0), axis=0)
    else:
        expert = gl.load(places.tables.expert_of_block + block)
    return expert


@gluon.jit
def _choices_of(block, places, layout: gl.constexpr, PLAN: gl.constexpr):
    """The choices that are a block's rows ``[ROWS]``, -1 for a row of no token."""
    ROWS: gl.constexpr = PLAN.ROWS
    if PLAN.COUNT > 0:
        WARPS: gl.constexpr = gl.num_warps()
        pairs: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [1, WARPS], [1, 0])
        row = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(0, pairs))
        index = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, pairs))
        choice = row * 0 - 1
        for chunk in range(PLAN.COUNT // CHUNK):
            slot = places.slot.index(chunk).load(gl.SliceLayout(1, pairs))
            mine = gl.where(slot[:, None] == row[None, :], (chunk * CHUNK + index)[:, None], -1)
            choice = gl.maximum(choice, gl.max(mine, axis=0))
        choice = gl.convert_layout(choice, layout)
    else:
        row = gl.arange(0, ROWS, layout=layout)
        choice = gl.load(places.tables.choice + block * ROWS + row)
    return choice


@gluon.jit
def _allocate_places(tables, PLAN: gl.constexpr):
    """Where to put what is known about choices."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shape: gl.constexpr = [max(PLAN.COUNT // CHUNK, 1), CHUNK]
    expert = gl.allocate_shared_memory(gl.int32, shape, plain)
    return Places(expert, gl.allocate_shared_memory(gl.int32, shape, plain), tables)
