"""What packaged tables choose for Hopper compiles, spills nothing, uses tensor cores and TMA."""

import pytest

from octomoe.tune.tables import BUCKETS


@pytest.fixture(scope="module")
def compiled(compile_offline):
    """Records by case."""
    return compile_offline("offline_tables.py", by=("case",))


def test_every_configuration_compiles(compiled):
    assert compiled
    for (case,), records in compiled.items():
        assert not [record["error"] for record in records if "error" in record], case
        assert int(case.split()[-2]) in BUCKETS


def test_no_kernel_spills(compiled):
    for (case,), records in compiled.items():
        for record in records:
            assert record["spill_bytes"] == 0, (case, record)


def test_products_are_of_bytes_that_tma_brought(compiled):
    for (case,), records in compiled.items():
        halves = [r for r in records if r["kernel"].endswith(("up_kernel", "down_kernel"))]
        assert len(halves) == 2, case
        for record in halves:
            assert record["instructions"]["QGMMA"] > 0, case
            assert record["instructions"]["UTMALDG"] > 0, case
