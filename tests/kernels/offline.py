"""Compile kernels without a GPU, as their launchers would launch them; say what came out.

    python tests/kernels/offline.py cuda:90 hip:gfx942

prints one line of JSON per case, kernel and target: registers, spills, shared memory, and the
instructions that tell whether loads are wide and whether tensor cores and TMA are used. Run it
without TRITON_INTERPRET. It is a program of its own since a process that interprets kernels cannot
compile them.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from octomoe.core.formats import (
    FP8_BLOCK128,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    MXFP8,
    MXFP8_2D,
    MXFP8_E5M2,
    Format,
)
from octomoe.core.layouts import GEMM_READY, INTERLEAVED
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.permute import permute
from octomoe.kernels.quantize import quantize
from octomoe.kernels.unpermute import unpermute
from octomoe.reference.build_routing import build_routing
from octomoe.reference.quantize import quantize as quantize_reference

# Widths of a row: of a real model, and one that allows accesses of single elements only.
WIDE, ODD = 7168, 131

# What is counted: tensor cores, TMA, copies to shared memory, spills, fused multiply-adds.
_KINDS = ("QGMMA", "HGMMA", "UTMALDG", "LDGSTS", "LDG", "STG", "LDL", "STL", "FFMA")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
# Address, predicate (not always), mnemonic.
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


@dataclass(frozen=True)
class Case:
    """A call of a launcher.

    Attributes:
        run: makes small tensors and calls.
        load_bytes, store_bytes: of the widest access to global memory that its kernels must have
            on sm90; 0 claims nothing.
    """

    run: Callable[[], object]
    load_bytes: int = 16
    store_bytes: int = 16


CASES = {
    "quantize fp8_group128": Case(lambda: quantize(rows(), FP8_GROUP128)),
    "quantize fp8_group128 gemm_ready": Case(
        lambda: quantize(rows(), FP8_GROUP128, layout=GEMM_READY)
    ),
    "quantize fp8_group128 few": Case(lambda: quantize(rows(16), FP8_GROUP128)),
    "quantize fp8_row": Case(lambda: quantize(rows(), FP8_ROW)),
    "quantize fp8_tensor": Case(lambda: quantize(rows(), FP8_TENSOR)),
    "quantize fp8_expert": Case(lambda: quantize(experts(), FP8_EXPERT)),
    "quantize fp8_block128": Case(lambda: quantize(experts(), FP8_BLOCK128)),
    "quantize mxfp8 interleaved": Case(lambda: quantize(rows(), MXFP8, layout=INTERLEAVED)),
    "quantize mxfp8_e5m2 float32": Case(lambda: quantize(rows(dtype=torch.float32), MXFP8_E5M2)),
    "quantize mxfp8_2d": Case(lambda: quantize(experts(), MXFP8_2D)),
    "quantize odd width": Case(lambda: quantize(rows(width=ODD), FP8_GROUP128), 0, 0),
    "permute bf16": Case(lambda: permute(tokens(), routing())),
    "permute bf16 one choice": Case(lambda: permute(tokens(), routing(1))),
    "permute fp8_group128 to gemm_ready": Case(
        lambda: permute(quantized(FP8_GROUP128), routing(), layout=GEMM_READY)
    ),
    "permute mxfp8": Case(lambda: permute(quantized(MXFP8), routing())),
    "permute mxfp8 to interleaved": Case(
        lambda: permute(quantized(MXFP8), routing(), layout=INTERLEAVED)
    ),
    "permute fp8_tensor": Case(lambda: permute(quantized(FP8_TENSOR), routing())),
    "permute odd width": Case(lambda: permute(tokens(width=ODD), routing()), 0, 0),
    "unpermute bf16": Case(lambda: unpermute(slots(), routing())),
    "unpermute bf16 weights": Case(lambda: unpermute(slots(), routing(), weights())),
    "unpermute bf16 one choice": Case(lambda: unpermute(slots(64), routing(1))),
    "unpermute float32": Case(lambda: unpermute(slots(dtype=torch.float32), routing())),
    "unpermute float32 weights": Case(
        lambda: unpermute(slots(dtype=torch.float32), routing(), weights())
    ),
    "unpermute odd width": Case(lambda: unpermute(slots(width=ODD), routing(), weights()), 0, 0),
}


def rows(num: int = 4096, width: int = WIDE, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Memory that nobody reads: its size decides how a launcher cuts the work."""
    return torch.empty(num, width, dtype=dtype)


def experts() -> Tensor:
    return torch.empty(4, 4096, 4096, dtype=torch.bfloat16)


def tokens(width: int = WIDE) -> Tensor:
    return torch.ones(64, width, dtype=torch.bfloat16)


def routing(num_choices: int = 8) -> Routing:
    return build_routing(torch.arange(64 * num_choices).view(64, num_choices) % 16, 16)


def quantized(format: Format) -> QTensor:
    return quantize_reference(tokens(), format)


def slots(num: int = 512, width: int = WIDE, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(num, width, dtype=dtype)


def weights() -> Tensor:
    return torch.empty(64, 8)


@dataclass
class _Driver:
    """What Triton asks about the device, of a device that is not there."""

    target: GPUTarget

    def get_current_device(self) -> GPUTarget:
        # Triton keeps compiled kernels per device.
        return self.target

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_case(name: str, target: str) -> list[dict[str, object]]:
    """Run a case with compilation in the place of every launch; a record per kernel."""
    launched = []

    def compile_instead(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            launched.append(kernel.run(*args, grid=grid, warmup=True, **options))

        return launch

    driver.set_active(_Driver(_gpu_target(target)))
    JITFunction.__getitem__ = compile_instead
    about = {"case": name, "target": target, "triton": triton.__version__}
    try:
        CASES[name].run()
    # Triton has no common class of errors, and each is reported.
    except Exception as error:
        return [about | {"kernel": None, "error": f"{type(error).__name__}: {error}"}]
    measure = _measure_cuda if target.startswith("cuda") else _measure_hip
    return [
        about
        | {"kernel": kernel.metadata.name, "shared_bytes": kernel.metadata.shared}
        | measure(kernel.asm)
        for kernel in launched
    ]


def _gpu_target(name: str) -> GPUTarget:
    """``cuda:90`` or ``hip:gfx942``."""
    backend, arch = name.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


def _measure_cuda(asm: dict[str, Any]) -> dict[str, object]:
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", listing))
    instructions = re.findall(_INSTRUCTION, listing)
    return {
        "registers": int(usage["REG"]),
        "spill_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
        "instructions": {kind: _count(instructions, kind) for kind in _KINDS},
        "load_bytes": _widest(instructions, "LDG"),
        "store_bytes": _widest(instructions, "STG"),
    }


def _count(instructions: list[str], kind: str) -> int:
    return sum(instruction.split(".")[0] == kind for instruction in instructions)


def _widest(instructions: list[str], kind: str) -> int:
    """Bytes per thread of the widest access of its kind; 0 if there is none."""
    accesses = [set(i.split(".")[1:]) for i in instructions if i.split(".")[0] == kind]
    # Without a width in its name, an instruction moves 4 bytes.
    sizes = [[size for name, size in _WIDTHS.items() if name in access] for access in accesses]
    return max(((size or [4])[0] for size in sizes), default=0)


def _measure_hip(asm: dict[str, Any]) -> dict[str, object]:
    usage = dict(re.findall(r"^ +\.(\w+): +(\d+)$", asm["amdgcn"], re.MULTILINE))
    return {
        "registers": int(usage["vgpr_count"]),
        "spill_bytes": int(usage["private_segment_fixed_size"]),
    }


def main(targets: list[str]) -> None:
    # Results must not come from an earlier run.
    with TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"))
        with pool:
            for records in pool.map(compile_case, *zip(*product(CASES, targets), strict=True)):
                for record in records:
                    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
