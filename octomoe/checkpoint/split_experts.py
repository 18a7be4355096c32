"""Experts as GPU engines read them: one tensor per expert and projection."""

import torch

from octomoe.checkpoint.encode import Encoded
from octomoe.checkpoint.expert_jobs import ExpertJobs
from octomoe.checkpoint.header import DTYPE_NAMES, Planned
from octomoe.checkpoint.jobs import Group, Outcome, Write, scale_bytes, scale_planned
from octomoe.checkpoint.names import Role
from octomoe.checkpoint.reader import layer_scale_names


class SplitExperts(ExpertJobs):
    """``<module>.<expert>.<projection>.weight``, with its scale beside it."""

    def groups(self) -> list[Group]:
        """One group per expert; the first has what is stored once for a layer."""
        groups = []
        for expert in range(self.num_experts):
            outputs = self._outputs(expert) + (self._layer_outputs() if expert == 0 else [])
            groups.append(Group(tuple(outputs), (self.job(expert, self._write),)))
        return groups

    def _outputs(self, expert: int) -> list[Planned]:
        target, outputs = self.options.found_target, []
        for role in self.roles:
            name, shape = self._name(role, expert), self.shape(role)
            if self.dtype is not None:
                outputs.append(Planned(f"{name}.weight", DTYPE_NAMES[self.dtype], shape))
            else:
                dtype = DTYPE_NAMES[self.format.element.dtype]
                outputs.append(Planned(f"{name}.weight", dtype, shape))
                scale_shape = target.scale_shape
                if scale_shape is None:
                    scale_shape = self.format.scale_shape(shape)
                outputs.append(scale_planned(name + target.scale, self.format, scale_shape))
                if self._has_input_scales:
                    scalar = () if target.scale_shape == () else (1,)
                    outputs.append(Planned(name + target.input_scale, "F32", scalar))
            if dtype := self.bias_dtype(role):
                outputs.append(Planned(f"{name}.bias", dtype, shape[:1]))
        return outputs

    def _write(self, expert: int, write: Write, outcome: Outcome) -> None:
        made, target = self.make(expert, outcome), self.options.found_target
        if expert == 0:
            for name, role in self._layer_scales.items():
                scales = [self._input_scale(role, e) for e in range(self.num_experts)]
                write(name, torch.tensor(scales, dtype=torch.float32))
        for role in self.roles:
            name, weight = self._name(role, expert), made.weights[role]
            if isinstance(weight, Encoded):
                write(f"{name}.weight", weight.q.data)
                write(name + target.scale, scale_bytes(made.scales[role]))
                if self._has_input_scales:
                    scale = torch.tensor(self._input_scale(role, expert), dtype=torch.float32)
                    write(name + target.input_scale, scale)
            else:
                write(f"{name}.weight", weight)
            if role in made.biases:
                write(f"{name}.bias", made.biases[role])

    def _layer_outputs(self) -> list[Planned]:
        return [Planned(name, "F32", (self.num_experts,)) for name in self._layer_scales]

    @property
    def _has_input_scales(self) -> bool:
        """Whether every projection has its own static scale."""
        suffix = self.options.found_target.input_scale
        return bool(self.options.input_scales) and suffix.startswith(".")

    @property
    def _layer_scales(self) -> dict[str, Role]:
        """Names of static scales that hold those of all experts -> whose they are."""
        suffix = self.options.found_target.input_scale
        if not self.options.input_scales or suffix.startswith(".") or self.dtype is not None:
            return {}
        names = layer_scale_names(self.layer, is_gated=Role.GATE in self.roles)
        return dict(zip(names, (Role.UP, Role.DOWN), strict=True))

    def _input_scale(self, role: Role, expert: int) -> float:
        """The larger of gate's and up's for both: they read the same input, vLLM wants one."""
        scales = self.options.input_scales[self.layer.layer]
        return max(scales[r][expert] for r in (self.roles[:-1] if role != Role.DOWN else (role,)))

    def _name(self, role: Role, expert: int) -> str:
        """The tensor's name without ``.weight``."""
        layout = self.reader.family.split_layout
        part = next(part for part in layout.parts if part.role == role)
        name = part.name.replace("{expert}", str(expert))
        return f"{self.layer.module}.{name}".removesuffix(".weight")
