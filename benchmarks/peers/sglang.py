"""SGLang's Triton kernels of a block-scaled FP8 MoE layer, without an installed SGLang.

    pip download --no-deps sglang==0.5.23
    PYTHONPATH=. python benchmarks/peers/sglang.py sglang-0.5.23-*.whl FOLDER

takes what is needed out of the published wheel; FOLDER then holds

    kernels.py    the file of Triton kernels and their launchers, unchanged
    configs.json  its version, and every tuned table for FP8 weights in blocks of 128 x 128

What SGLang runs between its two GEMMs are two kernels; here it is octomoe's single one, which is
faster. For more than 32 tokens SGLang sums the experts by a CUDA kernel of another package; here
its Triton one serves any number. Its alignment of tokens is octomoe's too, and not timed.
"""

import argparse
import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe import FP8_GROUP128, ExpertWeights, QTensor, activation_quantize, moe_align_block_size

KERNELS: Final = "sglang/kernels/ops/moe/fused_moe_triton_kernels.py"
TABLE: Final = re.compile(
    r".*/triton_(?P<triton>[\d_]+)/E=(?P<experts>\d+),N=(?P<width>\d+),device_name=(?P<device>[^,]+)"
    r",dtype=fp8_w8a8,block_shape=\[128, 128\](?P<down>_down)?\.json"
)
# What it runs where no table was tuned.
UNTUNED: Final = {
    "BLOCK_SIZE_M": 64,
    "BLOCK_SIZE_N": 128,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 32,
    "num_warps": 4,
    "num_stages": 3,
}


@dataclass(frozen=True, eq=False)
class Peer:
    """The loaded kernels.

    Attributes:
        version: of SGLang.
        kernels: its file of kernels.
        tables: its tuned configurations: for which Triton, experts, width, device and projection,
            and `entries` by number of tokens.
    """

    version: str
    kernels: ModuleType
    tables: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What SGLang would run a layer with.

    Attributes:
        up, down: options of the kernel for either projection, by its names.
        is_up_tma, is_down_tma: whether operands are loaded by TMA. With `is_down_tma` the
            intermediate lies in the order of the experts, padding included.
        source: where the entries are from, in words.
    """

    up: dict[str, int]
    down: dict[str, int]
    is_up_tma: bool
    is_down_tma: bool
    source: str


def extract(wheel: Path, folder: Path) -> None:
    """Take kernels and tables out of a wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        (folder / "kernels.py").write_bytes(archive.read(KERNELS))
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


def load(folder: Path) -> Peer:
    """Import the kernels of a folder that `extract` made."""
    spec = importlib.util.spec_from_file_location("sglang_kernels", folder / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Triton looks up a kernel's module by name.
    sys.modules[spec.name] = module
    with _stand_ins():
        spec.loader.exec_module(module)
    configs = json.loads((folder / "configs.json").read_text(encoding="utf-8"))
    return Peer(configs["sglang"], module, configs["tables"])


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Modules in place of those of SGLang from which the kernels' file takes names."""

    def unused(*_args: object, **_options: object) -> None:
        raise RuntimeError("this peer takes activations that are quantised already")

    quantizers = (
        ("fp8", "per_token_group_quant_fp8 scaled_fp8_quant sglang_per_token_group_quant_fp8"),
        ("int8", "per_token_group_quant_int8 per_token_quant_int8"),
        ("int8", "sglang_per_token_group_quant_int8"),
    )
    names: dict[str, dict[str, object]] = {
        # The interpreter has no launches that overlap.
        "sglang.kernels.jit.utils": {"is_arch_support_pdl": torch.cuda.is_available},
        "sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": lambda: False},
        "sglang.srt.environ": {"envs": _Unset()},
        "sglang.srt.layers.moe.utils": {"get_moe_padding_size": lambda _: 0},
        "sglang.srt.utils": {
            "cpu_has_amx_support": lambda: False,
            "is_cpu": lambda: False,
            "is_cuda": lambda: True,
            "is_hip": lambda: False,
            "is_sm90_supported": lambda: True,
        },
    }
    for kind, functions in quantizers:
        module = names.setdefault(f"sglang.kernels.ops.quantization.{kind}_kernel", {})
        module.update(dict.fromkeys(functions.split(), unused))
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


def choose_config(
    peer: Peer,
    experts: int,
    width: int,
    num_tokens: int,
    *,
    device: str = "NVIDIA H200",
    triton_version: str = triton.__version__,
) -> LayerConfig:
    """The entries that SGLang would take: its own Triton's table, else that of the newest Triton;
    of a table the entry of the nearest number of tokens. A layer without a table of its
    down-projection uses the up-projection's."""
    known = [
        table
        for table in peer.tables
        if (table["experts"], table["width"]) == (experts, width)
        and table["device"] == device.replace(" ", "_")
    ]
    known.sort(key=lambda table: _age(table["triton"], triton_version))
    ups = [table for table in known if table["projection"] == "up"]
    downs = [table for table in known if table["projection"] == "down"]
    if not ups:
        return LayerConfig(dict(UNTUNED), dict(UNTUNED), False, False, "untuned")
    up = nearest(ups[0]["entries"], num_tokens)
    is_up_tma = bool(up.pop("USE_TMA", False))
    down, is_down_tma, source = dict(up), False, "none for down"
    if downs:
        down = nearest(downs[0]["entries"], num_tokens)
        is_down_tma = bool(down.pop("USE_TMA", False))
        source = f"down for Triton {downs[0]['triton']}"
    # Both projections share one alignment of the tokens.
    down["BLOCK_SIZE_M"] = up["BLOCK_SIZE_M"]
    source = f"tuned for Triton {ups[0]['triton']}, {source}"
    return LayerConfig(up, down, is_up_tma, is_down_tma, source)


def _age(version: str, wanted: str) -> tuple[bool, list[int]]:
    """Sorts the wanted version first, then newer ones before older."""
    return version != wanted, [-int(part) for part in version.split(".")]


def nearest(entries: dict[str, dict[str, Any]], num_tokens: int) -> dict[str, Any]:
    """A copy of the entry of the nearest number of tokens, the first of two as near."""
    return dict(entries[min(entries, key=lambda key: abs(int(key) - num_tokens))])


def fused_experts(
    peer: Peer,
    config: LayerConfig,
    x: QTensor,
    experts: ExpertWeights,
    topk_weights_TA: Tensor,
    topk_ids_TA: Tensor,
    routed_scaling_factor: float,
) -> Callable[[], Tensor]:
    """What runs the layer on quantised rows, from the up-projection to the sum over experts.

    `topk_ids_TA` are int32, `topk_weights_TA` float32, scales COMPACT. Outputs of the kernels are
    allocated once.
    """
    w13, w2 = experts.w13, experts.w2
    assert isinstance(w13, QTensor)
    assert isinstance(w2, QTensor)
    num_tokens, num_choices = topk_ids_TA.shape
    blocks = moe_align_block_size(
        topk_ids_TA, config.up["BLOCK_SIZE_M"], experts.num_experts, backend="triton"
    )
    padded = blocks.sorted_token_ids.shape[0]
    num_slots = padded if config.is_down_tma else num_tokens * num_choices
    empty = partial(torch.empty, dtype=torch.bfloat16, device=x.device)
    h_SN = empty((num_slots, w13.shape[1]))
    y_TAD = empty((num_tokens, num_choices, w2.shape[1]))
    y_TD = empty((num_tokens, w2.shape[1]))
    routing = (
        topk_weights_TA,
        topk_ids_TA,
        blocks.sorted_token_ids,
        blocks.expert_ids,
        blocks.num_tokens_post_padded,
    )

    def gemm(x: QTensor, w: QTensor, y: Tensor, is_down: bool) -> None:
        peer.kernels.invoke_fused_moe_kernel(
            *(x.data, w.data, None, y, x.scale, w.scale, None),
            *routing,
            mul_routed_weight=is_down,
            # Rows of the intermediate belong to one choice each.
            top_k=1 if is_down else num_choices,
            config=config.down if is_down else config.up,
            compute_type=tl.bfloat16,
            use_fp8_w8a8=True,
            use_int8_w8a8=False,
            use_int8_w8a16=False,
            use_int4_w4a16=False,
            per_channel_quant=False,
            block_shape=[128, 128],
            a_use_tma=is_down and config.is_down_tma,
            b_use_tma=config.is_down_tma if is_down else config.is_up_tma,
            c_sorted=not is_down and config.is_down_tma,
        )

    def run() -> Tensor:
        gemm(x, w13, h_SN, is_down=False)
        h = activation_quantize(h_SN, experts.activation, FP8_GROUP128, backend="triton")
        gemm(h, w2, y_TAD, is_down=True)
        peer.kernels.moe_sum_reduce_triton(y_TAD, y_TD, routed_scaling_factor)
        return y_TD

    return run


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
