"""A comparison as one HTML page that needs nothing else, and as one sentence of advice."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from math import hypot, isfinite
from pathlib import Path, PurePath
from typing import Final

from octomoe.errors import missing_package
from octomoe.evaluate.compare import Comparison, SchemeResult
from octomoe.evaluate.drawing import KINDS, by_kl, kind_of, number, percent
from octomoe.evaluate.plots import plot_cost, plot_layers, plot_scales, plot_weights

# A KL this many times the best one's of the same kind is worth a warning.
_BAD_FACTOR: Final = 10.0
# Weights this many dB under the best are named as the reason.
_BAD_DB: Final = 6.0
# A KL in nats that is small anyway: a best one below it does not make the others bad.
_SMALL_KL: Final = 1e-3
_MAX_NAMED: Final = 2


@dataclass(frozen=True)
class Figure:
    """A picture of the report: how it is drawn, and what to look for in it."""

    draw: Callable[[Comparison], str]
    heading: str
    caption: str


FIGURES: Final = (
    Figure(
        plot_cost,
        "What each scheme costs",
        "Further left is better in all three columns: look for a scheme whose KL and perplexity "
        "stay low while it stores hardly more than one byte per weight.",
    ),
    Figure(
        plot_weights,
        "How well each expert's weights are kept",
        "Look for dark cells, the experts that a format serves badly, and for red ones, which fall "
        "off the scale that the other formats share.",
    ),
    Figure(
        plot_scales,
        "How far experts' scales lie apart",
        "Dots (thick lines where experts are many) are the experts' median scales and red lines "
        "their mean: the further an expert lies from it, the more averaged scales falsify it.",
    ),
    Figure(
        plot_layers,
        "How well each layer's output is kept",
        "Look for a line that drops in one layer, or lies apart from its neighbours throughout; "
        "6 dB less is twice the error.",
    ),
)


@dataclass(frozen=True)
class _Verdict:
    """What the results say: the least KL of each kind, and what stands out as bad (worst first)."""

    best: list[SchemeResult]
    bad: list[SchemeResult]
    worst: SchemeResult | None


@dataclass(frozen=True)
class _Row:
    """A table row as the template shows it."""

    kind: str
    mark: str
    cells: list[str]


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the comparison as one HTML file with everything in it.

    The page is written under a temporary name and then renamed, so that `path` is never half a
    page; a file that is there already is replaced.

    Args:
        comparison: what to show.
        path: the HTML file, in a folder that exists.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    page = _render(comparison)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_bad(result: SchemeResult, comparison: Comparison) -> bool:
    """Whether a scheme of the comparison is one to avoid."""
    return result in _judge(comparison.results).bad


def advice(comparison: Comparison) -> str:
    """One sentence on which schemes to choose and which to avoid, with the figures behind it."""
    verdict = _judge(comparison.results)
    if verdict.worst is None:
        return "No scheme was measured."
    if len(comparison.results) == 1:
        only = verdict.worst
        return f"Only “{only.name}” was measured: {_figures(only, comparison)}."
    choices = [
        f"for {KINDS[kind_of(r)][0]} choose “{r.name}” "
        f"({_figures(r, comparison)}{_ties(r, comparison)})"
        for r in verdict.best
    ]
    text = ", ".join(choices) or "none of these schemes can be advised"
    if verdict.bad:
        named = [_why_bad(r, comparison) for r in verdict.bad[:_MAX_NAMED]]
        if len(verdict.bad) > len(named):
            named.append(f"{len(verdict.bad) - len(named)} more that are marked in the table")
        text += "; avoid " + "; and ".join(named)
    else:
        text += f"; none stands out as bad, the worst being “{verdict.worst.name}”"
        text += f" with a KL of {number(verdict.worst.kl)}"
    return text[0].upper() + text[1:] + "."


def _judge(results: list[SchemeResult]) -> _Verdict:
    """Compare each scheme with the best of those that quantise as much, activations or not."""
    ordered = sorted(results, key=by_kl)
    sound = [r for r in ordered if isfinite(r.kl) and not r.averages_scales]
    best: dict[bool, SchemeResult] = {}
    for r in sound:
        best.setdefault(bool(r.activations), r)

    def is_bad(r: SchemeResult) -> bool:
        peer = best.get(bool(r.activations), sound[0] if sound else r)
        return not r.kl < _BAD_FACTOR * max(peer.kl, _SMALL_KL)

    bad = [r for r in reversed(ordered) if is_bad(r)]
    return _Verdict([best[b] for b in sorted(best)], bad, ordered[-1] if ordered else None)


def _figures(r: SchemeResult, comparison: Comparison) -> str:
    change = percent(comparison.perplexity_change(r))
    kl = f"KL {number(r.kl)} ± {number(r.kl_error, 1)}"
    return f"{kl}, perplexity {change} %, {r.bytes_per_weight:.3f} bytes per weight"


def _ties(best: SchemeResult, comparison: Comparison) -> str:
    """How many of its kind do as well as the best, within twice the error of the difference."""
    ties = [
        r
        for r in comparison.results
        if r is not best
        and kind_of(r) == kind_of(best)
        and r.kl - best.kl < 2 * hypot(r.kl_error, best.kl_error)
    ]
    return f"; {len(ties)} more within the noise" if ties else ""


def _why_bad(r: SchemeResult, comparison: Comparison) -> str:
    """The scheme's name and what is wrong with it."""
    if not isfinite(r.kl):
        return f"“{r.name}”, whose predictions are not finite"
    least = min(comparison.results, key=by_kl)
    reasons = [
        f"its KL is {number(r.kl)} where “{least.name}” has {number(least.kl)}",
        f"it changes perplexity by {percent(comparison.perplexity_change(r))} %",
    ]
    most_db = max(other.sqnr_db for other in comparison.results)
    if r.sqnr_db < most_db - _BAD_DB:
        reasons.append(
            f"its weights keep {number(r.sqnr_db)} dB where others keep {number(most_db)}"
        )
    return f"“{r.name}”: {', '.join(reasons[:-1])} and {reasons[-1]}"


def _render(comparison: Comparison) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        install = "pip install 'octomoe[report]'"
        message = missing_package("write_report", "jinja2", "3.1", install)
        raise ImportError(message) from error
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("octomoe.evaluate").joinpath("report.html").read_text(encoding="utf-8")
    drawn = [(figure, figure.draw(comparison)) for figure in FIGURES]
    return environment.from_string(source).render(
        comparison=comparison,
        name=PurePath(comparison.model).name or comparison.model,
        advice=advice(comparison),
        kinds={kind_of(r): KINDS[kind_of(r)][0] for r in comparison.results},
        colours={kind: colour for kind, (_, colour) in KINDS.items()},
        baseline_bytes=f"{comparison.bytes_per_weight:.3f}",
        baseline_perplexity=_perplexity(comparison.perplexity),
        rows=_rows(comparison),
        figures=[(figure, Markup(svg)) for figure, svg in drawn if svg],
    )


def _rows(comparison: Comparison) -> list[_Row]:
    verdict = _judge(comparison.results)
    rows = []
    for r in comparison.results:
        mark = "least KL" if r in verdict.best else "most KL" if r is verdict.worst else ""
        if r in verdict.bad:
            mark = "avoid"
        elif len(comparison.results) == 1:
            mark = ""
        cells = [
            r.name,
            r.weights,
            r.activations or "–",
            f"{r.bytes_per_weight:.3f}",
            number(100 * r.flushed, 2),
            number(100 * r.saturated, 2),
            number(r.sqnr_db, 4),
            number(r.kl),
            f"{100 * r.top1:.1f}",
            _perplexity(r.perplexity),
            percent(comparison.perplexity_change(r)),
        ]
        rows.append(_Row(kind_of(r), mark, cells))
    return rows


def _perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 1e4 else number(value)
