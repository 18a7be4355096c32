"""Compile Hopper's kernels without a GPU; see `offline.py`.

python tests/kernels/offline_sm90.py
"""

from itertools import product

import torch
from offline import compile_launches, in_memory, main

from octomoe.core.activations import SILU, SWIGLU_OAI, Activation
from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import FP8_BLOCK128, FP8_CHANNEL, FP8_GROUP128, FP8_TENSOR, FP8_TOKEN
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.fused_down_sm90 import fused_down
from octomoe.kernels.fused_up_sm90 import fused_up
from octomoe.tune.configs import PrefillConfig
from octomoe.tune.fused_moe import PREFILL_CONFIGS

EXPERTS, TOKENS, CHOICES, HIDDEN, WIDTH = 16, 64, 4, 4096, 384
SLOTS = 1024
PAIRS = {
    "block128 x group128": (FP8_BLOCK128, FP8_GROUP128),
    "channel x token": (FP8_CHANNEL, FP8_TOKEN),
    "tensor x static": (FP8_TENSOR, FP8_TENSOR),
}
# Of an activation, and whether there are biases.
ACTIVATIONS = {
    "silu": (SILU, False),
    "swiglu_oai": (SWIGLU_OAI, False),
    "swiglu_oai with biases": (SWIGLU_OAI, True),
    "gelu": (Activation.parse("gelu"), False),
    "gelu_tanh": (Activation.parse("gelu_tanh"), False),
    "relu2 ungated": (Activation.parse("relu2:ungated"), False),
}
CASES = {
    f"{pair} {name} {config.rows} rows": (pair, name, config)
    for pair, name, config in product(PAIRS, ACTIVATIONS, PREFILL_CONFIGS)
    # What follows the products is the same for all; these fill the registers most.
    if pair == "block128 x group128" or name in ("swiglu_oai with biases", "gelu")
}


def halves(pair: str, name: str, config: PrefillConfig) -> None:
    """Both halves of a layer."""
    weights, activations = PAIRS[pair]
    activation, has_bias = ACTIVATIONS[name]
    rows = WIDTH * (2 if activation.gated else 1)
    static = torch.ones(1, 1) if pair == "tensor x static" else None
    experts = ExpertWeights(
        in_memory((EXPERTS, rows, HIDDEN), weights),
        in_memory((EXPERTS, HIDDEN, WIDTH), weights),
        activation,
        torch.empty(EXPERTS, rows) if has_bias else None,
        torch.empty(EXPERTS, HIDDEN) if has_bias else None,
        static,
        static,
    )
    routing = Routing(
        torch.empty(EXPERTS + 1, dtype=torch.int32),
        torch.empty(TOKENS, CHOICES, dtype=torch.int32),
        torch.empty(SLOTS, dtype=torch.int32),
        config.rows,
    )
    expert_of_block = torch.empty(SLOTS // config.rows, dtype=torch.int32)
    x, h = in_memory((TOKENS, HIDDEN), activations), in_memory((SLOTS, WIDTH), activations)
    assert isinstance(x, QTensor)
    assert isinstance(h, QTensor)
    made = fused_up(x, experts, routing, expert_of_block, config)
    fused_down(made if isinstance(made, QTensor) else h, experts, routing, expert_of_block, config)


def compile_case(name: str, target: str) -> list[dict[str, object]]:
    """A record per kernel of a case."""
    return compile_launches(lambda: halves(*CASES[name]), {"case": name, "target": target})


if __name__ == "__main__":
    main(compile_case, [(name, "cuda:90") for name in CASES])
