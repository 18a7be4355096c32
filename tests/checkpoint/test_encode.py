"""Claims: an unquantised matrix gets the bits of `octomoe.quantize`; a quantised one keeps its
bytes where scale blocks allow, loses nothing but subnormals under power-of-two scales, and is told
apart from one that would lose more.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octomoe import (
    ALL,
    E4M3_240,
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_EXPERT,
    FP8_TENSOR,
    MXFP8,
    Format,
    QTensor,
    quantize,
)
from octomoe.checkpoint.encode import (
    How,
    Numerics,
    encode,
    encode_pair,
    has_pow2_scales,
    search_scale,
)

CHANNEL_240 = FP8_CHANNEL.derive(element=E4M3_240)
CPU = torch.device("cpu")


def numerics(format: Format, *, search: bool = False, exact_relay: bool = False) -> Numerics:
    relay = format if exact_relay or format == MXFP8 else format.derive(rounding="pow2")
    return Numerics(format, relay, search, CPU)


def make_inputs(rows: int = 200, columns: int = 330, spread: float = 1.0) -> Tensor:
    x = torch.randn(rows, columns) * torch.exp(spread * torch.randn(rows, 1))
    return (x / 20).bfloat16()


@pytest.mark.parametrize("format", [FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK128, MXFP8, CHANNEL_240])
def test_an_unquantised_matrix_gets_the_bits_of_quantize(format, assert_same_bits):
    x = make_inputs()
    made = encode(x, numerics(format))
    assert (made.how, made.num_changed) == (How.QUANTIZED, 0)
    assert_same_bits(made.q, quantize(x, format))


@pytest.mark.parametrize(
    ("source", "format"),
    [
        (FP8_TENSOR, FP8_CHANNEL),
        (FP8_TENSOR, FP8_BLOCK128),
        (FP8_CHANNEL, FP8_CHANNEL),
        (FP8_BLOCK128, FP8_BLOCK128),
        (Format((1, 128, 64)), Format((1, 64, 32))),
        (FP8_BLOCK128.derive(rounding="pow2"), MXFP8),
        (MXFP8, Format((1, 1, 32))),
        (CHANNEL_240, FP8_CHANNEL),
    ],
)
def test_bytes_are_kept_where_blocks_lie_within_the_sources(source, format, naive_values):
    q = quantize(make_inputs(), source)
    made = encode(q, numerics(format))
    assert made.how == How.KEPT
    assert torch.equal(made.q.data.view(torch.uint8), q.data.view(torch.uint8))
    assert made.q.format == format
    assert torch.equal(naive_values(made.q), naive_values(q))


@pytest.mark.parametrize("format", [FP8_CHANNEL, FP8_TENSOR, CHANNEL_240, Format((1, 64, 256))])
@pytest.mark.parametrize("source", [MXFP8, FP8_BLOCK128.derive(rounding="pow2")])
def test_powers_of_two_are_relaid_without_loss_but_subnormals(source, format, sqnr_db):
    x = make_inputs(spread=0.3)
    q = quantize(x, source)
    made = encode(q, numerics(format))
    assert made.how == How.RELAID
    values = q.dequantize()
    differs = made.q.dequantize() != values
    assert made.num_changed == int(differs.sum())
    # What differs was far below its new scale's smallest normal number.
    scale = made.q.scale.expand(differs.shape) if made.q.format.block[1:] != (64, 256) else None
    if scale is not None:
        assert (values.abs()[differs] < scale[differs] * 2.0**-6).all()
    assert sqnr_db(x, made.q.dequantize()) > sqnr_db(x, values) - 0.05
    assert has_pow2_scales(made.q.scale)


def test_a_double_quantisation_is_told_and_costs_3_db(sqnr_db):
    x = make_inputs(512, 1024, spread=0.3)
    q = quantize(x, FP8_BLOCK128)
    made = encode(q, numerics(FP8_CHANNEL))
    assert made.how == How.REQUANTIZED
    assert made.num_changed > 0.3 * x.numel()
    assert 2.5 < sqnr_db(x, q.dequantize()) - sqnr_db(x, made.q.dequantize()) < 3.5
    exact = encode(quantize(x, MXFP8), numerics(FP8_CHANNEL, exact_relay=True))
    assert exact.how == How.REQUANTIZED


def test_for_neuron_bytes_are_halved_and_scales_doubled():
    q = quantize(make_inputs(), FP8_CHANNEL)
    made = encode(q, numerics(CHANNEL_240))
    assert made.how == How.HALVED
    assert torch.equal(made.q.scale, 2 * q.scale)
    assert made.q.data.float().abs().max() <= 224
    differs = made.q.dequantize() != q.dequantize()
    # Odd multiples of the smallest subnormal have no half.
    assert (q.data.float().abs()[differs] < 2.0**-5).all()
    assert made.num_changed == int(differs.sum())


def test_gate_and_up_share_the_larger_scale():
    gate, up = make_inputs(64, 64, spread=0), 3 * make_inputs(64, 64, spread=0)
    first, second = encode_pair(gate, up, numerics(FP8_TENSOR))
    assert torch.equal(first.q.scale, second.q.scale)
    assert torch.equal(second.q.scale, quantize(up, FP8_TENSOR).scale)
    kept = encode_pair(*(quantize(x, FP8_TENSOR) for x in (gate, up)), numerics(FP8_TENSOR))
    assert [made.how for made in kept] == [How.KEPT, How.KEPT]


@pytest.mark.parametrize("format", [FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK128])
def test_a_searched_scale_gains(format, sqnr_db):
    x = make_inputs(256, 512, spread=0.3)
    searched = encode(x, numerics(format, search=True)).q
    gain = sqnr_db(x, searched.dequantize()) - sqnr_db(x, quantize(x, format).dequantize())
    assert gain > (0.25 if format == FP8_CHANNEL else 0.0)


def test_a_searched_scale_is_no_worse_in_any_block():
    x = make_inputs(64, 128)
    own, best = quantize(x, FP8_CHANNEL), search_scale(x, FP8_CHANNEL)
    searched = quantize(x, FP8_CHANNEL, scale=best)
    errors = [(q.dequantize() - x.float()).square().sum(dim=1) for q in (own, searched)]
    assert (errors[1] <= errors[0]).all()


def test_zeros_search_and_encode():
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    made = encode(x, numerics(FP8_CHANNEL, search=True))
    assert torch.equal(made.q.dequantize(), x.float())
    assert (made.q.scale > 0).all()


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    ours=st.tuples(st.sampled_from([ALL, 1, 2, 4]), st.sampled_from([ALL, 1, 2, 4])),
    theirs=st.tuples(st.sampled_from([ALL, 1, 2, 4]), st.sampled_from([ALL, 1, 2, 4])),
)
def test_whatever_is_called_kept_has_the_same_values(rows, columns, ours, theirs):
    x = torch.randn(rows, columns)
    q = quantize(x, Format((1, *ours)))
    made = encode(q, numerics(Format((1, *theirs))))
    if made.how == How.KEPT:
        assert torch.equal(made.q.dequantize(), q.dequantize())


def test_an_experts_format_is_one_matrixs_tensor_format():
    q = quantize(make_inputs(), FP8_EXPERT)
    kept = encode(QTensor(q.data, q.scale, replace(FP8_TENSOR)), numerics(FP8_EXPERT))
    assert kept.how == How.KEPT
