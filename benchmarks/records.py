"""What benchmarks of single kernels share: equal bits, and where their records are kept."""

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from octomoe import QTensor, Routing

RESULTS: Final = Path(__file__).parent / "results"


def has_same_bits(actual: Any, expected: Any) -> bool:
    """Whether two tensors, QTensors or routings are the same bytes."""
    pairs = zip(_tensors_of(actual), _tensors_of(expected), strict=True)
    return all(a.shape == e.shape and torch.equal(_bytes(a), _bytes(e)) for a, e in pairs)


def results_file(name: str) -> Path:
    """Where records of this device's benchmark `name` are kept."""
    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    return RESULTS / device / f"{name}.jsonl"


def _tensors_of(value: Any) -> tuple[Tensor, ...]:
    match value:
        case QTensor():
            return value.data, value.scale
        case Routing():
            return value.expert_offsets, value.slot_of_choice_TA, value.choice_of_slot_S
        case tuple():
            return value
    return (value,)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
