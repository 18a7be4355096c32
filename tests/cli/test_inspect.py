"""`octomoe inspect` shows in one screen what a checkpoint is, whatever it is.

What it finds is tested in tests/checkpoint/test_describe.py.
"""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from octomoe.checkpoint.convert import convert_checkpoint
from octomoe.checkpoint.schemes import TARGETS
from octomoe.cli import app

MODEL = Path(__file__).parents[2] / "examples" / "tiny-qwen3-moe"
SCALES = {layer: dict.fromkeys(("gate", "up", "down"), [0.01] * 16) for layer in range(3)}


def run(*arguments, columns: int = 120):
    environment = {"COLUMNS": str(columns)}
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env=environment)


def unknown(folder: Path, **changes) -> Path:
    """The bundled model under another config."""
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("columns", [80, 120])
def test_an_unquantised_checkpoint(columns: int):
    result = run(MODEL, columns=columns)
    assert (result.exit_code, result.stdout) == (0, "")
    for expected in (
        "qwen3_moe",
        "3; experts in 0–2",
        "16 per layer, hidden size 256, width 128, layout split",
        "2 experts per token",
        "not quantised (BF16)",
        "12.5 MB in 173 tensors, 1 file",
        "experts 9.4 MB (75%)",
        "2.0000 bytes for each of 4,718,592 expert weights",
        "Nothing odd.",
    ):
        assert expected in result.stderr
    assert len(result.stderr.splitlines()) < 24
    assert max(map(len, result.stderr.splitlines())) <= columns


@pytest.mark.parametrize("target", TARGETS)
def test_a_converted_checkpoint_fits_a_screen(tmp_path, target: str):
    scales = SCALES if TARGETS[target].needs_input_scale else None
    convert_checkpoint(MODEL, tmp_path / "made", target=target, input_scales=scales, verify=False)
    result = run(tmp_path / "made")
    assert result.exit_code == 0
    assert f"weights {TARGETS[target].weights.name}" in result.stderr
    assert "Scales of 3 layers" in result.stderr
    assert "Nothing odd." in result.stderr
    assert ("static" in result.stderr) == bool(scales)
    assert len(result.stderr.splitlines()) < 30


def test_json_holds_everything(tmp_path):
    convert_checkpoint(MODEL, tmp_path / "made", target="ct-mxfp8", verify=False)
    result = run(tmp_path / "made", "--json")
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["family"] == "qwen3_moe"
    assert found["bytes_per_expert_weight"] == 1.03125
    assert len(found["layers"]) == 3
    assert len(found["scales"]) == 9
    assert all(s["is_pow2"] for s in found["scales"])
    assert found["oddities"] == []


def test_an_unknown_family_is_shown_as_far_as_it_goes(tmp_path):
    result = run(unknown(tmp_path / "novel", model_type="novel"))
    assert result.exit_code == 0
    assert "novel (unknown family)" in result.stderr
    assert "The experts cannot be read:" in result.stderr
    assert "experts 9.4 MB (75%)" in result.stderr


def test_oddities_are_shown(tmp_path):
    result = run(unknown(tmp_path / "mtp", num_hidden_layers=2))
    assert "multi-token prediction 2" in result.stderr
    assert "! multi-token prediction has experts too, in layer 2" in result.stderr
    assert "Nothing odd." not in result.stderr


def test_what_is_no_checkpoint_is_refused(tmp_path):
    result = run(tmp_path)
    assert isinstance(result.exception, FileNotFoundError)
    assert "has no config.json" in str(result.exception)
