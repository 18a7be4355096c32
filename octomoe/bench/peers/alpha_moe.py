"""Alpha-MoE: a block-scaled layer as one CUDA kernel, which adds to an output that was zeroed.

It runs under what its own `jit_moe.py` found best, in the file that ALPHA_MOE_CONFIG names, as in
an engine. Rows of the up-projection are interleaved once, 8 gate rows and 8 up rows. It brings no
kernel that quantises rows or sorts choices: octomoe's do.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from octomoe import FP8_GROUP128, BlockRouting, QTensor, moe_align_block_size, quantize
from octomoe.bench.contender import Contender
from octomoe.bench.layers import SCALING, Mode, Problem, choices_of
from octomoe.bench.peers.limits import import_peer, lacks_blocks

_CONFIG: Final = "ALPHA_MOE_CONFIG"
_INSTALL: Final = "pip install --no-build-isolation git+https://github.com/Aleph-Alpha/Alpha-MoE"
# Of its kernel, in its order.
_OPTIONS: Final = ("block_m", "block_n", "warp_n", "stages")


class AlphaMoE:
    """Its kernel under its tuned configurations."""

    name = "alpha_moe"

    def __init__(self, version: str) -> None:
        self.version = version

    @classmethod
    def load(cls) -> "AlphaMoE":
        """From the installed package.

        Raises:
            ImportError: there is none.
        """
        return cls(import_peer("alpha_moe", "alpha_moe", "0.1", _INSTALL)[1])

    def why_not(self, problem: Problem, mode: Mode) -> str | None:
        """What keeps it from this; None if nothing does."""
        path = os.environ.get(_CONFIG, "")
        if not Path(path).is_file():
            return f"{_CONFIG} names no file of configurations, which its jit_moe.py makes"
        return lacks_blocks(problem)

    def kernel(self, problem: Problem) -> dict[str, Contender]:
        """From quantised rows and sorted choices on; zeroing is timed."""
        config = _config_of(problem)
        assert isinstance(problem.x, QTensor)
        blocks = _sort(problem.topk_ids_TA, config, problem)
        run = partial(_experts(config, problem), problem.x, problem.topk_weights_TA, blocks)
        return {self.name: Contender(run, config, "sorting of choices")}

    def layer(self, problem: Problem) -> dict[str, Contender]:
        """From bf16 rows and the router's scores on."""
        config = _config_of(problem)
        experts = _experts(config, problem)

        def run() -> Tensor:
            weights_TA, ids_TA = choices_of(problem)
            x = quantize(problem.hidden_TD, FP8_GROUP128, backend="triton")
            return experts(x, weights_TA, _sort(ids_TA, config, problem))

        return {self.name: Contender(run, config, "sorting of choices, quantisation of rows")}


def _config_of(problem: Problem) -> dict[str, int]:
    """Of the nearest number of tokens."""
    entries: dict[str, dict[str, int]]
    entries = json.loads(Path(os.environ[_CONFIG]).read_text(encoding="utf-8"))
    return entries[min(entries, key=lambda key: abs(int(key) - problem.num_tokens))]


def _sort(ids_TA: Tensor, config: dict[str, int], problem: Problem) -> BlockRouting:
    num_experts = problem.experts.num_experts
    return moe_align_block_size(ids_TA, config["block_m"], num_experts, backend="triton")


def _experts(
    config: dict[str, int], problem: Problem
) -> Callable[[QTensor, Tensor, BlockRouting], Tensor]:
    """The layer on quantised rows."""
    w13, w2 = problem.weights
    w13_data, w13_scale = interleave(w13.data.view(torch.uint8), 8), interleave(w13.scale, 1)
    kernel: Any = torch.ops.alpha_moe.fused_moe_w8a8_up_down

    def run(x: QTensor, topk_weights_TA: Tensor, blocks: BlockRouting) -> Tensor:
        y_TD = torch.zeros_like(problem.hidden_TD)
        kernel(
            *(x.data, x.scale),
            *(w13_data.view(w13.data.dtype), w13_scale, w2.data, w2.scale),
            blocks.sorted_token_ids,
            blocks.expert_ids,
            blocks.num_tokens_post_padded,
            *(topk_weights_TA, y_TD, topk_weights_TA.shape[1]),
            *(config[option] for option in _OPTIONS),
            SCALING,
        )
        return y_TD

    return run


def interleave(x: Tensor, chunk: int) -> Tensor:
    """The first and the second half of ``x [E, rows, columns]``, `chunk` rows of each in turn.

    >>> interleave(torch.arange(8).view(1, 8, 1), 2).flatten().tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    num_experts, _, columns = x.shape
    halves = x.view(num_experts, 2, -1, chunk, columns)
    return halves.transpose(1, 2).reshape(x.shape)
