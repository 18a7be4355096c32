"""Pictures are valid, self-contained SVG that shows every scheme, layer and expert it should, also
where numbers are infinite, missing or far from the others; the same comparison gives the same
bytes, and matplotlib's settings stay as they were.
"""

import re
import sys
from dataclasses import replace
from math import inf, nan
from xml.etree import ElementTree

import matplotlib
import pytest

from octomoe.evaluate.compare import Comparison, SchemeResult
from octomoe.evaluate.drawing import number, percent, power, short_layer_names
from octomoe.evaluate.metrics import WeightQuality
from octomoe.evaluate.plots import plot_cost, plot_layers, plot_scales, plot_weights

PLOTS = [plot_cost, plot_weights, plot_scales, plot_layers]
# Name, weights, activations, bytes per weight, KL, perplexity, SQNR of weights and of layers in dB.
CASES = [
    ("tensor", "fp8_tensor", "", 1.0, 0.004, 10.02, 31.4, 29.0),
    ("channel", "fp8_row", "", 1.02, 0.003, 10.01, 31.7, 29.5),
    ("channel × token", "fp8_row", "fp8_row", 1.02, 0.006, 9.99, 31.7, 26.5),
    ("mxfp8 × mxfp8", "mxfp8", "mxfp8", 1.031, 0.007, 10.05, 31.5, 26.0),
    ("channel, scales averaged", "fp8_row", "", 1.02, 0.25, 12.0, 9.0, 5.0),
]


def make_result(case, num_layers: int, num_experts: int) -> SchemeResult:
    name, weights, activations, num_bytes, kl, perplexity, weight_db, layer_db = case
    layers = [f"model.layers.{i}.mlp.experts" for i in range(num_layers)]
    steps = [e / num_experts for e in range(num_experts)]
    gains = [2.0**-10] * num_experts if "tensor" in name else [2.0 ** (s - 10) for s in steps]
    qualities = [
        WeightQuality(
            layer,
            which,
            [weight_db + 0.2 * s for s in steps],
            [0.0] * num_experts,
            [0.0] * num_experts,
            [0.5 * gain for gain in gains],
            gains,
            [2.0 * gain for gain in gains],
        )
        for layer in layers
        for which in ("w13", "w2")
    ]
    layer_sqnr = {layer: layer_db - 0.1 * i for i, layer in enumerate(layers)}
    return SchemeResult(
        name=name,
        weights=weights,
        activations=activations,
        averages_scales="averaged" in name,
        bytes_per_weight=num_bytes,
        sqnr_db=weight_db,
        saturated=0.0,
        flushed=0.001,
        kl=kl,
        kl_error=kl / 100,
        top1=0.97,
        perplexity=perplexity,
        layer_sqnr_db=layer_sqnr,
        weight_quality=qualities,
        seconds=1.0,
    )


def make_comparison(num_layers: int = 3, num_experts: int = 4, cases=CASES) -> Comparison:
    results = [make_result(case, num_layers, num_experts) for case in cases]
    return Comparison("model", "text", 100, 10.0, 2.0, results, "octomoe demo", {})


def with_result(comparison: Comparison, index: int, **changes) -> Comparison:
    results = list(comparison.results)
    results[index] = replace(results[index], **changes)
    return replace(comparison, results=results)


def texts_of(svg: str) -> list[str]:
    """What the picture says, from the SVG as XML, which also proves it well-formed."""
    tree = ElementTree.fromstring(svg)
    found = ["".join(node.itertext()).strip() for node in tree.iter() if node.tag.endswith("text")]
    return [text for text in found if text]


def heights_of(svg: str) -> dict[str, float]:
    """Text -> y of where it stands."""
    tree = ElementTree.fromstring(svg)
    return {
        "".join(node.itertext()).strip(): float(node.get("y", "nan"))
        for node in tree.iter()
        if node.tag.endswith("text")
    }


def test_cost_names_each_scheme_once_with_its_three_numbers_best_first():
    svg = plot_cost(make_comparison())
    texts = texts_of(svg)
    for name, _, _, num_bytes, kl, perplexity, _, _ in CASES:
        assert texts.count(name) == 1
        assert f"{kl:#.3g}" in texts
        assert percent(10 * perplexity - 100) in texts
        assert f"{num_bytes:.3f}" in texts
    by_height = sorted(CASES, key=lambda case: heights_of(svg)[case[0]])
    assert by_height == sorted(CASES, key=lambda case: case[4])


def test_weights_are_one_panel_per_format_and_averaging():
    texts = texts_of(plot_weights(make_comparison()))
    shown = [case[0] for case in CASES if case[0] in texts]
    assert shown == ["tensor", "channel", "mxfp8 × mxfp8", "channel, scales averaged"]
    assert {"w13 layer 0", "w2 layer 2"} <= set(texts)


@pytest.mark.parametrize("far", [9.0, -inf, nan])
def test_a_format_far_below_is_off_the_scale_of_the_others(far: float):
    quality = make_result(CASES[0], 3, 4).weight_quality
    broken = [replace(q, sqnr_db=[far] * 4) for q in quality]
    texts = texts_of(plot_weights(with_result(make_comparison(), -1, weight_quality=broken)))
    assert texts.count("off the scale:") == 1
    ticks = [float(text) for text in texts if re.fullmatch(r"\d+\.\d+", text)]
    assert ticks
    assert min(ticks) > 30


def test_scales_are_those_of_the_format_that_another_scheme_averages():
    texts = texts_of(plot_scales(make_comparison()))
    assert "w13, scales of “channel”" in texts
    assert "w2, scales of “channel”" in texts


def test_scales_are_left_out_where_experts_share_them_or_there_is_one():
    assert plot_scales(make_comparison(cases=CASES[:1])) == ""
    assert plot_scales(make_comparison(num_experts=1)) == ""


def test_a_block_of_zeros_does_not_stretch_the_axis_of_scales():
    comparison = make_comparison(cases=CASES[1:2])
    quality = comparison.results[0].weight_quality
    dead = [replace(q, scale_min=[2.0**-126, *q.scale_min[1:]]) for q in quality]
    svg = plot_scales(with_result(comparison, 0, weight_quality=dead))
    powers = [text for text in texts_of(svg) if text.startswith("2⁻")]
    assert set(powers) <= {power(2, -n) for n in range(8, 18)}


def test_layers_name_each_line_and_put_far_ones_on_another_scale():
    texts = texts_of(plot_layers(make_comparison()))
    assert all(texts.count(case[0]) == 1 for case in CASES)
    assert "far below, on another scale" in texts
    near = texts_of(plot_layers(make_comparison(cases=CASES[:-1])))
    assert "far below, on another scale" not in near
    assert {"weights only", "weights and activations"} <= set(near)


def test_a_layer_without_finite_output_is_said_to_be():
    broken = dict.fromkeys(make_result(CASES[0], 3, 4).layer_sqnr_db, -inf)
    svg = plot_layers(with_result(make_comparison(), 1, layer_sqnr_db=broken))
    assert "channel (not finite)" in texts_of(svg)


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("value", [nan, inf, -inf, 0.0])
def test_any_number_can_be_drawn(plot, value: float):
    comparison = make_comparison()
    for index in (1, 2):
        old = comparison.results[index]
        quality = [
            replace(q, sqnr_db=[value] * 4, scale_min=[value] * 4, scale_median=[value] * 4)
            for q in old.weight_quality
        ]
        comparison = with_result(
            comparison,
            index,
            kl=value,
            perplexity=value,
            sqnr_db=value,
            layer_sqnr_db=dict.fromkeys(old.layer_sqnr_db, value),
            weight_quality=quality,
        )
    assert texts_of(plot(comparison))
    alone = replace(comparison, results=comparison.results[1:2])
    svg = plot(alone)
    assert svg == "" if plot is plot_scales else texts_of(svg)


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize(
    ("num_layers", "num_experts", "cases"),
    [(1, 1, CASES[1:2]), (1, 5, CASES), (7, 1, CASES), (40, 64, CASES)],
    ids=["one of each", "one layer", "one expert", "many"],
)
def test_any_size_is_drawn_and_stays_small(plot, num_layers: int, num_experts: int, cases):
    svg = plot(make_comparison(num_layers, num_experts, cases))
    if plot is plot_scales and num_experts == 1:
        assert svg == ""
    else:
        assert texts_of(svg)
        assert len(svg) < 400_000


def test_no_results_are_no_picture():
    assert [plot(make_comparison(cases=[])) for plot in PLOTS] == [""] * 4


def test_names_are_text_whatever_they_hold_and_long_ones_are_cut():
    hostile = '<b>&"$x^2$</b>'
    comparison = with_result(make_comparison(), 0, name=hostile)
    comparison = with_result(comparison, 1, name="so long " * 20)
    for plot in (plot_cost, plot_weights, plot_layers):
        texts = texts_of(plot(comparison))
        assert hostile in texts
        assert any(text.startswith("so long so long") and text.endswith("…") for text in texts)
        assert max(map(len, texts)) < 60


def test_pictures_share_a_page():
    svgs = [plot(make_comparison()) for plot in PLOTS]
    ids = [name for svg in svgs for name in re.findall(r'\bid="([^"]*)"', svg)]
    assert len(set(ids)) == len(ids)
    for svg in svgs:
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label") == root[0].text
        targets = re.findall(r'(?:href="|url\()([^")]*)', svg)
        assert all(t.startswith(("#", "data:image/png;base64,")) for t in targets)
        assert {t[1:] for t in targets if t.startswith("#")} <= set(ids)


@pytest.mark.parametrize("plot", PLOTS)
def test_same_bytes_whatever_the_reader_has_set(plot):
    first = plot(make_comparison())
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True}):
        before = dict(matplotlib.rcParams)
        second = plot(make_comparison())
        assert dict(matplotlib.rcParams) == before
    assert first == second


def test_missing_matplotlib_is_said_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = r"plot_cost: needs the package matplotlib .*pip install 'octomoe\[report\]'"
    with pytest.raises(ImportError, match=message):
        plot_cost(make_comparison())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.layers.3.mlp.experts"], ["layer 3"]),
        (["a.layers.0.x", "a.layers.10.x"], ["layer 0", "layer 10"]),
        (["enc.0.x", "enc.1.x", "dec.0.x"], ["enc.0", "enc.1", "dec.0"]),
        (["a.b", "a.b.c"], ["a.b", "a.b.c"]),
        (["experts"], ["experts"]),
        ([], []),
    ],
)
def test_layers_are_named_by_what_tells_them_apart(names: list[str], expected: list[str]):
    assert short_layer_names(names) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (0.00316, "0.00316"),
        (99.96, "100"),
        (999.6, "1,000"),
        (-4.2e-8, "−4.20×10⁻⁸"),
        (inf, "∞"),
        (nan, "nan"),
    ],
)
def test_numbers_are_worded_without_exponents_where_they_can(value: float, expected: str):
    assert number(value) == expected
