"""Tiny checkpoints: of real Transformers classes, and made by hand from a family's record.

Sizes: 4 experts, hidden size 64, expert width 48 (96 in FP4): no two axes are of one length.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from octomoe.checkpoint.names import ExpertLayer, Part, Role, load_families

NUM_EXPERTS, HIDDEN, WIDTH, LAYERS = 4, 64, 48, 2
# FP4 comes in blocks of 32.
PACKED_WIDTH = 96
# What the root's fixture poisons, as it was.
PLAIN = [
    (owner, name, getattr(owner, name))
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    )
]

# Set wherever a config has a field of that name.
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "d_model": HIDDEN, "out_hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH, "expert_ffn_hidden_size": WIDTH, "ffn_hidden_size": WIDTH,
    "shared_expert_intermediate_size": 40, "moe_shared_expert_intermediate_size": 40,
    "num_hidden_layers": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS,
    "num_attention_heads": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_heads": 4, "depth": 1, "vocab_size": 64, "max_position_embeddings": 64,
    "num_experts": NUM_EXPERTS, "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS, "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k": 2, "moe_top_k": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_heads": 4, "linear_head_dim": 16,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_d_state": 8, "mamba_n_heads": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "image_token_id": 3, "video_token_id": 4,
}  # fmt: skip

# Sizes of a text or vision model whose config class only an outer config knows.
_TEXT = {
    key: SIZES[key]
    for key in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "pad_token_id",
    )
}  # fmt: skip
_VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
_LATENT = {
    key: SIZES[key]
    for key in (
        "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "first_k_dense_replace",
        "q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim",
        "n_group", "topk_group",
    )
} | _TEXT | {"intermediate_size": 80, "num_key_value_heads": 4}  # fmt: skip

# Model type -> what else its config needs to be small, or to have experts at all. Every one of
# them is a class of Transformers; one whose model is not there is skipped.
TINY: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria": {
        "text_config": {"model_type": "aria_text", "moe_num_experts": 4, "head_dim": 16}
        | {"intermediate_size": WIDTH} | _TEXT,
        "vision_config": {"model_type": "idefics3_vision"} | _VISION,
    },
    "aria_text": {},
    "axk1": {},
    "axk2": {"num_key_value_heads": 4},
    "bailing_hybrid": {},
    "beam": {"mlp_layer_types": ["sparse", "sparse"]},
    "cohere2_moe": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": WIDTH, "moe_num_experts": 4}
        | {"moe_top_k": 2},
    },
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": {"num_key_value_heads": 4},
    "deepseek_v4": {},
    "dots1": {},
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {"mlp_only_layers": []},
    "gemma4_text": {
        "enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 16,
        "num_global_key_value_heads": 2, "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 16,
    },
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 0.5,
            },
        },
    },
    "glm5_next_text": {
        "num_key_value_heads": 4, "qk_rope_head_dim": 0, "mlp_layer_types": ["dense", "sparse"],
    },
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"shared_intermediate_size": 40, "mamba_d_head": 16},
    "granitemoeshared": {"shared_intermediate_size": 40},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2_text": {},
    "inkling_text": {},
    "jamba": {},
    "jetmoe": {"kv_channels": 16},
    "kimi_k25": {
        "text_config": {"model_type": "deepseek_v3"} | _LATENT,
        "vision_config": _VISION,
    },
    "kimi_linear": {},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {},
    "longcat_flash": {"zero_expert_num": 2, "head_dim": 8, "num_key_value_heads": 4},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl": {},
    "minimax_m3_vl_text": {"shared_intermediate_size": 40},
    "mistral4": {},
    "mistral_large4": {
        "text_config": {"model_type": "mistral_large4_text"} | _LATENT,
        "vision_config": {"model_type": "pixtral", "head_dim": 16} | _VISION,
    },
    "mistral_large4_text": {"num_key_value_heads": 4},
    "mixtral": {},
    "muse_spark_text": {"moe_hidden_size": 32},
    "nemotron_h": {"layers_block_type": ["mamba", "moe"], "n_groups": 2},
    "olmoe": {},
    "openai_privacy_filter": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen3_omni_moe_thinker": {
        "audio_config": {
            "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64, "d_model": 64, "output_dim": 64, "downsample_hidden_size": 8,
        },
    },
    "qwen3_vl_moe": {},
    "qwen4_exp_text": {},
    "solar_open": {},
    "step3p7": {
        "text_config": {"model_type": "step3p5", "moe_intermediate_size": WIDTH}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "num_attention_groups": 2}
        | {"mlp_layer_types": ["sparse", "sparse"], "share_expert_dim": 40, "head_dim": 16}
        | {"intermediate_size": 80, "sliding_window": 16} | _TEXT,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


# A family file as short as can be.
FILE = """
[layouts.mine]
parts = [
  { role = "gate_up", name = "w13", axes = "expert out in", order = "up_first" },
  { role = "down", name = "w2", axes = "expert out in" },
]

[families.mine]
model_types = ["my_moe"]
experts = ["*blocks.{layer}.moe"]
layouts = ["mine", "split"]
router = ["*.moe.router.weight"]
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `tiny_model_type` runs for every tiny model."""
    if "tiny_model_type" in metafunc.fixturenames:
        metafunc.parametrize("tiny_model_type", sorted(TINY))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder that `save_pretrained` wrote of a tiny model of a type, random but the same always."""

    @cache
    def make(model_type: str) -> Path:
        folder = tmp_path_factory.mktemp(model_type)
        with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
            for owner, name, plain in PLAIN:
                patch.setattr(owner, name, plain)
            _tiny_model(model_type).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def handmade_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder with config.json and model.safetensors of the record of a model type.

    `make(model_type, layout="", num_mtp_layers=0)`: the record's first layout if none is named;
    layers of multi-token prediction come behind the last layer. Biases are there where the layout
    has them, and so are routers.
    """

    @cache
    def make(model_type: str, layout: str = "", num_mtp_layers: int = 0) -> Path:
        folder = tmp_path_factory.mktemp(model_type)
        family = next(f for f in load_families() if model_type in f.model_types)
        chosen = next(one for one in family.layouts if layout in ("", one.name))
        width = PACKED_WIDTH if any(part.packed for part in chosen.parts) else WIDTH
        config: dict[str, Any] = {"model_type": model_type}
        for keys, size in (
            (family.num_experts, NUM_EXPERTS),
            (family.hidden_size, HIDDEN),
            (family.intermediate_size, width),
            (family.num_layers, LAYERS),
        ):
            *outer, key = keys[0].split(".")
            place = config
            for name in outer:
                place = place.setdefault(name, {})
            place[key] = size
        generator = torch.Generator().manual_seed(0)
        tensors: dict[str, Tensor] = {}
        for number in range(LAYERS + num_mtp_layers):
            module = family.experts[0].replace("{layer}", str(number)).replace("*", "model.")
            layer = ExpertLayer(module, number, chosen, NUM_EXPERTS, HIDDEN, width)
            for part in chosen.parts:
                tensors |= _part_tensors(layer, part, generator)
            prefix = module.removesuffix(".experts")
            tensors[f"{prefix}.gate.weight"] = torch.randn(4, HIDDEN, generator=generator)
        tensors["model.norm.weight"] = torch.ones(HIDDEN)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def family_file(tmp_path: Path) -> Callable[..., Path]:
    """Path of a file as `FILE`, with one text replaced and more behind."""

    def write(old: str = "", new: str = "", extra: str = "") -> Path:
        assert old in FILE
        path = tmp_path / "families.toml"
        path.write_text(FILE.replace(old, new, 1) + extra if old else FILE + extra, "utf-8")
        return path

    return write


def _part_tensors(layer: ExpertLayer, part: Part, generator: torch.Generator) -> dict[str, Tensor]:
    width = layer.intermediate_size * (2 if part.role == Role.GATE_UP else 1)
    out, into = (HIDDEN, width) if part.role == Role.DOWN else (width, HIDDEN)
    sizes = {"expert": NUM_EXPERTS, "out": out, "in": into}
    sizes |= {"expert*out": NUM_EXPERTS * out, "expert*in": NUM_EXPERTS * into}
    shape = [sizes[axis] for axis in part.axes.split()]
    bias_shape = [out] if part.is_per_expert else [NUM_EXPERTS, out]
    tensors = {}
    for expert in range(NUM_EXPERTS if part.is_per_expert else 1):
        names = [
            f"{layer.module}.{name.replace('{expert}', str(expert))}" if name else ""
            for name in (part.name, part.scale, part.bias)
        ]
        if part.packed and part.is_per_expert:
            packed, scale = [*shape[:-1], into // 2], [*shape[:-1], into // 32]
        else:
            packed, scale = [*shape[:-1], into // 32, 16], [*shape[:-1], into // 32]
        if part.packed:
            tensors[names[0]] = _bytes(0, 256, packed, generator)
            tensors[names[1]] = _bytes(118, 124, scale, generator)
        else:
            tensors[names[0]] = 0.05 * torch.randn(shape, generator=generator)
        if names[2]:
            tensors[names[2]] = 0.05 * torch.randn(bias_shape, generator=generator)
    return tensors


def _bytes(low: int, high: int, shape: list[int], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)


def _tiny_model(model_type: str) -> Any:
    pytest.importorskip("transformers", minversion="5.16")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_MAPPING,
    )

    try:
        config_class = CONFIG_MAPPING[model_type]
    except KeyError:
        pytest.skip(f"this Transformers has no {model_type}")
    values = _sizes_of(config_class)
    for name, inner in (getattr(config_class, "sub_configs", None) or {}).items():
        if inner.__name__ != "AutoConfig":
            values[name] = _sizes_of(inner)
    for name, given in TINY[model_type].items():
        both_tables = isinstance(given, dict) and isinstance(values.get(name), dict)
        values[name] = values[name] | given if both_tables else given
    config = config_class(**values)
    torch.manual_seed(0)
    for mapping in (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_MAPPING,
    ):
        if type(config) in mapping:
            model = mapping[type(config)](config).float().eval()
            break
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(std=0.05)
    return model


def _sizes_of(config_class: type) -> dict[str, Any]:
    names = set(inspect.signature(config_class).parameters)
    if dataclasses.is_dataclass(config_class):
        names |= {field.name for field in dataclasses.fields(config_class)}
    values = {name: size for name, size in SIZES.items() if name in names}
    if "intermediate_size" in names:
        # That of dense layers, unless it is the experts' own.
        values["intermediate_size"] = 80 if "moe_intermediate_size" in names else WIDTH
    return values


# ---- checkpoints with changes of one's own, for conversions ----


@pytest.fixture(scope="session")
def make_qwen(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A new folder of a qwen3_moe in bf16 with random weights.

    `make(change, num_shards=1, config={}, layers=, experts=, hidden=, width=)`: `change` may alter
    the dict of tensors. Later experts have larger weights.
    """

    def make(
        change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
        *,
        num_shards: int = 1,
        config: dict[str, Any] | None = None,
        layers: int = LAYERS,
        experts: int = NUM_EXPERTS,
        hidden: int = HIDDEN,
        width: int = WIDTH,
    ) -> Path:
        generator, tensors = torch.Generator().manual_seed(0), {}

        def add(name: str, rows: int, columns: int, std: float) -> None:
            weight = std * torch.randn(rows, columns, generator=generator)
            tensors[f"model.{name}.weight"] = weight.to(torch.bfloat16)

        add("embed_tokens", 64, hidden, 1.0)
        for layer in range(layers):
            add(f"layers.{layer}.self_attn.q_proj", hidden, hidden, 0.05)
            add(f"layers.{layer}.mlp.gate", experts, hidden, 0.05)
            for expert in range(experts):
                module, std = f"layers.{layer}.mlp.experts.{expert}", 0.02 * 2 ** (expert % 4)
                add(f"{module}.gate_proj", width, hidden, std)
                add(f"{module}.up_proj", width, hidden, std)
                add(f"{module}.down_proj", hidden, width, std)
        tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        change(tensors)
        folder = tmp_path_factory.mktemp("qwen")
        stated = {"model_type": "qwen3_moe", "num_hidden_layers": layers, "num_experts": experts}
        stated |= {"hidden_size": hidden, "moe_intermediate_size": width, "dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(stated | (config or {})))
        (folder / "tokenizer.json").write_text("{}")
        names = sorted(tensors)
        if num_shards == 1:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        weight_map = {}
        for number in range(num_shards):
            file = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
            held = names[number::num_shards]
            save_file({n: tensors[n] for n in held}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(held, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make
