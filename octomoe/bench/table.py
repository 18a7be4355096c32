"""Measurements as lines of text."""

from statistics import geometric_mean
from typing import Any, Final

from octomoe.bench.contender import OURS

_WIDTH: Final = 9


def title(record: dict[str, Any]) -> str:
    """What a record's measurements are of."""
    shape = record["shape"]
    sizes = f"E={shape['num_experts']} F={shape['width']} D={shape['hidden_size']}"
    model = f" ({shape['model']})" if shape["model"] else ""
    return (
        f"{record['layer']}{model}: {sizes} A={shape['num_choices']}, {record['format']}, "
        f"{record['mode']}, {record['routing']} routing; microseconds"
    )


def header(result: dict[str, Any]) -> str:
    """Names of the columns of `row`."""
    names = [name for name, _, _ in _cells(result, peers_of(result))]
    return " ".join(f"{name:>{_width(name)}}" for name in names)


def row(result: dict[str, Any], peers: list[str]) -> str:
    """A measurement; `peers` are those of the header."""
    texts = []
    for name, value, digits in _cells(result, peers):
        text = "-" if value is None else f"{value:.{digits}f}"
        texts.append(f"{text:>{_width(name)}}")
    return " ".join(texts)


def peers_of(result: dict[str, Any]) -> list[str]:
    """Runs that are not ours."""
    return [name for name in result["runs"] if name not in OURS]


def times(result: dict[str, Any]) -> float | None:
    """How many times as fast as the fastest peer we are; None without one.

    >>> times({"runs": {"octomoe": {"us": 2.0}, "a": {"us": 5.0}, "b": {"us": 3.0}}})
    1.5
    """
    runs = result["runs"]
    peers = [runs[name]["us"] for name in peers_of(result)]
    return min(peers) / runs["octomoe"]["us"] if peers else None


def summary(records: list[dict[str, Any]]) -> str:
    """How we compare with the fastest peer of each measurement; empty without any."""
    found = [times(result) for record in records for result in record["results"]]
    ratios = [ratio for ratio in found if ratio is not None]
    if not ratios:
        return ""
    return (
        f"times as fast as the fastest peer: {min(ratios):.2f} to {max(ratios):.2f}, "
        f"geometric mean {geometric_mean(ratios):.2f} of {len(ratios)}"
    )


def _cells(result: dict[str, Any], peers: list[str]) -> list[tuple[str, Any, int]]:
    """Name, value and digits behind the point."""
    runs = result["runs"]
    ours, read = runs["octomoe"], runs["read"]["us"]

    def us(name: str) -> tuple[str, Any, int]:
        return name, runs.get(name, {}).get("us"), 1

    return [
        ("tokens", result["tokens"], 0),
        ("floor", result["floor_us"], 1),
        ("read", read, 1),
        *(us(name) for name in peers),
        us("octomoe"),
        ("times", times(result), 2),
        ("x read", ours["us"] / read, 2),
        ("share %", None if ours["share"] is None else 100 * ours["share"], 0),
        *(us(name) for name in OURS[1:] if name != "read" and name in runs),
        ("error", ours["error"], 4),
        ("SNR dB", ours["snr_db"], 1),
    ]


def _width(name: str) -> int:
    return max(len(name), _WIDTH)
