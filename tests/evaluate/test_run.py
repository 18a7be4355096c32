"""A scheme is measured on the model it is given, which is the same again afterwards."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import FP8_BLOCK128, FP8_CHANNEL, FP8_GROUP128
from octomoe.evaluate.compare import measure_baseline
from octomoe.evaluate.run import run_scheme
from octomoe.evaluate.schemes import Scheme
from octomoe.moe.quantized_experts import QuantizedExperts
from octomoe.ops.fused_moe import fused_moe


class Experts(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x_TD, ids_TA, weights_TA):
        return fused_moe(x_TD, self.experts, weights_TA, ids_TA)


class Model(nn.Module):
    """Embedding, one layer of experts that every token chooses alike, and a head."""

    def __init__(self, experts):
        super().__init__()
        self.embedding = nn.Embedding(11, experts.hidden_size)
        self.experts = Experts(experts)
        self.head = nn.Linear(experts.hidden_size, 11)

    def forward(self, tokens_BL):
        x_TD = self.embedding(tokens_BL).flatten(0, 1)
        ids_TA = torch.tensor([[0, 2]]).expand(x_TD.shape[0], 2)
        y_TD = self.experts(x_TD, ids_TA, torch.ones_like(ids_TA, dtype=torch.float32))
        return SimpleNamespace(logits=self.head(y_TD).unflatten(0, tokens_BL.shape))


def make_inputs():
    experts = ExpertWeights(torch.randn(3, 2 * 96, 128) / 11, torch.randn(3, 128, 96) / 10)
    model = Model(experts).eval()
    baseline = measure_baseline(model, [torch.randint(11, (4, 8))], ["experts"])
    return model, {"experts": experts}, baseline


def test_measures_the_quantised_experts_and_puts_the_originals_back():
    model, originals, baseline = make_inputs()
    module = model.experts
    result = run_scheme(model, originals, baseline, Scheme("x", FP8_CHANNEL))
    assert model.experts is module
    assert 0 < result.kl < 0.1
    assert 31 < result.sqnr_db < 33
    assert 25 < result.layer_sqnr_db["experts"] < 31
    assert [(q.layer, q.weight) for q in result.weight_quality] == [
        ("experts", "w13"),
        ("experts", "w2"),
    ]


def test_bytes_count_padding_but_not_as_weights():
    model, originals, baseline = make_inputs()
    result = run_scheme(model, originals, baseline, Scheme("x", FP8_BLOCK128, FP8_GROUP128))
    # F = 96 is stored as 128; scales: 2 and 1 blocks per expert, 4 bytes each.
    num_weights = 3 * 96 * 128 * 3
    assert result.bytes_per_weight == (3 * 128 * 128 * 3 + 3 * 3 * 4) / num_weights


def test_the_originals_are_put_back_after_an_error(monkeypatch):
    model, originals, baseline = make_inputs()
    module = model.experts
    seen = []

    def fail(self, *inputs):
        seen.append(self)
        raise RuntimeError("no")

    monkeypatch.setattr(QuantizedExperts, "forward", fail)
    with pytest.raises(RuntimeError, match="no"):
        run_scheme(model, originals, baseline, Scheme("x", FP8_CHANNEL))
    assert seen
    assert model.experts is module
