"""README's code runs, and its tables are those of the newest records."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_ten_line_example_prints_a_small_error(capsys):
    code = re.search(r"```python\n(import torch\n.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(compile(code[1], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    error, after, before = re.match(r"relative error (\S+), (\d+) bytes, (\d+)", printed).groups()
    # 24 dB, the noise of two FP8 operands in two GEMMs.
    assert 0.04 < float(error) < 0.08
    assert int(after) < 0.26 * int(before)


def test_tables_are_made_from_the_newest_records():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_tables.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
