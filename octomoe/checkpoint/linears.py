"""Linear layers outside the experts: which there are, and which may be quantised."""

import re
from collections import defaultdict
from typing import Final

from octomoe.checkpoint.names import Family, matches
from octomoe.checkpoint.options import Options
from octomoe.checkpoint.reader import Reader

# Never quantised, whatever the family: what is looked up, what chooses, what is tiny and sensitive.
_ALWAYS_KEPT: Final = (
    "*embed*", "*wte*", "*wpe*", "*lm_head*", "*norm*", "*router*", "*gate", "*gate.wg",
    "*shared_expert_gate*", "*classifier*", "*conv*", "*visual*", "*vision*", "*image*", "*audio*",
    "*multi_modal_projector*", "*mtp*", "*nextn*", "*weights_proj*", "*in_proj_a", "*in_proj_b",
    "*in_proj_ba",
)  # fmt: skip
_NO_LINEAR: Final = ("*embed*", "*wte*", "*wpe*", "*norm*", "*conv*")
# Projections that engines run as one: quantised all or none.
_FUSED: Final = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3")
_LAYER: Final = re.compile(r"\.(layers|blocks|h)\.(\d+)\.")
# Smaller than a scale block: nothing to gain.
_MIN_SIZE: Final = 128


def module_of(name: str) -> str:
    """The module that a weight belongs to."""
    return name.removesuffix(".weight")


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer, as far as its name and rank tell."""
    is_matrix = name.endswith(".weight") and len(shape) == 2
    return is_matrix and not matches(module_of(name), _NO_LINEAR)


def plain_linears(reader: Reader) -> list[str]:
    """Linear modules outside the experts that are not quantised."""
    experts = {name for layer in reader.layers for name in layer.names}
    return [
        module_of(name)
        for name, entry in reader.checkpoint.tensors.items()
        if name not in reader.scales and name not in experts and is_linear(name, entry.shape)
    ]


def find_linears(reader: Reader, options: Options, expert_names: set[str]) -> list[str]:
    """Weights outside the experts that ``all_linears`` quantises, in order.

    Decoder layers' matrices, except routers, embeddings, heads, vision towers, multi-token
    prediction, what the family keeps and what the user keeps.
    """
    last = 1 + max((layer.layer for layer in reader.layers if not layer.is_mtp), default=-1)
    siblings: dict[str, list[str]] = defaultdict(list)
    kept = set()
    found = []
    for name, entry in reader.checkpoint.tensors.items():
        if name in expert_names or not is_linear(name, entry.shape):
            continue
        module = module_of(name)
        parent, _, leaf = module.rpartition(".")
        if leaf in _FUSED:
            siblings[f"{parent} {leaf in _FUSED[:3]}"].append(name)
        layer = _LAYER.search(f".{module}.")
        is_kept = (
            layer is None
            or (reader.layers and int(layer[2]) >= last)
            or min(entry.shape) < _MIN_SIZE
            or _is_kept(reader.family, name)
            or options.is_kept(module)
        )
        if is_kept:
            kept.add(name)
        found.append(name)
    for group in siblings.values():
        if kept.intersection(group):
            kept.update(group)
    return [name for name in found if name not in kept]


def _is_kept(family: Family, name: str) -> bool:
    patterns = (*family.router, *family.keep, *family.mtp)
    return matches(module_of(name), (*_ALWAYS_KEPT, *patterns)) or matches(name, patterns)
