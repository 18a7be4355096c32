"""A description says what a checkpoint is from headers and scales alone, and finds each oddity.

Sizes of the bundled model: 3 layers, 16 experts, 2 chosen, hidden size 256, width 128.
"""

import json
import shutil
from math import isnan
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octomoe.checkpoint.convert import convert_checkpoint
from octomoe.checkpoint.describe import describe
from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.scale_statistics import Budget, measure_scales
from octomoe.checkpoint.schemes import TARGETS
from octomoe.checkpoint.source import Checkpoint

MODEL = Path(__file__).parents[2] / "examples" / "tiny-qwen3-moe"
SCALES = {layer: dict.fromkeys(("gate", "up", "down"), [0.01] * 16) for layer in range(3)}
NUM_WEIGHTS = 3 * 16 * 3 * 256 * 128
EXPERT = "model.layers.1.mlp.experts.3"

# Target -> method, weights, activations, layout, bytes of scales and of input scales per matrix.
CASES = {
    "hf-fp8-block": ("fp8", "fp8_block128", "fp8_group128", "split", 8),
    "hf-fp8-tensor": ("fp8", "fp8_tensor", "fp8_tensor", "split", 4),
    "ct-channel": ("compressed-tensors", "fp8_row", "fp8_row", "split", None),
    "ct-tensor": ("compressed-tensors", "fp8_tensor", "fp8_tensor", "split", 4),
    "ct-block": ("compressed-tensors", "fp8_block128", "fp8_group128", "split", 8),
    "ct-mxfp8": ("compressed-tensors", "mxfp8", "mxfp8", "split", 1024),
    "modelopt-fp8": ("modelopt", "fp8_tensor", "fp8_tensor", "split", 8),
    "mxfp8": ("mxfp8", "mxfp8", "mxfp8", "split", 1024),
    "neuron": ("neuron", "fp8_row-e4m3_240", "", "neuron", None),
    "octomoe": ("octomoe", "fp8_row", "fp8_row", "octomoe", None),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Target, or expert scale -> a checkpoint made once."""
    folder, made = tmp_path_factory.mktemp("converted"), {}

    def convert(target: str, **options) -> Path:
        key = "-".join([target, *map(str, options.values())])
        if key not in made:
            made[key] = folder / key
            scales = SCALES if TARGETS[target].needs_input_scale else None
            options |= {"input_scales": scales, "verify": False}
            convert_checkpoint(MODEL, made[key], target=target, **options)
        return made[key]

    return convert


@pytest.fixture
def edit(converted, tmp_path):
    """A copy of a checkpoint with its tensors and config changed by a function."""

    def make(change, target: str = "ct-channel") -> Path:
        source = converted(target) if target else MODEL
        path = tmp_path / "edited"
        shutil.copytree(source, path)
        tensors = load_file(path / "model.safetensors")
        config = json.loads((path / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config))
        return path

    return make


def test_every_target_is_covered():
    assert set(CASES) == set(TARGETS)


def test_an_unquantised_checkpoint():
    found = describe(MODEL)
    assert (found.model_type, found.family, found.problem) == ("qwen3_moe", "qwen3_moe", "")
    assert (found.method, found.weights, found.activations) == ("none", "", "")
    assert (found.num_layers, found.dense_layers, found.top_k) == (3, (), 2)
    assert [layer.layer for layer in found.layers] == [0, 1, 2]
    sizes = {(x.num_experts, x.hidden_size, x.intermediate_size) for x in found.layers}
    assert sizes == {(16, 256, 128)}
    assert {(x.dtypes, x.num_plain, x.num_quantized) for x in found.layers} == {(("BF16",), 48, 0)}
    assert found.num_expert_weights == NUM_WEIGHTS
    assert found.bytes_per_expert_weight == 2.0
    assert found.bytes_by_role["experts"] == 2 * NUM_WEIGHTS
    assert found.bytes_by_role["embeddings"] == 2 * 4096 * 256
    assert found.bytes_by_role["attention"] == 3 * 2 * (256 * (256 + 64 + 64 + 256) + 32 + 32)
    assert found.bytes_by_dtype == {"BF16": found.num_bytes}
    assert sum(found.bytes_by_role.values()) == found.num_bytes
    assert (found.scales, found.oddities) == ((), ())


@pytest.mark.parametrize("target", CASES)
def test_a_converted_checkpoint_of_every_target(converted, target: str):
    method, weights, activations, layout, scale_bytes = CASES[target]
    found = describe(converted(target))
    assert (found.method, found.weights, found.activations) == (method, weights, activations)
    assert found.is_static == TARGETS[target].needs_input_scale
    assert {layer.layout for layer in found.layers} == {layout}
    assert found.num_expert_weights == NUM_WEIGHTS
    # Per channel: 4 bytes for each of 128 + 128 + 256 rows.
    per_expert = 3 * scale_bytes if scale_bytes else 4 * (128 + 128 + 256)
    expected = 1 + per_expert * 48 / NUM_WEIGHTS
    assert found.bytes_per_expert_weight == pytest.approx(expected, rel=1e-12)
    assert {s.layer for s in found.scales} == {0, 1, 2}
    for s in found.scales:
        assert 0 < s.least <= s.median <= s.largest < 0.1
        assert s.is_pow2 == ("mxfp8" in target)
        assert s.spread >= 1.0
        assert not s.is_constant
        assert (s.num_experts, s.num_not_positive, s.num_not_finite) == (16, 0, 0)
    assert found.oddities == ()


def test_no_weight_is_read(converted, monkeypatch):
    path = converted("ct-channel")
    read = Checkpoint.read

    def watched(self, name, index=None):
        assert "scale" in name
        return read(self, name, index)

    monkeypatch.setattr(Checkpoint, "read", watched)
    assert describe(path).scales


def test_urls_are_read_too(converted):
    path = converted("ct-channel")
    here, there = describe(path), describe(f"file://{path}")
    assert (here.scales, here.bytes_by_role) == (there.scales, there.bytes_by_role)


def test_scales_past_the_budget_are_sampled(converted):
    reader = Reader(Checkpoint(converted("ct-channel")))
    every = measure_scales(reader, Budget(10_000, 1 << 30, 1))
    some = measure_scales(reader, Budget(72, 1 << 30, 1))
    assert [(s.layer, s.role) for s in some] == [(s.layer, s.role) for s in every]
    assert {s.num_experts for s in every} == {16}
    assert {s.num_experts for s in some} == {8}


def test_an_unknown_family_still_has_sizes_and_roles(edit):
    found = describe(edit(lambda tensors, config: config.update(model_type="novel"), ""))
    assert (found.model_type, found.family, found.layers) == ("novel", "", ())
    assert "model_type is 'novel'" in found.problem
    assert found.bytes_by_role["experts"] == 2 * NUM_WEIGHTS
    assert found.num_layers == 3


def test_a_scheme_that_is_not_read_is_named(edit):
    awq = {"quant_method": "awq", "bits": 4}
    found = describe(edit(lambda _, config: config.update(quantization_config=awq), ""))
    assert found.method == "awq"
    assert found.family == "qwen3_moe"
    assert "quant_method is 'awq'" in found.problem


def test_a_family_file_that_is_not_sound_is_refused(tmp_path):
    path = tmp_path / "families.toml"
    path.write_text("[nonsense]")
    with pytest.raises(ValueError, match="nonsense is unknown here"):
        describe(MODEL, path)


def test_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        describe(tmp_path)


@pytest.mark.parametrize("scale", ["shared", "averaged-legacy"])
def test_scales_that_all_experts_have_are_odd(converted, scale: str):
    for target in ("ct-channel", "neuron"):
        found = describe(converted(target, expert_scale=scale))
        assert all(s.is_constant for s in found.scales)
        assert "in layers 0–2: shared, or averaged" in found.oddities[-1]
        says_so = any("scales are averaged over experts" in text for text in found.oddities)
        assert says_so == (scale == "averaged-legacy")


def test_a_partial_file_is_odd(edit):
    path = edit(lambda tensors, config: None)
    (path / ".partial-conversion.json").write_text("{}")
    assert_odd(path, "an unfinished conversion left .partial-conversion.json")


def test_a_missing_tokenizer_is_odd(edit):
    path = edit(lambda tensors, config: None)
    for file in path.glob("tokenizer*"):
        file.unlink()
    assert_odd(path, "there is no tokenizer")


def zero_and_nan(tensors, config):
    scale = tensors[f"{EXPERT}.up_proj.weight_scale"]
    scale[0], scale[1], scale[2] = 0.0, float("nan"), float("inf")


def all_nan(tensors, config):
    for expert in range(16):
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight_scale"
        tensors[name] = torch.full_like(tensors[name], float("nan"))


def mixed_dtypes(tensors, config):
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].float()


def no_scheme(tensors, config):
    del config["quantization_config"]


def nothing_quantised(tensors, config):
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def unused_ignore(tensors, config):
    config["quantization_config"]["ignore"] += ["model.layers.7.mlp.gate"]


def quantised_ignore(tensors, config):
    config["quantization_config"]["ignore"] += [f"{EXPERT}.up_proj"]


def multi_token_prediction(tensors, config):
    config["num_hidden_layers"] = 2


def plain_layer(tensors, config):
    for name in [n for n in tensors if n.startswith("model.layers.1.mlp.experts.")]:
        if name.endswith("_scale"):
            del tensors[name]
        else:
            tensors[name] = tensors[name].to(torch.bfloat16)


def plain_expert(tensors, config):
    name = f"{EXPERT}.up_proj.weight"
    tensors[name] = tensors[name].to(torch.bfloat16)
    del tensors[f"{name}_scale"]


def lost_scale(tensors, config):
    name = f"{EXPERT}.up_proj.weight"
    tensors[name] = tensors[name].to(torch.bfloat16)


def unexplained(tensors, config):
    tensors["model.layers.1.mlp.experts.extra"] = torch.ones(3)


ODD = [
    (zero_and_nan, "1 scale is zero or negative, in layer 1"),
    (zero_and_nan, "2 scales are NaN or infinite, in layer 1"),
    (all_nan, "2,048 scales are NaN or infinite, in layer 1"),
    (mixed_dtypes, "unquantised matrices mix dtypes: 15 BF16, 1 F32"),
    (no_scheme, "there are FP8 tensors, but config.json states no quantisation"),
    (unused_ignore, "ignore list entries that match nothing: model.layers.7.mlp.gate"),
    (quantised_ignore, f"quantised modules on the ignore list: {EXPERT}.up_proj"),
    (multi_token_prediction, "multi-token prediction has experts too, in layer 2"),
    (plain_layer, "experts are not quantised in layer 1, but elsewhere they are"),
    (plain_expert, "layer 1: experts differ, up is stored as BF16 and F8_E4M3"),
    (lost_scale, f"scales of no quantised tensor: {EXPERT}.up_proj.weight_scale"),
    (
        unexplained,
        "tensors among the experts that no record explains: model.layers.1.mlp.experts.extra",
    ),
]


@pytest.mark.parametrize(("change", "text"), ODD, ids=[f.__name__ for f, _ in ODD])
def test_each_oddity_is_said(edit, change, text: str):
    assert_odd(edit(change), text)


def test_a_scheme_without_a_quantised_tensor_is_odd(edit):
    assert_odd(edit(nothing_quantised, ""), "config.json states fp8, but nothing is quantised")


def test_layers_of_different_sizes_are_odd(edit):
    def halve_a_layer(tensors, config):
        config["num_experts"] = config["num_local_experts"] = [16, 8, 16]
        for name in [n for n in tensors if n.startswith("model.layers.1.mlp.experts.")]:
            if int(name.split(".")[5]) >= 8:
                del tensors[name]

    text = "layers have different experts: layers 0, 2 16 experts of 256 × 128, split; layer 1 8"
    assert_odd(edit(halve_a_layer), text)


def test_scales_that_are_no_numbers_have_no_median(edit):
    scales = {(s.layer, s.role): s for s in describe(edit(all_nan)).scales}
    assert isnan(scales[1, "up"].median)
    assert isnan(scales[1, "up"].spread)
    assert scales[0, "up"].median > 0


def assert_odd(path: Path, text: str) -> None:
    oddities = describe(path).oddities
    assert any(text in oddity for oddity in oddities), oddities
