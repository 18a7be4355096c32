"""Layers of published models, from ``shapes.toml``, whose head explains its form."""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from octomoe.tune.entries import LayerKey

# GPUs that share the width of a layer's experts.
NUM_GPUS: Final = (1, 2, 4, 8)
_FILE: Final = Path(__file__).with_name("shapes.toml")
# What engines pad a GPU's share of the width to: whole scales, and 16 bytes for TMA.
_MULTIPLES: Final = {"block": 128, "late": 16, "mxfp8": 32, "weight_only": 16}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's layer of experts, undivided.

    Attributes:
        name, model_type: the model, and what its config.json calls its kind.
        num_experts, num_choices, width, depth: E, A, F, D.
        source: where these numbers are from.
        has_shared: every token chooses the last expert.
    """

    name: str
    model_type: str
    num_experts: int
    num_choices: int
    width: int
    depth: int
    source: str
    has_shared: bool = False


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a layer is, on how many GPUs, and whether every token chooses the last expert."""

    whose: str
    has_shared: bool


@cache
def model_shapes() -> tuple[ModelShape, ...]:
    """All models of ``shapes.toml``, in its order.

    >>> model_shapes()[0].name
    'Qwen3-30B-A3B'
    """
    tables = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(ModelShape(**table) for table in tables["models"])


def layers_of(
    models: Iterable[ModelShape], scales: str, num_gpus: Iterable[int] = NUM_GPUS
) -> dict[LayerKey, Owner]:
    """The layers that GPUs hold, and whose they are.

    >>> [key.width for key in layers_of(model_shapes()[:1], "block")]
    [768, 384, 256, 128]
    """
    found: dict[LayerKey, Owner] = {}
    multiple = _MULTIPLES[scales]
    for model in models:
        for count in num_gpus:
            width = -(-model.width // (count * multiple)) * multiple if count > 1 else model.width
            key = LayerKey(model.num_experts, width, model.depth, model.num_choices, scales)
            whose = f"{model.name}, {count} GPU{'s' if count > 1 else ''}"
            if key in found:
                whose = f"{found[key].whose}; {whose}"
            found[key] = Owner(whose, model.has_shared)
    return found
