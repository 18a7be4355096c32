"""Verifying finds each way in which a converted checkpoint can be wrong, and says which."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from octomoe.checkpoint.convert import convert_checkpoint
from octomoe.checkpoint.schemes import TARGETS
from octomoe.checkpoint.verify import Verification, verify_checkpoint

INF, NAN = float("inf"), float("nan")
LAYER = "model.layers.1.mlp.experts"
DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "BF16": torch.bfloat16}
INPUT_SCALES = {layer: dict.fromkeys(("gate", "up", "down"), [0.1] * 4) for layer in range(2)}
# Target -> names of expert 2's up projection and its scale, and which of them are its entries.
UP: dict[str, tuple[str, str, Any]] = {
    target: (f"{LAYER}.2.up_proj.weight", f"{LAYER}.2.up_proj.{suffix}", ...)
    for target, suffix in (
        ("ct-channel", "weight_scale"),
        ("hf-fp8-block", "weight_scale_inv"),
        ("hf-fp8-tensor", "weight_scale_inv"),
        ("modelopt-fp8", "weight_scale"),
    )
}
UP["octomoe"] = (f"{LAYER}.w13", f"{LAYER}.w13_scale", (2, slice(160, None)))
UP["neuron"] = (
    "layers.1.mlp.expert_mlps.mlp_op.gate_up_proj.weight",
    "layers.1.mlp.expert_mlps.mlp_op.gate_up_proj.scale",
    (2, slice(None), slice(160, None)),
)
WHAT = f"{LAYER}, expert 2, up"
Edit = Callable[[Path, str, Callable[[Tensor], Any]], None]
Convert = Callable[..., Path]


@pytest.fixture(scope="module")
def source(make_qwen: Callable[..., Path]) -> Path:
    """Experts whose magnitudes differ by up to 8."""
    return make_qwen(hidden=192, width=160)


@pytest.fixture(scope="module")
def convert(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """A copy, to be tampered with, of the source converted."""
    made: dict[str, Path] = {}

    def get(target: str, **options: Any) -> Path:
        key = f"{target} {options}"
        if key not in made:
            folder = tmp_path_factory.mktemp("made") / "dst"
            if target == "modelopt-fp8":
                options["input_scales"] = INPUT_SCALES
            convert_checkpoint(source, folder, target=target, verify=False, **options)
            made[key] = folder
        return shutil.copytree(made[key], tmp_path_factory.mktemp("copy") / "dst")

    return get


@pytest.fixture(scope="module")
def edit_tensor() -> Edit:
    """`edit_tensor(folder, name, function)` lets a function change a tensor in place in its file.

    Knows the format by itself, so that it can write what no library would.
    """

    def edit(folder: Path, name: str, function: Callable[[Tensor], Any]) -> None:
        for path in folder.glob("*.safetensors"):
            data = bytearray(path.read_bytes())
            start = 8 + struct.unpack("<Q", data[:8])[0]
            entry = json.loads(data[8:start]).get(name)
            if entry is None:
                continue
            first, last = (start + offset for offset in entry["data_offsets"])
            raw = torch.frombuffer(data[first:last], dtype=torch.uint8)
            function(raw.view(DTYPES[entry["dtype"]]).view(entry["shape"]))
            data[first:last] = bytes(raw.tolist())
            assert data != path.read_bytes(), "nothing changed"
            path.write_bytes(data)
            return
        raise AssertionError(f"no tensor {name}")

    return edit


@pytest.fixture
def verify(source: Path) -> Callable[[Path], Verification]:
    """Verify against the source."""
    return lambda folder: verify_checkpoint(folder, against=source)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Let a function change the tensors of the only file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    stated = json.loads(path.read_text())
    change(stated)
    path.write_text(json.dumps(stated))


# ---- nothing is wrong ----


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_files", [1, 5])
def test_what_we_write_is_sound(convert: Convert, verify, target: str, num_files: int):
    folder = convert(target, shard_bytes=10**9 if num_files == 1 else 200_000)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (num_files > 1)
    found = verify(folder)
    assert found.problems == []
    assert found.is_sound
    # Embeddings, norm, and q_proj and router of both layers.
    assert found.num_identical == 6
    assert found.num_quantized == 2 * 4 * 3
    assert 28 < found.lowest_sqnr_db < 35
    assert [(q.layer, q.role) for q in found.quality] == [
        (layer, role) for layer in range(2) for role in ("gate", "up", "down")
    ]
    assert all(len(q.sqnr_db) == len(q.scale_min) == 4 for q in found.quality)
    assert min(min(q.sqnr_db) for q in found.quality) == found.lowest_sqnr_db


def test_shared_scales_are_sound_and_averaged_ones_are_not(convert: Convert, verify):
    assert verify(convert("neuron", expert_scale="shared")).problems == []
    found = verify(convert("neuron", expert_scale="averaged-legacy"))
    # Nobody's scale is the mean: each projection of each expert is off.
    told = [re.fullmatch(r"(.*): SQNR (.*) dB, below 27 dB", each) for each in found.problems]
    assert all(told)
    assert {each[1] for each in told if each} == {
        f"model.layers.{layer}.mlp.experts, expert {expert}, {role}"
        for layer in range(2)
        for expert in range(4)
        for role in ("gate", "up", "down")
    }
    assert max(float(each[2]) for each in told if each) < 20


# ---- a tensor is wrong ----


@pytest.mark.parametrize("target", UP)
def test_a_flipped_run_of_bytes(convert: Convert, verify, edit_tensor: Edit, target: str):
    name, _, where = UP[target]
    folder = convert(target)
    edit_tensor(folder, name, lambda t: t[where][3].view(torch.uint8).bitwise_xor_(0x80))
    (problem,) = verify(folder).problems
    assert re.fullmatch(rf"{WHAT}: SQNR 1\d\.\d dB, below 27 dB", problem)


@pytest.mark.parametrize("target", UP)
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_nan_byte(convert: Convert, verify, edit_tensor: Edit, target: str, byte: int):
    name, _, where = UP[target]
    folder = convert(target)
    edit_tensor(folder, name, lambda t: t[where][3, 5].view(torch.uint8).fill_(byte))
    assert verify(folder).problems == [
        f"{WHAT}: SQNR -inf dB, below 27 dB",
        f"{WHAT}: holds NaN bytes",
    ]


@pytest.mark.parametrize("sign", [0, 0x80])
def test_a_byte_above_240_matters_on_neuron_only(convert: Convert, verify, edit_tensor, sign: int):
    def raise_largest(tensor: Tensor, where: Any) -> None:
        codes = tensor.view(torch.uint8)
        at = torch.nonzero(codes[where] == 0x77 + sign)[0].tolist()
        codes[where][tuple(at)] = 0x78 + sign

    name, _, where = UP["neuron"]
    folder = convert("neuron")
    edit_tensor(folder, name, lambda tensor: raise_largest(tensor, where))
    assert verify(folder).problems == [f"{WHAT}: holds bytes above 240, which Neuron reads as NaN"]
    folder = convert("octomoe")
    name, _, where = UP["octomoe"]
    edit_tensor(folder, name, lambda tensor: raise_largest(tensor, where))
    assert verify(folder).is_sound


@pytest.mark.parametrize("target", UP)
@pytest.mark.parametrize("value", [0.0, -0.01, NAN, INF, -INF])
def test_a_scale_that_is_no_scale(convert: Convert, verify, edit_tensor, target: str, value: float):
    _, name, where = UP[target]
    folder = convert(target)
    edit_tensor(folder, name, lambda tensor: tensor[where].view(-1)[:1].fill_(value))
    problems = verify(folder).problems
    assert all(problem.startswith(f"{WHAT}: ") for problem in problems)
    assert any(problem.startswith(f"{WHAT}: scales reach from ") for problem in problems)


@pytest.mark.parametrize("target", ["octomoe", "neuron"])
def test_swapped_scales_of_two_experts(convert: Convert, verify, edit_tensor: Edit, target: str):
    def swap(tensor: Tensor) -> None:
        tensor[[1, 3]] = tensor[[3, 1]]

    folder = convert(target)
    edit_tensor(folder, UP[target][1], swap)
    told = [each.partition(": SQNR")[0] for each in verify(folder).problems]
    assert told == [f"{LAYER}, expert {e}, {role}" for e in (1, 3) for role in ("gate", "up")]


@pytest.mark.parametrize("target", ["ct-channel", "neuron"])
def test_a_changed_tensor_that_should_have_passed_through(
    convert: Convert, verify, edit_tensor: Edit, target: str
):
    folder = convert(target)
    name = "norm.weight" if target == "neuron" else "model.norm.weight"
    # The least change there is.
    edit_tensor(folder, name, lambda tensor: tensor.view(torch.int16)[1].bitwise_xor_(1))
    expected = f"{name} is not the source's (BF16 [192] against BF16 [192])"
    assert verify(folder).problems == [expected]


def test_a_tensor_of_another_dtype_and_a_missing_one(convert: Convert, verify):
    folder, name = convert("ct-channel"), "model.norm.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].float()}))
    message = f"{name} is not the source's (F32 [192] against BF16 [192])"
    assert verify(folder).problems == [message]
    rewrite(folder, lambda tensors: tensors.pop(name))
    assert verify(folder).problems == [f"{name} is missing"]


def test_a_missing_expert_or_scale_is_no_checkpoint(convert: Convert, verify):
    folder = convert("ct-channel")
    rewrite(folder, lambda tensors: tensors.pop(UP["ct-channel"][0]))
    with pytest.raises(ValueError, match=rf"{LAYER} lacks 1 of 12 tensors: {UP['ct-channel'][0]}"):
        verify(folder)
    folder = convert("ct-channel")
    rewrite(folder, lambda tensors: tensors.pop(UP["ct-channel"][1]))
    with pytest.raises(ValueError, match=f"quantised tensor '{UP['ct-channel'][0]}' without a sca"):
        verify(folder)


def test_a_missing_layer(convert: Convert, verify):
    folder = convert("ct-channel")
    rewrite(folder, lambda ts: [ts.pop(name) for name in list(ts) if name.startswith(LAYER)])
    assert verify(folder).problems == [f"{LAYER}: the layer's experts are missing"]


@pytest.mark.parametrize(
    "name", ["more.weight", f"{LAYER}.2.up_proj.weight_scale_2", "model.norm.weight_scale"]
)
def test_an_extra_tensor(convert: Convert, verify, name: str):
    folder = convert("ct-channel")
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(3)}))
    assert verify(folder).problems == [f"1 tensors have no source, e.g. {name}"]


# ---- a config is wrong ----

IGNORE = {
    "hf-fp8-block": ("config.json", "quantization_config.modules_to_not_convert"),
    "ct-channel": ("config.json", "quantization_config.ignore"),
    "octomoe": ("config.json", "quantization_config.ignore"),
    "modelopt-fp8": ("config.json", "quantization_config.ignore"),
    "neuron": ("neuron_config.json", "modules_to_not_convert"),
}


def edit_ignored(folder: Path, target: str, change: Callable[[list[str]], Any]) -> None:
    """Let a function change the ignore list, in every file that holds it."""
    file, keys = IGNORE[target]

    def edit(stated: Any) -> None:
        for key in keys.split("."):
            stated = stated[key]
        change(stated)

    edit_json(folder / file, edit)
    if target == "modelopt-fp8":
        path = folder / "hf_quant_config.json"
        edit_json(path, lambda stated: change(stated["quantization"]["exclude_modules"]))


@pytest.mark.parametrize("target", IGNORE)
def test_an_ignore_list_that_lacks_a_module(convert: Convert, verify, target: str):
    folder, prefix = convert(target), "" if target == "neuron" else "model."
    module = f"{prefix}layers.1.self_attn.q_proj"
    # Neuron's entries are beginnings of names.
    edit_ignored(folder, target, lambda ns: ns.remove(next(n for n in ns if module.startswith(n))))
    assert verify(folder).problems == [f"config.json does not say that {module} is not quantised"]


@pytest.mark.parametrize("target", IGNORE)
def test_an_ignore_list_that_names_nothing(convert: Convert, verify, target: str):
    folder, module = convert(target), "model.layers.9.k_proj"
    edit_ignored(folder, target, lambda names: names.append(module))
    assert verify(folder).problems == [f"config.json's ignore entry '{module}' names nothing"]


@pytest.mark.parametrize("target", ["ct-channel", "hf-fp8-block", "modelopt-fp8", "neuron"])
def test_an_ignore_list_that_names_what_is_quantised(convert: Convert, verify, target: str):
    folder = convert(target)
    module = UP[target][0].removesuffix(".weight")
    edit_ignored(folder, target, lambda names: names.append(module))
    assert verify(folder).problems == [f"config.json says {module} is not quantised, but it is"]


def test_an_ignore_list_that_names_quantised_experts(convert: Convert, verify):
    folder = convert("octomoe")
    edit_ignored(folder, "octomoe", lambda names: names.append(LAYER))
    assert verify(folder).problems == [
        f"config.json says {LAYER}.{name} is not quantised, but it is" for name in ("w2", "w13")
    ]


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        ("hf-fp8-block", {"weight_block_size": [64, 64]}, "scale .* needs .3, 3. for"),
        ("hf-fp8-block", {"weight_block_size": None}, "has scale .* of shape"),
        ("hf-fp8-block", {"quant_method": "mxfp8"}, "has scale .* of shape"),
        ("octomoe", {"weights": "block128"}, "has scale .* of shape"),
        ("ct-channel", {"config_groups": {}}, "config_groups hold 0 different weight formats"),
        ("ct-channel", {"quant_method": "gptq"}, "quant_method is 'gptq', but needs fp8, mxfp8"),
        ("modelopt-fp8", {"quant_algo": "NVFP4"}, "quant_algo is 'NVFP4', but needs FP8"),
    ],
)
def test_a_config_of_another_format_is_no_checkpoint(
    convert: Convert, verify, target: str, change: dict[str, Any], message: str
):
    folder = convert(target)
    path = folder / "config.json"
    edit_json(path, lambda stated: stated["quantization_config"].update(change))
    with pytest.raises((ValueError, NotImplementedError), match=message):
        verify(folder)


def test_a_config_without_quantisation_is_no_checkpoint(convert: Convert, verify):
    folder = convert("ct-channel")
    edit_json(folder / "config.json", lambda stated: stated.pop("quantization_config"))
    with pytest.raises(ValueError, match="needs a quantization_config that says how"):
        verify(folder)


def test_an_unconverted_checkpoint_is_reported(source: Path):
    assert verify_checkpoint(source, against=source).problems == [
        "config.json states no quantisation"
    ]


@pytest.mark.parametrize(
    "change", [{"quant_algo": "NVFP4"}, {"exclude_modules": []}, {"exclude_modules": ["lm_head"]}]
)
def test_two_configs_of_modelopt_that_disagree(convert: Convert, verify, change: dict[str, Any]):
    folder = convert("modelopt-fp8")
    path = folder / "hf_quant_config.json"
    edit_json(path, lambda stated: stated["quantization"].update(change))
    assert verify(folder).problems == ["hf_quant_config.json and config.json disagree"]


@pytest.mark.parametrize("scale", ["wise", "shared"])
def test_neurons_config_with_the_wrong_kind_of_scales(convert: Convert, verify, scale: str):
    folder = convert("neuron", expert_scale=scale)
    wrong = ("expert_wise_" if scale == "shared" else "") + "per_channel_symmetric"
    edit_json(folder / "neuron_config.json", lambda s: s.update(quantization_type=wrong))
    name, shape = UP["neuron"][1], [1 if scale == "shared" else 4, 1, 320]
    problems = verify(folder).problems
    assert problems == [
        f"neuron_config.json says {wrong}, but {each} has shape {shape}"
        for each in (name.replace("layers.1", "layers.0"), name)
    ]


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF])
def test_an_input_scale_that_is_no_scale(convert: Convert, verify, edit_tensor, value: float):
    folder = convert("modelopt-fp8")
    edit_tensor(folder, f"{LAYER}.2.up_proj.input_scale", lambda tensor: tensor.fill_(value))
    assert verify(folder).problems == [f"{WHAT}: input scale {value}"]


def test_a_config_that_is_wrong_about_input_scales(convert: Convert, verify):
    message = "config.json says activations are dynamic, but 24 input scales are stored"
    folder = convert("ct-tensor", input_scales=INPUT_SCALES)
    assert verify(folder).problems == []

    def make_dynamic(stated: dict[str, Any]) -> None:
        groups = stated["quantization_config"]["config_groups"]
        groups["group_0"]["input_activations"]["dynamic"] = True

    edit_json(folder / "config.json", make_dynamic)
    assert verify(folder).problems == [message]
    folder = convert("modelopt-fp8")
    rewrite(folder, lambda tensors: tensors.pop(f"{LAYER}.2.up_proj.input_scale"))
    message = f"config.json says activations are static, but {LAYER}.2.up_proj has no input scale"
    assert verify(folder).problems == [message]
