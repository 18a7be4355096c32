"""Which configuration was measured to be fastest for a layer like this one.

The packaged tables are ``tables/<device>/fused_moe.json``. The environment variable OCTOMOE_TUNED
names a file in the same form, or a folder of such ``<device>/fused_moe.json``; its entries come
before the packaged ones. It is read once.
"""

import logging
import os
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache
from itertools import pairwise
from math import log2, sqrt
from pathlib import Path
from typing import Final

from octomoe.core.device import Target
from octomoe.core.formats import Format
from octomoe.errors import refusal
from octomoe.tune.entries import Entry, LayerKey, Table, read_table
from octomoe.tune.kinds import KINDS, Config, kind_of, why_illegal

VARIABLE: Final = "OCTOMOE_TUNED"
# Tokens that are tuned for unless others are asked for. More than the last count as the last: then
# every tile is full, and there are more of them than a GPU runs at once.
BUCKETS: Final = tuple(1 << i for i in range(14))
# How far, as `distance` counts, another layer may be, and how many times as many tokens.
NEAR: Final = 0.5
_NEAR_TOKENS: Final = 2
_PACKAGED: Final = Path(__file__).with_name("tables")
_log = logging.getLogger(__name__)


def table_config(
    num_tokens: int,
    num_choices: int,
    num_experts: int,
    width: int,
    depth: int,
    scales: str,
    target: Target,
    *,
    kinds: tuple[str, ...] = tuple(KINDS),
) -> Config | None:
    """The tuned configuration for a layer; None where nothing near enough was tuned.

    The layer's own entry comes first: of its buckets the one nearest to the tokens by ratio, at
    most a factor of two away. Then comes the bucket with the least `distance` of all entries with
    the same `scales`, if that is at most `NEAR`.

    Args:
        num_tokens, num_choices, num_experts, width, depth: T, A, E, F, D.
        scales: one of `SCALES`.
        target: what it runs on; only tables for a device of this name count.
        kinds: the kinds of `KINDS` that the caller can run.

    Raises:
        ValueError: a table is not in order.

    >>> table_config(8, 8, 128, 768, 2048, "block", Target("an unknown GPU")) is None
    True
    """
    limits, found = _ladder(num_choices, num_experts, width, depth, scales, target, kinds)
    num_tokens = min(num_tokens, BUCKETS[-1])
    if num_tokens < 1 or not found:
        return None
    bucket, config = found[bisect(limits, num_tokens)]
    return config if is_near(bucket, num_tokens) else None


def scales_of(activation_format: Format | None) -> str:
    """What of `SCALES` a layer of 8-bit weights has, by what its activations are quantised to.

    >>> from octomoe.core.formats import FP8_GROUP128
    >>> scales_of(FP8_GROUP128), scales_of(None)
    ('block', 'weight_only')
    """
    if activation_format is None:
        return "weight_only"
    block = activation_format.block[2]
    return {128: "block", 32: "mxfp8"}.get(block, "late")


def distance(one: LayerKey, num_tokens: int, other: LayerKey, other_tokens: int) -> float:
    """How different two problems are, in doublings.

        |log2 r/r'| + |log2 b/b'| / 2 + |log2 F/F'| / 2 + |log2 D/D'| / 4

    with r = T A / E, the rows of an expert, and b = E (1 - (1 - 1/E)^(T A)) F D, what is read of
    weights, of the experts that are active on average.

    >>> from dataclasses import replace
    >>> key = LayerKey(128, 768, 2048, 8, "block")
    >>> distance(key, 8, replace(key, width=384), 8)
    1.0
    """
    (rows, num_bytes), (other_rows, other_bytes) = (
        _load(key, tokens) for key, tokens in ((one, num_tokens), (other, other_tokens))
    )
    return (
        abs(log2(rows / other_rows))
        + abs(log2(num_bytes / other_bytes)) / 2
        + _difference_of_sizes(one, other)
    )


def is_near(bucket: int, num_tokens: int) -> bool:
    """Whether what was measured for one number of tokens may serve another."""
    return bucket <= _NEAR_TOKENS * num_tokens and num_tokens <= _NEAR_TOKENS * bucket


def table_path(folder: Path, device: str) -> Path:
    """Where a folder has the table of a device.

    >>> table_path(Path("tables"), "NVIDIA H200").as_posix()
    'tables/nvidia-h200/fused_moe.json'
    """
    return folder / device.lower().replace(" ", "-").replace("/", "-") / "fused_moe.json"


@lru_cache(maxsize=4096)
def _ladder(
    num_choices: int,
    num_experts: int,
    width: int,
    depth: int,
    scales: str,
    target: Target,
    kinds: tuple[str, ...],
) -> tuple[tuple[float, ...], tuple[tuple[int, Config], ...]]:
    """Buckets with configurations for a layer, and the numbers of tokens between neighbours."""
    entries = _entries(target.name)
    key = LayerKey(num_experts, width, depth, num_choices, scales)
    found: dict[int, Config] = {}
    if entries and min(num_experts, width, depth, num_choices) > 0:
        own = [entries[key]] if key in entries else []
        found = {bucket: config for bucket, config, _ in _legal(own, target, kinds)}
        known = tuple(found)
        others = [
            entry
            for other, entry in entries.items()
            if other.scales == scales and _difference_of_sizes(key, other) <= NEAR
        ]
        choices = list(_legal(others, target, kinds))
        for bucket in BUCKETS:
            if choices and not any(is_near(n, bucket) for n in known):
                distances = [distance(key, bucket, entry.key, n) for n, _, entry in choices]
                if (least := min(distances)) <= NEAR:
                    found[bucket] = choices[distances.index(least)][1]
    buckets = sorted(found)
    limits = tuple(sqrt(a * b) for a, b in pairwise(buckets))
    return limits, tuple((bucket, found[bucket]) for bucket in buckets)


def _legal(
    entries: Iterable[Entry], target: Target, kinds: tuple[str, ...]
) -> Iterator[tuple[int, Config, Entry]]:
    """The best configuration of each bucket that can run."""
    for entry in entries:
        for bucket in entry.buckets:
            for choice in bucket.choices:
                is_asked = kind_of(choice.config) in kinds
                if is_asked and why_illegal(choice.config, entry.key.scales, target) is None:
                    yield bucket.num_tokens, choice.config, entry
                    break


def _load(key: LayerKey, num_tokens: int) -> tuple[float, float]:
    """Rows of an expert, and bytes of active experts' weights."""
    num_experts, num_chosen = key.num_experts, num_tokens * key.num_choices
    active = num_experts * (1 - (1 - 1 / num_experts) ** num_chosen)
    return num_chosen / num_experts, active * key.width * key.depth


def _difference_of_sizes(one: LayerKey, other: LayerKey) -> float:
    return abs(log2(one.width / other.width)) / 2 + abs(log2(one.depth / other.depth)) / 4


@cache
def _entries(device: str) -> Mapping[LayerKey, Entry]:
    """What was measured on a device, by the user or by us."""
    packaged = table_path(_PACKAGED, device)
    tables = [read_table(packaged)] if packaged.is_file() else []
    if stated := os.environ.get(VARIABLE):
        path = Path(stated)
        if not path.exists():
            got = f"is {stated}, which does not exist"
            raise ValueError(
                refusal("table_config", VARIABLE, got, "a table or a folder of tables")
            )
        path = table_path(path, device) if path.is_dir() else path
        table = read_table(path) if path.is_file() else Table("")
        if table.device == device:
            tables.append(table)
        else:
            what = f"is a table for {table.device}" if table.device else "is no file"
            _log.warning("%s=%s has nothing for %s: %s %s", VARIABLE, stated, device, path, what)
    return {key: entry for table in tables for key, entry in table.entries.items()}
