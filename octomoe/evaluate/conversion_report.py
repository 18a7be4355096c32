"""A conversion as one HTML page that needs nothing else: what was made, and how well it was kept.

The page has the look of the comparison's report (`octomoe.evaluate.report`), whose style it uses.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from math import ceil, inf, isfinite, log2, nan
from pathlib import Path, PurePath
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from octomoe.errors import missing_package
from octomoe.evaluate.drawing import (
    KINDS,
    draw_svg,
    finite_range,
    fit,
    mark_layers,
    number,
    power,
    short_layer_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What lies this many dB under the best is one colour, off the scale that it would flatten.
_FAR_DB: Final = 12.0
_OFF_SCALE, _UNCHANGED = "#b81f44", "#9aa3af"
# More experts than this (over all layers) are drawn as one line per layer.
_MAX_DETAILED: Final = 400
# Problems in view, and those that are a click away.
_IN_VIEW: Final = 20
_LISTED: Final = 2000


@dataclass(frozen=True)
class Projection:
    """One projection of one layer's experts; lists have one entry per expert.

    Attributes:
        module: the experts module.
        role: gate, up or down.
        sqnr_db: infinite where the source's values are kept, minus infinite where some are lost.
        scale_min, scale_max: over the scales that apply to the expert; 1 if it is not quantised.
    """

    module: str
    role: str
    sqnr_db: Sequence[float]
    scale_min: Sequence[float]
    scale_max: Sequence[float]


@dataclass(frozen=True)
class ConversionReport:
    """What the page shows.

    Attributes:
        source, destination: paths or URLs.
        verdict: one or two sentences.
        is_sound: whether nothing is off.
        facts: what was done: label -> text.
        problems: one sentence each.
        projections: by layer, then role.
        command: what was run.
        versions: of the packages involved.
    """

    source: str
    destination: str
    verdict: str
    is_sound: bool
    facts: Mapping[str, str]
    problems: Sequence[str]
    projections: Sequence[Projection]
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)


def write_conversion_report(report: ConversionReport, path: Path) -> None:
    """Write the report as one HTML file with everything in it.

    The page is written under a temporary name and then renamed; a file that is there already is
    replaced.

    Args:
        report: what to show.
        path: the HTML file, in a folder that exists.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    page = _render(report)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def plot_sqnr(projections: Sequence[Projection]) -> str:
    """SQNR in dB per layer and expert, a heat map for each role; "" if all values are kept."""
    measured = [v for p in projections for v in p.sqnr_db if v < inf]
    if not measured:
        return ""
    roles = list(dict.fromkeys(p.role for p in projections))
    modules = list(dict.fromkeys(p.module for p in projections))
    least, high = finite_range(measured)
    low = min(max(least, high - _FAR_DB), high - 1.0)

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(1, len(roles), sharex=True, sharey=True, squeeze=False)[0]
        for axes, role in zip(grid, roles, strict=True):
            image = _heat_map(axes, [p for p in projections if p.role == role], modules, low, high)
        names = [fit(name, 20) for name in short_layer_names(modules)]
        places = list(range(0, len(modules), ceil(len(modules) / 16)))
        grid[0].set_yticks(places, [names[i] for i in places], fontsize=8)
        is_cut = low > least or any(not isfinite(v) for v in measured)
        extend = "min" if is_cut else "neither"
        figure.colorbar(image, ax=list(grid), label="SQNR in dB", extend=extend, fraction=0.03)

    height = 1.1 + min(max(0.22 * len(modules), 0.8), 6.0)
    return draw_svg("sqnr", "SQNR in dB of every expert's weights", height, draw)


def plot_scale_spread(projections: Sequence[Projection]) -> str:
    """Least to largest scale of each expert, layer by layer, a row for each role; "" if none.

    Where experts are too many to draw each, a layer's experts share one line, thick from the least
    to the largest middle of an expert's scales.
    """
    shown = [p for p in projections if _ranges(p)]
    if not shown:
        return ""
    roles = list(dict.fromkeys(p.role for p in shown))
    modules = list(dict.fromkeys(p.module for p in projections))
    ranges = [pair for p in shown for pair in _ranges(p)]
    is_detailed = len(modules) * max(len(_ranges(p)) for p in shown) <= _MAX_DETAILED

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(len(roles), 1, sharex=True, sharey=True, squeeze=False)
        for axes, role in zip(grid.flat, roles, strict=True):
            for p in shown:
                if p.role == role:
                    _scale_bars(axes, modules.index(p.module), _ranges(p), is_detailed)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda value, _: power(2, round(log2(value))))
            axes.grid(axis="y")
            axes.set_title(role)
        # Blocks of zeros have the least scale there is: the axis does not follow them down.
        bottom = max(min(low for low, _ in ranges), median(low for low, _ in ranges) / 256)
        axes.set_ylim(bottom / 1.3, max(high for _, high in ranges) * 1.3)
        axes.set_xlim(-0.6, len(modules) - 0.4)
        mark_layers(axes, modules)

    return draw_svg("spread", "Scales of each layer's experts", 0.7 + 1.6 * len(roles), draw)


def _heat_map(
    axes: "Axes", projections: Sequence[Projection], modules: list[str], low: float, high: float
) -> Any:
    """Rows are layers, columns are experts. Returns the image."""
    from matplotlib import colormaps

    rows: dict[str, list[float]] = {p.module: [_no_nan(v) for v in p.sqnr_db] for p in projections}
    width = max(map(len, rows.values()), default=1)
    # Above the range is what did not change, below it what is far off.
    values = [
        [high + 1 if v == inf else min(max(v, low - 1), high) for v in rows.get(module, [])]
        for module in modules
    ]
    padded = [row + [nan] * (width - len(row)) for row in values]
    colours = colormaps["viridis"].with_extremes(under=_OFF_SCALE, over=_UNCHANGED)
    image = axes.imshow(padded, colours, aspect="auto", interpolation="none", vmin=low, vmax=high)
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks(range(0, width, max(1, 2 ** ceil(log2(width / 5)))))
    axes.set_xlabel("expert")
    every = [v for row in rows.values() for v in row if v < inf]
    role = projections[0].role
    if every:
        summary = f"median {number(median(every))} dB, lowest {number(min(every))} dB"
    else:
        summary = "nothing changed"
    axes.set_title(f"{role}\n{summary}", fontsize=8)
    return image


def _ranges(p: Projection) -> list[tuple[float, float]]:
    """Least and largest scale of each expert that is quantised with sound scales."""
    pairs = zip(p.scale_min, p.scale_max, p.sqnr_db, strict=True)
    # An unquantised expert is stated with scales of 1 and values that are the source's.
    return [(a, b) for a, b, v in pairs if 0 < a <= b < inf and not (a == b == 1.0 and v == inf)]


def _scale_bars(
    axes: "Axes", position: int, ranges: list[tuple[float, float]], is_detailed: bool
) -> None:
    """The scales of one layer's experts about x = `position`."""
    colour = KINDS["weights"][1]
    ordered = sorted(ranges, key=lambda pair: pair[0] * pair[1])
    least, most = [low for low, _ in ordered], [high for _, high in ordered]
    middle = [(low * high) ** 0.5 for low, high in ordered]
    if is_detailed:
        x = [position + 0.8 * ((i + 0.5) / len(ordered) - 0.5) for i in range(len(ordered))]
        axes.vlines(x, least, most, color=colour, alpha=0.5, lw=1)
        axes.plot(x, middle, "o", color=colour, markersize=2.5)
    else:
        axes.vlines(position, min(least), max(most), color=colour, alpha=0.5, lw=1)
        axes.vlines(position, middle[0], middle[-1], color=colour, lw=3)


def _no_nan(value: float) -> float:
    """The value; what is not a number is as bad as can be."""
    return value if value == value else -inf


def _render(report: ConversionReport) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        install = "pip install 'octomoe[report]'"
        message = missing_package("write_conversion_report", "jinja2", "3.1", install)
        raise ImportError(message) from error
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = files("octomoe.evaluate")
    page = folder.joinpath("report.html").read_text(encoding="utf-8")
    rules = page[page.index("<style>") + len("<style>") : page.index("</style>")]
    colours = {kind: colour for kind, (_, colour) in KINDS.items()}
    source = folder.joinpath("conversion_report.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        style=Markup(environment.from_string(rules).render(colours=colours)),
        name=PurePath(report.destination).name or report.destination,
        report=report,
        first_problems=report.problems[:_IN_VIEW],
        more_problems=report.problems[_IN_VIEW:_LISTED],
        num_hidden=max(len(report.problems) - _LISTED, 0),
        sqnr=Markup(plot_sqnr(report.projections)),
        spread=Markup(plot_scale_spread(report.projections)),
        rows=[_row(p) for p in report.projections],
    )


def _row(p: Projection) -> list[str]:
    values = [_no_nan(v) for v in p.sqnr_db]
    low, high = finite_range([*p.scale_min, *p.scale_max])
    worst = min(values)
    return [
        p.module,
        p.role,
        number(worst, 4),
        "–" if worst == inf else str(values.index(worst)),
        number(median(values), 4),
        number(low),
        number(high),
    ]
