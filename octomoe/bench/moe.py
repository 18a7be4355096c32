"""Time layers of experts beside other people's kernels, on the same inputs, and check them all.

Contenders take turns, in CUDA graphs, L2 flushed before each replay. Before they are timed, each
runs in memory that holds NaN, and some tokens of its output are compared with float32 arithmetic
on the same quantised rows; ours are compared with the reference too. Of a peer that does not run
or is wrong, the reason is recorded in place of a time.

The floor is what the device allows: each active expert's weights read once, or the multiplications
done, whichever takes longer. `read` is a kernel that reads those weights and nothing else.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch

from octomoe import ExpertWeights
from octomoe.bench.check import errors_of, poisoned, snr_of
from octomoe.bench.contender import Contender, Peer
from octomoe.bench.layers import (
    RECIPES,
    SHAPES,
    Mode,
    Problem,
    Shape,
    Skew,
    choices_of,
    make_experts,
    make_problem,
    work_of,
)
from octomoe.bench.ours import kernel_contenders, layer_contenders, run_config
from octomoe.bench.peers.find import Found
from octomoe.bench.read import read_contenders
from octomoe.bench.records import about, microseconds
from octomoe.core.device import Target
from octomoe.tune.kinds import Config
from octomoe.tune.timing import Timing, time_graphs

TOKENS: Final = (1, 8, 32, 128, 512, 2048, 8192)
# Measured: bytes read per second (TB), and dense FP8 GEMM rounded up (TFLOP/s).
CEILINGS: Final = {"NVIDIA H200": (4.3, 1500.0)}


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        shapes: by name.
        tokens: how many, one after the other.
        recipe: of `RECIPES`.
        modes, skews: every combination of them.
        repeats: replays of each contender.
        command, commit: as they are recorded.
    """

    shapes: dict[str, Shape] = field(default_factory=lambda: dict(SHAPES))
    tokens: Sequence[int] = TOKENS
    recipe: str = "block128"
    modes: Sequence[Mode] = tuple(Mode)
    skews: Sequence[Skew] = tuple(Skew)
    repeats: int = 20
    command: str = "octomoe bench moe"
    commit: str | None = None


def bench(
    plan: Plan,
    found: Found,
    *,
    on_result: Callable[[dict[str, Any], dict[str, Any]], None],
    on_record: Callable[[dict[str, Any]], None],
    device: str = "cuda",
) -> None:
    """Measure all of a plan.

    Args:
        plan: what.
        found: beside whom.
        on_result: is told of each measurement, after the record that it belongs to.
        on_record: is given each layer's record under a mode and a skew, once it is complete.
        device: where.

    Raises:
        AssertionError: an output of ours is wrong; what was measured before is recorded.
    """
    for name, shape in plan.shapes.items():
        torch.manual_seed(0)
        experts = make_experts(shape, device, RECIPES[plan.recipe])
        for mode in plan.modes:
            for skew in plan.skews:
                record = _record(plan, found, name, mode, skew)
                try:
                    for result in _results(plan, found.peers, shape, experts, mode, skew):
                        record["results"].append(result)
                        on_result(record, result)
                finally:
                    on_record(record)


def _record(plan: Plan, found: Found, name: str, mode: Mode, skew: Skew) -> dict[str, Any]:
    """What is known before anything was measured."""
    record = about(plan.command, plan.commit)
    record["versions"] |= {peer.name: peer.version for peer in found.peers}
    return {
        **record,
        "repeats": plan.repeats,
        "ceilings": CEILINGS.get(record["device"]),
        "layer": name,
        "shape": asdict(plan.shapes[name]),
        "format": plan.recipe,
        "mode": str(mode),
        "routing": str(skew),
        "missing": found.missing,
        "results": [],
    }


def _results(
    plan: Plan, peers: list[Peer], shape: Shape, experts: ExpertWeights, mode: Mode, skew: Skew
) -> Iterable[dict[str, Any]]:
    for num_tokens in plan.tokens:
        # The same rows and choices, whatever else is measured.
        torch.manual_seed(num_tokens)
        problem = make_problem(shape, experts, num_tokens, RECIPES[plan.recipe], skew)
        yield measure(problem, peers, mode=mode, repeats=plan.repeats)


def measure(
    problem: Problem, peers: Sequence[Peer], *, mode: Mode = Mode.KERNEL, repeats: int = 20
) -> dict[str, Any]:
    """Check and time all contenders.

    Raises:
        AssertionError: an output of ours is wrong.
    """
    with poisoned():
        ours = kernel_contenders(problem) if mode is Mode.KERNEL else layer_contenders(problem)
        outputs = {name: contender.run() for name, contender in ours.items()}
    errors, snrs = errors_of(problem, outputs), snr_of(problem, outputs)
    del outputs
    theirs: dict[str, Contender] = {}
    missing = {}
    for peer in peers:
        try:
            theirs |= _checked(peer, problem, mode, errors)
        except _Refused as reason:
            missing[peer.name] = str(reason)
    reads = read_contenders(problem)
    contenders = ours | theirs | reads
    if mode is Mode.LAYER:
        contenders["router"] = Contender(lambda: choices_of(problem)[0])
    timings = time_graphs({name: c.run for name, c in contenders.items()}, repeats=repeats)
    fastest = min(reads, key=lambda name: timings[name].us)
    work, ceilings = work_of(problem, mode), _ceilings(problem)
    floor_us = None if ceilings is None else work.floor_us(*ceilings)
    runs = {}
    for name, contender in contenders.items():
        if name in reads and name != fastest:
            continue
        runs["read" if name == fastest else name] = {
            **microseconds(timings[name]),
            "share": None if floor_us is None else round(floor_us / timings[name].us, 3),
            "error": errors.get(name),
            "snr_db": snrs.get(name),
            "config": contender.config,
            "borrowed": contender.borrowed,
        }
    return {
        "tokens": problem.num_tokens,
        **asdict(work),
        "floor_us": None if floor_us is None else round(floor_us, 1),
        "runs": runs,
        "missing": missing,
    }


def time_config(problem: Problem, config: Config, *, repeats: int = 20) -> Timing:
    """Check and time our kernels under one configuration, from quantised rows on.

    Raises:
        AssertionError: the output is wrong.
    """
    with poisoned():
        run = run_config(problem, config)
        outputs = {"octomoe": run()}
    errors_of(problem, outputs)
    snr_of(problem, outputs)
    return time_graphs({"octomoe": run}, repeats=repeats)["octomoe"]


class _Refused(Exception):
    """Why a peer has no time."""


def _checked(
    peer: Peer, problem: Problem, mode: Mode, errors: dict[str, float]
) -> dict[str, Contender]:
    """A peer's contenders, after each has run, alone in a graph too; adds how exact they are.

    Raises:
        _Refused: it does not do this, it does not run, or it is wrong.
    """
    reason = peer.why_not(problem, mode)
    if reason is not None:
        raise _Refused(reason)
    try:
        with poisoned():
            build = peer.kernel if mode is Mode.KERNEL else peer.layer
            contenders = build(problem)
            # Some write to the same memory again.
            outputs = {name: contender.run().clone() for name, contender in contenders.items()}
        errors |= errors_of(problem, outputs)
        time_graphs({name: c.run for name, c in contenders.items()}, repeats=1)
    # Whatever goes wrong in someone else's code shall be said, not end everything.
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise _Refused(f"{type(error).__name__}: {lines[0]}") from error
    return contenders


def _ceilings(problem: Problem) -> tuple[float, float] | None:
    ceilings = CEILINGS.get(Target.of(problem.hidden_TD.device).name)
    if ceilings is None or problem.recipe.activations is not None:
        return ceilings
    # Tensor cores take twice as long for bf16.
    return ceilings[0], ceilings[1] / 2
