"""The header of a safetensors file: read with suspicion, written with aligned data.

A file is: the header's length (8 bytes, little endian), the header (JSON: tensor name -> dtype,
shape, data_offsets), the data, back to back. Source: the safetensors format description.
"""

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Final, NoReturn

import torch

# Longest header that is read; the format's own limit.
MAX_HEADER_BYTES: Final = 100_000_000
# dtype -> bits per element.
_BITS: Final = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
TORCH_DTYPES: Final = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
DTYPE_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file.

    Attributes:
        name: the tensor's name.
        dtype: as the header spells it, e.g. ``"BF16"``.
        shape: the tensor's shape.
        file: name of the file that holds it.
        start, stop: first byte, and the one behind the last, in that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that is to be written: name, dtype as a header spells it, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        return num_bytes(self.dtype, self.shape)


class HeaderError(ValueError):
    """A file is no sound safetensors file."""


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; a dtype of less than a byte rounds up."""
    return -(-prod(shape) * _BITS[dtype] // 8)


def header_size(head: bytes, file: str, file_size: int) -> int:
    """Bytes of the JSON, from the first 8 bytes of a file.

    Raises:
        HeaderError: the file is too short for them, or they state an impossible length.
    """
    if file_size < 8 or len(head) < 8:
        _fail(file, f"has {file_size} bytes, fewer than the 8 that every file begins with")
    size: int = struct.unpack("<Q", head[:8])[0]
    if size > min(MAX_HEADER_BYTES, file_size - 8):
        _fail(file, f"states a header of {size} bytes in a file of {file_size}")
    return size


def parse_header(text: bytes, file: str, file_size: int) -> dict[str, Entry]:
    """The tensors of a file, in order of their data.

    Args:
        text: the JSON.
        file: the file's name, for entries and messages.
        file_size: bytes of the whole file.

    Raises:
        HeaderError: the JSON is not as the format says: an unknown dtype, a shape that does not fit
            its bytes, data that overlaps, leaves holes or passes the end, a name given twice.
    """
    try:
        header = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, _RepeatedKeyError) as error:
        _fail(file, f"has an unreadable header ({str(error)[:200]})")
    except ValueError as error:  # Python refuses integers of thousands of digits.
        _fail(file, f"has an unreadable header ({str(error)[:200]})")
    if not isinstance(header, dict) or not text.startswith(b"{"):
        _fail(file, "has a header that is no JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        _fail(file, "has a __metadata__ that is no map of strings")
    data_start = 8 + len(text)
    entries = [_entry(name, stated, file, data_start) for name, stated in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    end = data_start
    for entry in entries:
        if entry.start != end:
            what = "overlaps the data before it" if entry.start < end else "leaves a hole before it"
            _fail(file, f"has a tensor {_short(entry.name)} that {what}")
        end = entry.stop
    if end != file_size:
        _fail(file, f"has data for {end} bytes but is {file_size} long: was it cut short?")
    return {entry.name: entry for entry in entries}


def build_header(tensors: Iterable[Planned], file: str) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a new file, and where each tensor's data goes.

    Data is ordered by element size, largest first, so that every tensor is aligned.

    Raises:
        ValueError: the header would be longer than readers accept.
    """
    ordered = sorted(tensors, key=lambda tensor: -_BITS[tensor.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{file} would need a header of {len(text)} bytes; write smaller shards")
    start = 8 + len(text)
    entries = {}
    for tensor in ordered:
        first, last = header[tensor.name]["data_offsets"]
        entries[tensor.name] = Entry(
            tensor.name, tensor.dtype, tensor.shape, file, start + first, start + last
        )
    return struct.pack("<Q", len(text)) + text, entries


class _RepeatedKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RepeatedKeyError(f"{_short(twice)} is given twice")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _entry(name: str, stated: object, file: str, data_start: int) -> Entry:
    if not isinstance(stated, dict):
        _fail(file, f"says nothing usable of tensor {_short(name)}")
    dtype: Any = stated.get("dtype")
    shape: Any = stated.get("shape")
    offsets: Any = stated.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        _fail(file, f"has tensor {_short(name)} of unknown dtype {_short(str(dtype))}")
    if not _are_sizes(shape) or len(shape) > 64 or not _are_sizes(offsets) or len(offsets) != 2:
        _fail(file, f"has tensor {_short(name)} of no valid shape and data_offsets")
    first, last = offsets
    bits = _BITS[dtype]
    for size in shape:
        # Beside an axis of 0 too: torch counts strides in 64 bits.
        bits *= max(size, 1)
        if bits > 1 << 63:
            _fail(file, f"has tensor {_short(name)} of impossible shape {_short(str(shape))}")
    bits *= 0 not in shape
    if last < first or bits % 8 or bits // 8 != last - first:
        got = f"bytes {first} to {last} for {dtype} of shape {_short(str(shape))}"
        _fail(file, f"has tensor {_short(name)} with {got}")
    return Entry(name, dtype, tuple(shape), file, data_start + first, data_start + last)


def _are_sizes(value: Any) -> bool:
    # A bool is an int to Python, but none to JSON.
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _short(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:97] + "...")


def _fail(file: str, what: str) -> NoReturn:
    raise HeaderError(f"{file} {what}")
