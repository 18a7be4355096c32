"""Formats and what config.json calls them: read from any checkpoint, written for every target.

Sources: Transformers' FineGrainedFP8Config, compressed-tensors' quantization config, ModelOpt's
hf_quant_config.json, and what vLLM and SGLang read of each. A stored scale always multiplies,
whatever its name (``weight_scale_inv`` too).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from octomoe.core.formats import (
    E4M3_240,
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_GROUP128,
    FP8_TENSOR,
    FP8_TOKEN,
    MXFP8,
    Format,
)
from octomoe.errors import refusal
from octomoe.version import VERSION

# Behind a tensor's name without ".weight": where a scale is found, and a static input scale.
SCALE_SUFFIXES: Final = (".weight_scale_inv", ".weight_scale", ".scale", "_scale_inv", "_scale")
INPUT_SCALE_SUFFIXES: Final = (".input_scale", ".activation_scale", "_activation_scale")

NEURON_CONFIG: Final = "neuron_config.json"
MODELOPT_CONFIG: Final = "hf_quant_config.json"


class Arrangement(StrEnum):
    """How a target stores the experts of a layer."""

    SPLIT = "split"  # one tensor per expert and projection
    FUSED = "fused"  # w13 [E, 2F, D] and w2 [E, D, F]
    NEURON = "neuron"  # gate_up [E, D, 2F] and down [E, F, D], other names


@dataclass(frozen=True)
class Target:
    """What an engine reads.

    Attributes:
        name: as `octomoe convert --target` spells it.
        weights, activations: formats.
        arrangement: how experts are stored.
        scale: suffix of a weight scale behind the tensor's name without ``.weight``.
        scale_shape: of a per-tensor scale, where engines differ.
        input_scale: suffix of a static activation scale, or "" if the target has none. With a dot
            it goes behind every expert's tensor, without one behind a layer's fused names.
        needs_input_scale: whether it cannot do without.
        shares_gate_up: whether gate and up of an expert get one scale (engines would requantise).
    """

    name: str
    weights: Format
    activations: Format
    arrangement: Arrangement = Arrangement.SPLIT
    scale: str = ".weight_scale"
    scale_shape: tuple[int, ...] | None = None
    input_scale: str = ""
    needs_input_scale: bool = False
    shares_gate_up: bool = False


TARGETS: Final = {
    target.name: target
    for target in (
        Target("hf-fp8-block", FP8_BLOCK128, FP8_GROUP128, scale=".weight_scale_inv"),
        # [1, 1]: Transformers merges experts along an axis that a scalar does not have. It does not
        # merge their activation scales at all, so those are stored merged, [E] for a layer.
        Target(
            "hf-fp8-tensor",
            FP8_TENSOR,
            FP8_TENSOR,
            scale=".weight_scale_inv",
            scale_shape=(1, 1),
            input_scale="_activation_scale",
            shares_gate_up=True,
        ),
        Target("ct-channel", FP8_CHANNEL, FP8_TOKEN),
        Target(
            "ct-tensor",
            FP8_TENSOR,
            FP8_TENSOR,
            scale_shape=(1,),
            input_scale=".input_scale",
            shares_gate_up=True,
        ),
        Target("ct-block", FP8_BLOCK128, FP8_GROUP128),
        Target("ct-mxfp8", MXFP8, MXFP8),
        Target(
            "modelopt-fp8",
            FP8_TENSOR,
            FP8_TENSOR,
            scale_shape=(),
            input_scale=".input_scale",
            needs_input_scale=True,
            shares_gate_up=True,
        ),
        Target("mxfp8", MXFP8, MXFP8, scale=".weight_scale_inv"),
        Target(
            "neuron",
            FP8_CHANNEL.derive(element=E4M3_240),
            FP8_TOKEN,
            Arrangement.NEURON,
            scale=".scale",
        ),
        Target("octomoe", FP8_CHANNEL, FP8_TOKEN, Arrangement.FUSED, scale="_scale"),
    )
}


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's quantised weights are to be read.

    Attributes:
        method: the config's own word for it, ``"none"`` if nothing is quantised.
        weights: their format; None if none, or stated per tensor (MXFP4).
        activations: what the config asks engines to quantise activations to; None for none.
        is_static: whether activation scales are stored.
        ignored: module names or patterns that the config says are not quantised.
    """

    method: str
    weights: Format | None = None
    activations: Format | None = None
    is_static: bool = False
    ignored: tuple[str, ...] = ()


def find_target(name: str, function: str = "convert_checkpoint") -> Target:
    """The target called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in TARGETS:
        needs = f"one of {', '.join(TARGETS)}"
        raise ValueError(refusal(function, "target", f"is {name!r}", needs))
    return TARGETS[name]


def quantization_config(
    target: Target, weights: Format, *, is_static: bool, ignored: Sequence[str]
) -> dict[str, Any]:
    """What config.json says about a checkpoint written for `target`.

    Args:
        target: the target.
        weights: the format as written, e.g. with another rounding than the target's own.
        is_static: whether activation scales are stored.
        ignored: names of the linear modules that are not quantised.
    """
    match target.name:
        case "hf-fp8-block" | "hf-fp8-tensor" | "mxfp8":
            config: dict[str, Any] = {
                "quant_method": "mxfp8" if target.name == "mxfp8" else "fp8",
                "activation_scheme": "static" if is_static else "dynamic",
                "weight_block_size": None if weights == FP8_TENSOR else list(weights.block[1:]),
                "modules_to_not_convert": list(ignored),
            }
            if target.weights == FP8_TENSOR:
                config["weight_block_size"] = None
            if target.name == "mxfp8":
                # vLLM and SGLang know the list by this name.
                config |= {"scale_fmt": "ue8m0", "ignored_layers": list(ignored)}
            return config
        case "modelopt-fp8":
            return {
                "quant_method": "modelopt",
                "quant_algo": "FP8",
                "kv_cache_scheme": None,
                "ignore": list(ignored),
                "producer": {"name": "octomoe", "version": VERSION},
            }
        case "octomoe":
            return {
                "quant_method": "octomoe",
                "version": VERSION,
                "weights": weights.name,
                "activations": target.activations.name,
                "ignore": list(ignored),
            }
        case "neuron":
            return {}
    return _compressed_tensors_config(target, is_static, ignored)


def modelopt_config(ignored: Sequence[str]) -> dict[str, Any]:
    """hf_quant_config.json of the target modelopt-fp8."""
    return {
        "producer": {"name": "octomoe", "version": VERSION},
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": None,
            "exclude_modules": list(ignored),
        },
    }


def read_scheme(
    config: Mapping[str, Any],
    modelopt: Mapping[str, Any] | None = None,
    neuron: Mapping[str, Any] | None = None,
) -> Scheme:
    """What a checkpoint's config says about its quantised weights.

    Args:
        config: config.json.
        modelopt: hf_quant_config.json, if there is one.
        neuron: neuron_config.json, if there is one.

    Raises:
        NotImplementedError: a method, or an option of one, that is not read.
        ValueError: the config lacks what its method needs.
    """
    try:
        return _read_scheme(config, modelopt, neuron)
    except (KeyError, TypeError, AttributeError) as error:
        got = f"cannot be understood ({type(error).__name__}: {error})"
        raise ValueError(_refuse("config.json or its companions", got, "all its fields")) from error


def _read_scheme(
    config: Mapping[str, Any],
    modelopt: Mapping[str, Any] | None,
    neuron: Mapping[str, Any] | None,
) -> Scheme:
    if neuron is not None and neuron.get("quantized"):
        return _neuron_scheme(neuron)
    stated = config.get("quantization_config") or config.get("compression_config")
    for inner in ("text_config", "language_config", "llm_config"):
        if not stated and isinstance(config.get(inner), dict):
            stated = config[inner].get("quantization_config")
    if not stated:
        return Scheme("none") if modelopt is None else _modelopt_scheme(modelopt["quantization"])
    method = stated.get("quant_method")
    match method:
        case "fp8" | "mxfp8":
            return _fp8_scheme(stated, method)
        case "compressed-tensors":
            return _compressed_tensors_scheme(stated)
        case "modelopt":
            return _modelopt_scheme(stated if "quant_algo" in stated else stated["quantization"])
        case "mxfp4":
            return Scheme("mxfp4", ignored=_names(stated.get("modules_to_not_convert")))
        case "octomoe":
            return Scheme(
                "octomoe",
                Format.parse(stated["weights"]),
                Format.parse(stated["activations"]),
                ignored=_names(stated.get("ignore")),
            )
    known = "fp8, mxfp8, compressed-tensors, modelopt, mxfp4 or octomoe"
    raise NotImplementedError(_refuse("quant_method", f"is {method!r}", known))


def activations_of(weights: Format) -> Format:
    """The activation format that engines pair with a weight format."""
    by_depth = {f.block[2]: f for f in (FP8_TOKEN, FP8_GROUP128, MXFP8)}
    return by_depth.get(weights.block[2], FP8_TOKEN)


def _fp8_scheme(stated: Mapping[str, Any], method: str) -> Scheme:
    block = stated.get("weight_block_size")
    is_static = stated.get("activation_scheme") == "static"
    ignored = _names(stated.get("modules_to_not_convert") or stated.get("ignored_layers"))
    if method == "mxfp8" or (block is not None and list(block) == [1, 32]):
        return Scheme(method, MXFP8, MXFP8, ignored=ignored)
    if block is None:
        return Scheme(method, FP8_TENSOR, FP8_TENSOR, is_static, ignored)
    weights = Format((1, int(block[0]), int(block[1])))
    return Scheme(method, weights, Format((1, 1, int(block[1]))), is_static, ignored)


def _compressed_tensors_scheme(stated: Mapping[str, Any]) -> Scheme:
    groups = list(stated.get("config_groups", {}).values())
    for group in groups:
        if not (isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)):
            needs = "groups that say how their weights are quantised"
            raise NotImplementedError(_refuse("config_groups", f"hold {group!r}", needs))
    found = {_compressed_tensors_weights(group["weights"]) for group in groups}
    if len(found) != 1:
        got = f"hold {len(found)} different weight formats"
        raise NotImplementedError(_refuse("config_groups", got, "one FP8 format for all weights"))
    weights = found.pop()
    inputs = groups[0].get("input_activations")
    activations, is_static = None, False
    if inputs is not None:
        is_static = inputs.get("dynamic") is False
        activations = FP8_TENSOR if inputs["strategy"] == "tensor" else activations_of(weights)
    ignored = _names(stated.get("ignore"))
    return Scheme("compressed-tensors", weights, activations, is_static, ignored)


def _compressed_tensors_weights(weights: Mapping[str, Any]) -> Format:
    if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
        got = f"are {weights.get('num_bits')}-bit {weights.get('type')}"
        raise NotImplementedError(_refuse("config_groups weights", got, "8-bit float"))
    match weights["strategy"], weights.get("group_size"):
        case "tensor", _:
            return FP8_TENSOR
        case "channel", _:
            return FP8_CHANNEL
        case "block", _:
            rows, columns = weights["block_structure"]
            return Format((1, int(rows), int(columns)))
        case "group", 32:
            return MXFP8
    got = f"have strategy {weights['strategy']!r} of group size {weights.get('group_size')}"
    raise NotImplementedError(
        _refuse("config_groups weights", got, "tensor, channel, block, MXFP8")
    )


def _modelopt_scheme(stated: Mapping[str, Any]) -> Scheme:
    ignored = _names(stated.get("ignore") or stated.get("exclude_modules"))
    match stated.get("quant_algo"):
        case "FP8":
            return Scheme("modelopt", FP8_TENSOR, FP8_TENSOR, True, ignored)
        case "FP8_PER_CHANNEL_PER_TOKEN":
            return Scheme("modelopt", FP8_CHANNEL, FP8_TOKEN, False, ignored)
        case "FP8_PB_WO":
            return Scheme("modelopt", FP8_BLOCK128, None, False, ignored)
        case "MXFP8":
            return Scheme("modelopt", MXFP8, MXFP8, False, ignored)
    needs = "FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO or MXFP8"
    raise NotImplementedError(_refuse("quant_algo", f"is {stated.get('quant_algo')!r}", needs))


def _neuron_scheme(stated: Mapping[str, Any]) -> Scheme:
    kind = stated.get("quantization_type")
    if stated.get("quantization_dtype") != "f8e4m3" or kind not in NEURON_TYPES.values():
        got = f"are {kind!r} of {stated.get('quantization_dtype')!r}"
        needs = f"f8e4m3 and one of {', '.join(NEURON_TYPES.values())}"
        raise NotImplementedError(_refuse("quantization_type and quantization_dtype", got, needs))
    weights = FP8_CHANNEL.derive(element=E4M3_240)
    ignored = _names(stated.get("modules_to_not_convert"))
    return Scheme("neuron", weights, None, ignored=ignored)


# Whether every expert has its own scales -> NxD's QuantizationType.
NEURON_TYPES: Final = {
    True: "expert_wise_per_channel_symmetric",
    False: "per_channel_symmetric",
}


def _compressed_tensors_config(
    target: Target, is_static: bool, ignored: Sequence[str]
) -> dict[str, Any]:
    is_mx = target.weights == MXFP8
    style = "mxfp8-quantized" if is_mx else "float-quantized"
    weights = _quantization_args(target.weights, is_dynamic=False)
    activations = _quantization_args(target.activations, is_dynamic=not is_static)
    return {
        "quant_method": "compressed-tensors",
        "format": style,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": style,
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
            }
        },
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _quantization_args(format: Format, *, is_dynamic: bool) -> dict[str, Any]:
    block: Any = None
    match format.block[1:]:
        case (-1, -1):
            strategy, group_size = "tensor", None
        case (1, -1):
            strategy, group_size = ("token" if is_dynamic else "channel"), None
        case (1, int(size)):
            strategy, group_size = "group", size
        case (rows, columns):
            strategy, group_size, block = "block", None, [rows, columns]
    args = {
        "num_bits": 8,
        "type": "float",
        "strategy": strategy,
        "symmetric": True,
        "dynamic": is_dynamic,
        "group_size": group_size,
        "block_structure": block,
    }
    if format == MXFP8:
        args |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return args


def _names(value: Any) -> tuple[str, ...]:
    return tuple(str(name) for name in value or ())


def _refuse(what: str, got: str, needs: str) -> str:
    return refusal("quantization_config", what, got, needs)
