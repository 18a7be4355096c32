"""Pictures of a comparison. Each function takes a `Comparison` and returns one inline SVG.

A picture that would show nothing is the empty string.
"""

from collections.abc import Callable, Iterable
from math import ceil, floor, inf, isfinite, isnan, log2, log10, nan
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Final

from octomoe.evaluate.compare import Comparison, SchemeResult
from octomoe.evaluate.drawing import (
    KINDS,
    by_kl,
    colour_of,
    draw_svg,
    finite_range,
    fit,
    kind_of,
    label_ends,
    mark_kinds,
    mark_layers,
    number,
    percent,
    power,
    short_layer_names,
    span_x,
    tick,
)
from octomoe.evaluate.metrics import WeightQuality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What lies this many dB under the best is left off a shared scale, which it would flatten.
_FAR_DB: Final = 12.0
_OFF_SCALE: Final = "#b81f44"
# More experts than this (over all layers) are drawn as one line per layer.
_MAX_DETAILED: Final = 400


def plot_cost(comparison: Comparison) -> str:
    """KL, change of the perplexity and bytes per weight: a row per scheme, least KL first."""
    results = sorted(comparison.results, key=by_kl)
    if not results:
        return ""

    def draw(figure: "Figure") -> None:
        left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=[5, 4, 3])
        left.set_yticks(range(len(results)), [fit(r.name, 40) for r in results])
        left.set_ylim(len(results) - 0.4, -0.6)
        left.set_xscale("log")
        _dots(left, results, [r.kl for r in results], number)
        left.set_title("KL in nats, logarithmic")
        middle.set_xscale("symlog", linthresh=0.1)
        _dots(middle, results, [comparison.perplexity_change(r) for r in results], percent)
        middle.set_title("change of perplexity in %")
        _dots(right, results, [r.bytes_per_weight for r in results], "{:.3f}".format)
        right.set_title(f"bytes per weight (was {comparison.bytes_per_weight:g})")
        mark_kinds(figure, {kind_of(r) for r in results})

    return draw_svg("cost", "What every scheme costs", 1.3 + 0.26 * len(results), draw)


def plot_weights(comparison: Comparison) -> str:
    """Weight SQNR in dB per expert, layer and weight: a heat map per distinct quantised weight."""
    panels = _distinct_weights(comparison.results)
    if not panels:
        return ""
    num_columns = min(4, len(panels))
    num_rows = ceil(len(panels) / num_columns)
    low, high = _shared_range([_all_sqnr(r) for r in panels])

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
        for axes, result in zip(grid.flat, panels, strict=False):
            image = _heat_map(axes, result, low, high)
        used, unused = grid.flat[: len(panels)], grid.flat[len(panels) :]
        for axes in unused:
            axes.remove()
        for axes in used[-num_columns:]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("expert")
        figure.colorbar(image, ax=used, label="SQNR in dB", extend="min", fraction=0.03)

    height = min(max(0.2 * (len(panels[0].weight_quality) + 1), 1.0), 2.6) + 0.45
    return draw_svg("weights", "SQNR in dB of all experts' weights", 0.4 + num_rows * height, draw)


def plot_scales(comparison: Comparison) -> str:
    """Scales of each expert per layer and weight, for a format that has some for every expert.

    Thin lines reach from the least to the largest scale, dots are medians. Where experts are too
    many to draw each, a layer's experts share one line, thick between the medians.
    """
    result = _with_expert_scales(comparison.results)
    if result is None:
        return ""
    layers, weights = _layers_and_weights(result)

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(len(weights), 1, sharex=True, sharey=True, squeeze=False)
        for axes, weight in zip(grid.flat, weights, strict=True):
            for q in (q for q in result.weight_quality if q.weight == weight):
                _scale_bars(axes, layers.index(q.layer), q, len(layers))
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda value, _: power(2, round(log2(value))))
            axes.grid(axis="y")
            axes.set_title(f"{weight}, scales of “{fit(result.name, 40)}”")
        medians = [s for q in result.weight_quality for s in q.scale_median if 0 < s < inf]
        bottom, top = axes.get_ylim()
        # Blocks of zeros have the least scale there is: the axis does not follow them down.
        axes.set_ylim(max(bottom, min(medians) / 64) / 1.2, top * 1.2)
        axes.set_xlim(-0.6, len(layers) - 0.4)
        mark_layers(axes, layers)

    return draw_svg("scales", "Scales of each layer's experts", 0.7 + 1.9 * len(weights), draw)


def plot_layers(comparison: Comparison) -> str:
    """SQNR in dB of each layer's output: a line per scheme, a panel per kind of scheme.

    Lines far below the others have a panel of their own, on another scale.
    """
    results = [r for r in comparison.results if r.layer_sqnr_db]
    if not results:
        return ""
    layers = list(dict.fromkeys(name for r in results for name in r.layer_sqnr_db))
    near, far = _split_far(results)
    panels = {
        KINDS[kind][0]: [r for r in near if bool(r.activations) == (kind == "both")]
        for kind in ("weights", "both")
    }
    panels = {title: panel for title, panel in panels.items() if panel}
    below = "far below, on another scale"
    rows = [list(panels)] + ([[below] * len(panels)] if far else [])

    def draw(figure: "Figure") -> None:
        grid: dict[str, Axes] = figure.subplot_mosaic(rows, height_ratios=[3.4, 1.2][: len(rows)])
        for title, panel in panels.items():
            _lines(grid[title], panel, layers, near)
        if far:
            _lines(grid[below], far, layers, far)
        for title, axes in grid.items():
            axes.set_title(title)
            axes.set_ylabel("SQNR in dB")

    height = 5.6 if far else 4.0
    return draw_svg("layers", "SQNR of each layer's output in dB, for every scheme", height, draw)


def _dots(
    axes: "Axes", results: list[SchemeResult], values: list[float], text: Callable[[float], str]
) -> None:
    """A dot per row with its value beside it; what the axis cannot show is a cross at its end."""
    is_log = axes.get_xscale() == "log"
    low, high = finite_range(v for v in values if v > 0 or not is_log)
    if is_log:
        low, high = 10.0 ** floor(log10(low)), 10.0 ** ceil(log10(high))
    elif axes.get_xscale() == "symlog":
        low, high = min(low, 0.0), max(high, 0.1)
        axes.locator_params(axis="x", numticks=6)
    else:
        axes.locator_params(axis="x", nbins=4)
    for row, (r, value) in enumerate(zip(results, values, strict=True)):
        x = high if isnan(value) else min(max(value, low), high)
        axes.plot(x, row, "o" if x == value else "x", color=colour_of(r), markersize=5)
        axes.annotate(
            text(value), (x, row), (6, 0), textcoords="offset points", va="center", size=8
        )
    span_x(axes, low, high)
    axes.xaxis.set_major_formatter(lambda value, _: tick(value))
    axes.grid(axis="both")
    axes.tick_params(axis="y", length=0)


def _distinct_weights(results: list[SchemeResult]) -> list[SchemeResult]:
    """One result per weight format, averaged or not; weight-only ones where there are some."""
    distinct: dict[tuple[str, bool], SchemeResult] = {}
    for r in sorted(results, key=lambda r: bool(r.activations)):
        if any(q.sqnr_db for q in r.weight_quality):
            distinct.setdefault((r.weights, kind_of(r) == "averaged"), r)
    return list(distinct.values())


def _layers_and_weights(result: SchemeResult) -> tuple[list[str], list[str]]:
    keys = [(q.layer, q.weight) for q in result.weight_quality]
    return list(dict.fromkeys(k[0] for k in keys)), list(dict.fromkeys(k[1] for k in keys))


def _no_nan(values: Iterable[float]) -> list[float]:
    """The values; what is not a number is as bad as can be."""
    return [-inf if isnan(v) else v for v in values]


def _all_sqnr(result: SchemeResult) -> list[float]:
    """SQNR of every expert's weights."""
    return _no_nan(v for q in result.weight_quality for v in q.sqnr_db)


def _shared_range(panels: list[list[float]]) -> tuple[float, float]:
    """Range in dB that shows every panel but those far below the best."""
    best = finite_range(median(values) for values in panels)[1]
    near = [v for values in panels if median(values) >= best - _FAR_DB for v in values]
    low, high = finite_range(near)
    # A range of less than one dB would make much of nothing.
    return min(max(low, best - _FAR_DB), high - 1.0), high


def _heat_map(axes: "Axes", result: SchemeResult, low: float, high: float) -> Any:
    """Rows are layers, a block per weight; columns are experts. Returns the image."""
    from matplotlib import colormaps

    layers, weights = _layers_and_weights(result)
    sqnr = {(q.weight, q.layer): q.sqnr_db for q in result.weight_quality}
    width = max(map(len, sqnr.values()))
    names = [fit(name, 20) for name in short_layer_names(layers)]
    rows: list[list[float]] = []
    ticks: dict[int, str] = {}
    for weight in weights:
        rows += [[nan] * width] * (ceil(len(layers) / 20) if rows else 0)
        for i in range(0, len(layers), ceil(len(layers) / 6)):
            ticks[len(rows) + i] = f"{weight} {names[i]}"
        for layer in layers:
            values = sqnr.get((weight, layer), [])
            row = [min(max(v, low - 1), high) for v in _no_nan(values)]
            rows.append(row + [nan] * (width - len(row)))
    colours = colormaps["viridis"].with_extremes(under=_OFF_SCALE)
    image = axes.imshow(rows, colours, aspect="auto", interpolation="none", vmin=low, vmax=high)
    axes.spines[:].set_visible(False)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks(range(0, width, max(1, 2 ** ceil(log2(width / 5)))))
    every = _all_sqnr(result)
    axes.set_title(f"{fit(result.name, 28)}\nmedian {number(median(every))} dB", fontsize=8)
    if median(every) < low:
        text = f"off the scale:\n{number(min(every))} to {number(max(every))} dB"
        middle = ((width - 1) / 2, (len(layers) - 1) / 2)
        axes.text(*middle, text, ha="center", va="center", color="white", fontsize=8)
    return image


def _with_expert_scales(results: list[SchemeResult]) -> SchemeResult | None:
    """A result whose scales differ between experts, best one whose scales another one averages."""
    averaged = {r.weights for r in results if kind_of(r) == "averaged"}

    def differ(q: WeightQuality) -> bool:
        return len({scale for scale in q.scale_median if 0 < scale < inf}) > 1

    found = [r for r in results if any(map(differ, r.weight_quality))]
    return min(found, key=lambda r: (r.weights not in averaged, bool(r.activations)), default=None)


def _scale_bars(axes: "Axes", position: int, q: WeightQuality, num_layers: int) -> None:
    """The scales of one layer's experts, about x = `position`; a line across marks their mean."""
    scales = zip(q.scale_median, q.scale_min, q.scale_max, strict=True)
    experts = sorted(triple for triple in scales if all(0 < s < inf for s in triple))
    if not experts:
        return
    middle, least, most = (list(column) for column in zip(*experts, strict=True))
    colour = KINDS["weights"][1]
    if len(experts) * num_layers > _MAX_DETAILED:
        axes.vlines(position, min(least), max(most), color=colour, alpha=0.5, lw=1)
        axes.vlines(position, middle[0], middle[-1], color=colour, lw=3)
    else:
        x = [position + 0.8 * ((i + 0.5) / len(experts) - 0.5) for i in range(len(experts))]
        axes.vlines(x, least, most, color=colour, alpha=0.5, lw=1)
        axes.plot(x, middle, "o", color=colour, markersize=2.5)
    axes.hlines(fmean(middle), position - 0.45, position + 0.45, color=KINDS["averaged"][1])


def _split_far(results: list[SchemeResult]) -> tuple[list[SchemeResult], list[SchemeResult]]:
    """Results whose layers are about as good as the best one's, and those far below."""
    middle = [median(_no_nan(r.layer_sqnr_db.values())) for r in results]
    least = max((m for m in middle if isfinite(m)), default=-inf) - _FAR_DB
    pairs = list(zip(results, middle, strict=True))
    return [r for r, m in pairs if m >= least], [r for r, m in pairs if m < least]


def _lines(
    axes: "Axes", results: list[SchemeResult], layers: list[str], scale: list[SchemeResult]
) -> None:
    """A line per result, on the scale of several; what is not a number lies on the lower end."""
    low, high = finite_range(v for r in scale for v in r.layer_sqnr_db.values())
    ends: list[tuple[float, str]] = []
    for r in results:
        values = _no_nan(r.layer_sqnr_db[name] for name in layers)
        line = [min(max(v, low), high) for v in values]
        dots = "o" if len(layers) <= 32 else ""
        style = "--" if kind_of(r) == "averaged" else "-"
        axes.plot(line, style, lw=1, marker=dots, markersize=2.5, color=colour_of(r))
        ends.append((line[-1], fit(r.name, 28) + " (not finite)" * (values[-1] == -inf)))
    axes.set_ylim(low - 0.5, high + 0.5)
    axes.grid(axis="y")
    mark_layers(axes, layers)
    label_ends(axes, len(layers) - 1, ends)
