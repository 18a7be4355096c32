"""SGLang's Triton kernels of a block-scaled FP8 layer, out of its wheel (`sglang_wheel`).

Three parts of SGLang are CUDA, which it compiles where all of its packages are. Here octomoe sorts
the choices; octomoe activates and quantises the intermediate in one launch instead of two; and the
experts of any number of tokens are summed by SGLang's own Triton kernel, as it does for up to 32.
Rows are quantised by its own Triton kernel, and, as that is slow, by octomoe's in a further
contender.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octomoe import (
    FP8_GROUP128,
    BlockRouting,
    QTensor,
    activation_quantize,
    moe_align_block_size,
    quantize,
)
from octomoe.bench.contender import Contender
from octomoe.bench.layers import SCALING, Mode, Problem, choices_of
from octomoe.bench.peers import sglang_wheel
from octomoe.bench.peers.limits import lacks_blocks
from octomoe.core.device import Target

# What it runs where no table was tuned.
UNTUNED: Final = {
    "BLOCK_SIZE_M": 64,
    "BLOCK_SIZE_N": 128,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 32,
    "num_warps": 4,
    "num_stages": 3,
}
_BORROWED: Final = "sorting of choices, activation and quantisation of the intermediate"


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


class SGLang:
    """Its kernels under the configurations that it ships."""

    name = "sglang"

    def __init__(self, files: sglang_wheel.Files) -> None:
        self.files = files
        self.version = files.version

    @classmethod
    def load(cls, folder: Path) -> "SGLang":
        """From a folder that `sglang_wheel` made."""
        return cls(sglang_wheel.load(folder))

    def why_not(self, problem: Problem, mode: Mode) -> str | None:
        """What keeps it from this; None if nothing does."""
        if mode is Mode.LAYER and self.files.quantize is None:
            return "its folder has no quantize.py: take its wheel apart anew"
        return lacks_blocks(problem)

    def kernel(self, problem: Problem) -> dict[str, Contender]:
        """From quantised rows and sorted choices on."""
        config = self._config_of(problem)
        blocks = _sort(problem.topk_ids_TA, config, problem)
        assert isinstance(problem.x, QTensor)
        weights_TA, ids_TA = problem.topk_weights_TA, problem.topk_ids_TA
        run = self._experts(config, problem)
        run = partial(run, problem.x.data, problem.x.scale, weights_TA, ids_TA, blocks)
        return {"sglang": Contender(run, asdict(config), _BORROWED)}

    def layer(self, problem: Problem) -> dict[str, Contender]:
        """From bf16 rows and the router's scores on; rows quantised by its kernel, and by ours."""
        config = self._config_of(problem)
        experts = self._experts(config, problem)
        assert self.files.quantize is not None
        theirs = partial(self.files.quantize._per_token_group_quant_8bit_raw, group_size=128)

        def ours(hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
            x = quantize(hidden_TD, FP8_GROUP128, backend="triton")
            return x.data, x.scale

        def run(quantize_rows: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
            weights_TA, ids_TA = choices_of(problem)
            blocks = _sort(ids_TA, config, problem)
            return experts(*quantize_rows(problem.hidden_TD), weights_TA, ids_TA, blocks)

        return {
            "sglang": Contender(partial(run, theirs), asdict(config), _BORROWED),
            "sglang, rows by octomoe": Contender(
                partial(run, ours), asdict(config), f"{_BORROWED}, quantisation of rows"
            ),
        }

    def _config_of(self, problem: Problem) -> LayerConfig:
        experts = problem.experts
        sizes = experts.num_experts, experts.intermediate_size, problem.num_tokens
        name = Target.of(problem.hidden_TD.device).name
        return choose_config(self.files.tables, *sizes, device=name)

    def _experts(self, config: LayerConfig, problem: Problem) -> Callable[..., Tensor]:
        """The two projections and what follows each."""
        kernels = self.files.kernels
        # It holds on to weights that it has seen.
        kernels.clear_b_tma_desc_cache()
        return partial(fused_experts, kernels, config, problem)


def _sort(ids_TA: Tensor, config: LayerConfig, problem: Problem) -> BlockRouting:
    rows = config.up["BLOCK_SIZE_M"]
    return moe_align_block_size(ids_TA, rows, problem.experts.num_experts, backend="triton")


def fused_experts(
    kernels: Any,
    config: LayerConfig,
    problem: Problem,
    x_TD: Tensor,
    x_scale_Td: Tensor,
    topk_weights_TA: Tensor,
    topk_ids_TA: Tensor,
    blocks: BlockRouting,
) -> Tensor:
    """The layer on quantised rows, from the up-projection to the sum over experts."""
    w13, w2 = problem.weights
    num_tokens, num_choices = topk_ids_TA.shape
    padded = blocks.sorted_token_ids.shape[0]
    num_slots = padded if config.is_down_tma else num_tokens * num_choices
    empty = partial(torch.empty, dtype=torch.bfloat16, device=x_TD.device)
    h_SN = empty((num_slots, w13.shape[1]))
    y_TAD = empty((num_tokens, num_choices, w2.shape[1]))
    y_TD = empty((num_tokens, w2.shape[1]))

    def gemm(x: Tensor, x_scale: Tensor, w: QTensor, y: Tensor, is_down: bool) -> None:
        kernels.invoke_fused_moe_kernel(
            *(x, w.data, None, y, x_scale, w.scale, None),
            topk_weights_TA,
            topk_ids_TA,
            blocks.sorted_token_ids,
            blocks.expert_ids,
            blocks.num_tokens_post_padded,
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

    gemm(x_TD, x_scale_Td, w13, h_SN, is_down=False)
    h = activation_quantize(h_SN, problem.experts.activation, FP8_GROUP128, backend="triton")
    gemm(h.data, h.scale, w2, y_TAD, is_down=True)
    kernels.moe_sum_reduce_triton(y_TAD, y_TD, SCALING)
    return y_TD


def choose_config(
    tables: list[dict[str, Any]],
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
        for table in tables
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
