"""Compile Hopper's kernels for few rows without a GPU; see `offline.py`.

python tests/kernels/offline_decode_sm90.py
"""

from dataclasses import replace

import torch
from offline import compile_launches, in_memory, main

from octomoe.core.activations import SILU, SWIGLU_OAI, Activation
from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_GROUP128,
    FP8_TENSOR,
    FP8_TOKEN,
    MXFP8,
)
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.decode_moe_sm90 import experts_forward
from octomoe.tune.configs import DecodeConfig

EXPERTS, CHOICES, HIDDEN, WIDTH, SLOTS = 16, 8, 4096, 384, 1024
PAIRS = {
    "block128 x group128": (FP8_BLOCK128, FP8_GROUP128),
    "channel x token": (FP8_CHANNEL, FP8_TOKEN),
    "tensor x static": (FP8_TENSOR, FP8_TENSOR),
    "block128 x bf16": (FP8_BLOCK128, None),
    "channel x bf16": (FP8_CHANNEL, None),
    "mxfp8 x mxfp8": (MXFP8, MXFP8),
}
IN_PIECES = ("block128 x bf16", "channel x bf16", "mxfp8 x mxfp8")
ONE = DecodeConfig(8, 128, splits=2, up_stages=4, down_stages=2, combined=128)
SORTED = {"is_encoded": True, "is_sorted": True}
# Tokens and how they are run: what heuristics choose, and what tables may.
CONFIGS = {
    "one token": (1, ONE),
    "one token in four parts": (1, replace(ONE, splits=4)),
    "eight tokens, sorted by programs": (8, replace(ONE, splits=1, is_encoded=True)),
    "few rows": (32, DecodeConfig(8, 256, up_stages=6, down_stages=3, **SORTED)),
    "rows in pieces": (32, DecodeConfig(8, 128, up_stages=5, down_stages=4, is_sorted=True)),
    "some rows": (128, DecodeConfig(16, 256, up_stages=5, down_stages=3, **SORTED)),
}
# Of an activation, and whether there are biases.
ACTIVATIONS = {
    "silu": (SILU, False),
    "swiglu_oai with biases": (SWIGLU_OAI, True),
    "gelu": (Activation.parse("gelu"), False),
    "relu2 ungated": (Activation.parse("relu2:ungated"), False),
}
CASES = {
    f"{pair} {name}, {config}": (pair, name, config)
    for pair in PAIRS
    for name in ACTIVATIONS
    for config in CONFIGS
    # Formats differ on the way in, activations where sums are put together.
    if (pair in IN_PIECES and name == "silu" and config in ("one token", "rows in pieces"))
    or (
        name == "silu"
        and pair not in IN_PIECES
        and config != "rows in pieces"
        and (pair == "block128 x group128" or config in ("one token", "some rows"))
    )
    or (config == "one token" and pair == "block128 x group128" and name != "relu2 ungated")
}


def layer(pair: str, name: str, config_name: str) -> None:
    """The three kernels."""
    weights, activations = PAIRS[pair]
    activation, has_bias = ACTIVATIONS[name]
    num_tokens, config = CONFIGS[config_name]
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
    ids = torch.empty(num_tokens, CHOICES, dtype=torch.int32)
    routed = None
    if config.is_sorted:
        offsets = torch.empty(EXPERTS + 1, dtype=torch.int32)
        routing = Routing(offsets, ids, torch.empty(SLOTS, dtype=torch.int32), config.rows)
        routed = (routing, torch.empty(SLOTS // config.rows, dtype=torch.int32))
    x: torch.Tensor | QTensor = torch.empty(num_tokens, HIDDEN, dtype=torch.bfloat16)
    if config.is_encoded or activations == FP8_TOKEN:
        x = in_memory((num_tokens, HIDDEN), activations)
    experts_forward(
        x,
        experts,
        torch.empty(num_tokens, CHOICES),
        ids,
        routed,
        activation_format=activations,
        routed_scaling_factor=1.0,
        config=config,
    )


def compile_case(name: str, target: str) -> list[dict[str, object]]:
    """A record per kernel of a case."""
    return compile_launches(lambda: layer(*CASES[name]), {"case": name, "target": target})


if __name__ == "__main__":
    main(compile_case, [(name, "cuda:90") for name in CASES])
