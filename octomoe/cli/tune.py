"""`octomoe tune`: measure which configurations are the fastest for a layer on this GPU."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from octomoe.bench.layers import RECIPES, Problem, Shape, Skew, make_experts, make_problem
from octomoe.cli.doctor import versions
from octomoe.cli.tune_view import View, plot_entry, print_candidates, verdict
from octomoe.core.device import Target
from octomoe.core.formats import ALL
from octomoe.errors import missing_package, refusal
from octomoe.tune.candidates import KNOWN_TARGETS, candidates, heuristic_config
from octomoe.tune.entries import Bucket, Entry, LayerKey, entry_to_json
from octomoe.tune.kinds import KINDS
from octomoe.tune.search import Measure, journal_of, tune_into
from octomoe.tune.tables import BUCKETS, VARIABLE, scales_of
from octomoe.tune.timing import Timing
from octomoe.version import VERSION

_ROUTINGS: Final = {
    "balanced": (Skew.BALANCED,),
    "skewed": (Skew.SKEWED,),
    "both": (Skew.BALANCED, Skew.SKEWED),
}


@dataclass(frozen=True)
class Bench:
    """What measures a layer.

    Attributes:
        target: what it measures on.
        measures: for a number of tokens, routing -> how to measure with it.
        kinds: of configurations that it can measure.
    """

    target: Target
    measures: Callable[[int], Mapping[str, Measure]]
    kinds: tuple[str, ...] = tuple(KINDS)


def tune(
    num_experts: Annotated[
        int, typer.Option("--num-experts", "--E", min=1, help="E, without the shared expert.")
    ],
    n: Annotated[int, typer.Option("--n", "--N", min=2, help="Rows of w13: twice the width F.")],
    k: Annotated[int, typer.Option("--k", "--K", min=1, help="Hidden size D.")],
    top_k: Annotated[int, typer.Option(min=1, help="A, without the shared expert.")],
    shared_expert: Annotated[
        bool, typer.Option(help="Every token also goes to one more expert.")
    ] = False,
    tokens: Annotated[
        list[str] | None,
        typer.Option("--tokens", "--batch-sizes", help="T, e.g. 1,8,64; default 1, 2, 4, … 8192."),
    ] = None,
    format: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "block128",
    routing: Annotated[
        str,
        typer.Option(
            help="balanced; skewed: half of the tokens choose one expert; or both: the "
            "configuration whose worse ratio to the best of each is the least."
        ),
    ] = "both",
    out: Annotated[
        Path, typer.Option("--out", "--out-file", "--out-config", help="Table to merge into.")
    ] = Path("octomoe-tuned.json"),
    plot: Annotated[Path | None, typer.Option(help="Draw the outcome into this SVG file.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Stop searching after so long.", min=0.0)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the candidates and measure nothing.")
    ] = False,
    device_name: Annotated[
        str | None,
        typer.Option(help="Whose candidates to list with --dry-run, if not this machine's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure which configurations are the fastest for a layer of experts on this GPU.

    An interrupted search goes on where it was when the same command runs again.
    """
    _check_choice("--format", format, RECIPES)
    _check_choice("--routing", routing, _ROUTINGS)
    if n % 2:
        raise ValueError(refusal("tune", "--n", f"is {n}", "an even number, gate and up rows"))
    if plot is not None:
        _check_plot(plot)
    counts = _parse_tokens(tokens)
    shape = Shape(
        "", num_experts + shared_expert, n // 2, k, top_k + shared_expert, has_shared=shared_expert
    )
    if shape.num_choices > shape.num_experts:
        needs = f"at most {num_experts}, the number of experts"
        raise ValueError(refusal("tune", "--top-k", f"is {top_k}", needs))
    key = key_of(shape, format)
    console = Console(stderr=True)
    if dry_run:
        _print_plan(console, key, counts, kinds_for(format), device_name)
        return
    if not torch.cuda.is_available():
        typer.echo(
            "octomoe: tune: there is no CUDA device, and kernels are timed on one; --dry-run lists "
            "what would be tried",
            err=True,
        )
        raise typer.Exit(1)
    title = f"E={shape.num_experts} F={shape.width} D={k} A={shape.num_choices}, {format}"
    try:
        entry = tune_shape(
            console,
            shape,
            format,
            counts,
            _ROUTINGS[routing],
            out,
            title=title,
            seconds=inf if seconds is None else seconds,
        )
    except RuntimeError as error:
        typer.echo(f"octomoe: {error}", err=True)
        if journal_of(out).exists():
            again = "what was measured is kept: the same command goes on behind it"
            typer.echo(f"octomoe: tune: {again}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(entry_to_json(entry), indent=2))
    console.print(verdict(entry))
    if plot is not None:
        plot.write_text(plot_entry(entry, title), encoding="utf-8")
        console.print(f"Plot: {escape(str(plot.resolve()))}", soft_wrap=True)
    console.print(f"Next: [bold]export {VARIABLE}={escape(str(out.resolve()))}[/]", soft_wrap=True)


def key_of(shape: Shape, format: str) -> LayerKey:
    """Under which key a layer is tuned."""
    scales = scales_of(RECIPES[format].activations)
    return LayerKey(shape.num_experts, shape.width, shape.hidden_size, shape.num_choices, scales)


def tune_shape(
    console: Console,
    shape: Shape,
    format: str,
    tokens: Sequence[int],
    skews: Sequence[Skew],
    out: Path,
    *,
    title: str,
    seconds: float = inf,
) -> Entry:
    """Search the best configurations for a layer, merge them into a file, show a table meanwhile.

    Args:
        console: where to show the table.
        shape, format, tokens, skews: the layer, one of `RECIPES`, T, and how tokens are routed.
        out: the file.
        title: of the table.
        seconds: after which no further configuration is tried.
    """
    bench = bench_on("cuda", shape, format, skews)
    view = View(title, [str(skew) for skew in skews])

    def on_bucket(bucket: Bucket) -> None:
        view.on_bucket(bucket)
        if not console.is_terminal:
            console.print(view.line(bucket), soft_wrap=True, highlight=False)

    with Live(view, console=console, refresh_per_second=4, transient=not console.is_terminal):
        return tune_into(
            out,
            key_of(shape, format),
            tokens,
            bench.measures,
            bench.target,
            kinds=bench.kinds,
            about=_about(shape, format),
            on_trial=view.on_trial,
            on_bucket=on_bucket,
            seconds=seconds,
        )


def _about(shape: Shape, format: str) -> dict[str, Any]:
    """What measurements depend on besides sizes and the device, and whose layer it is."""
    # Here, not above: it needs Triton, and the rest of the command line does not.
    from octomoe.bench.records import commit_of_clone

    installed = versions()
    return {
        "format": format,
        **({"model": shape.model} if shape.model else {}),
        **({"has_shared": True} if shape.has_shared else {}),
        "commit": commit_of_clone() or VERSION,
        "versions": {name: installed[name] for name in ("octomoe", "torch", "triton")},
    }


def bench_on(device: str, shape: Shape, format: str, skews: Sequence[Skew]) -> Bench:
    """How to measure a layer on a device of this machine."""
    # Here, not above: they need Triton, and the rest of the command line does not.
    from octomoe.bench.moe import time_config

    recipe = RECIPES[format]
    torch.manual_seed(0)
    experts = make_experts(shape, device, recipe)

    def measure(problem: Problem, config: Any, repeats: int) -> Timing:
        return time_config(problem, config, repeats=repeats)

    def measures(num_tokens: int) -> Mapping[str, Measure]:
        found: dict[str, Measure] = {}
        for skew in skews:
            # The same rows and routing, whatever else is measured.
            torch.manual_seed(num_tokens)
            problem = make_problem(shape, experts, num_tokens, recipe, skew)
            found[str(skew)] = partial(measure, problem)
        return found

    return Bench(Target.of(device), measures, kinds_for(format))


def kinds_for(format: str) -> tuple[str, ...]:
    """The kinds of configuration that can serve one of `RECIPES`."""
    recipe = RECIPES[format]
    activations = recipe.activations
    # A scale that all rows of the intermediate make is not known while they are made.
    is_late = activations is not None and activations.block[1] == ALL and not recipe.is_static
    return tuple(kind for kind in KINDS if not (kind == "decode" and is_late))


def _print_plan(
    console: Console,
    key: LayerKey,
    tokens: Sequence[int],
    kinds: tuple[str, ...],
    device_name: str | None,
) -> None:
    here = [Target.of("cuda")] if torch.cuda.is_available() else []
    known = {target.name: target for target in (*here, *KNOWN_TARGETS)}
    if device_name is not None:
        _check_choice("--device-name", device_name, known)
    target = known[device_name or next(iter(known))]
    console.print(f"For {target.name}; * is what runs without a table.")
    for num_tokens in tokens:
        found = candidates(key, num_tokens, target, kinds=kinds)
        usual = heuristic_config(key, num_tokens, target, kinds=kinds)
        print_candidates(console, num_tokens, found, usual)


def _parse_tokens(texts: Sequence[str] | None) -> tuple[int, ...]:
    if not texts:
        return BUCKETS
    parts = [part.strip() for text in texts for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        got = f"is {','.join(texts)}"
        raise ValueError(refusal("tune", "--tokens", got, "numbers from 1, such as 1,8,64"))
    return tuple(sorted({int(part) for part in parts}))


def _check_choice(option: str, given: str, known: Mapping[str, object]) -> None:
    if given not in known:
        needs = f"one of {', '.join(known)}"
        raise ValueError(refusal("tune", option, f"is {given!r}", needs))


def _check_plot(path: Path) -> None:
    """Refuse a plot that could not be written, before the work and not after it."""
    if find_spec("matplotlib") is None:
        install = "pip install 'octomoe[report]'"
        raise ImportError(missing_package("tune", "matplotlib", "3.9", install))
    if path.suffix.lower() != ".svg" or not path.parent.is_dir() or path.is_dir():
        needs = "an .svg file in an existing folder"
        raise ValueError(refusal("tune", "--plot", f"is {path}", needs))
