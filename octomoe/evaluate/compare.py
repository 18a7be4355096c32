"""Run the unquantised and the quantised model on the same text and compare what they predict."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp

import torch
from torch import Tensor, nn

from octomoe.errors import refusal
from octomoe.evaluate.metrics import WeightQuality, sqnr_db


@dataclass(frozen=True, kw_only=True)
class SchemeResult:
    """What one scheme costs.

    Attributes:
        name: the scheme's name.
        weights, activations: names of the formats; activations is "" for weight-only.
        averages_scales: whether the scales were averaged over the experts.
        bytes_per_weight: bytes of data and scales per expert weight.
        sqnr_db: SQNR of all expert weights together, dB.
        saturated, flushed: fractions of all expert weights; see `WeightQuality`.
        kl: mean over tokens of KL(original || quantised) between predictions, nats.
        kl_error: standard error of that mean, tokens taken as independent.
        top1: fraction of tokens for which both predict the same token.
        perplexity: of the quantised model.
        layer_sqnr_db: layer name -> SQNR of the experts' output on the original's hidden states.
        weight_quality: per layer and weight.
        seconds: evaluation time.
    """

    name: str
    weights: str
    activations: str
    averages_scales: bool
    bytes_per_weight: float
    sqnr_db: float
    saturated: float
    flushed: float
    kl: float
    kl_error: float
    top1: float
    perplexity: float
    layer_sqnr_db: dict[str, float]
    weight_quality: list[WeightQuality]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """A model under several schemes.

    Attributes:
        model, text: where they came from.
        num_tokens: tokens evaluated.
        perplexity: of the unquantised model.
        bytes_per_weight: of the unquantised experts.
        results: one per scheme.
        command: what made this.
        versions: package -> version.
    """

    model: str
    text: str
    num_tokens: int
    perplexity: float
    bytes_per_weight: float
    results: list[SchemeResult]
    command: str
    versions: dict[str, str] = field(default_factory=dict)

    def perplexity_change(self, result: SchemeResult) -> float:
        """Change of a scheme's perplexity against the unquantised model's, in per cent."""
        return 100.0 * (result.perplexity / self.perplexity - 1.0)


@dataclass(frozen=True)
class LayerIO:
    """What an experts module of the unquantised model was given and returned."""

    inputs: tuple[Tensor, ...]
    output: Tensor


@dataclass(frozen=True)
class Baseline:
    """The unquantised model's predictions.

    Attributes:
        batches: token ids ``[B, L]`` each.
        log_probs: one ``[B, L, V]`` float32 per batch, on the CPU.
        perplexity: of the next tokens.
        layers: what went through each experts module in the first batch.
    """

    batches: list[Tensor]
    log_probs: list[Tensor]
    perplexity: float
    layers: dict[str, LayerIO]


@dataclass(frozen=True)
class TextQuality:
    """How a quantised model predicts, against the baseline; see `SchemeResult`."""

    kl: float
    kl_error: float
    top1: float
    perplexity: float


def measure_baseline(
    model: nn.Module,
    batches: list[Tensor],
    layer_names: list[str],
    on_batch: Callable[[], None] = lambda: None,
) -> Baseline:
    """Run the unquantised model.

    Args:
        model: called with token ids ``[B, L]``, returns an object with ``logits [B, L, V]``.
        batches: token ids, one tensor per call.
        layer_names: experts modules whose inputs and outputs to keep (first batch).
        on_batch: called after each batch.

    Raises:
        ValueError: there is no batch, or sequences are shorter than two tokens.
    """
    if not batches or batches[0].shape[1] < 2:
        needs = "at least one batch of sequences of two or more tokens"
        raise ValueError(refusal("measure_baseline", "batches", "hold no next token", needs))
    layers: dict[str, LayerIO] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(_keep(layers, name)) for name in layer_names
    ]
    log_probs = []
    nll, count = 0.0, 0
    for index, tokens_BL in enumerate(batches):
        log_probs.append(_log_probs(model, tokens_BL))
        nll += _next_token_nll(log_probs[-1], tokens_BL)
        count += tokens_BL[:, 1:].numel()
        if index == 0:
            for hook in hooks:
                hook.remove()
        on_batch()
    return Baseline(batches, log_probs, exp(nll / count), layers)


def measure_text(
    model: nn.Module, baseline: Baseline, on_batch: Callable[[], None] = lambda: None
) -> TextQuality:
    """Run a quantised model on the baseline's text and compare its predictions."""
    nll, agreed, num_next = 0.0, 0, 0
    divergences: list[Tensor] = []
    for tokens_BL, expected_BLV in zip(baseline.batches, baseline.log_probs, strict=True):
        actual_BLV = _log_probs(model, tokens_BL)
        nll += _next_token_nll(actual_BLV, tokens_BL)
        for expected_LV, actual_LV in zip(expected_BLV, actual_BLV, strict=True):
            divergence_L = (expected_LV.exp() * (expected_LV - actual_LV)).sum(dim=-1)
            divergences.append(divergence_L.double())
        agreed += int((expected_BLV.argmax(-1) == actual_BLV.argmax(-1)).sum())
        num_next += tokens_BL[:, 1:].numel()
        on_batch()
    divergence_T = torch.cat(divergences)
    return TextQuality(
        kl=divergence_T.mean().item(),
        kl_error=(divergence_T.std() / divergence_T.numel() ** 0.5).item(),
        top1=agreed / divergence_T.numel(),
        perplexity=exp(nll / num_next),
    )


@torch.no_grad()
def measure_layers(model: nn.Module, baseline: Baseline) -> dict[str, float]:
    """SQNR in dB of each experts module's output on the unquantised model's hidden states."""
    return {
        name: sqnr_db(io.output, model.get_submodule(name)(*io.inputs))
        for name, io in baseline.layers.items()
    }


def _keep(layers: dict[str, LayerIO], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layers[name] = LayerIO(tuple(x.detach() for x in inputs), output.detach())

    return hook


@torch.no_grad()
def _log_probs(model: nn.Module, tokens_BL: Tensor) -> Tensor:
    logits: Tensor = model(tokens_BL).logits
    return logits.float().log_softmax(dim=-1).cpu()


def _next_token_nll(log_probs_BLV: Tensor, tokens_BL: Tensor) -> float:
    """Summed negative log likelihood of each next token, nats."""
    next_BL1 = tokens_BL[:, 1:, None].to(log_probs_BLV.device)
    return -log_probs_BLV[:, :-1].gather(2, next_BL1).double().sum().item()
