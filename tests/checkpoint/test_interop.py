"""What we write, others read: stock Transformers, compressed-tensors' own code, ModelOpt's rules.

The example model is converted to every GPU target. Without a GPU, Transformers turns FP8 weights
back into plain ones, which must be our bytes times our scales; with its check for one taken out it
builds its FP8 modules, which must hold our bytes and scales. Weights are compared in float32:
loading in bfloat16, Transformers rounds the stored scales to bfloat16 too. (Loading FP8 in float32,
it leaves the weights that are not quantised in bfloat16; here they follow.)
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from octomoe import convert_checkpoint
from octomoe.checkpoint.encode import values_of
from octomoe.checkpoint.names import Role
from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.schemes import TARGETS
from octomoe.checkpoint.source import Checkpoint
from octomoe.core.qtensor import QTensor

transformers = pytest.importorskip("transformers", minversion="5.16")
pytest.importorskip("accelerate")
pytest.importorskip("compressed_tensors", minversion="0.20")

TINY = Path(__file__).parent.parent.parent / "examples" / "tiny-qwen3-moe"
LAYERS, EXPERTS = 3, 16
ROLES = (Role.GATE, Role.UP, Role.DOWN)
INPUT_SCALES = {
    layer: {
        "gate": [0.01 + 0.001 * e for e in range(EXPERTS)],
        "up": [0.01 + 0.001 * e for e in range(EXPERTS)],
        "down": [0.02 + 0.002 * e for e in range(EXPERTS)],
    }
    for layer in range(LAYERS)
}
# Name -> target and options.
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TARGETS if name not in ("modelopt-fp8", "neuron", "octomoe")},
    **{
        f"{name} static": (name, {"input_scales": INPUT_SCALES})
        for name in ("ct-tensor", "hf-fp8-tensor", "modelopt-fp8")
    },
    **{
        f"{name} pow2": (name, {"weights_scale": "pow2"}) for name in ("hf-fp8-block", "ct-channel")
    },
    **{
        f"{name} all": (name, {"all_linears": True})
        for name in ("hf-fp8-block", "ct-channel", "hf-fp8-tensor", "ct-tensor", "mxfp8")
    },
    **{
        f"{name} keep": (name, {"keep": ["*.layers.1.*"]})
        for name in ("hf-fp8-block", "ct-channel")
    },
}
FP8 = [name for name in MADE if name.startswith(("hf-", "mxfp8"))]
CT = [name for name in MADE if name.startswith("ct-")]
# Transformers multiplies an expert's weight with its scale as they are: their shapes must allow it.
CT_IN_TRANSFORMERS = [name for name in CT if not name.startswith(("ct-block", "ct-mxfp8"))]
DYNAMIC_CT = [name for name in CT if "static" not in name]

# Measured: 34.5 to 39, with all linears 32.8 to 34.6.
MIN_LOGITS_DB = 32.0

Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A converted checkpoint by its name in `MADE`."""

    @cache
    def make(name: str) -> Path:
        target, options = MADE[name]
        path = tmp_path_factory.mktemp("made") / "out"
        done = convert_checkpoint(TINY, path, target=target, **options)
        assert done.verification is not None
        assert done.verification.problems == []
        return path

    return make


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers takes this machine for one that can run FP8."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)


def load(path: Path, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, dict[str, Any]]:
    """A model as stock Transformers loads it, and its report."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, output_loading_info=True, **more
    )
    return model.eval(), {what: found for what, found in info.items() if found}


def load_ct(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    config = transformers.CompressedTensorsConfig(dequantize=True)
    return load(path, dtype, quantization_config=config)


def read_experts(path: Path) -> Iterator[tuple[int, int, dict[Role, Any]]]:
    """Layer, expert, and its weights, as our reader has them."""
    reader = Reader(Checkpoint(path))
    for layer in reader.layers:
        for expert in range(layer.num_experts):
            yield layer.layer, expert, dict(reader.expert(layer, expert).weights)


def read_values(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The Transformers model's state dict, of our reader's values."""
    reader = Reader(Checkpoint(path))
    experts = {name for layer in reader.layers for name in layer.names}
    values: dict[str, Tensor] = {}
    for name in reader.checkpoint.tensors:
        if name not in experts and name not in reader.companions:
            values[name] = values_of(reader.weight(name), dtype)
    stacked: dict[str, list[Tensor]] = {}
    for layer, _, weights in read_experts(path):
        gate, up, down = (values_of(weights[role], dtype) for role in ROLES)
        module = f"model.layers.{layer}.mlp.experts"
        stacked.setdefault(f"{module}.gate_up_proj", []).append(torch.cat([gate, up]))
        stacked.setdefault(f"{module}.down_proj", []).append(down)
    values |= {name: torch.stack(tensors) for name, tensors in stacked.items()}
    values["lm_head.weight"] = values["model.embed_tokens.weight"]
    return values


def assert_equal_weights(model: Any, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor), name


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    tokens = (torch.arange(96) * 37 % 4096).reshape(3, 32)
    return model(tokens).logits.float()


@cache
def plain_model() -> Any:
    return load(TINY)[0]


def median_db(model: Any) -> float:
    """Signal to noise of the logits against the plain model's, of the median token.

    Not of all: the few tokens that choose another expert decide the sum, in bfloat16 too (31 dB).
    """
    plain, logits = logits_of(plain_model()), logits_of(model)
    ratios = plain.square().sum(-1) / (logits - plain).square().sum(-1)
    return 10 * ratios.median().log10().item()


# ---- Transformers, its own FP8 ----


@pytest.mark.parametrize("name", FP8)
def test_transformers_reads_fp8(made: Made, name: str):
    model, report = load(made(name))
    if name.endswith("static"):
        # Without a GPU Transformers drops the scales of activations that it does not quantise, and
        # reports them under a name of its own.
        dropped = report.pop("unexpected_keys")
        assert {key.rpartition(".")[2] for key in dropped} == {
            "gate_up_proj_weight",
            "down_proj_weight",
        }
    assert report == {}
    expected = read_values(made(name))
    assert_equal_weights(model, expected)
    logits = logits_of(model.float())
    reference = load(TINY)[0]
    reference.load_state_dict(expected)
    assert torch.equal(logits, logits_of(reference))
    assert median_db(model) > MIN_LOGITS_DB


@pytest.mark.parametrize("name", ["hf-fp8-block", "hf-fp8-tensor", "mxfp8", "hf-fp8-block pow2"])
def test_transformers_reads_fp8_as_bfloat16(made: Made, name: str):
    model, report = load(made(name), torch.bfloat16)
    assert report == {}
    is_pow2 = name in ("mxfp8", "hf-fp8-block pow2")
    for name_, expected in read_values(made(name)).items():
        found = model.state_dict()[name_].float()
        if is_pow2:
            # Nothing to round: neither in the scale, nor in four significant bits times it.
            assert torch.equal(found, expected), name_
        else:
            # One rounding of the scale and one of the product, 2^-9 each.
            torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)


@pytest.mark.usefixtures("with_gpu")
@pytest.mark.parametrize("name", FP8)
def test_transformers_holds_our_bytes_and_scales(made: Made, name: str):
    model, report = load(made(name), torch.bfloat16)
    assert report == {}
    kept = {1} if name.endswith("keep") else set()
    for number, expert, weights in read_experts(made(name)):
        module = model.model.layers[number].mlp.experts
        gate, up, down = (weights[role] for role in ROLES)
        if number in kept:
            assert type(module).__name__ == "Qwen3MoeExperts"
            assert torch.equal(module.gate_up_proj[expert], torch.cat([gate, up]))
            assert torch.equal(module.down_proj[expert], down)
            continue
        assert type(module).__name__ == "FP8Experts"
        is_static = name.endswith("static")
        assert module.activation_scheme == ("static" if is_static else "dynamic")
        if is_static:
            for stored, role in (("gate_up_proj", "gate"), ("down_proj", "down")):
                found = getattr(module, f"{stored}_activation_scale").float()
                expected = torch.tensor(INPUT_SCALES[number][role])
                torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)
        assert_same_quantized(module, "gate_up_proj", expert, [gate, up])
        assert_same_quantized(module, "down_proj", expert, [down])


def assert_same_quantized(module: Any, name: str, expert: int, parts: list[QTensor]) -> None:
    data = torch.cat([part.data.view(torch.uint8) for part in parts])
    assert torch.equal(getattr(module, name)[expert].view(torch.uint8), data)
    held = getattr(module, f"{name}_scale_inv")[expert]
    scale = torch.cat([part.scale.float() for part in parts]).reshape(held.shape)
    assert torch.equal(held.float(), scale)
    assert held.dtype == parts[0].scale.dtype


@pytest.mark.usefixtures("with_gpu")
@pytest.mark.parametrize("name", [n for n in FP8 if n.endswith("all")])
def test_transformers_quantises_the_linears_we_did(made: Made, name: str):
    model, report = load(made(name), torch.bfloat16)
    assert report == {}
    reader = Reader(Checkpoint(made(name)))
    quantized = {n.removesuffix(".weight") for n in reader.scales if ".experts." not in n}
    # k and v have 64 rows: q, k and v stay as they are.
    assert quantized == {f"model.layers.{n}.self_attn.o_proj" for n in range(LAYERS)}
    linears = {n: m for n, m in model.named_modules() if type(m).__name__ == "FP8Linear"}
    assert set(linears) == quantized
    for linear, module in linears.items():
        weight = reader.weight(f"{linear}.weight")
        assert isinstance(weight, QTensor)
        assert torch.equal(module.weight.view(torch.uint8), weight.data.view(torch.uint8))
        held = module.weight_scale_inv
        assert torch.equal(held.float(), weight.scale.float().reshape(held.shape))


@pytest.mark.usefixtures("with_gpu")
def test_without_the_list_transformers_would_quantise_more(made: Made):
    # What the list in config.json is for; it is the only thing that tells.
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    model, _ = load(made("hf-fp8-block"), torch.bfloat16)
    plain = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    listed = model.config.quantization_config.modules_to_not_convert
    routers = {f"model.layers.{n}.mlp.gate" for n in range(LAYERS)}
    assert plain | routers == set(listed)
    assert FineGrainedFP8HfQuantizer.requires_calibration is False


# ---- Transformers, compressed-tensors ----


@pytest.mark.parametrize("name", CT_IN_TRANSFORMERS)
def test_transformers_reads_compressed_tensors(made: Made, name: str):
    model, report = load_ct(made(name))
    if name.endswith("static"):
        # Of no use to dequantised experts, and said to be left over.
        left = report.pop("unexpected_keys")
        assert len(left) == LAYERS * EXPERTS * 3
        assert all(key.endswith(".input_scale") for key in left)
    assert report == {}
    assert_equal_weights(model, read_values(made(name)))
    assert median_db(model) > MIN_LOGITS_DB


@pytest.mark.parametrize("name", ["ct-block", "ct-mxfp8"])
def test_transformers_refuses_other_compressed_experts(made: Made, name: str):
    # It multiplies each expert's weight with the stored scale as is. vLLM and compressed-tensors
    # read these; where Transformers learns to, the documents have to say so.
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        load_ct(made(name))


# ---- compressed-tensors itself ----


def ct_config(path: Path) -> Any:
    from compressed_tensors.quantization import QuantizationConfig

    stated = json.loads((path / "config.json").read_text())["quantization_config"]
    return QuantizationConfig.model_validate(stated)


@pytest.mark.parametrize("name", CT)
def test_config_is_valid_and_says_what_we_wrote(made: Made, name: str):
    config = ct_config(made(name))
    (scheme,) = config.config_groups.values()
    weights, inputs = scheme.weights, scheme.input_activations
    facts = {
        "ct-channel": ("channel", None, None, "token", None),
        "ct-tensor": ("tensor", None, None, "tensor", None),
        "ct-block": ("block", None, [128, 128], "group", 128),
        "ct-mxfp8": ("group", 32, None, "group", 32),
    }[MADE[name][0]]
    assert (
        weights.strategy,
        weights.group_size,
        weights.block_structure,
        inputs.strategy,
        inputs.group_size,
    ) == facts
    assert (weights.type, weights.num_bits, weights.dynamic) == ("float", 8, False)
    assert inputs.dynamic is (not name.endswith("static"))
    assert config.quantization_status == "compressed"
    is_mx = name.startswith("ct-mxfp8")
    assert config.format == ("mxfp8-quantized" if is_mx else "float-quantized")
    assert weights.scale_dtype == (torch.uint8 if is_mx else None)


@pytest.mark.parametrize("name", CT)
def test_format_is_the_one_compressed_tensors_would_choose(made: Made, name: str):
    from compressed_tensors.compressors.format import infer_module_format

    (scheme,) = ct_config(made(name)).config_groups.values()
    assert infer_module_format(nn.Linear, scheme).value == scheme.format


@pytest.mark.parametrize("name", CT)
def test_decompressed_module_by_module(made: Made, name: str):
    from compressed_tensors.compressors import BaseCompressor

    (scheme,) = ct_config(made(name)).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    tensors, reader = load_file(made(name) / "model.safetensors"), Reader(Checkpoint(made(name)))
    num_quantized = 0
    for weight in reader.scales:
        module = weight.removesuffix(".weight")
        state_dict = {
            local: tensors[f"{module}.{local}"]
            for local in compressor.compression_param_names(scheme)
        }
        found = compressor.decompress(state_dict, scheme)["weight"].float()
        assert torch.equal(found, values_of(reader.weight(weight), torch.float32)), weight
        num_quantized += 1
    layers = LAYERS - 1 if name.endswith("keep") else LAYERS
    assert num_quantized == layers * EXPERTS * 3 + LAYERS * name.endswith("all")


@pytest.mark.parametrize("name", DYNAMIC_CT)
def test_decompressed_as_a_whole(made: Made, name: str):
    # Its dequantiser of files takes every weight for quantised that the list does not name.
    check_dequantizer(made(name), ["model.embed_tokens"])


def test_decompressed_as_a_whole_without_help(made: Made):
    check_dequantizer(made("ct-channel"), [])


def check_dequantizer(path: Path, ignore: list[str]) -> None:
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer

    dequantizer = CompressedTensorsDequantizer(path, ignore=ignore, dtype=torch.float32)
    found = dequantizer.validate(load_file(path / "model.safetensors"))
    reader = Reader(Checkpoint(path))
    assert set(found) == set(reader.checkpoint.tensors) - reader.companions
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), values_of(reader.weight(name), torch.float32)), name


def test_block_fp8_dequantised_by_compressed_tensors(made: Made):
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    path = made("hf-fp8-block all")
    dequantizer = FP8BlockDequantizer.from_pretrained(path, dtype=torch.float32)
    found = dequantizer.validate(load_file(path / "model.safetensors"))
    reader = Reader(Checkpoint(path))
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), values_of(reader.weight(name), torch.float32)), name


def skeleton(path: Path) -> nn.Module:
    """Modules of the names in a checkpoint, experts split as its tensors are."""
    root = nn.Module()
    names = {n: e.shape for n, e in Checkpoint(path).tensors.items() if n.endswith(".weight")}
    for name, shape in {**names, "lm_head.weight": (4096, 256)}.items():
        *parents, leaf = name.removesuffix(".weight").split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        is_linear = len(shape) == 2 and leaf != "embed_tokens"
        with torch.device("meta"):
            kind = nn.Linear(*shape[::-1]) if is_linear else nn.Embedding(*shape[:2], 1)
        module.add_module(leaf, kind if len(shape) == 2 else nn.Module())
    return root


@pytest.mark.parametrize("name", CT)
def test_targets_and_ignore_name_what_is_quantised(made: Made, name: str):
    from compressed_tensors.utils.match import match_name, match_named_modules

    config, reader = ct_config(made(name)), Reader(Checkpoint(made(name)))
    (scheme,) = config.config_groups.values()
    quantized = {weight.removesuffix(".weight") for weight in reader.scales}
    matched = match_named_modules(skeleton(made(name)), scheme.targets, config.ignore)
    assert {module for module, _ in matched} == quantized
    # In Transformers' own model experts are no linears.
    matched = match_named_modules(plain_model(), scheme.targets, config.ignore)
    assert {module for module, _ in matched} == {q for q in quantized if ".experts." not in q}
    # vLLM has q, k and v in one.
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    for layer in range(LAYERS):
        module = f"model.layers.{layer}.self_attn.qkv_proj"
        assert any(match_name(module, entry, fused) for entry in config.ignore)


# ---- ModelOpt ----


def test_modelopt(made: Made):
    path = made("modelopt-fp8 static")
    tensors, source = load_file(path / "model.safetensors"), load_file(TINY / "model.safetensors")
    expected = set(source)
    for layer in range(LAYERS):
        for e in range(EXPERTS):
            base = f"model.layers.{layer}.mlp.experts.{e}"
            for role in ("gate", "up", "down"):
                module = f"{base}.{role}_proj"
                expected |= {f"{module}.weight_scale", f"{module}.input_scale"}
                weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
                assert weight.dtype == torch.float8_e4m3fn
                assert weight.shape == source[f"{module}.weight"].shape
                for scalar in (scale, tensors[f"{module}.input_scale"]):
                    assert (scalar.dtype, scalar.shape) == (torch.float32, ())
                found = (weight.float() * scale - source[f"{module}.weight"].float()).abs()
                # Half a step of three mantissa bits, at the largest magnitude; the values lie
                # between two steps as float32 has them.
                assert found.max() <= 16 * scale * (1 + 2**-18)
                stated = INPUT_SCALES[layer][role][e]
                assert tensors[f"{module}.input_scale"].item() == pytest.approx(stated)
            # vLLM requantises where they differ.
            assert torch.equal(
                tensors[f"{base}.gate_proj.weight_scale"], tensors[f"{base}.up_proj.weight_scale"]
            )
    assert set(tensors) == expected
    for name in source:
        if ".experts." not in name:
            assert torch.equal(tensors[name], source[name])


def test_modelopts_config_files(made: Made):
    path = made("modelopt-fp8 static")
    quantization = json.loads((path / "hf_quant_config.json").read_text())["quantization"]
    stated = json.loads((path / "config.json").read_text())["quantization_config"]
    assert quantization["quant_algo"] == stated["quant_algo"] == "FP8"
    assert quantization["kv_cache_quant_algo"] is None
    assert stated["quant_method"] == "modelopt"
    excluded = quantization["exclude_modules"]
    assert excluded == stated["ignore"]
    # Routers too: vLLM would look for their scales.
    assert {"lm_head", *(f"model.layers.{n}.mlp.gate" for n in range(LAYERS))} <= set(excluded)
    assert not any("experts" in module for module in excluded)


# ---- vLLM's rules ----


@pytest.mark.parametrize("name", ["ct-tensor static", "modelopt-fp8 static"])
def test_gate_and_up_read_one_input_scale(tmp_path: Path, name: str):
    # It refuses others. A calibration that measured them apart leaves the larger.
    scales = {
        layer: {"gate": [0.5] * EXPERTS, "up": [0.25 + 0.05 * e for e in range(EXPERTS)]}
        | {"down": [0.125] * EXPERTS}
        for layer in range(LAYERS)
    }
    convert_checkpoint(TINY, tmp_path / "out", target=MADE[name][0], input_scales=scales)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for e in range(EXPERTS):
        base = f"model.layers.2.mlp.experts.{e}"
        gate, up, down = (tensors[f"{base}.{role}_proj.input_scale"] for role in ROLES)
        assert gate.item() == up.item() == pytest.approx(max(0.5, 0.25 + 0.05 * e))
        assert down.item() == 0.125
        assert gate.shape == (() if "modelopt" in name else (1,))
