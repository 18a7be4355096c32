"""A conversion's page is one file that fetches nothing and says what was made, what is off, and how
well every expert was kept; it replaces an older one whole or not at all.
"""

import re
import sys
from dataclasses import replace
from html import escape
from math import inf, nan
from pathlib import Path

import pytest

from octomoe.evaluate.conversion_report import (
    ConversionReport,
    Projection,
    plot_scale_spread,
    plot_sqnr,
    write_conversion_report,
)


def make_report(num_layers: int = 3, num_experts: int = 4, **changes) -> ConversionReport:
    projections = [
        Projection(
            f"model.layers.{layer}.mlp.experts",
            role,
            [31.0 + expert / 5 for expert in range(num_experts)],
            [2.0**-10] * num_experts,
            [2.0 ** (expert - 9) for expert in range(num_experts)],
        )
        for layer in range(num_layers)
        for role in ("gate", "up", "down")
    ]
    report = ConversionReport(
        source="models/a",
        destination="models/a-fp8",
        verdict="42 tensors checked.",
        is_sound=True,
        facts={"converted": "3 layers × 4 experts"},
        problems=[],
        projections=projections,
        command="octomoe convert a b",
        versions={"octomoe": "1"},
    )
    return replace(report, **changes)


def render(report: ConversionReport, folder: Path) -> str:
    write_conversion_report(report, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def with_sqnr(report: ConversionReport, *values: float) -> ConversionReport:
    ones = [1.0] * len(values)
    return replace(report, projections=[Projection("layers.0", "up", values, ones, ones)])


def test_page_says_what_was_made_and_how_it_was_kept(tmp_path):
    page = render(make_report(), tmp_path)
    for expected in (
        "<h1>a-fp8</h1>",
        "models/a-fp8, held against its source models/a.",
        "Sound.",
        "42 tensors checked.",
        "<dt>converted</dt>",
        "3 layers × 4 experts",
        "median 31.3 dB, lowest 31.0 dB",
        "octomoe convert a b",
        "octomoe 1",
    ):
        assert expected in page
    assert page.count("<svg ") == 2
    assert page.count('<th scope="row">') == 9
    assert "problem" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)


def test_every_row_names_the_worst_expert(tmp_path):
    page = render(with_sqnr(make_report(), 31.5, 30.25, inf), tmp_path)
    row = page[page.index('<th scope="row">layers.0') :]
    assert re.findall(r"<td>(.*?)</td>", row)[:4] == ["up", "30.25", "1", "31.50"]


def test_problems_are_listed_the_first_in_view(tmp_path):
    problems = [f"expert {i} is <off>" for i in range(2500)]
    page = render(make_report(is_sound=False, problems=problems), tmp_path)
    assert "Something is off." in page
    assert "2,500 problems" in page
    first, _, rest = page.partition("<summary>The next 1,980</summary>")
    assert [text in first for text in ("expert 19 is &lt;off&gt;", "expert 20 is")] == [True, False]
    assert "expert 1999 is" in rest
    assert "expert 2000 is" not in rest
    assert "500 more are not listed." in rest


def test_one_problem_is_one(tmp_path):
    page = render(make_report(is_sound=False, problems=["it is off"]), tmp_path)
    assert "1 problem<" in page
    assert "The other" not in page


def test_page_fetches_nothing(tmp_path):
    page = render(make_report(), tmp_path)
    assert not re.search(r"<(script|link|iframe|object|base)\b", page)
    for target in re.findall(r'\b(?:src|href)="([^"]*)"', page):
        assert target.startswith(("#", "data:image/png;base64,"))
    assert "@import" not in page


def test_names_cannot_inject_markup(tmp_path):
    hostile = '"><script>alert(1)</script>{{ 7 * 7 }}'
    names = dict.fromkeys(("source", "destination", "verdict", "command"), hostile)
    page = render(make_report(problems=[hostile], facts={hostile: hostile}, **names), tmp_path)
    assert "<script" not in page
    assert escape("{{ 7 * 7 }}") in page


def test_same_report_same_bytes(tmp_path):
    pages = [render(make_report(), tmp_path) for _ in range(2)]
    assert pages[0] == pages[1]


def test_no_projections_make_no_pictures(tmp_path):
    page = render(make_report(projections=[]), tmp_path)
    assert "<svg" not in page
    assert "<table" not in page


def test_values_that_are_all_kept_make_no_picture_of_noise():
    assert plot_sqnr(with_sqnr(make_report(), inf, inf).projections) == ""
    # Nor do scales of experts that are not quantised.
    assert plot_scale_spread(with_sqnr(make_report(), inf, inf).projections) == ""


@pytest.mark.parametrize("worst", [nan, -inf, -6.0, inf, 0.0])
def test_values_off_the_scale_are_drawn(worst: float):
    svg = plot_sqnr(with_sqnr(make_report(), 31.0, 32.0, worst).projections)
    assert "SQNR in dB" in svg
    if worst == worst and worst < 0:
        assert f"lowest {'−∞' if worst == -inf else '−6.00'} dB" in svg


def test_scales_that_are_no_numbers_are_left_out():
    bad = Projection("layers.0", "up", [31.0] * 4, [0.0, nan, 0.5, -1.0], [1.0, 1.0, inf, 1.0])
    assert plot_scale_spread([bad]) == ""
    good = replace(bad, scale_min=[0.0, 0.25, 0.5, -1.0], scale_max=[1.0, 1.0, inf, 1.0])
    assert "Scales of each" in plot_scale_spread([good])


def test_layers_of_different_roles_and_sizes_are_drawn():
    projections = [
        Projection("layers.0", "up", [31.0] * 8, [0.5] * 8, [1.0] * 8),
        Projection("layers.1", "down", [31.0] * 4, [0.5] * 4, [1.0] * 4),
    ]
    assert plot_sqnr(projections)
    assert plot_scale_spread(projections)


def test_a_large_model_is_drawn_small(tmp_path):
    page = render(make_report(61, 256), tmp_path)
    assert len(page) < 1_000_000
    assert page.count("<svg ") == 2


def test_an_older_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("older")
    with monkeypatch.context() as patch:

        def refuse(self, target):
            raise OSError("no space")

        patch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="no space"):
            write_conversion_report(make_report(), path)
    assert path.read_text() == "older"
    write_conversion_report(make_report(), path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_package_is_said_before_anything_is_written(tmp_path, monkeypatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"needs the package {package} .*run: pip install 'octomoe\[report\]'"
    with pytest.raises(ImportError, match=message):
        write_conversion_report(make_report(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
