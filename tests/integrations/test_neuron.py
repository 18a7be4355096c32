"""In memory and on disk, a model becomes the same Neuron state dict, and NxD's limits are told.

NxD is not installed here; what its classes hand over (names without ``model.``, ``.scale`` for
``.weight_scale``, a config object) is imitated.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octomoe import convert_checkpoint
from octomoe.integrations.neuron import (
    check_expert_parallel,
    convert_state_dict,
    quantization_passes,
)

TINY = Path(__file__).parent.parent.parent / "examples" / "tiny-qwen3-moe"
WISE, CHANNEL = "expert_wise_per_channel_symmetric", "per_channel_symmetric"
DOWN = "layers.0.mlp.expert_mlps.mlp_op.down_proj"

Tensors = dict[str, Tensor]


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """State dict and config of a checkpoint."""
    return load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())


@pytest.fixture(scope="module")
def tiny() -> tuple[Tensors, dict[str, Any]]:
    return load(TINY)


def as_nxd(state_dict: Tensors, config: dict[str, Any], **neuron: Any) -> tuple[Tensors, Any]:
    """What NxD Inference passes to `convert_hf_to_neuron_state_dict`."""
    renamed = {
        name.removeprefix("model.").replace(".weight_scale", ".scale")
        if name.endswith(".weight_scale")
        else name.removeprefix("model."): tensor
        for name, tensor in state_dict.items()
    }
    return renamed, SimpleNamespace(**config, neuron_config=SimpleNamespace(**neuron))


def assert_same(made: Tensors, expected: Tensors) -> None:
    assert set(made) == set(expected)
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype, name
        assert made[name].shape == tensor.shape, name
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (made[name], tensor)]
        assert torch.equal(*as_bytes), name


def converted(path: Path, src: Path = TINY, **options: Any) -> Tensors:
    convert_checkpoint(src, path, target="neuron", verify=False, **options)
    return load_file(path / "model.safetensors")


# ---- the same bytes ----


@pytest.mark.parametrize("is_wise", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights_scale": "pow2"},
        {"all_linears": True},
        {"modules_to_not_convert": ("layers.1.",)},
        {"pad_intermediate": 96},
    ],
)
def test_in_memory_equals_on_disk(
    tiny: Any, tmp_path: Path, is_wise: bool, options: dict[str, Any]
):
    scale = "wise" if is_wise else "shared"
    expected = converted(tmp_path / "out", expert_scale=scale, **options)
    made = convert_state_dict(*tiny, expert_wise_scale=is_wise, **options)
    assert_same(made, expected)
    assert made[f"{DOWN}.scale"].shape == (16 if is_wise else 1, 1, 256)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("hf-fp8-block", {"weights_scale": "pow2"}),
        ("hf-fp8-block", {"weights_scale": "pow2", "all_linears": True}),
        ("ct-channel", {}),
        ("ct-tensor", {"weights_scale": "pow2"}),
        ("ct-mxfp8", {}),
        ("octomoe", {}),
    ],
)
@pytest.mark.parametrize("is_nxd", [False, True])
def test_quantised_sources_keep_their_values(
    tmp_path: Path, target: str, options: dict[str, Any], is_nxd: bool
):
    convert_checkpoint(TINY, tmp_path / "src", target=target, verify=False, **options)
    expected = converted(tmp_path / "out", tmp_path / "src")
    state_dict, config = load(tmp_path / "src")
    if is_nxd:
        state_dict, config = as_nxd(state_dict, config)
    assert_same(convert_state_dict(state_dict, config), expected)


def test_a_lossy_second_quantisation_is_refused(tmp_path: Path):
    convert_checkpoint(TINY, tmp_path / "src", target="hf-fp8-block", verify=False)
    source = load(tmp_path / "src")
    with pytest.raises(ValueError, match="no powers of two"):
        convert_state_dict(*source)
    made = convert_state_dict(*source, allow_requantize=True)
    assert_same(made, converted(tmp_path / "out", tmp_path / "src", allow_requantize=True))


def test_fused_experts_of_a_loaded_model(tiny: Any, tmp_path: Path):
    # Transformers' modules hold an experts tensor per layer; the config is its class.
    transformers = pytest.importorskip("transformers", minversion="5.16")
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    state_dict = model.state_dict()
    assert "model.layers.0.mlp.experts.gate_up_proj" in state_dict
    expected = converted(tmp_path / "out") | {"lm_head.weight": state_dict["lm_head.weight"]}
    assert_same(convert_state_dict(state_dict, model.config), expected)


def test_sources_stay_as_they_are(tiny: Any):
    state_dict, config = tiny
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in state_dict.items()}
    stated = json.dumps(config)
    convert_state_dict(state_dict, config)
    assert set(state_dict) == set(before)
    for name, (address, tensor) in before.items():
        assert state_dict[name].data_ptr() == address
        assert torch.equal(state_dict[name], tensor)
    assert json.dumps(config) == stated


def test_layout_on_any_memory(tiny: Any, tmp_path: Path):
    # Not contiguous, not detached.
    state_dict, config = tiny
    strange = {
        name: tensor.t().contiguous().t().requires_grad_() if tensor.dim() == 2 else tensor
        for name, tensor in state_dict.items()
    }
    assert_same(convert_state_dict(strange, config), converted(tmp_path / "out"))


# ---- as NxD Inference calls it ----


def test_padding_as_nxd_inference_states_it(tiny: Any, tmp_path: Path):
    state_dict, config = tiny
    padded = config | {"moe_intermediate_size": 192, "moe_intermediate_pad_size": 64}
    made = convert_state_dict(*as_nxd(state_dict, padded))
    assert_same(made, converted(tmp_path / "out", pad_intermediate=192))
    assert made[f"{DOWN}.weight"].shape == (16, 192, 256)


def test_ranks_are_added(tiny: Any, tmp_path: Path):
    expected = converted(tmp_path / "out")
    for made in (
        convert_state_dict(*tiny, tp_degree=4),
        convert_state_dict(*as_nxd(*tiny, tp_degree=4)),
    ):
        names = {"rank_util.rank", *(f"layers.{n}.self_attn.rank_util.rank" for n in range(3))}
        assert set(made) == set(expected) | names
        for name in names:
            assert made[name].tolist() == [0, 1, 2, 3]
            assert made[name].dtype == torch.int32


def test_neurons_own_layout_passes_through(tiny: Any, tmp_path: Path):
    # NxD Inference converts whatever it loads, our own checkpoints too.
    stored = converted(tmp_path / "out")
    made = convert_state_dict(*as_nxd(stored, tiny[1], tp_degree=2))
    assert all(made[name] is stored[name] for name in stored)
    assert set(made) - set(stored) >= {"rank_util.rank"}


@pytest.mark.parametrize("is_wise", [True, False])
def test_stored_scales_must_be_the_ones_asked_for(tiny: Any, tmp_path: Path, is_wise: bool):
    stored = converted(tmp_path / "out", expert_scale="shared" if is_wise else "wise")
    needs = "one per expert" if is_wise else "scales common to all experts"
    with pytest.raises(ValueError, match=f"needs {needs}; set expert_wise_scale to {not is_wise}"):
        convert_state_dict(stored, tiny[1], expert_wise_scale=is_wise)


# ---- whose scales ----


@pytest.mark.parametrize(
    ("outer", "neuron", "is_wise"),
    [
        ({}, {}, True),
        ({"expert_wise_scale": False}, {}, False),
        ({"expert_wise_scale": True}, {}, True),
        ({}, {"expert_wise_scale": False}, False),
        ({"expert_wise_scale": True}, {"expert_wise_scale": False}, True),
        ({}, {"quantization_type": CHANNEL}, False),
        ({}, {"quantization_type": WISE}, True),
        ({}, {"quantization_type": CHANNEL, "expert_wise_scale": True}, True),
    ],
)
def test_the_models_own_config_decides(
    tiny: Any, outer: dict[str, Any], neuron: dict[str, Any], is_wise: bool
):
    state_dict, config = as_nxd(tiny[0], tiny[1] | outer, **neuron)
    made = convert_state_dict(state_dict, config)
    assert made[f"{DOWN}.scale"].shape[0] == (16 if is_wise else 1)
    types = [each["quantization_type"] for each in quantization_passes(config)]
    assert types == ([CHANNEL, WISE] if is_wise else [CHANNEL])


def test_the_argument_goes_before_the_config(tiny: Any):
    state_dict, config = tiny
    made = convert_state_dict(
        state_dict, config | {"expert_wise_scale": True}, expert_wise_scale=False
    )
    assert made[f"{DOWN}.scale"].shape[0] == 1


def test_a_config_that_says_neither_is_refused(tiny: Any):
    state_dict, config = tiny
    with pytest.raises(ValueError, match="expert_wise_scale is 'yes' in config"):
        convert_state_dict(state_dict, config | {"expert_wise_scale": "yes"})


def test_target_and_draft_model_do_not_meet(tiny: Any):
    # Speculation: a MoE with expert-wise scales, drafted for by another MoE without.
    state_dict, config = tiny
    target = convert_state_dict(*as_nxd(state_dict, config, expert_wise_scale=True))
    draft = convert_state_dict(*as_nxd(state_dict, config, expert_wise_scale=False))
    again = convert_state_dict(*as_nxd(state_dict, config))
    assert [t[f"{DOWN}.scale"].shape[0] for t in (target, draft, again)] == [16, 1, 16]


# ---- dense models ----


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3", "hidden_size": 8},
        {"model_type": "llama", "expert_wise_scale": True},
        # A MoE's model type, every layer dense.
        {"model_type": "qwen3_moe", "hidden_size": 8, "mlp_only_layers": [0]},
        SimpleNamespace(neuron_config=SimpleNamespace(tp_degree=8, expert_wise_scale=True)),
    ],
)
def test_dense_models_come_back_untouched(config: Any):
    names = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_norm.weight")
    state_dict = {name: torch.ones(2, 8) for name in names}
    made = convert_state_dict(state_dict, config, expert_wise_scale=True)
    assert made is state_dict
    assert list(state_dict) == list(names)


def test_unknown_experts_are_refused():
    state_dict = {"model.layers.0.mlp.experts.0.gate_proj.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="model_type is 'my_moe', but needs one that a record"):
        convert_state_dict(state_dict, {"model_type": "my_moe"})


def test_families_without_a_neuron_model_are_refused():
    state_dict = {"model.layers.0.mlp.experts.0.gate_proj.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"family is olmoe.* that AWS Neuron has a model of"):
        convert_state_dict(state_dict, {"model_type": "olmoe"})


def test_dtypes_that_no_file_holds_are_refused(tiny: Any):
    state_dict, config = tiny
    with pytest.raises(ValueError, match=r"holds 'x' of dtype torch\.complex128"):
        convert_state_dict({**state_dict, "x": torch.ones(1, dtype=torch.complex128)}, config)


# ---- NxD's convert and its limits ----


def test_two_passes():
    config = {"neuron_config": SimpleNamespace(modules_to_not_convert=["lm_head", "self_attn"])}
    assert quantization_passes(config) == [
        {
            "quantization_type": CHANNEL,
            "modules_to_not_convert": ["lm_head", "self_attn", "expert_mlps"],
        },
        {"quantization_type": WISE, "include": ["*expert_mlps.mlp_op*"]},
    ]


def test_one_pass_without_expert_wise_scales():
    config = {"expert_wise_scale": False, "modules_to_not_convert": ["lm_head"]}
    assert quantization_passes(config) == [
        {"quantization_type": CHANNEL, "modules_to_not_convert": ["lm_head"]}
    ]


@pytest.mark.parametrize(
    ("ep_degree", "batch_size", "is_decode"),
    [(1, 1, True), (8, 16, True), (8, 64, True), (8, 1, False), (128, 16, True)],
)
def test_expert_parallelism_that_nxd_runs(ep_degree: int, batch_size: int, is_decode: bool):
    check_expert_parallel(ep_degree, batch_size, 8, 128, is_decode)


@pytest.mark.parametrize(("batch_size", "top_k", "least"), [(1, 8, 16), (15, 8, 16), (42, 3, 43)])
def test_small_decode_batches_are_refused(batch_size: int, top_k: int, least: int):
    message = (
        f"batch_size is {batch_size} with {top_k} of 128 experts per token, but needs {least} or "
        f"more in token generation under expert parallel degree 2; raise the batch to {least}, or "
        "decode with expert parallel degree 1"
    )
    with pytest.raises(ValueError, match=message):
        check_expert_parallel(2, batch_size, top_k, 128, is_decode=True)
    check_expert_parallel(2, least, top_k, 128, is_decode=True)


@pytest.mark.parametrize("is_neuron", [False, True])
def test_experts_must_be_dealt_out_evenly(tiny: Any, tmp_path: Path, is_neuron: bool):
    state_dict, config = tiny
    if is_neuron:
        state_dict = converted(tmp_path / "out")
    with pytest.raises(ValueError, match="ep_degree is 3, but needs a divisor of 16"):
        convert_state_dict(state_dict, config, ep_degree=3)
    whole = convert_state_dict(state_dict, config, ep_degree=4)
    assert whole[f"{DOWN}.weight"].shape[0] == 16


def test_common_scales_cannot_be_dealt_out(tiny: Any):
    with pytest.raises(ValueError, match="ep_degree is 2, but needs expert-wise scales"):
        convert_state_dict(*tiny, expert_wise_scale=False, ep_degree=2)
