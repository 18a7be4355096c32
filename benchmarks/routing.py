"""Time `build_routing`, beside TransformerEngine's row-id map, and what moves rows by a routing.

PYTHONPATH=. python benchmarks/routing.py [--te FILE] [--try OP:FIELD=VALUE,... ...]
    [--part ...] [--tokens ...]

FILE is a checkout's ``transformer_engine/pytorch/triton/permutation.py``; benchmarks/peers has what
is read of it, and the version that was tried. `--try` times an op under other fields of its
configuration too, for those who search for the best: ``build_routing:choices=128,rounds=1``.

Parts: `build_routing` for 1 to 131072 tokens, 8 of 256 experts each; `permute` of MXFP8 rows with
scale-major scales; `masks`, rows moved by a mask of 64 experts beside the same rows moved by ids.
Every output is compared with the reference in the same run; a wrong one is not timed, and the exit
code is then 1. CUDA graphs, L2 flushed before each replay, contenders taking turns.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.peers import transformer_engine
from benchmarks.records import has_same_bits, results_file
from octomoe import GEMM_READY, MXFP8, Routing, build_routing, permute, quantize, unpermute
from octomoe import unpermute_bwd as unpermute_bwd_op
from octomoe.bench.records import about, append, microseconds
from octomoe.core.device import target_of
from octomoe.core.routing import routing_of_slots, slots_of_ids, slots_of_mask
from octomoe.kernels import build_routing as build_routing_kernel
from octomoe.kernels import permute as permute_kernel
from octomoe.kernels import unpermute_bwd as unpermute_bwd_kernel
from octomoe.tune.lookup import permute_config, routing_config, unpermute_bwd_config
from octomoe.tune.timing import time_graphs

PARTS: Final = ("build_routing", "permute", "masks")
NUM_CHOICES: Final = 8


@dataclass(frozen=True, eq=False)
class Problem:
    """What contenders do alike.

    Attributes:
        op: whose configuration it is.
        name: of the problem, with its sizes.
        runs: contenders by name.
        is_right: whether a contender's result is.
        configured: run under a configuration, and the one looked up; None for a comparison.
        num_bytes: that must move.
    """

    op: str
    name: str
    runs: dict[str, Callable[[], Any]]
    is_right: Callable[[Any], bool]
    configured: tuple[Callable[..., Any], Any] | None = None
    num_bytes: int = 0
    configs: dict[str, Any] = field(default_factory=dict)


def routing_problem(
    num_tokens: int, num_experts: int, peer: transformer_engine.Peer | None, device: str = "cuda"
) -> Problem:
    """Ids to a routing; the peer has a mask of the same choices."""
    ids_TA = choose(num_tokens, num_experts, device).int()
    expected = build_routing(ids_TA, num_experts, backend="reference")
    mask_TE = mask_of(ids_TA, num_experts)
    slots_TE = slots_of_mask(mask_TE)

    def is_right(result: Routing | Tensor) -> bool:
        if isinstance(result, Routing):
            return has_same_bits(result, expected)
        return torch.equal(transformer_engine.slots_of_row_id_map(result), slots_TE.long())

    runs: dict[str, Callable[[], Any]] = {
        "octomoe": partial(build_routing, ids_TA, num_experts, backend="triton")
    }
    if peer is not None:
        runs["transformer_engine"] = partial(transformer_engine.row_id_map, peer, mask_TE)
    count = ids_TA.numel()
    config = routing_config(count, num_experts, count, target_of(ids_TA.device))
    run = partial(build_routing_kernel.build_routing, ids_TA, num_experts)
    name = f"build_routing T={num_tokens} A={NUM_CHOICES} E={num_experts}"
    return Problem("build_routing", name, runs, is_right, (run, config))


def permute_problem(num_tokens: int, num_experts: int, width: int, device: str = "cuda") -> Problem:
    """MXFP8 rows with scale-major scales, before and after."""
    routing = build_routing(choose(num_tokens, num_experts, device), num_experts)
    x = quantize(torch.randn(num_tokens, width, device=device), MXFP8, layout=GEMM_READY)
    expected = permute(x, routing, backend="reference")
    config = permute_config(width, 1, width // 32, NUM_CHOICES)
    return Problem(
        "permute",
        f"permute mxfp8 gemm_ready T={num_tokens} A={NUM_CHOICES} D={width}",
        {"octomoe": partial(permute, x, routing, backend="triton")},
        lambda result: has_same_bits(result, expected),
        (partial(permute_kernel.permute, x, routing), config),
        (1 + NUM_CHOICES) * x.num_bytes,
    )


def mask_problems(
    num_tokens: int,
    num_experts: int,
    width: int,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Problem]:
    """Rows moved by ids and by a mask of the same choices."""
    # In the order of the experts, in which a mask has them: sums are then the same.
    ids_TA = choose(num_tokens, num_experts, device).sort(dim=1).values
    num_slots = ids_TA.numel()
    by_ids = routing_of_slots(slots_of_ids(ids_TA), num_slots)
    by_mask = routing_of_slots(slots_of_mask(mask_of(ids_TA, num_experts)), num_slots)
    weights_TA = torch.rand(ids_TA.shape, device=device)
    weights_TE = torch.zeros(num_tokens, num_experts, device=device).scatter(1, ids_TA, weights_TA)
    weights = {"octomoe by ids": (by_ids, weights_TA), "octomoe by mask": (by_mask, weights_TE)}
    x_TD = torch.randn(num_tokens, width, device=device, dtype=dtype)
    y_SD = torch.randn(num_slots, width, device=device, dtype=dtype)
    sizes = f"{str(dtype)[6:]} T={num_tokens} A={NUM_CHOICES} E={num_experts} D={width}"
    num_bytes = x_TD.nbytes + y_SD.nbytes

    def problem(op: str, run: Callable[..., Any], is_right: Callable[[Any], bool]) -> Problem:
        runs: dict[str, Callable[[], Any]] = {
            name: partial(run, *inputs) for name, inputs in weights.items()
        }
        return Problem(op, f"{op} {sizes}", runs, is_right, None, num_bytes)

    permuted_SD = permute(x_TD, by_ids, backend="reference")
    yield problem(
        "permute",
        lambda routing, _: permute(x_TD, routing, backend="triton"),
        lambda result: has_same_bits(result, permuted_SD),
    )
    sums_TD = unpermute(y_SD, by_ids, weights_TA, backend="reference")
    yield problem(
        "unpermute",
        lambda routing, weights: unpermute(y_SD, routing, weights, backend="triton"),
        lambda result: has_same_bits(result, sums_TD),
    )
    dy_SD, dweights_TA = unpermute_bwd_op(x_TD, y_SD, by_ids, weights_TA, backend="reference")

    def is_gradient(result: tuple[Tensor, Tensor]) -> bool:
        slots, found = result
        if found.shape[1] == num_experts:
            found = found.gather(1, ids_TA)
        # Of float32 sums of `width` products, which roundings move like a random walk.
        error = 8 * width**0.5 * 2.0**-24 * dweights_TA.square().mean().sqrt()
        return has_same_bits(slots, dy_SD) and bool(((found - dweights_TA).abs() <= error).all())

    gradients = problem(
        "unpermute_bwd",
        lambda routing, weights: unpermute_bwd_op(x_TD, y_SD, routing, weights, backend="triton"),
        is_gradient,
    )
    run = partial(unpermute_bwd_kernel.unpermute_bwd, x_TD, y_SD, by_ids, weights_TA)
    yield replace(
        gradients,
        configured=(run, unpermute_bwd_config(width)),
        num_bytes=num_bytes + y_SD.nbytes,
    )


def choose(num_tokens: int, num_experts: int, device: str) -> Tensor:
    """Distinct experts for every token."""
    return torch.rand(num_tokens, num_experts, device=device).topk(NUM_CHOICES, dim=1).indices


def mask_of(ids_TA: Tensor, num_experts: int) -> Tensor:
    """``[T, E]`` bool of the same choices."""
    mask_TE = torch.zeros(ids_TA.shape[0], num_experts, dtype=torch.bool, device=ids_TA.device)
    return mask_TE.scatter(1, ids_TA.long(), True)


def with_tries(problem: Problem, tries: list[tuple[str, dict[str, Any]]]) -> Problem:
    """The same problem, with a contender for every configuration that is to be tried."""
    if problem.configured is None:
        return problem
    run, default = problem.configured
    runs, configs = dict(problem.runs), {"octomoe": default}
    for op, fields in tries:
        if op == problem.op:
            name = ",".join(f"{key}={value}" for key, value in fields.items())
            configs[name] = replace(default, **fields)
            runs[name] = partial(run, config=configs[name])
    return replace(problem, runs=runs, configs={k: asdict(c) for k, c in configs.items()})


def measure(problem: Problem) -> dict[str, Any]:
    """Check all contenders, time those that are right, print."""
    right = {name: run for name, run in problem.runs.items() if problem.is_right(run())}
    timings = time_graphs(right) if right else {}
    results: dict[str, Any] = {}
    print(problem.name, flush=True)
    for name in problem.runs:
        results[name] = {"is_right": name in right, "config": problem.configs.get(name)}
        text = "wrong"
        if name in right:
            results[name] |= microseconds(timings[name])
            text = f"{timings[name].us:.2f} us"
            if problem.num_bytes:
                text += f"{problem.num_bytes / timings[name].us / 1e6:8.3f} TB/s"
        print(f"  {name:60}{text:>12}", flush=True)
    return {"name": problem.name, "bytes": problem.num_bytes, "runs": results}


def problems_of(
    parts: list[str], tokens: list[int], peer: transformer_engine.Peer | None
) -> Iterator[Problem]:
    """All that is to be measured, made when it is its turn."""
    if "build_routing" in parts:
        for num_tokens in tokens:
            yield routing_problem(num_tokens, 256, peer)
    if "permute" in parts:
        yield permute_problem(16384, 256, 7168)
    if "masks" in parts:
        yield from mask_problems(8192, 64, 7168)


def parse_try(text: str) -> tuple[str, dict[str, Any]]:
    """``op:field=number,...``; flags are 0 or 1.

    >>> parse_try("build_routing:choices=128,is_chained=0")
    ('build_routing', {'choices': 128, 'is_chained': False})
    """
    op, _, fields = text.partition(":")
    if op not in ("build_routing", "permute", "unpermute_bwd") or not fields:
        raise argparse.ArgumentTypeError(f"{text!r} is not OP:FIELD=VALUE,...")
    values = {name: int(value) for name, value in (item.split("=") for item in fields.split(","))}
    return op, {name: bool(v) if name.startswith("is_") else v for name, v in values.items()}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--te", type=Path, metavar="FILE", help="TransformerEngine's launchers")
    parser.add_argument("--try", dest="tries", type=parse_try, nargs="+", default=[])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128, 8192, 131072])
    parser.add_argument("--part", dest="parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="JSON lines file to append the record to")
    parser.add_argument("--commit", help="of the code, where it does not run in its clone")
    return parser.parse_args()


def main() -> int:
    """Check, time, print, append."""
    options = parse()
    if not torch.cuda.is_available():
        print("routing: no CUDA device; this benchmark times GPU kernels", file=sys.stderr)
        return 2
    peer = None if options.te is None else transformer_engine.load(options.te)
    if peer is None:
        print("transformer_engine is missing: give --te, a file of a checkout")
    torch.manual_seed(0)
    problems = problems_of(options.parts, options.tokens, peer)
    results = [measure(with_tries(problem, options.tries)) for problem in problems]
    command = "python benchmarks/routing.py" + (" --te FILE" if peer else "")
    record = about(command, options.commit)
    if peer is not None:
        record["versions"]["transformer_engine"] = f"sha256 {peer.digest}"
    append(options.out or results_file("routing"), record | {"results": results})
    return int(any(not run["is_right"] for result in results for run in result["runs"].values()))


if __name__ == "__main__":
    sys.exit(main())
