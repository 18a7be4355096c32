"""Measure a model under one scheme: swap its experts, run it, put the originals back."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean

from torch import Tensor, nn

from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import Format
from octomoe.core.qtensor import QTensor
from octomoe.evaluate.compare import Baseline, SchemeResult, measure_layers, measure_text
from octomoe.evaluate.metrics import WeightQuality, ratio_db, weight_quality
from octomoe.evaluate.schemes import Scheme, average_expert_scales
from octomoe.moe.quantized_experts import QuantizedExperts
from octomoe.ops.quantize_experts import fit_width, quantize_experts


def run_scheme(
    model: nn.Module,
    originals: dict[str, ExpertWeights],
    baseline: Baseline,
    scheme: Scheme,
    on_batch: Callable[[], None] = lambda: None,
) -> SchemeResult:
    """What `scheme` costs this model on the baseline's text.

    Args:
        model: the unquantised model; its modules are the same again afterwards.
        originals: name of each experts module -> its weights.
        baseline: from `measure_baseline` of this model.
        scheme: formats of weights and activations.
        on_batch: called after each batch of text.
    """
    quantized = {}
    for name, experts in originals.items():
        quantized[name] = quantize_experts(fit_width(experts, scheme.weights), scheme.weights)
        if scheme.averages_scales:
            quantized[name] = average_expert_scales(quantized[name])
    return measure_quantized(model, originals, quantized, baseline, scheme, on_batch)


def measure_quantized(
    model: nn.Module,
    originals: dict[str, ExpertWeights],
    quantized: dict[str, ExpertWeights],
    baseline: Baseline,
    scheme: Scheme,
    on_batch: Callable[[], None] = lambda: None,
) -> SchemeResult:
    """What experts that are quantised already cost a model on the baseline's text.

    Args:
        model: gets the quantised experts for the time of the measurement.
        originals: name of each experts module -> its unquantised weights.
        quantized: the same, quantised; a width padded with zeros may be larger.
        baseline: from `measure_baseline` of the unquantised model.
        scheme: what to call it, and the format of activations.
        on_batch: called after each batch of text.
    """
    started = time.monotonic()
    qualities: list[WeightQuality] = []
    signal, noise, num_bytes, num_weights = 0.0, 0.0, 0, 0
    saturated, flushed = 0.0, 0.0
    with experts_in_place(model, quantized, scheme.activations):
        for name, experts in quantized.items():
            original = originals[name].pad_width(experts.intermediate_size)
            num_bytes += experts.num_bytes
            for which in ("w13", "w2"):
                weight, q = getattr(original, which), getattr(experts, which)
                assert isinstance(weight, Tensor)
                assert isinstance(q, QTensor)
                # Without the zeros that pad: they are stored, but are no weights.
                num_weights += getattr(originals[name], which).numel()
                signal += weight.double().square().sum().item()
                noise += (weight.double() - q.dequantize().double()).square().sum().item()
                quality = weight_quality(name, which, weight, q)
                saturated += fmean(quality.saturated) * weight.numel()
                flushed += fmean(quality.flushed) * weight.numel()
                qualities.append(quality)
        layers = measure_layers(model, baseline)
        predictions = measure_text(model, baseline, on_batch)
    return SchemeResult(
        name=scheme.name,
        weights=scheme.weights.name,
        activations=scheme.activations.name if scheme.activations else "",
        averages_scales=scheme.averages_scales,
        bytes_per_weight=num_bytes / num_weights,
        sqnr_db=ratio_db(signal, noise),
        saturated=saturated / num_weights,
        flushed=flushed / num_weights,
        kl=predictions.kl,
        kl_error=predictions.kl_error,
        top1=predictions.top1,
        perplexity=predictions.perplexity,
        layer_sqnr_db=layers,
        weight_quality=qualities,
        seconds=time.monotonic() - started,
    )


@contextmanager
def experts_in_place(
    model: nn.Module, experts: dict[str, ExpertWeights], activations: Format | None
) -> Iterator[None]:
    """Put quantised experts into a model, and its own ones back at the end."""
    modules = {name: model.get_submodule(name) for name in experts}
    try:
        for name, weights in experts.items():
            model.set_submodule(name, QuantizedExperts(weights, activations))
        yield
    finally:
        for name, module in modules.items():
            model.set_submodule(name, module)
