"""Records of measurements: what was run and on what, a line of JSON each."""

import json
import subprocess
from pathlib import Path
from typing import Any, Final

import torch
import triton

import octomoe
from octomoe.tune.timing import Timing
from octomoe.version import VERSION

_ROOT: Final = Path(octomoe.__file__).parents[1]


def about(command: str, commit: str | None = None) -> dict[str, Any]:
    """What was run, and on what; `commit` where the code does not run in its clone."""
    smi = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "commit": commit or commit_of_clone() or VERSION,
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


def commit_of_clone() -> str:
    """Of the repository that this package lies in; empty where it was installed elsewhere."""
    # A package in an environment within someone else's repository is not of that one.
    return output_of("git", "describe", "--always", "--dirty") if (_ROOT / ".git").exists() else ""


def output_of(*command: str) -> str:
    """What a command prints; empty where it cannot run."""
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
