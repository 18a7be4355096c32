"""What benchmarks/fused_moe.py times computes the layer, and a contender that does not is caught.

SGLang's kernels run where OCTOMOE_SGLANG_PEER names a folder that benchmarks/peers/sglang.py made.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import fused_moe as benchmark
from benchmarks.layers import SCALING, Shape, make_experts, make_problem, some_tokens
from benchmarks.peers import sglang
from octomoe.tune.timing import Timing

FOLDER = os.environ.get("OCTOMOE_SGLANG_PEER")
SHAPE = Shape("", 5, 128, 256, 3, has_shared=True)
CASES = {"one token": 1, "some": 20}


@pytest.fixture(params=CASES.values(), ids=CASES)
def problem(request, kernel_device):
    return make_problem(SHAPE, make_experts(SHAPE, kernel_device), request.param)


@pytest.fixture
def no_clock(monkeypatch):
    """Time nothing: replays of CUDA graphs need a CUDA device."""

    def timings(runs, *, repeats):
        return {name: Timing(10.0 * (i + 1), 9.0, 11.0) for i, name in enumerate(runs)}

    monkeypatch.setattr(benchmark, "time_graphs", timings)


def test_ours_are_close_to_the_reference(problem, no_clock):
    result = benchmark.measure(problem, None, repeats=1)
    runs = result["runs"]
    assert list(runs) == ["octomoe", "octomoe op"]
    assert all(run["error"] < 0.03 and run["snr_db"] > 40 for run in runs.values())
    assert result["tokens"] == problem.num_tokens
    assert json.loads(json.dumps(result)) == result
    assert benchmark.ratio(result) is None
    # Nobody knows a CPU's floor.
    floor = "0.1" if torch.cuda.is_available() else "-"
    assert benchmark.row("DSV", result).split()[:4] == ["DSV", str(problem.num_tokens), floor, "-"]


def test_a_configuration_is_checked_before_it_is_timed(problem, no_clock):
    config = replace(benchmark.looked_up(problem), combined=64)
    assert benchmark.time_config(problem, config).us == 10.0


@pytest.mark.parametrize("name", ["octomoe", "sglang"])
def test_wrong_outputs_are_caught(problem, name):
    right_TD = benchmark.octomoe_op(problem)()
    with pytest.raises(AssertionError, match=f"{name}: relative error"):
        benchmark.errors_of(problem, {name: right_TD * 1.05})
    right_TD[0, 7] = torch.nan
    with pytest.raises(AssertionError, match=f"{name}: not all of the output is finite"):
        benchmark.errors_of(problem, {name: right_TD})


def test_ours_must_be_closer_to_the_reference_than_to_float32(problem):
    wrong_TD = benchmark.octomoe_op(problem)() * 1.015
    with pytest.raises(AssertionError, match="dB from the reference"):
        benchmark.errors_of(problem, {"octomoe op": wrong_TD})


@pytest.mark.plain_memory
def test_memory_is_poisoned_only_meanwhile():
    with benchmark.poisoned():
        assert torch.empty(100).isnan().all()
        assert (torch.empty(8, dtype=torch.float8_e4m3fn).view(torch.uint8) & 0x7F == 0x7F).all()
    assert not torch.are_deterministic_algorithms_enabled()


# Below 64 rows the interpreter stumbles over 128 columns and fewer, which the compiler takes.
@pytest.mark.skipif(FOLDER is None, reason="OCTOMOE_SGLANG_PEER is not set")
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (64, 64)])
@pytest.mark.parametrize("is_down_tma", [False, True])
def test_sglang_computes_the_layer(problem, rows, columns, is_down_tma):
    options = sglang.UNTUNED | {"BLOCK_SIZE_M": rows, "BLOCK_SIZE_N": columns}
    config = sglang.LayerConfig(options, options, False, is_down_tma, "")
    peer = sglang.load(Path(FOLDER))
    with benchmark.poisoned():
        run = benchmark.sglang_layer(problem, peer, config)
        y_TD = run().clone()
    assert benchmark.errors_of(problem, {"sglang": y_TD})["sglang"]["error"] > 0
    assert torch.equal(run(), y_TD)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fused_moe.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main() == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_tokens_to_check_are_distinct(problem):
    tokens = some_tokens(problem).tolist()
    assert len(set(tokens)) == len(tokens) == min(problem.num_tokens, 16)
    assert SCALING != 1.0
