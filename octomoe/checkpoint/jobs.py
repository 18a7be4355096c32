"""Pieces of work: each reads a little, computes, and writes into planned tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from octomoe.checkpoint.encode import Encoded, How
from octomoe.checkpoint.header import Planned
from octomoe.core.formats import Format


class Write(Protocol):
    """How a job hands over bytes: a tensor's name, data, and an offset into it in bytes."""

    def __call__(self, name: str, data: Tensor, offset: int = 0) -> None:
        """Write."""


@dataclass
class Outcome:
    """What became of the weights of some jobs.

    Attributes:
        weights: how -> number of matrices.
        num_changed: values that re-laying or requantising changed.
        num_values: values of quantised sources.
    """

    weights: dict[How, int] = field(default_factory=dict)
    num_changed: int = 0
    num_values: int = 0

    def add(self, encoded: Encoded) -> None:
        """Count a matrix."""
        self.weights[encoded.how] = self.weights.get(encoded.how, 0) + 1
        if encoded.how != How.QUANTIZED:
            self.num_changed += encoded.num_changed
            self.num_values += encoded.q.data.numel()

    def merge(self, other: "Outcome") -> None:
        """Count what another counted."""
        for how, count in other.weights.items():
            self.weights[how] = self.weights.get(how, 0) + count
        self.num_changed += other.num_changed
        self.num_values += other.num_values


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        run: does it.
        num_bytes: bytes it reads.
    """

    run: Callable[[Write], Outcome]
    num_bytes: int


@dataclass(frozen=True)
class Group:
    """Tensors that lie in one shard, and the jobs that fill them."""

    outputs: tuple[Planned, ...]
    jobs: tuple[Job, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes to write."""
        return sum(tensor.num_bytes for tensor in self.outputs)


def scale_planned(name: str, format: Format, shape: tuple[int, ...]) -> Planned:
    """The tensor that holds scales of `format`: F32, or bytes for E8M0."""
    return Planned(name, "F32" if format.scale_dtype == torch.float32 else "U8", shape)


def scale_bytes(scale: Tensor) -> Tensor:
    """A scale as it is stored."""
    return scale if scale.dtype == torch.float32 else scale.view(torch.uint8)


def check_finite(encoded: Encoded, what: str) -> None:
    """Refuse weights with a NaN or an Inf: their scale is NaN, or bytes of the source's are."""
    is_finite = bool(encoded.q.scale.to(torch.float32).isfinite().all())
    if encoded.how != How.QUANTIZED:
        is_finite &= not bool(((encoded.q.data.view(torch.uint8) & 0x7F) == 0x7F).any())
    if not is_finite:
        raise ValueError(
            f"convert_checkpoint: {what} holds NaN or Inf, but needs finite weights; "
            "repair the source, or leave the module as it is with --keep"
        )
