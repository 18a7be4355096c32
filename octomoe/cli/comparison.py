"""A comparison on the terminal and as JSON, for every verb that makes one."""

from importlib.util import find_spec
from math import isfinite
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from octomoe.errors import missing_package, refusal
from octomoe.evaluate.compare import Comparison
from octomoe.evaluate.report import advice, is_bad


def batch_progress(console: Console) -> Progress:
    """A bar that counts batches."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


def check_report(verb: str, path: Path) -> None:
    """Refuse a report that could not be written, before the work and not after it."""
    for package, floor in (("jinja2", "3.1"), ("matplotlib", "3.9")):
        if find_spec(package) is None:
            install = "pip install 'octomoe[report]'"
            raise ImportError(missing_package(verb, package, floor, install))
    if not path.parent.is_dir() or path.is_dir():
        got = f"is {path}"
        raise ValueError(refusal(verb, "--report", got, "a file in an existing folder"))


def plain_json(value: object) -> object:
    """The same value for JSON, which has no NaN and no infinities: they become null."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def print_comparison(console: Console, comparison: Comparison, report: Path) -> None:
    """One table, one sentence of advice, and where the report lies."""
    title = f"{comparison.model}: {comparison.num_tokens} tokens of {comparison.text}"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("weights × activations", no_wrap=True)
    # Numbers are never cut, however narrow the terminal: names are.
    for column, width in (
        ("bytes", 5),
        ("SQNR", 5),
        ("KL", 6),
        ("top-1", 5),
        ("perplexity", 10),
        ("change", 8),
    ):
        table.add_column(column, justify="right", no_wrap=True, min_width=width)
    bytes_per_weight = f"{comparison.bytes_per_weight:.3f}"
    table.add_row("unquantised", bytes_per_weight, "", "", "", f"{comparison.perplexity:.3f}", "")
    for r in comparison.results:
        table.add_row(
            r.name,
            f"{r.bytes_per_weight:.3f}",
            f"{r.sqnr_db:.2f}",
            f"{r.kl:.4f}",
            f"{100 * r.top1:.1f}",
            f"{r.perplexity:.3f}",
            f"{comparison.perplexity_change(r):+.2f} %",
            style="red" if is_bad(r, comparison) else None,
        )
    console.print(table)
    console.print(advice(comparison))
    console.print(f"Report: {report.resolve()}")
