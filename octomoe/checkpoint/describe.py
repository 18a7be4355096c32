"""What a checkpoint is: its experts, their format and layout, bytes, scales, and what is odd.

Only headers, configs and scales are read, never a weight.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from octomoe.checkpoint.families import Family, find_family, load_families, lookup, text_configs
from octomoe.checkpoint.header import Entry
from octomoe.checkpoint.names import ExpertLayer
from octomoe.checkpoint.oddities import find_oddities
from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.scale_statistics import Budget, ScaleStatistics, measure_scales
from octomoe.checkpoint.schemes import MODELOPT_CONFIG, NEURON_CONFIG, Scheme, read_scheme
from octomoe.checkpoint.source import Checkpoint
from octomoe.checkpoint.stream import default_workers

ROLES: Final = ("experts", "shared experts", "attention", "embeddings", "other")
# A second or two of reading each.
_LOCAL_READS: Final = 16_000
_LOCAL_BYTES: Final = 512 << 20
_REMOTE: Final = Budget(1_500, 32 << 20, 16)
_TOP_K: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
    "router_top_k",
    "top_k",
)
# Config tables that some models put their experts' numbers into.
_INNER: Final = ("", "ffn_config.", "moe_config.")
# Roles by name, for what no record names; the first that fits counts.
_BY_NAME: Final = (
    ("shared experts", re.compile(r"shared_(expert|mlp)")),
    ("experts", re.compile(r"(^|[._])experts?[._]")),
    ("attention", re.compile(r"(^|\.)(\w*attn\w*|attention|self_attention)\.")),
    ("embeddings", re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|lm_head)\.")),
)


@dataclass(frozen=True)
class LayerDescription:
    """The experts of one layer.

    Attributes:
        module: name of the experts module.
        layer: its number.
        is_mtp: whether it belongs to multi-token prediction.
        layout: how the experts are stored.
        num_experts, hidden_size, intermediate_size: sizes.
        dtypes: of the weights, as the headers spell them.
        num_quantized, num_plain: weights tensors that are quantised and that are not.
    """

    module: str
    layer: int
    is_mtp: bool
    layout: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtypes: tuple[str, ...]
    num_quantized: int
    num_plain: int


@dataclass(frozen=True)
class Description:
    """What a checkpoint is.

    Attributes:
        path: as given.
        model_type: as config.json states it, "" if it does not.
        family: name of the record, "" if none is known.
        problem: why the experts cannot be read, "" if they can.
        method, weights, activations: the quantisation scheme; formats are "" where there is none.
        is_static: whether activation scales are stored.
        num_layers: decoder layers that config.json states, 0 if it does not.
        layers: the experts modules; empty if they cannot be read.
        dense_layers: numbers of the layers without experts.
        top_k: experts per token, None if config.json does not say.
        num_files, num_tensors: counts.
        bytes_by_role: one of `ROLES` -> bytes, scales included.
        bytes_by_dtype: dtype as the headers spell it -> bytes.
        num_expert_weights: elements of the experts' matrices.
        bytes_per_expert_weight: with their scales; 0 if the experts cannot be read.
        scales: statistics of the experts' scales; of some layers where reading all takes long.
        oddities: one sentence each.
    """

    path: str
    model_type: str
    family: str
    problem: str
    method: str
    weights: str
    activations: str
    is_static: bool
    num_layers: int
    layers: tuple[LayerDescription, ...]
    dense_layers: tuple[int, ...]
    top_k: int | None
    num_files: int
    num_tensors: int
    bytes_by_role: dict[str, int]
    bytes_by_dtype: dict[str, int]
    num_expert_weights: int
    bytes_per_expert_weight: float
    scales: tuple[ScaleStatistics, ...]
    oddities: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.bytes_by_dtype.values())


def describe(path: str | Path, family_file: str | Path | None = None) -> Description:
    """Look at a checkpoint, of a known family or not.

    Args:
        path: folder, ``.safetensors`` file, or URL that fsspec reads.
        family_file: further family records, in the form of ``families.toml``.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: its files, or the family file, are not sound.
        OSError: something cannot be read.
    """
    records = None if family_file is None else Path(family_file)
    load_families(records)
    checkpoint = Checkpoint(path)
    config, tensors = checkpoint.config, checkpoint.tensors
    reader: Reader | None = None
    scales: list[ScaleStatistics] = []
    problem = ""
    try:
        reader = Reader(checkpoint, records)
        local = Budget(_LOCAL_READS, _LOCAL_BYTES, default_workers())
        scales = measure_scales(reader, _REMOTE if "://" in checkpoint.path else local)
    except (ValueError, NotImplementedError) as error:
        problem = str(error)
    scheme = reader.scheme if reader else _scheme(checkpoint)
    family = reader.family if reader else _family(config, records)
    layers = [_layer(reader, layer) for layer in reader.layers] if reader else []
    num_layers = _number(config, family.num_layers if family else ("num_hidden_layers",)) or 0
    sparse = {layer.layer for layer in layers}
    num_weights = sum(_num_weights(layer) for layer in reader.layers) if reader else 0
    weight_bytes = sum(tensors[name].num_bytes for name in _expert_weights(reader))
    return Description(
        path=checkpoint.path,
        model_type=_model_type(config),
        family=family.name if family else "",
        problem=problem,
        method=scheme.method,
        weights=_weights_name(reader, scheme),
        activations=scheme.activations.name if scheme.activations else "",
        is_static=scheme.is_static,
        num_layers=num_layers,
        layers=tuple(layers),
        dense_layers=tuple(n for n in range(num_layers) if n not in sparse) if layers else (),
        top_k=_number(config, tuple(inner + key for inner in _INNER for key in _TOP_K)),
        num_files=len(checkpoint.files),
        num_tensors=len(tensors),
        bytes_by_role=_bytes_by_role(reader, tensors),
        bytes_by_dtype=dict(_sums((e.dtype, e.num_bytes) for e in tensors.values()).most_common()),
        num_expert_weights=num_weights,
        bytes_per_expert_weight=weight_bytes / num_weights if num_weights else 0.0,
        scales=tuple(scales),
        oddities=tuple(find_oddities(checkpoint, scheme, reader, scales)),
    )


def _layer(reader: Reader, layer: ExpertLayer) -> LayerDescription:
    names = _weight_names(reader, layer)
    num_quantized = sum(map(reader.is_quantized, names))
    return LayerDescription(
        module=layer.module,
        layer=layer.layer,
        is_mtp=layer.is_mtp,
        layout=layer.layout.name,
        num_experts=layer.num_experts,
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        dtypes=tuple(sorted({reader.checkpoint.tensors[name].dtype for name in names})),
        num_quantized=num_quantized,
        num_plain=len(names) - num_quantized,
    )


def _weight_names(reader: Reader, layer: ExpertLayer) -> list[str]:
    """Names of a layer's matrices, each once, without biases."""
    experts = range(layer.num_experts)
    roles = [part.role for part in layer.layout.parts]
    return list(dict.fromkeys(layer.tensor(role, e) for role in roles for e in experts))


def _expert_weights(reader: Reader | None) -> list[str]:
    """Names of all experts' matrices and their scales."""
    names = [n for layer in reader.layers for n in _weight_names(reader, layer)] if reader else []
    companions = [each for n in names for each in reader.companions_of(n)] if reader else []
    return list(dict.fromkeys([*names, *companions]))


def _num_weights(layer: ExpertLayer) -> int:
    num_matrices = sum(2 if part.role == "gate_up" else 1 for part in layer.layout.parts)
    return layer.num_experts * layer.hidden_size * layer.intermediate_size * num_matrices


def _bytes_by_role(reader: Reader | None, tensors: Mapping[str, Entry]) -> dict[str, int]:
    experts = {n for layer in reader.layers for n in layer.names} if reader else set()
    experts.update(_expert_weights(reader))
    found = _sums((_role(name, experts), entry.num_bytes) for name, entry in tensors.items())
    return {role: found[role] for role in ROLES if role in found}


def _role(name: str, experts: set[str]) -> str:
    if name in experts:
        return "experts"
    return next((role for role, pattern in _BY_NAME if pattern.search(name)), "other")


def _sums(pairs: Iterable[tuple[str, int]]) -> Counter[str]:
    sums: Counter[str] = Counter()
    for key, value in pairs:
        sums[key] += value
    return sums


def _scheme(checkpoint: Checkpoint) -> Scheme:
    """The scheme of a checkpoint that no `Reader` reads; only its name if not even that is read."""
    config = checkpoint.config
    try:
        return read_scheme(config, checkpoint.json(MODELOPT_CONFIG), checkpoint.json(NEURON_CONFIG))
    except NotImplementedError:
        stated = (part.get("quantization_config") for part in (config, *text_configs(config)))
        methods = [table.get("quant_method") for table in stated if isinstance(table, Mapping)]
        return Scheme(str(next(filter(None, methods), "unknown")))


def _family(config: Mapping[str, Any], records: Path | None) -> Family | None:
    try:
        return find_family(config, records)
    except (ValueError, NotImplementedError):
        return None


def _model_type(config: Mapping[str, Any]) -> str:
    found = (part.get("model_type") for part in (config, *text_configs(config)))
    return next((name for name in found if isinstance(name, str)), "")


def _weights_name(reader: Reader | None, scheme: Scheme) -> str:
    if scheme.weights is not None:
        return scheme.weights.name
    parts = [part for layer in reader.layers for part in layer.layout.parts] if reader else []
    return next((part.packed for part in parts if part.packed), "")


def _number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """A whole number that config.json states; of a list its length or, of numbers, the largest."""
    for part in (*text_configs(config), config):
        for key in keys:
            value = lookup(part, key)
            if isinstance(value, list) and value:
                is_numbers = all(type(item) is int for item in value)
                value = max(value) if is_numbers and "layer" not in key else len(value)
            if type(value) is int:
                return value
    return None
