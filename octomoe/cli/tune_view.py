"""What `octomoe tune` shows: a table that grows while it searches, and a picture of the outcome."""

from collections.abc import Mapping, Sequence
from math import log2
from statistics import geometric_mean
from typing import TYPE_CHECKING, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from octomoe.evaluate.drawing import draw_svg, number, tick
from octomoe.tune.configs import FusedMoeConfig
from octomoe.tune.entries import Bucket, Entry
from octomoe.tune.kinds import Config, config_to_json, kind_of
from octomoe.tune.search import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS: Final = ("#2a6fb5", "#b9770e")


class View:
    """The state of a search as a table of what is done and a line of what is under way."""

    def __init__(self, title: str, routings: Sequence[str]) -> None:
        self._title, self._routings = title, routings
        self._buckets: list[Bucket] = []
        self._trials: list[Trial] = []

    def on_trial(self, trial: Trial) -> None:
        """A measurement was made."""
        if self._trials and self._trials[-1].num_tokens != trial.num_tokens:
            self._trials.clear()
        self._trials.append(trial)

    def on_bucket(self, bucket: Bucket) -> None:
        """A number of tokens is done."""
        self._buckets.append(bucket)
        self._trials.clear()

    def __rich__(self) -> RenderableType:
        table = Table(
            title=self._title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1)
        )
        table.add_column("tokens", justify="right", no_wrap=True)
        for routing in self._routings:
            table.add_column(f"{routing} µs", justify="right", no_wrap=True)
            table.add_column("was", justify="right", no_wrap=True)
            table.add_column("times", justify="right", no_wrap=True)
        table.add_column("configuration", overflow="fold")
        for bucket in self._buckets:
            table.add_row(*self._cells(bucket))
        return Group(table, Text(self._under_way())) if self._trials else table

    def line(self, bucket: Bucket) -> str:
        """A number of tokens in a line, for what is no terminal."""
        cells = self._cells(bucket)
        return f"{cells[0]} tokens: " + "  ".join(cells[1:])

    def _cells(self, bucket: Bucket) -> list[str]:
        best = bucket.choices[0]
        cells = [f"{bucket.num_tokens:,}"]
        for routing in self._routings:
            us, was = best.us.get(routing), bucket.default_us.get(routing)
            cells += [f"{us:.1f}" if us else "", f"{was:.1f}" if was else ""]
            cells.append(f"{was / us:.2f}" if us and was else "")
        return [*cells, short(best.config)]

    def _under_way(self) -> str:
        last = self._trials[-1]
        timed = [trial.us for trial in self._trials if trial.us is not None]
        failed = len(self._trials) - len(timed)
        old = sum(trial.is_old for trial in self._trials)
        notes = [f"{failed} cannot run"] * bool(failed) + [f"{old} from the journal"] * bool(old)
        best = f", fastest {min(timed):.1f} µs" if timed else ""
        note = f" ({', '.join(notes)})" if notes else ""
        return f"{last.num_tokens:,} tokens: measurement {len(self._trials)}{note}{best}"


def short(config: Config) -> str:
    """A configuration in few words: its kind, and what is not the default.

    >>> from octomoe.tune.configs import PrefillConfig
    >>> short(PrefillConfig(64, up_stages=2, down_stages=2, group=4))
    'prefill rows 64, up_stages 2, down_stages 2, group 4, combined 1024, is_chained'
    """
    if isinstance(config, FusedMoeConfig):
        halves = [
            f"{name} {tile.rows}×{tile.columns} warps {tile.num_warps} stages {tile.num_stages}"
            for name, tile in (("up", config.up), ("down", config.down))
        ]
        up, down = config.up, config.down
        halves[0] += f" unroll {up.unroll} splits {up.splits}"
        halves[1] += f" tiles {down.tiles} held {down.held}"
        sides = ["swapped"] * config.is_swapped
        return f"{kind_of(config)} " + ", ".join([*halves, *sides, f"combined {config.combined}"])
    words = []
    for name, value in config_to_json(config).items():
        if isinstance(value, bool):
            words += [name] * value
        else:
            words.append(f"{name} {value}")
    return f"{kind_of(config)} {', '.join(words)}"


def print_candidates(
    console: Console, num_tokens: int, found: Mapping[str, Sequence[Config]], usual: Config | None
) -> None:
    """What would be tried for a number of tokens; a star marks what runs without a table."""
    total = sum(map(len, found.values()))
    console.print(f"[bold]{num_tokens:,} tokens[/]: {total} candidates")
    for configs in found.values():
        for config in configs:
            console.print(f"  {'*' if config == usual else ' '} {short(config)}", soft_wrap=True)


def verdict(entry: Entry) -> str:
    """What was gained, in a sentence."""
    gains = [
        bucket.default_us[routing] / us
        for bucket in entry.buckets
        for routing, us in bucket.choices[0].us.items()
        if routing in bucket.default_us
    ]
    if not gains:
        return "Nothing to compare with was measured."
    return (
        f"Times as fast as without a table: {min(gains):.2f} to {max(gains):.2f}, "
        f"geometric mean {geometric_mean(gains):.2f}."
    )


def plot_entry(entry: Entry, title: str) -> str:
    """Microseconds by tokens, tuned and not, and their ratio: one SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    routings = list(dict.fromkeys(r for b in entry.buckets for r in b.choices[0].us))

    def draw(figure: "Figure") -> None:
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        for routing, colour in zip(routings, _COLOURS, strict=False):
            tuned, usual = _times(entry, routing)
            left.plot(*usual, "--", color=colour, lw=1, label=f"{routing}, not tuned")
            left.plot(*tuned, "o-", color=colour, lw=1, markersize=3, label=f"{routing}, tuned")
            was = dict(zip(*usual, strict=True))
            gains = [(n, was[n] / us) for n, us in zip(*tuned, strict=True) if n in was]
            if gains:
                right.plot(*zip(*gains, strict=True), "o-", color=colour, lw=1, markersize=3)
        right.axhline(1.0, color="#6b7280", lw=0.8)
        left.set_yscale("log")
        left.yaxis.set_major_formatter(lambda value, _: number(value))
        left.yaxis.set_minor_formatter(lambda value, _: "")
        for axes in (left, right):
            _by_tokens(axes, [bucket.num_tokens for bucket in entry.buckets])
        left.set_title(f"{title}: µs", wrap=True)
        right.set_title("times as fast as not tuned")
        left.legend(loc="upper left")

    return draw_svg("tuned", f"{title}: microseconds by tokens, tuned and not", 3.6, draw)


def _times(
    entry: Entry, routing: str
) -> tuple[tuple[list[int], list[float]], tuple[list[int], list[float]]]:
    """Tokens and microseconds, of what is tuned and of what runs without a table."""
    tuned = [(b.num_tokens, b.choices[0].us[routing]) for b in entry.buckets]
    usual = [(b.num_tokens, b.default_us.get(routing)) for b in entry.buckets]
    known = [(tokens, us) for tokens, us in usual if us is not None]
    return (
        ([tokens for tokens, _ in tuned], [us for _, us in tuned]),
        ([tokens for tokens, _ in known], [us for _, us in known]),
    )


def _by_tokens(axes: "Axes", tokens: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    places = [n for n in tokens if log2(n) % 2 == 0] if len(tokens) > 6 else list(tokens)
    axes.set_xticks(places, [tick(n) if n >= 1e6 else f"{n:,}" for n in places])
    axes.set_xlabel("tokens")
    axes.grid(axis="both")
    axes.margins(y=0.1)
