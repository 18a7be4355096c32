"""What a fused layer begins with.

Claimed: rows and routing are those of the two kernels alone; what is quantised into is no memory
that sorting gives back while its kernels may still run.
"""

import torch

from octomoe import FP8_GROUP128
from octomoe.kernels import route_and_quantize as module
from octomoe.kernels.build_routing import build_blocks
from octomoe.kernels.quantize import quantize


def run(x_TD, ids_TA, num_experts):
    return module.route_and_quantize(
        x_TD, FP8_GROUP128, None, ids_TA, num_experts, align=8, expert_map=None, is_chained=False
    )


def test_it_is_both(kernel_device, assert_same_bits):
    x_TD = torch.randn(37, 200, device=kernel_device).bfloat16()
    ids_TA = torch.randint(5, (37, 3), device=kernel_device)
    q, (routing, expert_of_block) = run(x_TD, ids_TA, 5)
    assert_same_bits(q, quantize(x_TD, FP8_GROUP128))
    other, other_blocks = build_blocks(ids_TA, 5, align=8)
    for field in ("expert_offsets", "slot_of_choice_TA", "choice_of_slot_S"):
        assert_same_bits(getattr(routing, field), getattr(other, field))
    assert_same_bits(expert_of_block, other_blocks)


def test_memory_is_taken_before_choices_are_sorted(kernel_device, monkeypatch):
    calls = []

    def told(name):
        plain = getattr(module, name)

        def call(*args, **options):
            calls.append((name, options.get("out")))
            return plain(*args, **options)

        monkeypatch.setattr(module, name, call)

    for name in ("empty_quantized", "build_blocks", "quantize"):
        told(name)
    x_TD = torch.randn(4, 128, device=kernel_device).bfloat16()
    q, _ = run(x_TD, torch.randint(2, (4, 2), device=kernel_device), 2)
    assert [name for name, _ in calls] == ["empty_quantized", "build_blocks", "quantize"]
    assert calls[-1][1] is q
