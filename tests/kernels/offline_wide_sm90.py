"""Compile Hopper's kernels for bf16 rows without a GPU; see `offline_all_sm90.py`."""

from itertools import product

import torch
from offline import compile_launches
from offline_layers import blocks_in_memory, experts_in_memory

from octomoe.core.activations import SWIGLU_OAI, Activation
from octomoe.core.formats import (
    E5M2,
    FP8_BLOCK128,
    FP8_CHANNEL,
    MXFP8,
    MXFP8_2D,
    Format,
)
from octomoe.kernels.fused_down_wide_sm90 import fused_down
from octomoe.kernels.fused_rows_wide_sm90 import rows_in_order
from octomoe.kernels.fused_up_wide_sm90 import fused_up
from octomoe.tune.configs import PrefillConfig
from octomoe.tune.fused_moe import WIDE_CONFIGS

EXPERTS, TOKENS, CHOICES, SLOTS = 16, 64, 4, 1024
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
    "swiglu_oai with biases": (SWIGLU_OAI, True),
    "gelu": (Activation.parse("gelu"), False),
}


def is_worth_it(pair: str, name: str, rows: int) -> bool:
    """What follows the products is the same for all formats; these fill the registers most."""
    if pair in ("block128", "mxfp8_2d x mxfp8 odd"):
        # They have no room for tiles of 128.
        return name == "swiglu_oai with biases" and rows == 64
    # Tiles of 64 hold half as many sums in as many registers, and decode one value like another.
    if pair == "channel e5m2" or name == "gelu":
        return rows == 128 and (pair == "mxfp8 x mxfp8" or name == "swiglu_oai with biases")
    return True


CASES = {
    f"{pair} {name} {config.rows} rows": (pair, name, config)
    for pair, name, config in product(PAIRS, ACTIVATIONS, WIDE_CONFIGS)
    if is_worth_it(pair, name, config.rows)
}


def layer(pair: str, name: str, config: PrefillConfig) -> None:
    """Rows in order, and both halves."""
    weights, activations, hidden_size, width = PAIRS[pair]
    activation, has_bias = ACTIVATIONS[name]
    experts = experts_in_memory(EXPERTS, hidden_size, width, weights, activation, has_bias=has_bias)
    routed = blocks_in_memory(TOKENS, CHOICES, EXPERTS, SLOTS, config.rows)
    x = rows_in_order(torch.empty(TOKENS, hidden_size, dtype=torch.bfloat16), activations)
    h = fused_up(x, experts, *routed, activations, config)
    fused_down(h, experts, *routed, config)


def compile_case(name: str, target: str) -> list[dict[str, object]]:
    """A record per kernel of a case."""
    return compile_launches(lambda: layer(*CASES[name]), {"case": name, "target": target})
