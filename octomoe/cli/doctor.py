"""`octomoe doctor`: what is installed, which devices there are, which backends run on them."""

import json
import platform
from importlib import metadata
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console
from rich.table import Table

from octomoe.core.device import Target
from octomoe.ops.dispatch import BACKENDS, OPS, why_not
from octomoe.version import VERSION

_PACKAGES: Final = ("torch", "triton", "safetensors", "transformers", "jinja2", "matplotlib")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Print versions, devices, and usable backends with the reasons against the others."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    findings = {
        "versions": versions(),
        "devices": {name: Target.of(name).name for name in devices},
        "backends": {name: _backends(torch.device(name)) for name in devices},
    }
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        _print(findings)


def versions() -> dict[str, str]:
    """Version of Python, OctoMoE and what it builds on; "not installed" where it is not."""
    found = {"octomoe": VERSION, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _backends(device: torch.device) -> dict[str, dict[str, str | None]]:
    """backend -> op -> why it cannot run there, None if it can."""
    return {backend: {op: why_not(op, backend, device) for op in OPS} for backend in BACKENDS}


def _print(findings: dict[str, Any]) -> None:
    console = Console(stderr=True)
    console.print("  ".join(f"{name} {version}" for name, version in findings["versions"].items()))
    table = Table("device", "backend", "usable for", "why not the others", title="Backends")
    for device, backends in findings["backends"].items():
        for backend, reasons in backends.items():
            usable = [op for op, reason in reasons.items() if reason is None]
            refusals = dict.fromkeys(reason for reason in reasons.values() if reason)
            everything = "every op" if len(usable) == len(reasons) else ", ".join(usable) or "none"
            label = f"{device} ({findings['devices'][device]})" if device != "cpu" else device
            table.add_row(label, backend, everything, "; ".join(refusals))
    console.print(table)
