"""`octomoe bench`: time kernels beside other people's, on the same inputs, all outputs checked."""

import json
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import torch
import typer
from rich.console import Console

from octomoe.bench.layers import RECIPES, SHAPES, Mode, Shape, Skew
from octomoe.errors import missing_package, refusal

if TYPE_CHECKING:
    from octomoe.bench.moe import Plan

app = typer.Typer(help="Time kernels beside other people's.", no_args_is_help=True)

_BOTH: Final = "both"
# Options that name files of this machine -> what a record says in their place; None: nothing.
_PATHS: Final = {"--sglang": "FOLDER", "--out": None, "--plot": None, "--commit": None}


@app.callback()
def _bench() -> None:
    """Time kernels beside other people's."""


@app.command()
def moe(
    shape: Annotated[
        list[str] | None,
        typer.Option(help=f"A layer: {', '.join(SHAPES)}; repeatable. All if none."),
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Experts of a layer of your own.")] = None,
    width: Annotated[int | None, typer.Option(help="Width of its experts.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Its model's width.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts that a token chooses.")] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(help="Tokens, e.g. 1,64; repeatable. Seven counts, 1 to 8192, if none."),
    ] = None,
    format: Annotated[
        str, typer.Option(help=f"Of weights and activations: {', '.join(RECIPES)}.")
    ] = "block128",
    mode: Annotated[
        str,
        typer.Option(help="kernel (from quantised rows on), layer (from router logits on), both."),
    ] = _BOTH,
    routing: Annotated[
        str,
        typer.Option(help="balanced, skewed (half of the tokens choose one expert), both."),
    ] = _BOTH,
    peer: Annotated[
        list[str] | None, typer.Option(help="A peer; repeatable. All that are here if none.")
    ] = None,
    sglang: Annotated[
        Path | None, typer.Option(help="Folder made by octomoe.bench.peers.sglang_wheel.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Replays of each contender.")] = 20,
    out: Annotated[Path | None, typer.Option(help="JSON lines file to append records to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file to draw.")] = None,
    commit: Annotated[
        str | None, typer.Option(help="Of the code, where it does not run in its clone.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Time layers of experts: ours, and every peer that is installed or whose files are given."""
    _check_machine()
    _check_files(out, plot)
    _one_of("--mode", mode, [*Mode, _BOTH])
    _one_of("--routing", routing, [*Skew, _BOTH])
    # Here, not above: they need Triton, which most verbs do without.
    from octomoe.bench.moe import TOKENS, Plan
    from octomoe.bench.peers.find import find_peers

    plan = Plan(
        shapes=_shapes(shape, experts, width, hidden_size, top_k),
        tokens=_tokens(tokens) if tokens else TOKENS,
        recipe=_one_of("--format", format, RECIPES),
        modes=[m for m in Mode if mode in (m, _BOTH)],
        skews=[s for s in Skew if routing in (s, _BOTH)],
        repeats=repeats,
        command=_command(sys.argv[1:]),
        commit=commit,
    )
    found = find_peers(peer or (), sglang=sglang)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for name, reason in found.missing.items():
        console.print(f"without {name}: {reason}", markup=False)
    records = _measure(console, plan, found, out)
    if plot is not None:
        from octomoe.bench.plot import plot_moe

        plot.write_text(plot_moe(records), encoding="utf-8")
        console.print(f"Picture: {plot.resolve()}", markup=False)
    if as_json:
        typer.echo(json.dumps(records, indent=2))


def _measure(console: Console, plan: "Plan", found: Any, out: Path | None) -> list[dict[str, Any]]:
    """Records of a plan, printed and appended to `out` as they come."""
    from octomoe.bench import table
    from octomoe.bench.moe import bench
    from octomoe.bench.records import append

    records: list[dict[str, Any]] = []
    peers: list[str] = []
    missing: dict[str, str] = {}

    def on_result(record: dict[str, Any], result: dict[str, Any]) -> None:
        if len(record["results"]) == 1:
            peers[:] = table.peers_of(result)
            missing.clear()
            console.print(f"\n{table.title(record)}\n{table.header(result)}", markup=False)
        console.print(table.row(result, peers), markup=False)
        for name, reason in result["missing"].items():
            if missing.get(name) != reason:
                console.print(f"  without {name}: {reason}", markup=False)
        missing.update(result["missing"])

    def on_record(record: dict[str, Any]) -> None:
        records.append(record)
        if out is not None and record["results"]:
            append(out, record)

    try:
        bench(plan, found, on_result=on_result, on_record=on_record)
    except AssertionError as wrong:
        kept = "" if out is None else f"; {out} has what was measured before"
        raise ValueError(f"bench moe: {wrong}; please report it, with the command{kept}") from wrong
    if summary := table.summary(records):
        console.print(f"\n{summary}", markup=False)
    return records


def _check_machine() -> None:
    if not torch.cuda.is_available():
        needs = "one that torch sees: kernels are timed on it"
        raise NotImplementedError(refusal("bench moe", "this machine", "has no CUDA device", needs))
    if find_spec("triton") is None:
        raise ImportError(missing_package("bench moe", "triton", "3.6", "pip install triton"))


def _check_files(out: Path | None, plot: Path | None) -> None:
    """Refuse what could not be written, before the work and not after it."""
    if plot is not None and find_spec("matplotlib") is None:
        install = "pip install 'octomoe[report]'"
        raise ImportError(missing_package("bench moe", "matplotlib", "3.9", install))
    for name, path in (("--out", out), ("--plot", plot)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            needs = "a file in an existing folder"
            raise ValueError(refusal("bench moe", name, f"is {path}", needs))


def _one_of(option: str, value: str, known: Iterable[str]) -> str:
    names = [str(name) for name in known]
    if value not in names:
        needs = f"one of: {', '.join(names)}"
        raise ValueError(refusal("bench moe", option, f"is {value!r}", needs))
    return value


def _tokens(texts: list[str]) -> list[int]:
    parts = [part.strip() for text in texts for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        needs = "numbers from 1, such as 1,64"
        raise ValueError(refusal("bench moe", "--tokens", f"is {','.join(texts)}", needs))
    return [int(part) for part in parts]


def _shapes(
    names: list[str] | None,
    experts: int | None,
    width: int | None,
    hidden_size: int | None,
    top_k: int | None,
) -> dict[str, Shape]:
    """Those named and the caller's own; all if neither is given."""
    shapes = {_one_of("--shape", name, SHAPES): SHAPES[name] for name in names or []}
    sizes = {"--experts": experts, "--width": width, "--hidden-size": hidden_size, "--top-k": top_k}
    given = {name: size for name, size in sizes.items() if size is not None}
    if not given:
        return shapes or dict(SHAPES)
    for name in sizes:
        if name not in given:
            needs = f"a size, as {', '.join(given)} {'has' if len(given) == 1 else 'have'}"
            raise ValueError(refusal("bench moe", name, "is not given", needs))
        if given[name] < 1:
            raise ValueError(refusal("bench moe", name, f"is {given[name]}", "at least 1"))
    if given["--top-k"] > given["--experts"]:
        needs = f"at most the {experts} experts"
        raise ValueError(refusal("bench moe", "--top-k", f"is {top_k}", needs))
    num_experts, own_width, depth, num_choices = (given[name] for name in sizes)
    own = Shape("", num_experts, own_width, depth, num_choices)
    return shapes | {f"E{experts}-F{width}-D{hidden_size}-A{top_k}": own}


def _command(arguments: list[str]) -> str:
    """What was typed, without the names of this machine's files."""
    kept, rest = ["octomoe"], iter(arguments)
    for argument in rest:
        option, equals, _ = argument.partition("=")
        if option not in _PATHS:
            kept.append(argument)
            continue
        if not equals:
            next(rest, None)
        name = _PATHS[option]
        kept += [] if name is None else [option, name]
    return " ".join(kept)
