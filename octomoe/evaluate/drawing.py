"""What the pictures and the table of a report share: colours, wording of numbers, SVG.

Text stays text, so that it can be searched and read aloud. Ids carry the picture's name, so that
several share a page. Colours are CSS variables with a default, so that a page may darken them. The
same figure gives the same bytes.
"""

import io
import re
from collections.abc import Callable, Iterable
from html import escape
from math import ceil, inf, isfinite, isnan, log10
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from octomoe.errors import missing_package
from octomoe.evaluate.compare import SchemeResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What a scheme quantises -> its name and colour.
KINDS: Final = {
    "weights": ("weights only", "#2a6fb5"),
    "both": ("weights and activations", "#b9770e"),
    "averaged": ("scales averaged over experts", "#c0264b"),
}
_INK, _MUTED, _RULE = "#1f2937", "#6b7280", "#d9dde3"
_VARIABLES: Final = {
    "ink": _INK,
    "muted": _MUTED,
    "rule": _RULE,
    **{kind: colour for kind, (_, colour) in KINDS.items()},
}
_STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "figure.constrained_layout.h_pad": 0.08,
    "legend.frameon": False,
    # A "$" in a name is a dollar.
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.xmargin": 0.03,
    "axes.ymargin": 0.0,
    "grid.color": _RULE,
    "xtick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.color": _MUTED,
    "ytick.labelcolor": _INK,
}
_MAX_LABELS: Final = 16


def kind_of(result: SchemeResult) -> str:
    """Key of `KINDS`: what the scheme quantises, or that it averages scales."""
    if result.averages_scales:
        return "averaged"
    return "both" if result.activations else "weights"


def colour_of(result: SchemeResult) -> str:
    """Colour of the scheme's dots and lines."""
    return KINDS[kind_of(result)][1]


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
        text = f"{mantissa}×{power(10, int(exponent))}"
    elif abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.{digits}g}".rstrip(".")
    return text.replace("-", "−")


def percent(value: float) -> str:
    """A change in per cent, with its sign: hundredths, or three digits where it is large.

    >>> percent(0.094), percent(-3.0), percent(812.3), percent(-0.001)
    ('+0.09', '−3.00', '+812', '+0.00')
    """
    size = abs(value)
    text = f"{size:.2f}" if size < 10 else number(size)
    return ("" if isnan(value) else "−" if value < 0 and text != "0.00" else "+") + text


def tick(value: float) -> str:
    """A tick's label, short enough that neighbours do not meet.

    >>> tick(0.01), tick(-10.0), tick(100000.0)
    ('0.01', '−10', '10⁵')
    """
    is_huge = abs(value) >= 1e4 and isfinite(value)
    return (power(10, round(log10(abs(value)))) if is_huge else f"{value:.4g}").replace("-", "−")


def power(base: int, exponent: int) -> str:
    """A power in text that needs no markup.

    >>> power(2, -12)
    '2⁻¹²'
    """
    return str(base) + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def fit(text: str, length: int) -> str:
    """`text`, cut with an ellipsis where it is longer."""
    return text if len(text) <= length else text[: length - 1] + "…"


def short_layer_names(names: list[str]) -> list[str]:
    """The parts of dotted names that tell the layers apart.

    >>> short_layer_names(["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"])
    ['layer 0', 'layer 1']
    """
    split = [name.split(".") for name in names]
    columns = list(zip(*split, strict=False))
    kept = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    kept = kept or [i for i, column in enumerate(columns) if column[0].isdigit()][:1]
    if not kept or len({len(parts) for parts in split}) != 1:
        return names
    short = [".".join(parts[i] for i in kept) for parts in split]
    return [f"layer {name}" if name.isdigit() else name for name in short]


def finite_range(values: Iterable[float]) -> tuple[float, float]:
    """Least and largest of the finite values; (1, 1) if there are none."""
    finite = [value for value in values if isfinite(value)] or [1.0]
    return min(finite), max(finite)


def span_x(axes: "Axes", low: float, high: float) -> None:
    """Let x reach from `low` to `high`, with room for a number behind; after the scale is set."""
    transform = axes.xaxis.get_transform()
    start, end = transform.transform([low, high])
    span = end - start or 1.0
    axes.set_xlim(*transform.inverted().transform([start - 0.05 * span, end + 0.3 * span]))


def mark_layers(axes: "Axes", layers: list[str]) -> None:
    """Name the layers, or a dozen of them, along x."""
    names = [fit(name, 24) for name in short_layer_names(layers)]
    places = list(range(0, len(layers), ceil(len(layers) / 12)))
    is_numbered = all(name.startswith("layer ") for name in names)
    if is_numbered:
        names = [name.removeprefix("layer ") for name in names]
        axes.set_xlabel("layer")
    axes.set_xticks(places, [names[i] for i in places])
    if not is_numbered:
        axes.tick_params(axis="x", labelrotation=30)


def mark_kinds(figure: "Figure", kinds: set[str]) -> None:
    """Say below the figure what the colours stand for."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=name)
        for kind, (name, colour) in KINDS.items()
        if kind in kinds
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=max(len(handles), 1))


def label_ends(axes: "Axes", x: float, ends: list[tuple[float, str]]) -> None:
    """Write the names of lines at their right ends (x, y), apart from each other.

    Args:
        axes: with its final limits.
        x: where the lines end.
        ends: y and name of each. Of too many, the highest and the lowest are named.
    """
    from matplotlib.transforms import offset_copy

    ends = sorted(ends, key=lambda end: -end[0])
    if len(ends) > _MAX_LABELS:
        ends = ends[: _MAX_LABELS // 2] + ends[-_MAX_LABELS // 2 :]
    figure = axes.get_figure(root=True)
    assert figure is not None
    beside = offset_copy(axes.get_yaxis_transform(), figure, x=14, units="points")
    low, high = axes.get_ylim()
    height_in_points = axes.get_window_extent().height / figure.dpi * 72
    gap = (high - low) * 11 / height_in_points
    places: list[float] = []
    for y, _ in ends:
        places.append(min(y, places[-1] - gap) if places else y)
    # Each was pushed down only: half of that is taken back, as far as the axes reach.
    lift = fmean(y - place for (y, _), place in zip(ends, places, strict=True))
    lift = max(min(lift, high - places[0]), low - places[-1])
    for (y, name), place in zip(ends, places, strict=True):
        axes.annotate(
            name,
            (x, y),
            (1, place + lift),
            textcoords=beside,
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": _MUTED, "relpos": (0, 0.5)},
        )


def draw_svg(name: str, label: str, height: float, draw: Callable[["Figure"], None]) -> str:
    """Let `draw` fill a figure of 10 by `height` inches; return it as SVG made to stand in a page.

    Args:
        name: id of the SVG and start of every id in it.
        label: what a screen reader says.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        install = "pip install 'octomoe[report]'"
        message = missing_package(f"plot_{name}", "matplotlib", "3.9", install)
        raise ImportError(message) from error
    buffer = io.StringIO()
    # The reader's own matplotlibrc does not show, and is as it was afterwards.
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
        figure = Figure(figsize=(10, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _for_page(name, label, buffer.getvalue())


def _for_page(name: str, label: str, svg: str) -> str:
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].strip()
    body = re.sub(r'(<[^<>]*\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    body = body.replace("*{", f"#{name} *{{", 1)
    for variable, colour in _VARIABLES.items():
        body = body.replace(f": {colour}", f": var(--{variable}, {colour})")
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg id="{name}" {namespaces} {box.group()} role="img" aria-label="{escape(label)}">'
    return f"{head}<title>{escape(label)}</title>{body}"
