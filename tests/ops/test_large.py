"""More than 2^31 elements: every row is quantised, permuted and combined as a small tensor is."""

import pytest
import torch

from octomoe import FP8_GROUP128, build_routing, permute, quantize, unpermute

NUM_TOKENS, WIDTH = 300_000, 7232


@pytest.fixture(scope="module")
def inputs():
    x_TD = torch.randn(NUM_TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
    assert x_TD.numel() > 2**31
    return x_TD, build_routing(torch.randint(4, (NUM_TOKENS, 1), device="cuda"), 4)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.plain_memory
def test_quantize_then_permute(inputs, assert_same_bits):
    x_TD, routing = inputs
    x_SD = permute(quantize(x_TD, FP8_GROUP128), routing)
    for rows in (slice(0, 5), slice(-5, None)):
        expected = quantize(x_TD[routing.token_of_slot_S[rows].long()], FP8_GROUP128)
        assert_same_bits(x_SD.data[rows], expected.data)
        assert_same_bits(x_SD.scale[rows], expected.scale)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.plain_memory
def test_unpermute_inverts_permute(inputs):
    x_TD, routing = inputs
    assert torch.equal(unpermute(permute(x_TD, routing), routing), x_TD)
