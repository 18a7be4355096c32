"""Write safetensors shards at known offsets, under temporary names until they are whole."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from octomoe.checkpoint.direct import WriteFile, buffer_of
from octomoe.checkpoint.header import DTYPE_NAMES, Planned, build_header

PARTIAL = ".partial-"


class ShardWriter:
    """One shard: tensors (or runs of bytes of them) come in any order, from any thread.

    Args:
        path: the shard's final path; until `finish` it has another name.
        tensors: all tensors of the shard.

    Raises:
        OSError: the folder cannot be written, or the disk cannot hold the shard.
    """

    def __init__(self, path: Path, tensors: Iterable[Planned]) -> None:
        self.path = path
        head, self._entries = build_header(tensors, path.name)
        self._size = max((entry.stop for entry in self._entries.values()), default=len(head))
        self._temporary = path.with_name(PARTIAL + path.name)
        self._file = WriteFile(str(self._temporary), self._size)
        self._file.write(memoryview(head), 0)

    def write(self, name: str, data: Tensor, offset: int = 0) -> None:
        """Write a tensor's bytes, or a run of them, `offset` bytes behind the tensor's start."""
        entry = self._entries[name]
        assert data.dtype == torch.uint8 or DTYPE_NAMES[data.dtype] == entry.dtype, name
        assert entry.start + offset + data.nbytes <= entry.stop, name
        data = data.contiguous()
        self._file.write(buffer_of(data), entry.start + offset)

    def finish(self) -> None:
        """Give the shard its name."""
        self._file.flush()
        self._file.close()
        os.replace(self._temporary, self.path)

    def abandon(self) -> None:
        """Close the file and leave what is written."""
        self._file.close()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_file(path: Path, data: bytes | bytearray) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(PARTIAL + path.name)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
