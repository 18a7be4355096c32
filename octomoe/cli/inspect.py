"""`octomoe inspect`: what a checkpoint is, in one screen."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from octomoe.checkpoint.describe import Description, LayerDescription, describe
from octomoe.checkpoint.oddities import runs
from octomoe.checkpoint.scale_statistics import ScaleStatistics
from octomoe.cli.comparison import plain_json


def inspect(
    path: Annotated[str, typer.Argument(help="A checkpoint: folder, .safetensors file or URL.")],
    family_file: Annotated[
        Path | None, typer.Option(help="Further model families, in the form of families.toml.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what a checkpoint is: experts, formats, layout, bytes, scales, and what is odd.

    Headers, configs and scales are read, never a weight.
    """
    found = describe(path, family_file)
    if as_json:
        typer.echo(json.dumps(plain_json(asdict(found)), indent=2))
    else:
        _print(Console(stderr=True), found)


def _print(console: Console, found: Description) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in _facts(found):
        grid.add_row(label, escape(text))
    console.print(grid)
    if found.scales:
        console.print(_scales(found))
    if found.problem:
        console.print(f"[bold red]The experts cannot be read:[/] {escape(found.problem)}")
    for oddity in found.oddities:
        console.print(f"[yellow]![/] {escape(oddity)}")
    if not found.oddities and not found.problem:
        console.print("[green]Nothing odd.[/]")


def _facts(found: Description) -> list[tuple[str, str]]:
    files = f"{found.num_files} file{'' if found.num_files == 1 else 's'}"
    facts = [
        ("checkpoint", found.path),
        ("model", _model(found)),
        ("layers", _layers(found)),
    ]
    main = [layer for layer in found.layers if not layer.is_mtp] or list(found.layers)
    facts += [("experts", text) for text in dict.fromkeys(map(_experts, main))][:4]
    if found.top_k is not None:
        facts.append(("chosen", f"{found.top_k} experts per token"))
    facts += [
        ("format", _format(found)),
        ("size", f"{decimal(found.num_bytes)} in {found.num_tensors:,} tensors, {files}"),
        ("by role", _shares(found.bytes_by_role)),
        ("by dtype", _shares(found.bytes_by_dtype)),
    ]
    if found.bytes_per_expert_weight:
        count = f"{found.num_expert_weights:,} expert weights"
        facts.append(("density", f"{found.bytes_per_expert_weight:.4f} bytes for each of {count}"))
    return facts


def _model(found: Description) -> str:
    model_type = found.model_type or "config.json states no model_type"
    if not found.family:
        return f"{model_type} (unknown family)"
    return model_type if found.family == model_type else f"{model_type} (family {found.family})"


def _layers(found: Description) -> str:
    parts = [f"{found.num_layers}" if found.num_layers else "unknown"]
    if found.layers:
        main = [layer.layer for layer in found.layers if not layer.is_mtp]
        parts.append(f"experts in {runs(main) or 'none'}")
    if found.dense_layers:
        parts.append(f"dense {runs(found.dense_layers)}")
    if mtp := [layer.layer for layer in found.layers if layer.is_mtp]:
        parts.append(f"multi-token prediction {runs(mtp)}")
    return "; ".join(parts)


def _experts(layer: LayerDescription) -> str:
    sizes = f"hidden size {layer.hidden_size}, width {layer.intermediate_size}"
    return f"{layer.num_experts} per layer, {sizes}, layout {layer.layout}"


def _format(found: Description) -> str:
    if found.method == "none":
        return f"not quantised ({', '.join(found.bytes_by_dtype)})"
    parts = [found.method]
    if found.weights:
        parts.append(f"weights {found.weights}")
    if found.activations:
        kind = "static" if found.is_static else "dynamic"
        parts.append(f"activations {found.activations}, {kind}")
    return "; ".join(parts)


def _shares(sums: dict[str, int]) -> str:
    total = max(sum(sums.values()), 1)
    return ", ".join(f"{k} {decimal(v)} ({100 * v / total:.0f}%)" for k, v in sums.items())


def _scales(found: Description) -> Table:
    layers = {s.module for s in found.scales}
    num_quantized = sum(1 for layer in found.layers if layer.num_quantized)
    experts = max(s.num_experts for s in found.scales)
    all_experts = max(layer.num_experts for layer in found.layers)
    title = f"Scales of {len(layers)} layers"
    if len(layers) < num_quantized or experts < all_experts:
        title = f"Scales, sampled: {len(layers)} of {num_quantized} layers, "
        title += f"{experts} of {all_experts} experts in each"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("of")
    names = ("least", "median", "largest", "spread", "2ⁿ", "≤ 0", "NaN, Inf")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for role in dict.fromkeys(s.role for s in found.scales):
        table.add_row(role, *_summary([s for s in found.scales if s.role == role]))
    table.caption = "spread: largest over least median of a layer's experts, typically"
    table.caption_justify = "left"
    return table


def _summary(scales: Sequence[ScaleStatistics]) -> list[str]:
    """One role over all layers."""
    good = [s for s in scales if isfinite(s.median)]
    numbers = ["–"] * 4
    if good:
        numbers = [
            f"{min(s.least for s in good):.3g}",
            f"{median(s.median for s in good):.3g}",
            f"{max(s.largest for s in good):.3g}",
            f"{median(s.spread for s in good):.2f}×",
        ]
    return [
        *numbers,
        "all" if all(s.is_pow2 for s in scales) else "no",
        f"{sum(s.num_not_positive for s in scales):,}",
        f"{sum(s.num_not_finite for s in scales):,}",
    ]
