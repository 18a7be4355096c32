"""The (weight, activation) pairs that `octomoe demo` compares, and one that warns."""

from dataclasses import dataclass, replace
from typing import Final

from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import (
    ALL,
    E4M3_240,
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_TENSOR,
    FP8_TOKEN,
    MXFP8,
    Format,
)
from octomoe.core.qtensor import QTensor


@dataclass(frozen=True)
class Scheme:
    """A way to quantise the experts of a model.

    Attributes:
        name: what tables and plots call it.
        weights: format of w13 and w2.
        activations: format of hidden states and intermediate; None for weight-only.
        averages_scales: replace every expert's scales by their mean over the experts, without
            requantising the data: the mistake that the demo warns of.
    """

    name: str
    weights: Format
    activations: Format | None = None
    averages_scales: bool = False


FP8_CHANNEL_SHARED: Final = Format((ALL, 1, ALL))

SCHEMES: Final = (
    Scheme("tensor", FP8_TENSOR),
    Scheme("expert", FP8_EXPERT),
    Scheme("channel", FP8_CHANNEL),
    Scheme("channel, shared by experts", FP8_CHANNEL_SHARED),
    Scheme("channel, range 240", FP8_CHANNEL.derive(element=E4M3_240)),
    Scheme("block128", FP8_BLOCK128),
    Scheme("mxfp8", MXFP8),
    Scheme("tensor × tensor", FP8_TENSOR, FP8_TENSOR),
    Scheme("tensor × token", FP8_TENSOR, FP8_TOKEN),
    Scheme("expert × token", FP8_EXPERT, FP8_TOKEN),
    Scheme("channel × token", FP8_CHANNEL, FP8_TOKEN),
    Scheme("block128 × group128", FP8_BLOCK128, FP8_GROUP128),
    Scheme("mxfp8 × mxfp8", MXFP8, MXFP8),
    Scheme("channel, scales averaged", FP8_CHANNEL, averages_scales=True),
)


def average_expert_scales(experts: ExpertWeights) -> ExpertWeights:
    """The same data under scales averaged over the experts: every expert's gain is then wrong.

    This is what some converters did to fit per-expert scales into one vector. It is here to show
    what it costs; to share a scale, requantise with it (`FP8_CHANNEL_SHARED`).

    Args:
        experts: quantised with a scale per expert.
    """
    return replace(experts, w13=_averaged(experts.w13), w2=_averaged(experts.w2))


def _averaged(weight: object) -> QTensor:
    assert isinstance(weight, QTensor)
    scale = weight.compact_scale
    mean = scale.mean(dim=0, keepdim=True).expand_as(scale).contiguous()
    return QTensor(weight.data, mean, weight.format)
