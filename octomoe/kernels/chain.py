"""Kernels that are launched before their predecessors end, and wait for these where they must."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def chain_arguments(is_chained: bool) -> dict[str, bool]:
    """How a kernel is launched that waits for its predecessor itself.

    Only NVIDIA's compiler knows the option.
    """
    return {"launch_pdl": True} if is_chained else {}


@triton.jit
def _start_dependents(IS_CHAINED: tl.constexpr):
    """Let the next kernel be launched before this one ends: it waits where it must."""
    if IS_CHAINED:
        gdc_launch_dependents()


@triton.jit
def _wait_for_predecessor(IS_CHAINED: tl.constexpr):
    """Wait until all that the kernel before has written can be read."""
    if IS_CHAINED:
        gdc_wait()
