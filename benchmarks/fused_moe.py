"""Time a layer of block-scaled FP8 experts, beside SGLang's Triton kernels.

PYTHONPATH=. python benchmarks/fused_moe.py [--sglang FOLDER] [--shapes DSV ...] [--tokens 8 ...]

FOLDER is made by benchmarks/peers/sglang.py. Layers, tokens and what must come out are those of
benchmarks/layers.py. Contenders take turns, in CUDA graphs, L2 flushed before each replay:

    sglang       from quantised rows to the sum over experts, under its tuned configurations
    octomoe      the same region, on the kernels that the public op takes on this device
    portable     the same region on the portable kernels, where the op takes others
    octomoe op   `octomoe.fused_moe`: bf16 rows are quantised and routed too

Before they are timed, each runs in memory that holds NaN, and 16 tokens of its output are compared
with float32 arithmetic on the same quantised rows. The floor is what the device allows: each active
expert's weights read once, or the multiplications done, whichever takes longer.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.layers import (
    SCALING,
    SHAPES,
    Problem,
    by_reference,
    in_float32,
    make_experts,
    make_problem,
    relative_error,
    some_tokens,
    work_of,
)
from benchmarks.peers import sglang
from benchmarks.records import about, append, results_file
from octomoe import FP8_GROUP128, fused_moe
from octomoe.core.device import Target
from octomoe.kernels import fused_moe as portable
from octomoe.kernels import fused_moe_sm90 as sm90
from octomoe.kernels.build_routing import build_blocks
from octomoe.tune.configs import FusedMoeConfig, PrefillConfig
from octomoe.tune.fused_moe import prefill_config
from octomoe.tune.timing import Timing, time_graphs

TOKENS: Final = (1, 8, 32, 128, 512, 2048, 8192)
# Measured: bytes read per second (TB), and dense FP8 GEMM rounded up (TFLOP/s).
CEILINGS: Final = {"NVIDIA H200": (4.3, 1500.0)}
# How far an output may be from float32, whose intermediate is not quantised, and, in dB, ours from
# the reference, whose intermediate is.
MAX_ERROR: Final = 0.03
MIN_SNR_DB: Final = 40.0
# Of the printed table, with digits behind the point.
COLUMNS: Final = {
    "tokens": 0,
    "floor us": 1,
    "sglang": 1,
    "octomoe": 1,
    "times": 2,
    "portable": 1,
    "whole op": 1,
    "err peer": 4,
    "err ours": 4,
    "SNR dB": 1,
}


def octomoe_layer(
    problem: Problem, config: FusedMoeConfig | PrefillConfig | None = None
) -> Callable[[], Tensor]:
    """From quantised rows to the sum over experts; `config` in place of the one looked up."""
    config = config or looked_up(problem)
    experts = problem.experts
    routing, expert_of_block = build_blocks(
        problem.topk_ids_TA, experts.num_experts, align=config.rows
    )
    arguments: tuple[Any, ...] = (
        problem.x,
        experts,
        problem.topk_weights_TA,
        routing,
        expert_of_block,
    )
    options: dict[str, Any] = {
        "out_dtype": problem.hidden_TD.dtype,
        "routed_scaling_factor": SCALING,
        "config": config,
    }
    if isinstance(config, PrefillConfig):
        return partial(sm90.experts_forward, *arguments, **options)
    options["activation_format"] = FP8_GROUP128
    return partial(portable.experts_forward, *arguments, **options)


def looked_up(problem: Problem) -> FusedMoeConfig | PrefillConfig:
    """What the public op runs with."""
    num_tokens, num_choices = problem.topk_ids_TA.shape
    target = Target.of(problem.hidden_TD.device)
    config = prefill_config(num_tokens, num_choices, problem.experts.num_experts, target)
    return config or portable_config(problem)


def portable_config(problem: Problem) -> FusedMoeConfig:
    """What it runs with where only the portable kernels do."""
    num_choices = problem.topk_ids_TA.shape[1]
    return portable.config_of(problem.hidden_TD, problem.experts, num_choices, FP8_GROUP128)


def octomoe_op(problem: Problem) -> Callable[[], Tensor]:
    """The public op."""
    return partial(
        fused_moe,
        problem.hidden_TD,
        problem.experts,
        problem.topk_weights_TA,
        problem.topk_ids_TA,
        activation_format=FP8_GROUP128,
        routed_scaling_factor=SCALING,
        backend="auto" if problem.hidden_TD.is_cuda else "triton",
    )


def sglang_layer(
    problem: Problem, peer: sglang.Peer, config: sglang.LayerConfig
) -> Callable[[], Tensor]:
    """The peer, from quantised rows on."""
    return sglang.fused_experts(
        peer,
        config,
        problem.x,
        problem.experts,
        problem.topk_weights_TA,
        problem.topk_ids_TA,
        SCALING,
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory allocated meanwhile is full of NaN, so that what nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def errors_of(problem: Problem, outputs: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """How far each contender's output is from float32, and ours from the reference.

    Raises:
        AssertionError: one is too far, or not finite somewhere.
    """
    tokens = some_tokens(problem)
    expected_TD, reference_TD = in_float32(problem, tokens), by_reference(problem, tokens)
    errors = {}
    for name, y_TD in outputs.items():
        assert y_TD.isfinite().all(), f"{name}: not all of the output is finite"
        error = relative_error(y_TD[tokens], expected_TD)
        assert error <= MAX_ERROR, f"{name}: relative error {error:.4f}"
        errors[name] = {"error": round(error, 4)}
        if name != "sglang":
            snr_db = -20 * math.log10(max(relative_error(y_TD[tokens], reference_TD), 1e-12))
            assert snr_db > MIN_SNR_DB, f"{name}: {snr_db:.1f} dB from the reference"
            errors[name]["snr_db"] = round(snr_db, 1)
    return errors


def time_config(
    problem: Problem, config: FusedMoeConfig | PrefillConfig, *, repeats: int = 20
) -> Timing:
    """Check and time our kernels under one configuration, for those who search for the best."""
    with poisoned():
        run = octomoe_layer(problem, config)
        output = run()
    errors_of(problem, {"octomoe": output})
    return time_graphs({"octomoe": run}, repeats=repeats)["octomoe"]


def measure(problem: Problem, peer: sglang.Peer | None, *, repeats: int) -> dict[str, Any]:
    """Check and time all contenders."""
    experts, device = problem.experts, problem.hidden_TD.device
    configs: dict[str, Any] = {"octomoe": asdict(looked_up(problem))}
    with poisoned():
        runs: dict[str, Callable[[], Any]] = {
            "octomoe": octomoe_layer(problem),
            "octomoe op": octomoe_op(problem),
        }
        if isinstance(looked_up(problem), PrefillConfig):
            configs["portable"] = asdict(portable_config(problem))
            runs["portable"] = octomoe_layer(problem, portable_config(problem))
        if peer is not None:
            name = Target.of(device).name
            sizes = experts.num_experts, experts.intermediate_size, problem.num_tokens
            config = sglang.choose_config(peer, *sizes, device=name)
            configs["sglang"] = asdict(config)
            runs["sglang"] = sglang_layer(problem, peer, config)
        outputs = {name: run() for name, run in runs.items()}
    errors = errors_of(problem, outputs)
    del outputs
    timings = time_graphs(runs, repeats=repeats)
    work, ceiling = work_of(problem), CEILINGS.get(Target.of(device).name)
    return {
        "tokens": problem.num_tokens,
        **asdict(work),
        "floor_us": None if ceiling is None else round(work.floor_us(*ceiling), 1),
        "runs": {
            name: {
                "us": round(timing.us, 1),
                "fastest": round(timing.fastest, 1),
                "slowest": round(timing.slowest, 1),
                **errors[name],
                "config": configs.get(name),
            }
            for name, timing in timings.items()
        },
    }


def ratio(result: dict[str, Any]) -> float | None:
    """How many times faster than SGLang we are in the same region."""
    runs = result["runs"]
    return runs["sglang"]["us"] / runs["octomoe"]["us"] if "sglang" in runs else None


def row(name: str, result: dict[str, Any]) -> str:
    """A line of the printed table."""
    runs = result["runs"]
    peer, ours = runs.get("sglang", {}), runs["octomoe"]
    cells: tuple[Any, ...] = (
        result["tokens"],
        result["floor_us"],
        peer.get("us"),
        ours["us"],
        ratio(result),
        runs.get("portable", ours)["us"],
        runs["octomoe op"]["us"],
        peer.get("error"),
        ours["error"],
        ours["snr_db"],
    )
    pairs = zip(cells, COLUMNS.values(), strict=True)
    texts = ["-" if cell is None else f"{cell:.{digits}f}" for cell, digits in pairs]
    return f"{name:6}" + "".join(f"{text:>10}" for text in texts)


def main() -> int:
    """Check, time, print, append."""
    options = parse()
    if not torch.cuda.is_available():
        print("fused_moe: no CUDA device; this benchmark times GPU kernels", file=sys.stderr)
        return 2
    peer = None if options.sglang is None else sglang.load(options.sglang)
    if peer is None:
        print("sglang is missing: give --sglang, a folder made by benchmarks/peers/sglang.py")
    device = Target.of("cuda").name
    out = options.out or results_file("fused_moe")
    print("layer ", *(f"{column:>10}" for column in COLUMNS), sep="", flush=True)
    ratios: list[float] = []
    for name in options.shapes:
        torch.manual_seed(0)
        experts = make_experts(SHAPES[name], "cuda")
        results = []
        try:
            for num_tokens in options.tokens:
                # The same rows and routing, whatever else is measured.
                torch.manual_seed(num_tokens)
                problem = make_problem(SHAPES[name], experts, num_tokens)
                results.append(measure(problem, peer, repeats=options.repeats))
                print(row(name, results[-1]), flush=True)
        finally:
            # What was measured is kept: a later output may be wrong.
            append(out, record_of(name, results, peer, device, options))
        if peer is not None:
            # It holds on to weights that it has seen.
            peer.kernels.clear_b_tma_desc_cache()
            ratios += [ratio(result) or 0.0 for result in results]
    if ratios:
        print(f"times as fast as sglang: least {min(ratios):.3f}")
        print(f"times as fast as sglang: geometric mean {geometric_mean(ratios):.3f}")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sglang", type=Path, help="folder made by benchmarks/peers/sglang.py")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON lines file to append records to")
    parser.add_argument("--commit", help="of the code, where it does not run in its clone")
    return parser.parse_args()


def record_of(
    name: str,
    results: list[dict[str, Any]],
    peer: sglang.Peer | None,
    device: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What was measured of one shape, with all that is needed to do so again."""
    command = "python benchmarks/fused_moe.py" + (" --sglang FOLDER" if peer else "")
    record = about(command, options.commit)
    if peer is not None:
        record["versions"]["sglang"] = peer.version
    return {
        **record,
        "repeats": options.repeats,
        "ceilings": CEILINGS.get(device),
        "layer": name,
        "shape": asdict(SHAPES[name]),
        "results": results,
    }


if __name__ == "__main__":
    sys.exit(main())
