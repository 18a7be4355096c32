"""What `octomoe tune` measures with: layers are made, and configurations checked and timed."""

from importlib import import_module

import pytest

from octomoe.bench.layers import Shape, Skew
from octomoe.core.device import Target
from octomoe.tune.candidates import candidates
from octomoe.tune.timing import Timing

# The function `tune` hides its module's name.
MODULE = import_module("octomoe.cli.tune")
SHAPE = Shape("", 4, 128, 128, 2)


@pytest.mark.parametrize("format", ["block128", "channel", "weight-only"])
def test_configurations_are_checked_and_timed(kernel_device, monkeypatch, format):
    def time_graphs(runs, *, repeats):
        return {name: Timing(float(repeats), 0.0, 0.0) for name in runs}

    # Replays of CUDA graphs need a CUDA device.
    monkeypatch.setattr("octomoe.bench.moe.time_graphs", time_graphs)
    bench = MODULE.bench_on(str(kernel_device), SHAPE, format, list(Skew))
    assert bench.target == Target.of(kernel_device)
    assert "portable" in bench.kinds
    measures = bench.measures(3)
    config = candidates(MODULE.key_of(SHAPE, format), 3, bench.target)["portable"][0]
    assert {skew: measures[skew](config, 7).us for skew in Skew} == dict.fromkeys(Skew, 7.0)
