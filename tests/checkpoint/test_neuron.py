"""A `neuron` checkpoint is what NxD's rules say, tensor by tensor, written out by hand here.

The rules: every expert matrix is transposed, gate in the first columns of ``gate_up_proj`` and up
behind it; float32 scales of one per expert and output channel; no byte above 240, which Trainium
reads as NaN; q_norm, k_norm and the router renamed; the rest untouched. NxD itself does not run
here: what it does with names is restated in a line where a test needs it.
"""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from octomoe import convert_checkpoint, verify_checkpoint
from octomoe.checkpoint.encode import How
from octomoe.checkpoint.neuron import neuron_config
from octomoe.core.formats import E4M3_240, FP8_CHANNEL
from octomoe.ops.quantize import quantize

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "examples" / "tiny-qwen3-moe"
LAYERS, EXPERTS, HIDDEN, WIDTH = 3, 16, 256, 128
CHANNEL_240 = FP8_CHANNEL.derive(element=E4M3_240)

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def source() -> Tensors:
    return load_file(TINY / "model.safetensors")


def convert(path: Path, src: Path = TINY, **options: Any) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and neuron_config.json of a conversion into `path`."""
    convert_checkpoint(src, path, target="neuron", **options)
    stated = json.loads((path / "neuron_config.json").read_text())
    return load_file(path / "model.safetensors"), stated


def copy_with(path: Path, config: dict[str, Any], tensors: Tensors | None = None) -> Path:
    """The example with other entries in config.json, and perhaps other tensors."""
    shutil.copytree(TINY, path)
    stated = json.loads((TINY / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(stated))
    if tensors is not None:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def expert_matrix(source: Tensors, layer: int, expert: int, role: str) -> Tensor:
    return source[f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight"]


def quantized(w_NK: Tensor, target: float = 240.0, scale_N: Tensor | None = None) -> list[Tensor]:
    """Bytes [N, K] and scales [N] by the definition, in plain torch."""
    w = w_NK.float()
    if scale_N is None:
        amax_N = w.abs().amax(1)
        scale_N = amax_N / target
        if target == 224.0:
            scale_N = torch.exp2(torch.ceil(torch.log2(scale_N)))
    data_NK = (w * (1.0 / scale_N[:, None])).clamp(-240, 240).to(torch.float8_e4m3fn)
    return [data_NK, scale_N]


def cat8(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat([part.view(torch.uint8) for part in parts], dim).view(parts[0].dtype)


def stack8(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


def expected_experts(source: Tensors, target: float = 240.0, *, is_shared: bool = False) -> Tensors:
    """Every expert tensor of the whole model, by hand."""
    expected = {}
    for layer in range(LAYERS):
        made: dict[str, list[list[Tensor]]] = {}
        for role in ("gate", "up", "down"):
            matrices = [expert_matrix(source, layer, e, role) for e in range(EXPERTS)]
            common = None
            if is_shared:
                common = torch.stack([quantized(w, target)[1] for w in matrices]).amax(0)
            made[role] = [quantized(w, target, common) for w in matrices]
        base = f"layers.{layer}.mlp.expert_mlps.mlp_op"
        both = list(zip(made["gate"], made["up"], strict=True))
        count = 1 if is_shared else EXPERTS
        expected |= {
            f"{base}.gate_up_proj.weight": stack8([cat8([g[0].t(), u[0].t()], 1) for g, u in both]),
            f"{base}.gate_up_proj.scale": torch.stack(
                [torch.cat([g[1], u[1]])[None] for g, u in both[:count]]
            ),
            f"{base}.down_proj.weight": stack8([d[0].t() for d in made["down"]]),
            f"{base}.down_proj.scale": torch.stack([d[1][None] for d in made["down"][:count]]),
        }
    return expected


def expected_rest(source: Tensors) -> Tensors:
    """Every other tensor, by hand."""
    renames = {
        "mlp.gate.weight": "mlp.router.linear_router.weight",
        "self_attn.q_norm.weight": "self_attn.q_layernorm.weight",
        "self_attn.k_norm.weight": "self_attn.k_layernorm.weight",
    }
    expected = {}
    for name, tensor in source.items():
        if ".experts." in name:
            continue
        for old, new in renames.items():
            name = name.replace(old, new)
        expected[name.removeprefix("model.")] = tensor
    return expected


def assert_same(made: Tensors, expected: Tensors) -> None:
    assert set(made) == set(expected)
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype, name
        assert made[name].shape == tensor.shape, name
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (made[name], tensor)]
        assert torch.equal(*as_bytes), name


def assert_no_high_byte(made: Tensors) -> None:
    for name, tensor in made.items():
        if tensor.dtype == torch.float8_e4m3fn:
            magnitudes = tensor.view(torch.uint8) & 0x7F
            assert magnitudes.max() <= 0x77, name


# ---- the layout ----


def test_the_formula_is_the_librarys(source: Tensors):
    w = expert_matrix(source, 0, 0, "gate")
    data, scale = quantized(w)
    own = quantize(w, CHANNEL_240)
    assert torch.equal(own.data.view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(own.scale.flatten(), scale)


def test_expert_wise(source: Tensors, tmp_path: Path):
    made, stated = convert(tmp_path / "out")
    assert_same(made, expected_experts(source) | expected_rest(source))
    assert made["layers.2.mlp.expert_mlps.mlp_op.gate_up_proj.scale"].shape == (16, 1, 256)
    assert made["layers.2.mlp.expert_mlps.mlp_op.down_proj.scale"].shape == (16, 1, 256)
    assert_no_high_byte(made)
    assert stated["quantization_type"] == "expert_wise_per_channel_symmetric"


def test_power_of_two_scales_aim_at_224(source: Tensors, tmp_path: Path):
    made, _ = convert(tmp_path / "out", weights_scale="pow2")
    assert_same(made, expected_experts(source, 224.0) | expected_rest(source))
    scale = made["layers.0.mlp.expert_mlps.mlp_op.down_proj.scale"]
    assert torch.equal(scale.log2(), scale.log2().round())
    assert_no_high_byte(made)


def test_shared_scales(source: Tensors, tmp_path: Path):
    made, stated = convert(tmp_path / "out", expert_scale="shared")
    assert made["layers.0.mlp.expert_mlps.mlp_op.gate_up_proj.scale"].shape == (1, 1, 2 * WIDTH)
    assert_same(made, expected_experts(source, is_shared=True) | expected_rest(source))
    assert_no_high_byte(made)
    assert stated["quantization_type"] == "per_channel_symmetric"


def test_averaged_scales_are_the_known_mistake(source: Tensors, tmp_path: Path):
    # Bytes of one scale under another: verification must say so.
    wise, _ = convert(tmp_path / "wise")
    done = convert_checkpoint(
        TINY, tmp_path / "out", target="neuron", expert_scale="averaged-legacy"
    )
    made = load_file(tmp_path / "out" / "model.safetensors")
    name = "layers.0.mlp.expert_mlps.mlp_op.down_proj"
    assert torch.equal(
        made[f"{name}.weight"].view(torch.uint8), wise[f"{name}.weight"].view(torch.uint8)
    )
    torch.testing.assert_close(made[f"{name}.scale"], wise[f"{name}.scale"].mean(0, keepdim=True))
    assert done.verification is not None
    assert not done.verification.is_sound


@pytest.mark.parametrize(("multiple", "padded"), [(64, 128), (96, 192), (100, 200)])
def test_padding(source: Tensors, tmp_path: Path, multiple: int, padded: int):
    made, _ = convert(tmp_path / "out", pad_intermediate=multiple)
    expected = expected_experts(source) | expected_rest(source)
    extra = padded - WIDTH
    for name, tensor in expected.items():
        if "gate_up_proj" in name:
            value = 1.0 if name.endswith("scale") else 0
            halves = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
            halves = [pad(half, (0, extra), value=value) for half in halves.chunk(2, dim=2)]
            expected[name] = torch.cat(halves, 2).view(tensor.dtype)
        elif "mlp_op.down_proj.weight" in name:
            expected[name] = pad(tensor.view(torch.uint8), (0, 0, 0, extra)).view(tensor.dtype)
    assert_same(made, expected)
    assert verify_checkpoint(tmp_path / "out", against=TINY).is_sound


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_no_high_byte_where_values_are_largest(source: Tensors, tmp_path: Path, value: float):
    # Constant matrices: every byte is the largest one, 0x77 or 0xF7.
    tensors = {
        name: torch.full_like(tensor, value) if ".experts." in name else tensor
        for name, tensor in source.items()
    }
    made, _ = convert(tmp_path / "out", copy_with(tmp_path / "in", {}, tensors))
    weight = made["layers.0.mlp.expert_mlps.mlp_op.down_proj.weight"].view(torch.uint8)
    assert (weight == (0x77 if value > 0 else 0xF7)).all()


def test_silent_experts_are_zero(source: Tensors, tmp_path: Path):
    tensors = dict(source)
    for role in ("gate", "up", "down"):
        name = f"model.layers.1.mlp.experts.3.{role}_proj.weight"
        tensors[name] = torch.zeros_like(tensors[name])
    made, _ = convert(tmp_path / "out", copy_with(tmp_path / "in", {}, tensors))
    base = "layers.1.mlp.expert_mlps.mlp_op.gate_up_proj"
    assert not made[f"{base}.weight"][3].view(torch.uint8).any()
    scale = made[f"{base}.scale"][3]
    assert (scale > 0).all()
    assert scale.isfinite().all()


# ---- from a quantised source ----


def test_pow2_blocks_go_on_without_a_second_loss(tmp_path: Path):
    convert_checkpoint(TINY, tmp_path / "block", target="hf-fp8-block", weights_scale="pow2")
    done = convert_checkpoint(tmp_path / "block", tmp_path / "out", target="neuron")
    assert done.verification is not None
    assert done.verification.is_sound
    assert set(done.outcome.weights) <= {How.RELAID, How.HALVED}
    # Only values that become subnormal can change: 0.02 % of them as measured elsewhere.
    assert done.outcome.num_changed < 1e-3 * done.outcome.num_values
    against_model = verify_checkpoint(tmp_path / "out", against=TINY)
    direct = verify_checkpoint(tmp_path / "block", against=TINY)
    assert against_model.lowest_sqnr_db > direct.lowest_sqnr_db - 0.02
    assert_no_high_byte(load_file(tmp_path / "out" / "model.safetensors"))


def test_blocks_with_other_scales_are_refused(tmp_path: Path):
    convert_checkpoint(TINY, tmp_path / "block", target="hf-fp8-block")
    with pytest.raises(ValueError, match=r"no powers of two .*--allow-requantize"):
        convert_checkpoint(tmp_path / "block", tmp_path / "out", target="neuron")


def test_channels_are_halved(tmp_path: Path):
    # Per channel either way: the same values under twice the scale.
    convert_checkpoint(TINY, tmp_path / "channel", target="ct-channel")
    done = convert_checkpoint(tmp_path / "channel", tmp_path / "out", target="neuron")
    assert set(done.outcome.weights) == {How.HALVED}
    assert done.outcome.num_changed < 1e-3 * done.outcome.num_values
    made = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(tmp_path / "channel" / "model.safetensors")
    for e in range(EXPERTS):
        scale = stored[f"model.layers.0.mlp.experts.{e}.down_proj.weight_scale"]
        made_scale = made["layers.0.mlp.expert_mlps.mlp_op.down_proj.scale"][e]
        assert torch.equal(made_scale, 2 * scale.t())
    assert_no_high_byte(made)


# ---- what is quantised ----


def test_all_linears(source: Tensors, tmp_path: Path):
    made, stated = convert(tmp_path / "out", all_linears=True)
    expected = expected_experts(source) | expected_rest(source)
    for layer in range(LAYERS):
        # q, k and v stay as they are: k and v have 64 rows, and the three are one matrix to NxD.
        name = f"layers.{layer}.self_attn.o_proj"
        data, scale = quantized(source[f"model.{name}.weight"])
        expected |= {f"{name}.weight": data, f"{name}.scale": scale[:, None]}
    assert_same(made, expected)
    assert_no_high_byte(made)
    first, second = stated["quantization_passes"]
    assert first["quantization_type"] == "per_channel_symmetric"
    assert "expert_mlps" in first["modules_to_not_convert"]
    assert second == {
        "quantization_type": "expert_wise_per_channel_symmetric",
        "include": ["*expert_mlps.mlp_op*"],
    }


def quantized_modules(made: Tensors) -> set[str]:
    return {name.removesuffix(".scale") for name in made if name.endswith(".scale")}


def is_layer_quantized(made: Tensors, layer: int) -> bool:
    base = f"layers.{layer}.mlp.expert_mlps.mlp_op"
    present = {
        f"{base}.{name}" in quantized_modules(made) for name in ("gate_up_proj", "down_proj")
    }
    assert len(present) == 1
    return present.pop()


def deep_copy(path: Path, source: Tensors, num_layers: int) -> Path:
    """The example with its first layer repeated, experts reduced to two."""
    tensors = {}
    for name, tensor in source.items():
        parts = name.split(".")
        if "layers" not in parts:
            tensors[name] = tensor
        elif parts[2] == "0" and ("experts" not in parts or int(parts[5]) < 2):
            for layer in range(num_layers):
                parts[2] = str(layer)
                if parts[3:5] == ["mlp", "gate"]:
                    tensor = tensor[:2].clone()
                tensors[".".join(parts)] = tensor.clone()
    sizes = {"num_hidden_layers": num_layers, "num_experts": 2, "num_local_experts": 2}
    return copy_with(path, sizes, tensors)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        # As NxD reads them: a text anywhere in the name.
        ({"modules_to_not_convert": ["layers.1"]}, {1, 10, 11}),
        ({"modules_to_not_convert": ["layers.1.mlp"]}, {1}),
        ({"modules_to_not_convert": ["layers.1."]}, {1}),
        ({"modules_to_not_convert": ["lm_head", "self_attn"]}, set()),
        ({"keep": ["*.layers.1.*"]}, {1}),
        ({"keep": ["layers.1"]}, set()),
        ({"include": ["*.layers.1?.*"]}, set(range(12)) - {10, 11}),
        ({"include": ["*experts"]}, set()),
    ],
)
def test_which_layers_are_left(
    source: Tensors, tmp_path: Path, options: dict[str, Any], kept: set[int]
):
    src = deep_copy(tmp_path / "in", source, 12)
    convert_checkpoint(src, tmp_path / "out", target="neuron", verify=False, **options)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert {layer for layer in range(12) if not is_layer_quantized(made, layer)} == kept
    # Those left have Neuron's layout all the same.
    for layer in kept:
        gate = source["model.layers.0.mlp.experts.1.gate_proj.weight"]
        stored = made[f"layers.{layer}.mlp.expert_mlps.mlp_op.gate_up_proj.weight"]
        assert torch.equal(stored[1, :, :WIDTH], gate.t())


# ---- neuron_config.json ----


def nxd_modules(made: Tensors) -> dict[str, str]:
    """Modules of NxD's model that its `convert` may quantise -> name of their stored weight.

    As its attention, experts and head are built; with separate q, k and v.
    """
    found = {"lm_head": "lm_head"}
    for name in made:
        module = name.removesuffix(".weight")
        parent, _, leaf = module.rpartition(".")
        if leaf in ("q_proj", "k_proj", "v_proj"):
            found[f"{parent}.qkv_proj.{leaf}"] = module
        elif leaf == "o_proj":
            found[f"{parent}.o_proj.o_proj"] = module
        elif parent.endswith("mlp_op") and name.endswith(".weight"):
            found[module] = module
    return found


def nxd_quantizes(module: str, stated: dict[str, Any]) -> set[str]:
    """Types that NxD's `convert` gives a module, pass by pass, as its source has it."""
    types = set()
    for each in stated.get("quantization_passes", [stated]):
        if "include" in each:
            # It goes on within a module that fits.
            chosen = any(fnmatch(module, pattern) for pattern in each["include"])
        else:
            kept = each["modules_to_not_convert"]
            chosen = module.rpartition(".")[2] not in kept
            chosen &= not any(text in module for text in kept)
        if chosen:
            types.add(each["quantization_type"])
    return types


@pytest.mark.parametrize("options", [{}, {"all_linears": True}, {"expert_scale": "shared"}])
def test_nxd_quantises_what_is_quantised(tmp_path: Path, options: dict[str, Any]):
    made, stated = convert(tmp_path / "out", **options)
    by_type: dict[str, set[str]] = {}
    for module, stored in nxd_modules(made).items():
        types = nxd_quantizes(module, stated)
        assert bool(types) == (stored in quantized_modules(made)), module
        assert len(types) <= 1, module
        for each in types:
            by_type.setdefault(each, set()).add(module)
    experts = by_type.get("expert_wise_per_channel_symmetric", set())
    # Modules without experts have no expert-wise scales: NxD fails on an attribute there.
    assert all("expert_mlps.mlp_op" in name for name in experts)


def test_nxd_leaves_a_kept_layer(tmp_path: Path):
    made, stated = convert(tmp_path / "out", keep=["*layers.1.*"], verify=False)
    for module, stored in nxd_modules(made).items():
        is_quantized = stored in quantized_modules(made)
        assert bool(nxd_quantizes(module, stated)) == is_quantized, module


def test_fused_qkv_finds_its_entry(tmp_path: Path):
    # NxD Inference fuses scales of q, k and v unless this very entry is in the list.
    _, stated = convert(tmp_path / "out")
    assert {f"layers.{n}.self_attn" for n in range(LAYERS)} <= set(stated["modules_to_not_convert"])


def test_attention_entries_hold_in_both_namings():
    kept = [f"layers.1.self_attn.{x}_proj" for x in "kqv"] + [
        "layers.2.self_attn.o_proj",
        "lm_head",
    ]
    stated = neuron_config(is_wise=True, kept=kept)
    assert stated["modules_to_not_convert"] == [
        "layers.1.self_attn.k_proj",
        "layers.1.self_attn.q",
        "layers.1.self_attn.v_proj",
        "layers.2.self_attn.o_proj",
        "lm_head",
    ]
    assert nxd_quantizes("layers.1.self_attn.qkv_proj.v_proj", stated) == set()
    assert nxd_quantizes("layers.1.self_attn.qkv_proj.Wqkv", stated) == set()
    assert nxd_quantizes("layers.11.self_attn.qkv_proj.q_proj", stated)
    assert nxd_quantizes("layers.1.self_attn.o_proj.o_proj", stated)
    assert nxd_quantizes("layers.2.self_attn.o_proj.o_proj", stated) == set()


def test_what_else_neuron_config_says(tmp_path: Path):
    _, stated = convert(tmp_path / "out")
    assert stated["quantized"] is True
    assert stated["quantization_dtype"] == "f8e4m3"
    assert stated["expert_wise_scale"] is True
    assert "quantization_passes" not in stated
    assert "moe_intermediate_pad_size" not in stated
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["moe_intermediate_size"] == WIDTH


def test_padding_is_stated_as_nxd_inference_counts_it(tmp_path: Path):
    _, stated = convert(tmp_path / "out", pad_intermediate=96)
    assert stated["moe_intermediate_pad_size"] == 192 - WIDTH


# ---- the model's own word ----


@pytest.mark.parametrize(("is_wise", "count"), [(True, EXPERTS), (False, 1)])
def test_config_decides_for_its_model(tmp_path: Path, is_wise: bool, count: int):
    src = copy_with(tmp_path / "in", {"expert_wise_scale": is_wise})
    made, stated = convert(tmp_path / "out", src)
    assert made["layers.0.mlp.expert_mlps.mlp_op.down_proj.scale"].shape == (count, 1, HIDDEN)
    assert stated["expert_wise_scale"] is is_wise
    # Another model converted after it has its own.
    other, _ = convert(tmp_path / "other")
    assert other["layers.0.mlp.expert_mlps.mlp_op.down_proj.scale"].shape == (EXPERTS, 1, HIDDEN)


def test_config_must_say_true_or_false(tmp_path: Path):
    src = copy_with(tmp_path / "in", {"expert_wise_scale": "yes"})
    with pytest.raises(ValueError, match="expert_wise_scale is 'yes' in config"):
        convert(tmp_path / "out", src)


def test_a_dense_draft_model_is_no_business_of_ours(tmp_path: Path):
    # A draft model beside a MoE: its folder is refused as a source, and not written to.
    draft = copy_with(tmp_path / "draft", {"model_type": "qwen3", "expert_wise_scale": True})
    before = {path.name: path.read_bytes() for path in draft.iterdir()}
    with pytest.raises(ValueError, match="model_type"):
        convert(tmp_path / "out", draft)
    assert not (tmp_path / "out").exists()
    assert {path.name: path.read_bytes() for path in draft.iterdir()} == before


def test_families_without_a_neuron_model_are_refused(tmp_path: Path):
    src = copy_with(tmp_path / "in", {"model_type": "olmoe", "intermediate_size": WIDTH})
    with pytest.raises(ValueError, match=r"needs a family that AWS Neuron has a model of"):
        convert(tmp_path / "out", src)
