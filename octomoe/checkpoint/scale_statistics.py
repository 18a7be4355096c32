"""What the scales of quantised experts look like, layer by layer, without reading a weight.

Scales of a large model are many (per block) or large (MXFP8: a byte for every 32 weights). Where
they pass a budget, evenly spaced layers are read, and evenly spaced experts of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, nan
from statistics import median

import torch
from torch import Tensor

from octomoe.checkpoint.direct import buffer_of
from octomoe.checkpoint.encode import has_pow2_scales
from octomoe.checkpoint.names import ExpertLayer, Role
from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.stream import run_all

# Fewer of either tell too little, whatever the budget.
_MIN_LAYERS = 3
_MIN_EXPERTS = 8


@dataclass(frozen=True)
class Budget:
    """How much may be read: pieces, bytes, and pieces side by side."""

    reads: int
    num_bytes: int
    workers: int


@dataclass(frozen=True)
class ScaleStatistics:
    """The scales of one part of one layer's experts.

    Attributes:
        module: the experts module.
        layer: its number.
        role: gate, up, down or gate_up.
        num_experts: experts that were looked at.
        least, median, largest: of the positive finite scales, the median that of the experts'
            medians; NaN if there are none.
        spread: the largest of the experts' medians over the least.
        is_pow2: whether every scale is a power of two.
        is_constant: whether all experts have the same scales.
        num_not_positive: scales that are zero or less.
        num_not_finite: scales that are NaN or Inf.
    """

    module: str
    layer: int
    role: str
    num_experts: int
    least: float
    median: float
    largest: float
    spread: float
    is_pow2: bool
    is_constant: bool
    num_not_positive: int
    num_not_finite: int


def measure_scales(reader: Reader, budget: Budget) -> list[ScaleStatistics]:
    """Statistics of each quantised part of each layer, or of some within the budget.

    Raises:
        OSError: a scale cannot be read.
    """
    layers = [layer for layer in reader.layers if any(map(reader.is_quantized, layer.names))]
    layers, experts_of = _sample(reader, layers, budget)
    gathered: dict[tuple[str, Role], dict[int, _OneExpert]] = {}

    def tasks() -> Iterator[Callable[[], None]]:
        for layer in layers:
            for role in (part.role for part in layer.layout.parts):
                gathered[layer.module, role] = {}
            for expert in experts_of(layer):
                yield lambda layer=layer, expert=expert: read(layer, expert)  # type: ignore[misc]

    def read(layer: ExpertLayer, expert: int) -> None:
        role_of = {layer.tensor(part.role, expert): part.role for part in layer.layout.parts}
        for name, _, scale, _ in reader.expert_scales(layer, expert):
            gathered[layer.module, role_of[name]][expert] = _one_expert(scale)

    run_all(tasks(), budget.workers)
    return [
        _join(layer, part.role, list(gathered[layer.module, part.role].values()))
        for layer in layers
        for part in layer.layout.parts
        if gathered[layer.module, part.role]
    ]


@dataclass(frozen=True)
class _OneExpert:
    digest: int
    least: float
    median: float
    largest: float
    is_pow2: bool
    num_not_positive: int
    num_not_finite: int


def _one_expert(scale: Tensor) -> _OneExpert:
    flat = scale.reshape(-1)
    values = flat.to(torch.float32)
    is_finite = values.isfinite()
    is_positive = values > 0
    good = values[is_finite & is_positive]
    low, high = good.aminmax() if good.numel() else (values.new_tensor(nan),) * 2
    return _OneExpert(
        digest=hash(bytes(buffer_of(flat.view(torch.uint8)))),
        least=low.item(),
        median=good.median().item() if good.numel() else nan,
        largest=high.item(),
        is_pow2=has_pow2_scales(values[is_finite]),
        num_not_positive=int((values <= 0).sum()),
        num_not_finite=int((~is_finite).sum()),
    )


def _join(layer: ExpertLayer, role: Role, experts: list[_OneExpert]) -> ScaleStatistics:
    medians = [e.median for e in experts if e.median > 0]
    return ScaleStatistics(
        module=layer.module,
        layer=layer.layer,
        role=role,
        num_experts=len(experts),
        least=min((e.least for e in experts if e.median > 0), default=nan),
        median=median(medians) if medians else nan,
        largest=max((e.largest for e in experts if e.median > 0), default=nan),
        spread=max(medians) / min(medians) if medians else nan,
        is_pow2=all(e.is_pow2 for e in experts),
        is_constant=len(experts) > 1 and len({e.digest for e in experts}) == 1,
        num_not_positive=sum(e.num_not_positive for e in experts),
        num_not_finite=sum(e.num_not_finite for e in experts),
    )


def _sample(
    reader: Reader, layers: list[ExpertLayer], budget: Budget
) -> tuple[list[ExpertLayer], Callable[[ExpertLayer], list[int]]]:
    """The layers to look at, and which experts of each."""
    tensors = reader.checkpoint.tensors
    names = [n for layer in layers for n in layer.names if reader.is_quantized(n)]
    reads = sum(layer.num_experts * len(layer.layout.parts) for layer in layers)
    num_bytes = sum(tensors[reader.scales[name]].num_bytes for name in names)
    excess = max(reads / budget.reads, num_bytes / budget.num_bytes, 1.0)
    chosen = _evenly(len(layers), max(int(len(layers) / excess), _MIN_LAYERS))
    left = excess * len(chosen) / max(len(layers), 1)
    share = 1.0 / left if left > 1.0 else inf

    def experts_of(layer: ExpertLayer) -> list[int]:
        count = layer.num_experts if share == inf else int(layer.num_experts * share)
        return _evenly(layer.num_experts, max(count, _MIN_EXPERTS))

    return [layers[i] for i in chosen], experts_of


def _evenly(size: int, count: int) -> list[int]:
    """`count` indices below `size` with the first and the last, or all.

    >>> _evenly(10, 4), _evenly(2, 4)
    ([0, 3, 6, 9], [0, 1])
    """
    if count >= size:
        return list(range(size))
    return [round(i * (size - 1) / (count - 1)) for i in range(count)]
