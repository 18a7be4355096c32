"""What stands between the two expert GEMMs: a description; the arithmetic is in `reference`."""

from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from typing import Final, Self

from octomoe.errors import refusal


class ActivationKind(StrEnum):
    """The nonlinear function applied to the gate rows, or to all rows without a gate."""

    SILU = "silu"  # x * sigmoid(alpha * x)
    GELU = "gelu"  # x * Phi(x), by erf
    GELU_TANH = "gelu_tanh"  # x * Phi(x), by the tanh approximation
    RELU2 = "relu2"  # max(x, 0)^2


class LimitOn(StrEnum):
    """Where a clamp limit applies to the gate: before or after the nonlinear function."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Activation:
    """Gated: ``kind(gate) * (up + up_offset)``; not gated: ``kind(x)``.

    Attributes:
        kind: the nonlinear function.
        gated: whether the up-projection yields gate rows and up rows (2F) or F rows.
        alpha: steepness of the sigmoid of `SILU`.
        limit: if given, ``up`` is clamped to ``[-limit, limit]`` and the gate to at most `limit`.
        limit_on: whether the gate is clamped before or after the nonlinear function.
        up_offset: added to ``up``.

    Raises:
        ValueError: an option that the chosen kind, or an activation without a gate, does not have.

    >>> Activation.parse("silu:limit=7") == Activation(ActivationKind.SILU, limit=7.0)
    True
    """

    kind: ActivationKind = ActivationKind.SILU
    gated: bool = True
    alpha: float = 1.0
    limit: float | None = None
    limit_on: LimitOn = LimitOn.INPUT
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in tuple(ActivationKind):
            needs = "one of: " + ", ".join(ActivationKind)
            raise ValueError(refusal("Activation", "kind", f"is {self.kind!r}", needs))
        for name, value in (("alpha", self.alpha), ("up_offset", self.up_offset)):
            if not isfinite(value):
                raise ValueError(refusal("Activation", name, f"is {value}", "a finite value"))
        if self.alpha != 1.0 and self.kind != ActivationKind.SILU:
            raise ValueError(refusal("Activation", "alpha", f"is {self.alpha:g}", "kind silu"))
        if not self.gated and (self.limit is not None or self.up_offset):
            needs = "gated=True, since both act on gate and up"
            raise ValueError(refusal("Activation", "limit or up_offset", "is given", needs))
        if self.limit is None and self.limit_on != LimitOn.INPUT:
            needs = "a limit to apply there"
            raise ValueError(refusal("Activation", "limit_on", f"is {self.limit_on}", needs))
        if self.limit is not None and not self.limit > 0:
            raise ValueError(refusal("Activation", "limit", f"is {self.limit}", "a positive value"))

    @property
    def name(self) -> str:
        """The activation's spelling; `Activation.parse` reads it back.

        >>> SWIGLU_OAI.name, RELU2.name
        ('silu:alpha=1.702,limit=7.0,up_offset=1.0', 'relu2:ungated')
        """
        options = [] if self.gated else ["ungated"]
        if self.alpha != 1.0:
            options.append(f"alpha={self.alpha!r}")
        if self.limit is not None:
            key = "limit" if self.limit_on == LimitOn.INPUT else "output_limit"
            options.append(f"{key}={self.limit!r}")
        if self.up_offset:
            options.append(f"up_offset={self.up_offset!r}")
        return f"{self.kind}:{','.join(options)}" if options else str(self.kind)

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read an activation's name.

        Raises:
            ValueError: no activation is spelled like this; the message says how they are.
        """
        kind, _, rest = name.partition(":")
        gated, alpha, limit, limit_on, up_offset = True, 1.0, None, LimitOn.INPUT, 0.0
        try:
            for option in filter(None, rest.split(",")):
                match option.split("="):
                    case ["ungated"]:
                        gated = False
                    case ["alpha", value]:
                        alpha = float(value)
                    case ["limit", value]:
                        limit = float(value)
                    case ["output_limit", value]:
                        limit, limit_on = float(value), LimitOn.OUTPUT
                    case ["up_offset", value]:
                        up_offset = float(value)
                    case _:
                        raise ValueError(option)
            parsed_kind = ActivationKind(kind)
        except ValueError as error:
            kinds = ", ".join(ActivationKind)
            needs = (
                f"KIND[:OPTION,...] with KIND one of {kinds} and OPTION one of ungated, alpha=X, "
                "limit=X, output_limit=X, up_offset=X"
            )
            raise ValueError(refusal("Activation.parse", "name", f"is {name!r}", needs)) from error
        return cls(parsed_kind, gated, alpha, limit, limit_on, up_offset)


SILU: Final = Activation()
GELU: Final = Activation(ActivationKind.GELU)
GELU_TANH: Final = Activation(ActivationKind.GELU_TANH)
RELU2: Final = Activation(ActivationKind.RELU2, gated=False)
# GPT-OSS: clamped gate and up, steeper sigmoid, up shifted by one.
SWIGLU_OAI: Final = Activation(alpha=1.702, limit=7.0, up_offset=1.0)
