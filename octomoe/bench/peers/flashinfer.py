"""FlashInfer: `cutlass_fused_moe` with 128 x 128 scales, on Hopper; quantises and sorts inside.

It tunes itself for a problem before that is timed. Up rows come before gate rows there: they are
swapped once.
"""

from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from octomoe.bench.contender import Contender
from octomoe.bench.layers import SCALING, Mode, Problem, choices_of
from octomoe.bench.peers.limits import import_peer, lacks_blocks
from octomoe.core.device import Target

_INSTALL: Final = "pip install flashinfer-python"


class FlashInfer:
    """Its layer of experts."""

    name = "flashinfer"

    def __init__(self, module: ModuleType, version: str) -> None:
        self.module = module
        self.version = version

    @classmethod
    def load(cls) -> "FlashInfer":
        """From the installed package.

        Raises:
            ImportError: there is none.
        """
        return cls(*import_peer("flashinfer.fused_moe", "flashinfer-python", "0.4", _INSTALL))

    def why_not(self, problem: Problem, mode: Mode) -> str | None:
        """What keeps it from this; None if nothing does."""
        if mode is Mode.KERNEL:
            return "it quantises rows and sorts choices inside: only whole layers are compared"
        target = Target.of(problem.hidden_TD.device)
        if target.arch != 90:
            return (
                f"its kernels for 128 x 128 scales need compute capability 9.0, not {target.name}"
            )
        return lacks_blocks(problem)

    def kernel(self, problem: Problem) -> dict[str, Contender]:
        """Nothing: see `why_not`."""
        return {}

    def layer(self, problem: Problem) -> dict[str, Contender]:
        """From bf16 rows and the router's scores on."""
        w13, w2 = problem.weights
        y_TD = torch.empty_like(problem.hidden_TD)
        experts = partial(
            self.module.cutlass_fused_moe,
            input=problem.hidden_TD,
            fc1_expert_weights=_swap(w13.data.view(torch.uint8)).view(w13.data.dtype),
            fc2_expert_weights=w2.data,
            output_dtype=problem.hidden_TD.dtype,
            quant_scales=[_swap(w13.scale), w2.scale],
            use_deepseek_fp8_block_scale=True,
            output=y_TD,
        )

        def run() -> Tensor:
            weights_TA, ids_TA = choices_of(problem)
            experts(token_selected_experts=ids_TA, token_final_scales=weights_TA * SCALING)
            return y_TD

        with import_module("flashinfer").autotune(True):
            run()
        return {self.name: Contender(run)}


def _swap(x: Tensor) -> Tensor:
    """The second half of the rows ``[E, rows, columns]``, then the first."""
    first, second = x.chunk(2, dim=1)
    return torch.cat([second, first], dim=1)
