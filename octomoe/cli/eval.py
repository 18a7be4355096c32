"""`octomoe eval`: what a converted checkpoint costs, against the one it was made from."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.source import Checkpoint
from octomoe.cli.comparison import batch_progress, check_report, plain_json, print_comparison
from octomoe.cli.doctor import versions
from octomoe.cli.text import read_batches
from octomoe.errors import refusal
from octomoe.evaluate.compare import Comparison, measure_baseline
from octomoe.evaluate.report import write_report
from octomoe.evaluate.run import experts_in_place, measure_quantized
from octomoe.evaluate.schemes import Scheme
from octomoe.integrations.lm_eval import run_tasks


def evaluate(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Converted checkpoints.")],
    against: Annotated[str, typer.Option(help="The checkpoint they were made from.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to predict.")],
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use.", min=2)] = 32768,
    sequence: Annotated[int, typer.Option(help="Tokens per sequence.", min=2)] = 512,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave activations unquantised.")
    ] = False,
    report: Annotated[Path, typer.Option(help="Where to write the HTML report.")] = Path(
        "octomoe-eval.html"
    ),
    lm_eval: Annotated[
        list[str] | None, typer.Option(help="A task of lm-evaluation-harness; repeatable.")
    ] = None,
    family_file: Annotated[Path | None, typer.Option(help="Further family records.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Compare converted checkpoints' predictions with those of the one they were made from."""
    # Here, not above: they take a second to import, and most verbs do without.
    from octomoe.integrations.transformers import experts_of, find_experts
    from octomoe.integrations.transformers_checkpoint import load_reader, stored_experts

    console = Console(stderr=True)
    check_report("eval", report)
    source = Reader(Checkpoint(against), family_file)
    made = {path: Reader(Checkpoint(path), family_file) for path in paths}
    for path, reader in made.items():
        if reader.scheme.weights is None:
            got = f"is {path}, which states no quantisation"
            raise ValueError(refusal("eval", "PATH", got, "a converted checkpoint"))
    loaded = load_reader(source, source)
    batches = read_batches(text, loaded, tokens, sequence, "eval")
    originals = {name: experts_of(module) for name, module in find_experts(loaded.model)}
    with batch_progress(console) as progress:
        task = progress.add_task("source", total=(1 + len(made)) * len(batches))

        def on_batch() -> None:
            progress.advance(task)

        baseline = measure_baseline(loaded.model, batches, list(originals), on_batch)
        scores = {"source": run_tasks(loaded.model, against, lm_eval)} if lm_eval else {}
        # Its experts are kept as `originals`; the rest makes room for the converted models.
        del loaded
        results = []
        for path, reader in made.items():
            name = Path(path).name
            progress.update(task, description=name)
            model = load_reader(reader, source).model
            quantized, activations = stored_experts(reader, model)
            assert reader.scheme.weights is not None
            scheme = Scheme(name, reader.scheme.weights, None if weights_only else activations)
            results.append(
                measure_quantized(model, originals, quantized, baseline, scheme, on_batch)
            )
            if lm_eval:
                with experts_in_place(model, quantized, scheme.activations):
                    scores[name] = run_tasks(model, against, lm_eval)
    comparison = Comparison(
        model=Path(against).name,
        text=text.name,
        num_tokens=sum(batch.numel() for batch in batches),
        perplexity=baseline.perplexity,
        bytes_per_weight=source.bytes_per_weight,
        results=results,
        command="octomoe " + " ".join(sys.argv[1:]),
        versions=versions(),
    )
    write_report(comparison, report)
    if as_json:
        stated = dataclasses.asdict(comparison) | ({"lm_eval": scores} if scores else {})
        typer.echo(json.dumps(plain_json(stated), indent=2))
    print_comparison(console, comparison, report)
    for name, metrics in scores.items():
        console.print(f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
