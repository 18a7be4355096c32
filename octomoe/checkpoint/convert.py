"""Convert a checkpoint: plan, then stream, then complete, then verify."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from octomoe.checkpoint.destination import (
    Destination,
    check_apart,
    check_destination,
    finished_outcome,
    is_complete,
    ranks,
    tidy,
)
from octomoe.checkpoint.jobs import Outcome
from octomoe.checkpoint.names import Role
from octomoe.checkpoint.neuron import experts_module, neuron_config
from octomoe.checkpoint.options import ExpertScale, Options
from octomoe.checkpoint.plan import Plan, make_plan
from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.schemes import (
    MODELOPT_CONFIG,
    NEURON_CONFIG,
    activations_of,
    modelopt_config,
)
from octomoe.checkpoint.source import Checkpoint
from octomoe.checkpoint.stream import default_workers, gather, write_shards
from octomoe.checkpoint.verify import Verification, verify_checkpoint
from octomoe.errors import refusal
from octomoe.version import VERSION

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did, or with ``dry_run`` would do.

    Attributes:
        target, family, weights, activations: names of target, family record and formats.
        num_layers, num_experts: experts layers quantised, and experts in each.
        num_linears: linear layers outside the experts quantised.
        num_copied: tensors that passed through byte by byte.
        ignored: linear modules that config.json names as not quantised.
        read_bytes, written_bytes: bytes of tensors.
        shards: names of the files.
        was_complete: whether ``resume`` found nothing left to do.
        outcome: what became of the weights; empty for a dry run.
        verification: what reading it again found; None if not asked for.
    """

    target: str
    family: str
    weights: str
    activations: str
    num_layers: int
    num_experts: int
    num_linears: int
    num_copied: int
    ignored: tuple[str, ...]
    read_bytes: int
    written_bytes: int
    shards: tuple[str, ...]
    was_complete: bool = False
    outcome: Outcome = field(default_factory=Outcome)
    verification: Verification | None = None


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    target: str,
    weights: str = "",
    weights_scale: str = "auto",
    search: str = "none",
    all_linears: bool = False,
    keep: Sequence[str] = (),
    include: Sequence[str] = (),
    modules_to_not_convert: Sequence[str] = (),
    expert_scale: str = "auto",
    input_scales: Mapping[int, Mapping[str, Sequence[float]]] | None = None,
    allow_requantize: bool = False,
    pad_intermediate: int = 1,
    shard_bytes: int = 5_000_000_000,
    family_file: str | Path | None = None,
    workers: int | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    resume: bool = False,
    verify: bool = True,
    on_progress: OnProgress = lambda done, total: None,
) -> Conversion:
    """Write a checkpoint's experts in 8 bits, as an engine reads them, streaming.

    Everything is planned and checked from headers, configs and scales before a byte is written.
    Memory holds one expert per worker. Equal sources and options give equal bytes. Processes that
    torchrun or Slurm start share the shards.

    Args:
        src: folder, ``.safetensors`` file, or URL that fsspec reads.
        dst: a new folder; an existing one that is not empty is refused.
        target: one of `octomoe.checkpoint.schemes.TARGETS`.
        weights: format of the target ``octomoe`` (e.g. ``"block128"``); others have their own.
        weights_scale: ``"exact"``, ``"pow2"``, or ``"auto"``: exact, except that a quantised source
            under power-of-two scales keeps such scales, which loses nothing.
        search: ``"mse"`` searches each scale for the least squared error (slow; +0.8 dB per
            channel on the small trained model, +0.1 per 128x128 block).
        all_linears: quantise attention and dense MLPs too, not only experts.
        keep: glob patterns of modules to leave as they are.
        include: if given, glob patterns of the only modules to quantise.
        modules_to_not_convert: substrings of names of modules to leave as they are.
        expert_scale: ``"auto"``: what ``expert_wise_scale`` in the model's config.json says, else
            ``"wise"``: each expert's own; ``"shared"``: the largest, requantised with;
            ``"averaged-legacy"``: own bytes under averaged scales, which is wrong.
        input_scales: static activation scales: layer number -> role ("gate", "up", "down") -> one
            per expert, as `octomoe.evaluate.calibrate` measures them.
        allow_requantize: accept a lossy double quantisation.
        pad_intermediate: pad the experts' width with zeros to a multiple (fused targets).
        shard_bytes: largest file.
        family_file: further family records, in the form of ``families.toml``.
        workers: threads; by default one per core.
        device: where to quantise.
        dry_run: plan only.
        resume: go on with an unfinished conversion into `dst`.
        verify: read the result again and check it against the source.
        on_progress: called with bytes read so far and in all, from worker threads.

    Returns:
        What was done, with the verification.

    Raises:
        ValueError: an option, the source or the family does not fit, or weights hold NaN or Inf.
        FileExistsError: `dst` is not empty.
        OSError: something cannot be read or written.
    """
    path, (rank, world_size) = Path(dst), ranks()
    check_apart(str(src), path)
    if rank == 0:
        check_destination(path, resume=resume)
    if workers is not None and workers < 1:
        needs = "at least one"
        raise ValueError(refusal("convert_checkpoint", "workers", f"is {workers}", needs))
    options = Options(
        target=target,
        weights=weights,
        weights_scale=weights_scale,
        search=search,
        all_linears=all_linears,
        keep=tuple(keep),
        include=tuple(include),
        modules_to_not_convert=tuple(modules_to_not_convert),
        expert_scale=expert_scale,
        input_scales=_by_role(input_scales or {}),
        allow_requantize=allow_requantize,
        pad_intermediate=pad_intermediate,
        shard_bytes=shard_bytes,
        device=device,
    )
    reader = Reader(Checkpoint(src), None if family_file is None else Path(family_file))
    plan = make_plan(reader, options)
    conversion = _describe(reader, plan)
    if dry_run:
        return conversion
    if resume and is_complete(path, plan.digest):
        tidy(path)
        conversion = replace(conversion, was_complete=True, outcome=finished_outcome(path))
    else:
        destination = Destination(path, plan, rank=rank, resume=resume)
        try:
            _write(plan, destination, rank, world_size, workers or default_workers(), on_progress)
        except BaseException as error:
            destination.fail(error)
            raise
        if rank == 0:
            destination.await_shards()
            outcome = destination.outcome()
            conversion = replace(conversion, outcome=outcome)
            destination.complete(
                reader.checkpoint, _side_files(reader, plan), _report(conversion, plan)
            )
    if verify and rank == 0:
        found = verify_checkpoint(dst, against=src, family_file=family_file, workers=workers)
        conversion = replace(conversion, verification=found)
    return conversion


def _write(
    plan: Plan,
    destination: Destination,
    rank: int,
    world_size: int,
    workers: int,
    on_progress: OnProgress,
) -> None:
    """Write this rank's shards that are not done yet."""
    lock, done = threading.Lock(), 0
    shards = [s for s in plan.shards[rank::world_size] if not destination.is_done(s)]
    gathers = [job for experts in plan.experts for job in experts.gather_jobs]
    total = sum(job.num_bytes for s in shards for group in s.groups for job in group.jobs)
    total += sum(job.num_bytes for job in gathers)

    def on_bytes(count: int) -> None:
        nonlocal done
        with lock:
            done += count
        on_progress(done, total)

    gather(gathers, workers, on_bytes)
    for experts in plan.experts:
        experts.settle()
    write_shards(shards, destination, workers, on_bytes)


def _by_role(
    scales: Mapping[int, Mapping[str, Sequence[float]]],
) -> dict[int, dict[Role, tuple[float, ...]]]:
    known = (Role.GATE, Role.UP, Role.DOWN)
    for layer, of_layer in scales.items():
        for role in of_layer:
            if role not in known:
                got = f"of layer {layer} are for {role!r}"
                needs = ", ".join(known)
                raise ValueError(refusal("convert_checkpoint", "input_scales", got, needs))
    return {
        layer: {Role(role): tuple(values) for role, values in of_layer.items()}
        for layer, of_layer in scales.items()
    }


def _describe(reader: Reader, plan: Plan) -> Conversion:
    options = plan.options
    activations = options.found_target.activations
    if options.weights:
        activations = activations_of(options.format)
    return Conversion(
        target=options.target,
        family=reader.family.name,
        weights=options.format.name,
        activations=activations.name,
        num_layers=len(plan.experts),
        num_experts=max((experts.num_experts for experts in plan.experts), default=0),
        num_linears=len(plan.linears),
        num_copied=len(plan.copied),
        ignored=plan.ignored,
        read_bytes=plan.read_bytes,
        written_bytes=plan.num_bytes,
        shards=tuple(shard.name for shard in plan.shards),
    )


def _side_files(reader: Reader, plan: Plan) -> dict[str, object]:
    options = plan.options
    if options.target == "modelopt-fp8":
        return {MODELOPT_CONFIG: modelopt_config(plan.ignored)}
    if options.target != "neuron":
        return {}
    quantized = [experts.layer for experts in plan.experts]
    modules = [experts_module(reader.family, layer) for layer in quantized]
    has_all = len(modules) == sum(not layer.is_mtp for layer in reader.layers)
    globs = ["*expert_mlps.mlp_op*"] if has_all else [f"*{module}*" for module in modules]
    padded = {(x.width, x.width - x.layer.intermediate_size) for x in plan.experts} or {(0, 0)}
    width, added = padded.pop()
    return {
        NEURON_CONFIG: neuron_config(
            is_wise=options.expert_scale == ExpertScale.WISE,
            kept=list(plan.ignored),
            padding=(width, added) if added else None,
            linears_beside=globs if plan.linears else None,
        )
    }


def _report(conversion: Conversion, plan: Plan) -> dict[str, object]:
    """What octomoe_conversion.json says: nothing that differs between equal conversions."""
    stated = asdict(conversion)
    del stated["verification"], stated["was_complete"]
    options = asdict(plan.options)
    del options["device"]
    return {"octomoe": VERSION, "digest": plan.digest, "options": options, **stated}
