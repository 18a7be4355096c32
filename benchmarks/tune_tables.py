"""Tune the packaged tables: the layers of octomoe/tune/shapes.toml, on this machine's GPU.

PYTHONPATH=. python benchmarks/tune_tables.py [--models 'Qwen3*' ...] [--gpus 1 8] [--seconds 60]

Layers that the table has for all numbers of tokens are passed over, so that a run that was stopped
goes on; --again tunes them anew. Without a GPU, --list shows what there is to tune.
"""

import argparse
import sys
from fnmatch import fnmatch
from math import inf
from pathlib import Path
from time import monotonic

import torch
from rich.console import Console

import octomoe
from octomoe.bench.layers import RECIPES, Shape, Skew
from octomoe.cli.tune import tune_shape
from octomoe.cli.tune_view import verdict
from octomoe.core.device import Target
from octomoe.tune.entries import LayerKey, Table, read_table
from octomoe.tune.shapes import NUM_GPUS, Owner, layers_of, model_shapes
from octomoe.tune.tables import BUCKETS, scales_of, table_path

TABLES = Path(octomoe.__file__).with_name("tune") / "tables"
# Of the device's memory, what weights may take: rows and what is flushed lie there too.
SHARE = 0.6


def layers_to_tune(options: argparse.Namespace) -> dict[LayerKey, Owner]:
    """The layers that are asked for, and whose they are."""
    models = [
        model
        for model in model_shapes()
        if any(fnmatch(model.name, pattern) for pattern in options.models)
    ]
    return layers_of(models, scales_of(RECIPES[options.format].activations), options.gpus)


def why_skip(key: LayerKey, table: Table, tokens: list[int], memory: int) -> str | None:
    """What speaks against tuning a layer; None if nothing does."""
    weight_bytes = 3 * key.num_experts * key.width * key.depth
    if weight_bytes > SHARE * memory:
        return f"its weights take {weight_bytes / 1e9:.0f} GB"
    entry = table.entries.get(key)
    if entry is not None and set(tokens) <= {bucket.num_tokens for bucket in entry.buckets}:
        return "the table has it"
    return None


def main() -> int:
    """List, or tune one layer after another."""
    options = parse()
    layers = layers_to_tune(options)
    if options.list:
        for key, owner in layers.items():
            sizes = f"E={key.num_experts} F={key.width} D={key.depth} A={key.num_choices}"
            print(f"{sizes:36} {owner.whose}")
        return 0
    if not torch.cuda.is_available():
        print("tune_tables: no CUDA device; --list shows what there is", file=sys.stderr)
        return 2
    console, target = Console(stderr=True), Target.of("cuda")
    out = options.out or table_path(TABLES, target.name)
    end = monotonic() + options.total_seconds
    for index, (key, owner) in enumerate(layers.items()):
        table = read_table(out) if out.exists() and not options.again else Table(target.name)
        title = f"{index + 1} of {len(layers)}: {owner.whose}, {options.format}"
        if reason := why_skip(key, table, options.tokens, target.memory):
            console.print(f"{title}: passed over, {reason}", highlight=False)
            continue
        seconds = min(options.seconds, end - monotonic())
        if seconds <= 0:
            console.print(f"Out of time before {title}.", highlight=False)
            break
        sizes = key.num_experts, key.width, key.depth, key.num_choices
        shape = Shape(owner.whose, *sizes, has_shared=owner.has_shared)
        entry = tune_shape(
            console,
            shape,
            options.format,
            options.tokens,
            list(Skew),
            out,
            title=title,
            seconds=seconds,
        )
        console.print(verdict(entry))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--gpus", nargs="+", type=int, default=NUM_GPUS)
    parser.add_argument("--format", choices=RECIPES, default="block128")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(BUCKETS))
    parser.add_argument("--seconds", type=float, default=inf, help="for each layer")
    parser.add_argument("--total-seconds", type=float, default=inf, help="for all layers")
    parser.add_argument("--out", type=Path, help="table; by default the packaged one")
    parser.add_argument("--again", action="store_true", help="tune what the table has, too")
    parser.add_argument("--list", action="store_true", help="show the layers and tune none")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
