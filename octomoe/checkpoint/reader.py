"""Experts of any checkpoint as values: ``[out, in]`` matrices, quantised or not, one at a time.

Whatever the layout on disk (split, fused, transposed, interleaved, stacked, FP4 in pairs), an
expert is read as the same three matrices, and a quantised one keeps its bytes: only their order
changes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from octomoe.checkpoint.names import (
    ExpertLayer,
    Family,
    Layout,
    Part,
    Role,
    find_family,
    find_layers,
)
from octomoe.checkpoint.neuron import neuron_family
from octomoe.checkpoint.schemes import (
    INPUT_SCALE_SUFFIXES,
    MODELOPT_CONFIG,
    NEURON_CONFIG,
    SCALE_SUFFIXES,
    Scheme,
    read_scheme,
)
from octomoe.checkpoint.source import Checkpoint
from octomoe.core.formats import ALL, FP8_TENSOR, MXFP8, Format, Rounding
from octomoe.core.qtensor import QTensor
from octomoe.errors import refusal

Weight = QTensor | Tensor

_FLOATS: Final = ("BF16", "F16", "F32")
# The magnitudes of FP4 E2M1, by code; E4M3 holds each of them exactly.
_FP4: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Expert:
    """One expert's projections.

    Attributes:
        weights: role (gate, up, down) -> ``[out, in]``.
        biases: role -> ``[out]``; empty if the family has none.
        input_scales: role -> one float32 element; empty if activations are not static.
    """

    weights: Mapping[Role, Weight]
    biases: Mapping[Role, Tensor]
    input_scales: Mapping[Role, Tensor]


class Reader:
    """A checkpoint with its names understood.

    Args:
        checkpoint: an opened checkpoint.
        family_file: further family records, in the form of ``families.toml``.

    Attributes:
        checkpoint: as given.
        family: the record that config.json's ``model_type`` selects.
        scheme: how quantised weights are stored.
        layers: the experts modules.
        scales: name of a quantised tensor -> name of its scale.
        companions: every name that only says something of another tensor.

    Raises:
        ValueError: unknown family, experts missing or of other sizes than config.json states, a
            quantised weight without a scale.
        NotImplementedError: a quantisation method that is not read.
    """

    def __init__(self, checkpoint: Checkpoint, family_file: Path | None = None) -> None:
        self.checkpoint = checkpoint
        config, neuron = checkpoint.config, checkpoint.json(NEURON_CONFIG)
        self.scheme: Scheme = read_scheme(config, checkpoint.json(MODELOPT_CONFIG), neuron)
        self.family: Family = find_family(config, family_file)
        width = None
        if self.scheme.method == "neuron":
            self.family = neuron_family(self.family)
            width = neuron.get("moe_intermediate_size")
        elif self.scheme.method == "octomoe":
            layouts = (_fused_layout(is_gated=self.family.gated), *self.family.layouts)
            self.family = replace(self.family, layouts=layouts)
            width = config["quantization_config"].get("intermediate_size")
        if width is not None:
            # The experts were padded; config.json states the model's own width.
            config = {**config, "padded width": width}
            self.family = replace(self.family, intermediate_size=("padded width",))
        shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
        self.layers: list[ExpertLayer] = find_layers(self.family, config, shapes)
        packed = {
            layer.tensor(part.role, expert)
            for layer in self.layers
            for part in layer.layout.parts
            if part.packed
            for expert in range(layer.num_experts if part.is_per_expert else 1)
        }
        self._packed = packed
        self.scales: dict[str, str] = {}
        self.companions: set[str] = set()
        for name, entry in checkpoint.tensors.items():
            if entry.dtype.startswith("F8_E") and entry.dtype != "F8_E8M0":
                self.scales[name] = self._find_scale(name)
        for name in sorted(packed):
            self.scales[name] = self._find_scale(name)
        for name in self.scales:
            self.companions.update(self.companions_of(name))
        for layer in self.layers:
            self.companions.update(self.layer_companions(layer))

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of experts, scales included, per expert weight."""
        tensors, matrices = self.checkpoint.tensors, 3 if self.family.gated else 2
        num_bytes = num_weights = 0
        for layer in self.layers:
            for name in layer.names:
                for each in (name, *self.companions_of(name)):
                    num_bytes += tensors[each].num_bytes
            size = layer.hidden_size * layer.intermediate_size
            num_weights += matrices * layer.num_experts * size
        return num_bytes / num_weights

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored in 8 bits or less, with a scale."""
        return name in self.scales

    def check_dtype(self, name: str) -> None:
        """Refuse a weight that is stored as no number to compute with.

        Raises:
            ValueError: it is.
        """
        dtype = self.checkpoint.tensors[name].dtype
        if name not in self.scales and dtype not in _FLOATS:
            got = f"has tensor {name!r} of dtype {dtype}"
            needs = "BF16, F16, F32, or FP8 with a scale"
            raise ValueError(refusal("checkpoint", self.checkpoint.path, got, needs))

    def weight(self, name: str, index: int | None = None) -> Weight:
        """A weight, or one expert of a stacked one, with its axes as stored.

        Raises:
            ValueError: its dtype or the shape of its scale do not fit.
        """
        entry = self.checkpoint.tensors[name]
        if name not in self.scales:
            self.check_dtype(name)
            return self.checkpoint.read(name, index)
        scale = self._scale(name, index)
        if name in self._packed:
            return _from_fp4(self.checkpoint.read(name, index), scale)
        data = self.checkpoint.read(name, index)
        format = self._format(name, scale)
        expected = format.scale_shape(tuple(data.shape))
        if (scale.numel() == 1 and max(expected) == 1) or (
            scale.dim() == 1 and scale.numel() == expected[0] * expected[-1]
        ):
            scale = scale.reshape(expected)
        if tuple(scale.shape) != expected:
            got = f"has scale {self.scales[name]!r} of shape {tuple(scale.shape)}"
            needs = f"{expected} for {format.name} of {name!r} {tuple(data.shape)}"
            raise ValueError(refusal("checkpoint", self.checkpoint.path, got, needs))
        if data.dtype != format.element.dtype:
            got = f"has tensor {name!r} of dtype {entry.dtype}"
            needs = f"{format.element.name} as its config says"
            raise ValueError(refusal("checkpoint", self.checkpoint.path, got, needs))
        return QTensor(data, scale, format)

    def expert(self, layer: ExpertLayer, expert: int) -> Expert:
        """One expert's matrices, biases and static input scales."""
        weights: dict[Role, Weight] = {}
        biases: dict[Role, Tensor] = {}
        input_scales: dict[Role, Tensor] = {}
        for part in layer.layout.parts:
            name = layer.tensor(part.role, expert)
            if name not in self.checkpoint.tensors:
                continue
            stored = self._stored_expert(layer, part, name, expert)
            bias = self._bias(layer, part, expert)
            scale = self._input_scale(name, expert, is_stacked=not part.is_per_expert)
            if scale is None:
                scale = self._layer_input_scale(layer, part.role, expert)
            roles = (Role.GATE, Role.UP) if part.role == Role.GATE_UP else (part.role,)
            for role in roles:
                half = None if part.role == role else role
                weights[role] = stored if half is None else split_half(stored, part, half)
                if bias is not None:
                    biases[role] = bias if half is None else _bias_half(bias, part, half)
                if scale is not None:
                    input_scales[role] = scale
        return Expert(weights, biases, input_scales)

    def expert_scales(
        self, layer: ExpertLayer, expert: int
    ) -> Iterator[tuple[str, tuple[int, ...], Tensor, Format]]:
        """Of each quantised part: name, shape ``(out, in)``, scale and format, without its data."""
        for part in layer.layout.parts:
            name = layer.tensor(part.role, expert)
            if name not in self.scales:
                continue
            scale = self._scale(name, None if part.is_per_expert else expert)
            format = MXFP8 if part.packed else self._format(name, scale)
            width = layer.intermediate_size * (2 if part.role == Role.GATE_UP else 1)
            shape = (width, layer.hidden_size)
            if part.axes.endswith("in out"):
                experts, rows, columns = format.block
                format = replace(format, block=(experts, columns, rows))
            yield name, shape[::-1] if part.role == Role.DOWN else shape, scale, format

    def companions_of(self, name: str) -> list[str]:
        """The tensors that say something of `name`: its scale and static input scale."""
        if name not in self.scales:
            return []
        return [self.scales[name], *self._input_scale_names(name)]

    def layer_companions(self, layer: ExpertLayer) -> list[str]:
        """Tensors that hold static input scales of all experts of a layer."""
        names = layer_scale_names(layer, is_gated=self.family.gated)
        return [name for name in names if name in self.checkpoint.tensors]

    def _layer_input_scale(self, layer: ExpertLayer, role: Role, expert: int) -> Tensor | None:
        name = layer_scale_names(layer, is_gated=self.family.gated)[role == Role.DOWN]
        if name not in self.checkpoint.tensors:
            return None
        return self.checkpoint.read(name).to(torch.float32)[expert]

    def _stored_expert(self, layer: ExpertLayer, part: Part, name: str, expert: int) -> Weight:
        """``[out, in]`` of one part."""
        if part.is_per_expert:
            weight = self.weight(name)
        elif "*" in part.axes:
            weight = self._stacked_rows(layer, part, name, expert)
        else:
            weight = self.weight(name, expert)
        return _transposed(weight) if part.axes.endswith("in out") or "*in" in part.axes else weight

    def _stacked_rows(self, layer: ExpertLayer, part: Part, name: str, expert: int) -> Weight:
        """One expert of a matrix that joins experts and rows."""
        if self.is_quantized(name):
            got = f"has quantised tensor {name!r} of axes {part.axes!r}"
            raise NotImplementedError(
                refusal("checkpoint", self.checkpoint.path, got, "one tensor per expert")
            )
        self.check_dtype(name)
        return self.checkpoint.read_rows(name, expert, layer.num_experts)

    def _bias(self, layer: ExpertLayer, part: Part, expert: int) -> Tensor | None:
        if not part.bias:
            return None
        name = f"{layer.module}.{part.bias.format(expert=expert)}"
        if name not in self.checkpoint.tensors:
            return None
        return self.checkpoint.read(name, None if "{expert}" in part.bias else expert)

    def _input_scale_names(self, name: str) -> list[str]:
        base = name.removesuffix(".weight")
        found = (base + suffix for suffix in INPUT_SCALE_SUFFIXES)
        return [name for name in found if name in self.checkpoint.tensors]

    def _input_scale(self, name: str, expert: int, *, is_stacked: bool) -> Tensor | None:
        names = self._input_scale_names(name) if self.is_quantized(name) else []
        if not names:
            return None
        scale = self.checkpoint.read(names[0]).to(torch.float32)
        return scale.reshape(-1)[expert if is_stacked and scale.numel() > 1 else 0]

    def _find_scale(self, name: str) -> str:
        base = name.removesuffix(".weight")
        candidates = [base + suffix for suffix in SCALE_SUFFIXES]
        if name.endswith("_blocks"):
            candidates = [name.removesuffix("_blocks") + "_scales"]
        for candidate in candidates:
            if candidate in self.checkpoint.tensors and candidate != name:
                return candidate
        got = f"has quantised tensor {name!r} without a scale"
        needs = f"one of {', '.join(candidates)}"
        raise ValueError(refusal("checkpoint", self.checkpoint.path, got, needs))

    def _scale(self, name: str, index: int | None) -> Tensor:
        """The scale of a tensor, or of one expert of it; E8M0 stays as it is."""
        entry = self.checkpoint.tensors[self.scales[name]]
        num_experts = self.checkpoint.tensors[name].shape[0]
        is_shared = index is not None and (not entry.shape or entry.shape[0] != num_experts)
        scale = self.checkpoint.read(entry.name, None if is_shared else index)
        if is_shared and scale.dim() == 3:
            scale = scale[0]
        if scale.dtype == torch.uint8:
            return scale.view(torch.float8_e8m0fnu)
        return scale if scale.dtype == torch.float8_e8m0fnu else scale.to(torch.float32)

    def _format(self, name: str, scale: Tensor) -> Format:
        format = self.scheme.weights
        if format is None:
            got = f"has quantised tensor {name!r}"
            needs = "a quantization_config that says how"
            raise ValueError(refusal("checkpoint", self.checkpoint.path, got, needs))
        if self.scheme.method == "neuron":
            # The channel is the stored matrix's last axis for experts, its first for the rest.
            is_expert = any(name.startswith(layer.module + ".") for layer in self.layers)
            return replace(format, block=(1, ALL, 1)) if is_expert else format
        if scale.dtype == torch.float8_e8m0fnu and format != MXFP8:
            return Format(format.block, scale.dtype, rounding=Rounding.POW2)
        if format == FP8_TENSOR and scale.numel() == 2 and not name.endswith(".weight"):
            # A fused gate_up tensor with a scale for each half of its rows.
            return Format((1, self.checkpoint.tensors[name].shape[-2] // 2, ALL))
        return format


def stack_experts(experts: list[Weight]) -> Weight:
    """Matrices of one format as one 3-D value ``[E, out, in]``."""
    if isinstance(experts[0], Tensor):
        return torch.stack([e for e in experts if isinstance(e, Tensor)])
    values = [e for e in experts if isinstance(e, QTensor)]
    format = values[0].format
    if format == FP8_TENSOR:
        format = replace(format, block=(1, ALL, ALL))
    data = torch.stack([value.data.view(torch.uint8) for value in values])
    scale = torch.stack([value.scale for value in values])
    return QTensor(data.view(format.element.dtype), scale, format)


def _bias_half(bias: Tensor, part: Part, role: Role) -> Tensor:
    half = split_half(bias, part, role)
    assert isinstance(half, Tensor)
    return half


def _fused_layout(*, is_gated: bool) -> Layout:
    """What the target `octomoe` writes."""
    up = Role.GATE_UP if is_gated else Role.UP
    return Layout(
        "octomoe",
        (
            Part(up, "w13", "expert out in", bias="w13_bias"),
            Part(Role.DOWN, "w2", "expert out in", bias="w2_bias"),
        ),
    )


def layer_scale_names(layer: ExpertLayer, *, is_gated: bool) -> tuple[str, str]:
    """Where Transformers has the static input scales of a layer's experts: up, and down."""
    up = "gate_up_proj" if is_gated else "up_proj"
    base = f"{layer.module}.{{}}_activation_scale"
    return base.format(up), base.format("down_proj")


def split_half(weight: Weight, part: Part, role: Role) -> Weight:
    """The gate or the up rows of a `Role.GATE_UP` part ``[2F, in]`` (or of its bias ``[2F]``)."""
    width = weight.shape[0] // 2
    is_first = (role == Role.GATE) != (part.order == "up_first")
    if part.order == "interleaved":
        rows = slice(0 if is_first else 1, None, 2)
    else:
        rows = slice(0, width) if is_first else slice(width, None)
    if isinstance(weight, Tensor):
        return weight[rows]
    block, scale = weight.format.block[1], weight.scale
    if block == 1:
        scale = scale[rows]
    elif block != ALL:
        if part.order == "interleaved" or width % block:
            got = f"has scale blocks of {block} rows over {width} {part.order} gate and up rows"
            needs = "blocks that hold gate rows or up rows only"
            raise ValueError(refusal("checkpoint", part.name, got, needs))
        count = width // block
        scale = scale[:count] if is_first else scale[count:]
    data = weight.data.view(torch.uint8)[rows].view(weight.data.dtype)
    is_whole = block == width and weight.format.block[2] == ALL
    return QTensor(data, scale, FP8_TENSOR if is_whole else weight.format)


def _transposed(weight: Weight) -> Weight:
    if isinstance(weight, Tensor):
        return weight.t().contiguous()
    experts, rows, columns = weight.format.block
    flipped = replace(weight.format, block=(experts, columns, rows))
    data = weight.data.view(torch.uint8).t().contiguous().view(weight.data.dtype)
    return QTensor(data, weight.scale.t().contiguous(), flipped)


def _from_fp4(packed: Tensor, scale: Tensor) -> QTensor:
    """FP4 pairs ``[rows, ...]`` (the even element in the low half) as MXFP8 of the same values."""
    packed = packed.view(torch.uint8).reshape(packed.shape[0], -1)
    codes = torch.stack([packed & 0xF, packed >> 4], dim=2).flatten(1)
    table = torch.tensor([*_FP4, *(-value for value in _FP4)]).to(torch.float8_e4m3fn)
    data = table.view(torch.uint8)[codes.int()].view(torch.float8_e4m3fn)
    return QTensor(data, scale.reshape(data.shape[0], -1), MXFP8)
