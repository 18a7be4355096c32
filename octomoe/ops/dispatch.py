"""Which backend runs an op: `auto` picks, an explicit one never falls back, a refusal says why."""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import torch

from octomoe.core.device import Target
from octomoe.errors import refusal

# Fastest first: `auto` takes the first that is usable.
BACKENDS: Final = ("sm90", "triton", "reference")

_MODULES: Final = {
    "sm90": "octomoe.kernels.{op}_sm90",
    "triton": "octomoe.kernels.{op}",
    "reference": "octomoe.reference.{op}",
}

OPS: Final = (
    "quantize",
    "quantize_both",
    "dequantize",
    "requantize",
    "build_routing",
    "moe_align_block_size",
    "permute",
    "unpermute",
    "unpermute_bwd",
    "grouped_gemm",
    "activation_quantize",
    "activation_bwd",
    "fused_moe",
)


def why_not(op: str, backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run `op` on `device`; None if it can.

    >>> why_not("quantize", "reference", torch.device("cpu")) is None
    True
    """
    if backend == "reference":
        return None
    reason = _machine_lacks(backend, Target.of(device))
    if reason is None and not _has_module(_MODULES[backend].format(op=op)):
        reason = f"this version has no {backend} kernel for it"
    return reason


def choose(op: str, backend: str, device: torch.device, name: str = "") -> str:
    """The backend to run `op` on `device`; a refusal calls it `name`, if that is given.

    Raises:
        ValueError: no backend has this name.
        NotImplementedError: the one asked for cannot run here; the message gives each one's reason.
    """
    if backend == "auto":
        # The interpreter is for looking at kernels, not for using them.
        names = BACKENDS if device.type != "cpu" else ("reference",)
        return next(name for name in names if why_not(op, name, device) is None)
    if backend not in BACKENDS:
        needs = "one of: auto, " + ", ".join(BACKENDS)
        raise ValueError(refusal(name or op, "backend", f"is {backend!r}", needs))
    reason = why_not(op, backend, device)
    if reason is not None:
        reasons = {name: why_not(op, name, device) for name in BACKENDS}
        needs = "one that can run: " + "; ".join(
            f"{name} ({reason or 'usable'})" for name, reason in reasons.items()
        )
        got = f"is {backend!r} on {device}"
        raise NotImplementedError(refusal(name or op, "backend", got, needs))
    return backend


def implementation(
    op: str, backend: str, device: torch.device, name: str = "", problem: tuple[Any, ...] = ()
) -> Callable[..., Any]:
    """The function that runs `op`; `name` picks a sibling in the same file (``op`` + pass).

    `problem`: what a kernel that cannot do everything is asked about: its file's `why_not` says
    what it lacks. `auto` then goes on to the next backend.

    Raises:
        ValueError, NotImplementedError: as `choose`; or the backend asked for cannot do `problem`.
    """
    chosen = choose(op, backend, device, name)
    module = import_module(_MODULES[chosen].format(op=op))
    reason = module.why_not(*problem) if problem and hasattr(module, "why_not") else None
    if reason is not None and backend != "auto":
        needs = f"one that can do this: {chosen} cannot, {reason}"
        raise NotImplementedError(refusal(name or op, "backend", f"is {backend!r}", needs))
    if reason is not None:
        others = BACKENDS[BACKENDS.index(chosen) + 1 :]
        chosen = next(other for other in others if why_not(op, other, device) is None)
        module = import_module(_MODULES[chosen].format(op=op))
    function: Callable[..., Any] = getattr(module, name or op)
    return function


def is_interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _machine_lacks(backend: str, target: Target) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if backend == "sm90" and target.arch != 90:
        return f"needs compute capability 9.0, {target.name} is {_describe_arch(target)}"
    is_gpu = target.arch > 0 or target.is_hip
    if backend == "triton" and not is_gpu and not is_interpreting():
        return f"needs a GPU (or TRITON_INTERPRET=1), tensors are on {target.name}"
    return None


def _describe_arch(target: Target) -> str:
    return f"{target.arch // 10}.{target.arch % 10}" if target.arch else "no CUDA device"


@cache
def _has_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
