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
from octomoe.kernels.fused_moe_sm90 import experts_forward
from octomoe.tune.configs import PrefillConfig
from octomoe.tune.fused_moe import PREFILL_CONFIGS

EXPERTS, TOKENS, CHOICES, HIDDEN, WIDTH = 16, 64, 4, 4096, 384
PAIRS = {
    "block128 x group128": (FP8_BLOCK128, FP8_GROUP128),
    "channel x token": (FP8_CHANNEL, FP8_TOKEN),
    "tensor x tensor": (FP8_TENSOR, FP8_TENSOR),
}
ACTIVATIONS = (
    SILU,
    SWIGLU_OAI,
    Activation.parse("gelu"),
    Activation.parse("gelu_tanh"),
    Activation.parse("relu2:ungated"),
)


def layer(pair: str, activation: Activation, config: PrefillConfig, *, has_bias: bool) -> None:
    """A layer, from quantised rows to the sum over experts."""
    weights, activations = PAIRS[pair]
    parts = 2 if activation.gated else 1
    biases = {}
    if has_bias:
        biases["w13_bias"] = torch.empty(EXPERTS, parts * WIDTH)
        biases["w2_bias"] = torch.empty(EXPERTS, HIDDEN)
    experts = ExpertWeights(
        in_memory((EXPERTS, parts * WIDTH, HIDDEN), weights),
        in_memory((EXPERTS, HIDDEN, WIDTH), weights),
        activation,
        **biases,
    )
    routing = Routing(
        torch.empty(EXPERTS + 1, dtype=torch.int32),
        torch.empty(TOKENS, CHOICES, dtype=torch.int32),
        torch.empty(1024, dtype=torch.int32),
        config.rows,
    )
    x = in_memory((TOKENS, HIDDEN), activations)
    assert isinstance(x, QTensor)
    experts_forward(
        x,
        experts,
        torch.empty(TOKENS, CHOICES),
        routing,
        torch.empty(1024 // config.rows, dtype=torch.int32),
        out_dtype=torch.bfloat16,
        routed_scaling_factor=1.0,
        config=config,
    )


CASES = {
    f"{pair} {activation.name}{' bias' if has_bias else ''} {config.rows} rows": (
        pair,
        activation,
        config,
        has_bias,
    )
    for pair, activation, config, has_bias in product(
        PAIRS, ACTIVATIONS, PREFILL_CONFIGS, (False, True)
    )
    # A bias is added wherever products are scaled, whatever is activated behind it.
    if not has_bias or activation is SWIGLU_OAI
}


def compile_case(name: str, target: str) -> list[dict[str, object]]:
    """A record per kernel of a case."""
    pair, activation, config, has_bias = CASES[name]
    about = {"case": name, "target": target}
    return compile_launches(lambda: layer(pair, activation, config, has_bias=has_bias), about)


if __name__ == "__main__":
    main(compile_case, [(name, "cuda:90") for name in CASES])
