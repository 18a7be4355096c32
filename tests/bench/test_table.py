"""Printed tables: the columns are those of who was there, and say who is how much faster."""

import pytest

from octomoe.bench.table import header, peers_of, row, summary, times, title


def words(line):
    """Without the space between columns."""
    return " ".join(line.split())


def test_rows_line_up_with_their_header(make_record):
    record = make_record(sglang=2.0, portable=1.5, **{"octomoe op": 1.8, "sglang, ours": 1.9})
    first, second = record["results"]
    assert peers_of(first) == ["sglang", "sglang, ours"]
    names = header(first).replace("sglang, ours", "sglang+")
    assert words(names) == (
        "tokens floor read sglang sglang+ octomoe times x read share % portable octomoe op "
        "error SNR dB"
    )
    assert words(row(first, peers_of(first))) == (
        "1 5.0 15.5 20.0 19.5 16.5 1.18 1.06 30 17.5 19.0 0.0231 47.1"
    )
    assert len(row(second, peers_of(first))) == len(header(first))


def test_a_peer_that_drops_out_leaves_its_cell_empty(make_record):
    result = make_record()["results"][0]
    assert words(row(result, ["sglang"])).startswith("1 5.0 15.5 - 16.5 - 1.06")


def test_nobody_knows_the_floor_of_every_device(make_record):
    result = make_record(floors={1: None})["results"][0]
    assert words(row(result, [])) == "1 - 11.1 11.3 - 1.02 - 0.0231 47.1"


def test_titles_say_what_is_timed(make_record):
    assert title(make_record(mode="layer", routing="skewed")) == (
        "DSV (DeepSeek-V3, 8 GPUs): E=257 F=256 D=7168 A=9, block128, layer, skewed routing; "
        "microseconds"
    )


def test_the_fastest_peer_counts(make_record):
    records = [make_record(slow=9.0, fast=2.6), make_record("Q30", fast=1.0)]
    first, *_ = records[0]["results"]
    assert times(first) == pytest.approx((2.6 * 5 + 10) / (1.3 * 5 + 10))
    # (23 / 16.5, 140 / 75, 15 / 16.5, 60 / 75)
    assert summary(records) == (
        "times as fast as the fastest peer: 0.80 to 1.87, geometric mean 1.17 of 4"
    )
    assert summary([make_record()]) == ""
