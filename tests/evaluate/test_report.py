"""A report is one file that fetches nothing, shows every scheme with its numbers and marks the bad
ones; it replaces an older one whole or not at all. Advice follows from the numbers.
"""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from math import inf, nan
from pathlib import Path

import pytest

from octomoe.evaluate.compare import Comparison, SchemeResult
from octomoe.evaluate.metrics import WeightQuality
from octomoe.evaluate.report import FIGURES, advice, write_report

# Name, weights, activations, SQNR of weights in dB, KL, perplexity.
CASES = [
    ("tensor", "fp8_tensor", "", 31.4, 0.004, 10.02),
    ("channel", "fp8_row", "", 31.7, 0.003, 10.01),
    ("channel × token", "fp8_row", "fp8_row", 31.7, 0.006, 9.99),
    ("mxfp8 × mxfp8", "mxfp8", "mxfp8", 31.5, 0.007, 10.05),
    ("channel, scales averaged", "fp8_row", "", 9.0, 0.25, 12.0),
]
LAYER = "model.layers.0.mlp.experts"
# Elements of HTML that have no end.
VOID = {"meta", "br", "img", "link"}


def make_comparison(cases=CASES, has_layers: bool = False, **changes) -> Comparison:
    """Without layers, which most tests do not look at, there is one picture only."""
    results = []
    for name, weights, activations, sqnr, kl, perplexity in cases:
        ones = [1.0, 1.0]
        scales = [2.0**-10, 2.0**-8]
        quality = WeightQuality(LAYER, "w13", [sqnr, sqnr], ones, ones, scales, scales, scales)
        layers, qualities = ({LAYER: sqnr - 2}, [quality]) if has_layers else ({}, [])
        results.append(
            SchemeResult(
                name=name,
                weights=weights,
                activations=activations,
                averages_scales="averaged" in name,
                bytes_per_weight=1.0256,
                sqnr_db=sqnr,
                saturated=0.0,
                flushed=0.00123,
                kl=kl,
                kl_error=0.0001,
                top1=0.9712,
                perplexity=perplexity,
                layer_sqnr_db=layers,
                weight_quality=qualities,
                seconds=1.0,
            )
        )
    comparison = Comparison(
        "models/tiny-moe", "heldout.txt", 32768, 10.0, 2.0, results, "octomoe demo --x", {"a": "1"}
    )
    return replace(comparison, **changes)


def with_result(comparison: Comparison, index: int, **changes) -> Comparison:
    results = list(comparison.results)
    results[index] = replace(results[index], **changes)
    return replace(comparison, results=results)


class Page(HTMLParser):
    """A page's words, table, elements with attributes, and whether every element is ended."""

    def __init__(self, text: str):
        super().__init__()
        self.words: list[str] = []
        self.table: list[list[str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.table[-1][-1] += data


def render(comparison: Comparison, folder: Path) -> Page:
    write_report(comparison, folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_table_holds_the_unquantised_model_and_then_every_scheme_once(tmp_path):
    _, baseline, *rows = render(make_comparison(), tmp_path).table
    dashes = ["–", "–", "–"]
    assert baseline == ["unquantised", "–", "–", "2.000", *dashes, "0", "100.0", "10.000", "–"]
    marks = ["", " least KL", " least KL", "", " avoid"]
    assert [row[0] for row in rows] == [c[0] + m for c, m in zip(CASES, marks, strict=True)]
    assert rows[1][1:7] == ["fp8_row", "–", "1.026", "0.12", "0", "31.70"]
    assert rows[1][7:] == ["0.00300", "97.1", "10.010", "+0.10"]
    assert rows[2][1:3] == ["fp8_row", "fp8_row"]
    assert rows[2][-1] == "−0.10"


def test_page_says_model_text_tokens_command_versions_advice_and_captions(tmp_path):
    comparison = make_comparison(has_layers=True)
    words = "".join(render(comparison, tmp_path).words)
    for expected in (
        "tiny-moe in eight bits",
        "32,768 tokens of heldout.txt",
        "octomoe demo --x",
        "a 1",
        advice(comparison),
        *(figure.caption for figure in FIGURES),
    ):
        assert expected in words


def test_page_fetches_nothing(tmp_path):
    page = render(make_comparison(has_layers=True), tmp_path)
    assert sum(tag == "svg" for tag, _ in page.elements) == len(FIGURES)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_names_cannot_inject_markup(tmp_path):
    hostile = '/tmp/"><script>alert(1)</script>&amp;{{ 7 * 7 }}'
    versions = {hostile: hostile}
    comparison = make_comparison(
        CASES, True, model=hostile, text=hostile, command=hostile, versions=versions
    )
    page = render(with_result(comparison, 0, name=hostile, weights=hostile), tmp_path)
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.table[2][:2] == [hostile, hostile]
    assert f"{hostile}, its experts" in "".join(page.words)


def test_numbers_that_are_not_finite_are_shown_as_they_are(tmp_path):
    comparison = with_result(make_comparison(), 0, kl=nan, perplexity=nan, sqnr_db=-inf)
    comparison = with_result(comparison, 1, kl=inf, perplexity=inf, sqnr_db=inf)
    rows = render(comparison, tmp_path).table[2:]
    assert rows[0][0] == "tensor avoid"
    assert rows[0][4:] == ["0.12", "0", "−∞", "nan", "97.1", "nan", "nan"]
    assert rows[1][4:] == ["0.12", "0", "∞", "∞", "97.1", "∞", "+∞"]


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=lambda case: case[0])
def test_a_single_scheme_is_marked_neither_best_nor_worst(tmp_path, case):
    page = render(make_comparison([case]), tmp_path)
    assert [row[0] for row in page.table[1:]] == ["unquantised", case[0]]
    assert "in 1 way and" in "".join(page.words)


def test_long_names_stand_whole_in_the_table(tmp_path):
    name = "a name that goes on " * 20
    page = render(with_result(make_comparison(), 0, name=name), tmp_path)
    assert page.table[2][0] == name


def test_same_comparison_same_bytes(tmp_path):
    for name in ("a.html", "b.html"):
        write_report(make_comparison(has_layers=True), tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_an_older_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("older")
    with monkeypatch.context() as patch:

        def refuse(self, target):
            assert self.parent == tmp_path
            assert self.read_text(encoding="utf-8").endswith("</html>")
            assert path.read_text() == "older"
            raise OSError("no space")

        patch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="no space"):
            write_report(make_comparison(), path)
    assert path.read_text() == "older"
    write_report(make_comparison(), path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_package_is_said_before_anything_is_written(tmp_path, monkeypatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"needs the package {package} .*run: pip install 'octomoe\[report\]'"
    with pytest.raises(ImportError, match=message):
        write_report(make_comparison(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_advice_names_the_least_kl_of_each_kind_and_what_to_avoid():
    assert advice(make_comparison()) == (
        "For weights only choose “channel” (KL 0.00300 ± 0.0001, perplexity +0.10 %, "
        "1.026 bytes per weight), for weights and activations choose “channel × token” "
        "(KL 0.00600 ± 0.0001, perplexity −0.10 %, 1.026 bytes per weight); avoid “channel, "
        "scales averaged”: its KL is 0.250 where “channel” has 0.00300, it changes perplexity by "
        "+20.0 % and its weights keep 9.00 dB where others keep 31.7."
    )


def test_advice_follows_the_numbers():
    comparison = with_result(make_comparison(), 0, kl=0.001)
    comparison = with_result(comparison, 3, kl=0.002)
    text = advice(with_result(comparison, 1, kl=0.4))
    assert "choose “tensor” (KL 0.00100" in text
    assert "choose “mxfp8 × mxfp8” (KL 0.00200" in text
    assert "avoid “channel”: its KL is 0.400" in text
    assert "; and “channel, scales averaged”: its KL is 0.250" in text


def test_of_equal_kl_fewer_bytes_are_advised():
    comparison = with_result(make_comparison(), 0, kl=0.003, bytes_per_weight=1.0)
    assert "choose “tensor”" in advice(comparison)


def test_schemes_that_differ_by_less_than_the_noise_are_counted():
    comparison = with_result(make_comparison(), 0, kl=0.0031)
    assert "1.026 bytes per weight; 1 more within the noise), for" in advice(comparison)


def test_averaged_scales_are_never_advised():
    comparison = with_result(make_comparison(), -1, kl=0.0)
    assert "choose “channel, scales averaged”" not in advice(comparison)


def test_a_lossless_scheme_does_not_make_good_ones_bad():
    text = advice(with_result(make_comparison(CASES[:-1]), 0, kl=0.0))
    assert "none stands out as bad, the worst being “mxfp8 × mxfp8” with a KL of 0.00700" in text


@pytest.mark.parametrize("kl", [nan, inf])
def test_schemes_that_predict_no_numbers_are_to_be_avoided(kl: float):
    comparison = make_comparison()
    assert "“tensor”, whose predictions are not finite" in advice(with_result(comparison, 0, kl=kl))
    for index in range(len(CASES)):
        comparison = with_result(comparison, index, kl=kl)
    text = advice(comparison)
    assert text.startswith("None of these schemes can be advised; avoid “")
    assert text.endswith("3 more that are marked in the table.")


def test_advice_on_one_scheme_or_none():
    only = advice(make_comparison(CASES[:1]))
    assert only.startswith("Only “tensor” was measured: KL 0.00400 ± 0.0001, perplexity +0.20 %")
    assert advice(make_comparison([])) == "No scheme was measured."
