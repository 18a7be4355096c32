"""The plan of a conversion as tables: what `octomoe convert --dry-run` shows."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from octomoe.checkpoint.encode import How, foresee
from octomoe.checkpoint.options import ExpertScale, Options
from octomoe.checkpoint.plan import Plan, make_plan
from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.source import Checkpoint

# What becomes of weights, in words.
FATES: Final = {
    How.QUANTIZED: "quantised",
    How.KEPT: "kept byte by byte",
    How.HALVED: "halved for a range of 240",
    How.RELAID: "moved to other power-of-two scales",
    How.REQUANTIZED: "quantised a second time",
}
_MAX_SHARDS: Final = 10
_MAX_IGNORED: Final = 12


def print_plan(
    console: Console, src: str, family_file: Path | None, asked: Mapping[str, Any]
) -> None:
    """Plan a conversion and show what it would do.

    Args:
        console: where to.
        src: the source.
        family_file: further family records.
        asked: the fields of `Options`.
    """
    reader = Reader(Checkpoint(src), family_file)
    plan = make_plan(reader, Options(**asked))
    for table in (_tensors(reader, plan), _shards(plan), _ignored(plan)):
        if table.row_count:
            console.print(table)
    if fates := _fates(reader, plan):
        stated = ", ".join(f"{count:,} {FATES[how]}" for how, count in fates.items())
        console.print(f"Quantised weights of the source: {stated}.")
    total = f"{decimal(plan.read_bytes)} to read, {decimal(plan.num_bytes)} to write"
    console.print(f"Dry run: {total}, nothing was written.")


def _tensors(reader: Reader, plan: Plan) -> Table:
    """What becomes of the source's tensors."""
    tensors = reader.checkpoint.tensors

    def size(names: Iterable[str]) -> int:
        return sum(tensors[n].num_bytes for n in names if n in tensors)

    layers = [jobs.layer for jobs in plan.experts]
    experts = [name for layer in layers for name in layer.names]
    linears, copied = list(plan.linears), set(plan.copied)
    done = {*experts, *linears, *copied}
    plain = [n for n in tensors if n not in done and n not in reader.companions]
    expert_bytes = sum(g.num_bytes for jobs in plan.experts for g in jobs.groups())
    outputs = {t.name: g.num_bytes for s in plan.shards for g in s.groups for t in g.outputs}
    linear_bytes = sum(outputs.get(name, 0) for name in linears)
    copied_bytes = size(copied)
    rest = plan.num_bytes - expert_bytes - linear_bytes - copied_bytes
    format = plan.options.format.name
    table = _table("Tensors", "tensors", "bytes", "becoming")
    for what, names, num_bytes in (
        (f"experts of {len(layers)} layers, to {format}", experts, expert_bytes),
        (f"other linears, to {format}", linears, linear_bytes),
        ("passed on byte by byte", list(copied), copied_bytes),
        ("written as plain numbers", plain, rest),
    ):
        if names:
            companions = {c for n in names for c in reader.companions_of(n)}
            read = size({*names, *companions})
            table.add_row(what, f"{len(names):,}", decimal(read), decimal(num_bytes))
    return table


def _shards(plan: Plan) -> Table:
    table = _table("Files", "tensors", "groups", "bytes")
    shown = plan.shards[:_MAX_SHARDS]
    for shard in shown:
        num_bytes = sum(group.num_bytes for group in shard.groups)
        counts = (f"{len(shard.tensors):,}", f"{len(shard.groups):,}")
        table.add_row(shard.name, *counts, decimal(num_bytes))
    if left := plan.shards[_MAX_SHARDS:]:
        groups = [group for shard in left for group in shard.groups]
        table.add_row(
            f"… and {len(left)} more",
            f"{sum(len(group.outputs) for group in groups):,}",
            f"{len(groups):,}",
            decimal(sum(group.num_bytes for group in groups)),
        )
    return table


def _ignored(plan: Plan) -> Table:
    """Modules that stay unquantised; those that differ in a number only share a row."""
    kinds = Counter(re.sub(r"\d+", "*", name) for name in plan.ignored)
    table = _table("Linear modules not quantised", "modules")
    for kind, count in kinds.most_common(_MAX_IGNORED):
        table.add_row(escape(kind), f"{count:,}")
    if len(kinds) > _MAX_IGNORED:
        table.add_row(f"… and {len(kinds) - _MAX_IGNORED} kinds more", "")
    return table


def _fates(reader: Reader, plan: Plan) -> Counter[How]:
    """What becomes of the quantised weights of a quantised source."""
    fates: Counter[How] = Counter()
    options = plan.options
    is_rescaled = options.expert_scale != ExpertScale.WISE
    for jobs in plan.experts if reader.scales else ():
        for expert in range(jobs.num_experts):
            for _, shape, scale, format in reader.expert_scales(jobs.layer, expert):
                how = foresee(format, scale, shape, options.numerics, is_rescaled=is_rescaled)
                fates[how] += 1
    return fates


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
