"""Where a conversion writes: never mistaken for complete, never overwritten, resumable.

While a conversion runs, the folder holds a marker with the plan's digest, shards under temporary
names, and no config.json, so nothing can load it. Every finished shard has its own name and, until
the end, a small file that says what became of its weights. The index comes next to last,
config.json last, and then the marker goes.
"""

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from octomoe.checkpoint.encode import How
from octomoe.checkpoint.jobs import Outcome
from octomoe.checkpoint.plan import Plan, Shard
from octomoe.checkpoint.schemes import MODELOPT_CONFIG, NEURON_CONFIG
from octomoe.checkpoint.source import INDEX, Checkpoint, local_path
from octomoe.checkpoint.writer import PARTIAL, write_file, write_json
from octomoe.errors import refusal

REPORT: Final = "octomoe_conversion.json"
_MARKER: Final = PARTIAL + "conversion.json"
_FAILED: Final = PARTIAL + "failed-"
# What a checkpoint holds besides weights; larger files are none of it.
_MAX_SIDE_FILE: Final = 256 << 20
_WEIGHT_FILES: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
_OWN_FILES: Final = ("config.json", INDEX, MODELOPT_CONFIG, NEURON_CONFIG, REPORT)
_POLL_SECONDS: Final = 0.2
_START_SECONDS: Final = 600.0
# In which a rank that is started again takes back that it failed.
_RESTART_SECONDS: Final = 60.0


class Destination:
    """The folder of one conversion.

    Args:
        path: the folder.
        plan: what goes into it.
        rank: of this process among those that share the conversion; 0 prepares and completes it.
        resume: go on with an unfinished conversion of the same plan.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: it holds an unfinished conversion of another plan.
        OSError: it cannot be written or the disk is too small.
    """

    def __init__(self, path: Path, plan: Plan, *, rank: int, resume: bool) -> None:
        self.path, self.plan = path, plan
        self._rank = rank
        if rank == 0:
            self._prepare(resume=resume)
        else:
            self._await_marker()
        (path / f"{_FAILED}{rank}").unlink(missing_ok=True)

    def is_done(self, shard: Shard) -> bool:
        """Whether a shard is whole."""
        return (self.path / shard.name).exists()

    def record(self, shard: Shard, outcome: Outcome) -> None:
        """Keep what became of a shard's weights, just before the shard gets its name."""
        stated = {
            "weights": dict(outcome.weights),
            "num_changed": outcome.num_changed,
            "num_values": outcome.num_values,
        }
        write_json(self._side(shard), stated)

    def fail(self, error: BaseException) -> None:
        """Tell the process that completes the conversion not to wait."""
        # What stopped the conversion may stop this too; the error itself matters more.
        with suppress(OSError):
            write_file(self.path / f"{_FAILED}{self._rank}", str(error).encode())

    def await_shards(self) -> None:
        """Wait for the shards of other processes.

        Raises:
            RuntimeError: one of them failed.
        """
        prepared, started = (self.path / _MARKER).stat().st_mtime_ns, time.monotonic()
        while not all(self.is_done(shard) for shard in self.plan.shards):
            for failed in self.path.glob(f"{_FAILED}*"):
                # A rank that goes on after an earlier failure takes it back when it has started.
                with suppress(FileNotFoundError):
                    is_old = failed.stat().st_mtime_ns < prepared
                    if not is_old or time.monotonic() - started > _RESTART_SECONDS:
                        raise RuntimeError(
                            f"convert_checkpoint: rank {failed.name.removeprefix(_FAILED)} failed: "
                            f"{failed.read_text()}; repair that and run again with --resume"
                        )
            time.sleep(_POLL_SECONDS)

    def outcome(self) -> Outcome:
        """What became of all weights."""
        total = Outcome()
        for shard in self.plan.shards:
            stated = json.loads(self._side(shard).read_text())
            weights = {How(how): count for how, count in stated["weights"].items()}
            total.merge(Outcome(weights, stated["num_changed"], stated["num_values"]))
        # Workers end in any order.
        total.weights = {how: total.weights[how] for how in How if how in total.weights}
        return total

    def complete(self, source: Checkpoint, side_files: dict[str, Any], report: object) -> None:
        """Write all that makes the folder a checkpoint, config.json last."""
        shards = self.plan.shards
        for name in source.store.names():
            is_weight = name.endswith((*_WEIGHT_FILES, ".index.json"))
            if is_weight or name in _OWN_FILES or name.startswith("."):
                continue
            size = source.store.size(name)
            if size <= _MAX_SIDE_FILE:
                write_file(self.path / name, source.read_file(name))
        for name, content in side_files.items():
            write_json(self.path / name, content)
        if len(shards) > 1:
            weight_map = {tensor.name: s.name for s in shards for tensor in s.tensors}
            total = {"total_size": self.plan.num_bytes}
            write_json(self.path / INDEX, {"metadata": total, "weight_map": weight_map})
        write_json(self.path / REPORT, report)
        write_json(self.path / "config.json", self.plan.config)
        tidy(self.path)

    def _prepare(self, *, resume: bool) -> None:
        check_destination(self.path, resume=resume)
        marker = self.path / _MARKER
        if marker.exists():
            self._check_marker(json.loads(marker.read_text()))
        if not marker.exists() and (self.path / REPORT).exists():
            got = "holds a finished conversion of another source or with other options"
            do = "choose another, or delete it first: nothing is overwritten"
            raise FileExistsError(_refuse(self.path, got, "a new or empty folder", do))
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_space()
        write_json(marker, {"digest": self.plan.digest, "source": self.plan.stamps})

    def _check_marker(self, stated: dict[str, Any]) -> None:
        got = ""
        if stated["digest"] != self.plan.digest:
            got = "holds an unfinished conversion of another source or with other options"
        elif stated["source"] != self.plan.stamps:
            got = "holds an unfinished conversion of a source whose files have changed since"
        if got:
            do = "give the same ones, or delete it"
            raise ValueError(_refuse(self.path, got, "the same to resume", do))

    def _check_space(self) -> None:
        done = sum(
            (self.path / shard.name).stat().st_size
            for shard in self.plan.shards
            if self.is_done(shard)
        )
        partial = sum(f.stat().st_size for f in self.path.glob(f"{PARTIAL}*.safetensors"))
        free = shutil.disk_usage(self.path).free + partial
        if free < self.plan.num_bytes - done:
            needs = f"{self.plan.num_bytes - done:,} bytes"
            raise OSError(_refuse(self.path, f"has {free:,} bytes free", needs, "free some"))

    def _await_marker(self) -> None:
        marker, started = self.path / _MARKER, time.monotonic()
        while time.monotonic() - started < _START_SECONDS:
            if is_complete(self.path, self.plan.digest):
                return
            with suppress(FileNotFoundError):
                if json.loads(marker.read_text())["digest"] == self.plan.digest:
                    return
                got = "was prepared by rank 0 for other options or another source"
                raise ValueError(_refuse(self.path, got, "the same on every rank"))
            time.sleep(_POLL_SECONDS)
        raise RuntimeError(_refuse(self.path, "was not prepared by rank 0", "one that runs"))

    def _side(self, shard: Shard) -> Path:
        return self.path / f"{PARTIAL}{shard.name}.json"


def is_complete(path: Path, digest: str) -> bool:
    """Whether a folder holds the finished conversion of a plan, tidied up or not."""
    report = path / REPORT
    if not (path / "config.json").exists() or not report.exists():
        return False
    return bool(json.loads(report.read_text()).get("digest") == digest)


def finished_outcome(path: Path) -> Outcome:
    """What the report of a finished conversion says became of the weights."""
    stated = json.loads((path / REPORT).read_text())["outcome"]
    weights = {How(how): count for how, count in stated["weights"].items()}
    return Outcome(weights, stated["num_changed"], stated["num_values"])


def tidy(path: Path) -> None:
    """Remove what only an unfinished conversion needs, the marker last."""
    for file in path.glob(f"{PARTIAL}*"):
        if file.name != _MARKER:
            file.unlink(missing_ok=True)
    (path / _MARKER).unlink(missing_ok=True)


def check_destination(path: Path, *, resume: bool) -> None:
    """Refuse a folder that a conversion must not touch.

    Args:
        path: the folder.
        resume: whether an unfinished or finished conversion may be there.

    Raises:
        FileExistsError: it is a file, not empty, or holds an unfinished conversion.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(_refuse(path, "is a file", "a folder"))
    is_unfinished = (path / _MARKER).exists()
    if is_unfinished and not resume:
        do = "go on with --resume, or delete it"
        got = "holds an unfinished conversion"
        raise FileExistsError(_refuse(path, got, "a new or empty folder", do))
    is_ours = is_unfinished or (resume and (path / REPORT).exists())
    # A marker that was cut short while it was written is nothing.
    held = [file.name for file in path.iterdir()] if path.exists() else []
    if not is_ours and any(name != PARTIAL + _MARKER for name in held):
        do = "choose another, or delete it first: nothing is overwritten"
        raise FileExistsError(_refuse(path, "is not empty", "a new or empty folder", do))


def check_apart(source: str, path: Path) -> None:
    """Refuse a destination that is the source or lies within it."""
    local = local_path(source)
    if local is None:
        return
    origin, target = local.resolve(), path.resolve()
    if origin.is_file():
        origin = origin.parent
    if target == origin or origin in target.parents:
        raise ValueError(_refuse(path, "lies in the source", "a folder outside of it"))


def ranks() -> tuple[int, int]:
    """Rank and number of the processes that share the work: torchrun's or Slurm's, else 0 of 1."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


def _refuse(path: Path, got: str, needs: str, do: str = "") -> str:
    return refusal("convert_checkpoint", str(path), got, needs, do)
