"""The records find the experts of every family, all of them and nothing else.

Real classes of Transformers are saved by `save_pretrained`, which writes the names that released
checkpoints have. What no class here writes is held to names and shapes spelled out below.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from octomoe.checkpoint.families import find_family, load_families
from octomoe.checkpoint.names import Role, find_layers, matches

# Model types whose experts are in one or a few tensors on disk -> tensors per layer.
FUSED = {
    "aria": 2, "aria_text": 2, "dbrx": 3, "gemma4_text": 2, "gpt_oss": 4, "granitemoe": 2,
    "granitemoe_swa": 2, "granitemoehybrid": 2, "granitemoeshared": 2, "hy_v4": 2, "inkling2_text":
    2, "inkling_text": 2, "jetmoe": 2, "llama4_text": 2, "minimax_m3_vl_text": 2, "mistral4": 2,
    "muse_spark_text": 2, "openai_privacy_filter": 4, "qwen3_vl_moe": 2, "step3p7": 3, "zaya": 2,
}  # fmt: skip
# Tensors of an experts module, by names alone: written for this test, knowing no record.
IS_EXPERT = re.compile(
    r".*("
    r"(?<!self_attention)\.experts\.\d+\.(w[123]|(gate|up|down)_proj)\.weight"
    r"|(?<!shared)(?<!vision)\.experts\.(gate_up_proj|down_proj)(_bias)?"
    r"|\.experts\.(w13_weight|w2_weight|fc[12]\.weight|mlp\.[wv][12])"
    r"|(block_sparse_moe|\d\.mlp)\.(in|out)put_linear\.weight"
    r"|\.moe\.(gate|up|down)_proj\.weight"
    r")"
)


def split(module: str, gate: str, up: str, down: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one tensor per expert and projection."""
    shapes = {gate: (48, 64), up: (48, 64), down: (64, 48)}
    return {f"{module}.{e}.{n}.weight": shape for e in range(4) for n, shape in shapes.items()}


A = ("gate_proj", "up_proj", "down_proj")
W = ("w1", "w3", "w2")
# Layouts that no class here writes: names and shapes for E 4, H 64, I 48 (96 in FP4), of one layer.
RELEASED: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "qwen3_vl_moe as released": ("qwen3_vl_moe", "fused_transposed", {
        "model.language_model.layers.0.mlp.experts.gate_up_proj": (4, 64, 96),
        "model.language_model.layers.0.mlp.experts.down_proj": (4, 48, 64),
    }),
    "qwen3_5_moe in bf16": ("qwen3_5_moe", "fused", {
        "model.language_model.layers.0.mlp.experts.gate_up_proj": (4, 96, 64),
        "model.language_model.layers.0.mlp.experts.down_proj": (4, 64, 48),
    }),
    "qwen3_omni_moe": ("qwen3_omni_moe", "split", split("thinker.model.layers.0.mlp.experts", *A)),
    "gpt_oss in MXFP4": ("gpt_oss", "gpt_oss_mxfp4", {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": (4, 192, 2, 16),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (4, 192),
        "model.layers.0.mlp.experts.down_proj_blocks": (4, 64, 3, 16),
        "model.layers.0.mlp.experts.down_proj_bias": (4, 64),
    }),
    "deepseek_v4 in FP4": ("deepseek_v4", "deepseek_v4_mxfp4", {
        name: (64, 48) if ".w2." in name else (96, 32)
        for name in split("layers.0.ffn.experts", *W)
    }),
    "kimi_k2": ("kimi_k2", "split", split("model.layers.0.mlp.experts", *A)),
    "kimi_k25": ("kimi_k25", "split", split("language_model.model.layers.0.mlp.experts", *A)),
    "llama4 in FP8": ("llama4", "split",
        split("language_model.model.layers.0.feed_forward.experts", *A)),
    "llama4": ("llama4", "fused_transposed", {
        "language_model.model.layers.0.feed_forward.experts.gate_up_proj": (4, 64, 96),
        "language_model.model.layers.0.feed_forward.experts.down_proj": (4, 48, 64),
    }),
    "inkling": ("inkling_mm_model", "inkling", {
        "model.llm.layers.0.mlp.experts.w13_weight": (4, 96, 64),
        "model.llm.layers.0.mlp.experts.w2_weight": (4, 64, 48),
    }),
    "gemma4": ("gemma4", "fused", {
        "model.language_model.layers.0.experts.gate_up_proj": (4, 96, 64),
        "model.language_model.layers.0.experts.down_proj": (4, 64, 48),
    }),
    "granite for engines": ("granitemoe", "split_inside",
        split("model.layers.0.block_sparse_moe.experts", *A)),
}  # fmt: skip


# One thing wrong with the short family file each: what to replace, by what, what is said.
OTHER = """
[families.other]
model_types = ["my_moe"]
experts = ["*{layer}.x"]
layouts = ["split"]
router = []
"""
BROKEN = {
    "no TOML": ("[families.mine]", "[families.mine", r"says .*, but needs TOML"),
    "unknown table": ("[layouts.mine]", "[layout.mine]", "layout is unknown here"),
    "table of text": ("[layouts.mine]", "layouts = 3\n[x]", "layouts is unknown here"),
    "layout without parts": ("parts =", "part =", r"layout mine is .*needs parts = "),
    "empty parts": ("parts = [", "parts = []\nx = [", "and nothing else"),
    "unknown key in a part": ("order =", "ordre =", "unknown key 'ordre'.*did you mean order"),
    "unknown key in a family": ("router =", "routers =", "'routers'.*did you mean router"),
    "missing key in a part": (', axes = "expert out in" }', "}", "layout mine lacks axes"),
    "missing key in a family": ('router = ["*.moe.router.weight"]', "", "mine lacks router"),
    "part that is text": ('{ role = "down", name = "w2", axes = "expert out in" }', '"w2"',
        "layout mine is 'w2', but needs a table"),
    "family that is text": ("[families.mine]", 'families.mine = "x"\n[y]', "unknown here"),
    "role": ('role = "down"', 'role = "out"', "has role = 'out', but needs one of 'gate', 'up'"),
    "axes": ('"w2", axes = "expert out in"', '"w2", axes = "out in expert"',
        "has axes = 'out in expert', but needs one of 'out in'"),
    "order": ('"up_first"', '"down_first"', "has order = 'down_first', but needs one of"),
    "packed": ('"up_first"', '"up_first", packed = "nf4"', "has packed = 'nf4'"),
    "packed along out": ('"w2", axes = "expert out in"',
        '"w2", axes = "expert in out", packed = "mxfp4"', "axes that end with in"),
    "text for a list": ('["my_moe"]', '"my_moe"', "model_types = 'my_moe', but needs a list of"),
    "number in a list": ('["my_moe"]', "[3]", "needs a list of texts"),
    "number for text": ('name = "w2"', "name = 2", "has name = 2, but needs text"),
    "text for a truth": ("router =", 'gated = "no"\nrouter =', "needs true or false"),
    "neuron": ("router =", "neuron = 3\nrouter =", "neuron = 3, but needs a table of texts"),
    "no {layer}": ("{layer}", "0", r"experts = '\*blocks.0.moe', but needs \{layer\} in each"),
    "unknown layout": ('["mine", "split"]', '["yours", "split"]', "unknown layout 'yours'"),
    "no split layout": (', "split"]', "]", 'a tensor per expert and projection; add "split"'),
    "roles": ('role = "gate_up"', 'role = "gate"', "has the roles down, gate, but needs"),
    "gate of ungated": ("router =", "gated = false\nrouter =", "gated = false with layout mine"),
    "no expert axis": ('"w2", axes = "expert out in"', '"w2", axes = "out in"',
        r"\{expert\} in the name, or an expert axis, and not both"),
    "two expert axes": ('name = "w2"', 'name = "{expert}.w2"', "and not both"),
    "bias": ('name = "w2"', 'name = "w2", bias = "{expert}.b"', "in both names or in none"),
    "one type twice": ("[families.mine]", OTHER + "[families.mine]",
        "names model_type 'my_moe', as other does"),
    "refused": ("[families.mine]", "[refused]\nx = 3\n[families.mine]", "needs a reason in words"),
}  # fmt: skip


@pytest.fixture(scope="module")
def shapes_of() -> Callable[[Path], dict[str, tuple[int, ...]]]:
    """Shape of every tensor in a folder."""

    def read(folder: Path) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, no mapping
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        return shapes

    return read


def test_real_classes(tiny_model_type: str, tiny_checkpoint: Any, shapes_of: Any):
    folder = tiny_checkpoint(tiny_model_type)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shapes = shapes_of(folder)
    family = find_family(config)
    layers = find_layers(family, config, shapes)
    found = [name for layer in layers for name in layer.names]

    expected = {name for name in shapes if IS_EXPERT.fullmatch(name)}
    spare = config.get("zero_expert_num", 0)
    beyond = {n for n in expected for e in range(4, 4 + spare) if f".experts.{e}." in n}
    assert set(found) == expected - beyond
    assert len(found) == len(set(found)) > 0
    per_layer = FUSED.get(tiny_model_type, 4 * (2 + family.gated))
    assert [len(layer.names) for layer in layers] == [per_layer] * len(layers)
    assert 1 <= len(layers) <= 2
    assert not any(layer.is_mtp for layer in layers)
    assert {layer.num_experts for layer in layers} == {4}
    assert {layer.intermediate_size for layer in layers} == {48}

    # Routers are known as such, and nothing is both.
    routers = {name for name in shapes if matches(name, family.router)}
    assert routers
    assert not any(matches(name, (*family.router, *family.keep)) for name in found)
    with_rows = {name for name in routers if shapes[name][-1] in (32, 64) and len(shapes[name]) > 1}
    assert {layer.layer for layer in layers} == {
        int(re.search(r"(?:layers|blocks)\.(\d+)\.", name)[1]) for name in with_rows
    }


@pytest.mark.parametrize("name", RELEASED)
def test_released_layouts(name: str):
    model_type, layout, shapes = RELEASED[name]
    width = 96 if layout.endswith("mxfp4") else 48
    config = {"model_type": model_type, "num_experts": 4, "num_hidden_layers": 1, "hidden_size": 64}
    config |= {"moe_intermediate_size": width, "intermediate_size": width}
    extra = {f"{n}_scale": (1,) for n in shapes} | {"model.layers.0.mlp.gate.weight": (4, 64)}
    found = find_layers(find_family(config), config, shapes | extra)
    assert [layer.layout.name for layer in found] == [layout]
    assert sorted(found[0].names) == sorted(shapes)
    assert found[0].has_bias == any(n.endswith("_bias") for n in shapes)


@pytest.mark.parametrize("model_type", sorted(t for f in load_families() for t in f.model_types))
def test_every_layout_of_every_record(
    model_type: str, handmade_checkpoint: Any, shapes_of: Any
) -> None:
    family = find_family({"model_type": model_type})
    for layout in family.layouts:
        folder = handmade_checkpoint(model_type, layout.name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        layers = find_layers(family, config, shapes_of(folder))
        assert [layer.layer for layer in layers] == [0, 1]
        assert {layer.layout.name for layer in layers} == {layout.name}


def test_gpt_oss_has_biases(tiny_checkpoint: Any, shapes_of: Any):
    folder = tiny_checkpoint("gpt_oss")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = find_layers(find_family(config), config, shapes_of(folder))
    assert layers[0].has_bias
    gate_up = layers[0].part(Role.GATE_UP)
    assert gate_up is not None
    assert (gate_up.order, gate_up.axes) == ("interleaved", "expert in out")
    assert layers[1].bias(Role.DOWN, 3) == "model.layers.1.mlp.experts.down_proj_bias"


def test_every_model_type_is_in_one_record():
    types = [t for family in load_families() for t in family.model_types]
    assert len(types) == len(set(types))


def test_ernie_with_vision_is_refused_with_a_reason():
    for model_type in ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text"):
        with pytest.raises(NotImplementedError, match="experts of different widths share one list"):
            find_family({"model_type": model_type})


def test_neuron_names():
    neuron = find_family({"model_type": "qwen3_moe"}).neuron
    assert neuron is not None
    assert neuron["experts"] == "layers.{layer}.mlp.expert_mlps.mlp_op"
    assert find_family({"model_type": "dbrx"}).neuron is None


# ---- the form of a record ----


def test_a_family_file_comes_first(family_file: Any):
    path = family_file('["my_moe"]', '["my_moe", "qwen3_moe"]')
    assert load_families(path)[0].name == "mine"
    assert [f.name for f in load_families(path)[1:]] == [f.name for f in load_families()]
    assert find_family({"model_type": "qwen3_moe"}, path).name == "mine"
    assert find_family({"model_type": "qwen3_moe"}).name == "qwen3_moe"
    assert find_family({"model_type": "mixtral"}, path).name == "mixtral"


def test_a_family_file_lifts_a_refusal(family_file: Any):
    path = family_file("my_moe", "ernie4_5_vl_moe")
    assert find_family({"model_type": "ernie4_5_vl_moe"}, path).name == "mine"


def test_a_family_file_refuses(family_file: Any):
    path = family_file(extra='[refused]\nodd_moe = "too odd"\n')
    with pytest.raises(NotImplementedError, match="model_type 'odd_moe': too odd"):
        find_family({"model_type": "odd_moe"}, path)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_family_file_is_refused(case: str, family_file: Any):
    old, new, message = BROKEN[case]
    path = family_file(old, new)
    with pytest.raises(ValueError, match=rf"load_families: .*families\.toml.*{message}"):
        load_families(path)


def test_a_missing_family_file_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load_families(tmp_path / "none.toml")


def test_one_name_has_one_order(family_file: Any):
    """Of layouts with the same names, no shape tells halves from interleaved rows."""
    extra = """
[layouts.theirs]
parts = [
  { role = "gate_up", name = "w13", axes = "expert out in", order = "interleaved" },
  { role = "down", name = "w2", axes = "expert out in" },
]
"""
    path = family_file('["mine", "split"]', '["mine", "theirs", "split"]', extra)
    with pytest.raises(ValueError, match="two layouts in which 'w13' has another role or order"):
        load_families(path)


@pytest.mark.parametrize("outer", ["text_config", "language_config", "llm_config"])
def test_the_text_model_inside_is_found(outer: str):
    config = {"model_type": "some_vl", outer: {"model_type": "qwen3_moe"}}
    assert find_family(config).name == "qwen3_moe"


def test_the_thinker_is_found():
    inner = {"text_config": {"model_type": "qwen3_omni_moe_text"}}
    assert find_family({"model_type": "x", "thinker_config": inner}).name == "qwen3_omni_moe"


def test_an_unknown_model_type_is_refused():
    with pytest.raises(ValueError, match=r"model_type is 'qwen3_mo', .*--family-file; closest "
                       "known: .*qwen3_moe"):  # fmt: skip
        find_family({"model_type": "qwen3_mo"})
    with pytest.raises(ValueError, match=r"is 'zzz' / 'yyy', .*--family-file$"):
        find_family({"model_type": "zzz", "text_config": {"model_type": "yyy"}})
    with pytest.raises(ValueError, match="config states no model_type"):
        find_family({"text_config": {}})
