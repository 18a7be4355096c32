"""What a user asks of a conversion."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

import torch

from octomoe.checkpoint.encode import Numerics
from octomoe.checkpoint.names import Role
from octomoe.checkpoint.schemes import Arrangement, Target, find_target
from octomoe.core.formats import ALL, Format, Rounding
from octomoe.errors import refusal


class ExpertScale(StrEnum):
    """Whose scale an expert's weight is quantised with."""

    AUTO = "auto"  # as the model's config says, else its own
    WISE = "wise"  # its own
    SHARED = "shared"  # the largest over the layer's experts
    AVERAGED_LEGACY = "averaged-legacy"  # its own, and then the mean is stored: a known mistake


class WeightsScale(StrEnum):
    """How scales of weights are rounded."""

    AUTO = "auto"  # exact, but powers of two where a quantised source has them
    EXACT = "exact"
    POW2 = "pow2"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the bytes of a converted checkpoint; see `octomoe.convert_checkpoint`.

    Attributes:
        target, weights_scale, search, all_linears, keep, include, modules_to_not_convert,
        expert_scale, allow_requantize: as `octomoe.convert_checkpoint` says.
        weights: format for the target ``octomoe``, "" for its own.
        input_scales: layer number -> role -> float32 static scale per expert; empty if dynamic.
        pad_intermediate: the experts' width is padded with zeros to a multiple of this.
        shard_bytes: largest shard, a single tensor or fused layer may exceed it.
        device: where numbers are made.
    """

    target: str
    weights: str = ""
    weights_scale: WeightsScale | str = WeightsScale.AUTO
    search: str = "none"
    all_linears: bool = False
    keep: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    modules_to_not_convert: tuple[str, ...] = ()
    expert_scale: ExpertScale | str = ExpertScale.AUTO
    input_scales: Mapping[int, Mapping[Role, tuple[float, ...]]] = field(default_factory=dict)
    allow_requantize: bool = False
    pad_intermediate: int = 1
    shard_bytes: int = 5_000_000_000
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, kind in (("weights_scale", WeightsScale), ("expert_scale", ExpertScale)):
            value = getattr(self, name)
            if value not in tuple(kind):
                _fail(name, f"is {value!r}", f"one of {', '.join(kind)}")
            object.__setattr__(self, name, kind(value))
        if self.search not in ("none", "mse"):
            _fail("search", f"is {self.search!r}", "none or mse")
        _check_device(self.device)
        if self.shard_bytes < 1:
            _fail("shard_size", f"is {self.shard_bytes}", "a positive number of bytes")
        target = self.found_target
        if self.weights and target.arrangement != Arrangement.FUSED:
            do = "the target decides its format"
            _fail("weights", f"is {self.weights!r}", f"none for {self.target}", do)
        if self.format.block[0] != 1 and target.arrangement == Arrangement.FUSED:
            _fail("weights", f"is {self.format.name}", "a scale per expert", "use fp8_expert")
        if self.pad_intermediate < 1:
            _fail("pad_intermediate", f"is {self.pad_intermediate}", "a positive multiple")
        if self.pad_intermediate > 1 and target.arrangement == Arrangement.SPLIT:
            do = "only fused targets (neuron, octomoe) are padded"
            _fail("pad_intermediate", f"is given for {self.target}", "1", do)
        if target.needs_input_scale and not self.input_scales:
            needs = "static activation scales"
            _fail("input_scales", f"are missing for {self.target}", needs, "give --calibrate TEXT")
        if self.input_scales and self.all_linears:
            do = "leave --all-linears out, or choose a target with dynamic activations"
            needs = "experts only: other linears have no measured scale"
            _fail("input_scales", "are given with all_linears", needs, do)
        if self.input_scales and not target.input_scale:
            needs = f"none: {self.target} quantises activations as they come"
            _fail("input_scales", "are given", needs, "leave --calibrate out")

    @property
    def found_target(self) -> Target:
        """The target's record."""
        return find_target(self.target)

    @property
    def format(self) -> Format:
        """The format of unquantised experts."""
        target = self.found_target
        format = Format.parse(self.weights) if self.weights else target.weights
        if self.weights_scale == WeightsScale.POW2 and format.rounding != Rounding.POW2:
            format = format.derive(rounding=Rounding.POW2)
        elif self.weights_scale == WeightsScale.EXACT and format.rounding == Rounding.POW2:
            needs = f"pow2 for {format.name}, whose scales are powers of two"
            _fail("weights_scale", "is exact", needs)
        return format

    @property
    def numerics(self) -> Numerics:
        """How experts are quantised."""
        relay = self.format
        if self.weights_scale == WeightsScale.AUTO and relay.rounding != Rounding.POW2:
            relay = relay.derive(rounding=Rounding.POW2)
        device = torch.device(self.device)
        return Numerics(self.format, relay, self.search == "mse", device)

    @property
    def shares_gate_up(self) -> bool:
        """Whether gate and up get one scale: engines expect it, or one block holds both."""
        target = self.found_target
        is_fused = target.arrangement != Arrangement.SPLIT
        return target.shares_gate_up or (is_fused and self.format.block[1] == ALL)

    def is_kept(self, module: str) -> bool:
        """Whether a module is left as it is, by the user's wish.

        `keep` and `include` hold glob patterns of whole names, `modules_to_not_convert` substrings
        (so "layers.1" also means layer 10; "layers.1." does not).
        """
        if any(fnmatchcase(module, pattern) for pattern in self.keep):
            return True
        if any(part in module for part in self.modules_to_not_convert):
            return True
        return bool(self.include) and not any(fnmatchcase(module, p) for p in self.include)


def settled(options: Options, config: Mapping[str, Any]) -> Options:
    """The options with what a model's own config decides.

    Raises:
        ValueError: its ``expert_wise_scale`` is neither true nor false.
    """
    if options.expert_scale != ExpertScale.AUTO:
        return options
    inner = config.get("neuron_config")
    stated = inner.get("expert_wise_scale", True) if isinstance(inner, dict) else True
    stated = config.get("expert_wise_scale", stated)
    # It is Neuron's word: other engines have a scale per expert anyway.
    is_neuron = options.found_target.arrangement == Arrangement.NEURON
    return with_expert_scale(options, stated if is_neuron else True)


def with_expert_scale(options: Options, is_wise: object) -> Options:
    """The options with ``expert_wise_scale`` as a config states it.

    Raises:
        ValueError: it is neither true nor false.
    """
    if not isinstance(is_wise, bool):
        got = f"is {is_wise!r} in config.json"
        raise ValueError(refusal("convert_checkpoint", "expert_wise_scale", got, "true or false"))
    return replace(options, expert_scale=ExpertScale.WISE if is_wise else ExpertScale.SHARED)


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        _fail("device", f"is {device!r}", "cpu, cuda or cuda:0")
    if kind == "cuda" and not torch.cuda.is_available():
        _fail("device", f"is {device!r}", "a CUDA GPU that torch can use", "use cpu")


def _fail(argument: str, got: str, needs: str, do: str = "") -> None:
    raise ValueError(refusal("convert_checkpoint", argument, got, needs, do))
