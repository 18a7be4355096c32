"""Transformers models give the same answers through OctoMoE, quantised or not.

Tiny random models of several families are built from their configs; nothing is downloaded.
"""

import copy

import pytest
import torch

import octomoe
from octomoe.core.activations import LimitOn
from octomoe.integrations.transformers import (
    activation_of,
    experts_of,
    find_experts,
    fp8_experts_forward,
    fp8_experts_of,
    load_model,
    register,
)
from octomoe.moe.quantized_experts import QuantizedExperts

transformers = pytest.importorskip("transformers", minversion="5.16")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES = {
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
        "num_key_value_heads": 4,
    },
}


def make_model(family, implementation):
    register()
    options = {**SMALL, **FAMILIES[family]}
    config = transformers.AutoConfig.for_model(family, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation
    )
    for parameter in model.parameters():
        # Default initialisation is so small that the experts would hardly show in the logits.
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_tokens():
    return torch.arange(40).reshape(2, 20) % 99


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_eager_experts(family):
    tokens_BL = make_tokens()
    expected_BLV = make_model(family, "eager")(tokens_BL).logits
    actual_BLV = make_model(family, "octomoe")(tokens_BL).logits
    torch.testing.assert_close(actual_BLV, expected_BLV, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_model_stays_close_and_is_really_quantized(family, sqnr_db):
    tokens_BL = make_tokens()
    model = make_model(family, "eager")
    expected_BLV = model(tokens_BL).logits
    names = [name for name, _ in find_experts(model)]
    octomoe.quantize_model(model, "channel", "token")
    for name in names:
        assert model.get_submodule(name).experts.w13.format == octomoe.FP8_CHANNEL
    actual_BLV = model(tokens_BL).logits
    assert not torch.equal(actual_BLV, expected_BLV)
    # Random weights route near-ties differently once hidden states move, hence the low floor.
    assert sqnr_db(expected_BLV, actual_BLV) > 12


@torch.no_grad()
def test_quantized_weights_dequantize_to_the_originals(sqnr_db):
    model = make_model("gpt_oss", "eager")
    name, module = next(find_experts(model))
    original = copy.deepcopy(module)
    octomoe.quantize_model(model, octomoe.MXFP8)
    experts = model.get_submodule(name).experts
    gate_up_EDN = original.gate_up_proj
    expected_ENK = torch.cat([gate_up_EDN[..., ::2], gate_up_EDN[..., 1::2]], dim=2).mT
    assert sqnr_db(expected_ENK, experts.w13.dequantize()) > 30
    assert sqnr_db(original.down_proj.mT, experts.w2.dequantize()) > 30
    assert experts.activation == octomoe.SWIGLU_OAI


@torch.no_grad()
def test_moving_and_casting_leaves_quantized_weights_alone():
    model = octomoe.quantize_model(make_model("mixtral", "eager"), "block128", "group128")
    before = [m.experts for m in model.modules() if isinstance(m, QuantizedExperts)]
    model = model.to(torch.bfloat16).to("cpu")
    after = [m.experts for m in model.modules() if isinstance(m, QuantizedExperts)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.w13.dequantize(), new.w13.dequantize())
        assert new.w2.scale.dtype == torch.float32
    assert model(make_tokens()).logits.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("is_quantised", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_whole_model_compiles_as_one_graph(family, is_quantised):
    model = make_model(family, "octomoe")
    if is_quantised:
        octomoe.quantize_model(model, "channel", "token")
    expected_BLV = model(make_tokens()).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(make_tokens()).logits, expected_BLV)


def test_generation_runs_on_quantized_experts():
    model = octomoe.quantize_model(make_model("qwen3_moe", "octomoe"), "channel", "token")
    out = model.generate(make_tokens(), max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 24)


def test_sentinel_ids_of_expert_parallel_models_add_nothing():
    module = dict(find_experts(make_model("qwen3_moe", "octomoe")))["model.layers.0.mlp.experts"]
    module._is_expert_parallel = True
    x_TD = torch.randn(3, 64)
    ids_TA = torch.tensor([[0, 6], [6, 6], [5, 1]])
    weights_TA = torch.ones(3, 2)
    with torch.no_grad():
        y_TD = module(x_TD, ids_TA, weights_TA)
        alone_TD = module(x_TD, torch.tensor([[0], [0], [5]]), torch.ones(3, 1))
    torch.testing.assert_close(y_TD[0], alone_TD[0])
    assert torch.equal(y_TD[1], torch.zeros(64))


def test_changed_parameters_are_noticed():
    model = make_model("gpt_oss", "octomoe")
    tokens_BL = make_tokens()
    with torch.no_grad():
        before_BLV = model(tokens_BL).logits
        next(find_experts(model))[1].down_proj.mul_(2.0)
        after_BLV = model(tokens_BL).logits
    assert not torch.equal(before_BLV, after_BLV)


def test_a_model_made_in_inference_mode_runs():
    with torch.inference_mode():
        model = make_model("gpt_oss", "octomoe")
        first_BLV, second_BLV = model(make_tokens()).logits, model(make_tokens()).logits
    assert torch.equal(first_BLV, second_BLV)


def test_backward_is_refused_not_silently_wrong():
    model = make_model("qwen3_moe", "octomoe")
    loss = model(make_tokens()).logits.sum()
    with pytest.raises(NotImplementedError, match="fused_moe: backward reached this op"):
        loss.backward()


@pytest.mark.parametrize(
    ("block_size", "scale_format"), [(None, "float"), ((128, 128), "float"), ((1, 32), "ue8m0")]
)
def test_transformers_own_fp8_experts_run_without_requantizing(block_size, scale_format, sqnr_db):
    module, w13_ENK, w2_EDF = make_fp8_experts(block_size, scale_format)
    x_TD, weights_TA = torch.randn(17, 256), torch.rand(17, 2)
    ids_TA = torch.randint(3, (17, 2))
    y_TD = fp8_experts_forward(module, x_TD, ids_TA, weights_TA)
    plain = octomoe.ExpertWeights(w13_ENK, w2_EDF)
    expected_TD = octomoe.fused_moe(x_TD, plain, weights_TA, ids_TA)
    # Only the activations are quantised between the two.
    assert sqnr_db(expected_TD, y_TD) > 25


def test_static_scales_of_transformers_fp8_experts_become_their_largest():
    module, _, _ = make_fp8_experts(None, "float", activation_scheme="static")
    with torch.no_grad():
        module.gate_up_proj_activation_scale.copy_(torch.tensor([0.01, 0.02, 0.005]))
        module.down_proj_activation_scale.copy_(torch.tensor([0.1, 0.3, 0.2]))
    x_TD, weights_TA = torch.randn(17, 256), torch.rand(17, 2)
    ids_TA = torch.randint(3, (17, 2))
    experts = fp8_experts_of(module)
    assert (experts.w13_input_scale.item(), experts.w2_input_scale.item()) == pytest.approx(
        (0.02, 0.3)
    )
    expected_TD = octomoe.fused_moe(
        x_TD, experts, weights_TA, ids_TA, activation_format=octomoe.FP8_TENSOR
    )
    assert torch.equal(fp8_experts_forward(module, x_TD, ids_TA, weights_TA), expected_TD)


def make_fp8_experts(block_size, scale_format, activation_scheme="dynamic"):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", **{**SMALL, "hidden_size": 256, "num_experts": 3, "moe_intermediate_size": 128}
    )
    module = fp8.FP8Experts(config, block_size, activation_scheme, scale_format)
    module._is_expert_parallel = False
    values = []
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        rows = block_size[0] if block_size else weight.shape[1] // scale.shape[1]
        columns = block_size[1] if block_size else -1
        kind = "mxfp8" if scale_format == "ue8m0" else "fp8"
        block = f"{kind}[1,{rows},{'all' if columns < 0 else columns}]"
        q = octomoe.quantize(torch.randn(weight.shape) / 16, octomoe.Format.parse(block))
        weight.data.copy_(q.data)
        scale.data.copy_(q.scale)
        values.append(q.dequantize())
    return module, *values


class TestActivations:
    """Activations are recognised by what they compute."""

    class Module(torch.nn.Module):
        has_gate = True
        is_concatenated = True

        def __init__(self, gate, limit=None, alpha=None):
            super().__init__()
            self._gate, self.limit, self.alpha = gate, limit, alpha

        def _apply_gate(self, h):
            return self._gate(*h.chunk(2, dim=-1))

    def test_clamp_before_or_after_the_nonlinearity(self):
        silu = torch.nn.functional.silu
        before = self.Module(lambda g, u: silu(g.clamp(max=7.0)) * u.clamp(-7.0, 7.0), limit=7.0)
        after = self.Module(lambda g, u: silu(g).clamp(max=7.0) * u.clamp(-7.0, 7.0), limit=7.0)
        assert activation_of(before) == octomoe.Activation(limit=7.0)
        assert activation_of(after) == octomoe.Activation(limit=7.0, limit_on=LimitOn.OUTPUT)

    def test_gelu_variants_are_told_apart(self):
        gelu = torch.nn.functional.gelu
        assert activation_of(self.Module(lambda g, u: gelu(g) * u)) == octomoe.GELU
        tanh = self.Module(lambda g, u: gelu(g, approximate="tanh") * u)
        assert activation_of(tanh) == octomoe.GELU_TANH

    def test_a_limit_that_is_not_used_is_not_assumed(self):
        module = self.Module(lambda g, u: torch.nn.functional.silu(g) * u, limit=7.0)
        assert activation_of(module) == octomoe.SILU

    def test_unknown_activation_is_refused(self):
        module = self.Module(lambda g, u: torch.tanh(g) * u)
        with pytest.raises(NotImplementedError, match=r"activation of Module is none that octomoe"):
            activation_of(module)


class TestRefusals:
    """Bad input leaves the model as it was."""

    def test_model_without_experts(self):
        with pytest.raises(ValueError, match="Linear has none, but needs modules of Transformers"):
            octomoe.quantize_model(torch.nn.Linear(2, 2), "tensor")

    def test_formats_that_do_not_go_together(self):
        model = make_model("mixtral", "eager")
        with pytest.raises(ValueError, match="fp8_block128 x fp8_row, but needs scales that"):
            octomoe.quantize_model(model, "block128", "token")
        assert len(list(find_experts(model))) == 2

    def test_nonfinite_weights_are_named(self):
        model = make_model("mixtral", "eager")
        layer = model.get_submodule("model.layers.1.mlp.experts")
        layer.down_proj.data[3, 0, 0] = torch.nan
        match = r"w2 of model.layers.1.mlp.experts holds NaN or Inf in experts \[3\]"
        with pytest.raises(ValueError, match=match):
            octomoe.quantize_model(model, "channel")
        assert len(list(find_experts(model))) == 2
        octomoe.quantize_model(model, "channel", allow_nonfinite=True)

    def test_norm_behind_experts(self):
        _, module = next(find_experts(make_model("mixtral", "eager")))
        module.has_post_expert_norm = True
        with pytest.raises(NotImplementedError, match="normalises each expert's output"):
            experts_of(module)

    def test_folder_without_a_checkpoint(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
            load_model(tmp_path)
