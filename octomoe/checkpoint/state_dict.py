"""A checkpoint of any scheme in memory: as plain numbers under its family's names, or as experts.

This is how converted checkpoints are evaluated: Transformers loads the plain numbers, and the
experts are then put in as they are stored.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from octomoe.checkpoint.encode import values_of
from octomoe.checkpoint.names import ExpertLayer, Part, Role
from octomoe.checkpoint.neuron import restore_name
from octomoe.checkpoint.reader import Expert, Reader, Weight
from octomoe.core.formats import ALL
from octomoe.core.qtensor import QTensor


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one layer, as `octomoe.ExpertWeights` takes them.

    Attributes:
        layer: the layer's number.
        w13: ``[E, 2F, D]`` (``[E, F, D]`` without a gate).
        w2: ``[E, D, F]``.
        w13_bias, w2_bias: ``[E, 2F]`` and ``[E, D]``, or None.
        w13_input_scale, w2_input_scale: the largest static scale over the experts, or None.
    """

    layer: int
    w13: Weight
    w2: Weight
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    w13_input_scale: Tensor | None = None
    w2_input_scale: Tensor | None = None


def read_experts(reader: Reader, layer: ExpertLayer) -> LayerExperts:
    """All experts of a layer, in memory.

    Where scale blocks cover several rows, F is rounded up to them with zeros, so that none holds
    gate and up rows at once.
    """
    experts = [reader.expert(layer, e) for e in range(layer.num_experts)]
    up_roles = (Role.GATE, Role.UP) if reader.family.gated else (Role.UP,)
    sample = experts[0].weights[Role.UP]
    multiple = max(sample.format.block[1], 1) if isinstance(sample, QTensor) else 1
    width = -(-layer.intermediate_size // multiple) * multiple
    return LayerExperts(
        layer.layer,
        _stacked([[_padded(e.weights[r], width, 0) for r in up_roles] for e in experts]),
        _stacked([[_padded(e.weights[Role.DOWN], 0, width)] for e in experts]),
        _stacked_biases(experts, up_roles, width),
        _stacked_biases(experts, (Role.DOWN,), layer.hidden_size),
        _largest(experts, up_roles),
        _largest(experts, (Role.DOWN,)),
    )


def plain_state_dict(reader: Reader, like: Reader, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor as plain numbers, under the names and in the layout of another checkpoint.

    Args:
        reader: the checkpoint to read.
        like: the checkpoint whose names and layout to use: what `reader`'s was made from.
        dtype: of experts, and of other weights that are quantised.
    """
    tensors: dict[str, Tensor] = {}
    of_layer = {(layer.layer, layer.is_mtp): layer for layer in like.layers}
    experts = set()
    for layer in reader.layers:
        experts.update(layer.names)
        tensors |= _lay_out(reader, layer, of_layer[layer.layer, layer.is_mtp], dtype)
    for name in reader.checkpoint.tensors:
        if name in experts or name in reader.companions:
            continue
        is_neuron = reader.scheme.method == "neuron"
        own_name = restore_name(reader.family, name) if is_neuron else name
        if reader.is_quantized(name):
            tensors[own_name] = values_of(reader.weight(name), dtype)
        else:
            tensors[own_name] = reader.checkpoint.read(name)
    return tensors


def _lay_out(
    reader: Reader, layer: ExpertLayer, like: ExpertLayer, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The experts of a layer under the names, and in the layout, of `like`."""
    stacked: dict[str, list[Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for e in range(layer.num_experts):
        expert = reader.expert(layer, e)
        for part in like.layout.parts:
            roles = (Role.GATE, Role.UP) if part.role == Role.GATE_UP else (part.role,)
            shape = (like.intermediate_size, like.hidden_size)
            out, into = shape[::-1] if part.role == Role.DOWN else shape
            weights = [values_of(expert.weights[role], dtype)[:out, :into] for role in roles]
            weight = _joined(weights, part)
            stored = weight.t() if part.axes.endswith("in out") else weight
            _put(tensors, stacked, like.tensor(part.role, e), stored, part)
            if name := like.bias(part.role, e):
                bias = _joined([expert.biases[role][:out] for role in roles], part)
                _put(tensors, stacked, name, bias, part)
    for name, values in stacked.items():
        is_joined = "*" in like.layout.parts[0].axes
        tensors[name] = torch.cat(values) if is_joined else torch.stack(values)
    return tensors


def _put(
    tensors: dict[str, Tensor], stacked: dict[str, list[Tensor]], name: str, x: Tensor, part: Part
) -> None:
    if part.is_per_expert:
        tensors[name] = x.contiguous()
    else:
        stacked.setdefault(name, []).append(x)


def _joined(halves: list[Tensor], part: Part) -> Tensor:
    """Gate and up in the part's order; a single projection as it is."""
    if len(halves) == 1:
        return halves[0]
    if part.order == "interleaved":
        return torch.stack(halves, dim=1).flatten(0, 1)
    return torch.cat(halves[::-1] if part.order == "up_first" else halves)


def _padded(weight: Weight, rows: int, columns: int) -> Weight:
    """A matrix with zeros up to `rows` and `columns`; 0 leaves an axis as it is."""
    extra = (max(rows - weight.shape[0], 0), max(columns - weight.shape[1], 0))
    if extra == (0, 0):
        return weight
    if isinstance(weight, Tensor):
        return pad(weight, (0, extra[1], 0, extra[0]))
    data = pad(weight.data.view(torch.uint8), (0, extra[1], 0, extra[0]))
    # Scale blocks end where the padding does, so their number stays.
    return QTensor(data.view(weight.data.dtype), weight.scale, weight.format)


def _stacked(experts: list[list[Weight]]) -> Weight:
    """One 3-D value of every expert's matrices above one another."""
    if not all(isinstance(weight, QTensor) for weights in experts for weight in weights):
        return torch.stack([torch.cat([values_of(w, torch.float32) for w in ws]) for ws in experts])
    values = [[weight for weight in weights if isinstance(weight, QTensor)] for weights in experts]
    first = values[0][0]
    format = first.format
    if format.block[1] == ALL and len(values[0]) > 1:
        # A scale for gate and one for up.
        format = replace(format, block=(1, first.shape[0], format.block[2]))
    format = replace(format, block=(1, *format.block[1:]))
    data = torch.stack([torch.cat([w.data.view(torch.uint8) for w in ws]) for ws in values])
    scale = torch.stack([_cat_scales([w.scale for w in ws]) for ws in values])
    return QTensor(data.view(first.data.dtype), scale, format)


def _cat_scales(scales: list[Tensor]) -> Tensor:
    if scales[0].dtype == torch.float8_e8m0fnu:
        return torch.cat([scale.view(torch.uint8) for scale in scales]).view(torch.float8_e8m0fnu)
    return torch.cat(scales)


def _stacked_biases(experts: list[Expert], roles: tuple[Role, ...], width: int) -> Tensor | None:
    if not experts[0].biases:
        return None
    rows = [[pad(e.biases[r], (0, width - e.biases[r].shape[0])) for r in roles] for e in experts]
    return torch.stack([torch.cat(biases) for biases in rows])


def _largest(experts: list[Expert], roles: tuple[Role, ...]) -> Tensor | None:
    scales = [e.input_scales[role] for e in experts for role in roles if role in e.input_scales]
    return torch.stack(scales).amax().reshape(1) if scales else None
