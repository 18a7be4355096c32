"""What benchmarks of kernels share: equal bits, and records that say where they are from."""

import json
import subprocess
from pathlib import Path
from typing import Any, Final

import torch
import triton
from torch import Tensor

from octomoe import QTensor, Routing
from octomoe.tune.timing import Timing

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"


def has_same_bits(actual: Any, expected: Any) -> bool:
    """Whether two tensors, QTensors or routings are the same bytes."""
    pairs = zip(_tensors_of(actual), _tensors_of(expected), strict=True)
    return all(a.shape == e.shape and torch.equal(_bytes(a), _bytes(e)) for a, e in pairs)


def results_file(name: str) -> Path:
    """Where records of this device's benchmark `name` are kept."""
    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    return RESULTS / device / f"{name}.jsonl"


def about(command: str, commit: str | None) -> dict[str, Any]:
    """What was run, and on what; `commit` where the code does not run in its clone."""
    smi = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "commit": commit or output_of("git", "describe", "--always", "--dirty"),
        "command": command,
        "device": torch.cuda.get_device_name(),
        "driver": output_of(*smi),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }


def microseconds(timing: Timing) -> dict[str, float]:
    """A timing as it is recorded."""
    return {
        "us": round(timing.us, 2),
        "fastest": round(timing.fastest, 2),
        "slowest": round(timing.slowest, 2),
    }


def append(path: Path, record: dict[str, Any]) -> None:
    """One more line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def output_of(*command: str) -> str:
    """What a command prints; empty where it cannot run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


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
