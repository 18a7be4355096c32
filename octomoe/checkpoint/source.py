"""A checkpoint to read: its config, and its tensors by name, without loading them.

Every header is read and checked when the checkpoint is opened, before any data. Data is read with
positioned reads into fresh memory: nothing is mapped, so that a file cut short while it is read is
an error and no crash, and memory holds what is in work. Pickle files are never opened.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from octomoe.checkpoint.direct import ReadFile, buffer_of
from octomoe.checkpoint.header import TORCH_DTYPES, Entry, header_size, num_bytes, parse_header
from octomoe.errors import refusal

INDEX: Final = "model.safetensors.index.json"
_MAX_JSON_BYTES: Final = 512 << 20
# The name of one file of several.
_SHARD: Final = re.compile(r"-\d+-of-0*([2-9]|1\d+)[^/]*\.safetensors$")
_STAMP_KEYS: Final = (
    "ETag",
    "etag",
    "blob_id",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
)
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Store(Protocol):
    """A folder of files that can be read at any offset."""

    def names(self) -> list[str]:
        """Names of the files directly in the folder."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes `start` to `stop` of a file, all of them, uint8."""

    def stamp(self, name: str) -> str:
        """What changes when a file does: its size, and the time or tag of its last change."""


class Checkpoint:
    """A checkpoint folder, opened: ``config``, ``tensors`` (name -> `Entry`), and reads.

    Args:
        path: a folder, a ``.safetensors`` file in one, or any URL that fsspec reads, e.g.
            ``hf://owner/model`` or ``s3://bucket/model``.

    Attributes:
        path: as given.
        store: the folder.
        config: config.json.
        files: names of the safetensors files, in order.
        tensors: every tensor of every file.

    Raises:
        FileNotFoundError: the folder, config.json or a shard is missing.
        ValueError: the index or a file is not sound, or names files outside the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.store, only = _open_store(self.path)
        names = self.store.names()
        if "config.json" not in names:
            needs = "a folder with config.json and .safetensors files"
            raise FileNotFoundError(_refuse(self.path, "has no config.json", needs))
        config = self.json("config.json")
        if not isinstance(config, dict):
            raise ValueError(_refuse(self.path, "has a config.json that is no object", "one"))
        self.config: dict[str, Any] = config
        index = self.json(INDEX) if INDEX in names and only is None else None
        self.files = [only] if only else _shards(self.path, names, index)
        self.tensors: dict[str, Entry] = {}
        for file in self.files:
            for name, entry in self._header(file).items():
                if name in self.tensors:
                    both = f"{self.tensors[name].file} and {file}"
                    got = f"holds tensor {name!r} twice, in {both}"
                    raise ValueError(_refuse(self.path, got, "each tensor once"))
                self.tensors[name] = entry
        if index is not None:
            _check_index(self.path, index["weight_map"], self.tensors)

    def json(self, name: str) -> Any:
        """A JSON file of the folder; None if it is not there.

        Raises:
            ValueError: it is no JSON.
        """
        if name not in self.store.names():
            return None
        size = self.store.size(name)
        if size > _MAX_JSON_BYTES:
            raise ValueError(_refuse(self.path, f"has a {name} of {size} bytes", "a smaller one"))
        try:
            return json.loads(self._bytes(name, 0, size).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            got = f"has a {name} that is no JSON ({str(error)[:200]})"
            raise ValueError(_refuse(self.path, got, "a sound one")) from error

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or one entry of its first axis.

        Raises:
            KeyError: there is no such tensor.
            OSError: its bytes cannot be read.
        """
        entry = self.tensors[name]
        if index is None:
            return self._read(entry, entry.shape, entry.start)
        step = entry.num_bytes // entry.shape[0]
        return self._read(entry, entry.shape[1:], entry.start + index * step)

    def read_rows(self, name: str, index: int, parts: int) -> Tensor:
        """One of `parts` equal runs of entries of the first axis."""
        entry = self.tensors[name]
        shape = (entry.shape[0] // parts, *entry.shape[1:])
        return self._read(entry, shape, entry.start + index * (entry.num_bytes // parts))

    def chunks(self, name: str, size: int = 16 << 20) -> Iterator[tuple[int, Tensor]]:
        """A tensor's bytes, piece by piece, each with its offset in the tensor."""
        entry = self.tensors[name]
        for start in range(entry.start, entry.stop, size):
            stop = min(start + size, entry.stop)
            yield start - entry.start, self.store.read(entry.file, start, stop)

    def _read(self, entry: Entry, shape: tuple[int, ...], start: int) -> Tensor:
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            do = "it can be copied, but not computed with"
            got = f"has tensor {entry.name!r} of dtype {entry.dtype}"
            raise ValueError(_refuse(self.path, got, "a dtype that torch has", do))
        size = num_bytes(entry.dtype, shape)
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        return self.store.read(entry.file, start, start + size).view(dtype).view(shape)

    def read_file(self, name: str) -> bytes:
        """A whole file of the folder."""
        return self._bytes(name, 0, self.store.size(name))

    @property
    def stamps(self) -> dict[str, str]:
        """File of weights -> what changes when it does."""
        return {file: self.store.stamp(file) for file in self.files}

    def _bytes(self, file: str, start: int, stop: int) -> bytes:
        return bytes(buffer_of(self.store.read(file, start, stop)))

    def _header(self, file: str) -> dict[str, Entry]:
        total = self.store.size(file)
        where = f"{self.path}: {file}"
        size = header_size(self._bytes(file, 0, min(8, total)), where, total)
        text = self._bytes(file, 8, 8 + size)
        return {
            name: Entry(name, entry.dtype, entry.shape, file, entry.start, entry.stop)
            for name, entry in parse_header(text, where, total).items()
        }


class _LocalStore:
    """A folder of the file system. Files stay open: threads read them side by side."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, ReadFile] = {}

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self._folder.iterdir() if entry.is_file())

    def size(self, name: str) -> int:
        return self._open(name).size

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._open(name).read(start, stop)

    def stamp(self, name: str) -> str:
        stated = (self._folder / name).stat()
        return f"{stated.st_size} {stated.st_mtime_ns}"

    def _open(self, name: str) -> ReadFile:
        if name not in self._files:
            self._files[name] = ReadFile(str(self._folder / name))
        return self._files[name]

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()


class _RemoteStore:
    """A folder behind a URL, through fsspec."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._fs, self._folder = fsspec.core.url_to_fs(url)
        self._sizes: dict[str, int] = {}
        self._stamps: dict[str, str] = {}
        for item in self._fs.ls(self._folder, detail=True):
            if item["type"] == "file":
                name = item["name"].rstrip("/").rsplit("/", 1)[-1]
                self._sizes[name] = item["size"]
                # Each protocol has its own word for it, or none.
                marks = [str(item[key]) for key in _STAMP_KEYS if item.get(key)]
                self._stamps[name] = " ".join([str(item["size"]), *marks])

    def names(self) -> list[str]:
        return sorted(self._sizes)

    def size(self, name: str) -> int:
        return self._sizes[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if start == stop:
            return torch.empty(0, dtype=torch.uint8)
        data = self._fs.cat_file(f"{self._folder.rstrip('/')}/{name}", start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(f"{self._folder}/{name}: {len(data)} bytes came of {stop - start}")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def stamp(self, name: str) -> str:
        return self._stamps[name]


def local_path(path: str) -> Path | None:
    """The path of a file system that a path or ``file://`` URL means; None for any other URL."""
    path = path.removeprefix("file://")
    return None if "://" in path else Path(path).expanduser()


def _open_store(path: str) -> tuple[Store, str | None]:
    """The folder, and the one file asked for if the path names a file."""
    local = local_path(path)
    if local is None:
        return _RemoteStore(path), None
    if local.is_dir():
        return _LocalStore(local), None
    if local.is_file() and local.suffix == ".safetensors":
        return _LocalStore(local.parent), local.name
    got = "is no folder" if local.exists() else "does not exist"
    needs = "a checkpoint folder, a .safetensors file or a URL"
    raise FileNotFoundError(_refuse(path, got, needs))


def _shards(path: str, names: list[str], index: Any) -> list[str]:
    """The files that hold the tensors."""
    if index is not None:
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(_refuse(path, f"has an {INDEX} without weight_map", "one"))
        for file in weight_map.values():
            # A name is a name: no path leads out of the folder.
            is_name = isinstance(file, str) and file == os.path.basename(file) and file.strip(".")
            if not is_name or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
                got = f"has an {INDEX} that names {file!r}"
                raise ValueError(_refuse(path, got, ".safetensors files in the same folder"))
        files = set(weight_map.values())
        missing = sorted(files - set(names))
        if missing:
            got = f"lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:5])}"
            raise FileNotFoundError(_refuse(path, got, "all", "download it again"))
        return sorted(files)
    # A hidden file is unfinished, or what some systems keep beside a file.
    found = [n for n in names if n.endswith(".safetensors") and not n.startswith(".")]
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if len(found) == 1 and not _SHARD.search(found[0]):
        return found
    if found:
        got = f"holds {len(found)} .safetensors files, e.g. {found[0]}, and no {INDEX}"
        raise FileNotFoundError(_refuse(path, got, "the index, or one file"))
    pickles = [name for name in names if name.endswith(_PICKLES)]
    got = f"holds {pickles[0]}" if pickles else "holds no .safetensors file"
    do = "pickle files can run code and are not read: save as safetensors first" if pickles else ""
    raise FileNotFoundError(_refuse(path, got, ".safetensors files", do))


def _check_index(path: str, weight_map: dict[str, str], tensors: dict[str, Entry]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            got = f"has an index that places {name!r} in {file}, which does not hold it"
            raise ValueError(_refuse(path, got, "an index that fits the shards"))
    extra = sorted(set(tensors) - set(weight_map))
    if extra:
        got = f"holds {len(extra)} tensors that the index does not list, e.g. {extra[0]!r}"
        raise ValueError(_refuse(path, got, "an index that lists them", "remake the index"))


def _refuse(path: str, got: str, needs: str, do: str = "") -> str:
    return refusal("checkpoint", path, got, needs, do)
