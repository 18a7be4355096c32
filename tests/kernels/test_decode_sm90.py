"""What Hopper's kernels for few rows take, and how they run it.

Claimed: what they do not take is refused with its reason. `test_layers_sm90.py` has what they
compute.
"""

import pytest

from octomoe import FP8_CHANNEL, FP8_TENSOR, FP8_TOKEN, MXFP8, MXFP8_E5M2, Target
from octomoe.kernels.decode_moe_sm90 import why_not
from octomoe.tune.configs import DecodeConfig
from octomoe.tune.fused_moe import decode_config

# tokens, experts, choices, hidden size, width
FEW = (40, 8, 2, 512, 256)
HOPPER = Target("NVIDIA H200", arch=90, sms=132)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # tokens, choices, experts, width, depth
        ((1, 8, 128, 384, 4096), DecodeConfig(8, 128, 2, 4, 2, combined=128)),
        ((1, 9, 257, 256, 7168), DecodeConfig(8, 128, 4, 4, 2, combined=128)),
        ((3, 8, 128, 768, 2048), DecodeConfig(8, 128, 1, 4, 2, combined=128)),
        ((1, 8, 128, 768, 256), DecodeConfig(8, 128, 1, 4, 2, combined=128)),
        (
            (32, 8, 128, 384, 4096),
            DecodeConfig(8, 256, 1, 6, 3, is_encoded=True, is_sorted=True),
        ),
        (
            (512, 10, 512, 128, 2048),
            DecodeConfig(16, 256, 1, 5, 3, is_encoded=True, is_sorted=True),
        ),
        # Few wide experts: parts of both depths.
        ((1, 2, 8, 14336, 4096), DecodeConfig(8, 128, 1, 4, 5, combined=128, down_splits=4)),
        ((512, 8, 128, 384, 4096), None),
        ((0, 8, 128, 384, 4096), None),
        ((1, 0, 128, 384, 4096), None),
    ],
)
def test_what_a_heuristic_chooses(sizes, expected):
    assert decode_config(*sizes, HOPPER) == expected
    assert decode_config(*sizes, Target("NVIDIA A100", arch=80, sms=108)) is None


def test_rows_in_pieces_are_sorted_before():
    sizes = (32, 8, 128, 384, 4096)
    for pieces in (2, 4):
        expected = DecodeConfig(8, 256, 1, 5, 3, is_sorted=True)
        assert decode_config(*sizes, HOPPER, pieces=pieces) == expected
    many = (128, *sizes[1:])
    expected = DecodeConfig(16, 128, 1, 5, 4, is_sorted=True)
    assert decode_config(*many, HOPPER, pieces=2) == expected
    assert decode_config(*many, HOPPER, pieces=4) is None


def test_reasons(make_experts):
    def reason(weights, num_choices, activations, case=FEW, is_static=False):
        experts = make_experts(case, weights, is_static=is_static, device="cpu")
        return why_not(experts, num_choices, activations)

    assert reason(FP8_TENSOR, 8, FP8_TENSOR, is_static=True) is None
    said = "tokens make 63 choices, more than 62"
    assert reason(FP8_TENSOR, 63, FP8_TENSOR, is_static=True) == said
    said = "the intermediate has one scale, which all of its rows make"
    assert reason(FP8_TENSOR, 8, FP8_TENSOR) == said
    assert reason(FP8_CHANNEL, 8, FP8_TOKEN) is None
    assert reason(FP8_TENSOR, 8, None, is_static=True) is None
    assert reason(MXFP8, 8, MXFP8) is None
    said = "weights and activations are not both MXFP8 with E4M3"
    assert reason(MXFP8, 8, MXFP8_E5M2) == said
    said = "weights are not E4M3 with float32 scales of rows, or of 128 x 128 blocks"
    assert reason(MXFP8, 8, None) == said
    said = "sizes 512 and 224 are no multiples of 128"
    assert reason(MXFP8, 8, MXFP8, case=(40, 8, 2, 512, 224)) == said
