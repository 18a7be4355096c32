"""Every experts class of the installed Transformers is described, or refused with a reason.

Classes are built on the meta device at the size of their default configuration: no memory, and no
weights to download. Their activation is found out by trying it, as on a real model.
"""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from octomoe.integrations.transformers import experts_of, find_experts

transformers = pytest.importorskip("transformers", minversion="5.16")

DECORATED = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)", re.MULTILINE)
# What these compute, no `Activation` says or no kernel does.
REFUSED = {
    "Inkling2Experts": "activation of Inkling2Experts is none that octomoe.Activation expresses",
    "MuseSparkExperts": "MuseSparkExperts normalises each expert's output",
}


def experts_classes() -> Iterator[tuple[Any, str]]:
    """(modeling module, class name) of every class of the standard experts interface."""
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in DECORATED.findall(path.read_text(encoding="utf-8")):
            yield import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name


def build(modeling: Any, name: str) -> torch.nn.Module | None:
    """The class with the first default configuration of its module that fits, None if none does."""
    for config_name in (n for n in dir(modeling) if n.endswith("Config")):
        try:
            with torch.device("meta"):
                return getattr(modeling, name)(getattr(modeling, config_name)())
        except (AttributeError, TypeError, ValueError):
            continue
    return None


@pytest.mark.slow
def test_every_family_is_described_or_refused():
    described = []
    for modeling, name in experts_classes():
        module = build(modeling, name)
        if module is None:
            continue
        assert dict(find_experts(module)) == {"": module}
        if name in REFUSED:
            with pytest.raises(NotImplementedError, match=REFUSED[name]):
                experts_of(module)
            continue
        experts = experts_of(module)
        assert experts.num_experts == module.num_experts
        assert experts.w13.shape[1] == experts.intermediate_size * (1 + module.has_gate)
        described.append(name)
    # 59 classes of Transformers 5.23; a floor, since releases add and remove some.
    assert len(described) >= 50
