"""`quantize_experts`: both weights in one format, the layer otherwise unchanged.

Claimed: weights are quantised as `quantize` does; where blocks cover several rows, no block holds
gate and up rows at once; zero rows added for that do not change what the layer computes.
"""

from dataclasses import replace

import pytest
import torch

from octomoe import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_EXPERT,
    FP8_TENSOR,
    MXFP8,
    MXFP8_2D,
    RELU2,
    SILU,
    SWIGLU_OAI,
    ExpertWeights,
    fused_moe,
    quantize,
    quantize_experts,
)

# experts, D, F
CASES = {
    "one expert": (1, 64, 32),
    "divides nothing": (3, 131, 67),
    "divides all": (2, 128, 256),
    "real": (8, 256, 192),
    "wide": pytest.param((16, 512, 384), marks=pytest.mark.full),
}
ROW_FORMATS = (FP8_TENSOR, FP8_EXPERT, FP8_CHANNEL, MXFP8)
BLOCK_FORMATS = (FP8_BLOCK128, FP8_BLOCK128.derive(rounding="pow2"), MXFP8_2D)


def make_inputs(case, device, seed, activation=SILU):
    num_experts, hidden_size, width = case
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device)

    rows = 2 * width if activation.gated else width
    return ExpertWeights(
        w13=draw(num_experts, rows, hidden_size),
        w2=draw(num_experts, hidden_size, width),
        activation=activation,
        w13_bias=draw(num_experts, rows),
        w2_bias=draw(num_experts, hidden_size),
        w13_input_scale=torch.tensor(0.5, device=device),
        w2_input_scale=torch.tensor(0.25, device=device),
    )


@pytest.mark.parametrize("activation", [SILU, RELU2], ids=lambda a: a.name)
@pytest.mark.parametrize("format", ROW_FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weights_are_quantised_and_the_rest_kept(
    case, format, activation, device, assert_same_bits
):
    experts = make_inputs(case, device, seed=1, activation=activation)
    quantized = quantize_experts(experts, format)
    assert_same_bits(quantized.w13, quantize(experts.w13, format))
    assert_same_bits(quantized.w2, quantize(experts.w2, format))
    assert isinstance(experts.w13, torch.Tensor)
    assert replace(quantized, w13=experts.w13, w2=experts.w2).__dict__ == experts.__dict__


@pytest.mark.parametrize("format", BLOCK_FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gate_and_up_are_quantised_apart(case, format, device, assert_same_bits):
    experts = make_inputs(case, device, seed=2)
    quantized = quantize_experts(experts, format)
    width, padded = experts.intermediate_size, quantized.intermediate_size
    assert padded % format.block[1] == 0
    assert padded - width < format.block[1]
    blocks = padded // format.block[1]
    for half in range(2):
        alone = quantize(experts.w13[:, half * width : (half + 1) * width], format)
        start = half * padded
        assert_same_bits(quantized.w13.data[:, start : start + width].clone(), alone.data)
        scale = quantized.w13.scale[:, half * blocks : (half + 1) * blocks]
        assert_same_bits(scale.clone(), alone.scale)
        assert not quantized.w13.data[:, start + width : start + padded].float().any()
        bias_EF = quantized.w13_bias[:, start : start + padded]
        assert_same_bits(
            bias_EF[:, :width].clone(), experts.w13_bias[:, half * width :][:, :width].clone()
        )
        assert not bias_EF[:, width:].any()
    assert_same_bits(quantized.w2.data[:, :, :width].clone(), quantize(experts.w2, format).data)
    assert not quantized.w2.data[:, :, width:].float().any()


def test_without_a_gate_nothing_is_padded(device, assert_same_bits):
    experts = make_inputs((3, 131, 67), device, seed=3, activation=RELU2)
    quantized = quantize_experts(experts, FP8_BLOCK128)
    assert quantized.intermediate_size == 67
    assert_same_bits(quantized.w13, quantize(experts.w13, FP8_BLOCK128))


@pytest.mark.parametrize("activation", [SILU, SWIGLU_OAI], ids=lambda a: a.name)
@pytest.mark.parametrize("format", [None, *BLOCK_FORMATS])
def test_padding_changes_no_output(format, activation, device, draw_ids, sqnr_db):
    experts = make_inputs((4, 64, 40), device, seed=4, activation=activation)
    padded = experts.pad_width(128)
    if format is not None:
        padded = quantize_experts(experts, format)
        # The values of the padded weights, cut back to F.
        w13_END, w2_EDF = padded.w13.dequantize(), padded.w2.dequantize()
        gate_up = [half[:, :40] for half in w13_END.chunk(2, dim=1)]
        experts = replace(experts, w13=torch.cat(gate_up, dim=1), w2=w2_EDF[:, :, :40])
    ids_TA, weights_TA = draw_ids(9, 4, 2, "any", 4).to(device), torch.rand(9, 2).to(device)
    x_TD = torch.randn(9, 64).to(device)
    y_TD = fused_moe(x_TD, padded, weights_TA, ids_TA)
    assert sqnr_db(fused_moe(x_TD, experts, weights_TA, ids_TA), y_TD) > 100


EXPERTS = ExpertWeights(w13=torch.ones(2, 8, 4), w2=torch.ones(2, 4, 4))
QUANTIZED = quantize(EXPERTS.w13, FP8_EXPERT)
REFUSALS = {
    "format's name": (
        TypeError,
        "quantize_experts: format is a str.*Format.parse..mxfp8",
        lambda: quantize_experts(EXPERTS, "mxfp8"),
    ),
    "w13 is quantised": (
        ValueError,
        "w13 is fp8_expert, but needs unquantised weights; use octomoe.requantize on its weights",
        lambda: quantize_experts(replace(EXPERTS, w13=QUANTIZED), MXFP8),
    ),
    "w2 is quantised": (
        ValueError,
        "w2 is mxfp8, but needs unquantised weights",
        lambda: quantize_experts(replace(EXPERTS, w2=quantize(EXPERTS.w2, MXFP8)), MXFP8),
    ),
}


@pytest.mark.parametrize(("error", "match", "call"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()
