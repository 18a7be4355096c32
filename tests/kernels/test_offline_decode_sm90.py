"""Hopper's kernels for few rows compile for it, do not spill, and use its tensor cores and TMA.

Nobody can run them in an interpreter: Gluon has none. `test_decode_sm90.py` runs them on a GPU.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("offline_decode_sm90.py")


@pytest.fixture(scope="module")
def compiled():
    """Records by case."""
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    command = [sys.executable, PROGRAM]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    records = defaultdict(list)
    for record in map(json.loads, result.stdout.splitlines()):
        records[record["case"]].append(record)
    return records


def test_every_case_compiles(compiled):
    assert len(compiled) == 11
    for case, records in compiled.items():
        errors = [record["error"] for record in records if "error" in record]
        assert not errors, case
        names = [record["kernel"] for record in records]
        assert names == ["_decode_up_kernel", "_decode_down_kernel", "_combine_kernel"]


def test_no_kernel_spills(compiled):
    for case, records in compiled.items():
        for record in records:
            assert record["spill_bytes"] == 0, (case, record)
            assert record["instructions"]["STL"] == record["instructions"]["LDL"] == 0


def test_products_are_of_bytes_that_tma_brought(compiled):
    for *halves, _ in compiled.values():
        for record in halves:
            assert record["instructions"]["QGMMA"] > 0
            assert record["instructions"]["UTMALDG"] > 0
            assert record["instructions"]["HGMMA"] == 0


def test_only_rows_that_are_quantised_are_copied_past_registers(compiled):
    for case, (up, _, _) in compiled.items():
        is_copied = case.startswith("channel") or "row" in case or "eight" in case
        assert (up["instructions"]["LDGSTS"] > 0) == is_copied, case


def test_two_programs_fit_a_multiprocessor(compiled):
    for *halves, _ in compiled.values():
        for record in halves:
            assert 2 * (record["shared_bytes"] + 1024) <= 228 * 1024
            assert record["registers"] <= 128
