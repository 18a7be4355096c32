"""Claims: an expert's static scales are what its own tokens need; one without tokens gets the
layer's; nothing is ever zero or infinite.
"""

import pytest
import torch
from torch import Tensor, nn

from octomoe import SILU, ExpertWeights
from octomoe.evaluate.calibrate import calibrate
from octomoe.reference.activation_quantize import activate

EXPERTS, HIDDEN, WIDTH = 4, 16, 24


class Layer(nn.Module):
    """A router that sends token t to experts ``ids[t]``, and experts that do nothing."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.ids, self.experts = ids, Nothing()
        self.embedding = nn.Embedding(32, HIDDEN)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x_TD = self.embedding(tokens_BL).flatten(0, 1)
        return self.experts(x_TD, self.ids, torch.ones(self.ids.shape))


class Nothing(nn.Module):
    """Experts whose output nobody reads."""

    def forward(self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        return x_TD


def make_inputs(ids: Tensor) -> tuple[Layer, dict[str, ExpertWeights], Tensor]:
    w13 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN)
    experts = ExpertWeights(w13, torch.randn(EXPERTS, HIDDEN, WIDTH))
    return Layer(ids), {"experts": experts}, torch.randint(32, (2, ids.shape[0] // 2))


def test_scales_are_the_largest_magnitudes_of_an_experts_own_tokens():
    ids = torch.randint(EXPERTS, (40, 2))
    model, originals, tokens = make_inputs(ids)
    found = calibrate(model, originals, [tokens])["experts"]
    x = model.embedding(tokens).flatten(0, 1).detach()
    for e in range(EXPERTS):
        mine = x[(ids == e).any(dim=1)]
        h = activate(mine @ originals["experts"].w13[e].T, SILU)
        assert found.w13_E[e] == pytest.approx(mine.abs().max().item() / 448, rel=1e-6)
        assert found.w2_E[e] == pytest.approx(h.abs().max().item() / 448, rel=1e-4)
    assert found.unseen == ()


def test_batches_add_up():
    model, originals, _ = make_inputs(torch.randint(EXPERTS, (40, 2)))
    batches = [torch.randint(32, (2, 20)) for _ in range(3)]
    each = [calibrate(model, originals, [batch])["experts"].w13_E for batch in batches]
    together = calibrate(model, originals, batches)["experts"].w13_E
    assert together == tuple(max(values) for values in zip(*each, strict=True))


def test_experts_without_tokens_get_the_layers_scale():
    ids = torch.randint(2, (40, 2))
    ids[0] = torch.tensor([-1, EXPERTS])
    model, originals, tokens = make_inputs(ids)
    found = calibrate(model, originals, [tokens])["experts"]
    assert found.unseen == (2, 3)
    for scales in (found.w13_E, found.w2_E):
        assert scales[2] == scales[3] == max(scales[:2])
        assert min(scales) > 0


def test_an_expert_that_saw_only_zeros_gets_the_layers_scale():
    ids = torch.zeros(40, 1, dtype=torch.long)
    ids[0] = 1
    model, originals, tokens = make_inputs(ids)
    with torch.no_grad():
        model.embedding.weight[31] = 0.0
    tokens = tokens.clamp(max=30)
    tokens[0, 0] = 31
    found = calibrate(model, originals, [tokens])["experts"]
    assert found.w13_E[1] == found.w13_E[0]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_layer_without_a_finite_scale_is_refused(value):
    model, originals, tokens = make_inputs(torch.randint(EXPERTS, (40, 2)))
    with torch.no_grad():
        model.embedding.weight.fill_(value)
    with pytest.raises(ValueError, match=r"calibrate: batches give experts no finite scale"):
        calibrate(model, originals, [tokens])


def test_hooks_are_gone_afterwards_even_after_an_error():
    model, originals, tokens = make_inputs(torch.randint(EXPERTS, (40, 2)))
    with pytest.raises(IndexError):
        calibrate(model, originals, [tokens + 100])
    assert not model.experts._forward_pre_hooks
