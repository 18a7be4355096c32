"""Write README's tables from the newest records under benchmarks/results.

    python benchmarks/readme_tables.py           rewrite README.md
    python benchmarks/readme_tables.py --check   exit with 1 if it would change

A table stands between ``<!-- NAME: OF -->`` and ``<!-- end -->``; names are accuracy (of a model),
convert (cpu), memory_bound, routing, fused_moe and moe_layer (of a device). The last two, of what
`octomoe bench moe` appended to fused_moe.jsonl, are empty until something was measured.
"""

import json
import re
import sys
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from octomoe.bench.table import peers_of, times

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
ACCURACY = RESULTS / "cpu" / "accuracy.jsonl"
CONVERT = RESULTS / "cpu" / "convert.jsonl"
TABLES = "accuracy|convert|memory_bound|routing|fused_moe|moe_layer"
MARKED = re.compile(rf"(<!-- ({TABLES}): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Rewrite or check."""
    text = README.read_text(encoding="utf-8")

    def table(match: re.Match[str]) -> str:
        match match[2]:
            case "accuracy":
                made = accuracy_table(match[3])
            case "convert":
                made = convert_table()
            case "fused_moe":
                made = fused_moe_table(match[3])
            case "moe_layer":
                made = moe_layer_table(match[3])
            case "routing":
                made = routing_table(match[3])
            case _:
                made = memory_bound_table(match[3])
        return match[1] + made + match[4]

    written = MARKED.sub(table, text)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is not made from the newest records" if written != text else 0)
    README.write_text(written, encoding="utf-8")


def accuracy_table(model: str) -> str:
    """The newest accuracy record of `model` as a Markdown table with its origin."""
    lines = ACCURACY.read_text(encoding="utf-8").splitlines()
    record = [row for row in map(json.loads, lines) if row["model"] == model][-1]
    versions = record["versions"]
    rows = [
        "| weights × activations | bytes | SQNR dB | KL | top-1 % | perplexity | change |",
        "|---|--:|--:|--:|--:|--:|--:|",
        f"| unquantised | {record['bytes_per_weight']:.3f} | | | | {record['perplexity']:.3f} | |",
        *(_row(result, record["perplexity"]) for result in record["results"]),
        "",
        (
            f"`{record['command']}`, {record['num_tokens']} tokens, commit {record['commit']}, "
            f"torch {versions['torch']}, transformers {versions['transformers']}; "
            f"from `{ACCURACY.relative_to(ROOT)}`."
        ),
    ]
    return "\n".join(rows) + "\n"


def convert_table() -> str:
    """The newest converter record as a Markdown table with its origin."""
    record = json.loads(CONVERT.read_text(encoding="utf-8").splitlines()[-1])
    rows = ["| tool | what | source | seconds | peak memory |", "|---|---|--:|--:|--:|"]
    for run in record["results"]:
        seconds = f"{run['seconds']:.1f} ({run['fastest']:.1f} to {run['slowest']:.1f})"
        size = f"{run['source_bytes'] / 1e9:.1f} GB" if run["source_bytes"] else ""
        memory = f"{run['peak_rss_mb'] / 1000:.2f} GB"
        cells = (run["tool"], f"`{run['what']}`", size, seconds, memory)
        rows.append(f"| {' | '.join(cells)} |")
    rows += [
        "",
        (
            f"`{record['command']}`, {record['cores']} cores, commit {record['commit']}, "
            + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
            + f"; from `{CONVERT.relative_to(ROOT)}`."
        ),
    ]
    return "\n".join(rows) + "\n"


def memory_bound_table(device: str) -> str:
    """The newest record of the kernels that move bytes, as a Markdown table with its origin."""
    path = RESULTS / device / "memory_bound.jsonl"
    record = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    rows = ["| op | us | share of copy bandwidth |", "|---|--:|--:|"]
    for run in record["results"]:
        share = "" if run["share_of_copy"] is None else f"{100 * run['share_of_copy']:.0f} %"
        rows.append(f"| {run['name']} | {run['us']:.1f} | {share} |")
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    rows += [
        "",
        (
            f"`{record['command']}`, {record['rows']} rows of {record['columns']}, "
            f"{record['device']}, copy at {record['copy_tb_per_s']:.2f} TB/s, commit "
            f"{record['commit']}, {versions}; from `{path.relative_to(ROOT)}`."
        ),
    ]
    return "\n".join(rows) + "\n"


def routing_table(device: str) -> str:
    """The newest record of routing beside TransformerEngine's row-id map."""
    path = RESULTS / device / "routing.jsonl"
    record = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    rows = ["| routing | octomoe us | TransformerEngine us |", "|---|--:|--:|"]
    for result in record["results"]:
        if "transformer_engine" in result["runs"]:
            ours, peer = (result["runs"][name]["us"] for name in ("octomoe", "transformer_engine"))
            rows.append(f"| {result['name']} | {ours:.1f} | {peer:.1f} |")
    rows += [
        "",
        (
            f"`{record['command']}`, {record['device']}, commit {record['commit']}, "
            f"{', '.join(f'{name} {number}' for name, number in record['versions'].items())}; "
            f"from `{path.relative_to(ROOT)}`."
        ),
    ]
    return "\n".join(rows) + "\n"


def fused_moe_table(device: str, results: Path = RESULTS) -> str:
    """The kernels of a layer beside SGLang's, experts of equal chance: of each layer and number of
    tokens the newest record. Empty if there is none."""
    path = results / device / "fused_moe.jsonl"
    used = _newest(path, "kernel", ("balanced",))
    if not used:
        return ""
    # Older records have neither.
    has_read = any("read" in run["runs"] for run in used)
    columns = ["layer", "tokens", "floor us", *(["read us"] if has_read else []), "SGLang us"]
    columns += ["octomoe us", "times as fast", "portable us", "whole op us"]
    rows = [
        f"| {' | '.join(columns)} |",
        f"|---|{'--:|' * (len(columns) - 1)}",
        *(_fused_moe_row(run, has_read) for run in used),
        "",
        _origin(used, path, [_times(run) for run in used if "sglang" in run["runs"]]),
    ]
    return "\n".join(rows) + "\n"


def moe_layer_table(device: str, results: Path = RESULTS) -> str:
    """Whole layers, from router logits on, beside every peer: of each layer, routing and number of
    tokens the newest record. Empty if there is none."""
    path = results / device / "fused_moe.jsonl"
    used = _newest(path, "layer", ("balanced", "skewed"))
    if not used:
        return ""
    peers = sorted({name for run in used for name in peers_of(run)})
    columns = ["layer", "routing", "tokens", "floor us", "read us", "router us"]
    columns += [*(f"{peer} us" for peer in peers), "octomoe us", "times as fast"]
    rows = [
        f"| {' | '.join(columns)} |",
        f"|---|---|{'--:|' * (len(columns) - 2)}",
        *(_moe_layer_row(run, peers) for run in used),
        "",
        _origin(used, path, [ratio for run in used if (ratio := times(run)) is not None]),
    ]
    return "\n".join(rows) + "\n"


def _newest(path: Path, mode: str, routings: tuple[str, ...]) -> list[dict[str, Any]]:
    """Measurements of 128 x 128 scales, each with the record it is from, layer by layer."""
    if not path.exists():
        return []
    newest: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        # Records from before there were others do not say what they are.
        routing = record.setdefault("routing", "balanced")
        if record.get("format", "block128") != "block128" or record.get("mode", "kernel") != mode:
            continue
        if routing not in routings:
            continue
        for result in record["results"]:
            key = routings.index(routing), result["tokens"]
            newest.setdefault(record["layer"], {})[key] = record | result
    return [of_layer[key] for of_layer in newest.values() for key in sorted(of_layer)]


def _origin(used: list[dict[str, Any]], path: Path, ratios: list[float]) -> str:
    versions = {f"{name} {number}" for run in used for name, number in run["versions"].items()}
    commands = dict.fromkeys(f"`{run['command']}`" for run in used)
    return (
        f"{_summary(ratios)}{', '.join(commands)}, {used[-1]['device']}, "
        f"commit {', '.join(sorted({run['commit'] for run in used}))}, "
        f"{', '.join(sorted(versions))}; from `{path.relative_to(path.parents[3])}`."
    )


def _fused_moe_row(run: dict[str, Any], has_read: bool) -> str:
    cells = [
        run["shape"]["model"],
        str(run["tokens"]),
        _number(run["floor_us"]),
        *([_us(run, "read")] if has_read else []),
        _us(run, "sglang"),
        _us(run, "octomoe"),
        f"{_times(run):.2f}" if "sglang" in run["runs"] else "",
        _us(run, "portable") or _us(run, "octomoe"),
        _us(run, "octomoe op"),
    ]
    return f"| {' | '.join(cells)} |"


def _moe_layer_row(run: dict[str, Any], peers: list[str]) -> str:
    ratio = times(run)
    cells = [
        run["shape"]["model"],
        run["routing"],
        str(run["tokens"]),
        _number(run["floor_us"]),
        *(_us(run, name) for name in ("read", "router", *peers, "octomoe")),
        "" if ratio is None else f"{ratio:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _us(run: dict[str, Any], name: str) -> str:
    """Microseconds of a contender; empty where it was not there."""
    return _number(run["runs"].get(name, {}).get("us"))


def _number(us: float | None) -> str:
    return "" if us is None else f"{us:.1f}"


def _times(run: dict[str, Any]) -> float:
    """How many times as fast as SGLang's the same region of ours is."""
    return run["runs"]["sglang"]["us"] / run["runs"]["octomoe"]["us"]


def _summary(times: list[float]) -> str:
    if not times:
        return ""
    return f"Times as fast: at least {min(times):.2f}, geometric mean {geometric_mean(times):.2f}. "


def _row(result: dict[str, Any], base: float) -> str:
    change = 100 * (result["perplexity"] / base - 1)
    cells = (
        result["name"],
        f"{result['bytes_per_weight']:.3f}",
        f"{result['sqnr_db']:.2f}",
        f"{result['kl']:.4f}",
        f"{100 * result['top1']:.1f}",
        f"{result['perplexity']:.3f}",
        f"{change:+.2f} %",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
