"""Compile Hopper's kernels without a GPU; see `offline.py`.

    python tests/kernels/offline_all_sm90.py wide mxfp8

compiles the cases whose names hold all of these words, or all.
"""

import sys
from types import ModuleType

import offline_decode_sm90
import offline_sm90
import offline_wide_sm90
from offline import main

FAMILIES: dict[str, ModuleType] = {
    "prefill": offline_sm90,
    "wide": offline_wide_sm90,
    "decode": offline_decode_sm90,
}
CASES = [f"{family}: {case}" for family, module in FAMILIES.items() for case in module.CASES]


def compile_case(name: str, target: str) -> list[dict[str, object]]:
    """A record per kernel of a case of a family."""
    family, case = name.split(": ")
    return [record | {"family": family} for record in FAMILIES[family].compile_case(case, target)]


if __name__ == "__main__":
    chosen = [name for name in CASES if all(word in name for word in sys.argv[1:])]
    main(compile_case, [(name, "cuda:90") for name in chosen])
