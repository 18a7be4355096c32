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
from functools import cache
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from offline_layers import blocks_in_memory, experts_in_memory, in_memory
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from octomoe.core.activations import SILU, SWIGLU_OAI
from octomoe.core.device import Target
from octomoe.core.formats import (
    FP8_BLOCK128,
    FP8_COLUMN128,
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
from octomoe.core.routing import Routing, routing_of_slots, slot_capacity, slots_of_mask
from octomoe.kernels.activation_bwd import activation_bwd, activation_bwd_both
from octomoe.kernels.activation_quantize import activation_quantize, activation_quantize_both
from octomoe.kernels.build_routing import build_routing as build_routing_kernel
from octomoe.kernels.fused_moe import experts_forward
from octomoe.kernels.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from octomoe.kernels.moe_align_block_size import moe_align_block_size
from octomoe.kernels.permute import permute
from octomoe.kernels.quantize import quantize
from octomoe.kernels.quantize_both import quantize_both
from octomoe.kernels.unpermute import unpermute
from octomoe.kernels.unpermute_bwd import unpermute_bwd
from octomoe.reference.build_routing import build_routing
from octomoe.reference.quantize import quantize as quantize_reference
from octomoe.tune.fused_moe import fused_moe_config
from octomoe.tune.lookup import permute_config, routing_config

# Widths of a row: of a real model, and one that allows accesses of single elements only.
WIDE, ODD = 7168, 131
# What goes with MXFP8 along the other axis.
MXFP8_COLUMN = Format.parse("mxfp8[1,32,1]")
ENDS = torch.zeros(17, dtype=torch.int32)

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
        tensor_core: the instruction for products on sm90, on tiles that were copied to shared
            memory ahead; none if empty.
    """

    run: Callable[[], object]
    load_bytes: int = 16
    store_bytes: int = 16
    tensor_core: str = ""


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
    # Rows of 4 per thread, for few divisions.
    "quantize fp8_column128": Case(lambda: quantize(rows(), FP8_COLUMN128), 8, 4),
    "quantize fp8_group128 seed": Case(lambda: quantize(rows(), FP8_GROUP128, seed=seed())),
    "quantize fp8_tensor seed": Case(lambda: quantize(rows(), FP8_TENSOR, seed=seed())),
    "quantize mxfp8 seed": Case(lambda: quantize(rows(), MXFP8, layout=GEMM_READY, seed=seed())),
    "quantize fp8_column128 seed": Case(lambda: quantize(rows(), FP8_COLUMN128, seed=seed()), 8, 4),
    "quantize_both fp8": Case(lambda: quantize_both(rows(), FP8_GROUP128, FP8_COLUMN128), 16, 8),
    "quantize_both mxfp8": Case(lambda: quantize_both(rows(), MXFP8, MXFP8_COLUMN), 16, 8),
    "quantize_both mxfp8 seed": Case(
        lambda: quantize_both(rows(), MXFP8, MXFP8_COLUMN, seed=seed()), 16, 8
    ),
    "activation_quantize fp8_group128": Case(
        lambda: activation_quantize(rows(width=4096), SILU, FP8_GROUP128)
    ),
    "activation_quantize fp8_tensor": Case(
        lambda: activation_quantize(rows(width=4096), SILU, FP8_TENSOR)
    ),
    "activation_quantize mxfp8 seed": Case(
        lambda: activation_quantize(rows(width=4096), SILU, MXFP8, seed=seed())
    ),
    "activation_quantize_both fp8": Case(
        lambda: activation_quantize_both(rows(width=4096), SILU, FP8_GROUP128, FP8_COLUMN128),
        16,
        8,
    ),
    "activation_quantize_both mxfp8 seed": Case(
        lambda: activation_quantize_both(rows(width=4096), SILU, MXFP8, MXFP8_COLUMN, seed=seed()),
        16,
        8,
    ),
    "activation_bwd bf16": Case(lambda: activation_bwd(*gradients(), SILU)),
    "activation_bwd fp8_group128": Case(
        lambda: activation_bwd(*gradients(), SILU, format=FP8_GROUP128)
    ),
    "activation_bwd fp8_block128": Case(
        lambda: activation_bwd(*gradients(), SWIGLU_OAI, format=FP8_BLOCK128)
    ),
    "activation_bwd fp8_tensor": Case(
        lambda: activation_bwd(*gradients(), SILU, format=FP8_TENSOR)
    ),
    "activation_bwd fp8_group128 seed": Case(
        lambda: activation_bwd(*gradients(), SILU, format=FP8_GROUP128, seed=seed())
    ),
    "activation_bwd_both fp8": Case(
        lambda: activation_bwd_both(*gradients(), SILU, FP8_GROUP128, FP8_COLUMN128), 16, 8
    ),
    "activation_bwd_both mxfp8 seed": Case(
        lambda: activation_bwd_both(*gradients(), SILU, MXFP8, MXFP8_COLUMN, seed=seed()), 16, 8
    ),
    "permute bf16": Case(lambda: permute(tokens(), routing())),
    "permute mxfp8": Case(lambda: permute(quantized(MXFP8), routing())),
    "permute mxfp8 to interleaved": Case(
        lambda: permute(quantized(MXFP8), routing(), layout=INTERLEAVED)
    ),
    "permute mxfp8 in gemm_ready": Case(
        lambda: permute(
            quantize(tokens(), MXFP8, layout=GEMM_READY),
            routing(),
            config=permute_config(WIDE, 1, 224, target=machine()),
        )
    ),
    "permute fp8_tensor": Case(lambda: permute(quantized(FP8_TENSOR), routing())),
    "permute odd width": Case(lambda: permute(tokens(ODD), routing()), 0, 0),
    "unpermute bf16": Case(lambda: unpermute(slots(), routing())),
    "unpermute bf16 weights": Case(lambda: unpermute(slots(), routing(), weights())),
    "unpermute bf16 one choice": Case(lambda: unpermute(slots(64), routing(1))),
    "unpermute float32": Case(lambda: unpermute(slots(dtype=torch.float32), routing())),
    "unpermute float32 weights": Case(
        lambda: unpermute(slots(dtype=torch.float32), routing(), weights())
    ),
    "unpermute odd width": Case(lambda: unpermute(slots(width=ODD), routing(), weights()), 0, 0),
    "permute complex128": Case(
        lambda: permute(torch.ones(64, 896, dtype=torch.complex128), routing())
    ),
    "permute mxfp8 to gemm_ready": Case(
        lambda: permute(quantized(MXFP8), routing(), layout=GEMM_READY)
    ),
    "permute mask": Case(lambda: permute(tokens(), masked())),
    "unpermute mask": Case(lambda: unpermute(slots(), masked())),
    "unpermute mask weights": Case(lambda: unpermute(slots(), masked(), torch.empty(64, 64))),
    "unpermute_bwd bf16": Case(lambda: unpermute_bwd(tokens(), slots(), routing(), weights())),
    "unpermute_bwd float32": Case(
        lambda: unpermute_bwd(
            rows(64, dtype=torch.float32), slots(dtype=torch.float32), routing(), weights()
        )
    ),
    "unpermute_bwd mask": Case(
        lambda: unpermute_bwd(tokens(), slots(), masked(), torch.empty(64, 64))
    ),
    "unpermute_bwd odd width": Case(
        lambda: unpermute_bwd(tokens(width=ODD), slots(width=ODD), routing(), weights()), 0, 0
    ),
    "build_routing one token": Case(lambda: route(1), 4, 4),
    "build_routing one launch": Case(lambda: route(256), 4, 4),
    "build_routing three launches": Case(lambda: route(8192), 4, 4),
    "build_routing many tokens": Case(lambda: route(131072), 4, 4),
    "build_routing many experts": Case(lambda: route(8192, 5000), 4, 4),
    "build_routing map": Case(lambda: route(8192, has_map=True), 4, 4),
    "moe_align_block_size": Case(lambda: moe_align_block_size(ids(64), 16, 256), 4, 4),
    # Tiles are loaded by copies to shared memory, which are not among the loads.
    **{
        f"fused_moe {name} {n} tokens": Case(lambda n=n, w=w: layer(n, *w), 0, 0, core)
        for name, w, core, tokens in (
            ("fp8_block128", (FP8_BLOCK128, FP8_GROUP128), "QGMMA", (1, 64, 256, 512, 8192)),
            ("fp8_row", (FP8_ROW, FP8_ROW), "QGMMA", (64, 8192)),
            ("bf16 x fp8_block128", (FP8_BLOCK128, None), "HGMMA", (64, 8192)),
        )
        for n in tokens
    },
    "grouped_gemm fp8_block128 few": Case(
        lambda: grouped_gemm(side(64, FP8_GROUP128), stack(FP8_BLOCK128), ENDS), 0, 16, "QGMMA"
    ),
    "grouped_gemm fp8_block128": Case(
        lambda: grouped_gemm(side(8192, FP8_GROUP128), stack(FP8_BLOCK128), ENDS),
        0,
        16,
        "QGMMA",
    ),
    "grouped_gemm fp8_row": Case(
        lambda: grouped_gemm(side(8192, FP8_ROW), stack(FP8_ROW), ENDS), 0, 16, "QGMMA"
    ),
    "grouped_gemm mxfp8 few": Case(
        lambda: grouped_gemm(side(64, MXFP8), stack(MXFP8), ENDS), 0, 16, "QGMMA"
    ),
    "grouped_gemm mxfp8": Case(
        lambda: grouped_gemm(side(8192, MXFP8), stack(MXFP8), ENDS), 0, 16, "HGMMA"
    ),
    "grouped_gemm bf16 x fp8_block128": Case(
        lambda: grouped_gemm(side(8192), stack(FP8_BLOCK128), ENDS), 0, 16, "HGMMA"
    ),
    "grouped_gemm bf16 few": Case(lambda: grouped_gemm(side(64), stack(), ENDS), 0, 16, "HGMMA"),
    "grouped_gemm float32": Case(
        lambda: grouped_gemm(side(64, torch.float32), stack(torch.float32), ENDS), 0, 16
    ),
    "grouped_gemm odd width": Case(
        lambda: grouped_gemm(side(64, FP8_GROUP128, ODD), stack(FP8_BLOCK128, ODD, ODD), ENDS),
        0,
        0,
    ),
    "grouped_gemm_dgrad fp8_block128": Case(
        lambda: grouped_gemm_dgrad(side(8192, FP8_GROUP128), stack(FP8_BLOCK128), ENDS),
        0,
        16,
        "QGMMA",
    ),
    "grouped_gemm_dgrad fp8_row": Case(
        lambda: grouped_gemm_dgrad(side(8192, FP8_ROW), stack(FP8_ROW), ENDS), 0, 16, "HGMMA"
    ),
    "grouped_gemm_wgrad fp8_column128": Case(
        lambda: grouped_gemm_wgrad(side(8192, FP8_COLUMN128), side(8192, FP8_COLUMN128), ENDS),
        0,
        16,
        "HGMMA",
    ),
    "grouped_gemm_wgrad mxfp8": Case(
        lambda: grouped_gemm_wgrad(side(8192, MXFP8), side(8192, MXFP8), ENDS),
        0,
        16,
        "HGMMA",
    ),
    "grouped_gemm_wgrad bf16": Case(
        lambda: grouped_gemm_wgrad(side(8192), side(8192), ENDS), 0, 16, "HGMMA"
    ),
}


def rows(num: int = 4096, width: int = WIDE, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Memory that nobody reads: its size decides how a launcher cuts the work."""
    return torch.empty(num, width, dtype=dtype)


def seed() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def gradients() -> tuple[Tensor, Tensor]:
    """Of an activation's result, and its input."""
    return rows(width=2048), rows(width=4096)


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


def masked() -> Routing:
    """Eight of 64 experts for every token, as a mask gives them."""
    is_chosen = (torch.arange(64)[:, None] + torch.arange(64)) % 8 == 0
    return routing_of_slots(slots_of_mask(is_chosen), 512)


def ids(num_tokens: int) -> Tensor:
    return torch.empty(num_tokens, 8, dtype=torch.int32)


def machine() -> Target:
    """The device that is compiled for."""
    compiled = driver.active.get_current_target()
    if compiled.backend == "hip":
        return Target(compiled.arch, sms=304, smem=65536, is_hip=True)
    return Target("NVIDIA H200", arch=compiled.arch, sms=132, smem=232448)


def route(num_tokens: int, num_experts: int = 256, has_map: bool = False) -> None:
    topk_ids = ids(num_tokens)
    expert_map = torch.empty(num_experts, dtype=torch.int32) if has_map else None
    config = routing_config(topk_ids.numel(), num_experts, topk_ids.numel(), machine())
    build_routing_kernel(topk_ids, num_experts, expert_map=expert_map, config=config)


def layer(num_tokens: int, weights: Format, activations: Format | None) -> None:
    """A layer of 128 experts of which a token chooses 8, from rows to the sum over experts."""
    config = fused_moe_config(
        num_tokens,
        num_choices=8,
        num_experts=128,
        width=384,
        has_steps=activations == FP8_GROUP128,
        row_bytes=2 if activations is None else 1,
        target=machine(),
    )
    num_slots = slot_capacity(num_tokens, 8, 128, config.rows)
    experts_forward(
        in_memory((num_tokens, 4096), activations or torch.bfloat16),
        experts_in_memory(128, 4096, 384, weights),
        torch.empty(num_tokens, 8),
        *blocks_in_memory(num_tokens, 8, 128, num_slots, config.rows),
        activation_format=activations,
        out_dtype=torch.bfloat16,
        routed_scaling_factor=1.0,
        config=config,
    )


def side(
    num: int, format: Format | torch.dtype = torch.bfloat16, width: int = 4096
) -> Tensor | QTensor:
    return in_memory((num, width), format)


def stack(
    format: Format | torch.dtype = torch.bfloat16, num_rows: int = 4096, width: int = 4096
) -> Tensor | QTensor:
    return in_memory((16, num_rows, width), format)


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
    """A record per kernel of a case."""
    return compile_launches(CASES[name].run, {"case": name, "target": target})


def compile_launches(run: Callable[[], object], about: dict[str, Any]) -> list[dict[str, object]]:
    """Run something with compilation in the place of every launch; a record per kernel."""
    launched, target = [], about["target"]

    def compile_instead(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            launched.append(kernel.run(*args, grid=grid, warmup=True, **options))

        return launch

    driver.set_active(_Driver(_gpu_target(target)))
    JITFunction.__getitem__ = compile_instead
    about = about | {"triton": triton.__version__}
    try:
        run()
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
    backend, arch = name.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


def _measure_cuda(asm: dict[str, Any]) -> dict[str, object]:
    return _measure_cubin(asm["cubin"])


# Cases have kernels in common.
@cache
def _measure_cubin(cubin: bytes) -> dict[str, object]:
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
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


def is_worth_it(name: str, target: str) -> bool:
    """gfx950 differs from gfx942 where it multiplies, in tiles of few rows and of many."""
    if not target.endswith("gfx950"):
        return True
    is_of_another_size = name.endswith((" 1 tokens", " 256 tokens", " 512 tokens"))
    return bool(CASES[name].tensor_core) and not is_of_another_size


def main(compile_job: Callable[[str, str], list[Any]], jobs: list[tuple[str, str]]) -> None:
    """Print the records of each job, a case and a target."""
    # Results must not come from an earlier run.
    with TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # Forked, for processes that need not import all of this again.
        with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
            for record in chain.from_iterable(pool.map(compile_job, *zip(*jobs, strict=True))):
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(compile_case, [job for job in product(CASES, sys.argv[1:]) if is_worth_it(*job)])
