"""Claims: every module imports from its own room and rooms to its left only; other people's
packages stay where they belong; `import octomoe` needs neither Triton nor a GPU; files are short.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "octomoe"
FILES = sorted(PACKAGE.rglob("*.py"))

# Room -> rooms it may import from, besides itself. FACE is `octomoe/__init__.py`.
FACE = "octomoe"
ANYONE = {"errors", "version"}
CORE = ANYONE | {"core"}
OPS = CORE | {"reference", "tune", "kernels", "ops"}
ROOMS = {
    "errors": set(),
    "version": set(),
    "core": ANYONE,
    "reference": CORE,
    "tune": CORE,
    "kernels": CORE | {"tune"},
    "ops": OPS,
    "moe": OPS,
    FACE: OPS | {"moe"},
    "checkpoint": CORE | {"ops"},
    "integrations": OPS | {"moe", FACE, "checkpoint"},
    "evaluate": OPS | {"moe", FACE},
    "bench": OPS | {"moe", FACE, "evaluate"},
    "cli": OPS | {"moe", FACE, "checkpoint", "integrations", "evaluate", "bench"},
    "__main__": {"cli"},
}
# Package -> the folders whose files may import it.
OWNERS = {
    "triton": ("kernels/", "bench/"),
    **dict.fromkeys(
        [
            "lm_eval",
            "megatron",
            "neuronx_distributed",
            "neuronxcc",
            "sgl_kernel",
            "torch_neuronx",
            "torchao",
            "torchtitan",
            "transformer_engine",
            "transformers",
        ],
        ("integrations/",),
    ),
    **dict.fromkeys(
        ["alpha_moe", "deep_gemm", "flashinfer", "sglang", "vllm"],
        ("integrations/", "bench/peers/"),
    ),
}
MAX_LINES = 500

# Module and a line in it that breaks a rule.
VIOLATIONS = [
    ("core/a.py", "import octomoe.ops.quantize"),
    ("core/a.py", "from octomoe.reference import quantize"),
    ("core/a.py", "from octomoe import FP8_ROW"),
    ("core/a.py", "from octomoe import reference"),
    ("core/a.py", "from ..ops import quantize"),
    ("core/a.py", "import triton.language as tl"),
    ("core/a.py", "def f():\n    from octomoe.moe.layer import FusedMoE"),
    ("reference/a.py", "import octomoe.tune.configs"),
    ("tune/a.py", "from octomoe.kernels import quantize"),
    ("kernels/a.py", "from octomoe.ops.check import check_rank"),
    ("ops/a.py", "from octomoe.moe import forward"),
    ("ops/a.py", "import octomoe"),
    ("ops/__init__.py", "from ..moe import forward"),
    ("checkpoint/a.py", "from octomoe.reference import quantize"),
    ("checkpoint/a.py", "from octomoe.moe import forward"),
    ("checkpoint/a.py", "from octomoe.integrations import neuron"),
    ("evaluate/a.py", "from octomoe.integrations.transformers import patch"),
    ("evaluate/a.py", "import transformers"),
    ("evaluate/a.py", "from octomoe.bench import moe"),
    ("bench/a.py", "import vllm"),
    ("bench/peers/a.py", "import transformers"),
    ("bench/a.py", "from octomoe.cli import text"),
    ("cli/a.py", "from importlib import import_module\nimport_module('transformers')"),
    ("__init__.py", "from octomoe.checkpoint.convert import convert_checkpoint"),
    ("errors.py", "from octomoe.core.formats import Format"),
    ("attic/a.py", "import torch"),
]
ALLOWED = [
    ("core/a.py", "from octomoe.errors import refusal\nfrom octomoe.core.formats import ALL"),
    ("core/a.py", "from . import formats\nfrom .formats import ALL"),
    ("kernels/a.py", "import triton\nfrom octomoe.tune.configs import Config"),
    ("ops/a.py", "from importlib import import_module\nimport_module('octomoe.kernels.a')"),
    ("bench/a.py", "import triton\nfrom octomoe.kernels import fused_moe"),
    ("bench/peers/a.py", "import vllm\nfrom octomoe.bench.layers import Shape"),
    ("cli/a.py", "import octomoe\nfrom octomoe.integrations import transformers"),
    ("__init__.py", "from octomoe.moe.layer import FusedMoE"),
]


def imported_modules(path: Path, source: str) -> Iterator[str]:
    """Absolute dotted names of all that `source`, lying at `path` in the package, imports."""
    package = ("octomoe", *path.parent.parts)
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                origin = list(package[: len(package) - level + 1]) if level else []
                origin += [module] if module else []
                yield from (".".join([*origin, alias.name]) for alias in names)
            case ast.Call(
                func=ast.Name(id=name) | ast.Attribute(attr=name),
                args=[ast.Constant(value=str(module)), *_],
            ) if name in ("import_module", "__import__"):
                yield module


def room_of(path: Path) -> str:
    """Room of a file, given its path in the package."""
    if path.parts == ("__init__.py",):
        return FACE
    return path.parts[0].removesuffix(".py")


def violations(path: Path, source: str) -> list[str]:
    """What a module imports although its room may not."""
    room = room_of(path)
    if room not in ROOMS:
        return [f"octomoe/{path} lies in no room"]
    wrong = []
    for module in imported_modules(path, source):
        top, *rest = module.split(".")
        if top == "octomoe":
            other = rest[0] if rest and rest[0] in ROOMS else FACE
            is_allowed = other == room or other in ROOMS[room]
        else:
            is_allowed = path.as_posix().startswith(OWNERS.get(top, ("",)))
        if not is_allowed:
            wrong.append(f"octomoe/{path} ({room}) imports {module}")
    return wrong


def test_no_module_imports_to_its_right():
    wrong = []
    for file in FILES:
        wrong += violations(file.relative_to(PACKAGE), file.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("path", "source"), VIOLATIONS)
def test_a_wrong_import_is_noticed(path: str, source: str):
    assert len(violations(Path(path), source)) == 1


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_a_right_import_is_let_through(path: str, source: str):
    assert violations(Path(path), source) == []


def test_import_and_cpu_ops_need_neither_triton_nor_a_gpu():
    # None in `sys.modules` is how Python spells a package that cannot be found.
    program = """
        import sys

        sys.modules.update(triton=None, transformers=None)
        import octomoe
        import torch

        assert all(hasattr(octomoe, name) for name in octomoe.__all__)
        x = torch.ones(2, 128)
        assert torch.equal(octomoe.quantize(x, octomoe.MXFP8).dequantize(), x)
        assert not torch.cuda.is_initialized()
    """
    command = [sys.executable, "-c", dedent(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_are_short_and_none_is_called_utils():
    for file in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]:
        num_lines = len(file.read_text(encoding="utf-8").splitlines())
        assert num_lines < MAX_LINES, f"{file} has {num_lines} lines"
        assert file.name != "utils.py", file
