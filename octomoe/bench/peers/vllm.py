"""vLLM: `fused_experts`, its Triton kernels under its tuned tables; quantises and sorts inside."""

from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Final

from torch import Tensor

from octomoe.bench.contender import Contender
from octomoe.bench.layers import SCALING, Mode, Problem, choices_of
from octomoe.bench.peers.limits import import_peer, lacks_blocks

_MODULE: Final = "vllm.model_executor.layers.fused_moe.config"
_INSTALL: Final = "pip install vllm"


class VLLM:
    """Its layer of experts."""

    name = "vllm"

    def __init__(self, config: ModuleType, version: str) -> None:
        self.config = config
        self.version = version

    @classmethod
    def load(cls) -> "VLLM":
        """From the installed package.

        Raises:
            ImportError: there is none.
        """
        return cls(*import_peer(_MODULE, "vllm", "0.11", _INSTALL))

    def why_not(self, problem: Problem, mode: Mode) -> str | None:
        """What keeps it from this; None if nothing does."""
        if mode is Mode.KERNEL:
            return "it quantises rows and sorts choices inside: only whole layers are compared"
        return lacks_blocks(problem)

    def kernel(self, problem: Problem) -> dict[str, Contender]:
        """Nothing: see `why_not`."""
        return {}

    def layer(self, problem: Problem) -> dict[str, Contender]:
        """From bf16 rows and the router's scores on."""
        # Here, not above: all of vLLM is imported with them.
        fused_moe = import_module("vllm.model_executor.layers.fused_moe")
        engine = import_module("vllm.config")
        w13, w2 = problem.weights
        formats = self.config.fp8_w8a8_moe_quant_config(
            w1_scale=w13.scale, w2_scale=w2.scale, block_shape=[128, 128]
        )
        experts = partial(fused_moe.fused_experts, problem.hidden_TD, w13.data, w2.data)
        defaults = engine.VllmConfig()

        def run() -> Tensor:
            weights_TA, ids_TA = choices_of(problem)
            with engine.set_current_vllm_config(defaults):
                y_TD: Tensor = experts(weights_TA * SCALING, ids_TA, quant_config=formats)
            return y_TD

        return {self.name: Contender(run)}
