"""Compile Hopper's kernels for few rows without a GPU; see `offline_all_sm90.py`."""

from dataclasses import replace
from itertools import product

import torch
from offline import compile_launches
from offline_layers import blocks_in_memory, experts_in_memory, in_memory

from octomoe.core.activations import SILU, SWIGLU_OAI, Activation
from octomoe.core.formats import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_GROUP128,
    FP8_TENSOR,
    FP8_TOKEN,
    MXFP8,
)
from octomoe.core.qtensor import QTensor
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
}


def is_worth_it(pair: str, name: str, config: str) -> bool:
    """Formats differ on the way in, activations where sums are put together."""
    if pair in IN_PIECES:
        return name == "silu" and config in ("one token", "rows in pieces")
    if config == "one token" and (pair == "block128 x group128" or name == "silu"):
        return True
    return (
        name == "silu"
        and config != "rows in pieces"
        and (pair == "block128 x group128" or config == "some rows")
    )


CASES = {
    f"{pair} {name}, {config}": (pair, name, config)
    for pair, name, config in product(PAIRS, ACTIVATIONS, CONFIGS)
    if is_worth_it(pair, name, config)
}


def layer(pair: str, name: str, config_name: str) -> None:
    """The three kernels."""
    weights, activations = PAIRS[pair]
    activation, has_bias = ACTIVATIONS[name]
    num_tokens, config = CONFIGS[config_name]
    is_static = pair == "tensor x static"
    experts = experts_in_memory(
        EXPERTS, HIDDEN, WIDTH, weights, activation, has_bias=has_bias, is_static=is_static
    )
    routed = None
    ids = torch.empty(num_tokens, CHOICES, dtype=torch.int32)
    if config.is_sorted:
        routed = blocks_in_memory(num_tokens, CHOICES, EXPERTS, SLOTS, config.rows)
        ids = routed[0].slot_of_choice_TA
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
