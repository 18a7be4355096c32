"""Hopper's kernels for bf16 rows compile for it, do not spill, and use its tensor cores and TMA.

Nobody can run them in an interpreter: Gluon has none. `test_fused_moe_wide_sm90.py` runs them on a
GPU.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("offline_wide_sm90.py")


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
    assert len(compiled) == 10
    for case, records in compiled.items():
        errors = [record["error"] for record in records if "error" in record]
        assert not errors, case
        names = [record["kernel"] for record in records]
        assert names == ["_rows_kernel", "_up_kernel", "_down_kernel"]


def test_no_kernel_spills(compiled):
    for case, records in compiled.items():
        for record in records:
            assert record["spill_bytes"] == 0, (case, record)
            assert record["instructions"]["STL"] == record["instructions"]["LDL"] == 0


def test_products_are_of_bf16_and_of_bytes_that_tma_brought(compiled):
    for _, up, down in compiled.values():
        for record in (up, down):
            assert record["instructions"]["HGMMA"] > 0
            assert record["instructions"]["UTMALDG"] > 0
            assert record["instructions"]["QGMMA"] == 0
        # Rows of tokens are gathered.
        assert up["instructions"]["LDGSTS"] > 0 == down["instructions"]["LDGSTS"]


def test_rows_are_read_and_written_in_words_of_16_bytes(compiled):
    for rows, _, _ in compiled.values():
        assert rows["load_bytes"] == rows["store_bytes"] == 16


def test_programs_fit_a_multiprocessor(compiled):
    for _, up, down in compiled.values():
        for record in (up, down):
            assert record["shared_bytes"] <= 227 * 1024
            assert record["registers"] == 168
