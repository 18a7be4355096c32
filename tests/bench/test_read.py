"""The kernel that only reads compiles for Hopper: by 16 bytes, and within the registers.

A process that interprets kernels cannot compile them: another one does.
"""

import os
import subprocess
import sys
from textwrap import dedent

PROGRAM = """
    import re
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from octomoe.bench.read import READS, _read_kernel

    pointers = ("w13_ptr", "w2_ptr", "active_ptr")
    counts = ("num_active", "num_words_13", "num_words_2")
    types = dict.fromkeys(pointers, "*i32") | {"out_ptr": "*i64"} | dict.fromkeys(counts, "i32")
    multiples = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 5, 6)}
    for config in READS:
        source = ASTSource(
            _read_kernel, types | {"WORDS": "constexpr"}, {"WORDS": config.words}, multiples
        )
        options = {"num_warps": config.num_warps}
        made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        loads = re.findall(r"ld\\.global\\.v4\\.b32", made.asm["ptx"])
        per_thread = config.words // (32 * config.num_warps)
        assert len(loads) == 2 * per_thread // 4, (config, len(loads))
        assert per_thread <= 32
    print("compiled")
"""


def test_words_are_loaded_four_at_a_time(tmp_path):
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", dedent(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "compiled\n", done.stderr
