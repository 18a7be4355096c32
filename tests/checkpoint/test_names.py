"""Experts are found by the names a record states; what does not fit it is refused, saying why."""

import fnmatch
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from octomoe.checkpoint.names import (
    ExpertLayer,
    Family,
    Role,
    find_family,
    find_layers,
    load_families,
    matches,
)

Shapes = dict[str, tuple[int, ...]]


def qwen(layers: int = 2, experts: int = 4, hidden: int = 64, width: int = 48) -> Any:
    """(family, config, shapes) of a qwen3_moe."""
    config = {"model_type": "qwen3_moe", "num_experts": experts, "num_hidden_layers": layers}
    config |= {"hidden_size": hidden, "moe_intermediate_size": width}
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    shapes: Shapes = {
        f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight": size
        for layer in range(layers)
        for expert in range(experts)
        for role, size in sizes.items()
    }
    return find_family(config), config, shapes


# ---- layers ----


def test_layers_in_order_and_only_experts():
    family, config, shapes = qwen(layers=11)
    others: Shapes = {
        "model.layers.0.mlp.gate.weight": (4, 64),
        "model.layers.0.mlp.shared_expert.gate_proj.weight": (48, 64),
        "model.layers.0.mlp.experts.0.gate_proj.weight_scale": (48, 1),
        "model.layers.0.mlp.experts.0.gate_proj.weight_scale_inv": (1, 1),
        "model.layers.0.mlp.experts.00.gate_proj.weight": (48, 64),
        "model.layers.x.mlp.experts.0.gate_proj.weight": (48, 64),
        "lm_head.weight": (64, 64),
    }
    layers = find_layers(family, config, dict(reversed((shapes | others).items())))
    assert [layer.layer for layer in layers] == list(range(11))
    assert sorted(n for layer in layers for n in layer.names) == sorted(shapes)
    assert layers[10].module == "model.layers.10.mlp.experts"
    assert (layers[0].num_experts, layers[0].hidden_size, layers[0].intermediate_size) == (
        4,
        64,
        48,
    )
    assert layers[10].tensor(Role.UP, 3) == "model.layers.10.mlp.experts.3.up_proj.weight"
    assert layers[10].bias(Role.UP, 3) == ""
    assert layers[0].part(Role.GATE_UP) is None


def test_a_role_the_layout_lacks_is_refused():
    layer = find_layers(*qwen())[0]
    with pytest.raises(ValueError, match="role is gate_up, but needs one of split: gate, up, down"):
        layer.tensor(Role.GATE_UP, 0)
    with pytest.raises(ValueError, match="role is gate_up"):
        layer.bias(Role.GATE_UP, 0)


def test_mtp_comes_last():
    family, config, shapes = qwen(layers=3)
    shapes |= {n.replace("model.layers.1", "mtp.layers.0"): s for n, s in shapes.items()}
    config["num_hidden_layers"] = 2
    layers = find_layers(family, config, shapes)
    assert [(layer.module.split(".mlp")[0], layer.is_mtp) for layer in layers] == [
        ("model.layers.0", False),
        ("model.layers.1", False),
        ("mtp.layers.0", True),
        ("model.layers.2", True),
    ]


def test_handmade_mtp(handmade_checkpoint: Any):
    folder = handmade_checkpoint("deepseek_v3", "split", 1)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = file.keys()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    layers = find_layers(find_family(config), config, shapes)
    assert [(layer.layer, layer.is_mtp) for layer in layers] == [(0, False), (1, False), (2, True)]


def test_a_missing_tensor_is_named():
    family, config, shapes = qwen()
    for expert in range(4):
        del shapes[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
    names = ", ".join(rf"model\.layers\.1\.mlp\.experts\.{e}\.up_proj\.weight" for e in range(3))
    message = rf"model\.layers\.1\.mlp\.experts lacks 4 of 12 tensors: {names}, \.\.\., but needs"
    with pytest.raises(ValueError, match=message + r".*4 experts \(layout split\); is a shard"):
        find_layers(family, config, shapes)


def test_an_expert_too_many_is_refused():
    family, config, shapes = qwen(experts=5)
    config["num_experts"] = 4
    with pytest.raises(ValueError, match=r"holds 4.*_proj\.weight, but needs only 4 experts"):
        find_layers(family, config, shapes)


def test_spare_experts_are_left_alone():
    _, config, shapes = qwen(experts=6)
    config = {"model_type": "longcat_flash", "n_routed_experts": 4, "zero_expert_num": 2}
    config |= {"num_layers": 2, "hidden_size": 64, "expert_ffn_hidden_size": 48}
    layers = find_layers(find_family(config), config, shapes)
    assert [len(layer.names) for layer in layers] == [12, 12]
    config["zero_expert_num"] = 0
    with pytest.raises(ValueError, match="needs only 4 experts"):
        find_layers(find_family(config), config, shapes)


def test_another_shape_is_refused():
    family, config, shapes = qwen()
    shapes["model.layers.1.mlp.experts.2.down_proj.weight"] = (48, 64)
    message = (
        r"model\.layers\.1\.mlp\.experts\.2\.down_proj\.weight has shape \(48, 64\), but needs "
        r"\(64, 48\): out in of 4 experts, hidden size 64 and width 48, as config\.json and layout "
        r"split state; does config\.json belong"
    )
    with pytest.raises(ValueError, match=message):
        find_layers(family, config, shapes)


def test_no_experts_are_refused():
    family, config, _ = qwen()
    with pytest.raises(ValueError, match="the checkpoint holds no experts of qwen3_moe"):
        find_layers(family, config, {"model.norm.weight": (64,)})


def test_mixed_layouts_are_refused():
    family, config, shapes = qwen()
    shapes["model.layers.0.mlp.experts.down_proj"] = (4, 64, 48)
    with pytest.raises(ValueError, match=r"holds .*down_proj.*needs the tensors of one layout: spl"
                       r"it \(.*\); fused \(.*was it written by two tools"):  # fmt: skip
        find_layers(family, config, shapes)


def test_layers_may_differ_in_layout():
    """One module has one layout; an MTP layer that another tool wrote may have another."""
    family, config, shapes = qwen()
    shapes["mtp.layers.0.mlp.experts.gate_up_proj"] = (4, 96, 64)
    shapes["mtp.layers.0.mlp.experts.down_proj"] = (4, 64, 48)
    layers = find_layers(family, config, shapes)
    assert [layer.layout.name for layer in layers] == ["split", "split", "fused"]


def test_some_biases_are_not_enough():
    family, config, shapes = qwen()
    shapes["model.layers.0.mlp.experts.0.gate_proj.bias"] = (48,)
    with pytest.raises(ValueError, match=r"lacks 11 of 24 tensors: .*1\.gate_proj\.bias"):
        find_layers(family, config, shapes)


def test_a_bias_of_another_shape_is_refused():
    config = {"model_type": "gpt_oss", "num_local_experts": 4, "num_hidden_layers": 1}
    config |= {"hidden_size": 64, "intermediate_size": 48}
    module = "model.layers.0.mlp.experts."
    shapes: Shapes = {f"{module}gate_up_proj": (4, 64, 96), f"{module}down_proj": (4, 48, 64)}
    family = find_family(config)
    assert not find_layers(family, config, shapes)[0].has_bias
    shapes |= {f"{module}gate_up_proj_bias": (4, 96), f"{module}down_proj_bias": (4, 48)}
    with pytest.raises(ValueError, match=r"down_proj_bias has shape \(4, 48\), but needs \(4, 64"):
        find_layers(family, config, shapes)
    shapes[f"{module}down_proj_bias"] = (4, 64)
    layer = find_layers(family, config, shapes)[0]
    assert sorted(layer.names) == sorted(shapes)
    assert layer.bias(Role.GATE_UP, 2) == f"{module}gate_up_proj_bias"


def vl(gate_up: tuple[int, ...], down: tuple[int, ...], hidden: int, width: int) -> ExpertLayer:
    """The one layer of a qwen3_vl_moe."""
    text: dict[str, Any] = {"model_type": "qwen3_vl_moe_text", "num_experts": 4}
    text |= {"num_hidden_layers": 1, "hidden_size": hidden, "moe_intermediate_size": width}
    config = {"model_type": "qwen3_vl_moe", "text_config": text}
    module = "model.language_model.layers.0.mlp.experts"
    shapes = {f"{module}.gate_up_proj": gate_up, f"{module}.down_proj": down}
    return find_layers(find_family(config), config, shapes)[0]


def test_a_square_gate_up_is_decided_by_down():
    """2 I = H: gate_up fits both ways, but the record's two layouts differ in down as well."""
    assert vl((4, 64, 64), (4, 32, 64), 64, 32).layout.name == "fused_transposed"
    assert vl((4, 64, 64), (4, 64, 32), 64, 32).layout.name == "fused"


def test_a_square_down_is_decided_by_gate_up():
    assert vl((4, 64, 128), (4, 64, 64), 64, 64).layout.name == "fused_transposed"
    assert vl((4, 128, 64), (4, 64, 64), 64, 64).layout.name == "fused"


def test_half_transposed_is_refused():
    with pytest.raises(ValueError, match=r"down_proj has shape .*needs \(4, 48, 64\): expert in"):
        vl((4, 64, 96), (4, 64, 48), 64, 48)


def test_what_fits_two_layouts_is_refused(family_file: Any):
    """Square weights, and a record that allows both orientations."""
    extra = """
[layouts.split_transposed]
parts = [
  { role = "gate", name = "{expert}.gate_proj.weight", axes = "in out" },
  { role = "up", name = "{expert}.up_proj.weight", axes = "in out" },
  { role = "down", name = "{expert}.down_proj.weight", axes = "in out" },
]
"""
    path = family_file('["mine", "split"]', '["split_transposed", "split"]', extra)
    family = find_family({"model_type": "my_moe"}, path)
    _, config, shapes = qwen(width=64)
    shapes = {
        n.replace("layers", "blocks").replace("mlp.experts", "moe"): shapes[n] for n in shapes
    }
    with pytest.raises(ValueError, match="fits the layouts split_transposed and split, but needs "
                       "one that fits, since a shape must not decide"):  # fmt: skip
        find_layers(family, config, shapes)


@pytest.mark.parametrize(
    ("gate_up", "down"),
    [((4, 192, 2, 16), (4, 64, 3, 16)), ((4, 192, 32), (4, 64, 48))],
    ids=["blocks", "flat"],
)
def test_packed_fp4(gate_up: tuple[int, ...], down: tuple[int, ...]):
    config = {"model_type": "gpt_oss", "num_local_experts": 4, "num_hidden_layers": 1}
    config |= {"hidden_size": 64, "intermediate_size": 96}
    module = "model.layers.0.mlp.experts."
    shapes = {f"{module}gate_up_proj_blocks": gate_up, f"{module}down_proj_blocks": down}
    shapes[f"{module}gate_up_proj_scales"] = (4, 192, 2)
    layer = find_layers(find_family(config), config, shapes)[0]
    assert layer.layout.name == "gpt_oss_mxfp4"
    assert layer.names == [f"{module}gate_up_proj_blocks", f"{module}down_proj_blocks"]
    shapes[f"{module}down_proj_blocks"] = (4, 64, 96)
    with pytest.raises(ValueError, match=r"needs \(4, 64, 48\) or \(4, 64, 3, 16\)"):
        find_layers(find_family(config), config, shapes)


def test_packed_and_not_have_the_same_names():
    """DeepSeek-V4: FP4 and other weights differ in shape alone, and the config states the sizes."""
    config = {"model_type": "deepseek_v4", "n_routed_experts": 1, "num_hidden_layers": 1}
    config |= {"hidden_size": 64, "moe_intermediate_size": 96}
    shapes = {f"layers.0.ffn.experts.0.{n}.weight": (96, 64) for n in ("w1", "w3")}
    shapes["layers.0.ffn.experts.0.w2.weight"] = (64, 96)
    family = find_family(config)
    assert find_layers(family, config, shapes)[0].layout.name == "deepseek_v4"
    halved = {n: (rows, columns // 2) for n, (rows, columns) in shapes.items()}
    assert find_layers(family, config, halved)[0].layout.name == "deepseek_v4_mxfp4"


# ---- sizes ----


def test_the_text_config_counts_before_the_outer_one():
    family, config, shapes = qwen()
    inner = config | {"model_type": "qwen3_moe"}
    assert find_layers(family, {"hidden_size": 7, "text_config": inner}, shapes)


def test_a_size_per_layer():
    """Hunyuan's config may list one number per layer."""
    _, config, shapes = qwen()
    config |= {"model_type": "hunyuan_v1_moe", "moe_intermediate_size": [48, 48]}
    family = find_family(config)
    assert [layer.intermediate_size for layer in find_layers(family, config, shapes)] == [48, 48]
    config |= {"moe_intermediate_size": [48]}
    with pytest.raises(ValueError, match="states no intermediate_size for layer 1, but needs one"):
        find_layers(family, config, shapes)


def test_layers_may_be_counted():
    """Nemotron-H lists what its layers are."""
    config = {"model_type": "nemotron_h", "n_routed_experts": 1, "hidden_size": 64}
    config |= {"moe_intermediate_size": 48, "layers_block_type": ["mamba", "moe"]}
    shapes: Shapes = {}
    for layer in (1, 2):
        module = f"backbone.layers.{layer}.mixer.experts.0."
        shapes |= {f"{module}up_proj.weight": (48, 64), f"{module}down_proj.weight": (64, 48)}
    layers = find_layers(find_family(config), config, shapes)
    assert [layer.is_mtp for layer in layers] == [False, True]


@pytest.mark.parametrize("value", [0, -1, "64", 64.0, True])
def test_an_odd_size_is_refused(value: Any):
    family, config, shapes = qwen()
    config["hidden_size"] = value
    with pytest.raises(
        ValueError, match=r"config.json's hidden_size is .* a positive whole number"
    ):
        find_layers(family, config, shapes)


def test_a_missing_size_is_refused():
    family, config, shapes = qwen()
    config["moe_intermediate_size"] = None
    message = "states no intermediate_size .* moe_intermediate_size, as the record qwen3_moe says"
    with pytest.raises(ValueError, match=message):
        find_layers(family, config, shapes)


# ---- patterns ----


def test_matches():
    assert matches("model.layers.3.mlp.gate.weight", ["no", "*layers.{layer}.mlp.gate.*"])
    assert not matches("model.layers.3.mlp.gate_proj.weight", ["*.mlp.gate.*"])
    assert not matches("model.layers..mlp.gate.weight", ["*layers.{layer}.mlp.gate.*"])
    assert not matches("axb", ["a.b"])
    assert not matches("anything", [])


PIECES = ("a", "b", ".", "0", "12", "[", "\n", "+")


@given(
    pattern=st.lists(st.sampled_from((*PIECES, "*", "{layer}")), max_size=5),
    name=st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
)
def test_matches_what_a_naive_matcher_does(pattern: list[str], name: str):
    def naive(pieces: list[str], rest: str) -> bool:
        if not pieces:
            return rest == ""
        head, tail = pieces[0], pieces[1:]
        if head == "*":
            return any(naive(tail, rest[i:]) for i in range(len(rest) + 1))
        if head == "{layer}":
            digits = len(rest) - len(rest.lstrip("0123456789"))
            return any(naive(tail, rest[i:]) for i in range(1, digits + 1))
        return rest.startswith(head) and naive(tail, rest[len(head) :])

    assert matches(name, ["".join(pattern)]) == naive(pattern, name)


@given(st.text("ab.*", max_size=6), st.text("ab.", max_size=6))
def test_matches_as_the_shell_does(pattern: str, name: str):
    assert matches(name, [pattern]) == fnmatch.fnmatchcase(name, pattern)


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join))
def test_a_name_matches_itself(name: str):
    assert matches(name, [name, "x"])
    assert matches(name, ["*"])


def test_every_built_in_pattern_is_sound():
    for family in load_families():
        assert isinstance(family, Family)
        assert family.split_layout.is_split
        for pattern in (*family.experts, *family.router, *family.keep, *family.mtp):
            assert re.fullmatch(r"[\w.*{}]+", pattern), (family.name, pattern)
