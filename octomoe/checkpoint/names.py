"""Who a tensor is: the experts of every layer of a checkpoint, found by the family's record.

A layout is never guessed from a shape: the record states it, and the sizes that config.json
states must fit.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

from octomoe.checkpoint.families import (
    AXES,
    Family,
    Layout,
    Part,
    Role,
    find_family,
    load_families,
    lookup,
    text_configs,
)
from octomoe.errors import refusal

__all__ = [
    "AXES",
    "ExpertLayer",
    "Family",
    "Layout",
    "Part",
    "Role",
    "find_family",
    "find_layers",
    "load_families",
    "matches",
    "natural_order",
]


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one layer of a checkpoint.

    Attributes:
        module: name of the experts module, e.g. ``"model.layers.0.mlp.experts"``.
        layer: the layer's number.
        layout: how they are stored.
        num_experts, hidden_size, intermediate_size: E, H and I.
        is_mtp: whether it belongs to multi-token prediction.
        has_bias: whether the checkpoint holds the layout's biases.
    """

    module: str
    layer: int
    layout: Layout
    num_experts: int
    hidden_size: int
    intermediate_size: int
    is_mtp: bool = False
    has_bias: bool = False

    def part(self, role: Role) -> Part | None:
        """The part of exactly this role, None if the layout has none."""
        return next((part for part in self.layout.parts if part.role == role), None)

    def tensor(self, role: Role, expert: int) -> str:
        """Full name of the tensor of a role that holds an expert.

        Raises:
            ValueError: the layout has no part of that role.
        """
        return f"{self.module}.{self._part(role).name.replace('{expert}', str(expert))}"

    def bias(self, role: Role, expert: int) -> str:
        """Full name of the bias of a role that holds an expert, "" if there is none.

        Raises:
            ValueError: the layout has no part of that role.
        """
        bias = self._part(role).bias.replace("{expert}", str(expert))
        return f"{self.module}.{bias}" if bias and self.has_bias else ""

    @property
    def names(self) -> list[str]:
        """Full names of all its weights, then of all its biases if it has any."""
        suffixes = [part.name for part in self.layout.parts]
        if self.has_bias:
            suffixes += [part.bias for part in self.layout.parts if part.bias]
        return [f"{self.module}.{n}" for s in suffixes for n in _each_expert(s, self.num_experts)]

    def _part(self, role: Role) -> Part:
        part = self.part(role)
        if part is None:
            roles = ", ".join(part.role for part in self.layout.parts)
            raise ValueError(
                refusal("ExpertLayer", "role", f"is {role}", f"one of {self.layout.name}: {roles}")
            )
        return part


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits a pattern: ``*`` is anything, ``{layer}`` is digits.

    >>> matches("model.layers.10.mlp.gate.weight", ["*layers.{layer}.mlp.gate.weight"])
    True
    """
    return any(_compiled(pattern).fullmatch(name) for pattern in patterns)


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def find_layers(
    family: Family, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> list[ExpertLayer]:
    """The experts of every layer of a checkpoint; all there, and of the sizes config.json states.

    Args:
        family: the model's record.
        config: config.json.
        shapes: shape of every tensor in the checkpoint; those that are no expert's are ignored.

    Returns:
        One per experts module, by layer; those of multi-token prediction last.

    Raises:
        ValueError: there is no experts module, one mixes layouts, lacks tensors or holds ones of
            another shape, or config.json lacks a size.
    """
    modules = _experts_modules(family, shapes)
    if not modules:
        got = f"holds no experts of {family.name}"
        needs = f"tensors such as {family.experts[0]}.{family.layouts[0].parts[0].name}"
        do = "does config.json belong to it? a record for other names goes into --family-file"
        _fail("the checkpoint", got, needs, do)
    num_layers = _size(family, config, "num_layers", 0)
    layers = []
    for module, highest in modules.items():
        present = set(highest)
        number = _layer_number(family, module)
        is_mtp = number >= num_layers or matches(module, family.mtp)
        num_experts = _size(family, config, "num_experts", number)
        hidden_size = _size(family, config, "hidden_size", number)
        width = _size(family, config, "intermediate_size", number)
        spare = _size(family, config, "spare_experts", number) if family.spare_experts else 0
        candidates = []
        for layout in family.layouts:
            if present <= _suffixes(layout):
                has_bias = any(part.bias in present for part in layout.parts if part.bias)
                layer = ExpertLayer(
                    module, number, layout, num_experts, hidden_size, width, is_mtp, has_bias
                )
                error = (
                    _surplus(layer, highest, spare)
                    or _missing(layer, shapes)
                    or _misfit(layer, shapes)
                )
                candidates.append((error, layer))
        if not candidates:
            got = f"holds {', '.join(sorted(present))}"
            needs = "the tensors of one layout: " + "; ".join(
                f"{layout.name} ({', '.join(part.name for part in layout.parts)})"
                for layout in family.layouts
            )
            _fail(module, got, needs, "was it written by two tools?")
        # Layouts of the same names differ in axes or packing; the sizes must allow only one.
        fitting = [layer for error, layer in candidates if not error]
        if not fitting:
            raise ValueError(candidates[0][0])
        if len(fitting) > 1:
            got = f"fits the layouts {' and '.join(layer.layout.name for layer in fitting)}"
            do = "state the right one alone in a record and pass it with --family-file"
            _fail(module, got, "one that fits, since a shape must not decide", do)
        layers.append(fitting[0])
    return sorted(layers, key=lambda layer: (layer.is_mtp, layer.layer, layer.module))


def _experts_modules(family: Family, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Experts module -> name of a part or bias -> highest expert it is there for."""
    modules: dict[str, dict[str, int]] = defaultdict(dict)
    for suffix in sorted({s for layout in family.layouts for s in _suffixes(layout)}):
        tail = suffix.rpartition("{expert}")[2]
        behind = re.escape(suffix).replace(re.escape("{expert}"), r"(?P<expert>0|[1-9]\d*)")
        tests = [
            re.compile(rf"(?P<module>{_regex(pattern)})\.{behind}", re.DOTALL)
            for pattern in family.experts
        ]
        for name in names:
            if not name.endswith(tail):
                continue
            found = next(filter(None, (test.fullmatch(name) for test in tests)), None)
            if found:
                expert = int(found.groupdict().get("expert", -1))
                highest = modules[found["module"]]
                highest[suffix] = max(expert, highest.get(suffix, -1))
    return modules


def _surplus(layer: ExpertLayer, highest: Mapping[str, int], spare: int) -> str:
    """What to say of experts past the last one, "" if there are none."""
    for suffix, expert in highest.items():
        if expert >= layer.num_experts + spare:
            got = f"holds {suffix.replace('{expert}', str(expert))}"
            needs = f"only {layer.num_experts} experts, as config.json states"
            do = "does config.json belong to this checkpoint?"
            return refusal("find_layers", layer.module, got, needs, do)
    return ""


def _missing(layer: ExpertLayer, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What to say of tensors that are not there, "" if all are."""
    names = layer.names
    lacking = [name for name in names if name not in shapes]
    if lacking:
        got = f"lacks {len(lacking)} of {len(names)} tensors: {', '.join(lacking[:3])}"
        got += ", ..." if len(lacking) > 3 else ""
        needs = f"all parts of {layer.num_experts} experts (layout {layer.layout.name})"
        return refusal("find_layers", layer.module, got, needs, "is a shard missing?")
    return ""


def _misfit(layer: ExpertLayer, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What to say of the first tensor of another shape than the sizes need, "" if none."""
    for part in layer.layout.parts:
        weights = _allowed(part, layer)
        biases = [tuple(_axis(axis, part, layer) for axis in part.axes.split() if axis != "in")]
        if part.axes.startswith("expert*"):
            biases = [(layer.num_experts, _axis("out", part, layer))]
        checks = [(part.name, weights)]
        checks += [(part.bias, biases)] if part.bias and layer.has_bias else []
        for suffix, allowed in checks:
            for name in _each_expert(suffix, layer.num_experts):
                shape = tuple(shapes[f"{layer.module}.{name}"])
                if shape not in allowed:
                    got = f"has shape {shape}"
                    needs = (
                        f"{' or '.join(map(str, allowed))}: {part.axes} of {layer.num_experts} "
                        f"experts, hidden size {layer.hidden_size} and width "
                        f"{layer.intermediate_size}, as config.json and layout "
                        f"{layer.layout.name} state"
                    )
                    do = "does config.json belong to this checkpoint?"
                    return refusal("find_layers", f"{layer.module}.{name}", got, needs, do)
    return ""


def _allowed(part: Part, layer: ExpertLayer) -> list[tuple[int, ...]]:
    shape = tuple(_axis(axis, part, layer) for axis in part.axes.split())
    if not part.packed:
        return [shape]
    outer, into = shape[:-1], shape[-1]
    whole_blocks = [(*outer, into // 32, 16)] if into % 32 == 0 else []
    return [(*outer, (into + 1) // 2), *whole_blocks]


def _axis(axis: str, part: Part, layer: ExpertLayer) -> int:
    width = layer.intermediate_size * (2 if part.role == Role.GATE_UP else 1)
    out, into = layer.hidden_size, width
    if part.role != Role.DOWN:
        out, into = into, out
    experts = layer.num_experts
    sizes = {"expert": experts, "out": out, "in": into}
    sizes |= {"expert*out": experts * out, "expert*in": experts * into}
    return sizes[axis]


def _each_expert(suffix: str, num_experts: int) -> Iterator[str]:
    if "{expert}" not in suffix:
        yield suffix
        return
    for expert in range(num_experts):
        yield suffix.replace("{expert}", str(expert))


def _suffixes(layout: Layout) -> set[str]:
    return {s for part in layout.parts for s in (part.name, part.bias) if s}


def _regex(pattern: str) -> str:
    escaped = re.escape(pattern)
    return escaped.replace(re.escape("*"), ".*").replace(re.escape("{layer}"), r"\d+")


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(_regex(pattern), re.DOTALL)


def _layer_number(family: Family, module: str) -> int:
    for pattern in family.experts:
        numbered = _regex(pattern).replace(r"\d+", r"(\d+)", 1)
        if found := re.fullmatch(numbered, module, re.DOTALL):
            return int(found[1])
    raise AssertionError(module)


def _size(family: Family, config: Mapping[str, Any], what: str, layer: int) -> int:
    """A size that config.json states; where it states a list, the layer's entry."""
    keys: tuple[str, ...] = getattr(family, what)
    places = ((part, key) for part in (*text_configs(config), config) for key in keys)
    for part, key in places:
        value = lookup(part, key)
        if isinstance(value, list):
            value = len(value) if what == "num_layers" else value[layer : layer + 1] or None
            value = value[0] if isinstance(value, list) else value
        if value is None:
            continue
        if type(value) is not int or value < (what != "spare_experts"):
            _fail(f"config.json's {key}", f"is {value!r}", "a positive whole number")
        return value
    if what == "spare_experts":
        return 0
    got = f"states no {what} for layer {layer}"
    needs = f"one of {', '.join(keys)}, as the record {family.name} says"
    return _fail("config.json", got, needs)


def _fail(argument: str, got: str, needs: str, do: str = "") -> NoReturn:
    raise ValueError(refusal("find_layers", argument, got, needs, do))
