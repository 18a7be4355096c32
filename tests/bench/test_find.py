"""Peers that are not here are named with the reason, and how to get them."""

import sys

import pytest

from octomoe.bench.peers.find import PEERS, find_peers


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch):
    # None in `sys.modules` is how Python spells a package that cannot be found.
    for name in ("alpha_moe", "deep_gemm", "flashinfer", "vllm"):
        monkeypatch.setitem(sys.modules, name, None)


def test_every_missing_peer_has_a_reason():
    found = find_peers()
    assert found.peers == []
    assert tuple(found.missing) == PEERS
    assert found.missing["vllm"] == (
        "needs the package vllm (0.11 or newer), which is not installed; run: pip install vllm"
    )
    assert (
        "give --sglang FOLDER, made by: python -m octomoe.bench.peers.sglang_wheel"
        in (found.missing["sglang"])
    )


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_asked_for_by_name_must_be_here(name):
    with pytest.raises(ImportError, match=r"^bench moe: needs the"):
        find_peers([name])


def test_a_package_that_does_not_import_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("import a_package_that_nobody_has")
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.syspath_prepend(tmp_path)
    found = find_peers()
    reason = "vllm does not import: No module named 'a_package_that_nobody_has'"
    assert found.missing["vllm"] == reason


def test_unknown_peers_are_refused():
    with pytest.raises(ValueError, match=r"--peer is 'sgl'.*one of: sglang, alpha_moe, deep_gemm"):
        find_peers(["sgl"])


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--sglang is .*, which has no kernels\.py"):
        find_peers(sglang=tmp_path)
