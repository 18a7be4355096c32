"""One record per model family says how its experts are named and laid out.

The records are in ``families.toml``, whose head explains their form.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Final, NoReturn

from octomoe.errors import refusal

_BUILT_IN: Final = Path(__file__).with_name("families.toml")
# Axes of a stored weight, as `Part.axes` spells them.
AXES: Final = (
    "out in",
    "in out",
    "expert out in",
    "expert in out",
    "expert*out in",
    "expert*in out",
)
ORDERS: Final = ("gate_first", "up_first", "interleaved")
# Where config.json may hold the text model's own config; the innermost counts first.
_TEXT_CONFIGS: Final = (
    "thinker_config.text_config",
    "text_config",
    "language_config",
    "llm_config",
)


class Role(StrEnum):
    """What an expert weight does. `GATE_UP` is both in one tensor."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"
    GATE_UP = "gate_up"


@dataclass(frozen=True)
class Part:
    """One tensor (or, with ``{expert}`` in its name, one per expert) of an experts module.

    Attributes:
        role: what it does.
        name: its name behind the module's, e.g. ``"{expert}.gate_proj.weight"``.
        axes: its axes in order, one of `AXES`; ``*`` joins two axes into one.
        order: of gate and up along the ``out`` axis of a `Role.GATE_UP`: ``"gate_first"``,
            ``"up_first"`` (two halves) or ``"interleaved"`` (gate, up, gate, ...).
        bias: name of its bias behind the module's, or "".
        scale: name of its scale behind the module's where it follows no convention, or "".
        packed: ``"mxfp4"`` for FP4 pairs in bytes, along ``in``, with or without a block axis
            behind it; else "".
    """

    role: Role
    name: str
    axes: str
    order: str = "gate_first"
    bias: str = ""
    scale: str = ""
    packed: str = ""

    @property
    def is_per_expert(self) -> bool:
        """Whether every expert has its own tensor."""
        return "{expert}" in self.name


@dataclass(frozen=True)
class Layout:
    """A way to store the experts of a layer: its parts, by role."""

    name: str
    parts: tuple[Part, ...]

    @property
    def is_split(self) -> bool:
        """Whether every expert and projection has its own tensor."""
        return all(part.is_per_expert and part.role != Role.GATE_UP for part in self.parts)


@dataclass(frozen=True)
class Family:
    """A model family's record.

    Attributes:
        name: the record's name.
        model_types: config.json's ``model_type`` values it stands for.
        experts: patterns of the experts modules' names, ``*`` for anything, ``{layer}`` for the
            layer's number.
        layouts: layouts its checkpoints use; the first that is split is what GPU targets write.
        router: patterns of tensors that choose experts; never quantised.
        num_experts, hidden_size, intermediate_size, num_layers: where config.json says them:
            dotted keys, the first present counts. The hidden size is the experts' own input.
        spare_experts: the same for experts past the last one that compute nothing, but whose
            weights some checkpoints hold.
        keep: patterns of other tensors that are never quantised.
        mtp: patterns of multi-token-prediction modules, besides layers past the last one.
        gated: whether experts have a gate.
        neuron: Neuron's experts module and tensor renames; None if AWS Neuron has no such model.
    """

    name: str
    model_types: tuple[str, ...]
    experts: tuple[str, ...]
    layouts: tuple[Layout, ...]
    router: tuple[str, ...]
    num_experts: tuple[str, ...] = (
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
    )
    spare_experts: tuple[str, ...] = ()
    hidden_size: tuple[str, ...] = ("hidden_size",)
    intermediate_size: tuple[str, ...] = ("moe_intermediate_size",)
    num_layers: tuple[str, ...] = ("num_hidden_layers",)
    keep: tuple[str, ...] = ()
    mtp: tuple[str, ...] = ("mtp.*", "*.mtp.*")
    gated: bool = True
    neuron: Mapping[str, str] | None = None

    @property
    def split_layout(self) -> Layout:
        """The layout with one tensor per expert and projection."""
        return next(layout for layout in self.layouts if layout.is_split)


def load_families(path: Path | None = None) -> list[Family]:
    """The built-in records, behind those of a file in the same form.

    Args:
        path: a file as ``families.toml``'s head explains; its layouts may be the built-in ones.

    Raises:
        ValueError: the file is not in that form.
        FileNotFoundError: there is none.
    """
    return [*(_parse(path).families if path else ()), *_built_in().families]


def find_family(config: Mapping[str, Any], family_file: Path | None = None) -> Family:
    """The record of a model.

    Args:
        config: config.json.
        family_file: records that come before the built-in ones.

    Raises:
        ValueError: no record names the config's ``model_type``.
        NotImplementedError: it is one whose experts this library does not convert.
    """
    found = (part.get("model_type") for part in (config, *text_configs(config)))
    model_types = [name for name in found if isinstance(name, str)]
    own = _parse(family_file) if family_file else _Records((), {}, {})
    built_in = _built_in()
    known = {
        t: family for f in (built_in, own) for family in f.families for t in family.model_types
    }
    refused = {**built_in.refused, **own.refused}
    own_types = {t for family in own.families for t in family.model_types}
    for name in model_types:
        if name in refused and name not in own_types:
            raise NotImplementedError(f"find_family: model_type {name!r}: {refused[name]}")
        if name in known:
            return known[name]
    needs = "one that a record in families.toml names"
    do = "write a record (octomoe/checkpoint/families.toml explains how) and pass --family-file"
    if not model_types:
        raise ValueError(refusal("find_family", "config", "states no model_type", needs, do))
    near = [n for t in model_types for n in get_close_matches(t, known, n=5, cutoff=0.5)]
    if near:
        do += f"; closest known: {', '.join(dict.fromkeys(near))}"
    got = f"is {' / '.join(repr(name) for name in model_types)}"
    raise ValueError(refusal("find_family", "model_type", got, needs, do))


def text_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configs of a text model inside another model's config."""
    for dotted in _TEXT_CONFIGS:
        value = lookup(config, dotted)
        if isinstance(value, Mapping):
            yield value


def lookup(config: Mapping[str, Any], dotted: str) -> Any:
    """A config's entry at a dotted key, None if there is none."""
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True)
class _Records:
    families: tuple[Family, ...]
    layouts: Mapping[str, Layout]
    # model_type -> why its experts are not converted.
    refused: Mapping[str, str]


@cache
def _built_in() -> _Records:
    return _parse(_BUILT_IN)


def _parse(path: Path) -> _Records:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # Also what is no UTF-8.
        needs = "TOML, as octomoe/checkpoint/families.toml"
        raise ValueError(refusal("load_families", str(path), f"says {error}", needs)) from error
    for key, table in tables.items():
        if key not in ("layouts", "families", "refused") or not isinstance(table, dict):
            _fail_in(path, key, "is unknown here", "tables [layouts.*], [families.*], [refused]")
    layouts = dict(_built_in().layouts) if path != _BUILT_IN else {}
    for name, table in tables.get("layouts", {}).items():
        layouts[name] = _layout(path, name, table)
    families = [
        _family(path, name, table, layouts) for name, table in tables.get("families", {}).items()
    ]
    seen: dict[str, str] = {}
    for family in families:
        for model_type in family.model_types:
            if model_type in seen:
                got = f"names model_type {model_type!r}, as {seen[model_type]} does"
                _fail_in(path, family.name, got, "every model_type in one record")
            seen[model_type] = family.name
    refused = tables.get("refused", {})
    for name, reason in refused.items():
        if not isinstance(reason, str):
            _fail_in(path, "refused", f"has {name} = {reason!r}", "a reason in words")
    return _Records(tuple(families), layouts, refused)


def _layout(path: Path, name: str, table: Any) -> Layout:
    record = f"layout {name}"
    parts = table.get("parts") if isinstance(table, dict) and set(table) == {"parts"} else None
    if not isinstance(parts, list) or not parts:
        _fail_in(path, record, f"is {table!r}", "parts = [{...}, ...] and nothing else")
    made = []
    for given in parts:
        values = _values(path, record, given, Part)
        for key, allowed in (
            ("role", tuple(Role)),
            ("axes", AXES),
            ("order", ORDERS),
            ("packed", ("", "mxfp4")),
        ):
            if key in values and values[key] not in allowed:
                got = f"has {key} = {values[key]!r}"
                _fail_in(path, record, got, f"one of {', '.join(repr(str(a)) for a in allowed)}")
        part = Part(**values | {"role": Role(values["role"])})
        if part.is_per_expert == ("expert" in part.axes) or part.name.count("{expert}") > 1:
            got = f"has name = {part.name!r} with axes = {part.axes!r}"
            _fail_in(path, record, got, "{expert} in the name, or an expert axis, and not both")
        if part.bias and part.is_per_expert != ("{expert}" in part.bias):
            got = f"has bias = {part.bias!r} for name = {part.name!r}"
            _fail_in(path, record, got, "{expert} in both names or in none")
        if part.packed and not part.axes.endswith(" in"):
            _fail_in(path, record, f"packs axes = {part.axes!r}", "axes that end with in")
        made.append(part)
    roles = sorted(part.role for part in made)
    if roles not in (["down", "gate", "up"], ["down", "gate_up"], ["down", "up"]):
        needs = "gate, up and down; gate_up and down; or, without a gate, up and down"
        _fail_in(path, record, f"has the roles {', '.join(roles)}", needs)
    return Layout(name, tuple(made))


def _family(path: Path, name: str, table: Any, layouts: Mapping[str, Layout]) -> Family:
    values = _values(path, name, table, Family)
    for pattern in values["experts"]:
        if pattern.count("{layer}") != 1:
            got = f"has experts = {pattern!r}"
            _fail_in(path, name, got, "{layer} in each, once", "put it where the number is")
    unknown = [layout for layout in values["layouts"] if layout not in layouts]
    if unknown:
        got = f"has the unknown layout {unknown[0]!r}"
        _fail_in(path, name, got, f"one of {', '.join(layouts)}", "or a [layouts.*] of its own")
    used = tuple(layouts[layout] for layout in values["layouts"])
    family = Family(**values | {"name": name, "layouts": used})
    if not any(layout.is_split for layout in used):
        got = f"has layouts = {list(values['layouts'])}"
        _fail_in(path, name, got, "one with a tensor per expert and projection", 'add "split"')
    meanings: dict[str, tuple[str, str]] = {}
    for layout in used:
        roles = {part.role for part in layout.parts}
        if family.gated != bool(roles & {Role.GATE, Role.GATE_UP}):
            got = f"has gated = {str(family.gated).lower()} with layout {layout.name}"
            _fail_in(path, name, got, "layouts with a gate if and only if experts have one")
    for part in (part for layout in used for part in layout.parts):
        if meanings.setdefault(part.name, (part.role, part.order)) != (part.role, part.order):
            got = f"has two layouts in which {part.name!r} has another role or order"
            _fail_in(path, name, got, "one meaning per name: no shape tells them apart")
    return family


def _values(path: Path, record: str, table: Any, kind: type[Part] | type[Family]) -> dict[str, Any]:
    """A table's entries for the fields of a dataclass: all there, none unknown, of its types."""
    if not isinstance(table, dict):
        _fail_in(path, record, f"is {table!r}", "a table")
    own_name = {"name"} if kind is Family else set()
    known = {field.name: field for field in fields(kind) if field.name not in own_name}
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            do = f"did you mean {near[0]}?" if near else ""
            _fail_in(path, record, f"has the unknown key {key!r}", f"one of {', '.join(known)}", do)
    lacking = [k for k, f in known.items() if f.default is MISSING and k not in table]
    if lacking:
        _fail_in(path, record, f"lacks {', '.join(lacking)}", "every key without a default")
    values = {}
    for key, value in table.items():
        values[key], needs = _typed(value, known[key].type)
        if needs:
            _fail_in(path, record, f"has {key} = {value!r}", needs)
    return values


def _typed(value: Any, kind: Any) -> tuple[Any, str]:
    """A value as a field's type, and what it needs to be if it is none."""
    if kind is bool:
        return value, "" if isinstance(value, bool) else "true or false"
    if kind in (str, Role):
        return value, "" if isinstance(value, str) else "text"
    texts = list(value.values()) if isinstance(value, dict) else value
    wanted = dict if kind == Mapping[str, str] | None else list
    is_right = isinstance(value, wanted) and all(isinstance(text, str) for text in texts)
    if wanted is dict:
        return value, "" if is_right else "a table of texts"
    return (tuple(value), "") if is_right else (value, "a list of texts")


def _fail_in(path: Path, record: str, got: str, needs: str, do: str = "") -> NoReturn:
    do = do or "the head of octomoe/checkpoint/families.toml explains the form"
    raise ValueError(refusal("load_families", f"{path}: {record}", got, needs, do))
