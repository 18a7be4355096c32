"""The picture: a panel per record, a line per contender, valid SVG with text that stays text."""

from xml.etree import ElementTree

import pytest

from octomoe.bench.plot import plot_moe

pytest.importorskip("matplotlib")
FLOORS = {1: 5.0, 8: 20.0, 64: 50.0, 512: 60.0, 4096: 300.0}


def texts(svg):
    return "\n".join(ElementTree.fromstring(svg).itertext())


def test_every_record_has_a_panel_and_every_contender_a_line(make_record):
    records = [
        make_record(layer, mode, routing, FLOORS, sglang=1.6, portable=1.4)
        for layer in ("DSV", "Q30")
        for mode in ("kernel", "layer")
        for routing in ("balanced", "skewed")
    ]
    svg = plot_moe(records)
    found = texts(svg)
    for text in ("DeepSeek-V3, 8 GPUs", "layer, skewed", "sglang", "portable", "4k", "tokens"):
        assert text in found
    assert "share of the roofline, in %" in found
    assert 'fill="white"' in svg
    assert svg.count("tokens</text>") == 8
    # The same records, the same bytes.
    assert plot_moe(records) == svg


def test_without_a_floor_reading_is_what_others_are_measured_by(make_record):
    found = texts(plot_moe([make_record(floors={1: None, 2: None})]))
    assert "share of the speed of reading, in %" in found
    assert "octomoe" in found
    assert "read\n" not in found


def test_a_peer_that_is_missing_somewhere_has_the_other_points(make_record):
    record = make_record(sglang=2.0)
    del record["results"][0]["runs"]["sglang"]
    assert "sglang" in texts(plot_moe([record]))


def test_what_was_not_measured_breaks_the_line(make_record):
    whole, broken = make_record(floors=FLOORS, sglang=2.0), make_record(floors=FLOORS, sglang=2.0)
    del broken["results"][2]["runs"]["sglang"]
    moves = [plot_moe([record]).count("M ") for record in (whole, broken)]
    assert moves[1] == moves[0] + 1


def test_nothing_measured_makes_no_picture(make_record):
    assert plot_moe([]) == plot_moe([make_record(floors={})]) == ""
