"""SGLang's wheel: what is needed of it taken out, and imported without an installed SGLang.

    pip download --no-deps sglang==0.5.23
    python -m octomoe.bench.peers.sglang_wheel sglang-0.5.23-*.whl FOLDER

FOLDER then holds

    kernels.py    the file of Triton kernels and their launchers, unchanged
    quantize.py   the file of those that quantise rows, unchanged
    configs.json  its version, and every tuned table for FP8 weights in blocks of 128 x 128
"""

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

from octomoe.errors import refusal

# File of a folder -> of the wheel.
FILES: Final = {
    "kernels.py": "sglang/kernels/ops/moe/fused_moe_triton_kernels.py",
    "quantize.py": "sglang/kernels/ops/quantization/fp8_kernel.py",
}
TABLE: Final = re.compile(
    r".*/triton_(?P<triton>[\d_]+)/E=(?P<experts>\d+),N=(?P<width>\d+),device_name=(?P<device>[^,]+)"
    r",dtype=fp8_w8a8,block_shape=\[128, 128\](?P<down>_down)?\.json"
)


@dataclass(frozen=True, eq=False)
class Files:
    """What a folder holds, loaded.

    Attributes:
        version: of SGLang.
        kernels: its file of kernels.
        quantize: its file of those that quantise rows; None in folders made before it was taken.
        tables: its tuned configurations: for which Triton, experts, width, device and projection,
            and `entries` by number of tokens.
    """

    version: str
    kernels: ModuleType
    quantize: ModuleType | None
    tables: list[dict[str, Any]]


def extract(wheel: Path, folder: Path) -> None:
    """Take kernels and tables out of a wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for file, name in FILES.items():
            (folder / file).write_bytes(archive.read(name))
        tables = []
        for name in sorted(archive.namelist()):
            match = TABLE.fullmatch(name)
            if match is None:
                continue
            about = {
                "triton": match["triton"].replace("_", "."),
                "experts": int(match["experts"]),
                "width": int(match["width"]),
                "device": match["device"],
                "projection": "down" if match["down"] else "up",
            }
            tables.append(about | {"entries": json.loads(archive.read(name))})
    text = json.dumps({"sglang": wheel.name.split("-")[1], "tables": tables})
    (folder / "configs.json").write_text(text, encoding="utf-8")


def load(folder: Path) -> Files:
    """Import the kernels of a folder that `extract` made.

    Raises:
        FileNotFoundError: it was not made by `extract`.
    """
    for file in ("kernels.py", "configs.json"):
        if not (folder / file).is_file():
            needs = "a folder with kernels.py and configs.json"
            do = "make it by: python -m octomoe.bench.peers.sglang_wheel WHEEL FOLDER"
            got = f"is {folder}, which has no {file}"
            raise FileNotFoundError(refusal("bench moe", "--sglang", got, needs, do))
    configs = json.loads((folder / "configs.json").read_text(encoding="utf-8"))
    with _stand_ins():
        kernels = _import("sglang_kernels", folder / "kernels.py")
        quantize = folder / "quantize.py"
        module = _import("sglang_quantize", quantize) if quantize.is_file() else None
    return Files(configs["sglang"], kernels, module, configs["tables"])


def _import(name: str, path: Path) -> ModuleType:
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Triton looks up a kernel's module by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Modules in place of those of SGLang from which the files take names."""

    def unused(*_args: object, **_options: object) -> None:
        raise RuntimeError("of this peer only Triton kernels are run")

    ops = "sglang.kernels.ops.quantization"
    names: dict[str, dict[str, object]] = {
        # The interpreter has no launches that overlap.
        "sglang.kernels.jit.utils": {"is_arch_support_pdl": torch.cuda.is_available},
        "sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": lambda: False},
        "sglang.srt.environ": {"envs": _Unset()},
        "sglang.srt.layers.moe.utils": {"get_moe_padding_size": lambda _: 0},
        "sglang.srt.utils": {
            "ceil_align": lambda size, multiple: -(-size // multiple) * multiple,
            "cpu_has_amx_support": lambda: False,
            "is_cpu": lambda: False,
            "is_cuda": lambda: True,
            "is_hip": lambda: False,
            "is_musa": lambda: False,
            "is_sm90_supported": lambda: True,
            "is_xpu": lambda: False,
        },
        "sglang.srt.utils.patch_torch": {},
    }
    functions = (
        (f"{ops}.fp8_kernel", "per_token_group_quant_fp8 scaled_fp8_quant"),
        (f"{ops}.fp8_kernel", "sglang_per_token_group_quant_fp8"),
        (f"{ops}.fp8_utils", "fp8_dtype_to_triton"),
        (f"{ops}.int8_kernel", "per_token_group_quant_int8 per_token_quant_int8"),
        (f"{ops}.int8_kernel", "sglang_per_token_group_quant_int8"),
        (f"{ops}.per_tensor_quant_fp8", "per_tensor_quant_fp8"),
        (f"{ops}.per_token_group_quant", "per_token_group_quant"),
        (ops, "sgl_per_token_quant_fp8"),
        ("sglang.srt.utils.patch_torch", "register_fake_if_exists"),
    )
    for module, wanted in functions:
        names.setdefault(module, {}).update(dict.fromkeys(wanted.split(), unused))
    before = {name: sys.modules.get(name) for name in names}
    for name, content in names.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(content)
    try:
        yield
    finally:
        for name, module_before in before.items():
            if module_before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module_before


class _Unset:
    """Environment variables, none of which is set."""

    def __getattr__(self, name: str) -> "_Unset":
        return self

    def get(self) -> bool:
        return False


def main() -> None:
    """Extract."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    extract(options.wheel, options.folder)


if __name__ == "__main__":
    main()
