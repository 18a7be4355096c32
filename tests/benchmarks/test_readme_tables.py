"""README's tables of layers of experts hold the newest measurement of each, and what it is of.

Records of before `octomoe bench` say neither mode nor routing nor format, and none was read alone.
"""

import json

import pytest

from benchmarks.readme_tables import fused_moe_table, moe_layer_table

HEAD = (
    "| layer | tokens | floor us | SGLang us | octomoe us | times as fast "
    "| portable us | whole op us |"
)


def record(layer, commit, us_of_tokens, peer_us=30.0, **stated):
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
        **stated,
    }


@pytest.fixture
def table(tmp_path):
    def make(*records, of=fused_moe_table):
        results = tmp_path / "benchmarks" / "results"
        (results / "gpu").mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(record) + "\n" for record in records)
        (results / "gpu" / "fused_moe.jsonl").write_text(text, encoding="utf-8")
        return of("gpu", results)

    return make


def test_nothing_measured_makes_no_table(tmp_path):
    assert fused_moe_table("gpu", tmp_path) == moe_layer_table("gpu", tmp_path) == ""


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


NEW = {"format": "block128", "command": "octomoe bench moe --sglang FOLDER"}


def test_kernels_of_new_records_join_the_old(table):
    old = record("DSV", "aaa", {1: 10.0, 8: 20.0})
    new = record("DSV", "bbb", {8: 15.0}, **NEW, mode="kernel", routing="balanced")
    new["results"][0]["runs"]["read"] = {"us": 5.0}
    others = [
        record("DSV", "ccc", {8: 1.0}, **NEW | {"format": "channel"}, mode="kernel"),
        record("DSV", "ddd", {8: 1.0}, **NEW, mode="kernel", routing="skewed"),
        record("DSV", "eee", {8: 1.0}, **NEW, mode="layer", routing="balanced"),
    ]
    made = table(old, new, *others)
    assert made.splitlines()[0] == HEAD.replace("floor us |", "floor us | read us |")
    assert "| model of DSV | 1 | 1.0 |  | 30.0 | 10.0 | 3.00 | 10.0 | 15.0 |" in made
    assert "| model of DSV | 8 | 1.0 | 5.0 | 30.0 | 15.0 | 2.00 | 15.0 | 20.0 |" in made
    assert "`python benchmarks/fused_moe.py`, `octomoe bench moe --sglang FOLDER`" in made
    assert "commit aaa, bbb," in made


def test_whole_layers_beside_every_peer(table):
    made = table(
        record("DSV", "aaa", {1: 10.0}),
        record("DSV", "bbb", {1: 10.0}, **NEW, mode="layer", routing="skewed"),
        record("DSV", "bbb", {1: 20.0}, None, **NEW, mode="layer", routing="balanced"),
        of=moe_layer_table,
    )
    columns = "layer routing tokens floor_us read_us router_us sglang_us octomoe_us times_as_fast"
    assert made.splitlines()[:4] == [
        f"| {columns.replace(' ', ' | ').replace('_', ' ')} |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        "| model of DSV | balanced | 1 | 1.0 |  |  |  | 20.0 |  |",
        "| model of DSV | skewed | 1 | 1.0 |  |  | 30.0 | 10.0 | 3.00 |",
    ]
    assert "at least 3.00, geometric mean 3.00. `octomoe bench moe --sglang FOLDER`" in made
    assert table(record("DSV", "aaa", {1: 10.0}), of=moe_layer_table) == ""
