"""Pictures of a comparison. Each function takes a `Comparison` and returns one inline SVG.

Text stays text, so that it can be searched and read aloud. Ids carry the picture's name, so that
several share a page. Colours are CSS variables with a default, so that a page may darken them. The
same comparison gives the same bytes. A picture that would show nothing is the empty string.
"""

import io
import re
from collections.abc import Callable
from html import escape
from math import ceil, inf, isfinite, isnan, log2, nan
from typing import TYPE_CHECKING, Any, Final

from octomoe.errors import missing_package
from octomoe.evaluate.compare import Comparison, SchemeResult
from octomoe.evaluate.schemes import SCHEMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a scheme quantises -> its name and colour.
KINDS: Final = {
    "weights": ("weights only", "#2a6fb5"),
    "both": ("weights and activations", "#b9770e"),
    "averaged": ("scales averaged over experts", "#c0264b"),
}
INK, MUTED, RULE = "#1f2937", "#6b7280", "#d9dde3"
_VARIABLES: Final = {
    "ink": INK,
    "muted": MUTED,
    "rule": RULE,
    **{kind: colour for kind, (_, colour) in KINDS.items()},
}
_STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "legend.frameon": False,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
_AVERAGED: Final = {scheme.name for scheme in SCHEMES if scheme.averages_scales}
# What lies this many dB under the best is left off a shared scale, which it would flatten.
_FAR_DB: Final = 12.0


def kind_of(result: SchemeResult) -> str:
    """Key of `KINDS`: what the scheme quantises, or that it averages scales."""
    if result.name in _AVERAGED:
        return "averaged"
    return "both" if result.activations else "weights"


def perplexity_change(result: SchemeResult, comparison: Comparison) -> float:
    """Change of the perplexity against the unquantised model's, in per cent."""
    return 100.0 * (result.perplexity / comparison.perplexity - 1.0)


def by_kl(result: SchemeResult) -> tuple[float, float]:
    """Sort key: least KL first, then fewest bytes; a KL that is not a number is the worst."""
    return (inf if isnan(result.kl) else result.kl, result.bytes_per_weight)


def number(value: float, digits: int = 3) -> str:
    """`value` to some significant digits; powers of ten only where it is tiny or huge.

    >>> number(0.0028), number(-12.345), number(98765.4), number(1.2e-7), number(float("-inf"))
    ('0.00280', '−12.3', '98,765', '1.20×10⁻⁷', '−∞')
    """
    if value == 0.0 or not isfinite(value):
        text = f"{value:g}".replace("inf", "∞")
    elif not 1e-4 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa}×10{_superscript(int(exponent))}"
    elif abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.{digits}g}".rstrip(".")
    return text.replace("-", "−")


def percent(value: float) -> str:
    """A change in per cent, with its sign: hundredths, or three digits where it is large.

    >>> percent(0.094), percent(-3.0), percent(812.3)
    ('+0.09', '−3.00', '+812')
    """
    text = f"{abs(value):.2f}" if abs(value) < 10 else number(abs(value))
    return ("−" if value < 0 and text != "0.00" else "+") + text


def short_layer_names(names: list[str]) -> list[str]:
    """The parts of dotted names that tell the layers apart.

    >>> short_layer_names(["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"])
    ['layer 0', 'layer 1']
    """
    split = [name.split(".") for name in names]
    columns = list(zip(*split, strict=False))
    kept = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    kept = kept or [i for i, column in enumerate(columns) if column[0].isdigit()][:1]
    short = [".".join(parts[i] for i in kept) for parts in split]
    if len({len(parts) for parts in split}) != 1 or not kept:
        return names
    return [f"layer {name}" if name.isdigit() else name for name in short]


def plot_cost(comparison: Comparison) -> str:
    """KL, change of the perplexity and bytes per weight: a row per scheme, least KL first."""
    results = sorted(comparison.results, key=by_kl)
    if not results:
        return ""

    def draw(figure: "Figure") -> None:
        left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=[5, 4, 3])
        left.set_yticks(range(len(results)), [_fit(r.name, 40) for r in results])
        left.set_ylim(len(results) - 0.4, -0.6)
        left.set_xscale("log")
        _dots(left, results, [r.kl for r in results], number)
        left.set_title("KL in nats, logarithmic")
        middle.set_xscale("symlog", linthresh=0.1)
        changes = [perplexity_change(r, comparison) for r in results]
        _dots(middle, results, changes, percent)
        middle.set_title("change of perplexity in %")
        _dots(right, results, [r.bytes_per_weight for r in results], "{:.3f}".format)
        right.set_title(f"bytes per weight (was {comparison.bytes_per_weight:g})")
        _legend(figure, results)

    label = "KL, change of perplexity and bytes per weight of every scheme"
    return _svg("cost", label, 1.3 + 0.26 * len(results), draw)


def plot_weights(comparison: Comparison) -> str:
    """Weight SQNR in dB per expert, layer and weight: a heat map per distinct quantised weight."""
    panels = _distinct_weights(comparison.results)
    if not panels:
        return ""
    layers = list(dict.fromkeys(q.layer for q in panels[0].weight_quality))
    weights = list(dict.fromkeys(q.weight for q in panels[0].weight_quality))
    num_columns = min(4, len(panels))
    num_rows = ceil(len(panels) / num_columns)
    low, high = _shared_range([_flat_sqnr(r) for r in panels])

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
        for axes, result in zip(grid.flat, panels, strict=False):
            image = _heat_map(axes, result, layers, weights, low, high)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for axes in grid[-1]:
            axes.set_xlabel("expert")
        figure.colorbar(image, ax=grid, label="SQNR in dB", extend="min", fraction=0.03)

    height = min(max(0.2 * (len(weights) * len(layers) + 1), 1.0), 2.6) + 0.45
    label = "SQNR of every expert's weights, in dB, for each weight format"
    return _svg("weights", label, 0.4 + num_rows * height, draw)


def plot_scales(comparison: Comparison) -> str:
    """Scales of each expert per layer and weight, for a format that has some for every expert.

    Thin lines reach from the least to the largest scale, dots are medians. Where experts are too
    many to draw each, a layer's experts share one line, thick between the medians.
    """
    result = _with_expert_scales(comparison.results)
    if result is None:
        return ""
    layers = list(dict.fromkeys(q.layer for q in result.weight_quality))
    weights = list(dict.fromkeys(q.weight for q in result.weight_quality))

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(len(weights), 1, sharex=True, sharey=True, squeeze=False)
        for axes, weight in zip(grid.flat, weights, strict=True):
            for q in (q for q in result.weight_quality if q.weight == weight):
                _scale_bars(axes, layers.index(q.layer), q, len(layers))
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda value, _: f"2{_superscript(round(log2(value)))}")
            axes.grid(axis="y")
            axes.set_title(f"{weight}, scales of {_fit(result.name, 40)}")
        medians = [s for q in result.weight_quality for s in q.scale_median if 0 < s < inf]
        bottom, top = axes.get_ylim()
        # Blocks of zeros have the least scale there is: the axis does not follow them down.
        axes.set_ylim(max(bottom, min(medians) / 64), min(top, max(medians) * 1024))
        axes.set_xlim(-0.6, len(layers) - 0.4)
        _layer_ticks(axes, layers)

    label = "Spread of the scales over the experts of each layer"
    return _svg("scales", label, 0.7 + 1.9 * len(weights), draw)


def plot_layers(comparison: Comparison) -> str:
    """SQNR in dB of each layer's output: a line per scheme, a panel per kind of scheme."""
    results = [r for r in comparison.results if r.layer_sqnr_db]
    if not results:
        return ""
    layers = list(dict.fromkeys(name for r in results for name in r.layer_sqnr_db))
    values = {r.name: [r.layer_sqnr_db.get(name, nan) for name in layers] for r in results}
    low, high = _finite_range(v for line in values.values() for v in line)
    panels = [[r for r in results if bool(r.activations) == both] for both in (False, True)]
    panels = [panel for panel in panels if panel]

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=True):
            for r in panel:
                style = "--" if kind_of(r) == "averaged" else "-"
                colour = KINDS[kind_of(r)][1]
                line = [min(max(v, low), high) for v in values[r.name]]
                axes.plot(line, style, marker="o", markersize=2.5, linewidth=1, color=colour)
            axes.set_ylim(low - 1, high + 1)
            axes.grid(axis="y")
            axes.set_title(KINDS["both" if panel[0].activations else "weights"][0])
            _layer_ticks(axes, layers)
            _label_lines(axes, {_fit(r.name, 28): values[r.name][-1] for r in panel}, low, high)
        grid[0, 0].set_ylabel("SQNR of the output in dB")

    return _svg("layers", "SQNR of each layer's output, in dB, for every scheme", 4.2, draw)


def _svg(name: str, label: str, height: float, draw: Callable[["Figure"], None]) -> str:
    """Draw on a figure of 10 by `height` inches and return its SVG, made fit for a page."""
    try:
        import matplotlib.style
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        install = "pip install 'octomoe[report]'"
        message = missing_package(f"plot_{name}", "matplotlib", "3.9", install)
        raise ImportError(message) from error
    buffer = io.StringIO()
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
        figure = Figure(figsize=(10, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        unwanted = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=unwanted)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg).replace("*{", f"#{name} *{{")
    for variable, colour in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    head = f'<svg id="{name}" xmlns="http://www.w3.org/2000/svg" role="img" {box.group()}'
    xlink = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    head += f' {xlink} aria-label="{escape(label)}"><title>{escape(label)}</title>'
    return head + svg[svg.index(">") + 1 :]


def _dots(
    axes: "Axes", results: list[SchemeResult], values: list[float], text: Callable[[float], str]
) -> None:
    """A dot per row with its value beside it; what the axis cannot show is a cross at its end."""
    is_log = axes.get_xscale() == "log"
    low, high = _finite_range(v for v in values if v > 0 or not is_log)
    if is_log:
        low, high = 10.0 ** floor(log10(low)), 10.0 ** ceil(log10(high))
    for row, (result, value) in enumerate(zip(results, values, strict=True)):
        x = min(max(value, low), high) if value == value else high
        colour = KINDS[kind_of(result)][1]
        axes.plot(x, row, "o" if x == value else "x", color=colour, markersize=5)
        axes.annotate(
            text(value), (x, row), (6, 0), textcoords="offset points", va="center", fontsize=8
        )
    # Room for the number beside the last dot, on whatever scale the axis has.
    transform = axes.xaxis.get_transform()
    start, end = transform.transform([low, high])
    span = end - start or 1.0
    axes.set_xlim(transform.inverted().transform([start - 0.05 * span, end + 0.3 * span]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="both")
    axes.tick_params(axis="y", length=0)


def _heat_map(
    axes: "Axes",
    result: SchemeResult,
    layers: list[str],
    weights: list[str],
    low: float,
    high: float,
) -> Any:
    """Rows are layers, a block per weight; columns are experts. Returns the image."""
    import matplotlib

    sqnr = {(q.weight, q.layer): _no_nan(q.sqnr_db) for q in result.weight_quality}
    width = max(map(len, sqnr.values()))
    gap = ceil(len(layers) / 20)
    step = ceil(len(layers) / 6)
    rows: list[list[float]] = []
    ticks: dict[int, str] = {}
    for weight in weights:
        rows += [[nan] * width] * (gap if rows else 0)
        names = [f"{weight} {_fit(name, 20)}" for name in short_layer_names(layers)]
        ticks |= {len(rows) + i: names[i] for i in range(0, len(layers), step)}
        for layer in layers:
            values = [min(max(v, low - 1), high) for v in sqnr.get((weight, layer), [])]
            rows.append(values + [nan] * (width - len(values)))
    colours = matplotlib.colormaps["viridis"].with_extremes(under=KINDS["averaged"][1])
    image = axes.imshow(rows, colours, aspect="auto", interpolation="none", vmin=low, vmax=high)
    axes.spines[:].set_visible(False)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.xaxis.get_major_locator().set_params(nbins=5, integer=True)
    flat = _flat_sqnr(result)
    axes.set_title(f"{_fit(result.name, 28)}\nmedian {number(median(flat))} dB", fontsize=8)
    if median(flat) < low:
        text = f"off the scale:\n{number(min(flat))} to {number(max(flat))} dB"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="white")
    return image


def _scale_bars(axes: "Axes", position: int, q: WeightQuality, num_layers: int) -> None:
    """The scales of one layer's experts, about x = `position`; a line across marks their mean."""
    scales = zip(q.scale_median, q.scale_min, q.scale_max, strict=True)
    experts = sorted(triple for triple in scales if all(0 < s < inf for s in triple))
    if not experts:
        return
    middle, least, most = (list(column) for column in zip(*experts, strict=True))
    colour = KINDS["weights"][1]
    if len(experts) * num_layers > _MAX_DETAILED:
        axes.vlines(position, min(least), max(most), color=colour, alpha=0.5, linewidth=1)
        axes.vlines(position, middle[0], middle[-1], color=colour, linewidth=3)
    else:
        x = [position + 0.8 * ((i + 0.5) / len(experts) - 0.5) for i in range(len(experts))]
        axes.vlines(x, least, most, color=colour, alpha=0.5, linewidth=1)
        axes.plot(x, middle, "o", color=colour, markersize=2.5)
    axes.hlines(fmean(middle), position - 0.45, position + 0.45, color=KINDS["averaged"][1])


def _label_lines(axes: "Axes", ends: dict[str, float], low: float, high: float) -> None:
    """Write each line's name at its right end, pushed apart where ends are close."""
    ordered = sorted(ends.items(), key=lambda item: -_no_nan([item[1]])[0])
    if len(ordered) > _MAX_LABELS:
        ordered = ordered[: _MAX_LABELS // 2] + ordered[-_MAX_LABELS // 2 :]
    gap = (high - low + 2) / 20
    heights: list[float] = []
    for _, value in ordered:
        wanted = min(max(value, low), high)
        heights.append(min(wanted, heights[-1] - gap) if heights else wanted)
    floor
