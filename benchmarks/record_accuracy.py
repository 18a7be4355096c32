"""Run `octomoe demo` on a model and append what it found to benchmarks/results/cpu/accuracy.jsonl.

python benchmarks/record_accuracy.py [--model PATH --text FILE --tokens N]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "accuracy.jsonl"
KEPT = ("name", "weights", "activations", "bytes_per_weight", "sqnr_db", "kl", "top1", "perplexity")


def main() -> None:
    """Measure, reduce to what tables need, append."""
    options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.html"
        command = [sys.executable, "-m", "octomoe", "demo", "--json", "--report", str(report)]
        run = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=True)
    comparison = json.loads(run.stdout)
    record = {
        "commit": _commit(),
        "command": " ".join(["octomoe demo", *_without_folders(options)]),
        "versions": comparison["versions"],
        "model": Path(comparison["model"]).name,
        "num_tokens": comparison["num_tokens"],
        "perplexity": comparison["perplexity"],
        "bytes_per_weight": comparison["bytes_per_weight"],
        "results": [{key: row[key] for key in KEPT} for row in comparison["results"]],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _commit() -> str:
    """The commit that was measured, marked if the package differed from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    return f"{commit}-dirty" if _git("status", "--porcelain", "--", "octomoe") else commit


def _git(*arguments: str) -> str:
    run = subprocess.run(
        ["git", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return run.stdout.strip()


def _without_folders(options: list[str]) -> list[str]:
    """Options with the last part of each path only: folders differ between machines."""
    return [option if option.startswith("-") else Path(option).name for option in options]


if __name__ == "__main__":
    main()
