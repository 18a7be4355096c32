"""A conversion that dies leaves nothing to be mistaken for a result, and resumes to equal bytes."""

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octomoe.checkpoint.convert import convert_checkpoint
from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.source import INDEX, Checkpoint

pytestmark = pytest.mark.plain_memory

REPORT = "octomoe_conversion.json"
MARKER = ".partial-conversion.json"
OPTIONS = {"target": "hf-fp8-block", "shard_bytes": 1_800_000, "verify": False}
NUM_SHARDS = 12
# What a child does: convert, and be killed as the operating system is asked for the n-th event
# of a kind on a file of a name, before it happens. Its error, if any, is left in a file.
SCRIPT = """
import fnmatch, os, signal, time
from octomoe.checkpoint.convert import convert_checkpoint

os.environ.update(job["env"])
left = job["after"]

def die(event, args):
    global left
    if event == job["event"]:
        path = args[1] if event == "os.rename" else args[0]
        if fnmatch.fnmatch(os.path.basename(str(path)), job["name"]):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

def on_progress(done, total):
    time.sleep(job["slow"])
    if job["fail"]:
        raise OSError("the rack is on fire")

if job["event"]:
    import sys
    sys.addaudithook(die)
try:
    convert_checkpoint(job["src"], job["dst"], **job["options"], on_progress=on_progress)
except Exception as error:
    with open(job["error"], "w") as file:
        file.write(f"{type(error).__name__}: {error}")
    os._exit(1)
"""
# Moments of death before anything can load: event, name, how many of them come first.
EARLY = {
    "before the marker": ("os.rename", MARKER, 0),
    "before the first shard": ("os.rename", "model-*", 0),
    "when the first shard is there": ("os.rename", "model-*", 1),
    "between a shard's record and its name": ("os.rename", "model-*", 4),
    "before a shard's record": ("os.rename", ".partial-model-*.json", 6),
    "before the last shard": ("os.rename", "model-*", NUM_SHARDS - 1),
    "before side files": ("os.rename", "tokenizer.json", 0),
    "before the index": ("os.rename", INDEX, 0),
}
# Only config.json is missing, or nothing but tidying up.
LATE = {
    "before the report": ("os.rename", REPORT, 0),
    "before config.json": ("os.rename", "config.json", 0),
    "after config.json": ("os.remove", ".partial-model-*.json", 0),
    "while tidying up": ("os.remove", ".partial-model-*.json", 5),
    "before the marker goes": ("os.remove", MARKER, 0),
}
Start = Callable[..., Any]


@pytest.fixture(scope="module")
def source(make_qwen: Callable[..., Path]) -> Path:
    """About 40 MB in two shards."""
    return make_qwen(layers=2, experts=16, hidden=384, width=512, num_shards=2)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a conversion that nothing interrupted."""
    dst = tmp_path_factory.mktemp("expected") / "dst"
    done = convert_checkpoint(source, dst, **OPTIONS | {"verify": True}, workers=1)
    assert done.verification is not None
    assert done.verification.problems == []
    assert len(done.shards) == NUM_SHARDS
    files = tree(dst)
    assert set(files) == {*done.shards, INDEX, REPORT, "config.json", "tokenizer.json"}
    shutil.rmtree(dst)
    return files


@pytest.fixture
def start(source: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a process that converts to `tmp_path / "dst"`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["octomoe.checkpoint.convert"])
    children = []

    def start(
        *,
        dies: tuple[str, str, int] = ("", "", 0),
        rank: tuple[int, int] | None = None,
        fail: bool = False,
        slow: float = 0.0,
        **options: Any,
    ) -> Any:
        event, name, after = dies
        env = {} if rank is None else {"RANK": str(rank[0]), "WORLD_SIZE": str(rank[1])}
        job = {"src": str(source), "dst": str(tmp_path / "dst"), "options": OPTIONS | options}
        job |= {"event": event, "name": name, "after": after, "env": env, "slow": slow}
        job |= {"error": str(tmp_path / f"error {len(children)}"), "fail": fail}
        child = context.Process(target=exec, args=(SCRIPT, {"job": job}))
        child.start()
        child.error = Path(str(job["error"]))
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.join()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*")}


def finish(child: Any, code: int = 0) -> None:
    child.join(60)
    message = child.error.read_text() if child.error.exists() else ""
    assert child.exitcode == code, message


def check_same(dst: Path, expected: dict[str, bytes]) -> None:
    found = tree(dst)
    assert set(found) == set(expected)
    assert [name for name in found if found[name] != expected[name]] == []


# ---- one process ----


@pytest.mark.parametrize("moment", EARLY)
def test_killed_early_nothing_loads_and_it_resumes(
    start: Start, source: Path, tmp_path: Path, expected: dict[str, bytes], moment: str
):
    dst = tmp_path / "dst"
    finish(start(dies=EARLY[moment]), -9)
    assert not (dst / "config.json").exists()
    assert not (dst / INDEX).exists()
    # Not even with the source's config.json beside the shards.
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        Checkpoint(dst)
    shutil.copy(source / "config.json", dst)
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors.index.json|no .safetensors"):
        Checkpoint(dst)
    (dst / "config.json").unlink()
    before = tree(dst)
    if moment != "before the marker":
        with pytest.raises(FileExistsError, match=r"unfinished conversion.*go on with --resume"):
            convert_checkpoint(source, dst, **OPTIONS)
        for other in ({"target": "ct-block"}, {"shard_bytes": 4_000_000}, {"keep": ["*.0.*"]}):
            with pytest.raises(ValueError, match=r"another source or with other options"):
                convert_checkpoint(source, dst, **OPTIONS | other, resume=True)
        assert tree(dst) == before
    whole = {file: (dst / file).stat().st_mtime_ns for file in before if file.startswith("model-")}
    convert_checkpoint(source, dst, **OPTIONS, resume=True)
    check_same(dst, expected)
    # What was whole was not made again.
    assert {file: (dst / file).stat().st_mtime_ns for file in whole} == whole


@pytest.mark.parametrize("moment", LATE)
def test_killed_late_it_is_complete_or_not_there_and_resumes(
    start: Start, source: Path, tmp_path: Path, expected: dict[str, bytes], moment: str
):
    dst = tmp_path / "dst"
    finish(start(dies=LATE[moment]), -9)
    if (dst / "config.json").exists():
        assert {n: data for n, data in tree(dst).items() if n in expected} == expected
    else:
        with pytest.raises(FileNotFoundError, match=r"has no config.json"):
            Checkpoint(dst)
    with pytest.raises(FileExistsError, match=r"unfinished conversion.*go on with --resume"):
        convert_checkpoint(source, dst, **OPTIONS)
    convert_checkpoint(source, dst, **OPTIONS, resume=True)
    check_same(dst, expected)


def test_killed_from_outside_again_and_again_it_gets_there(
    start: Start, source: Path, tmp_path: Path, expected: dict[str, bytes]
):
    dst = tmp_path / "dst"
    for num_shards in (1, 4, 8):
        child = start(slow=0.01, resume=num_shards > 1)
        deadline = time.monotonic() + 60
        while len(list(dst.glob("model-*"))) < num_shards and time.monotonic() < deadline:
            time.sleep(0.001)
        child.kill()
        finish(child, -9)
        assert not (dst / "config.json").exists()
    done = convert_checkpoint(source, dst, **OPTIONS | {"verify": True}, resume=True)
    assert done.verification is not None
    assert done.verification.is_sound
    check_same(dst, expected)


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_gives_the_same_bytes(
    source: Path, tmp_path: Path, expected: dict[str, bytes], workers: int
):
    convert_checkpoint(source, tmp_path / "dst", **OPTIONS, workers=workers)
    check_same(tmp_path / "dst", expected)


def test_the_order_in_which_experts_are_done_leaves_no_trace(
    make_qwen: Callable[..., Path], tmp_path: Path, monkeypatch
):
    middle = tmp_path / "middle"
    src = make_qwen(hidden=256, width=256)
    convert_checkpoint(src, middle, target="hf-fp8-block", weights_scale="pow2")
    tensors = load_file(middle / "model.safetensors")
    # One expert of another fate than the rest.
    tensors["model.layers.0.mlp.experts.0.gate_proj.weight_scale_inv"] *= 1.1
    save_file(tensors, middle / "model.safetensors")
    options = {"target": "ct-tensor", "allow_requantize": True, "verify": False}
    convert_checkpoint(middle, tmp_path / "in order", **options, workers=1)
    plain = Reader.expert

    def slow_first(self: Reader, layer: Any, expert: int) -> Any:
        time.sleep(0.2 * (expert == 0))
        return plain(self, layer, expert)

    monkeypatch.setattr(Reader, "expert", slow_first)
    convert_checkpoint(middle, tmp_path / "out of order", **options, workers=2)
    check_same(tmp_path / "out of order", tree(tmp_path / "in order"))


def test_resuming_what_is_finished_does_nothing(source: Path, tmp_path: Path):
    dst = tmp_path / "dst"
    options = OPTIONS | {"shard_bytes": 10_000_000}
    first = convert_checkpoint(source, dst, **options)
    before = {file: file.stat().st_mtime_ns for file in [dst, *dst.iterdir()]}
    second = convert_checkpoint(source, dst, **options, resume=True)
    assert (first.was_complete, second.was_complete) == (False, True)
    assert second.outcome == first.outcome
    assert {file: file.stat().st_mtime_ns for file in [dst, *dst.iterdir()]} == before


def test_resuming_is_refused_when_the_source_has_changed_since(
    make_qwen: Callable[..., Path], tmp_path: Path
):
    src, dst = make_qwen(layers=2, num_shards=2), tmp_path / "dst"

    def stop(done: int, total: int) -> None:
        raise OSError("stop")

    options = {"target": "ct-channel", "shard_bytes": 10_000}
    with pytest.raises(OSError, match="stop"):
        convert_checkpoint(src, dst, **options, on_progress=stop)
    shard = next(iter(src.glob("*.safetensors")))
    tensors = {name: tensor * 2 for name, tensor in load_file(shard).items()}
    # The same header and size: only the time of the change tells.
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"of a source whose files have changed since"):
        convert_checkpoint(src, dst, **options, resume=True)
    shutil.rmtree(dst)
    convert_checkpoint(src, dst, **options)


def test_resuming_with_another_record_of_the_family_is_refused(
    make_qwen: Callable[..., Path], family_file: Callable[..., Path], tmp_path: Path
):
    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        for layer in range(2):
            module = f"model.blocks.{layer}.moe"
            tensors[f"{module}.w13"] = torch.randn(4, 96, 64)
            tensors[f"{module}.w2"] = torch.randn(4, 64, 48)

    src, dst = make_qwen(fuse, config={"model_type": "my_moe"}), tmp_path / "dst"

    def stop(done: int, total: int) -> None:
        raise OSError("stop")

    with pytest.raises(OSError, match="stop"):
        convert_checkpoint(
            src, dst, target="ct-channel", family_file=family_file(), on_progress=stop
        )
    other = family_file('order = "up_first"', 'order = "gate_first"')
    with pytest.raises(ValueError, match=r"another source or with other options"):
        convert_checkpoint(src, dst, target="ct-channel", family_file=other, resume=True)
    convert_checkpoint(src, dst, target="ct-channel", family_file=family_file(), resume=True)


# ---- several processes ----


@pytest.mark.parametrize("late", [0, 1])
def test_two_ranks_give_the_bytes_of_one(
    start: Start, tmp_path: Path, expected: dict[str, bytes], late: int
):
    first = start(rank=(1 - late, 2))
    time.sleep(0.3)
    second = start(rank=(late, 2))
    finish(first)
    finish(second)
    check_same(tmp_path / "dst", expected)


def test_a_rank_without_work_that_comes_when_all_is_done_is_content(start: Start, tmp_path: Path):
    finish(start(rank=(0, 2), shard_bytes=10**9))
    before = tree(tmp_path / "dst")
    finish(start(rank=(1, 2), shard_bytes=10**9))
    assert tree(tmp_path / "dst") == before


def test_a_rank_that_fails_is_named_and_all_ranks_resume(
    start: Start, source: Path, tmp_path: Path, expected: dict[str, bytes]
):
    first, second = start(rank=(0, 2)), start(rank=(1, 2), fail=True)
    finish(second, 1)
    assert second.error.read_text() == "OSError: the rack is on fire"
    finish(first, 1)
    message = "RuntimeError: convert_checkpoint: rank 1 failed: the rack is on fire; repair that"
    assert first.error.read_text().startswith(message)
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        Checkpoint(tmp_path / "dst")
    # Rank 0, whose shards are all done, does not take the old failure for a new one.
    first = start(rank=(0, 2), resume=True)
    time.sleep(1.0)
    second = start(rank=(1, 2), resume=True)
    finish(first)
    finish(second)
    check_same(tmp_path / "dst", expected)


def test_one_process_resumes_what_two_began(
    start: Start, source: Path, tmp_path: Path, expected: dict[str, bytes]
):
    first, second = start(rank=(0, 2)), start(rank=(1, 2), fail=True)
    finish(second, 1)
    finish(first, 1)
    convert_checkpoint(source, tmp_path / "dst", **OPTIONS, resume=True)
    check_same(tmp_path / "dst", expected)


def test_a_rank_with_other_options_is_refused(start: Start, tmp_path: Path):
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / MARKER).write_text(json.dumps({"digest": "other"}))
    child = start(rank=(1, 2))
    finish(child, 1)
    assert "was prepared by rank 0 for other options or another source" in child.error.read_text()
