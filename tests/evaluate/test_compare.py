"""KL, agreement and perplexity are those of the definition; layers are compared on equal input."""

from math import exp, inf
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from octomoe.evaluate.compare import measure_baseline, measure_layers, measure_text


class Bigram(nn.Module):
    """Predicts the next token from the present one, by a table of logits."""

    def __init__(self, logits_VV):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(logits_VV)

    def forward(self, tokens_BL):
        return SimpleNamespace(logits=self.table(tokens_BL))


def make_models():
    first_VV = torch.randn(7, 7)
    return Bigram(first_VV), Bigram(first_VV + 0.3 * torch.randn(7, 7))


def make_batches():
    tokens_BL = torch.randint(7, (6, 9))
    return list(torch.split(tokens_BL, 4))


def test_perplexity_is_that_of_the_definition():
    model, _ = make_models()
    batches = make_batches()
    nll = [
        -model.table.weight[row[i]].double().log_softmax(0)[row[i + 1]].item()
        for batch in batches
        for row in batch
        for i in range(8)
    ]
    baseline = measure_baseline(model, batches, [])
    assert baseline.perplexity == pytest.approx(exp(sum(nll) / len(nll)), rel=1e-6)


def test_kl_and_agreement_are_those_of_the_definition():
    model, other = make_models()
    batches = make_batches()
    quality = measure_text(other, measure_baseline(model, batches, []))
    p = torch.cat(batches).flatten()
    log_p = model.table.weight[p].double().log_softmax(-1)
    log_q = other.table.weight[p].double().log_softmax(-1)
    kl_T = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert quality.kl == pytest.approx(kl_T.mean().item(), rel=1e-5)
    assert quality.kl_error == pytest.approx(kl_T.std().item() / len(kl_T) ** 0.5, rel=1e-5)
    agreed = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert quality.top1 == pytest.approx(agreed)


def test_a_model_equals_itself():
    model, _ = make_models()
    baseline = measure_baseline(model, make_batches(), ["table"])
    quality = measure_text(model, baseline)
    assert (quality.kl, quality.top1, quality.perplexity) == (0.0, 1.0, baseline.perplexity)
    assert measure_layers(model, baseline) == {"table": inf}


def test_layers_are_compared_on_the_first_models_input():
    model, other = make_models()
    baseline = measure_baseline(model, make_batches(), ["table"])
    other.table.weight.data.copy_(1.1 * model.table.weight)
    assert measure_layers(other, baseline)["table"] == pytest.approx(20.0, abs=1e-3)


def test_text_without_a_next_token_is_refused():
    model, _ = make_models()
    with pytest.raises(ValueError, match="batches hold no next token"):
        measure_baseline(model, [torch.zeros(2, 1, dtype=torch.long)], [])
