"""`octomoe demo`: quantise a real model's experts in every way and show what each one costs."""

import dataclasses
import json
import sys
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Annotated, Final

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import octomoe
from octomoe.cli.doctor import versions
from octomoe.errors import missing_package, refusal
from octomoe.evaluate.compare import Comparison, measure_baseline
from octomoe.evaluate.report import advice, is_bad, write_report
from octomoe.evaluate.run import run_scheme
from octomoe.evaluate.schemes import SCHEMES
from octomoe.integrations.transformers import (
    LoadedModel,
    experts_of,
    find_experts,
    load_model,
)

_EXAMPLES: Final = Path(octomoe.__file__).parents[1] / "examples"
# Predictions of the unquantised model are kept in memory to compare with: 4 bytes per token and
# vocabulary entry.
_MAX_PREDICTION_BYTES: Final = 4 << 30
_SEQUENCES_PER_BATCH: Final = 4


def demo(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a local Hugging Face MoE checkpoint.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to predict.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use.", min=2)] = 32768,
    sequence: Annotated[int, typer.Option(help="Tokens per sequence.", min=2)] = 512,
    report: Annotated[Path, typer.Option(help="Where to write the HTML report.")] = Path(
        "octomoe-report.html"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Quantise a model's experts in every way and show what each one costs."""
    console = Console(stderr=True)
    model_path = model or _bundled("tiny-qwen3-moe")
    text_path = text or _bundled("heldout.txt")
    loaded = load_model(model_path)
    originals = {name: experts_of(module) for name, module in find_experts(loaded.model)}
    if not originals:
        got = f"is {model_path}, whose architecture has no experts that Transformers exposes"
        raise ValueError(refusal("demo", "--model", got, "a mixture-of-experts checkpoint"))
    batches = read_batches(text_path, loaded, tokens, sequence)
    _check_report(report)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(batches) * (len(SCHEMES) + 1))

        def on_batch() -> None:
            progress.advance(task)

        progress.update(task, description="unquantised")
        baseline = measure_baseline(loaded.model, batches, list(originals), on_batch)
        results = []
        for scheme in SCHEMES:
            progress.update(task, description=scheme.name)
            results.append(run_scheme(loaded.model, originals, baseline, scheme, on_batch))

    comparison = Comparison(
        model=str(model or model_path.name),
        text=str(text or text_path.name),
        num_tokens=sum(batch.numel() for batch in batches),
        perplexity=baseline.perplexity,
        bytes_per_weight=float(loaded.stored_bytes),
        results=results,
        command="octomoe " + " ".join(sys.argv[1:]),
        versions=versions(),
    )
    write_report(comparison, report)
    if as_json:
        typer.echo(json.dumps(_plain(dataclasses.asdict(comparison)), indent=2))
    _print(console, comparison, report)


def read_batches(path: Path, loaded: LoadedModel, num_tokens: int, length: int) -> list[Tensor]:
    """The first tokens of a text, as batches of sequences ``[B, length]``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no UTF-8 text or shorter than one sequence.
    """
    if loaded.max_sequence is not None and length > loaded.max_sequence:
        got = f"is {length}"
        needs = f"at most {loaded.max_sequence}, the model's longest context"
        raise ValueError(refusal("demo", "--sequence", got, needs))
    num_tokens = min(num_tokens, _MAX_PREDICTION_BYTES // (4 * loaded.vocab_size))
    num_sequences = max(num_tokens // length, 1)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            # Characters enough for any tokenizer in use; the last token may be cut short.
            ids = loaded.encode(file.read(16 * num_sequences * length))
    except UnicodeDecodeError as error:
        got = f"is {path}, which is not UTF-8 ({error.reason} at byte {error.start})"
        raise ValueError(refusal("demo", "--text", got, "a UTF-8 text file")) from error
    num_sequences = min(num_sequences, len(ids) // length)
    if num_sequences == 0:
        got = f"is {path} of {len(ids)} tokens"
        do = "give a longer text or a smaller --sequence"
        raise ValueError(refusal("demo", "--text", got, f"at least one of {length} tokens", do))
    tokens_BL = torch.tensor(ids[: num_sequences * length]).view(num_sequences, length)
    return list(torch.split(tokens_BL, _SEQUENCES_PER_BATCH))


def _check_report(path: Path) -> None:
    """Refuse a report that could not be written, before the work and not after it."""
    for package, floor in (("jinja2", "3.1"), ("matplotlib", "3.9")):
        if find_spec(package) is None:
            install = "pip install 'octomoe[report]'"
            raise ImportError(missing_package("demo", package, floor, install))
    if not path.parent.is_dir() or path.is_dir():
        got = f"is {path}"
        raise ValueError(refusal("demo", "--report", got, "a file in an existing folder"))


def _plain(value: object) -> object:
    """The same value for JSON, which has no NaN and no infinities: they become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _bundled(name: str) -> Path:
    """A file of the repository's examples folder.

    Raises:
        FileNotFoundError: OctoMoE was installed without it.
    """
    path = _EXAMPLES / name
    if not path.exists():
        do = "run from a clone of the repository, or give --model and --text"
        needs = "the repository's examples folder"
        raise FileNotFoundError(refusal("demo", name, f"is not at {path}", needs, do))
    return path


def _print(console: Console, comparison: Comparison, report: Path) -> None:
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
