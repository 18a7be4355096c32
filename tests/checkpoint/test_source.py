"""A checkpoint is opened by its names and headers alone; what is unsafe or unsound is refused."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from octomoe.checkpoint import direct
from octomoe.checkpoint.source import INDEX, Checkpoint

TENSORS = {
    "stacked": torch.arange(6 * 4 * 5).reshape(6, 4, 5).to(torch.bfloat16),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "fp8": torch.tensor([[1.0, -2.0], [0.5, 240.0]]).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "none": torch.zeros(0, 3),
    "none within": torch.zeros(3, 0),
    # Longer than the stage of direct reads, and no whole number of pages.
    "long": torch.arange((5 << 20) // 4 + 77, dtype=torch.int32),
}
SHARDS = {
    "model-00001-of-00002.safetensors": ["stacked", "bytes", "none", "none within"],
    "model-00002-of-00002.safetensors": ["fp8", "scalar", "long"],
}
WEIGHT_MAP = {name: file for file, names in SHARDS.items() for name in names}


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file."""
    path = tmp_path / "single"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "any"}')
    save_file(TENSORS, path / "model.safetensors")
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and an index."""
    path = tmp_path / "sharded"
    path.mkdir()
    (path / "config.json").write_text("{}")
    for file, names in SHARDS.items():
        save_file({name: TENSORS[name] for name in names}, path / file)
    write_index(path, WEIGHT_MAP)
    return path


@pytest.fixture(params=["cached", "direct", "buffered"])
def way_to_read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way that bytes come from a local file."""
    if request.param == "direct":
        monkeypatch.setattr(direct.ReadFile, "_read_cached", lambda *_: 0)
    elif request.param == "buffered":
        monkeypatch.setattr(direct, "_open_direct", lambda *_: None)


def write_index(path: Path, weight_map: Any) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check_all(checkpoint: Checkpoint, files: list[Path]) -> None:
    """Everything reads as safetensors reads it."""
    seen = set()
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                theirs, ours = file.get_tensor(name), checkpoint.read(name)
                assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
                assert raw(ours).equal(raw(theirs)), name
                pieces = list(checkpoint.chunks(name, 1000))
                assert [at for at, _ in pieces] == list(range(0, theirs.nbytes, 1000))
                assert torch.cat([raw(torch.zeros(0)), *(p for _, p in pieces)]).equal(raw(theirs))
                seen.add(name)
    assert seen == set(checkpoint.tensors)


# ---- what opens ----


def test_a_single_file(folder: Path, way_to_read):
    checkpoint = Checkpoint(folder)
    assert checkpoint.files == ["model.safetensors"]
    assert checkpoint.config == {"model_type": "any"}
    check_all(checkpoint, [folder / "model.safetensors"])


def test_shards_with_an_index(sharded: Path, way_to_read):
    checkpoint = Checkpoint(str(sharded))
    assert checkpoint.files == sorted(SHARDS)
    assert {name: entry.file for name, entry in checkpoint.tensors.items()} == WEIGHT_MAP
    check_all(checkpoint, [sharded / file for file in SHARDS])


def test_the_path_of_one_file_means_that_file(sharded: Path):
    path = sharded / "model-00002-of-00002.safetensors"
    checkpoint = Checkpoint(path)
    assert set(checkpoint.tensors) == {"fp8", "scalar", "long"}
    check_all(checkpoint, [path])


@pytest.mark.parametrize("name", ["weights", "model-00001-of-00001", "a-of-b"])
def test_one_file_of_any_name_needs_no_index(folder: Path, name: str):
    (folder / "model.safetensors").rename(folder / f"{name}.safetensors")
    (folder / "._model.safetensors").write_bytes(b"what some systems leave beside a file")
    assert Checkpoint(folder).files == [f"{name}.safetensors"]


@pytest.mark.parametrize("name", ["model-00001-of-00002", "model-1-of-10", "x-00002-of-00012"])
def test_one_file_of_several_is_no_checkpoint(folder: Path, name: str):
    path = (folder / "model.safetensors").rename(folder / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=f"holds 1 .safetensors files, e.g. {name}"):
        Checkpoint(folder)
    # Unless it is meant.
    assert set(Checkpoint(path).tensors) == set(TENSORS)


def test_an_unfinished_file_is_no_checkpoint(folder: Path):
    (folder / "model.safetensors").rename(folder / ".partial-model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no .safetensors file"):
        Checkpoint(folder)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_url_reads_as_the_folder_does(sharded: Path, scheme: str, tmp_path: Path):
    url = f"file://{sharded}"
    if scheme == "memory":
        url = f"memory://{tmp_path.name}/model"
        memory = fsspec.filesystem("memory")
        memory.pipe({f"{url}/{f.name}": f.read_bytes() for f in sharded.iterdir()})
        memory.pipe(f"{url}/sub/other.safetensors", b"")
    checkpoint = Checkpoint(url)
    assert sorted(checkpoint.store.names()) == sorted(["config.json", INDEX, *SHARDS])
    check_all(checkpoint, [sharded / file for file in SHARDS])
    assert checkpoint.read_file("config.json") == b"{}"


def test_a_url_that_leads_nowhere(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="none"):
        Checkpoint(f"memory://{tmp_path.name}/none")


def test_links_into_a_blob_store_are_files(sharded: Path, tmp_path: Path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    for path in (str(snapshot), f"file://{snapshot}"):
        check_all(Checkpoint(path), [snapshot / file for file in SHARDS])


def test_entries_and_rows_of_a_stacked_tensor(folder: Path, way_to_read):
    checkpoint, whole = Checkpoint(folder), TENSORS["stacked"]
    for index in range(6):
        assert checkpoint.read("stacked", index).equal(whole[index])
    assert checkpoint.read("bytes", 3).equal(torch.tensor(3, dtype=torch.uint8))
    assert checkpoint.read("none within", 2).shape == (0,)
    for parts in (1, 2, 3, 6):
        step = 6 // parts
        for index in range(parts):
            rows = checkpoint.read_rows("stacked", index, parts)
            assert rows.equal(whole[index * step : (index + 1) * step])


def test_what_is_read_is_the_callers_own_memory(folder: Path):
    checkpoint = Checkpoint(folder)
    first = checkpoint.read("stacked")
    first.zero_()
    assert checkpoint.read("stacked").equal(TENSORS["stacked"])


# ---- an index that lies ----


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors", "sub/model.safetensors", "/etc/x.safetensors", "..\\x.safetensors",
        "x\0.safetensors", "..", ".", "", "~/x.safetensors", "model.bin", "model.safetensors/",
        None, 3, ["model.safetensors"], {"model": 1},
    ],
)  # fmt: skip
def test_an_index_names_files_of_its_folder_only(sharded: Path, file: Any):
    save_file(TENSORS, sharded.parent / "model.safetensors")
    write_index(sharded, WEIGHT_MAP | {"long": file})
    needs = "but needs .safetensors files in the same folder"
    with pytest.raises(ValueError, match=re.escape(f"that names {file!r}, {needs}")):
        Checkpoint(sharded)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "3"])
def test_an_index_without_a_weight_map(sharded: Path, index: str):
    (sharded / INDEX).write_text(index)
    with pytest.raises(ValueError, match=rf"has an {INDEX} without weight_map"):
        Checkpoint(sharded)


@pytest.mark.parametrize("index", ["", "{", "\xff\xfe", "[" * 100_000])
def test_an_index_that_is_no_json(sharded: Path, index: str):
    (sharded / INDEX).write_text(index, "latin-1")
    with pytest.raises(ValueError, match=rf"has a {INDEX} that is no JSON"):
        Checkpoint(sharded)


def test_a_missing_shard_is_named(sharded: Path):
    (sharded / "model-00001-of-00002.safetensors").unlink()
    message = "lacks 1 of 2 shards: model-00001-of-00002.safetensors, but needs all; download it"
    with pytest.raises(FileNotFoundError, match=message):
        Checkpoint(sharded)


def test_a_dangling_link_is_a_missing_shard(sharded: Path):
    path = sharded / "model-00001-of-00002.safetensors"
    path.unlink()
    path.symlink_to(sharded / "nowhere")
    with pytest.raises(FileNotFoundError, match="lacks 1 of 2 shards"):
        Checkpoint(sharded)


def test_a_tensor_that_its_shard_lacks(sharded: Path):
    write_index(sharded, WEIGHT_MAP | {"more": "model-00001-of-00002.safetensors"})
    message = "places 'more' in model-00001-of-00002.safetensors, which does not hold it"
    with pytest.raises(ValueError, match=message):
        Checkpoint(sharded)


def test_a_tensor_that_lies_in_another_shard(sharded: Path):
    write_index(sharded, WEIGHT_MAP | {"long": "model-00001-of-00002.safetensors"})
    with pytest.raises(
        ValueError, match=r"places 'long' in model-00001-of-00002.safetensors, which"
    ):
        Checkpoint(sharded)


def test_a_tensor_that_the_index_lacks(sharded: Path):
    write_index(sharded, {name: f for name, f in WEIGHT_MAP.items() if name != "fp8"})
    message = "holds 1 tensors that the index does not list, e.g. 'fp8'.*remake the index"
    with pytest.raises(ValueError, match=message):
        Checkpoint(sharded)


def test_a_tensor_in_two_shards(sharded: Path):
    both = {name: TENSORS[name] for name in ("fp8", "scalar", "long", "bytes")}
    save_file(both, sharded / "model-00002-of-00002.safetensors")
    message = "holds tensor 'bytes' twice, in model-00001-of-00002.safetensors and model-00002-"
    with pytest.raises(ValueError, match=message):
        Checkpoint(sharded)


def test_several_files_without_an_index(sharded: Path):
    (sharded / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds 2 .safetensors files, .* and no {INDEX}"):
        Checkpoint(sharded)


# ---- folders that are no checkpoint ----


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "m.pth", "m.ckpt", "m.pkl"])
def test_a_pickle_is_refused_and_never_opened(folder: Path, name: str, tmp_path: Path):
    (folder / "model.safetensors").unlink()
    planted = pickle.dumps(Planted(tmp_path / "created"))
    (folder / name).write_bytes(planted)
    message = f"holds {name}, but needs .safetensors files; pickle files can run code and are not"
    for path in (str(folder), f"file://{folder}"):
        with pytest.raises(FileNotFoundError, match=message):
            Checkpoint(path)
    assert not (tmp_path / "created").exists()
    # The plant works.
    pickle.loads(planted)
    assert (tmp_path / "created").exists()


def test_a_pickle_of_another_name_is_no_safetensors_file(folder: Path, tmp_path: Path):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Planted(tmp_path / "created")))
    with pytest.raises(ValueError, match=r"model.safetensors states a header of .* bytes"):
        Checkpoint(folder)
    assert not (tmp_path / "created").exists()


def test_a_folder_without_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no .safetensors file, but needs"):
        Checkpoint(folder)


def test_a_path_that_is_no_folder(folder: Path):
    with pytest.raises(FileNotFoundError, match="none does not exist, but needs a checkpoint"):
        Checkpoint(folder / "none")
    with pytest.raises(
        FileNotFoundError, match=r"config.json is no folder, but needs a checkpoint"
    ):
        Checkpoint(folder / "config.json")


def test_a_missing_config(folder: Path):
    (folder / "config.json").unlink()
    message = "has no config.json, but needs a folder with config.json and .safetensors files"
    for path in (str(folder), str(folder / "model.safetensors"), f"file://{folder}"):
        with pytest.raises(FileNotFoundError, match=message):
            Checkpoint(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "has a config.json that is no JSON"),
        ('{"a": 1', "has a config.json that is no JSON"),
        ("[" * 100_000, "has a config.json that is no JSON"),
        ("[1]", "has a config.json that is no object"),
        ("null", "has a config.json that is no object"),
    ],
)
def test_a_broken_config(folder: Path, config: str, message: str):
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        Checkpoint(folder)


def test_a_config_of_a_gigabyte_is_not_read(folder: Path):
    with open(folder / "config.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match=r"has a config.json of 1073741824 bytes"):
        Checkpoint(folder)


# ---- files that change while they are read ----


@pytest.mark.parametrize("keep", [0, 1000, 4096, 1 << 20])
def test_a_file_cut_short_after_opening_is_an_error_and_no_crash(
    folder: Path, keep: int, way_to_read
):
    checkpoint = Checkpoint(folder)
    os.truncate(folder / "model.safetensors", keep)
    for read in readers(checkpoint):
        with pytest.raises(OSError, match=r"model.safetensors ended at byte .*: it was cut short"):
            read()


def test_a_remote_file_cut_short_after_opening_is_an_error(folder: Path, tmp_path: Path):
    url = f"memory://{tmp_path.name}/model"
    fsspec.filesystem("memory").pipe({f"{url}/{f.name}": f.read_bytes() for f in folder.iterdir()})
    checkpoint = Checkpoint(url)
    fsspec.filesystem("memory").pipe(f"{url}/model.safetensors", bytes(1000))
    for read in readers(checkpoint):
        with pytest.raises(OSError, match=r"model.safetensors: .* bytes came of"):
            read()


def readers(checkpoint: Checkpoint) -> list[Callable[[], Any]]:
    last = max(checkpoint.tensors.values(), key=lambda entry: entry.start).name
    return [
        lambda: checkpoint.read("long"),
        lambda: list(checkpoint.chunks("long")),
        lambda: checkpoint.read(last),
    ]


def test_a_tensor_that_is_not_there(folder: Path):
    with pytest.raises(KeyError, match="missing"):
        Checkpoint(folder).read("missing")


def test_a_dtype_that_torch_lacks_is_copied_but_not_computed_with(folder: Path):
    path = folder / "model.safetensors"
    header = b'{"a":{"dtype":"F8_E5M2FNUZ","shape":[2],"data_offsets":[0,2]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x01\x02")
    checkpoint = Checkpoint(folder)
    assert [bytes(data.tolist()) for _, data in checkpoint.chunks("a")] == [b"\x01\x02"]
    with pytest.raises(ValueError, match=r"'a' of dtype F8_E5M2FNUZ.*can be copied, but not comp"):
        checkpoint.read("a")
