"""`octomoe convert`: write a checkpoint's experts in 8 bits, as an engine reads them."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from octomoe.checkpoint.convert import Conversion, convert_checkpoint
from octomoe.checkpoint.destination import check_destination, ranks
from octomoe.checkpoint.options import ExpertScale, Options
from octomoe.checkpoint.schemes import TARGETS
from octomoe.checkpoint.source import Checkpoint
from octomoe.cli.comparison import check_report, plain_json
from octomoe.cli.plan_tables import FATES, print_plan
from octomoe.cli.verify import make_report, print_verification, verify_with_progress
from octomoe.errors import refusal
from octomoe.evaluate.conversion_report import write_conversion_report

_UNITS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
# Targets that `vllm serve` does not read.
_NOT_SERVED: Final = ("hf-fp8-tensor", "neuron", "octomoe")
_AVERAGED: Final = (
    "WARNING: --expert-scale averaged-legacy reproduces a known mistake: scales are averaged over "
    "experts, bytes are not, so that every expert is wrong by its own factor. The result is only "
    "good to compare with."
)


def _parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB``, ``500MB`` or ``4GiB``."""
    match = _SIZE.fullmatch(text.strip())
    num_bytes = 0
    if match:
        base = 1024 if match[3] else 1000
        num_bytes = int(float(match[1]) * base ** _UNITS[match[2].lower()])
    if num_bytes < 1:
        needs = "a size such as 5GB, 500MB or 4GiB"
        raise ValueError(refusal("convert", "--shard-size", f"is {text!r}", needs))
    return num_bytes


_Experts = typer.Option(
    "--experts-only/--all-linears",
    help="Quantise the experts alone, or attention and dense MLPs too.",
    rich_help_panel="What",
)


def convert(
    src: Annotated[str, typer.Argument(help="The checkpoint: folder, .safetensors file or URL.")],
    dst: Annotated[Path, typer.Argument(help="A new folder.")],
    target: Annotated[str, typer.Option(help=f"Who reads it: {', '.join(TARGETS)}.")],
    weights: Annotated[
        str, typer.Option(help="Weight format, for the target octomoe.", rich_help_panel="How")
    ] = "",
    weights_scale: Annotated[
        str, typer.Option(help="auto, exact or pow2.", rich_help_panel="How")
    ] = "auto",
    search: Annotated[
        str,
        typer.Option(
            help="none, or mse: search each scale for the least squared error (slow).",
            rich_help_panel="How",
        ),
    ] = "none",
    experts_only: Annotated[bool, _Experts] = True,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Glob pattern of modules to leave alone.", rich_help_panel="What"),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Glob pattern of the only modules to quantise.", rich_help_panel="What"),
    ] = None,
    modules_to_not_convert: Annotated[
        list[str] | None,
        typer.Option(
            help="Part of the name of modules to leave alone (layers.1 is layers.10 too).",
            rich_help_panel="What",
        ),
    ] = None,
    expert_scale: Annotated[
        str | None,
        typer.Option(
            help="wise: each expert its own (default, unless the model's config says otherwise); "
            "shared: the largest for all; averaged-legacy: a known mistake.",
            rich_help_panel="How",
        ),
    ] = None,
    expert_wise_scale: Annotated[
        bool,
        typer.Option(
            "--expert-wise-scale", help="Short for --expert-scale wise.", rich_help_panel="How"
        ),
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text to measure static activation scales on.", rich_help_panel="How"
        ),
    ] = None,
    calibrate_tokens: Annotated[
        int, typer.Option(help="Tokens of it to use.", min=1, rich_help_panel="How")
    ] = 8192,
    allow_requantize: Annotated[
        bool,
        typer.Option(
            "--allow-requantize", help="Accept a lossy second quantisation.", rich_help_panel="How"
        ),
    ] = False,
    pad_intermediate: Annotated[
        int,
        typer.Option(
            help="Pad the experts' width with zeros to a multiple (fused targets).",
            rich_help_panel="How",
        ),
    ] = 1,
    shard_size: Annotated[str, typer.Option(help="Largest file, e.g. 5GB or 500MB.")] = "5GB",
    family_file: Annotated[
        Path | None, typer.Option(help="Further model families, in the form of families.toml.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Threads; by default one per core.", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="Where to quantise.")] = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and write nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished conversion.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Read the result again and hold it against the source.")
    ] = True,
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML report of the verification to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Write a checkpoint's experts in 8 bits, as an engine reads them.

    Exit code 1 if the result does not hold against the source.
    """
    _check(report, verify=verify)
    console = Console(stderr=True)
    scale = _expert_scale(expert_scale, is_wise=expert_wise_scale)
    asked: dict[str, Any] = {
        "target": target,
        "weights": weights,
        "weights_scale": weights_scale,
        "search": search,
        "all_linears": not experts_only,
        "keep": tuple(keep or ()),
        "include": tuple(include or ()),
        "modules_to_not_convert": tuple(modules_to_not_convert or ()),
        "expert_scale": scale,
        "allow_requantize": allow_requantize,
        "pad_intermediate": pad_intermediate,
        "shard_bytes": _parse_size(shard_size),
        "device": device,
    }
    if scale == ExpertScale.AVERAGED_LEGACY:
        console.print(_AVERAGED, style="bold red")
    if ranks()[0] == 0:
        check_destination(dst, resume=resume)
    if calibrate is not None:
        # What the options alone forbid is refused before the model is loaded.
        Options(**asked, input_scales={0: {}})
        # Here, not above: it takes a second to import, and most conversions do without.
        from octomoe.cli.calibrate import calibrate_checkpoint

        scales = calibrate_checkpoint(src, calibrate, calibrate_tokens, family_file=family_file)
        asked["input_scales"] = scales
    if dry_run:
        planned = convert_checkpoint(src, dst, family_file=family_file, dry_run=True, **asked)
        if as_json:
            typer.echo(json.dumps(plain_json(asdict(planned)), indent=2))
        print_plan(console, src, family_file, asked)
        return
    started = perf_counter()
    done = _convert(console, src, dst, family_file, workers, asked, resume=resume)
    seconds = perf_counter() - started
    if ranks()[0] > 0:
        return
    if verify:
        found = verify_with_progress(console, str(dst), src, family_file, workers)
        done = replace(done, verification=found)
    if as_json:
        typer.echo(json.dumps(plain_json({**asdict(done), "seconds": seconds}), indent=2))
    source_bytes = sum(entry.num_bytes for entry in Checkpoint(src).tensors.values())
    facts = summary(done, source_bytes, seconds)
    _print(console, done, facts, src, dst, scale)
    if report is not None and done.verification is not None:
        page = make_report(done.verification, source=src, destination=str(dst), facts=facts)
        write_conversion_report(page, report)
        console.print(f"Report: {escape(str(report.resolve()))}", soft_wrap=True)
    is_sound = done.verification is None or done.verification.is_sound
    if not is_sound and scale != ExpertScale.AVERAGED_LEGACY:
        raise typer.Exit(1)


def summary(done: Conversion, source_bytes: int, seconds: float) -> dict[str, str]:
    """What a conversion did, label by label."""
    experts = f"{done.num_layers} layers × {done.num_experts} experts of {done.family}"
    if done.num_linears:
        experts += f", {done.num_linears:,} other linears"
    ratio = source_bytes / max(done.written_bytes, 1)
    sizes = f"{decimal(source_bytes)} became {decimal(done.written_bytes)} ({ratio:.2f}:1)"
    files = f"{len(done.shards)} file{'' if len(done.shards) == 1 else 's'}"
    facts = {
        "converted": experts,
        "format": f"{done.weights} weights, {done.activations} activations, for {done.target}",
        "size": f"{sizes} in {files}",
    }
    if done.was_complete:
        facts["time"] = "it was complete already: nothing was written"
    else:
        rate = done.read_bytes / max(seconds, 1e-9) / 1e9
        facts["time"] = f"{seconds:.1f} s for {decimal(done.read_bytes)} read, {rate:.2f} GB/s"
    fates = [f"{n:,} {FATES[how]}" for how, n in done.outcome.weights.items()]
    if fates:
        facts["matrices"] = ", ".join(fates)
    if done.outcome.num_values:
        changed, total = done.outcome.num_changed, done.outcome.num_values
        facts["changed"] = f"{changed:,} of {total:,} values of the quantised source"
    facts["passed on"] = f"{done.num_copied:,} tensors byte by byte"
    facts["unquantised"] = f"{len(done.ignored):,} linear modules, named in the config"
    return facts


def _expert_scale(stated: str | None, *, is_wise: bool) -> str:
    if is_wise and stated not in (None, ExpertScale.WISE):
        needs = "one of the two, as --expert-wise-scale means wise"
        raise ValueError(refusal("convert", "--expert-scale", f"is {stated!r}", needs))
    return ExpertScale.WISE if is_wise else stated or ExpertScale.AUTO


def _check(report: Path | None, *, verify: bool) -> None:
    """Refuse what would fail after the work."""
    if report is not None:
        check_report("convert", report)
        if not verify:
            needs = "the verification that it shows"
            raise ValueError(refusal("convert", "--report", "comes with --no-verify", needs))


def _convert(
    console: Console,
    src: str,
    dst: Path,
    family_file: Path | None,
    workers: int | None,
    asked: dict[str, Any],
    *,
    resume: bool,
) -> Conversion:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("converting", total=None)
        return convert_checkpoint(
            src,
            dst,
            family_file=family_file,
            workers=workers,
            resume=resume,
            verify=False,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            **asked,
        )


def _print(
    console: Console, done: Conversion, facts: dict[str, str], src: str, dst: Path, scale: str
) -> None:
    width = max(map(len, facts))
    for label, text in facts.items():
        console.print(f"[bold]{label:{width}}[/]  {escape(text)}")
    if done.verification is not None:
        print_verification(console, done.verification)
        if not done.verification.is_sound and scale == ExpertScale.AVERAGED_LEGACY:
            console.print("These problems are what averaged scales do; they are expected.")
    command = f"octomoe eval {dst} --against {src} --text FILE"
    if scale != ExpertScale.AVERAGED_LEGACY and done.target not in _NOT_SERVED:
        command = f"vllm serve {dst}"
    console.print(f"Next: [bold]{escape(command)}[/]", soft_wrap=True)
