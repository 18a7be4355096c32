"""`octomoe demo`: quantise a real model's experts in every way and show what each one costs."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

import octomoe
from octomoe.cli.comparison import batch_progress, check_report, plain_json, print_comparison
from octomoe.cli.doctor import versions
from octomoe.cli.text import read_batches
from octomoe.errors import refusal
from octomoe.evaluate.compare import Comparison, measure_baseline
from octomoe.evaluate.report import write_report
from octomoe.evaluate.run import run_scheme
from octomoe.evaluate.schemes import SCHEMES

_EXAMPLES: Final = Path(octomoe.__file__).parents[1] / "examples"


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
    # Here, not above: it takes a second to import, and most verbs do without.
    from octomoe.integrations.transformers import experts_of, find_experts, load_model

    console = Console(stderr=True)
    model_path = model or _bundled("tiny-qwen3-moe")
    text_path = text or _bundled("heldout.txt")
    loaded = load_model(model_path)
    originals = {name: experts_of(module) for name, module in find_experts(loaded.model)}
    if not originals:
        got = f"is {model_path}, whose architecture has no experts that Transformers exposes"
        raise ValueError(refusal("demo", "--model", got, "a mixture-of-experts checkpoint"))
    batches = read_batches(text_path, loaded, tokens, sequence)
    check_report("demo", report)
    with batch_progress(console) as progress:
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
        typer.echo(json.dumps(plain_json(dataclasses.asdict(comparison)), indent=2))
    print_comparison(console, comparison, report)


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
