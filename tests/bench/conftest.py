"""Records as `octomoe bench moe` makes them, with made-up times."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from octomoe.bench.layers import SHAPES


@pytest.fixture
def make_record() -> Callable[..., dict[str, Any]]:
    def make(
        layer: str = "DSV",
        mode: str = "kernel",
        routing: str = "balanced",
        floors: dict[int, float | None] | None = None,
        **factors: float,
    ) -> dict[str, Any]:
        """Runs take their factor times the floor, and 10 us; those without a floor, 1 us."""
        runs = {"octomoe": 1.3, "read": 1.1} | factors
        results = []
        for tokens, floor in ({1: 5.0, 64: 50.0} if floors is None else floors).items():
            results.append(
                {
                    "tokens": tokens,
                    "num_active": 8,
                    "num_bytes": 10**6,
                    "num_flops": 10**9,
                    "floor_us": floor,
                    "runs": {
                        name: {
                            "us": (floor or 1.0) * factor + 10,
                            "share": floor and floor / (floor * factor + 10),
                            "error": 0.0231,
                            "snr_db": 47.1,
                        }
                        for name, factor in runs.items()
                    },
                    "missing": {},
                }
            )
        return {
            "commit": "abc",
            "command": "octomoe bench moe --sglang FOLDER",
            "device": "NVIDIA H200",
            "versions": {"torch": "2.11.0", "triton": "3.6.0"},
            "layer": layer,
            "shape": asdict(SHAPES[layer]),
            "format": "block128",
            "mode": mode,
            "routing": routing,
            "missing": {"vllm": "it is not installed"},
            "results": results,
        }

    return make
