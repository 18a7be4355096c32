"""Claims: a source that is quantised already is read exactly, whatever its scheme, and is never
quantised twice unless that loses nothing or is asked for.
"""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octomoe import E4M3FN, MXFP8, QTensor, convert_checkpoint
from octomoe.checkpoint.encode import How
from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.schemes import TARGETS
from octomoe.checkpoint.source import Checkpoint

BUNDLED = Path(__file__).parents[2] / "examples" / "tiny-qwen3-moe"
SCALES = {e: {r: [0.01] * 4 for r in ("gate", "up", "down")} for e in range(4)}


@pytest.fixture(scope="session")
def converted(tiny_checkpoint, tmp_path_factory):
    """A tiny model, converted with some options; made once."""
    made: dict[tuple[object, ...], Path] = {}

    def make(model_type: str, target: str, **options: object) -> Path:
        key = (model_type, target, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("source") / "out"
            source = tiny_checkpoint(model_type)
            convert_checkpoint(source, made[key], target=target, **options)
        return made[key]

    return make


def values_of(path: Path) -> list[Tensor]:
    """Every expert matrix of a checkpoint as float32, in order."""
    reader = Reader(Checkpoint(path))
    values = []
    for layer, expert in product(reader.layers, range(4)):
        for _, weight in sorted(reader.expert(layer, expert).weights.items()):
            values.append(weight.dequantize() if isinstance(weight, QTensor) else weight.float())
    return values


def largest_loss(path: Path, source: Path) -> float:
    """Relative error of the worst expert matrix."""
    pairs = zip(values_of(path), values_of(source), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source_target", ["hf-fp8-block", "ct-channel", "mxfp8", "octomoe"])
def test_power_of_two_sources_become_any_target_without_loss(
    source_target, target, converted, tmp_path
):
    source = converted("qwen3_moe", source_target, weights_scale="pow2")
    scales = SCALES if TARGETS[target].needs_input_scale else None
    done = convert_checkpoint(source, tmp_path / "out", target=target, input_scales=scales)
    assert done.verification.problems == []
    assert not done.outcome.weights.keys() & {How.QUANTIZED, How.REQUANTIZED}
    assert largest_loss(tmp_path / "out", source) < 2e-3
    assert done.outcome.num_changed < 2e-3 * done.outcome.num_values


def test_the_same_scheme_keeps_every_byte(converted, tmp_path):
    source = converted("qwen3_moe", "hf-fp8-block")
    done = convert_checkpoint(source, tmp_path / "out", target="ct-block")
    assert set(done.outcome.weights) == {How.KEPT}
    assert largest_loss(tmp_path / "out", source) == 0.0


def test_a_lossy_double_quantisation_is_refused_before_anything_is_written(converted, tmp_path):
    source = converted("qwen3_moe", "ct-channel")
    with pytest.raises(ValueError, match=r"no powers of two.*--allow-requantize"):
        convert_checkpoint(source, tmp_path / "out", target="ct-block")
    assert not (tmp_path / "out").exists()
    done = convert_checkpoint(
        source, tmp_path / "out", target="ct-block", allow_requantize=True, verify=False
    )
    assert set(done.outcome.weights) == {How.REQUANTIZED}
    assert done.outcome.num_changed > 0.3 * done.outcome.num_values


def test_an_exact_scale_that_is_asked_for_makes_a_relaying_lossy(converted, tmp_path):
    source = converted("qwen3_moe", "mxfp8")
    with pytest.raises(ValueError, match="--allow-requantize"):
        convert_checkpoint(source, tmp_path / "out", target="ct-channel", weights_scale="exact")


@pytest.mark.parametrize("scale", ["shared", "averaged-legacy"])
def test_sharing_scales_of_a_quantised_source_is_a_requantisation(scale, converted, tmp_path):
    source = converted("qwen3_moe", "ct-channel")
    with pytest.raises(ValueError, match="--allow-requantize"):
        convert_checkpoint(source, tmp_path / "out", target="ct-channel", expert_scale=scale)


def test_linears_outside_the_experts_stay_or_become_plain(tmp_path):
    source, options = tmp_path / "source", {"all_linears": True, "weights_scale": "pow2"}
    convert_checkpoint(BUNDLED, source, target="hf-fp8-block", **options)
    tensors = Checkpoint(source).tensors
    quantized = [n for n, e in tensors.items() if e.dtype == "F8_E4M3" and ".experts." not in n]
    assert quantized
    same = tmp_path / "same"
    done = convert_checkpoint(source, same, target="hf-fp8-block")
    assert done.verification.problems == []
    other = tmp_path / "other"
    assert convert_checkpoint(source, other, target="ct-channel").verification.problems == []
    plain, reader = Checkpoint(other), Reader(Checkpoint(source))
    for name in quantized:
        assert torch.equal(
            Checkpoint(same).read(name).view(torch.uint8),
            reader.checkpoint.read(name).view(torch.uint8),
        )
        assert plain.tensors[name].dtype == "BF16"
        assert torch.equal(plain.read(name), reader.weight(name).dequantize(torch.bfloat16))


@pytest.mark.parametrize("target", ["mxfp8", "ct-mxfp8", "ct-channel", "hf-fp8-block", "octomoe"])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v4"])
def test_fp4_becomes_fp8_exactly(family, target, handmade_checkpoint, tmp_path):
    layout = {"gpt_oss": "gpt_oss_mxfp4", "deepseek_v4": "deepseek_v4_mxfp4"}[family]
    source = handmade_checkpoint(family, layout)
    done = convert_checkpoint(source, tmp_path / "out", target=target)
    assert done.verification.problems == []
    assert set(done.outcome.weights) <= {How.KEPT, How.RELAID}
    if target.endswith("mxfp8"):
        assert set(done.outcome.weights) == {How.KEPT}
        assert largest_loss(tmp_path / "out", source) == 0.0


def test_fp4_codes_mean_what_the_format_says(handmade_checkpoint):
    reader = Reader(Checkpoint(handmade_checkpoint("gpt_oss", "gpt_oss_mxfp4")))
    layer = reader.layers[0]
    raw = reader.checkpoint.read(layer.names[0])[1].flatten(1)
    scale = reader.checkpoint.read(reader.scales[layer.names[0]])[1]
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    weights = reader.expert(layer, 1).weights
    for row, column in product((0, 1, 7), (0, 1, 30, 33)):
        code = (int(raw[row, column // 2]) >> (4 * (column % 2))) & 0xF
        value = magnitudes[code & 7] * (-1 if code & 8 else 1)
        value *= 2.0 ** (int(scale[row, column // 32]) - 127)
        role = "up" if row % 2 else "gate"
        assert isinstance(weights[role], QTensor)
        assert weights[role].format == MXFP8
        assert weights[role].format.element == E4M3FN
        assert weights[role].dequantize()[row // 2, column] == value
