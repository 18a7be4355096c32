"""A picture of measurements: how near contenders come to the device's roofline, or to reading."""

from math import ceil, nan
from typing import TYPE_CHECKING, Any, Final

from octomoe.bench.contender import OURS
from octomoe.evaluate.drawing import draw_svg, fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn of ours, in this order, with colour and dashes.
_OURS: Final = {
    "octomoe": ("#c0264b", "-"),
    "portable": ("#c0264b", ":"),
    "read": ("#6b7280", "--"),
}
_PEERS: Final = ("#2a6fb5", "#b9770e", "#3f8f4f", "#7a4fb0", "#0f8a8a", "#8a5a33")
_COLUMNS: Final = 4
# Per cent.
_TOP: Final = 105


def plot_moe(records: list[dict[str, Any]]) -> str:
    """One SVG, a panel per record: share over tokens. Empty if nothing was measured."""
    records = [record for record in records if record["results"]]
    if not records:
        return ""
    names = {name for record in records for result in record["results"] for name in result["runs"]}
    peers = sorted(names.difference(OURS))
    styles = dict(_OURS) | {
        name: (_PEERS[i % len(_PEERS)], "-" if i < len(_PEERS) else "-.")
        for i, name in enumerate(peers)
    }
    styles = {name: style for name, style in styles.items() if name in names}
    has_floor = all(result["floor_us"] for record in records for result in record["results"])
    if not has_floor:
        # What reading takes is then what the others are measured by.
        styles.pop("read", None)

    def draw(figure: "Figure") -> None:
        columns = min(len(records), _COLUMNS)
        rows = ceil(len(records) / columns)
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        panels = list(grid.flat)
        for axes, record in zip(panels, records, strict=False):
            _panel(axes, record, styles, has_floor)
        for axes in panels[len(records) :]:
            axes.set_axis_off()
        whole = "the roofline" if has_floor else "the speed of reading"
        figure.supylabel(f"share of {whole}, in %", fontsize=9)
        _legend(figure, styles)

    height = 0.8 + 2.4 * ceil(len(records) / _COLUMNS)
    label = f"Layers of experts in {records[0]['format']} on {records[0]['device']}"
    return _on_white(draw_svg("bench-moe", label, height, draw))


def _panel(
    axes: "Axes", record: dict[str, Any], styles: dict[str, tuple[str, str]], has_floor: bool
) -> None:
    results = sorted(record["results"], key=lambda result: result["tokens"])
    axes.set_xscale("log", base=2)
    # Ours come last, on top.
    for name, (colour, dashes) in reversed(styles.items()):
        shares = [_share(result, name, has_floor) for result in results]
        # Where the products bound a layer, its weights are read in less time.
        shares = [nan if name == "read" and share > _TOP else share for share in shares]
        tokens = [result["tokens"] for result in results]
        axes.plot(tokens, shares, dashes, color=colour, lw=1.2, marker=".", ms=4)
    tokens = [result["tokens"] for result in results]
    axes.set_xticks(tokens, [_short(count) for count in tokens])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylim(0, _TOP)
    axes.grid(axis="y")
    model = record["shape"]["model"] or record["layer"]
    axes.set_title(f"{fit(model, 30)}\n{record['mode']}, {record['routing']}", fontsize=8)


def _share(result: dict[str, Any], name: str, has_floor: bool) -> float:
    """In %; NaN, which breaks a line, where a contender was not measured."""
    run = result["runs"].get(name)
    return nan if run is None else 100 * _basis(result, has_floor) / run["us"]


def _basis(result: dict[str, Any], has_floor: bool) -> float:
    """What a share is of, in microseconds."""
    basis: float = result["floor_us"] if has_floor else result["runs"]["read"]["us"]
    return basis


def _short(tokens: int) -> str:
    """A tick's label, short enough that neighbours do not meet.

    >>> _short(512), _short(8192), _short(1500)
    ('512', '8k', '1500')
    """
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _legend(figure: "Figure", styles: dict[str, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle=dashes, color=colour, label=name)
        for name, (colour, dashes) in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), 6))


def _on_white(svg: str) -> str:
    """The picture as a file of its own, which no page gives a background."""
    return svg.replace("</title>", '</title><rect width="100%" height="100%" fill="white"/>', 1)
