"""Experts as GPU engines read them: one tensor per expert and projection."""

import torch

from octomoe.checkpoint.encode import Encoded
from octomoe.checkpoint.expert_jobs import ExpertJobs
from octomoe.checkpoint.header import DTYPE_NAMES, Planned
from octomoe.checkpoint.jobs import Group, Outcome, Write, scale_bytes, scale_planned
from octomoe.checkpoint.names import Role


class SplitExperts(ExpertJobs):
    """``<module>.<expert>.<projection>.weight``, with its scale beside it."""

    def groups(self) -> list[Group]:
        """One group per expert."""
        return [
            Group(tuple(self._outputs(expert)), (self.job(expert, self._write),))
            for expert in range(self.num_experts)
        ]

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
                if self.options.input_scales:
                    scalar = () if target.scale_shape == () else (1,)
                    outputs.append(Planned(name + target.input_scale, "F32", scalar))
            if dtype := self.bias_dtype(role):
                outputs.append(Planned(f"{name}.bias", dtype, shape[:1]))
        return outputs

    def _write(self, expert: int, write: Write, outcome: Outcome) -> None:
        made, target = self.make(expert, outcome), self.options.found_target
        for role in self.roles:
            name, weight = self._name(role, expert), made.weights[role]
            if isinstance(weight, Encoded):
                write(f"{name}.weight", weight.q.data)
                write(name + target.scale, scale_bytes(made.scales[role]))
                if self.options.input_scales:
                    scale = torch.tensor(self._input_scale(role, expert), dtype=torch.float32)
                    write(name + target.input_scale, scale)
            else:
                write(f"{name}.weight", weight)
            if role in made.biases:
                write(f"{name}.bias", made.biases[role])

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
