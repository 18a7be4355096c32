"""Gluon under one set of names, from Triton 3.6 to 3.9.

Its API is experimental and changes with every release; what differs is here, so that kernels need
not know.
"""

from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia import ampere, hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "copy_rows",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "multiply",
    "rows_arrive",
    "seen_as",
    "synchronize",
    "tma_load",
    "tma_store",
    "tma_store_wait",
    "wait_for_product",
]

mbarrier = hopper.mbarrier
fence_async_shared = hopper.fence_async_shared
multiply, wait_for_product = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
rows_arrive = ampere.async_copy.mbarrier_arrive
tma_store_wait = hopper.tma.store_wait

# Threads of a program, or of its part that runs this, wait for each other.
synchronize = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

_VERSION = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
if _VERSION >= (3, 8):
    tma_load, tma_store = hopper.tma.async_load, hopper.tma.async_store
    copy_rows = ampere.async_copy.async_load
else:
    tma_load = hopper.tma.async_copy_global_to_shared
    tma_store = hopper.tma.async_copy_shared_to_global
    copy_rows = ampere.async_copy.async_copy_global_to_shared


@builtin
def seen_as(memory: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """Shared memory as another shape of the same bytes."""
    see = memory.reinterpret if _VERSION >= (3, 9) else memory._reinterpret
    return see(dtype, shape, layout, _semantic=_semantic)
