"""Every kernel compiles for NVIDIA and AMD; on sm90 it does not spill, and moves wide words.

`offline.py` compiles them, without a GPU, and has the table of cases.
"""

import runpy
from itertools import product
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("offline.py")
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(PROGRAM.parent)
    OFFLINE = runpy.run_path(str(PROGRAM))
CASES = OFFLINE["CASES"]
TARGETS = ("cuda:90", "hip:gfx942", "hip:gfx950")
# (case, target): why it cannot be compiled, in the words of the compiler's message.
REFUSED: dict[tuple[str, str], str] = {}

# Kernels beside those that multiply.
ADDS_UP = ("_finish_kernel", "_combine_kernel", "_quantize_tile_kernel")

EACH_CASE = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def compiled(compile_offline):
    """Records by case and target."""
    return compile_offline(PROGRAM.name, *TARGETS, by=("case", "target"))


@pytest.mark.parametrize(
    ("case", "target"), [job for job in product(CASES, TARGETS) if OFFLINE["is_worth_it"](*job)]
)
def test_compiles(case, target, compiled):
    records = compiled[case, target]
    assert records
    errors = [record["error"] for record in records if "error" in record]
    if (case, target) in REFUSED:
        assert errors
        assert REFUSED[case, target] in errors[0]
    else:
        assert not errors


@EACH_CASE
def test_does_not_spill(case, compiled):
    for record in compiled[case, "cuda:90"]:
        assert record["spill_bytes"] == 0, record
        assert record["instructions"]["STL"] == record["instructions"]["LDL"] == 0, record


@EACH_CASE
def test_moves_wide_words(case, compiled):
    claim = CASES[case]
    for record in compiled[case, "cuda:90"]:
        assert record["load_bytes"] >= claim.load_bytes, record
        # Magnitudes are shared by atomic maxima, which are no stores.
        if record["store_bytes"]:
            assert record["store_bytes"] >= claim.store_bytes, record


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("unpermute")])
def test_products_are_rounded_before_they_are_added(case, compiled):
    # The interpreter never fuses, so it cannot notice.
    for record in compiled[case, "cuda:90"]:
        assert record["instructions"]["FFMA"] == 0, record


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].tensor_core])
def test_multiplies_on_tensor_cores(case, compiled):
    kernels = [r for r in compiled[case, "cuda:90"] if r["kernel"] not in ADDS_UP]
    assert kernels
    for record in kernels:
        assert record["instructions"][CASES[case].tensor_core] > 0, record
        assert record["instructions"]["LDGSTS"] > 0, record
