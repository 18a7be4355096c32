"""DeepGEMM: two grouped GEMMs over contiguous experts, with octomoe's kernels around them.

It brings no other part of a layer. Slots of an expert are padded to its alignment; scales of rows
go to it as TMA loads them, so that it does not lay them out anew.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from octomoe import (
    FP8_GROUP128,
    GEMM_READY,
    QTensor,
    Routing,
    activation_quantize,
    permute,
    quantize,
    unpermute,
)
from octomoe.bench.contender import Contender
from octomoe.bench.layers import SCALING, Mode, Problem, choices_of
from octomoe.bench.peers.limits import import_peer, lacks_blocks
from octomoe.kernels.build_routing import build_blocks

_INSTALL: Final = "see https://github.com/deepseek-ai/DeepGEMM"
_BORROWED: Final = "everything but the two GEMMs"


class DeepGEMM:
    """Its grouped GEMMs."""

    name = "deep_gemm"

    def __init__(self, module: ModuleType, version: str) -> None:
        self.module = module
        self.version = version

    @classmethod
    def load(cls) -> "DeepGEMM":
        """From the installed package.

        Raises:
            ImportError: there is none.
        """
        return cls(*import_peer("deep_gemm", "deep_gemm", "2.1", _INSTALL))

    def why_not(self, problem: Problem, mode: Mode) -> str | None:
        """What keeps it from this; None if nothing does."""
        if not hasattr(self.module, "m_grouped_fp8_gemm_nt_contiguous"):
            return f"version {self.version} has no m_grouped_fp8_gemm_nt_contiguous; 2.1 has"
        return lacks_blocks(problem)

    def kernel(self, problem: Problem) -> dict[str, Contender]:
        """From quantised rows and sorted choices on."""
        routing, expert_S = self._sort(problem.topk_ids_TA, problem)
        assert isinstance(problem.x, QTensor)
        x, weights_TA = problem.x.relayout(GEMM_READY), problem.topk_weights_TA * SCALING
        run = partial(self._experts(problem), x, weights_TA, routing, expert_S)
        return {self.name: Contender(run, None, _BORROWED)}

    def layer(self, problem: Problem) -> dict[str, Contender]:
        """From bf16 rows and the router's scores on."""
        experts = self._experts(problem)

        def run() -> Tensor:
            weights_TA, ids_TA = choices_of(problem)
            x = quantize(problem.hidden_TD, FP8_GROUP128, layout=GEMM_READY, backend="triton")
            return experts(x, weights_TA * SCALING, *self._sort(ids_TA, problem))

        return {self.name: Contender(run, None, _BORROWED)}

    def _sort(self, ids_TA: Tensor, problem: Problem) -> tuple[Routing, Tensor]:
        """The routing, and whose every slot is, -1 for nobody's."""
        align = self.module.get_mk_alignment_for_contiguous_layout()
        routing, expert_of_block = build_blocks(ids_TA, problem.experts.num_experts, align=align)
        expert_S = expert_of_block.unsqueeze(1).expand(-1, align).flatten()
        return routing, expert_S

    def _experts(self, problem: Problem) -> Callable[[QTensor, Tensor, Routing, Tensor], Tensor]:
        """The layer on quantised rows."""
        w13, w2 = problem.weights

        def gemm(x: QTensor, w: QTensor, expert_S: Tensor) -> Tensor:
            y_SN = torch.empty(x.shape[0], w.shape[1], dtype=torch.bfloat16, device=x.device)
            # Rows run fastest in memory; there are as many as the alignment divides.
            x_scale_Sd = x.scale.T[: x.shape[0]]
            self.module.m_grouped_fp8_gemm_nt_contiguous(
                (x.data, x_scale_Sd), (w.data, w.scale), y_SN, expert_S
            )
            return y_SN

        def run(x: QTensor, weights_TA: Tensor, routing: Routing, expert_S: Tensor) -> Tensor:
            x_SD = permute(x, routing, backend="triton")
            assert isinstance(x_SD, QTensor)
            h_SN = gemm(x_SD, w13, expert_S)
            h_SF = activation_quantize(
                h_SN,
                problem.experts.activation,
                FP8_GROUP128,
                layout=GEMM_READY,
                backend="triton",
            )
            y_SD = gemm(h_SF, w2, expert_S)
            return unpermute(y_SD, routing, weights_TA, backend="triton")

        return run
