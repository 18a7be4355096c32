"""Claims: benchmarks/tune_tables.py tunes the layers that are asked for, passes over those that are
done or too large, and goes on where it was stopped.
"""

import sys

import pytest
import torch

from benchmarks import tune_tables
from octomoe.cli.tune import Bench
from octomoe.core.device import Target
from octomoe.tune.entries import Bucket, Entry, LayerKey, Table, read_table
from octomoe.tune.timing import Timing

H200 = Target("NVIDIA H200", arch=90, sms=132, smem=232448, memory=140 << 30)
KEY = LayerKey(128, 768, 2048, 8, "block")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs the program on a made-up GPU, and says which layers were measured."""
    measured = []

    def bench_on(device, shape, format, skews):
        measured.append((shape.num_experts, shape.width, shape.num_choices))

        def measure(config, repeats):
            return Timing(1.0, 1.0, 1.0)

        return Bench(H200, lambda num_tokens: {str(s): measure for s in skews}, ("portable",))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune_tables.Target, "of", lambda device: H200)
    monkeypatch.setattr(sys.modules["octomoe.cli.tune"], "bench_on", bench_on)

    def call(*arguments):
        measured.clear()
        out = ("--out", str(tmp_path / "tuned.json"))
        monkeypatch.setattr(sys, "argv", ["tune_tables.py", *arguments, *out])
        return tune_tables.main(), list(measured)

    return call


def test_layers_are_tuned_once(run, tmp_path):
    arguments = ("--models", "Qwen3-30B*", "--tokens", "1", "64")
    assert run(*arguments) == (0, [(128, width, 8) for width in (768, 384, 256, 128)])
    table = read_table(tmp_path / "tuned.json")
    assert table.device == H200.name
    assert table.entries[KEY].about["model"] == "Qwen3-30B-A3B, 1 GPU"
    assert run(*arguments) == (0, [])
    assert run(*arguments, "128", "--gpus", "1", "2") == (0, [(128, 768, 8), (128, 384, 8)])
    assert run(*arguments, "--gpus", "8", "--again") == (0, [(128, 128, 8)])
    assert len(read_table(tmp_path / "tuned.json").entries) == 4


def test_out_of_time(run, capsys):
    assert run("--models", "Qwen3-30B*", "--total-seconds", "0") == (0, [])
    assert "Out of time before 1 of 4: Qwen3-30B-A3B, 1 GPU" in capsys.readouterr().err


def test_a_layer_that_does_not_fit_is_passed_over():
    large = LayerKey(384, 2048, 7168, 8, "block")
    assert tune_tables.why_skip(large, Table(""), [1], 24 << 30) == "its weights take 17 GB"
    assert tune_tables.why_skip(large, Table(""), [1], 140 << 30) is None


def test_a_layer_that_lacks_a_bucket_is_tuned():
    table = Table("", {KEY: Entry(KEY, (Bucket(8, (), {}),))})
    assert tune_tables.why_skip(KEY, table, [8], 140 << 30) == "the table has it"
    assert tune_tables.why_skip(KEY, table, [8, 16], 140 << 30) is None


def test_without_a_gpu_there_is_a_list(run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run() == (2, [])
    assert "no CUDA device; --list shows what there is" in capsys.readouterr().err
    assert run("--list", "--models", "DeepSeek-V3", "--gpus", "8") == (0, [])
    assert capsys.readouterr().out.split(maxsplit=4) == [
        "E=256",
        "F=256",
        "D=7168",
        "A=8",
        "DeepSeek-V3, 8 GPUs\n",
    ]
