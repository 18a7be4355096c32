"""What kernels share that move rows between tokens and slots."""

import triton
import triton.language as tl


@triton.jit
def _work_of_program(num_slot_programs):
    """Whether this program serves slots, as the last ones do, and its number among its kind.

    Between those that copy rows they cost 3 to 5 % more on an H200.
    """
    program = tl.program_id(0)
    num_row_programs = tl.num_programs(0) - num_slot_programs
    serves_slots = program >= num_row_programs
    return serves_slots, tl.where(serves_slots, program - num_row_programs, program)


@triton.jit
def _load_slots(slot_of_choice_ptr, token, first_choice, num_choices, CHOICES: tl.constexpr):
    """A run of a token's choices, and their slots."""
    choices = first_choice + tl.arange(0, CHOICES)
    offset = token * num_choices + choices
    slots = tl.load(slot_of_choice_ptr + offset, mask=choices < num_choices, other=-1)
    return choices, slots


@triton.jit
def _next_choice(choices, slots, choice):
    """The first of `choices` behind `choice` that has a slot; there must be one.

    Of a warp's width, this is one instruction on NVIDIA.
    """
    is_next = (slots >= 0) & (choices > choice)
    return tl.min(tl.where(is_next, choices, 0x7FFFFFFF), axis=0)


@triton.jit
def _clear_padding(
    y_ptr, slot, is_padding, num_columns, SLOTS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):
    """Zero the rows of a run of slots that belong to no token."""
    if tl.max(is_padding.to(tl.int32), axis=0) > 0:
        for first in range(0, num_columns, TILE_COLUMNS):
            column = first + tl.arange(0, TILE_COLUMNS)
            tl.store(
                y_ptr + slot.to(tl.int64)[:, None] * num_columns + column[None, :],
                tl.zeros([SLOTS, TILE_COLUMNS], y_ptr.dtype.element_ty),
                mask=is_padding[:, None] & (column < num_columns)[None, :],
            )
