"""What `octomoe bench moe` times computes the layer, and a contender that does not is caught.

Peers are given what they need in their own words: those that are not installed are played by torch.
SGLang's kernels run where OCTOMOE_SGLANG_PEER names a folder that `sglang_wheel` made.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octomoe.bench import moe, ours
from octomoe.bench.check import errors_of, poisoned, snr_of, some_tokens
from octomoe.bench.contender import Contender
from octomoe.bench.layers import RECIPES, Mode, Shape, Skew, make_experts, make_problem
from octomoe.bench.peers import sglang
from octomoe.bench.read import READS, read, read_contenders, words_of
from octomoe.bench.table import header, peers_of, row, times
from octomoe.tune.configs import FusedMoeConfig
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

    monkeypatch.setattr(moe, "time_graphs", timings)


class FakePeer:
    """A peer that says what it is told to."""

    name, version = "fake", "1.0"

    def __init__(self, run=None, reason=None):
        self.run, self.reason = run, reason

    def why_not(self, problem, mode):
        return self.reason

    def kernel(self, problem):
        return {"fake": Contender(lambda: self.run(problem), {"stages": 3}, "everything")}

    layer = kernel


@pytest.mark.parametrize("mode", Mode)
def test_ours_are_close_to_the_reference(problem, no_clock, mode):
    result = moe.measure(problem, [FakePeer(ours.run_op)], mode=mode, repeats=1)
    runs = result["runs"]
    further = {Mode.KERNEL: "octomoe op", Mode.LAYER: "router"}[mode]
    assert sorted(runs) == sorted(["octomoe", further, "fake", "read"])
    for name in {"octomoe", "octomoe op"} & runs.keys():
        assert runs[name]["error"] < 0.03
        assert runs[name]["snr_db"] > 40
    assert runs["fake"]["error"] == runs["octomoe"]["error"]
    assert (runs["fake"]["config"], runs["fake"]["borrowed"]) == ({"stages": 3}, "everything")
    assert runs["read"]["config"] in [{k: getattr(c, k) for k in c.__slots__} for c in READS]
    assert result["tokens"] == problem.num_tokens
    assert result["missing"] == {}
    assert json.loads(json.dumps(result)) == result
    # Ours is the first to be timed, the peer comes after all of ours.
    assert times(result) == (3.0 if mode is Mode.KERNEL else 2.0)
    assert len(row(result, peers_of(result))) == len(header(result))


@pytest.mark.parametrize("name", RECIPES)
def test_every_format_is_measured(name, kernel_device, no_clock):
    shape, recipe = Shape("", 3, 128, 128, 2), RECIPES[name]
    experts = make_experts(shape, kernel_device, recipe)
    problem = make_problem(shape, experts, 5, recipe, Skew.SKEWED)
    for mode in Mode:
        runs = moe.measure(problem, [], mode=mode)["runs"]
        assert runs["octomoe"]["error"] < 0.03
        assert runs["octomoe"]["snr_db"] > 40


def test_a_configuration_is_checked_before_it_is_timed(problem, no_clock, monkeypatch):
    config = ours.looked_up(problem)
    assert isinstance(config, FusedMoeConfig)
    assert moe.time_config(problem, replace(config, combined=64)).us == 10.0
    right = ours.run_config
    monkeypatch.setattr(moe, "run_config", lambda *args: lambda: right(*args)() * 1.05)
    with pytest.raises(AssertionError, match="octomoe: relative error"):
        moe.time_config(problem, config)


def test_wrong_outputs_are_caught(problem):
    right_TD = ours.run_op(problem)
    with pytest.raises(AssertionError, match="octomoe: relative error"):
        errors_of(problem, {"octomoe": right_TD * 1.05})
    with pytest.raises(AssertionError, match=r"op: .* dB from the reference"):
        snr_of(problem, {"op": right_TD * 1.015})
    right_TD[0, 7] = torch.nan
    with pytest.raises(AssertionError, match="octomoe: not all of the output is finite"):
        errors_of(problem, {"octomoe": right_TD})


def test_a_peer_that_cannot_or_errs_is_not_timed(kernel_device, no_clock):
    problem = make_problem(SHAPE, make_experts(SHAPE, kernel_device), 2)

    def fails(problem):
        raise RuntimeError("no kernel image\nand more")

    for peer, reason in {
        FakePeer(reason="other formats only"): "other formats only",
        FakePeer(fails): "RuntimeError: no kernel image",
        FakePeer(lambda problem: ours.run_op(problem) * 1.05): "fake: relative error 0.05",
    }.items():
        result = moe.measure(problem, [peer])
        assert "fake" not in result["runs"]
        assert reason in result["missing"]["fake"]
        assert times(result) is None


@pytest.mark.plain_memory
def test_memory_is_poisoned_only_meanwhile():
    with poisoned():
        assert torch.empty(100).isnan().all()
        assert (torch.empty(8, dtype=torch.float8_e4m3fn).view(torch.uint8) & 0x7F == 0x7F).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("config", READS)
@pytest.mark.parametrize("active", [[], [3], [0, 2, 4]])
def test_every_word_of_active_experts_is_read_once(kernel_device, config, active):
    weights = tuple(
        torch.randint(-(2**31), 2**31, (5, size), device=kernel_device).int()
        for size in (9001, 130)
    )
    ids = torch.tensor(active, dtype=torch.int32, device=kernel_device)
    sums = read(weights, ids, config)
    expected = sum(int(w[expert].sum()) for w in weights for expert in active)
    assert (int(sums.sum()) - expected) % 2**32 == 0


def test_odd_sizes_are_read_but_for_the_last_bytes(kernel_device):
    shape = Shape("", 3, 5, 7, 1)
    recipe = RECIPES["channel"]
    problem = make_problem(shape, make_experts(shape, kernel_device, recipe), 4, recipe)
    w13, w2 = words_of(problem)
    assert (w13.shape, w2.shape) == ((3, 17), (3, 8))
    data = problem.weights[1].data
    assert torch.equal(w2[2].view(torch.uint8), data[2].flatten().view(torch.uint8)[:32])
    assert len(read_contenders(problem)) == len(READS)


# Below 64 rows the interpreter stumbles over 128 columns and fewer, which the compiler takes.
@pytest.mark.skipif(FOLDER is None, reason="OCTOMOE_SGLANG_PEER is not set")
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (64, 64)])
@pytest.mark.parametrize("is_down_tma", [False, True])
def test_sglang_computes_the_layer(problem, rows, columns, is_down_tma, monkeypatch):
    options = sglang.UNTUNED | {"BLOCK_SIZE_M": rows, "BLOCK_SIZE_N": columns}
    config = sglang.LayerConfig(options, options, False, is_down_tma, "")
    monkeypatch.setattr(sglang, "choose_config", lambda *_args, **_options: config)
    peer = sglang.SGLang.load(Path(FOLDER))
    contenders = peer.kernel(problem)
    assert list(contenders) == ["sglang"]
    contenders |= {f"whole {name}": c for name, c in peer.layer(problem).items()}
    with poisoned():
        outputs = {name: contender.run() for name, contender in contenders.items()}
    errors = errors_of(problem, outputs)
    assert all(0 < error < 0.03 for error in errors.values())
    for name, contender in contenders.items():
        assert torch.equal(contender.run(), outputs[name])


def test_tokens_to_check_are_distinct(problem):
    tokens = some_tokens(problem).tolist()
    assert len(set(tokens)) == len(tokens) == min(problem.num_tokens, 16)
