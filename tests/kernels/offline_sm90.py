"""Compile Hopper's kernels for many rows without a GPU; see `offline_all_sm90.py`."""

from itertools import product

from offline import compile_launches
from offline_layers import blocks_in_memory, experts_in_memory, in_memory

from octomoe.core.activations import SILU, SWIGLU_OAI, Activation
from octomoe.core.formats import FP8_BLOCK128, FP8_CHANNEL, FP8_GROUP128, FP8_TENSOR, FP8_TOKEN
from octomoe.core.qtensor import QTensor
from octomoe.kernels.fused_down_sm90 import fused_down
from octomoe.kernels.fused_up_sm90 import fused_up
from octomoe.tune.configs import PrefillConfig
from octomoe.tune.fused_moe import PREFILL_CONFIGS

EXPERTS, TOKENS, CHOICES, HIDDEN, WIDTH, SLOTS = 16, 64, 4, 4096, 384, 1024
PAIRS = {
    "block128 x group128": (FP8_BLOCK128, FP8_GROUP128),
    "channel x token": (FP8_CHANNEL, FP8_TOKEN),
    "tensor x static": (FP8_TENSOR, FP8_TENSOR),
}
# Of an activation, and whether there are biases.
ACTIVATIONS = {
    "silu": (SILU, False),
    "swiglu_oai with biases": (SWIGLU_OAI, True),
    "gelu": (Activation.parse("gelu"), False),
    "gelu_tanh": (Activation.parse("gelu_tanh"), False),
    "relu2 ungated": (Activation.parse("relu2:ungated"), False),
}


def is_worth_it(pair: str, name: str, rows: int) -> bool:
    """What follows the products is the same for all formats; some activations fill the registers
    most. Of two formats with late scales, one shows that gelu's values have room beside them.
    """
    if name == "swiglu_oai with biases" or (pair == "channel x token" and name == "gelu"):
        return True
    # Tiles of 64 rows have fewer registers per row: two programs share them.
    return pair == "block128 x group128" and (name != "gelu_tanh" or rows == 64)


CASES = {
    f"{pair} {name} {config.rows} rows": (pair, name, config)
    for pair, name, config in product(PAIRS, ACTIVATIONS, PREFILL_CONFIGS)
    if is_worth_it(pair, name, config.rows)
}


def halves(pair: str, name: str, config: PrefillConfig) -> None:
    """Both halves of a layer."""
    weights, activations = PAIRS[pair]
    activation, has_bias = ACTIVATIONS[name]
    is_static = pair == "tensor x static"
    experts = experts_in_memory(
        EXPERTS, HIDDEN, WIDTH, weights, activation, has_bias=has_bias, is_static=is_static
    )
    routed = blocks_in_memory(TOKENS, CHOICES, EXPERTS, SLOTS, config.rows)
    x, h = in_memory((TOKENS, HIDDEN), activations), in_memory((SLOTS, WIDTH), activations)
    assert isinstance(x, QTensor)
    assert isinstance(h, QTensor)
    made = fused_up(x, experts, *routed, config)
    fused_down(made if isinstance(made, QTensor) else h, experts, *routed, config)


def compile_case(name: str, target: str) -> list[dict[str, object]]:
    """A record per kernel of a case."""
    return compile_launches(lambda: halves(*CASES[name]), {"case": name, "target": target})
