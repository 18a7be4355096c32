"""AWS Neuron's names and layout, as NxD Inference's models read a checkpoint.

Source: neuronx-distributed-inference, models/qwen3_moe, and neuronx-distributed's quantisation
layers: ``gate_up_proj [E, H, 2I]`` (gate in the first I columns), ``down_proj [E, I, H]``, scales
float32 ``[E, 1, 2I]`` and ``[E, 1, H]``, or ``[1, 1, ...]`` where all experts share them.
"""

import re
from dataclasses import replace
from fnmatch import translate
from typing import Any, Final

from octomoe.checkpoint.names import ExpertLayer, Family, Layout, Part, Role
from octomoe.checkpoint.schemes import NEURON_TYPES
from octomoe.errors import refusal

LAYOUT: Final = Layout(
    "neuron",
    (
        Part(Role.GATE_UP, "gate_up_proj.weight", "expert in out", bias="gate_up_proj.bias"),
        Part(Role.DOWN, "down_proj.weight", "expert in out", bias="down_proj.bias"),
    ),
)
_EXPERTS: Final = "experts"


def experts_module(family: Family, layer: ExpertLayer) -> str:
    """Name of the experts module in Neuron's model."""
    return _mapping(family)[_EXPERTS].replace("{layer}", str(layer.layer))


def rename(family: Family, name: str) -> str:
    """A Hugging Face tensor's name as Neuron's model has it."""
    for pattern, suffix in _mapping(family).items():
        if pattern != _EXPERTS and re.fullmatch(translate(pattern), name):
            name = name.removesuffix(pattern.lstrip("*")) + suffix.lstrip("*")
    return name.removeprefix("model.")


def restore_name(family: Family, name: str) -> str:
    """The Hugging Face name of a tensor of Neuron's model; the inverse of `rename`."""
    for pattern, suffix in _mapping(family).items():
        if pattern != _EXPERTS and re.fullmatch(translate(suffix), name):
            name = name.removesuffix(suffix.lstrip("*")) + pattern.lstrip("*")
    return name if name.startswith("lm_head.") else f"model.{name}"


def neuron_family(family: Family) -> Family:
    """The family as a Neuron checkpoint names it."""
    return replace(family, experts=(_mapping(family)[_EXPERTS],), layouts=(LAYOUT, *family.layouts))


def neuron_config(
    *,
    is_wise: bool,
    kept: list[str],
    padding: tuple[int, int] | None = None,
    linears_beside: list[str] | None = None,
) -> dict[str, Any]:
    """What Neuron's own configuration must state to read the checkpoint.

    Args:
        is_wise: whether every expert has its own scales.
        kept: names of modules that are not quantised.
        padding: the experts' padded width, and how much of it is padding; None if not padded.
        linears_beside: if linears outside the experts are quantised too, per channel: the globs
            that name the quantised experts modules; else None.
    """
    kept = _as_nxd_matches(kept)
    config: dict[str, Any] = {
        "quantized": True,
        "quantization_type": NEURON_TYPES[is_wise],
        "quantization_dtype": "f8e4m3",
        "expert_wise_scale": is_wise,
        "modules_to_not_convert": kept,
    }
    if linears_beside is not None and is_wise:
        # Two passes: everything per channel but the experts, then the experts alone.
        config["quantization_passes"] = [
            {
                "quantization_type": NEURON_TYPES[False],
                "modules_to_not_convert": [*kept, "expert_mlps"],
            },
            {"quantization_type": NEURON_TYPES[True], "include": linears_beside},
        ]
    if padding is not None:
        config["moe_intermediate_size"], config["moe_intermediate_pad_size"] = padding
    return config


def _as_nxd_matches(kept: list[str]) -> list[str]:
    """Texts that NxD finds in the names of its modules, and that lie in the stored names too.

    Its attention wraps each projection: ``self_attn.qkv_proj.q_proj`` (or ``.qkv_proj.Wqkv``) and
    ``self_attn.o_proj.o_proj``. NxD Inference's fused QKV looks for ``layers.0.self_attn`` itself.
    """
    names = dict.fromkeys(kept)
    found = []
    for name in kept:
        parent, _, leaf = name.rpartition(".")
        is_whole = {f"{parent}.q_proj", f"{parent}.o_proj"} <= names.keys()
        if is_whole and leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = parent
        elif leaf == "q_proj":
            name = f"{parent}.q"
        found.append(name)
    return list(dict.fromkeys(found))


def _mapping(family: Family) -> dict[str, str]:
    if not family.neuron:
        got = f"is {family.name}"
        needs = "a family that AWS Neuron has a model of"
        do = "add a [neuron] table to its record with --family-file"
        raise ValueError(refusal("convert_checkpoint", "family", got, needs, do))
    return dict(family.neuron)
