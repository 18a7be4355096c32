"""Compile Hopper's kernels for bf16 rows without a GPU; see `offline.py`.

python tests/kernels/offline_wide_sm90.py
"""

import sys
from itertools import product

import torch
from offline import compile_launches, in_memory, main

from octomoe.core.activations import SILU, SWIGLU_OAI, Activation
from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import (
    E5M2,
    FP8_BLOCK128,
    FP8_CHANNEL,
    MXFP8,
    MXFP8_2D,
    Format,
)
from octomoe.core.routing import Routing
from octomoe.kernels.fused_down_wide_sm90 import fused_down
from octomoe.kernels.fused_rows_wide_sm90 import rows_in_order
from octomoe.kernels.fused_up_wide_sm90 import fused_up
from octomoe.tune.configs import PrefillConfig
from octomoe.tune.fused_moe import WIDE_CONFIGS

EXPERTS, TOKENS, CHOICES = 16, 64, 4
SLOTS = 1024
# Formats of weights and of activations, hidden size and width.
PAIRS: dict[str, tuple[Format, Format | None, int, int]] = {
    "channel": (FP8_CHANNEL, None, 4096, 384),
    "channel e5m2": (FP8_CHANNEL.derive(element=E5M2), None, 4096, 384),
    "block128": (FP8_BLOCK128, None, 4096, 384),
    "mxfp8 x mxfp8": (MXFP8, MXFP8, 4096, 384),
    # Scales of a step are no word.
    "mxfp8_2d x mxfp8 odd": (MXFP8_2D, MXFP8, 400, 208),
}
# Of an activation, and whether there are biases.
ACTIVATIONS = {
    "silu": (SILU, False),
    "swiglu_oai with biases": (SWIGLU_OAI, True),
    "gelu": (Activation.parse("gelu"), False),
    "relu2 ungated": (Activation.parse("relu2:ungated"), False),
}
CASES = {
    f"{pair} {name} {config.rows} rows": (pair, name, config)
    for pair, name, config in product(PAIRS, ACTIVATIONS, WIDE_CONFIGS)
    # What follows the products is the same for all; these fill the registers most.
    if name == "swiglu_oai with biases" or (pair == "mxfp8 x mxfp8" and name == "gelu")
    # What has no room for tiles of 128.
    if config.rows == 64 or pair not in ("block128", "mxfp8_2d x mxfp8 odd")
}


def layer(pair: str, name: str, config: PrefillConfig) -> None:
    """Rows in order, and both halves."""
    weights, activations, hidden_size, width = PAIRS[pair]
    activation, has_bias = ACTIVATIONS[name]
    rows = width * (2 if activation.gated else 1)
    experts = ExpertWeights(
        in_memory((EXPERTS, rows, hidden_size), weights),
        in_memory((EXPERTS, hidden_size, width), weights),
        activation,
        torch.empty(EXPERTS, rows) if has_bias else None,
        torch.empty(EXPERTS, hidden_size) if has_bias else None,
    )
    routing = Routing(
        torch.empty(EXPERTS + 1, dtype=torch.int32),
        torch.empty(TOKENS, CHOICES, dtype=torch.int32),
        torch.empty(SLOTS, dtype=torch.int32),
        config.rows,
    )
    expert_of_block = torch.empty(SLOTS // config.rows, dtype=torch.int32)
    x = rows_in_order(torch.empty(TOKENS, hidden_size, dtype=torch.bfloat16), activations)
    h = fused_up(x, experts, routing, expert_of_block, activations, config)
    fused_down(h, experts, routing, expert_of_block, config)


def compile_case(name: str, target: str) -> list[dict[str, object]]:
    """A record per kernel of a case."""
    return compile_launches(lambda: layer(*CASES[name]), {"case": name, "target": target})


if __name__ == "__main__":
    main(compile_case, [(name, "cuda:90") for name in CASES if "".join(sys.argv[1:2]) in name])
