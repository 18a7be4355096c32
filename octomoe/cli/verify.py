"""`octomoe verify`: hold a converted checkpoint against its source."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from statistics import median
from typing import Annotated, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from octomoe.checkpoint.verify import ProjectionQuality, Verification, verify_checkpoint
from octomoe.cli.comparison import check_report, plain_json
from octomoe.cli.doctor import versions
from octomoe.evaluate.conversion_report import (
    ConversionReport,
    Projection,
    write_conversion_report,
)

_MAX_PROBLEMS: Final = 20
# More layers than this do not fit on a screen: the worst are shown.
_MAX_LAYERS: Final = 12


def verify(
    dst: Annotated[str, typer.Argument(help="The converted checkpoint: folder, file or URL.")],
    against: Annotated[str, typer.Option(help="The checkpoint it was made from.")],
    family_file: Annotated[
        Path | None, typer.Option(help="Further model families, in the form of families.toml.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Threads; by default one per core.", min=1)
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check that a converted checkpoint means what its source means.

    Exit code 1 if anything is off.
    """
    if report is not None:
        check_report("verify", report)
    console = Console(stderr=True)
    found = verify_with_progress(console, dst, against, family_file, workers)
    if as_json:
        typer.echo(json.dumps(plain_json({"is_sound": found.is_sound, **asdict(found)}), indent=2))
    print_verification(console, found)
    if report is not None:
        page = make_report(found, source=against, destination=dst, facts={})
        write_conversion_report(page, report)
        console.print(f"Report: {escape(str(report.resolve()))}", soft_wrap=True)
    if not found.is_sound:
        raise typer.Exit(1)


def verify_with_progress(
    console: Console, dst: str, against: str, family_file: Path | None, workers: int | None
) -> Verification:
    """`verify_checkpoint` with a bar on the console."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("verifying", total=None)
        return verify_checkpoint(
            dst,
            against=against,
            family_file=family_file,
            workers=workers,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def print_verification(console: Console, found: Verification) -> None:
    """A table of layers, what was checked, and what is off."""
    if found.quality:
        console.print(_table(found))
    style = "green" if found.is_sound else "bold red"
    word = "Sound" if found.is_sound else "Something is off"
    console.print(f"[{style}]{word}[/]: {escape(verdict(found))}")
    for problem in found.problems[:_MAX_PROBLEMS]:
        console.print(f"[red]✗[/] {escape(problem)}")
    if len(found.problems) > _MAX_PROBLEMS:
        console.print(f"… and {len(found.problems) - _MAX_PROBLEMS:,} more problems")


def verdict(found: Verification) -> str:
    """One sentence: what was checked and the lowest SQNR."""
    parts = [
        f"{found.num_tensors:,} tensors checked",
        f"{found.num_identical:,} identical to the source's",
    ]
    if found.num_quantized:
        parts.append(f"{found.num_quantized:,} quantised matrices, {_lowest(found)}")
    if found.problems:
        plural = "" if len(found.problems) == 1 else "s"
        parts.append(f"{len(found.problems):,} problem{plural}")
    return ", ".join(parts) + "."


def make_report(
    found: Verification, *, source: str, destination: str, facts: dict[str, str]
) -> ConversionReport:
    """What the HTML report shows of a verification."""
    return ConversionReport(
        source=source,
        destination=destination,
        verdict=verdict(found),
        is_sound=found.is_sound,
        facts=facts,
        problems=found.problems,
        projections=[
            Projection(q.module, q.role, q.sqnr_db, q.scale_min, q.scale_max) for q in found.quality
        ],
        command="octomoe " + " ".join(sys.argv[1:]),
        versions=versions(),
    )


def decibels(value: float) -> str:
    """An SQNR in words."""
    if isfinite(value):
        return f"{value:.1f} dB"
    return "unchanged" if value == inf else "lost"


@dataclass(frozen=True)
class _Layer:
    """What is shown of a layer."""

    module: str
    label: str
    lowest: float
    where: str
    median: float
    scale_min: float
    scale_max: float


def _layers(quality: Sequence[ProjectionQuality]) -> Iterator[_Layer]:
    modules = {q.module: q.layer for q in quality}
    shared = Counter(modules.values())
    for module, number in modules.items():
        projections = [q for q in quality if q.module == module]
        every = [
            (v, f"{q.role} {expert}") for q in projections for expert, v in enumerate(q.sqnr_db)
        ]
        lowest, where = min(every)
        yield _Layer(
            module,
            str(number) if shared[number] == 1 else module,
            lowest,
            "" if lowest == inf else where,
            median(value for value, _ in every),
            min(low for q in projections for low in q.scale_min),
            max(high for q in projections for high in q.scale_max),
        )


def _lowest(found: Verification) -> str:
    if found.lowest_sqnr_db == inf:
        return "all with the source's values"
    least = min(_layers(found.quality), key=lambda layer: layer.lowest, default=None)
    where = "outside the experts"
    if least is not None and least.lowest == found.lowest_sqnr_db:
        where = f"{least.module}, {least.where.replace(' ', ' of expert ')}"
    return f"lowest SQNR {decibels(found.lowest_sqnr_db)} ({where})"


def _table(found: Verification) -> Table:
    layers = list(_layers(found.quality))
    shown = layers
    title = "Experts against the source"
    if len(layers) > _MAX_LAYERS:
        worst = sorted(layers, key=lambda layer: layer.lowest)[:_MAX_LAYERS]
        shown = [layer for layer in layers if layer in worst]
        title += f": the {_MAX_LAYERS} lowest of {len(layers)} layers"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("layer", justify="right")
    for name in ("lowest SQNR", "worst expert", "median SQNR", "scales from", "to"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in shown:
        is_quantized = (layer.scale_min, layer.scale_max, layer.lowest) != (1.0, 1.0, inf)
        table.add_row(
            layer.label,
            decibels(layer.lowest),
            layer.where,
            decibels(layer.median),
            f"{layer.scale_min:.3g}" if is_quantized else "",
            f"{layer.scale_max:.3g}" if is_quantized else "",
        )
    return table
