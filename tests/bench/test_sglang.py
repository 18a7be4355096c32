"""SGLang as a peer: its wheel is taken apart, and its tables are looked up as it does itself.

The real ones are where OCTOMOE_SGLANG_PEER names a folder that `sglang_wheel` made.
"""

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from octomoe.bench.layers import Mode, Shape, make_experts, make_problem
from octomoe.bench.peers.sglang import UNTUNED, SGLang, choose_config
from octomoe.bench.peers.sglang_wheel import FILES, extract, load

FOLDER = os.environ.get("OCTOMOE_SGLANG_PEER")
needs_peer = pytest.mark.skipif(FOLDER is None, reason="OCTOMOE_SGLANG_PEER is not set")
CONFIG = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}


def table(triton="3.6.0", projection="up", device="NVIDIA_H200", **entries):
    about = {"triton": triton, "experts": 8, "width": 128, "device": device}
    return about | {"projection": projection, "entries": entries or {"1": CONFIG}}


def choose(*tables, num_tokens=1, experts=8):
    return choose_config(list(tables), experts, 128, num_tokens, triton_version="3.6.0")


def test_own_triton_comes_before_newer_and_newer_before_older():
    tables = [table(version) for version in ("3.2.0", "3.10.0", "3.6.0", "3.9.1")]
    assert "3.6.0" in choose(*tables).source
    del tables[2]
    assert "3.10.0" in choose(*tables).source
    assert "3.2.0" in choose(tables[0]).source


def test_entry_of_the_nearest_number_of_tokens():
    entries = {str(n): CONFIG | {"num_warps": n} for n in (1, 16, 64)}
    for num_tokens, nearest in ((1, 1), (8, 1), (9, 16), (40, 16), (41, 64), (8192, 64)):
        config = choose(table(**entries), num_tokens=num_tokens)
        assert config.up["num_warps"] == config.down["num_warps"] == nearest


def test_down_projection_without_a_table_takes_that_of_up():
    config = choose(table())
    assert config.up == config.down == CONFIG
    assert not config.is_down_tma


def test_down_projection_keeps_the_rows_of_up():
    down = CONFIG | {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 256, "USE_TMA": True}
    config = choose(table(), table("3.5.1", "down", **{"1": down}))
    assert config.down == CONFIG | {"BLOCK_SIZE_N": 256}
    assert config.is_down_tma
    assert not config.is_up_tma


def test_other_devices_and_layers_are_untuned():
    assert choose(table(device="NVIDIA_H20")).up == UNTUNED
    config = choose(table(), experts=9)
    assert config.up == config.down == UNTUNED
    # Nobody can spoil it.
    config.up["BLOCK_SIZE_M"] = 0
    assert choose().up == UNTUNED


def test_wheel_is_taken_apart(tmp_path):
    folder = "sglang/srt/layers/moe/moe_runner/triton_utils/configs/triton_3_5_1/"
    name = "E=257,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128]"
    wheel = tmp_path / "sglang-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(FILES["kernels.py"], "def moe_sum_reduce_triton(): return 8\n")
        archive.writestr(FILES["quantize.py"], "from sglang.srt.utils import ceil_align\n")
        archive.writestr(f"{folder}{name}.json", json.dumps({"1": CONFIG}))
        archive.writestr(f"{folder}{name}_down.json", json.dumps({"1": CONFIG}))
        archive.writestr(f"{folder}E=257,N=256,device_name=NVIDIA_H200.json", "{}")
    extract(wheel, tmp_path / "peer")
    peer = load(tmp_path / "peer")
    assert peer.version == "1.2.3"
    assert peer.kernels.moe_sum_reduce_triton() == 8
    assert peer.quantize.ceil_align(9, 4) == 12
    assert [table["projection"] for table in peer.tables] == ["up", "down"]
    config = choose_config(peer.tables, 257, 256, 8, triton_version="3.6.0")
    assert config.source == "tuned for Triton 3.5.1, down for Triton 3.5.1"


def test_folders_of_before_have_no_kernel_that_quantises_rows(tmp_path):
    (tmp_path / "kernels.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"has no configs.json.*sglang_wheel WHEEL FOLDER"):
        load(tmp_path)
    (tmp_path / "configs.json").write_text('{"sglang": "1.2.3", "tables": []}')
    peer = SGLang.load(tmp_path)
    shape = Shape("", 2, 128, 128, 1)
    problem = make_problem(shape, make_experts(shape, "cpu"), 1)
    assert peer.why_not(problem, Mode.KERNEL) is None
    assert "no quantize.py" in peer.why_not(problem, Mode.LAYER)


@needs_peer
def test_stand_ins_are_gone_after_loading():
    before = set(sys.modules)
    load(Path(FOLDER))
    assert not [name for name in set(sys.modules) - before if name.startswith("sglang.")]


@needs_peer
@pytest.mark.parametrize(
    ("num_experts", "width", "is_tma"),
    [(512, 128, True), (257, 256, True), (128, 384, False), (128, 768, False)],
)
def test_timed_layers_are_tuned(num_experts, width, is_tma):
    peer = load(Path(FOLDER))
    for num_tokens in (1, 32, 8192):
        sizes = (num_experts, width, num_tokens)
        config = choose_config(peer.tables, *sizes, triton_version="3.6.0")
        assert config.source.startswith("tuned")
        assert config.is_down_tma == is_tma
