"""Time the kernels that move bytes, beside a copy and the ways around them.

PYTHONPATH=. python benchmarks/memory_bound.py [--out FILE.jsonl] [--commit HASH]

Every output is compared with the reference in the same run, on inputs of its own. A share is the
bytes that must move (each input once, each output once) over time, relative to a device-to-device
copy of the same run. CUDA graphs, L2 flushed before each replay, contenders taking turns.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import has_same_bits
from octomoe import (
    COMPACT,
    FP8_BLOCK128,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    GEMM_READY,
    MXFP8,
    SILU,
    QTensor,
    Routing,
    activation_quantize,
    build_routing,
    permute,
    quantize,
    unpermute,
)
from octomoe.bench.records import about, append, microseconds
from octomoe.tune.timing import Timing, time_graphs

FORMATS = (FP8_TENSOR, FP8_ROW, FP8_GROUP128, FP8_BLOCK128, MXFP8)


def main() -> None:
    """Check, time, print, append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON lines file to append the record to")
    parser.add_argument("--rows", type=int, default=131072)
    parser.add_argument("--columns", type=int, default=7168)
    parser.add_argument("--commit", help="of the code, where it does not run in its clone")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows, columns = options.rows, options.columns
    results: list[dict[str, Any]] = []
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    copy = time_graphs({"copy": partial(torch.empty_like(x).copy_, x)})["copy"]
    rate = 2 * x.nbytes / copy.us
    add(results, "copy bf16", copy, 2 * x.nbytes, rate)
    quantize_runs(results, x, rate)
    permute_runs(results, rows, columns, rate)
    routing_runs(results)
    activation_runs(results, x, rate)
    if options.out is not None:
        record = about("python benchmarks/memory_bound.py", options.commit)
        record |= {"rows": rows, "columns": columns, "copy_tb_per_s": round(rate / 1e6, 3)}
        append(options.out, record | {"results": results})


def quantize_runs(results: list[dict[str, Any]], x: torch.Tensor, rate: float) -> None:
    """Every format; the scale-major layout where it is used."""
    cases = [(f, COMPACT) for f in FORMATS]
    cases += [(FP8_GROUP128, GEMM_READY), (MXFP8, GEMM_READY)]
    for format, layout in cases:
        check(partial(quantize, x[:1111, :1000], format, layout=layout))
        run = partial(quantize, x, format, layout=layout)
        num_bytes = x.nbytes + run().num_bytes
        name = f"quantize {format.name} {layout}"
        add(results, name, time_graphs({name: run})[name], num_bytes, rate)


def activation_runs(results: list[dict[str, Any]], x: torch.Tensor, rate: float) -> None:
    """SwiGLU and quantisation."""
    for format in (FP8_ROW, FP8_GROUP128, MXFP8):
        run = partial(activation_quantize, x, SILU, format)
        num_bytes = x.nbytes + run().num_bytes
        name = f"activation_quantize silu {format.name}"
        add(results, name, time_graphs({name: run})[name], num_bytes, rate)


def permute_runs(results: list[dict[str, Any]], rows: int, columns: int, rate: float) -> None:
    """Eight experts of 256 per token; the peer transposes scales around a compact permutation."""
    num_choices, num_experts = 8, 256
    num_tokens = rows // num_choices
    ids = torch.rand(num_tokens, num_experts, device="cuda").topk(num_choices, dim=1).indices
    routing = build_routing(ids, num_experts)
    weights = torch.rand(num_tokens, num_choices, device="cuda")
    x = torch.randn(num_tokens, columns, device="cuda", dtype=torch.bfloat16)
    check(partial(permute, x, routing))
    runs: dict[str, Callable[[], Any]] = {"permute bf16": partial(permute, x, routing)}
    moved = {"permute bf16": (1 + num_choices) * x.nbytes}
    for format in (FP8_GROUP128, MXFP8):
        for layout in (COMPACT, GEMM_READY):
            q = quantize(x, format, layout=layout)
            check(partial(permute, q, routing))
            name = f"permute {format.name} {layout}"
            runs[name] = partial(permute, q, routing)
            moved[name] = (1 + num_choices) * q.num_bytes
            if layout == GEMM_READY:
                name += " by transposing"
                runs[name] = partial(around, q, routing)
                moved[name] = (1 + num_choices) * q.num_bytes
    slots = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    check(partial(unpermute, slots, routing, weights))
    runs["unpermute bf16"] = partial(unpermute, slots, routing, weights)
    moved["unpermute bf16"] = slots.nbytes + x.nbytes
    for name, timing in time_graphs(runs).items():
        add(results, name, timing, moved[name], rate)


def around(q: QTensor, routing: Routing) -> QTensor:
    """Permute scale-major scales as engines do: transpose, gather by torch, transpose."""
    token = routing.choice_of_slot_S // routing.num_choices
    data = q.data.view(torch.uint8)[token].view(q.data.dtype)
    scale = q.scale.view(torch.uint8) if q.scale.dtype.itemsize == 1 else q.scale
    scale = scale.T.contiguous()[token].T.contiguous()
    return QTensor(data, scale.view(q.scale.dtype), q.format, GEMM_READY)


def routing_runs(results: list[dict[str, Any]]) -> None:
    """From one token to a training batch."""
    for num_tokens in (1, 64, 512, 8192, 131072):
        ids = torch.rand(num_tokens, 256, device="cuda").topk(8, dim=1).indices.int()
        run = partial(build_routing, ids, 256)
        check(run)
        name = f"build_routing T={num_tokens} A=8 E=256"
        add(results, name, time_graphs({name: run})[name], 0, 0.0)


def check(run: Callable[..., Any]) -> None:
    """Triton and reference give the same bits."""
    if not has_same_bits(run(backend="triton"), run(backend="reference")):
        raise AssertionError("the kernel's bits differ from the reference's")


def add(
    results: list[dict[str, Any]], name: str, timing: Timing, num_bytes: int, rate: float
) -> None:
    """Keep and print a result."""
    share = num_bytes / timing.us / rate if rate else None
    results.append(
        {
            "name": name,
            **microseconds(timing),
            "bytes": num_bytes,
            "share_of_copy": None if share is None else round(share, 3),
        }
    )
    print(f"{name:48}{timing.us:10.1f} us" + (f"{share:8.2f}" if share else ""), flush=True)


if __name__ == "__main__":
    main()
