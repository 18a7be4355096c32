"""Time `octomoe convert` on a Qwen3-MoE-shaped checkpoint, beside llm-compressor where installed.

python benchmarks/convert.py [--folder DIR] [--peer PYTHON] [--layers 2,8] [--repeat 3]

Makes the checkpoints (2.5 GB per 2 layers) in DIR, runs every tool in a process of its own, and
appends seconds and peak resident memory to benchmarks/results/cpu/convert.jsonl. ``--peer`` is a
Python that has llm-compressor; without it only ours are measured, and the record says so.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "convert.jsonl"
NUM_EXPERTS, HIDDEN, WIDTH = 128, 2048, 768
# Name, target or scheme, further options.
OURS = (
    ("ct-channel", ["--no-verify"]),
    ("ct-channel", []),
    ("ct-block", ["--no-verify"]),
    ("ct-mxfp8", ["--no-verify"]),
)
PEERS = ("FP8_DYNAMIC", "FP8_BLOCK", "MXFP8")
PLAIN_LOOP = """
import sys, torch
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
source, out = map(Path, sys.argv[1:3])
out.mkdir()
for file in sorted(source.glob("*.safetensors")):
    tensors = {}
    with safe_open(file, "pt") as shard:
        for name in shard.keys():
            x = shard.get_tensor(name)
            if ".experts." in name:
                x = x.float()
                scale = x.abs().amax(-1, keepdim=True) / 448
                tensors[name + "_scale"] = scale
                x = (x / scale).to(torch.float8_e4m3fn)
            tensors[name] = x
    save_file(tensors, out / file.name)
"""
PEER = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(
    model_stub=sys.argv[1], save_directory=sys.argv[2], scheme=sys.argv[3],
    ignore=["re:.*gate$", "lm_head", "model.embed_tokens", "re:.*self_attn.*"],
    max_workers=2, device="cpu",
)
"""


def main() -> None:
    """Make, run, print, append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/octomoe-bench"))
    parser.add_argument("--peer", help="a Python interpreter with llm-compressor")
    parser.add_argument("--layers", default="2,8", help="sizes of the checkpoints")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    records = []
    for num_layers in map(int, options.layers.split(",")):
        source = make_checkpoint(options.folder, num_layers)
        # Only the smaller size is given to others: the larger one shows how ours scales.
        is_first = not records
        runs = [("octomoe", f"{t} {' '.join(o)}".strip(), ours(source, t, o)) for t, o in OURS]
        if is_first:
            runs.append(("plain torch loop", "channel", [sys.executable, "-c", PLAIN_LOOP]))
        else:
            runs = runs[:2]
        if options.peer and is_first:
            runs += [("llm-compressor", s, [options.peer, "-c", PEER]) for s in PEERS]
        for tool, what, command in runs:
            records.append(measure(options, source, tool, what, command, num_layers))
            print(row(records[-1]), flush=True)
    report(records, has_peer=bool(options.peer))


def make_checkpoint(folder: Path, num_layers: int) -> Path:
    """A Qwen3-30B-A3B-shaped bf16 checkpoint of a few layers, one per shard; made once."""
    path = folder / f"qwen3-moe-{num_layers}-layers"
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weight_map = {}
    for layer in range(num_layers):
        base = f"model.layers.{layer}"
        shapes = {f"{base}.mlp.gate": (NUM_EXPERTS, HIDDEN)}
        for expert in range(NUM_EXPERTS):
            module = f"{base}.mlp.experts.{expert}"
            shapes[f"{module}.gate_proj"] = shapes[f"{module}.up_proj"] = (WIDTH, HIDDEN)
            shapes[f"{module}.down_proj"] = (HIDDEN, WIDTH)
        for name, rows in (("q", 4096), ("k", 512), ("v", 512)):
            shapes[f"{base}.self_attn.{name}_proj"] = (rows, HIDDEN)
        shapes[f"{base}.self_attn.o_proj"] = (HIDDEN, 4096)
        tensors = {
            f"{name}.weight": torch.randn(shape).mul_(0.02).bfloat16()
            for name, shape in shapes.items()
        }
        file = f"model-{layer + 1:05}-of-{num_layers:05}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "moe_intermediate_size": WIDTH,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 8,
        "num_hidden_layers": num_layers,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def ours(source: Path, target: str, options: list[str]) -> list[str]:
    """Our command, without source and destination."""
    return [sys.executable, "-m", "octomoe", "convert", "--target", target, *options]


def measure(
    options: argparse.Namespace,
    source: Path,
    tool: str,
    what: str,
    command: list[str],
    num_layers: int,
) -> dict[str, object]:
    """Run a command a few times; the first run warms the source's pages and does not count."""
    out = options.folder / "out"
    seconds, peaks = [], []
    for _ in range(options.repeat + 1):
        shutil.rmtree(out, ignore_errors=True)
        arguments = [str(source), str(out), *([what] if tool == "llm-compressor" else [])]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT
        )
        assert process.stderr is not None
        message = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds.append(time.perf_counter() - started)
        peaks.append(usage.ru_maxrss / 1024)
        if status:
            raise RuntimeError(f"{tool} {what} failed:\n{message.decode()[-2000:]}")
    counted = seconds[1:] or seconds
    return {
        "tool": tool,
        "what": what,
        "layers": num_layers,
        "source_bytes": sum(f.stat().st_size for f in source.glob("*.safetensors")),
        "seconds": round(statistics.median(counted), 2),
        "fastest": round(min(counted), 2),
        "slowest": round(max(counted), 2),
        "peak_rss_mb": round(max(peaks)),
    }


def row(record: dict[str, object]) -> str:
    """One line of the table."""
    return (
        f"{record['tool']:18}{record['what']:24}{record['layers']:>3} layers"
        f"{record['seconds']:>9} s ({record['fastest']} to {record['slowest']})"
        f"{record['peak_rss_mb']:>7} MB"
    )


def report(records: list[dict[str, object]], *, has_peer: bool) -> None:
    """Append the run, and say how it compares."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    by_what = {(r["tool"], r["what"]): r for r in records if r["layers"] == records[0]["layers"]}
    if has_peer:
        ratio = (
            by_what["llm-compressor", "FP8_DYNAMIC"]["seconds"]
            / by_what["octomoe", "ct-channel --no-verify"]["seconds"]
        )
        print(f"llm-compressor FP8_DYNAMIC / octomoe ct-channel: {ratio:.1f}x the time")
    else:
        print("llm-compressor was not measured: give --peer PYTHON")
    run = {
        "commit": commit,
        "command": "python benchmarks/convert.py",
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "missing_peers": [] if has_peer else ["llm-compressor"],
        "results": records,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")


if __name__ == "__main__":
    main()
