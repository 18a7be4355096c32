"""Hopper's kernels compile for it, do not spill, and use its tensor cores and TMA.

Nobody can run them in an interpreter: Gluon has none. `test_fused_moe_sm90.py`,
`test_fused_moe_wide_sm90.py` and `test_decode_sm90.py` run them on a GPU.
"""

import pytest

# Of a family: how many cases, and the kernels of each of them.
FAMILIES = {
    "prefill": (15, ["_up_kernel", "_down_kernel"]),
    "wide": (8, ["_rows_kernel", "_up_kernel", "_down_kernel"]),
    "decode": (17, ["_decode_up_kernel", "_decode_down_kernel", "_combine_kernel"]),
}
QUANTISED_BEFORE = ("few rows", "some rows", "eight tokens, sorted by programs")
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def compiled(compile_offline):
    """Of a family: the records of each case, by kernel."""
    families = {family: {} for family in FAMILIES}
    for (family, case), records in compile_offline(
        "offline_all_sm90.py", by=("family", "case")
    ).items():
        families[family][case] = {record["kernel"]: record for record in records}
    return families


def halves(kernels):
    """Of a case's kernels, those that multiply: up to h, and down."""
    return [
        record for name, record in kernels.items() if name.endswith(("up_kernel", "down_kernel"))
    ]


@EACH_FAMILY
def test_every_case_compiles(family, compiled):
    num_cases, names = FAMILIES[family]
    assert len(compiled[family]) == num_cases
    for case, kernels in compiled[family].items():
        errors = [record["error"] for record in kernels.values() if "error" in record]
        assert not errors, case
        assert list(kernels) == names


@EACH_FAMILY
def test_no_kernel_spills(family, compiled):
    for case, kernels in compiled[family].items():
        for record in kernels.values():
            assert record["spill_bytes"] == 0, (case, record)
            assert record["instructions"]["STL"] == record["instructions"]["LDL"] == 0


@pytest.mark.parametrize(
    ("family", "used", "unused"),
    [("prefill", "QGMMA", "HGMMA"), ("wide", "HGMMA", "QGMMA"), ("decode", "QGMMA", "HGMMA")],
)
def test_products_are_of_bytes_that_tma_brought(family, used, unused, compiled):
    for kernels in compiled[family].values():
        for record in halves(kernels):
            assert record["instructions"][used] > 0
            assert record["instructions"]["UTMALDG"] > 0
            assert record["instructions"][unused] == 0


@pytest.mark.parametrize("family", ["prefill", "wide"])
def test_rows_of_tokens_are_gathered(family, compiled):
    for kernels in compiled[family].values():
        up, down = halves(kernels)
        assert up["instructions"]["LDGSTS"] > 0 == down["instructions"]["LDGSTS"]


def test_only_rows_that_are_quantised_are_copied_past_registers(compiled):
    for case, kernels in compiled["decode"].items():
        is_copied = case.startswith("channel x token") or case.endswith(QUANTISED_BEFORE)
        up, _ = halves(kernels)
        assert (up["instructions"]["LDGSTS"] > 0) == is_copied, case


def test_rows_are_read_and_written_in_words_of_16_bytes(compiled):
    for kernels in compiled["wide"].values():
        rows = kernels["_rows_kernel"]
        assert rows["load_bytes"] == rows["store_bytes"] == 16


def test_programs_fit_a_multiprocessor(compiled):
    """Two of the smaller tiles, one of the larger."""
    for case, kernels in compiled["prefill"].items():
        count = 2 if case.endswith(" 64 rows") else 1
        for record in halves(kernels):
            assert count * (record["shared_bytes"] + 1024) <= 228 * 1024
            assert record["registers"] == (128 if count == 2 else 168)


def test_one_wide_program_fits_a_multiprocessor(compiled):
    for kernels in compiled["wide"].values():
        for record in halves(kernels):
            assert record["shared_bytes"] <= 227 * 1024
            assert record["registers"] == 168


def test_two_programs_for_few_rows_fit_a_multiprocessor(compiled):
    for kernels in compiled["decode"].values():
        for record in halves(kernels):
            assert 2 * (record["shared_bytes"] + 1024) <= 228 * 1024
            assert record["registers"] <= 128
