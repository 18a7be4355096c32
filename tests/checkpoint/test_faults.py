"""A conversion that cannot succeed says why, and leaves nothing that could be loaded."""

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octomoe.checkpoint.convert import Conversion, convert_checkpoint
from octomoe.checkpoint.source import Checkpoint

EXPERT = "model.layers.1.mlp.experts.2"
INPUT_SCALES = {layer: dict.fromkeys(("gate", "up", "down"), [0.1] * 4) for layer in range(2)}
# Every way to make numbers: options of a conversion.
WAYS: dict[str, dict[str, Any]] = {
    "channel": {"target": "ct-channel"},
    "block": {"target": "hf-fp8-block", "weights_scale": "pow2"},
    "tensor": {"target": "ct-tensor"},
    "static": {"target": "modelopt-fp8", "input_scales": INPUT_SCALES},
    "mx": {"target": "ct-mxfp8"},
    "fused": {"target": "octomoe"},
    "neuron": {"target": "neuron"},
    "shared": {"target": "neuron", "expert_scale": "shared"},
    "searched": {"target": "ct-channel", "search": "mse"},
}
Make = Callable[..., Path]


def put(name: str, value: float, dtype: torch.dtype | None = None) -> Callable[[Any], None]:
    """A change that puts a number into one tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = value
        tensors[name] = tensors[name].to(dtype or tensors[name].dtype)

    return change


def check_nothing_loads(dst: Path) -> None:
    """Whatever is in the folder, no reader takes it for a checkpoint."""
    assert not (dst / "config.json").exists()
    assert not list(dst.glob("*.index.json"))
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        Checkpoint(dst)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def convert(src: Path, dst: Path, **options: Any) -> Conversion:
    return convert_checkpoint(src, dst, **{"target": "ct-channel", **options})


# ---- sources ----


def test_a_truncated_shard_is_refused_before_anything_is_written(make_qwen: Make, tmp_path: Path):
    src = make_qwen(num_shards=2)
    file = src / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors has .*was it cut shor"):
        convert(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_shard_that_is_truncated_meanwhile_stops_the_conversion(make_qwen: Make, tmp_path: Path):
    src = make_qwen()

    def cut(done: int, total: int) -> None:
        os.truncate(src / "model.safetensors", 5000)

    with pytest.raises(OSError, match=r"model.safetensors ended at byte .*: it was cut short whil"):
        convert(src, tmp_path / "dst", on_progress=cut, workers=1)
    check_nothing_loads(tmp_path / "dst")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("role", ["gate", "up", "down"])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_no_number_is_named(
    make_qwen: Make, tmp_path: Path, way: str, role: str, value: float
):
    src = make_qwen(put(f"{EXPERT}.{role}_proj.weight", value))
    # Where gate and up share a scale, either may be named.
    pair = "(gate|up)" if role != "down" else "down"
    message = f"the {pair} projection of expert 2 of model.layers.1.mlp.experts holds NaN or Inf"
    with pytest.raises(ValueError, match=message):
        convert(src, tmp_path / "dst", **WAYS[way])
    check_nothing_loads(tmp_path / "dst")


def test_a_linear_weight_that_is_no_number_is_named(make_qwen: Make, tmp_path: Path):
    name = "model.layers.1.self_attn.q_proj.weight"
    src = make_qwen(put(name, float("nan")), hidden=128)
    with pytest.raises(ValueError, match=f"{name} holds NaN or Inf, but needs finite weights"):
        convert(src, tmp_path / "dst", all_linears=True)
    check_nothing_loads(tmp_path / "dst")


@pytest.mark.parametrize("target", ["ct-block", "neuron", "ct-mxfp8"])
@pytest.mark.parametrize("what", ["weight", "scale of NaN", "scale of Inf"])
def test_a_quantised_source_with_what_is_no_number_is_refused(
    make_qwen: Make, tmp_path: Path, target: str, what: str
):
    middle = tmp_path / "middle"
    convert(make_qwen(), middle, target="hf-fp8-block", weights_scale="pow2", verify=False)
    tensors = load_file(middle / "model.safetensors")
    if what == "weight":
        tensors[f"{EXPERT}.up_proj.weight"].view(torch.uint8)[3, 5] = 0xFF
    else:
        scale = float("nan") if what.endswith("NaN") else float("inf")
        tensors[f"{EXPERT}.up_proj.weight_scale_inv"].fill_(scale)
    save_file(tensors, middle / "model.safetensors")
    message = "the up projection of expert 2 of model.layers.1.mlp.experts holds NaN or Inf"
    with pytest.raises(ValueError, match=message):
        convert(middle, tmp_path / "dst", target=target, allow_requantize=True)
    check_nothing_loads(tmp_path / "dst")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float64])
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_dtype_that_is_no_weights_is_refused_before_anything_is_written(
    make_qwen: Make, handmade_checkpoint: Make, tmp_path: Path, dtype: torch.dtype, is_fused: bool
):
    if is_fused:
        src = shutil.copytree(handmade_checkpoint("dbrx"), tmp_path / "src")
        tensors = load_file(src / "model.safetensors")
        name = next(name for name in tensors if name.endswith("mlp.w2"))
        save_file(tensors | {name: tensors[name].to(dtype)}, src / "model.safetensors")
    else:
        name = f"{EXPERT}.up_proj.weight"
        src = make_qwen(put(name, 1.0, dtype))
    message = f"has tensor '{name}' of dtype .*, but needs BF16, F16, F32, or FP8 with a scale"
    with pytest.raises(ValueError, match=message):
        convert(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_missing_expert_tensor_and_an_unknown_family_are_named(make_qwen: Make, tmp_path: Path):
    name = f"{EXPERT}.down_proj.weight"
    src = make_qwen(lambda tensors: tensors.pop(name))
    message = f"model.layers.1.mlp.experts lacks 1 of 12 tensors: {name}, .*is a shard missing"
    with pytest.raises(ValueError, match=message):
        convert(src, tmp_path / "dst")
    src = make_qwen(config={"model_type": "never_heard_of"})
    with pytest.raises(ValueError, match=r"never_heard_of.*--family-file"):
        convert(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


# ---- destinations ----


def test_a_folder_that_is_not_empty_stays_as_it_is(make_qwen: Make, tmp_path: Path):
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "thesis.txt").write_text("years of work")
    src = make_qwen()
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"dst is not empty.*nothing is overwritten"):
            convert(src, dst, resume=resume)
    assert tree(dst) == {"thesis.txt": b"years of work"}


def test_a_finished_conversion_is_not_overwritten(make_qwen: Make, tmp_path: Path):
    src, dst = make_qwen(), tmp_path / "dst"
    convert(src, dst)
    before = tree(dst)
    for options, message in (
        ({}, "is not empty"),
        ({"resume": True, "target": "ct-tensor"}, "finished conversion of another source or with"),
    ):
        with pytest.raises(FileExistsError, match=message):
            convert(src, dst, **options)
    assert tree(dst) == before


def test_a_file_is_no_destination(make_qwen: Make, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    src = make_qwen()
    with pytest.raises(FileExistsError, match="file is a file, but needs a folder"):
        convert(src, tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="file"):
        convert(src, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_source_is_no_destination(make_qwen: Make, tmp_path: Path):
    src = make_qwen()
    before = tree(src)
    (tmp_path / "link").symlink_to(src)
    for source in (src, src / "model.safetensors", tmp_path / "link", f"file://{src}"):
        for dst in (src, src / "below", src / "a" / ".." / "b", tmp_path / "link" / "below"):
            with pytest.raises(ValueError, match="lies in the source, but needs a folder outside"):
                convert(source, dst)
    assert tree(src) == before


@pytest.mark.parametrize("what", ["mkdir", "open"])
def test_a_folder_that_must_not_be_written(make_qwen: Make, tmp_path: Path, monkeypatch, what: str):
    src, dst = make_qwen(), tmp_path / "dst"
    plain = getattr(os, what)

    def refuse(path: Any, *args: Any) -> Any:
        if Path(path).is_relative_to(dst):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path, *args)

    monkeypatch.setattr(os, what, refuse)
    with pytest.raises(PermissionError, match=r"Permission denied.*dst"):
        convert(src, dst)
    check_nothing_loads(dst)


@pytest.mark.parametrize("num_good", [0, 2])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "replace"])
def test_a_full_disk_leaves_nothing_that_loads(
    make_qwen: Make, tmp_path: Path, monkeypatch, call: str, num_good: int
):
    plain, calls = getattr(os, call), []

    def fill(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > num_good:
            raise OSError(errno.ENOSPC, f"No space left at call {len(calls)}")
        return plain(*args)

    monkeypatch.setattr(os, call, fill)
    src, dst = make_qwen(), tmp_path / "dst"
    # The first error is told. What is reserved at once is known, and told too.
    message = f"No space left at call {num_good + 1}"
    if call == "posix_fallocate":
        message += r" for .*model-0000.-of-.*safetensors of [\d,]+ bytes"
    with pytest.raises(OSError, match=message):
        convert(src, dst, shard_bytes=20_000, workers=1)
    check_nothing_loads(dst)
    # With space again, it goes on.
    monkeypatch.setattr(os, call, plain)
    assert convert(src, dst, shard_bytes=20_000, resume=True).verification.is_sound


def test_a_disk_that_is_too_small_is_noticed_before_a_tensor_is_written(
    make_qwen: Make, tmp_path: Path, monkeypatch
):
    src, dst = make_qwen(), tmp_path / "dst"
    needed = convert(src, dst, dry_run=True).written_bytes
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = f"dst has {needed - 1:,} bytes free, but needs {needed:,} bytes; free some"
    with pytest.raises(OSError, match=message):
        convert(src, dst)
    check_nothing_loads(dst)
    assert tree(dst) == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert convert(src, dst).verification.is_sound


# ---- options ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "gguf"}, "target is 'gguf', but needs one of hf-fp8-block, hf-fp8-tensor"),
        ({"weights": "block128"}, "weights is 'block128', but needs none for ct-channel"),
        ({"weights_scale": "log"}, "weights_scale is 'log', but needs one of auto, exact, pow2"),
        ({"search": "all"}, "search is 'all', but needs none or mse"),
        ({"expert_scale": "mean"}, "expert_scale is 'mean', but needs one of auto, wise, share"),
        ({"shard_bytes": 0}, "shard_size is 0, but needs a positive number of bytes"),
        ({"pad_intermediate": 64}, "pad_intermediate is given for ct-channel, but needs 1; only"),
        ({"target": "octomoe", "pad_intermediate": 0}, "pad_intermediate is 0, but needs a posit"),
        ({"target": "octomoe", "weights": "int3"}, "int3"),
        ({"target": "ct-mxfp8", "weights_scale": "exact"}, "weights_scale is exact, but needs po"),
        ({"target": "mxfp8", "weights_scale": "exact"}, "weights_scale is exact, but needs pow2"),
        ({"target": "modelopt-fp8"}, "input_scales are missing for modelopt-fp8, but needs stat"),
        ({"input_scales": INPUT_SCALES}, "input_scales are given, but needs none: ct-channel quan"),
        (
            {"target": "ct-tensor", "input_scales": INPUT_SCALES, "all_linears": True},
            "input_scales are given with all_linears, but needs experts only",
        ),
        ({"workers": 0}, "workers is 0, but needs at least one"),
        ({"device": "abacus"}, "device is 'abacus', but needs cpu, cuda or cuda:0"),
    ],
)  # fmt: skip
def test_an_option_that_does_not_fit_is_refused(
    make_qwen: Make, tmp_path: Path, options: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        convert(make_qwen(), tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("role", "scales", "message"),
    [
        ("down", [0.1] * 3, "of layer 1, down are 3 numbers, but needs 4 positive finite ones"),
        ("down", [0.1] * 5, "of layer 1, down are 5 numbers, but needs 4 positive finite ones"),
        # The last two are no numbers in float32, in which they are stored.
        *(
            ("up", [0.1, scale, 0.1, 0.1], "of layer 1, up .* needs 4 positive finite ones")
            for scale in (0.0, -1.0, float("nan"), float("inf"), 1e-60, 1e60)
        ),
        ("down", None, "lack down of layer 1, but needs every projection"),
        (None, None, "lack layer 1, but needs every layer"),
        ("sideways", [0.1] * 4, "of layer 1 are for 'sideways', but needs gate, up, down"),
    ],
)
def test_input_scales_that_do_not_fit_are_refused(
    make_qwen: Make, tmp_path: Path, role: str | None, scales: list[float] | None, message: str
):
    stated: dict[int, Any] = {0: INPUT_SCALES[0], 1: dict(INPUT_SCALES[1])}
    if role is None:
        del stated[1]
    elif scales is None:
        del stated[1][role]
    else:
        stated[1][role] = scales
    src = make_qwen()
    for target in ("modelopt-fp8", "ct-tensor"):
        with pytest.raises(ValueError, match=message):
            convert(src, tmp_path / "dst", target=target, input_scales=stated)
        assert not (tmp_path / "dst").exists()


# ---- what is odd but right ----


@pytest.mark.parametrize("way", WAYS)
def test_a_dry_run_writes_nothing_at_all(make_qwen: Make, tmp_path: Path, way: str):
    src, before = make_qwen(), tree(tmp_path)
    planned = convert(src, tmp_path / "dst", dry_run=True, **WAYS[way])
    assert (tree(tmp_path), (tmp_path / "dst").exists()) == (before, False)
    done = convert(src, tmp_path / "dst", **WAYS[way])
    assert (planned.shards, planned.ignored) == (done.shards, done.ignored)
    assert (planned.read_bytes, planned.written_bytes) == (done.read_bytes, done.written_bytes)
    stored = load_file(tmp_path / "dst" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == planned.written_bytes


@pytest.mark.parametrize("value", [0.0, -0.0])
@pytest.mark.parametrize("way", WAYS)
def test_an_expert_of_zeros_converts(make_qwen: Make, tmp_path: Path, way: str, value: float):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for role in ("gate", "up", "down"):
            tensors[f"{EXPERT}.{role}_proj.weight"].fill_(value)

    found = convert(make_qwen(change), tmp_path / "dst", **WAYS[way]).verification
    assert found.problems == []
    assert all(q.sqnr_db[2] == float("inf") for q in found.quality if q.layer == 1)


@pytest.mark.parametrize("outlier", [1e4, -3e38, 1e-38])
@pytest.mark.parametrize("way", WAYS)
def test_an_outlier_hurts_only_those_who_share_its_scale(
    make_qwen: Make, tmp_path: Path, way: str, outlier: float
):
    src = make_qwen(put(f"{EXPERT}.up_proj.weight", outlier))
    found = convert(src, tmp_path / "dst", **WAYS[way]).verification
    others = {"tensor": {"2, gate"}, "static": {"2, gate"}, "shared": {"0, up", "1, up", "3, up"}}
    hurt = {f"model.layers.1.mlp.experts, expert {each}" for each in others.get(way, ())}
    assert {problem.partition(": SQNR")[0] for problem in found.problems} <= hurt
    assert bool(found.problems) == bool(hurt and abs(outlier) > 1)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22])
@pytest.mark.parametrize("way", ["channel", "block", "neuron"])
def test_quality_is_measured_at_any_magnitude(
    make_qwen: Make, tmp_path: Path, way: str, size: float
):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{EXPERT}.up_proj.weight"
        tensors[name] = (tensors[name].double() / 0.08 * size).to(torch.bfloat16)

    found = convert(make_qwen(change), tmp_path / "dst", **WAYS[way]).verification
    assert found.problems == []
    assert all(30 < sqnr < 34 for quality in found.quality for sqnr in quality.sqnr_db)


def test_nothing_is_unpickled(make_qwen: Make, tmp_path: Path, monkeypatch):
    src = make_qwen()
    (src / "pytorch_model.bin").write_bytes(b"no pickle")
    (src / "training_args.bin").write_bytes(b"no pickle")

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a pickle is loaded")

    for owner, name in (
        (pickle, "Unpickler"),
        (pickle, "load"),
        (pickle, "loads"),
        (torch, "load"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    assert convert(src, tmp_path / "dst").verification.is_sound
    # Nor carried along.
    assert not list((tmp_path / "dst").glob("*.bin"))
    assert (tmp_path / "dst" / "tokenizer.json").exists()
