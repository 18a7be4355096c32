"""The experts of one layer: what a target stores of them, and the work that makes it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octomoe.checkpoint.encode import Encoded, encode, encode_pair, values_of
from octomoe.checkpoint.jobs import Group, Job, Outcome, Write, check_finite
from octomoe.checkpoint.names import ExpertLayer, Role
from octomoe.checkpoint.options import ExpertScale, Options
from octomoe.checkpoint.reader import Reader


@dataclass(frozen=True)
class Made:
    """One expert, ready to be stored.

    Attributes:
        weights: role -> matrix ``[out, in]``: `Encoded`, or plain numbers if not quantised.
        biases: role -> ``[out]``.
        scales: role -> the scale to store, which is not the matrix's own under
            `ExpertScale.AVERAGED_LEGACY`; empty if not quantised.
    """

    weights: Mapping[Role, Encoded | Tensor]
    biases: Mapping[Role, Tensor]
    scales: Mapping[Role, Tensor]


class ExpertJobs(ABC):
    """Plans and does the work for one layer.

    Args:
        reader: the source.
        layer: which experts.
        options: what is asked for.
        dtype: write plain numbers of this dtype instead of quantising.
    """

    def __init__(
        self, reader: Reader, layer: ExpertLayer, options: Options, dtype: torch.dtype | None
    ) -> None:
        self.reader, self.layer, self.options, self.dtype = reader, layer, options, dtype
        self.format = options.format
        self.num_experts = layer.num_experts
        self.roles = (
            (Role.GATE, Role.UP, Role.DOWN) if reader.family.gated else (Role.UP, Role.DOWN)
        )
        tensors = reader.checkpoint.tensors
        self._job_bytes = sum(tensors[name].num_bytes for name in layer.names) // self.num_experts
        self._own_scales: dict[int, dict[Role, Tensor]] = {}
        self._common_scales: dict[Role, Tensor] = {}

    @abstractmethod
    def groups(self) -> list[Group]:
        """The layer's tensors and the jobs that fill them."""

    @property
    def gather_jobs(self) -> list[Job]:
        """What comes before `groups`' jobs: every expert's scales, where they share one."""
        if self.dtype is not None or self.options.expert_scale == ExpertScale.WISE:
            return []
        return [self.job(expert, self._gather) for expert in range(self.num_experts)]

    def settle(self) -> None:
        """Make the experts' common scales of the gathered ones."""
        for role in self.roles if self._own_scales else ():
            scales = [self._own_scales[e][role] for e in range(self.num_experts)]
            stacked_E = torch.stack([scale.to(torch.float32) for scale in scales])
            is_shared = self.options.expert_scale == ExpertScale.SHARED
            common = stacked_E.amax(0) if is_shared else stacked_E.mean(0)
            self._common_scales[role] = common.to(scales[0].dtype)
        self._own_scales.clear()

    @property
    def width(self) -> int:
        """F as stored."""
        return self.layer.intermediate_size

    def shape(self, role: Role) -> tuple[int, int]:
        """``(out, in)`` of a projection."""
        hidden_size, width = self.layer.hidden_size, self.layer.intermediate_size
        return (hidden_size, width) if role == Role.DOWN else (width, hidden_size)

    def bias_dtype(self, role: Role) -> str:
        """The stored dtype of a projection's bias, "" if it has none."""
        parts = (self.layer.part(role), self.layer.part(Role.GATE_UP))
        part = parts[0] or parts[1]
        name = self.layer.bias(part.role, 0) if part is not None else ""
        return self.reader.checkpoint.tensors[name].dtype if name else ""

    def make(self, expert: int, outcome: Outcome) -> Made:
        """Read and quantise one expert."""
        read = self.reader.expert(self.layer, expert)
        if self.dtype is not None:
            plain = {role: values_of(weight, self.dtype) for role, weight in read.weights.items()}
            return Made(plain, read.biases, {})
        shared = self._common_scales if self.options.expert_scale == ExpertScale.SHARED else {}
        numerics, weights = self.options.numerics, dict(read.weights)
        made: dict[Role, Encoded] = {}
        if self.options.shares_gate_up and Role.GATE in weights and not shared:
            gate, up = weights.pop(Role.GATE), weights.pop(Role.UP)
            made[Role.GATE], made[Role.UP] = encode_pair(gate, up, numerics)
        for role, weight in weights.items():
            made[role] = encode(weight, numerics, shared.get(role))
        for role, encoded in made.items():
            check_finite(
                encoded, f"the {role} projection of expert {expert} of {self.layer.module}"
            )
            outcome.add(encoded)
        scales = {role: self._common_scales.get(role, made[role].q.scale) for role in made}
        return Made(made, read.biases, scales)

    def job(self, expert: int, run: Callable[[int, Write, Outcome], None]) -> Job:
        """A job that does something for one expert."""

        def go(write: Write) -> Outcome:
            outcome = Outcome()
            run(expert, write, outcome)
            return outcome

        return Job(go, self._job_bytes)

    def _gather(self, expert: int, _: Write, outcome: Outcome) -> None:
        made = self.make(expert, outcome)
        scales = {role: scale.clone() for role, scale in made.scales.items()}
        if self.options.shares_gate_up and Role.GATE in scales:
            scales[Role.GATE] = scales[Role.UP] = torch.maximum(
                scales[Role.GATE].float(), scales[Role.UP].float()
            ).to(scales[Role.UP].dtype)
        self._own_scales[expert] = scales
        # Counted when they are written.
        outcome.weights.clear()
        outcome.num_changed = outcome.num_values = 0
