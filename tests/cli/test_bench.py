"""`octomoe bench moe` refuses in one line what it cannot do, and says and records what it did."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from octomoe.bench import moe as bench
from octomoe.bench.layers import Mode, Skew
from octomoe.bench.records import about
from octomoe.cli import app
from octomoe.cli.bench import _command

OWN = ["--experts", "8", "--width", "64", "--hidden-size", "32", "--top-k", "2"]


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "moe", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def machine(monkeypatch):
    """One with a GPU, on which nothing is measured; what was planned."""
    plans = []

    def measure(problem, peers, *, mode, repeats):
        runs = {name: {"us": 10.0, "share": 0.5, "error": 0.02} for name in ("octomoe", "read")}
        runs["octomoe"]["snr_db"] = 47.0
        return {
            "tokens": problem.num_tokens,
            "floor_us": 5.0,
            "runs": runs | ({"sglang": {"us": 12.0}} if mode is Mode.KERNEL else {}),
            "missing": {"sglang": "it fell over"} if mode is Mode.LAYER else {},
        }

    right = bench.bench

    def on_a_cpu(plan, found, **options):
        plans.append(plan)
        right(plan, found, device="cpu", **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "bench", on_a_cpu)
    return plans


def test_without_a_gpu_one_line_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "octomoe", "bench", "moe"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "octomoe: bench moe: this machine has no CUDA device, "
        "but needs one that torch sees: kernels are timed on it\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "op"], "--mode is 'op', but needs one of: kernel, layer, both"),
        (["--routing", "even"], "--routing is 'even', but needs one of: balanced, skewed, both"),
        (["--format", "fp4"], "--format is 'fp4', but needs one of: block128, tensor, "),
        (["--shape", "V3"], "--shape is 'V3', but needs one of: Q3N, DSV, Q235, Q30"),
        (OWN[:4], "--hidden-size is not given, but needs a size, as --experts, --width have"),
        ([*OWN[:-1], "9"], "--top-k is 9, but needs at most the 8 experts"),
        ([*OWN[:-1], "0"], "--top-k is 0, but needs at least 1"),
        (["--tokens", "1,x"], "--tokens is 1,x, but needs numbers from 1, such as 1,64"),
        (["--tokens", "0"], "--tokens is 0, but needs numbers from 1"),
        (["--peer", "tgi"], "--peer is 'tgi', but needs one of: sglang, "),
        (["--peer", "sglang"], "needs the kernels of sglang's wheel; give --sglang FOLDER"),
        (["--out", "/none/x.jsonl"], "--out is /none/x.jsonl, but needs a file in an existing"),
        (["--plot", "/"], "--plot is /, but needs a file in an existing folder"),
    ],
)
def test_refusals(machine, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in str(result.exception)
    assert machine == []


def test_all_of_it(machine, tmp_path):
    out, plot = tmp_path / "records.jsonl", tmp_path / "moe.svg"
    options = ["--tokens", "1,3", "--repeats", 5, "--out", out, "--plot", plot, "--json"]
    result = run(*OWN, *options, "--commit", "abc")
    assert result.exit_code == 0, result.exception
    records = json.loads(result.stdout)
    assert [json.loads(line) for line in out.read_text().splitlines()] == records
    assert [(r["mode"], r["routing"]) for r in records] == [
        (str(mode), str(skew)) for mode in Mode for skew in Skew
    ]
    assert {r["layer"] for r in records} == {"E8-F64-D32-A2"}
    assert {r["commit"] for r in records} == {"abc"}
    assert plot.read_text().startswith("<svg")
    (plan,) = machine
    assert (plan.tokens, plan.repeats) == ([1, 3], 5)
    err = result.stderr
    assert "E8-F64-D32-A2: E=8 F=64 D=32 A=2, block128, kernel, balanced routing" in err
    assert "without vllm: needs the package vllm (0.11 or newer)" in err
    assert "  without sglang: it fell over" in err
    assert "times as fast as the fastest peer: 1.20 to 1.20, geometric mean 1.20 of 4" in err


def test_a_wrong_output_ends_it_in_one_line(machine, monkeypatch, tmp_path):
    right, calls = bench.measure, []

    def measure(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise AssertionError("octomoe: relative error 0.5")
        return right(*arguments, **options)

    monkeypatch.setattr(bench, "measure", measure)
    out = tmp_path / "records.jsonl"
    done = run(*OWN, "--tokens", "1,2", "--mode", "layer", "--routing", "balanced", "--out", out)
    assert done.exit_code == 1
    assert str(done.exception) == (
        "bench moe: octomoe: relative error 0.5; please report it, with the command; "
        f"{out} has what was measured before"
    )
    assert [result["tokens"] for result in json.loads(out.read_text())["results"]] == [1]


def test_one_of_each(machine):
    arguments = ["--shape", "Q3N", *OWN, "--mode", "layer", "--routing", "skewed"]
    result = run(*arguments, "--tokens", 2, "--tokens", 7, "--format", "channel")
    assert result.exit_code == 0, result.exception
    (plan,) = machine
    assert plan.tokens == [2, 7]
    assert list(plan.shapes) == ["Q3N", "E8-F64-D32-A2"]
    assert (plan.modes, plan.skews) == ([Mode.LAYER], [Skew.SKEWED])
    assert result.stdout == ""


def test_records_name_no_files_of_this_machine():
    typed = "bench moe --sglang /home/me/peer --out=x.jsonl --tokens 8 --plot y.svg --json"
    assert _command(typed.split()) == "octomoe bench moe --sglang FOLDER --tokens 8 --json"
    assert _command(["bench", "moe", "--sglang=here", "--commit", "abc"]) == (
        "octomoe bench moe --sglang FOLDER"
    )


def test_records_say_where_they_are_from(machine):
    assert about("octomoe bench moe")["device"] == "NVIDIA H200"
