"""What a conversion will write, decided from headers, configs and scales before any byte moves."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from octomoe.checkpoint.encode import How, foresee
from octomoe.checkpoint.expert_jobs import ExpertJobs
from octomoe.checkpoint.fused_experts import FusedExperts
from octomoe.checkpoint.header import Planned
from octomoe.checkpoint.jobs import Group
from octomoe.checkpoint.linear_jobs import copy_group, dequantize_group, linear_group
from octomoe.checkpoint.linears import find_linears, is_linear, module_of
from octomoe.checkpoint.names import ExpertLayer, Role, natural_order
from octomoe.checkpoint.neuron import experts_module, rename
from octomoe.checkpoint.options import ExpertScale, Options, settled
from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.schemes import Arrangement, quantization_config, read_scheme
from octomoe.checkpoint.split_experts import SplitExperts
from octomoe.errors import refusal
from octomoe.version import VERSION


@dataclass(frozen=True)
class Shard:
    """A file to write."""

    name: str
    groups: tuple[Group, ...]

    @property
    def tensors(self) -> list[Planned]:
        """All tensors of the file."""
        return [tensor for group in self.groups for tensor in group.outputs]


@dataclass(frozen=True)
class Plan:
    """A conversion, ready to run.

    Attributes:
        options: what was asked for, with what the model's config decides filled in.
        shards: files in order.
        experts: the layers whose experts are written anew, for their common scales.
        ignored: names of linear modules that are not quantised.
        linears: weights outside the experts that are quantised.
        copied: names of tensors that pass through byte by byte, as the source has them.
        config: config.json to write.
        digest: of all that decides the result but weights; with equal weights, equal digests give
            equal bytes.
        stamps: the source's files, and what changes when one does.
    """

    options: Options
    shards: tuple[Shard, ...]
    experts: tuple[ExpertJobs, ...]
    ignored: tuple[str, ...]
    linears: tuple[str, ...]
    copied: tuple[str, ...]
    config: dict[str, Any]
    digest: str
    stamps: dict[str, str]

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors to write."""
        return sum(group.num_bytes for shard in self.shards for group in shard.groups)

    @property
    def read_bytes(self) -> int:
        """Bytes of tensors to read."""
        jobs = [job for shard in self.shards for group in shard.groups for job in group.jobs]
        jobs += [job for experts in self.experts for job in experts.gather_jobs]
        return sum(job.num_bytes for job in jobs)


def make_plan(reader: Reader, options: Options) -> Plan:
    """Decide what becomes of every tensor.

    Raises:
        ValueError: the options do not fit the model, or a lossy double quantisation was not asked
            for.
    """
    options = settled(options, reader.checkpoint.config)
    check_input_scales(reader, options)
    builder = _Builder(reader, options)
    builder.build()
    check_requantize(reader, options, builder.requantized)
    config = {k: v for k, v in reader.checkpoint.config.items() if k != "compression_config"}
    for inner in ("text_config", "language_config", "llm_config"):
        if isinstance(config.get(inner), dict) and "quantization_config" in config[inner]:
            config[inner] = {k: v for k, v in config[inner].items() if k != "quantization_config"}
    config.pop("quantization_config", None)
    is_static = bool(options.input_scales)
    ignored = builder.ignored
    stated = quantization_config(
        options.found_target, options.format, is_static=is_static, ignored=ignored
    )
    padded = {x.width for x in builder.experts if x.width != x.layer.intermediate_size}
    if stated:
        if padded:
            stated["intermediate_size"] = padded.pop()
        config["quantization_config"] = stated
    shards = _into_shards(builder.groups, options.shard_bytes)
    return Plan(
        options,
        shards,
        tuple(builder.experts),
        tuple(ignored),
        tuple(builder.linears),
        tuple(builder.copied),
        config,
        _digest(reader, options, config),
        reader.checkpoint.stamps,
    )


class _Builder:
    """Walks the source's tensors once and puts each into a group."""

    def __init__(self, reader: Reader, options: Options) -> None:
        self.reader, self.options = reader, options
        self.target = options.found_target
        self.groups: list[Group] = []
        self.experts: list[ExpertJobs] = []
        self.ignored: list[str] = []
        self.copied: list[str] = []
        # Layers and linear weights that are quantised, for the check of double quantisation.
        self.requantized: list[ExpertLayer] = []
        self._is_ct = options.target.startswith("ct-")
        self._layer_of = {name: layer for layer in reader.layers for name in layer.names}
        self._dtype = _plain_dtype(reader.checkpoint.config)
        self.linears: list[str] = []
        if options.all_linears:
            self.linears = find_linears(reader, options, set(self._layer_of))
        written = read_scheme(
            {
                "quantization_config": quantization_config(
                    self.target, options.format, is_static=bool(options.input_scales), ignored=()
                )
            }
        )
        self._is_same_scheme = (
            self.target.arrangement == Arrangement.SPLIT
            and reader.scheme.weights == written.weights
            and reader.scheme.is_static == written.is_static
            and {_suffix(reader, name) for name in reader.scales} == {self.target.scale}
        )

    def build(self) -> None:
        """Make groups, copied names and the ignore list."""
        done: set[str] = set()
        linears = set(self.linears)
        for name in self.reader.checkpoint.tensors:
            layer = self._layer_of.get(name)
            if layer is not None:
                if layer.module not in done:
                    done.add(layer.module)
                    self._add_layer(layer)
            elif name in self.reader.companions:
                continue
            elif name in linears:
                self._add_linear(name)
            elif self.reader.is_quantized(name) and not self._is_same_scheme:
                self.groups.append(
                    dequantize_group(self.reader, name, self._rename(name), self._dtype)
                )
                self._ignore(name)
            else:
                self._copy(name)
                if not self.reader.is_quantized(name):
                    self._ignore(name)
        if self.reader.checkpoint.config.get("tie_word_embeddings"):
            self.ignored.append("lm_head")
        self.ignored = sorted(set(self.ignored), key=natural_order)

    def _add_layer(self, layer: ExpertLayer) -> None:
        is_quantized_source = self.reader.is_quantized(layer.names[0])
        if not layer.is_mtp and not self.options.is_kept(layer.module):
            jobs = self._jobs(layer, None)
            self.experts.append(jobs)
            self.requantized.append(layer)
            self.groups += jobs.groups()
            return
        # Kept: as the source has it where the target's readers can tell, else as plain numbers.
        if is_quantized_source and self._is_same_scheme:
            self._copy_layer(layer)
            return
        if is_quantized_source or (
            self.target.arrangement == Arrangement.NEURON and not layer.is_mtp
        ):
            self.groups += self._jobs(layer, self._dtype).groups()
        else:
            self._copy_layer(layer)
        self._ignore_layer(layer)

    def _copy_layer(self, layer: ExpertLayer) -> None:
        for name in layer.names:
            if name in self.reader.checkpoint.tensors:
                self._copy(name)
        for name in self.reader.layer_companions(layer):
            self._copy(name)

    def _copy(self, name: str) -> None:
        """A tensor and what belongs to it."""
        names = [name, *self.reader.companions_of(name)]
        for each in names:
            self.groups.append(copy_group(self.reader, each, self._rename(each)))
            self.copied.append(each)

    def _add_linear(self, name: str) -> None:
        self.reader.check_dtype(name)
        self.groups.append(linear_group(self.reader, name, self._rename(name), self.options))

    def _jobs(self, layer: ExpertLayer, dtype: torch.dtype | None) -> ExpertJobs:
        for part in layer.layout.parts:
            for expert in range(layer.num_experts if part.is_per_expert else 1):
                self.reader.check_dtype(layer.tensor(part.role, expert))
        is_split = self.target.arrangement == Arrangement.SPLIT
        # Plain experts keep their own names where no fused reader asks for more.
        is_split |= dtype is not None and self.target.arrangement == Arrangement.FUSED
        kind = SplitExperts if is_split else FusedExperts
        return kind(self.reader, layer, self.options, dtype)

    def _rename(self, name: str) -> str:
        if self.target.arrangement != Arrangement.NEURON:
            return name
        return rename(self.reader.family, name)

    def _ignore(self, name: str) -> None:
        shape = self.reader.checkpoint.tensors[name].shape
        # compressed-tensors takes every matrix for a linear layer, but those of norms.
        is_matrix = self._is_ct and name.endswith(".weight") and len(shape) == 2
        if is_linear(name, shape) or (is_matrix and not module_of(name).endswith("norm")):
            self.ignored.append(module_of(self._rename(name)))

    def _ignore_layer(self, layer: ExpertLayer) -> None:
        if self._is_ct:
            self.ignored.append(f"re:^{re.escape(layer.module)}\\..*")
        elif self.target.arrangement == Arrangement.NEURON and not layer.is_mtp:
            self.ignored.append(experts_module(self.reader.family, layer))
        else:
            self.ignored.append(layer.module)


def check_requantize(reader: Reader, options: Options, layers: Sequence[ExpertLayer]) -> None:
    """Refuse a lossy double quantisation that was not asked for."""
    if options.allow_requantize or reader.scheme.weights is None:
        return
    rescales = options.expert_scale != ExpertScale.WISE
    for layer in layers:
        for expert in range(layer.num_experts):
            for name, shape, scale, format in reader.expert_scales(layer, expert):
                fate = foresee(format, scale, shape, options.numerics, is_rescaled=rescales)
                if fate == How.REQUANTIZED:
                    got = f"is {format.name} with scales that are no powers of two in {name!r}"
                    needs = f"unquantised weights to make {options.format.name} of"
                    do = "start from the unquantised model, or accept the loss (about 3 dB) "
                    do += "with --allow-requantize"
                    raise ValueError(refusal("convert_checkpoint", "SRC", got, needs, do))


def check_input_scales(reader: Reader, options: Options) -> None:
    """Refuse static scales that are missing or not positive and finite."""
    if not options.input_scales:
        return
    roles = (Role.GATE, Role.UP, Role.DOWN) if reader.family.gated else (Role.UP, Role.DOWN)
    for layer in reader.layers:
        if layer.is_mtp:
            continue
        stated = options.input_scales.get(layer.layer, {})
        if not stated:
            got = f"lack layer {layer.layer}"
            raise ValueError(refusal("convert_checkpoint", "input_scales", got, "every layer"))
        for role in roles:
            if role not in stated:
                got = f"lack {role} of layer {layer.layer}"
                needs = "every projection"
                raise ValueError(refusal("convert_checkpoint", "input_scales", got, needs))
            scales = stated[role]
            # As they are stored.
            stored = torch.tensor(scales, dtype=torch.float64).to(torch.float32)
            is_usable = bool(((stored > 0) & stored.isfinite()).all())
            if len(scales) != layer.num_experts or not is_usable:
                got = f"of layer {layer.layer}, {role} are {len(scales)} numbers"
                needs = f"{layer.num_experts} positive finite ones"
                raise ValueError(refusal("convert_checkpoint", "input_scales", got, needs))


def _into_shards(groups: Sequence[Group], limit: int) -> tuple[Shard, ...]:
    filled: list[list[Group]] = [[]]
    size = 0
    for group in groups:
        if filled[-1] and size + group.num_bytes > limit:
            filled.append([])
            size = 0
        filled[-1].append(group)
        size += group.num_bytes
    if len(filled) == 1:
        return (Shard("model.safetensors", tuple(filled[0])),)
    count = len(filled)
    return tuple(
        Shard(f"model-{i:05}-of-{count:05}.safetensors", tuple(groups))
        for i, groups in enumerate(filled, start=1)
    )


def _digest(reader: Reader, options: Options, config: dict[str, Any]) -> str:
    stated = asdict(options)
    # Where numbers are made does not change them.
    del stated["device"]
    entries = [
        (e.name, e.dtype, e.shape, e.file, e.start) for e in reader.checkpoint.tensors.values()
    ]
    # Another version, or another record of the family, may make other bytes.
    means = [VERSION, asdict(reader.family), asdict(reader.scheme)]
    text = json.dumps([stated, means, config, entries], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype for weights that become plain numbers: the model's own."""
    for part in (config, config.get("text_config") or {}):
        stated = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
        if stated in ("bfloat16", "float16", "float32"):
            dtype: torch.dtype = getattr(torch, stated)
            return dtype
    return torch.bfloat16


def _suffix(reader: Reader, name: str) -> str:
    return reader.scales[name].removeprefix(name.removesuffix(".weight"))
