"""README's table of layers of experts holds the newest measurement of each, and what it is of."""

import json

import pytest

from benchmarks.readme_tables import fused_moe_table

HEAD = (
    "| layer | tokens | floor us | SGLang us | octomoe us | times as fast "
    "| portable us | whole op us |"
)


def record(layer, commit, us_of_tokens, peer_us=30.0):
    runs = {"sglang": {"us": peer_us}} if peer_us else {}
    results = [
        {
            "tokens": tokens,
            "floor_us": 1.0,
            "runs": runs | {"octomoe": {"us": us}, "octomoe op": {"us": us + 5}},
        }
        for tokens, us in us_of_tokens.items()
    ]
    return {
        "commit": commit,
        "command": "python benchmarks/fused_moe.py",
        "device": "NVIDIA H200",
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "layer": layer,
        "shape": {"model": f"model of {layer}"},
        "results": results,
    }


@pytest.fixture
def table(tmp_path):
    def make(*records):
        results = tmp_path / "benchmarks" / "results"
        (results / "gpu").mkdir(parents=True)
        text = "".join(json.dumps(record) + "\n" for record in records)
        (results / "gpu" / "fused_moe.jsonl").write_text(text, encoding="utf-8")
        return fused_moe_table("gpu", results)

    return make


def test_nothing_measured_makes_no_table(tmp_path):
    assert fused_moe_table("gpu", tmp_path) == ""


def test_newest_of_each_layer_and_number_of_tokens(table):
    made = table(
        record("DSV", "aaa", {8: 20.0, 1: 10.0}),
        record("Q30", "aaa", {1: 15.0}),
        record("DSV", "bbb", {8: 60.0}),
    )
    *lines, caption = made.splitlines()
    assert lines == [
        HEAD,
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        "| model of DSV | 1 | 1.0 | 30.0 | 10.0 | 3.00 | 10.0 | 15.0 |",
        "| model of DSV | 8 | 1.0 | 30.0 | 60.0 | 0.50 | 60.0 | 65.0 |",
        "| model of Q30 | 1 | 1.0 | 30.0 | 15.0 | 2.00 | 15.0 | 20.0 |",
        "",
    ]
    assert caption == (
        "Times as fast: at least 0.50, geometric mean 1.44. `python benchmarks/fused_moe.py`, "
        "NVIDIA H200, commit aaa, bbb, torch 2.11.0, triton 3.6.0; from "
        "`benchmarks/results/gpu/fused_moe.jsonl`."
    )


def test_without_the_peer_its_columns_are_empty(table):
    made = table(record("DSV", "aaa", {1: 10.0}, peer_us=None))
    assert "| model of DSV | 1 | 1.0 |  | 10.0 |  | 10.0 | 15.0 |" in made
    assert "Times" not in made
