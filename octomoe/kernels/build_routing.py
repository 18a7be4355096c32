"""Build a routing: ``slot(choice) = offset(expert) + choices of that expert before it``.

Bound by latency: a decoding step is one launch, a long prompt three. Choices before a choice in
its own block are counted by comparing all pairs of the block, those in earlier blocks by adding up
histograms; nothing is added atomically, so that the order is stable and every run the same.

One launch: every program makes the histogram of all choices, which is cheap while they are few.
Three launches: histograms of blocks, their sums along the blocks, slots. They need memory for
blocks x experts counts; a block has at least half as many choices as there are experts, so that
this is no more than the two maps. On NVIDIA since Hopper each is launched before the one in front
of it ends, and waits for that one's results where it needs them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe.core.device import target_of
from octomoe.core.routing import Routing, slot_capacity
from octomoe.kernels.chain import _start_dependents, _wait_for_predecessor, chain_arguments
from octomoe.tune.configs import RoutingConfig
from octomoe.tune.lookup import routing_config


class Ids(NamedTuple):
    """Experts of choices as they come, and the local ids of these; without a map, never read."""

    ids: Tensor
    num_choices: int
    stride_row: int
    stride_column: int
    expert_map: Tensor
    stride_map: int
    num_global: int

    @property
    def has_map(self) -> bool:
        return self.expert_map is not self.ids


def ids_of(topk_ids: Tensor, expert_map: Tensor | None, num_experts: int) -> Ids:
    """Ids ``[T, A]`` as kernels see them."""
    stride_row, stride_column = topk_ids.stride()
    start = (topk_ids, topk_ids.shape[1], stride_row, stride_column)
    if expert_map is None:
        return Ids(*start, topk_ids, 0, num_experts)
    return Ids(*start, expert_map, expert_map.stride(0), expert_map.shape[0])


@triton.jit
def _load_experts(ids, choice, num_choices, num_experts, HAS_MAP: tl.constexpr):
    """Local expert of each choice as int32, `num_experts` where there is none."""
    offset = choice // ids.num_choices * ids.stride_row
    offset += choice % ids.num_choices * ids.stride_column
    expert = tl.load(ids.ids + offset, mask=choice < num_choices, other=-1)
    if HAS_MAP:
        is_global = (expert >= 0) & (expert < ids.num_global)
        # An id that is no expert's may be too large for an address.
        offset = tl.where(is_global, expert, 0).to(tl.int64) * ids.stride_map
        expert = tl.load(ids.expert_map + offset, mask=is_global, other=-1)
    is_local = (expert >= 0) & (expert < num_experts)
    return tl.where(is_local, expert, num_experts).to(tl.int32)


@triton.jit
def _rank(expert, CHOICES: tl.constexpr):
    """How many choices of a block precede each one and are of the same expert."""
    index = tl.arange(0, CHOICES)
    is_before = index[None, :] < index[:, None]
    is_same = expert[None, :] == expert[:, None]
    return tl.sum((is_before & is_same).to(tl.int32), axis=1)


@triton.jit
def _fill(ptr, value, first, last, step, SLOTS: tl.constexpr):
    """Give slots or blocks ``first .. last - 1`` a value: a run of SLOTS in every `step`."""
    for start in range(first, last, step):
        slot = start + tl.arange(0, SLOTS)
        tl.store(ptr + slot, tl.zeros([SLOTS], tl.int32) + value, mask=slot < last)


@triton.jit
def _name_blocks(expert_of_block_ptr, slot, expert, has_slot, align):
    """Experts of the blocks of `align` slots whose first these are: a block has a choice there."""
    is_first = has_slot & (slot % align == 0)
    tl.store(expert_of_block_ptr + slot // align, expert, mask=is_first)


@triton.jit
def _route_kernel(
    ids,
    offsets_ptr,
    slot_of_choice_ptr,
    choice_of_slot_ptr,
    expert_of_block_ptr,
    num_choices,
    num_experts,
    num_slots,
    align,
    nobody,
    HAS_MAP: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    IS_CHAINED: tl.constexpr,
    CHOICES: tl.constexpr,
    SAMPLE: tl.constexpr,
    BINS: tl.constexpr,
    PADDING: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """All of it: a program places the choices of its block."""
    _start_dependents(IS_CHAINED)
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    first = program.to(tl.int64) * CHOICES
    choice = first + tl.arange(0, CHOICES)
    expert = _load_experts(ids, choice, num_choices, num_experts, HAS_MAP)
    slot = tl.full([CHOICES], -1, tl.int32)
    offset = num_experts * 0
    for first_expert in range(0, num_experts, BINS):
        # Count: choices of every expert, and those of them in earlier blocks.
        count = tl.zeros([BINS], tl.int32)
        before = tl.zeros([BINS], tl.int32)
        for start in range(0, num_choices, SAMPLE):
            other = start + tl.arange(0, SAMPLE).to(tl.int64)
            other_expert = _load_experts(ids, other, num_choices, num_experts, HAS_MAP)
            bin = other_expert - first_expert
            is_bin = (bin >= 0) & (bin < BINS) & (other_expert < num_experts)
            count += tl.histogram(bin, BINS, mask=is_bin)
            if start < first:
                before += tl.histogram(bin, BINS, mask=is_bin & (other < first))

        # Place.
        padded = (count + align - 1) // align * align
        first_slot = offset + tl.cumsum(padded, axis=0) - padded
        bin = expert - first_expert
        is_bin = (bin >= 0) & (bin < BINS) & (expert < num_experts)
        base = tl.gather(first_slot + before, tl.where(is_bin, bin, 0), 0)
        slot = tl.where(is_bin, base, slot)

        # Store, but for the slots of choices: where experts begin, and what pads them.
        bins = first_expert + tl.arange(0, BINS)
        if program == 0:
            tl.store(offsets_ptr + bins, first_slot, mask=bins < num_experts)
        for start in range(program * PADDING, align - 1, num_programs * PADDING):
            padding = (first_slot + count)[:, None] + start + tl.arange(0, PADDING)[None, :]
            tl.store(
                choice_of_slot_ptr + padding,
                tl.zeros([BINS, PADDING], tl.int32) + nobody,
                mask=padding < (first_slot + padded)[:, None],
            )
        offset += tl.sum(padded, axis=0)

    if program == 0:
        tl.store(offsets_ptr + num_experts, offset)
    slot = tl.where(slot >= 0, slot + _rank(expert, CHOICES), -1)
    tl.store(slot_of_choice_ptr + choice, slot, mask=choice < num_choices)
    tl.store(choice_of_slot_ptr + slot, choice.to(tl.int32), mask=slot >= 0)
    first, step = offset + program * SLOTS, num_programs * SLOTS
    _fill(choice_of_slot_ptr, nobody, first, num_slots, step, SLOTS)
    if HAS_BLOCKS:
        _name_blocks(expert_of_block_ptr, slot, expert, slot >= 0, align)
        first = offset // align + program * SLOTS
        _fill(expert_of_block_ptr, -1, first, num_slots // align, step, SLOTS)


@triton.jit
def _count_kernel(
    ids,
    counts_ptr,
    slot_of_choice_ptr,
    choice_of_slot_ptr,
    expert_of_block_ptr,
    num_choices,
    num_experts,
    num_slots,
    num_blocks,
    num_rounds,
    nobody,
    HAS_MAP: tl.constexpr,
    IS_CHAINED: tl.constexpr,
    CHOICES: tl.constexpr,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Choices of every expert in a program's block, and each choice's rank among them.

    Ranks are left where the slots will be.
    """
    _start_dependents(IS_CHAINED)
    program, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    end = tl.minimum((program + 1) * num_rounds * CHOICES, num_choices)
    first_choice = program * num_rounds * CHOICES + tl.arange(0, CHOICES)
    head = _load_experts(ids, first_choice, end, num_experts, HAS_MAP)
    first, step = program * SLOTS, num_programs * SLOTS
    _fill(choice_of_slot_ptr, nobody, first, num_slots, step, SLOTS)
    _fill(expert_of_block_ptr, -1, first, num_blocks, step, SLOTS)
    for first_expert in range(0, num_experts, BINS):
        count = tl.zeros([BINS], tl.int32)
        choice = first_choice
        expert = head
        for _ in range(num_rounds):
            # On its way while this round is counted.
            next_expert = _load_experts(ids, choice + CHOICES, end, num_experts, HAS_MAP)
            bin = expert - first_expert
            is_bin = (bin >= 0) & (bin < BINS) & (expert < num_experts)
            rank = tl.gather(count, tl.where(is_bin, bin, 0), 0) + _rank(expert, CHOICES)
            is_written = (is_bin | (expert == num_experts)) & (choice < end)
            tl.store(slot_of_choice_ptr + choice, tl.where(is_bin, rank, -1), mask=is_written)
            count += tl.histogram(bin, BINS, mask=is_bin)
            choice += CHOICES
            expert = next_expert
        bins = first_expert + tl.arange(0, BINS)
        tl.store(counts_ptr + program * num_experts + bins, count, mask=bins < num_experts)


@triton.jit
def _sum_kernel(
    counts_ptr,
    num_blocks,
    num_experts,
    IS_CHAINED: tl.constexpr,
    BLOCKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Turn counts of blocks into counts of all blocks before, and add a row of totals."""
    _start_dependents(IS_CHAINED)
    _wait_for_predecessor(IS_CHAINED)
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, num_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        offset = block.to(tl.int64)[:, None] * num_experts + expert[None, :]
        is_inside = (block < num_blocks)[:, None] & (expert < num_experts)[None, :]
        count = tl.load(counts_ptr + offset, mask=is_inside, other=0)
        before = total[None, :] + tl.cumsum(count, axis=0) - count
        tl.store(counts_ptr + offset, before, mask=is_inside)
        total += tl.sum(count, axis=0)
    offset = tl.cast(num_blocks, tl.int64) * num_experts + expert
    tl.store(counts_ptr + offset, total, mask=expert < num_experts)


@triton.jit
def _place_kernel(
    ids,
    counts_ptr,
    offsets_ptr,
    slot_of_choice_ptr,
    choice_of_slot_ptr,
    expert_of_block_ptr,
    num_choices,
    num_experts,
    block_size,
    align,
    HAS_MAP: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    IS_CHAINED: tl.constexpr,
    CHOICES: tl.constexpr,
    BINS: tl.constexpr,
):
    """Turn ranks in blocks into slots, CHOICES of a block at once."""
    _start_dependents(IS_CHAINED)
    program, num_blocks = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    end = tl.minimum((program + 1) * block_size, num_choices)
    first_choice = program * block_size + tl.arange(0, CHOICES)
    # Ids are no result of the two kernels before, which may still run.
    head = _load_experts(ids, first_choice, end, num_experts, HAS_MAP)
    _wait_for_predecessor(IS_CHAINED)
    offset = num_experts * 0
    for first_expert in range(0, num_experts, BINS):
        choice = first_choice
        expert = head
        rank = tl.load(slot_of_choice_ptr + choice, mask=choice < end, other=0)

        # Where the block's choices of every expert begin.
        bins = first_expert + tl.arange(0, BINS)
        is_expert = bins < num_experts
        count = tl.load(counts_ptr + num_blocks * num_experts + bins, mask=is_expert, other=0)
        before = tl.load(counts_ptr + program * num_experts + bins, mask=is_expert, other=0)
        padded = (count + align - 1) // align * align
        first_slot = offset + tl.cumsum(padded, axis=0) - padded
        if program == 0:
            tl.store(offsets_ptr + bins, first_slot, mask=is_expert)
        offset += tl.sum(padded, axis=0)

        for _ in range(0, block_size, CHOICES):
            next_choice = choice + CHOICES
            next_expert = _load_experts(ids, next_choice, end, num_experts, HAS_MAP)
            next_rank = tl.load(slot_of_choice_ptr + next_choice, mask=next_choice < end, other=0)
            # Threads may share a choice: all have read its rank before one writes its slot.
            tl.debug_barrier()
            bin = expert - first_expert
            is_bin = (bin >= 0) & (bin < BINS) & (expert < num_experts)
            slot = tl.gather(first_slot + before, tl.where(is_bin, bin, 0), 0) + rank
            tl.store(slot_of_choice_ptr + choice, slot, mask=is_bin)
            tl.store(choice_of_slot_ptr + slot, choice.to(tl.int32), mask=is_bin)
            if HAS_BLOCKS:
                _name_blocks(expert_of_block_ptr, slot, expert, is_bin, align)
            choice = next_choice
            expert = next_expert
            rank = next_rank
    if program == 0:
        tl.store(offsets_ptr + num_experts, offset)


def build_routing(
    topk_ids: Tensor,
    num_experts: int,
    *,
    align: int = 1,
    expert_map: Tensor | None = None,
    config: RoutingConfig | None = None,
) -> Routing:
    """Offsets and index maps of ``topk_ids [T, A]``; see `octomoe.build_routing`."""
    routing = _empty(topk_ids, num_experts, align)
    _launch(topk_ids, routing, None, expert_map, -1, config)
    return routing


def build_blocks(
    topk_ids: Tensor,
    num_experts: int,
    *,
    align: int,
    expert_map: Tensor | None = None,
    nobody: int = -1,
    config: RoutingConfig | None = None,
) -> tuple[Routing, Tensor]:
    """A routing, and ``[S / align]`` int32: whose every run of `align` slots is, or -1.

    `nobody`: in the map from slots to choices, the number of no choice.
    """
    routing = _empty(topk_ids, num_experts, align)
    expert_of_block = routing.choice_of_slot_S.new_empty(routing.num_slots // align)
    _launch(topk_ids, routing, expert_of_block, expert_map, nobody, config)
    return routing, expert_of_block


def _empty(topk_ids: Tensor, num_experts: int, align: int) -> Routing:
    device = topk_ids.device
    num_tokens, num_columns = topk_ids.shape
    num_slots = slot_capacity(num_tokens, num_columns, num_experts, align)
    return Routing(
        torch.empty(num_experts + 1, dtype=torch.int32, device=device),
        torch.empty(topk_ids.shape, dtype=torch.int32, device=device),
        torch.empty(num_slots, dtype=torch.int32, device=device),
        align,
    )


def _launch(
    topk_ids: Tensor,
    routing: Routing,
    expert_of_block: Tensor | None,
    expert_map: Tensor | None,
    nobody: int,
    config: RoutingConfig | None,
) -> None:
    """Start one kernel or three."""
    offsets, num_experts = routing.expert_offsets, routing.num_experts
    num_choices, num_slots = topk_ids.numel(), routing.num_slots
    config = config or routing_config(
        num_choices, num_experts, num_slots, target_of(topk_ids.device)
    )
    ids = ids_of(topk_ids, expert_map, num_experts)
    if topk_ids.is_contiguous():
        # They are one row: nothing is then divided by.
        ids = ids._replace(num_choices=1, stride_row=1, stride_column=0)
    has_blocks = expert_of_block is not None
    maps = (
        routing.slot_of_choice_TA,
        routing.choice_of_slot_S,
        routing.choice_of_slot_S if expert_of_block is None else expert_of_block,
    )
    constants = {"HAS_MAP": ids.has_map, "BINS": config.bins}
    if config.is_single:
        _route_kernel[(max(triton.cdiv(num_choices, config.choices), 1),)](
            ids,
            offsets,
            *maps,
            num_choices,
            num_experts,
            num_slots,
            routing.align,
            nobody,
            HAS_BLOCKS=has_blocks,
            IS_CHAINED=config.is_chained,
            CHOICES=config.choices,
            SAMPLE=config.sample,
            PADDING=config.padding,
            SLOTS=config.slots,
            num_warps=config.num_warps,
            **constants,
        )
        return
    num_blocks = max(triton.cdiv(num_choices, config.block), 1)
    counts = torch.empty((num_blocks + 1, num_experts), dtype=torch.int32, device=offsets.device)
    chained = chain_arguments(config.is_chained)
    _count_kernel[(num_blocks,)](
        ids,
        counts,
        *maps,
        num_choices,
        num_experts,
        num_slots,
        num_slots // routing.align if has_blocks else 0,
        config.rounds,
        nobody,
        IS_CHAINED=config.is_chained,
        CHOICES=config.choices,
        SLOTS=config.slots,
        num_warps=config.num_warps,
        **constants,
    )
    _sum_kernel[(triton.cdiv(num_experts, config.sum_experts),)](
        counts,
        num_blocks,
        num_experts,
        IS_CHAINED=config.is_chained,
        BLOCKS=config.sum_blocks,
        EXPERTS=config.sum_experts,
        num_warps=config.sum_warps,
        **chained,
    )
    _place_kernel[(num_blocks,)](
        ids,
        counts,
        offsets,
        *maps,
        num_choices,
        num_experts,
        config.block,
        routing.align,
        HAS_BLOCKS=has_blocks,
        IS_CHAINED=config.is_chained,
        CHOICES=config.placed,
        num_warps=config.place_warps,
        **constants,
        **chained,
    )
