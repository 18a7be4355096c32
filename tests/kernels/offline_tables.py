"""Compile what packaged tables choose, without a GPU; see `offline.py`.

python tests/kernels/offline_tables.py
"""

from functools import partial
from pathlib import Path

import torch
from offline import compile_launches, main
from offline_layers import blocks_in_memory, experts_in_memory, in_memory

import octomoe
from octomoe.core.formats import FP8_BLOCK128, FP8_GROUP128
from octomoe.core.qtensor import QTensor
from octomoe.kernels import decode_moe_sm90 as decode
from octomoe.kernels import fused_moe as portable
from octomoe.kernels import fused_moe_sm90 as prefill
from octomoe.tune.configs import DecodeConfig, FusedMoeConfig
from octomoe.tune.entries import LayerKey, read_table
from octomoe.tune.kinds import Config

FOLDER = Path(octomoe.__file__).parent / "tune" / "tables"
# Few experts are enough: how many there are is known to no kernel when it is compiled.
EXPERTS, SLOTS = 4, 512


def name_of(key: LayerKey, num_tokens: int) -> str:
    """A bucket's, as tests show it."""
    return f"F={key.width} D={key.depth} A={key.num_choices}, {num_tokens} tokens"


CASES: dict[str, tuple[LayerKey, int, Config]] = {
    name_of(key, bucket.num_tokens): (key, bucket.num_tokens, bucket.choices[0].config)
    for path in sorted(FOLDER.glob("*/fused_moe.json"))
    for key, entry in read_table(path).entries.items()
    if key.scales == "block"
    for bucket in entry.buckets
}


def layer(key: LayerKey, num_tokens: int, config: Config) -> None:
    """A layer's kernels, from quantised rows on."""
    num_choices = key.num_choices
    experts = experts_in_memory(EXPERTS, key.depth, key.width, FP8_BLOCK128)
    routed = blocks_in_memory(num_tokens, num_choices, EXPERTS, SLOTS, config.rows)
    weights_TA = torch.empty(num_tokens, num_choices)
    x = in_memory((num_tokens, key.depth), FP8_GROUP128)
    assert isinstance(x, QTensor)
    options = {"routed_scaling_factor": 1.0, "config": config}
    if isinstance(config, DecodeConfig):
        ids = routed[0].slot_of_choice_TA
        run = partial(decode.experts_forward, x, experts, weights_TA, ids, routed)
        run(activation_format=FP8_GROUP128, **options)
        return
    options["out_dtype"] = torch.bfloat16
    if isinstance(config, FusedMoeConfig):
        run = partial(portable.experts_forward, activation_format=FP8_GROUP128)
        run(x, experts, weights_TA, *routed, **options)
        return
    prefill.experts_forward(x, experts, weights_TA, *routed, **options)


def compile_case(name: str, target: str) -> list[dict[str, object]]:
    """A record per kernel of a case."""
    return compile_launches(lambda: layer(*CASES[name]), {"case": name, "target": target})


if __name__ == "__main__":
    main(compile_case, [(name, "cuda:90") for name in CASES])
