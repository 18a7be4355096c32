"""What was measured of layers on a device: values, and the JSON file that holds them."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, NoReturn

from octomoe.errors import refusal
from octomoe.tune.kinds import SCALES, Config, config_from_json, config_to_json, kind_of

_OP: Final = "fused_moe"


@dataclass(frozen=True, slots=True)
class LayerKey:
    """A layer of experts as one GPU holds it.

    Attributes:
        num_experts, width, depth, num_choices: E, F, D, A; a shared expert counts in E and A.
        scales: one of `SCALES`.
    """

    num_experts: int
    width: int
    depth: int
    num_choices: int
    scales: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The best configuration of a kind, and microseconds for each routing it was measured with."""

    config: Config
    us: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is best for a number of tokens.

    Attributes:
        num_tokens: T.
        choices: of different kinds, the best first.
        default_us: what the configuration took that is chosen without a table.
    """

    num_tokens: int
    choices: tuple[Choice, ...]
    default_us: Mapping[str, float]

    def choice(self, kinds: Iterable[str]) -> Choice | None:
        """The best of some kinds."""
        return next((c for c in self.choices if kind_of(c.config) in kinds), None)


@dataclass(frozen=True, slots=True)
class Entry:
    """What was measured of a layer.

    Attributes:
        key: the layer.
        buckets: by rising numbers of tokens.
        about: whose layer it is, versions, and the like.
    """

    key: LayerKey
    buckets: tuple[Bucket, ...]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured on a device, by its name."""

    device: str
    entries: Mapping[LayerKey, Entry] = field(default_factory=dict)

    def merged(self, entry: Entry) -> "Table":
        """With `entry`, whose buckets take the place of those for as many tokens."""
        old = self.entries.get(entry.key)
        buckets = {b.num_tokens: b for b in (*(old.buckets if old else ()), *entry.buckets)}
        entry = replace(entry, buckets=tuple(buckets[n] for n in sorted(buckets)))
        return replace(self, entries={**self.entries, entry.key: entry})


def read_table(path: Path) -> Table:
    """A table from its file.

    Raises:
        ValueError: it is not in order: not JSON, unknown or missing fields, values out of range.
    """
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # Also what is no UTF-8.
        _fail(path, "the file", f"says {error}", "JSON")
    table = _take(path, "the table", text, {"op": str, "device": str, "entries": list})
    if table["op"] != _OP:
        _fail(path, "op", f"is {table['op']!r}", repr(_OP))
    entries: dict[LayerKey, Entry] = {}
    for index, given in enumerate(table["entries"]):
        entry = _entry(path, f"entries[{index}]", given)
        if entry.key in entries:
            _fail(path, f"entries[{index}]", "is of a layer that has one", "one entry per layer")
        entries[entry.key] = entry
    return Table(table["device"], entries)


def write_table(path: Path, table: Table) -> None:
    """Write a table where nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = sorted(table.entries.values(), key=lambda entry: tuple(asdict(entry.key).values()))
    head = f'"op": "{_OP}",\n"device": {json.dumps(table.device)},\n"entries": ['
    body = ",\n".join(_entry_text(entry) for entry in entries)
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(f"{{\n{head}\n{body}\n]\n}}\n", encoding="utf-8")
    os.replace(partial, path)


def entry_to_json(entry: Entry) -> dict[str, Any]:
    """An entry as its file has it."""
    buckets = [
        {
            "tokens": bucket.num_tokens,
            "default_us": dict(bucket.default_us),
            "choices": [
                {"kind": kind_of(c.config), "us": dict(c.us), "config": config_to_json(c.config)}
                for c in bucket.choices
            ],
        }
        for bucket in entry.buckets
    ]
    return {"layer": asdict(entry.key), "about": dict(entry.about), "buckets": buckets}


def _entry_text(entry: Entry) -> str:
    """An entry as text, with a line for each choice."""
    parts = entry_to_json(entry)
    buckets = []
    for bucket in parts["buckets"]:
        choices = ",\n".join(f"      {json.dumps(choice)}" for choice in bucket["choices"])
        head = f'"tokens": {bucket["tokens"]}, "default_us": {json.dumps(bucket["default_us"])}'
        buckets.append(f'    {{{head}, "choices": [\n{choices}\n    ]}}')
    head = f'"layer": {json.dumps(parts["layer"])},\n  "about": {json.dumps(parts["about"])}'
    return f'{{ {head},\n  "buckets": [\n' + ",\n".join(buckets) + "\n  ] }"


def _entry(path: Path, where: str, given: object) -> Entry:
    parts = _take(path, where, given, {"layer": dict, "about": dict, "buckets": list})
    sizes = {f.name: str if f.name == "scales" else int for f in fields(LayerKey)}
    key = LayerKey(**_take(path, f"{where}.layer", parts["layer"], sizes))
    if key.scales not in SCALES:
        _fail(path, f"{where}.layer", f"has scales {key.scales!r}", f"one of {', '.join(SCALES)}")
    if min(key.num_experts, key.width, key.depth, key.num_choices) < 1:
        _fail(path, f"{where}.layer", f"is {key}", "sizes from 1")
    buckets = [
        _bucket(path, f"{where}.buckets[{i}]", bucket) for i, bucket in enumerate(parts["buckets"])
    ]
    tokens = [bucket.num_tokens for bucket in buckets]
    if tokens != sorted(set(tokens)):
        _fail(path, f"{where}.buckets", f"are for {tokens} tokens", "rising numbers of tokens")
    return Entry(key, tuple(buckets), parts["about"])


def _bucket(path: Path, where: str, given: object) -> Bucket:
    types = {"tokens": int, "default_us": dict, "choices": list}
    parts = _take(path, where, given, types)
    if parts["tokens"] < 1:
        _fail(path, where, f"is for {parts['tokens']} tokens", "one token at least")
    choices = []
    for index, given_choice in enumerate(parts["choices"]):
        place = f"{where}.choices[{index}]"
        choice = _take(path, place, given_choice, {"kind": str, "us": dict, "config": dict})
        config = config_from_json(choice["kind"], choice["config"], f"{path}: {place}.config")
        choices.append(Choice(config, _times(path, place, choice["us"])))
    kinds = [kind_of(choice.config) for choice in choices]
    if not kinds or len(set(kinds)) < len(kinds):
        _fail(path, where, f"has choices of the kinds {kinds}", "one choice at least, one per kind")
    return Bucket(parts["tokens"], tuple(choices), _times(path, where, parts["default_us"]))


def _times(path: Path, where: str, given: Mapping[str, Any]) -> dict[str, float]:
    for routing, us in given.items():
        if not isinstance(us, int | float) or isinstance(us, bool) or not us > 0:
            _fail(path, where, f"takes {us!r} us with {routing} routing", "a number above zero")
    return {routing: float(us) for routing, us in given.items()}


def _take(path: Path, where: str, given: object, types: Mapping[str, type]) -> dict[str, Any]:
    """A table with these fields, of these types, and no others."""
    if not isinstance(given, dict) or given.keys() != types.keys():
        got = f"has {', '.join(map(str, given))}" if isinstance(given, dict) else f"is {given!r}"
        _fail(path, where, got, f"the fields {', '.join(types)}")
    for name, type_ in types.items():
        if not isinstance(given[name], type_) or isinstance(given[name], bool):
            _fail(path, f"{where}.{name}", f"is {given[name]!r}", f"a {type_.__name__}")
    return given


def _fail(path: Path, where: str, got: str, needs: str) -> NoReturn:
    raise ValueError(refusal("read_table", f"{path}: {where}", got, needs))
