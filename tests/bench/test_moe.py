"""Every combination of a plan is measured and recorded, what came before a failure too."""

import json

import pytest
import torch

from octomoe.bench import moe, records
from octomoe.bench.layers import RECIPES, Mode, Shape, Skew, make_experts, make_problem
from octomoe.bench.peers.find import Found

SHAPES = {"tiny": Shape("", 3, 64, 32, 2), "small": Shape("of someone", 4, 64, 32, 1)}


class Peer:
    name, version = "peer", "9.8"


@pytest.fixture
def measured(monkeypatch):
    """What was measured, without measuring."""
    seen = []

    def measure(problem, peers, *, mode, repeats):
        ids = problem.topk_ids_TA
        assert [peer.name for peer in peers] == ["peer"]
        seen.append((problem.num_tokens, mode, int((ids == 0).sum()), problem.recipe, repeats))
        if len(seen) == 8:
            raise AssertionError("octomoe: relative error 0.5")
        return {"tokens": problem.num_tokens}

    def about(command, commit):
        return {"command": command, "commit": commit, "device": "a GPU", "versions": {"torch": "2"}}

    monkeypatch.setattr(moe, "measure", measure)
    monkeypatch.setattr(moe, "about", about)
    return seen


def run(plan):
    results, made = [], []
    found = Found([Peer()], {"vllm": "not installed"})
    try:
        moe.bench(
            plan,
            found,
            on_result=lambda record, result: results.append((record["layer"], result["tokens"])),
            on_record=made.append,
            device="cpu",
        )
    except AssertionError as error:
        return results, made, str(error)
    return results, made, ""


def test_every_combination_is_recorded(measured):
    plan = moe.Plan(SHAPES, (1, 6), "channel", skews=[Skew.SKEWED], repeats=3, commit="abc")
    modes = [*Mode, *Mode]
    plan = moe.Plan(**{**vars(plan), "shapes": {"tiny": SHAPES["tiny"]}})
    results, made, _ = run(plan)
    assert results == [("tiny", 1), ("tiny", 6)] * 2
    assert [(r["mode"], r["routing"]) for r in made] == [("kernel", "skewed"), ("layer", "skewed")]
    assert [mode for _, mode, *_ in measured] == sorted(modes, key=list(Mode).index)
    # Half of 1 and of 6 tokens.
    assert [first for _, _, first, *_ in measured] == [1, 3] * 2
    assert {(recipe, repeats) for *_, recipe, repeats in measured} == {(RECIPES["channel"], 3)}
    record = json.loads(json.dumps(made[0]))
    assert record == {
        "command": "octomoe bench moe",
        "commit": "abc",
        "device": "a GPU",
        "versions": {"torch": "2", "peer": "9.8"},
        "repeats": 3,
        "ceilings": None,
        "layer": "tiny",
        "shape": {
            "model": "",
            "num_experts": 3,
            "width": 64,
            "hidden_size": 32,
            "num_choices": 2,
            "has_shared": False,
        },
        "format": "channel",
        "mode": "kernel",
        "routing": "skewed",
        "missing": {"vllm": "not installed"},
        "results": [{"tokens": 1}, {"tokens": 6}],
    }


def test_what_was_measured_before_a_failure_is_recorded(measured):
    _, made, error = run(moe.Plan(SHAPES, (1, 2, 3)))
    assert error == "octomoe: relative error 0.5"
    assert [len(record["results"]) for record in made] == [3, 3, 1]


def test_every_mode_and_routing_has_the_same_rows():
    torch.manual_seed(8)
    shape = SHAPES["tiny"]
    experts = make_experts(shape, "cpu")
    rows = []
    for skew in Skew:
        torch.manual_seed(5)
        rows.append(make_problem(shape, experts, 5, skew=skew).hidden_TD)
    assert torch.equal(*rows)


def test_records_are_appended(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    for number in (1, 2):
        records.append(path, {"number": number})
    lines = path.read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [1, 2]


def test_a_package_outside_its_clone_has_no_commit(monkeypatch, tmp_path):
    assert records.commit_of_clone()
    monkeypatch.setattr(records, "_ROOT", tmp_path)
    assert records.commit_of_clone() == ""
    assert records.output_of("a-program-that-nobody-has") == ""
