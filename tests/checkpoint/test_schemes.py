"""Every target's config says what it says; configs as the world writes them are understood.

The snippets are as published checkpoints and the tools that wrote them have them, shortened to
what says how weights are stored.
"""

from typing import Any

import pytest
import torch

from octomoe.checkpoint.neuron import neuron_config
from octomoe.checkpoint.options import Options
from octomoe.checkpoint.schemes import (
    NEURON_TYPES,
    TARGETS,
    Arrangement,
    Scheme,
    activations_of,
    find_target,
    modelopt_config,
    quantization_config,
    read_scheme,
)
from octomoe.core.formats import (
    E4M3_240,
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    FP8_TOKEN,
    MXFP8,
    Format,
)

IGNORED = ("lm_head", "model.layers.0.mlp.gate")
BLOCK64 = Format((1, 64, 64))

FP8_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


def ct(weights: dict[str, Any], inputs: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """A compressed-tensors config of one group."""
    group = {
        "targets": ["Linear"],
        "weights": FP8_WEIGHTS | weights,
        "input_activations": inputs and FP8_WEIGHTS | {"dynamic": True} | inputs,
        "output_activations": None,
    }
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return config | {"ignore": ["re:.*gate$", "lm_head"], "kv_cache_scheme": None} | more


CT_IGNORED = ("re:.*gate$", "lm_head")

# What wrote it -> quantization_config, what is understood.
PUBLISHED: dict[str, tuple[dict[str, Any], Scheme]] = {
    "DeepSeek-V3": (
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        Scheme("fp8", FP8_BLOCK128, FP8_GROUP128),
    ),
    "DeepSeek-V3.1": (
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        Scheme("fp8", FP8_BLOCK128, FP8_GROUP128),
    ),
    "Qwen3-FP8": (
        {
            "activation_scheme": "dynamic",
            "modules_to_not_convert": list(IGNORED),
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        Scheme("fp8", FP8_BLOCK128, FP8_GROUP128, ignored=IGNORED),
    ),
    "per-tensor static": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        Scheme("fp8", FP8_TENSOR, FP8_TENSOR, is_static=True),
    ),
    "per-tensor dynamic": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None},
        Scheme("fp8", FP8_TENSOR, FP8_TENSOR),
    ),
    "Transformers MXFP8": (
        {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        Scheme("fp8", MXFP8, MXFP8),
    ),
    "MiniMax MXFP8": (
        {
            "quant_method": "mxfp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [1, 32],
            "ignored_layers": list(IGNORED),
        },
        Scheme("mxfp8", MXFP8, MXFP8, ignored=IGNORED),
    ),
    "llm-compressor FP8": (
        ct(
            {"strategy": "tensor", "observer": "static_minmax"},
            {"strategy": "tensor", "dynamic": False},
            format="float-quantized",
        ),
        Scheme("compressed-tensors", FP8_TENSOR, FP8_TENSOR, True, CT_IGNORED),
    ),
    "llm-compressor FP8_DYNAMIC": (
        ct({"strategy": "channel"}, {"strategy": "token"}, format="float-quantized"),
        Scheme("compressed-tensors", FP8_CHANNEL, FP8_TOKEN, False, CT_IGNORED),
    ),
    "llm-compressor FP8_BLOCK": (
        ct(
            {"strategy": "block", "block_structure": [128, 128], "group_size": None},
            {"strategy": "group", "group_size": 128},
            version="0.19.0",
        ),
        Scheme("compressed-tensors", FP8_BLOCK128, FP8_GROUP128, False, CT_IGNORED),
    ),
    "llm-compressor MXFP8": (
        ct(
            {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
            {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
            format="mxfp8-quantized",
        ),
        Scheme("compressed-tensors", MXFP8, MXFP8, False, CT_IGNORED),
    ),
    "llm-compressor MXFP8A16": (
        ct({"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, None),
        Scheme("compressed-tensors", MXFP8, None, False, CT_IGNORED),
    ),
    "ModelOpt FP8": (
        {
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            "ignore": ["lm_head", "model.layers.*.mlp.gate"],
            "quant_algo": "FP8",
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "quant_method": "modelopt",
        },
        Scheme("modelopt", FP8_TENSOR, FP8_TENSOR, True, ("lm_head", "model.layers.*.mlp.gate")),
    ),
    "ModelOpt MXFP8": (
        {"quant_algo": "MXFP8", "quant_method": "modelopt", "exclude_modules": list(IGNORED)},
        Scheme("modelopt", MXFP8, MXFP8, False, IGNORED),
    ),
    "gpt-oss": (
        {
            "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
            "quant_method": "mxfp4",
        },
        Scheme("mxfp4", ignored=("model.layers.*.self_attn", "lm_head")),
    ),
}

# Options of a target besides its own.
VARIANTS = [
    *((name, {}) for name in TARGETS if name != "modelopt-fp8"),
    ("hf-fp8-block", {"weights_scale": "pow2"}),
    ("ct-channel", {"weights_scale": "pow2"}),
    ("octomoe", {"weights": "block128"}),
    ("octomoe", {"weights": "channel", "weights_scale": "pow2"}),
    ("octomoe", {"weights": "mxfp8"}),
]


@pytest.mark.parametrize(("name", "more"), [v for v in VARIANTS if v[0] != "neuron"])
def test_what_a_target_writes_is_read_back(name: str, more: dict[str, Any]):
    target, written = TARGETS[name], Options(target=name, **more).format
    stated = quantization_config(target, written, is_static=False, ignored=IGNORED)
    scheme = read_scheme({"quantization_config": stated})
    assert scheme.weights is not None
    assert scheme.weights.block == written.block
    assert scheme.weights.scale_dtype == written.scale_dtype
    assert scheme.ignored == IGNORED
    assert not scheme.is_static
    # What engines then quantise activations to goes with the weights.
    if not more.get("weights"):
        assert scheme.activations == target.activations


@pytest.mark.parametrize("name", ["ct-tensor", "hf-fp8-tensor", "modelopt-fp8"])
def test_static_scales_are_said_and_read_back(name: str):
    target = TARGETS[name]
    stated = quantization_config(target, target.weights, is_static=True, ignored=IGNORED)
    scheme = read_scheme({"quantization_config": stated})
    assert (scheme.weights, scheme.activations) == (FP8_TENSOR, FP8_TENSOR)
    assert scheme.is_static
    assert scheme.ignored == IGNORED


def test_modelopts_own_file_is_read_without_a_config():
    scheme = read_scheme({}, modelopt_config(IGNORED))
    assert scheme == Scheme("modelopt", FP8_TENSOR, FP8_TENSOR, True, IGNORED)


@pytest.mark.parametrize("is_wise", [True, False])
def test_neurons_own_file_is_read_back(is_wise: bool):
    kept = ["lm_head", "layers.1.mlp"]
    stated = neuron_config(is_wise=is_wise, kept=kept)
    scheme = read_scheme({"quantization_config": {"quant_method": "fp8"}}, neuron=stated)
    weights = FP8_CHANNEL.derive(element=E4M3_240)
    assert scheme == Scheme("neuron", weights, None, False, ("lm_head", "layers.1.mlp"))
    assert stated["quantization_type"] == NEURON_TYPES[is_wise]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood(name: str):
    stated, expected = PUBLISHED[name]
    assert read_scheme({"quantization_config": stated}) == expected


@pytest.mark.parametrize("outer", ["text_config", "language_config", "llm_config"])
def test_a_config_inside_another_counts(outer: str):
    stated, expected = PUBLISHED["DeepSeek-V3"]
    assert read_scheme({outer: {"quantization_config": stated}}) == expected


def test_old_compressed_tensors_key_counts():
    stated, expected = PUBLISHED["llm-compressor FP8_DYNAMIC"]
    assert read_scheme({"compression_config": stated}) == expected


def test_no_config_is_no_scheme():
    assert read_scheme({"model_type": "qwen3_moe"}) == Scheme("none")
    assert read_scheme({"quantization_config": {}}, neuron={"quantized": False}) == Scheme("none")


def test_other_block_sizes_are_read():
    stated = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    scheme = read_scheme({"quantization_config": stated})
    assert (scheme.weights, scheme.activations) == (BLOCK64, Format((1, 1, 64)))


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        (FP8_BLOCK128, FP8_GROUP128),
        (MXFP8, MXFP8),
        (FP8_ROW, FP8_TOKEN),
        (FP8_CHANNEL, FP8_TOKEN),
        (FP8_TENSOR, FP8_TOKEN),
    ],
)
def test_activations_go_with_weights(weights: Format, activations: Format):
    assert activations_of(weights) == activations


def test_facts_of_targets():
    for target in TARGETS.values():
        assert target.needs_input_scale <= bool(target.input_scale)
        # Engines that read one scale for gate and up would requantise.
        is_split = target.arrangement == Arrangement.SPLIT
        assert target.shares_gate_up == (is_split and target.weights == FP8_TENSOR)
        assert (target.scale_shape is not None) == (target.weights == FP8_TENSOR)
    assert TARGETS["neuron"].weights.element.max == 240
    assert TARGETS["neuron"].weights.scale_dtype == torch.float32


def test_what_each_engine_looks_for():
    # Names and shapes that the engines' own loaders read; a scale always multiplies.
    facts = {name: (t.scale, t.scale_shape, t.input_scale) for name, t in TARGETS.items()}
    assert facts == {
        "hf-fp8-block": (".weight_scale_inv", None, ""),
        "hf-fp8-tensor": (".weight_scale_inv", (1, 1), "_activation_scale"),
        "ct-channel": (".weight_scale", None, ""),
        "ct-tensor": (".weight_scale", (1,), ".input_scale"),
        "ct-block": (".weight_scale", None, ""),
        "ct-mxfp8": (".weight_scale", None, ""),
        "modelopt-fp8": (".weight_scale", (), ".input_scale"),
        "mxfp8": (".weight_scale_inv", None, ""),
        "neuron": (".scale", None, ""),
        "octomoe": ("_scale", None, ""),
    }


INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "awq"}, "quant_method is 'awq', but needs fp8, mxfp8, compressed-tensors"),
    ({"weight_block_size": [128, 128]}, "quant_method is None"),
    (ct(INT8, None), "config_groups weights are 8-bit int, but needs 8-bit float"),
    (ct({"num_bits": 4, "strategy": "tensor_group"}, None), "are 4-bit float"),
    (
        ct({"strategy": "group", "group_size": 128}, None),
        "have strategy 'group' of group size 128, but needs tensor, channel, block, MXFP8",
    ),
    (
        ct({"strategy": "attn_head"}, None),
        "have strategy 'attn_head' of group size None",
    ),
    (
        ct({}, None, config_groups={}),
        "config_groups hold 0 different weight formats, but needs one FP8 format",
    ),
    (
        ct(
            {},
            None,
            config_groups={
                "a": {"weights": FP8_WEIGHTS | {"strategy": "channel"}},
                "b": {"weights": FP8_WEIGHTS | {"strategy": "tensor"}},
            },
        ),
        "config_groups hold 2 different weight formats",
    ),
    (
        ct({}, None, config_groups={"FP8_DYNAMIC": ["Linear"]}),
        "hold \\['Linear'\\], but needs groups that say how their weights are quantised",
    ),
    (ct({}, None, config_groups={"a": {"weights": None}}), "hold {'weights': None}"),
    (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "quant_algo is 'NVFP4', but needs FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO or MXFP8",
    ),
    ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "'MIXED_PRECISION'"),
]


@pytest.mark.parametrize(("stated", "message"), REFUSED)
def test_what_is_not_read_is_refused(stated: dict[str, Any], message: str):
    with pytest.raises(NotImplementedError, match=message):
        read_scheme({"quantization_config": stated})


@pytest.mark.parametrize(
    "stated",
    [
        {"quantization_type": "per_tensor_symmetric", "quantization_dtype": "f8e4m3"},
        {"quantization_type": "per_channel_symmetric", "quantization_dtype": "int8"},
        {"quantization_type": "blockwise_symmetric", "quantization_dtype": "f8e4m3"},
    ],
)
def test_other_neuron_schemes_are_refused(stated: dict[str, Any]):
    with pytest.raises(
        NotImplementedError, match="needs f8e4m3 and one of expert_wise_per_channel"
    ):
        read_scheme({}, neuron={"quantized": True, **stated})


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target is 'gguf', but needs one of hf-fp8-block, "):
        find_target("gguf")
