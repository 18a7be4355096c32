"""Headers: what we write anyone can read; what others wrote wrongly is refused, never obeyed."""

import json
import random
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from octomoe.checkpoint.header import (
    DTYPE_NAMES,
    MAX_HEADER_BYTES,
    TORCH_DTYPES,
    HeaderError,
    Planned,
    build_header,
    header_size,
    num_bytes,
    parse_header,
)
from octomoe.checkpoint.source import Checkpoint
from octomoe.checkpoint.writer import ShardWriter

NUM_MUTATIONS = 10_000
MUTATION_SECONDS = 2.0

planned = st.lists(
    st.builds(
        Planned,
        st.text(max_size=20).filter(lambda name: name != "__metadata__"),
        st.sampled_from(sorted(TORCH_DTYPES)),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    max_size=8,
    unique_by=lambda tensor: tensor.name,
)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """What a header states of a tensor; by default a sound one."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def parse(header: Any, num_data: int = 8) -> Any:
    """`parse_header` of an object, or of a header's text, in front of so many bytes of data."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return parse_header(text, "f", 8 + len(text) + num_data)


# ---- what we write ----


@given(planned)
def test_a_header_says_what_was_planned_and_aligns_every_tensor(tensors):
    head, stated = build_header(tensors, "f")
    size = max([len(head), *(e.stop for e in stated.values())])
    assert header_size(head, "f", size) == len(head) - 8
    found = parse_header(head[8:], "f", size)
    assert found == stated
    assert {(e.name, e.dtype, e.shape) for e in found.values()} == {
        (t.name, t.dtype, t.shape) for t in tensors
    }
    for each in found.values():
        assert each.num_bytes == num_bytes(each.dtype, each.shape)
        assert each.start % TORCH_DTYPES[each.dtype].itemsize == 0


@pytest.mark.parametrize("odd_name", ["a", "aa", "aaa", "é", "😀", 'quote"and\\', "\ud800"])
def test_data_is_aligned_whatever_the_length_of_the_header(odd_name):
    tensors = [Planned(odd_name, "U8", (3,)), Planned("w", "F64", (2,)), Planned("s", "BF16", (5,))]
    head, stated = build_header(tensors, "f")
    assert stated["w"].start % 8 == 0
    assert stated["s"].start % 2 == 0
    assert parse_header(head[8:], "f", stated[odd_name].stop) == stated


def test_safetensors_reads_the_files_that_we_write(tmp_path: Path):
    tensors = {}
    for dtype, name in DTYPE_NAMES.items():
        if dtype == torch.bool or not (dtype.is_floating_point or dtype.is_complex):
            tensors[f"of {name}"] = torch.arange(12).reshape(3, 4).remainder(3).to(dtype)
        else:
            tensors[f"of {name}"] = torch.arange(12.0).reshape(3, 4).exp2().to(dtype)
    tensors |= {"empty": torch.zeros(0, 7), "scalar": torch.tensor(-0.0)}
    path = tmp_path / "model.safetensors"
    writer = ShardWriter(
        path, [Planned(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
    )
    for name, tensor in reversed(tensors.items()):
        writer.write(name, tensor)
    assert not path.exists()
    writer.finish()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors"]
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert found.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_a_file_without_tensors_is_a_file(tmp_path: Path):
    writer = ShardWriter(tmp_path / "model.safetensors", [])
    writer.finish()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not list(file.keys())


def test_a_header_past_the_readers_limit_is_not_written():
    huge = [Planned("x" * MAX_HEADER_BYTES, "U8", (1,))]
    with pytest.raises(ValueError, match=r"f would need a header of .*; write smaller shards"):
        build_header(huge, "f")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("head", "file_size", "message"),
    [
        (b"", 0, "f has 0 bytes, fewer than the 8 that every file begins with"),
        (b"1234567", 7, "f has 7 bytes, fewer than the 8"),
        (struct.pack("<Q", 3), 10, "f states a header of 3 bytes in a file of 10"),
        (struct.pack("<Q", 2**64 - 1), 10**6, "states a header of 18446744073709551615 bytes"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1), 10**12, "states a header of 100000001 bytes"),
    ],
)
def test_an_impossible_header_length_is_refused(head: bytes, file_size: int, message: str):
    with pytest.raises(HeaderError, match=re.escape(message)):
        header_size(head, "f", file_size)


@pytest.mark.parametrize("size", [0, 2, MAX_HEADER_BYTES])
def test_a_possible_header_length_is_read(size: int):
    assert header_size(struct.pack("<Q", size), "f", 8 + size) == size


REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": ("", "unreadable header"),
    "no JSON": ("{'a': 1}", "unreadable header"),
    "no UTF-8": ("\udcff", "unreadable header"),
    "a byte order mark": ('\ufeff{"a": 1}', "unreadable header"),
    "a list": ([], "a header that is no JSON object"),
    "a number": (3, "a header that is no JSON object"),
    "space first": (" {}", "a header that is no JSON object"),
    "deep nesting": ('{"a": ' + "[" * 100_000, "unreadable header"),
    "deep objects": ('{"a":' * 100_000, "unreadable header"),
    "NaN": ('{"a": NaN}', "unreadable header .NaN is no JSON"),
    "-Infinity": ('{"a": {"shape": [-Infinity]}}', "-Infinity is no JSON"),
    "an integer of 5000 digits": ('{"a": {"shape": [' + "9" * 5000 + "]}}", "unreadable header"),
    "a name twice": ('{"a": {}, "b": {}, "a": {}}', "'a' is given twice"),
    "a key of an entry twice": ('{"a": {"dtype": "F32", "dtype": "F32"}}', "'dtype' is given"),
    "metadata that are no map": ({"__metadata__": ["pt"]}, "__metadata__ that is no map"),
    "metadata that are no strings": ({"__metadata__": {"n": 1}}, "__metadata__ that is no map"),
    "an entry that is no object": ({"a": [1]}, "says nothing usable of tensor 'a'"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "'a' of unknown dtype 'None'"),
    "an unknown dtype": ({"a": entry("F33")}, "tensor 'a' of unknown dtype 'F33'"),
    "a dtype in lower case": ({"a": entry("f32")}, "unknown dtype 'f32'"),
    "a dtype that is a list": ({"a": entry(["F32"])}, "unknown dtype"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "no valid shape"),
    "a bool as size": ({"a": entry(shape=[True, 2])}, "no valid shape and data_offsets"),
    "a float as size": ({"a": entry(shape=[2.0])}, "no valid shape and data_offsets"),
    "a text as size": ({"a": entry(shape=["2"])}, "no valid shape and data_offsets"),
    "a negative size": ({"a": entry(shape=[-2, -1])}, "no valid shape and data_offsets"),
    "65 axes": ({"a": entry(shape=[1] * 64 + [2])}, "no valid shape and data_offsets"),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, "no valid shape and data_offsets"),
    "a bool as offset": ({"a": entry(offsets=[False, 8])}, "no valid shape and data_offsets"),
    "a negative offset": ({"a": entry(offsets=[-8, 0])}, "no valid shape and data_offsets"),
    "offsets the wrong way": ({"a": entry(offsets=[8, 0])}, "tensor 'a' with bytes 8 to 0"),
    "a huge shape": ({"a": entry(shape=[2**32, 2**32, 2**32])}, "'a' of impossible shape"),
    "a size whose bytes wrap to 8": ({"a": entry(shape=[2**62 + 2])}, "'a' of impossible shape"),
    "no elements, but huge axes": (
        {"a": entry(shape=[0, 2**80], offsets=[0, 0])}, "impossible shape",
    ),
    "no elements, but axes that overflow": (
        {"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}, "impossible shape",
    ),
    "too few bytes": ({"a": entry(offsets=[0, 7])}, "bytes 0 to 7 for F32 of shape '[2]'"),
    "too many bytes": ({"a": entry("U8")}, "bytes 0 to 8 for U8"),
    "half a byte": ({"a": entry("F4", [15], [0, 8])}, "bytes 0 to 8 for F4"),
    "an overlap": (
        {"a": entry(), "b": entry("U8", [4], [6, 10])}, "tensor 'b' that overlaps the data before",
    ),
    "the same bytes twice": ({"a": entry(), "b": entry()}, "'b' that overlaps the data before it"),
    "a hole in front": ({"a": entry("U8", [4], [4, 8])}, "'a' that leaves a hole before it"),
    "a hole between": (
        {"a": entry("U8", [2], [0, 2]), "b": entry("U8", [4], [4, 8])}, "'b' that leaves a hole",
    ),
    "a hole at the end": ({"a": entry("U8", [4], [0, 4])}, "data for .* but is .* long"),
    "data cut short": ({"a": entry("F64", [2], [0, 16])}, "was it cut short"),
    "an offset past all files": ({"a": entry(offsets=[2**70, 2**70 + 8])}, "leaves a hole"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_header_is_refused_with(what: str):
    header, message = REFUSED[what]
    if isinstance(header, str):
        text = header.encode("utf-8", "surrogateescape")
    else:
        text = json.dumps(header).encode()
    if not message.startswith(("data for", "unreadable header .NaN")):
        message = re.escape(message)
    with pytest.raises(HeaderError, match=message) as caught:
        parse_header(text, "f", 8 + len(text) + 8)
    assert str(caught.value).startswith("f has ") or "f says" in str(caught.value)
    # A hostile name or value does not fill the screen.
    assert len(str(caught.value)) < 600


def test_what_looks_odd_but_is_sound_is_read():
    header = {
        "__metadata__": {},
        "": entry("U8", [], [0, 1]),
        "../../etc/passwd": entry("U8", [0, 3], [1, 1]),
        "pair": entry("F4", [2], [1, 2]),
        "sixes": entry("F6_E2M3", [8], [2, 8]),
    }
    found = parse(header)
    assert list(found) == ["", "../../etc/passwd", "pair", "sixes"]
    assert [each.num_bytes for each in found.values()] == [1, 0, 1, 6]
    assert parse("{}   ", 0) == {}


# ---- mutations ----

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 8, 2**31, 2**63, 2**64, 10**30, 1.5, -0.0, 1e400, "", "F32",
    "BF16", "F4", "F8_E8M0", "C64", "../x", "\0", [], [0], [0, 0], [0, 8], [2**63, 2], [0, 2**70],
    {}, {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, [[]], "x" * 1000,
)  # fmt: skip


def flip(data: bytearray, rng: random.Random, length: int) -> None:
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(min(len(data), 8 + length))] ^= 1 << rng.randrange(8)


def insert(data: bytearray, rng: random.Random, length: int) -> None:
    at = rng.randrange(8 + length)
    data[at:at] = rng.randbytes(rng.randint(1, 8))


def overwrite(data: bytearray, rng: random.Random, length: int) -> None:
    at = 8 + rng.randrange(length)
    data[at : at + 1] = rng.choice([b'"', b"{", b"}", b"[", b"]", b",", b"9", b"-", b"\\", b"\xff"])


def truncate(data: bytearray, rng: random.Random, length: int) -> None:
    del data[rng.randrange(len(data)) :]


def cut(data: bytearray, rng: random.Random, length: int) -> None:
    at = rng.randrange(8 + length)
    del data[at : at + rng.randint(1, 12)]


def restate_length(data: bytearray, rng: random.Random, length: int) -> None:
    data[:8] = struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**32, 2**64 - 1]))


def swap_value(data: bytearray, rng: random.Random, length: int) -> None:
    header = json.loads(data[8 : 8 + length])
    place: Any = header
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if rng.random() < 0.5 or not isinstance(place[key], list | dict) or not place[key]:
            break
        place = place[key]
    place[key] = rng.choice(VALUES)
    text = json.dumps(header).encode()
    data[: 8 + length] = struct.pack("<Q", len(text)) + text


MUTATIONS: tuple[Callable[[bytearray, random.Random, int], None], ...] = (
    flip, insert, overwrite, truncate, cut, restate_length, swap_value, swap_value, swap_value,
)  # fmt: skip


@pytest.mark.plain_memory
def test_a_mutated_file_opens_or_is_refused_and_nothing_else_happens(tmp_path: Path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "config.json").write_text("{}")
    path = folder / "model.safetensors"
    tensors = {"a": torch.ones(2, 3), "b.weight": torch.zeros(4, dtype=torch.uint8)}
    save_file(tensors | {"none": torch.ones(0, 2)}, path, metadata={"format": "pt"})
    sound = path.read_bytes()
    length = struct.unpack("<Q", sound[:8])[0]
    rng = random.Random(20)
    num_opened = num_refused = 0
    for _ in range(NUM_MUTATIONS):
        data = bytearray(sound)
        rng.choice(MUTATIONS)(data, rng, length)
        path.write_bytes(data)
        started = time.monotonic()
        try:
            checkpoint = Checkpoint(folder)
        except (ValueError, OSError):
            num_refused += 1
        else:
            num_opened += 1
            check_reads(checkpoint, path)
        assert time.monotonic() - started < MUTATION_SECONDS, bytes(data)
    assert min(num_opened, num_refused) > NUM_MUTATIONS // 100
    assert sorted(file.name for file in tmp_path.rglob("*")) == sorted(
        ["model", "config.json", "model.safetensors"]
    )


def check_reads(checkpoint: Checkpoint, path: Path) -> None:
    """Whatever is accepted can be read, and safetensors, if it accepts it, reads the same."""
    ours = {}
    for name, each in checkpoint.tensors.items():
        assert sum(len(data) for _, data in checkpoint.chunks(name)) == each.num_bytes
        if each.dtype in TORCH_DTYPES:
            ours[name] = checkpoint.read(name)
        else:
            with pytest.raises(ValueError, match="it can be copied, but not computed with"):
                checkpoint.read(name)
    try:
        with safe_open(path, "pt") as file:
            theirs = {name: file.get_tensor(name) for name in file.keys() if name in ours}  # noqa: SIM118
    except SafetensorError:
        return
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        assert (tensor.dtype, tensor.shape) == (ours[name].dtype, ours[name].shape)
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert raw.equal(ours[name].reshape(-1).view(torch.uint8))
