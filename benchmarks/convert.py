"""Time `octomoe convert` on a Qwen3-MoE-shaped checkpoint, beside llm-compressor where installed.

python benchmarks/convert.py [--folder DIR] [--peer PYTHON] [--layers 2,8] [--repeat 3]

Makes the checkpoints (2.5 GB per 2 layers) in DIR, runs every tool in a process of its own, and
appends seconds and peak resident memory to benchmarks/results/cpu/convert.jsonl. Seconds are those
of the whole process; the row ``import torch`` says how many of them only start it. ``--peer`` is
a Python that has llm-compressor; without it only ours are measured, and the record says so.

Linux counts the memory of a process from before its exec, so this one stays small: torch is
imported only where the checkpoints are made, in a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "convert.jsonl"
NUM_EXPERTS, HIDDEN, WIDTH = 128, 2048, 768
# Name, target or scheme, further options.
OURS: tuple[tuple[str, list[str]], ...] = (
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
    records = [measure(options, "python", "import torch", [sys.executable, "-c", "import torch"])]
    first_size, *_ = sizes = [int(size) for size in options.layers.split(",")]
    for num_layers in sizes:
        source = options.folder / f"qwen3-moe-{num_layers}-layers"
        if not (source / "config.json").exists():
            maker = multiprocessing.get_context("spawn").Process(
                target=make_checkpoint, args=(source, num_layers)
            )
            maker.start()
            maker.join()
        # Only the smaller size is given to others: the larger one shows how ours scales.
        is_first = num_layers == first_size
        runs = [("octomoe", f"{t} {' '.join(o)}".strip(), ours(source, t, o)) for t, o in OURS]
        if is_first:
            runs.append(("plain torch loop", "channel", [sys.executable, "-c", PLAIN_LOOP]))
        else:
            runs = runs[:2]
        if options.peer and is_first:
            runs += [("llm-compressor", s, [options.peer, "-c", PEER]) for s in PEERS]
        for tool, what, command in runs:
            records.append(measure(options, tool, what, command, source, num_layers))
    report(records, first_size, options.peer)


def make_checkpoint(path: Path, num_layers: int) -> None:
    """A Qwen3-30B-A3B-shaped bf16 checkpoint of a few layers, one per shard."""
    import torch
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
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


def ours(source: Path, target: str, options: list[str]) -> list[str]:
    """Our command, without source and destination."""
    return [sys.executable, "-m", "octomoe", "convert", "--target", target, *options]


def measure(
    options: argparse.Namespace,
    tool: str,
    what: str,
    command: list[str],
    source: Path | None = None,
    num_layers: int = 0,
) -> dict[str, Any]:
    """Run a command a few times; the first run warms the source's pages and does not count."""
    out = options.folder / "out"
    arguments = [] if source is None else [str(source), str(out)]
    if tool == "llm-compressor":
        arguments.append(what)
    seconds, peaks = [], []
    for _ in range(options.repeat + 1):
        shutil.rmtree(out, ignore_errors=True)
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
    shutil.rmtree(out, ignore_errors=True)
    counted = seconds[1:] or seconds
    record: dict[str, Any] = {
        "tool": tool,
        "what": what,
        "layers": num_layers,
        "source_bytes": sum(f.stat().st_size for f in source.glob("*.safetensors"))
        if source
        else 0,
        "seconds": round(statistics.median(counted), 2),
        "fastest": round(min(counted), 2),
        "slowest": round(max(counted), 2),
        "peak_rss_mb": round(max(peaks)),
    }
    print(
        f"{tool:18}{what:24}{num_layers:>3} layers"
        f"{record['seconds']:>9} s ({record['fastest']} to {record['slowest']})"
        f"{record['peak_rss_mb']:>7} MB",
        flush=True,
    )
    return record


def report(records: list[dict[str, Any]], first_size: int, peer: str | None) -> None:
    """Append the run, and say how it compares."""
    run: dict[str, Any] = {
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "command": f"python benchmarks/convert.py{' --peer PYTHON' if peer else ''}",
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"torch": version("torch"), "python": sys.version.split()[0]},
        "missing_peers": [] if peer else ["llm-compressor"],
        "results": records,
    }
    if peer:
        code = "from importlib.metadata import version; print(version('llmcompressor'))"
        run["versions"] |= {"llm-compressor": output_of(peer, "-c", code)}
        seconds = {
            (r["tool"], r["what"]): r["seconds"] for r in records if r["layers"] == first_size
        }
        ours_s = seconds["octomoe", "ct-channel --no-verify"]
        ratio = run["ratio"] = round(seconds["llm-compressor", "FP8_DYNAMIC"] / ours_s, 2)
        print(f"llm-compressor FP8_DYNAMIC / octomoe ct-channel --no-verify: {ratio}x the time")
    else:
        print("llm-compressor was not measured: give --peer PYTHON")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")


def output_of(*command: str) -> str:
    """What a command prints."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
