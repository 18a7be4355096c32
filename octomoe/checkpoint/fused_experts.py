"""Experts of a layer in two tensors: as OctoMoE's kernels read them, or as AWS Neuron does."""

from math import lcm
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from octomoe.checkpoint.encode import Encoded
from octomoe.checkpoint.expert_jobs import ExpertJobs, Made
from octomoe.checkpoint.header import DTYPE_NAMES, Planned
from octomoe.checkpoint.jobs import Group, Outcome, Write, scale_bytes, scale_planned
from octomoe.checkpoint.names import Role
from octomoe.checkpoint.neuron import experts_module
from octomoe.checkpoint.options import ExpertScale
from octomoe.checkpoint.schemes import Arrangement

# The byte that pads a scale row: 1.0 as NxDI pads, and the same in E8M0.
_PADDED_SCALE: Final = {torch.float32: 1.0, torch.uint8: 127}


class FusedExperts(ExpertJobs):
    """``w13 [E, 2F, D]`` and ``w2 [E, D, F]``, or Neuron's transposed ones under its names.

    F is rounded up with zeros to the multiple that is asked for, and so that no scale block holds
    gate and up rows at once.
    """

    def groups(self) -> list[Group]:
        """One group: the jobs of all experts write into the same tensors."""
        outputs = []
        for name, roles in self._tensors.items():
            shape = self._shape(roles)
            dtype = self.format.element.dtype if self.dtype is None else self.dtype
            full = (self.num_experts, *self._stored(shape))
            outputs.append(Planned(name + self._suffix, DTYPE_NAMES[dtype], full))
            if self.dtype is None:
                stored = self._stored(self.format.scale_shape(shape))
                count = 1 if self._has_one_scale else self.num_experts
                outputs.append(scale_planned(self._scale(name), self.format, (count, *stored)))
            if bias := self.bias_dtype(roles[0]):
                outputs.append(Planned(self._bias(name), bias, (self.num_experts, shape[0])))
        jobs = [self.job(expert, self._write) for expert in range(self.num_experts)]
        return [Group(tuple(outputs), tuple(jobs))]

    def _write(self, expert: int, write: Write, outcome: Outcome) -> None:
        made = self.make(expert, outcome)
        for name, roles in self._tensors.items():
            data = self._join([_data(made, role) for role in roles], self._shape(roles))
            write(name + self._suffix, data, expert * data.nbytes)
            if self.dtype is None and (expert == 0 or not self._has_one_scale):
                scale = self._joined_scale(made, roles)
                write(self._scale(name), scale, expert * scale.nbytes)
            if roles[0] in made.biases:
                biases = [made.biases[role] for role in roles]
                rows = self._shape(roles)[0] // len(roles)
                bias = torch.cat([pad(b, (0, rows - b.shape[0])) for b in biases])
                write(self._bias(name), bias, expert * bias.nbytes)

    def _joined_scale(self, made: Made, roles: tuple[Role, ...]) -> Tensor:
        scales = [scale_bytes(made.scales[role]) for role in roles]
        shape = self.format.scale_shape(self._shape(roles))
        if scales[0].shape[0] == shape[0]:
            # One block spans gate and up: both have the same scale.
            scales = scales[:1]
        return self._join(scales, shape, _PADDED_SCALE[scales[0].dtype])

    def _join(self, parts: list[Tensor], shape: tuple[int, ...], value: float = 0) -> Tensor:
        """Parts above one another, each padded to its share of `shape`, as they are stored."""
        rows = shape[0] // len(parts)
        dtype = parts[0].dtype
        if dtype.itemsize == 1:
            parts = [part.view(torch.uint8) for part in parts]
        padded = [
            pad(part, (0, shape[1] - part.shape[1], 0, rows - part.shape[0]), value=value)
            for part in parts
        ]
        joined = torch.cat(padded)
        return joined.t().contiguous() if self._is_neuron else joined

    @property
    def _is_neuron(self) -> bool:
        return self.options.found_target.arrangement == Arrangement.NEURON

    @property
    def _has_one_scale(self) -> bool:
        return self._is_neuron and self.options.expert_scale != ExpertScale.WISE

    @property
    def width(self) -> int:
        """F as stored."""
        rows = max(self.format.block[1], 1) if self.dtype is None else 1
        multiple = lcm(self.options.pad_intermediate, 1 if self._is_neuron else rows)
        return -(-self.layer.intermediate_size // multiple) * multiple

    @property
    def _tensors(self) -> dict[str, tuple[Role, ...]]:
        """Name of each fused tensor, without suffix -> the projections in it."""
        up, down = self.roles[:-1], self.roles[-1:]
        if self._is_neuron:
            module = experts_module(self.reader.family, self.layer)
            return {f"{module}.gate_up_proj": up, f"{module}.down_proj": down}
        return {f"{self.layer.module}.w13": up, f"{self.layer.module}.w2": down}

    @property
    def _suffix(self) -> str:
        return ".weight" if self._is_neuron else ""

    def _scale(self, name: str) -> str:
        return name + self.options.found_target.scale

    def _bias(self, name: str) -> str:
        return f"{name}.bias" if self._is_neuron else f"{name}_bias"

    def _shape(self, roles: tuple[Role, ...]) -> tuple[int, int]:
        """Rows and columns of a fused tensor's matrices, not transposed, F padded."""
        if roles == (Role.DOWN,):
            return self.layer.hidden_size, self.width
        return len(roles) * self.width, self.layer.hidden_size

    def _stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1] if self._is_neuron else shape


def _data(made: Made, role: Role) -> Tensor:
    weight = made.weights[role]
    return weight.q.data if isinstance(weight, Encoded) else weight
