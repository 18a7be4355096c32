"""`octomoe verify` says whether a converted checkpoint holds against its source, and where not."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from octomoe.checkpoint.convert import convert_checkpoint
from octomoe.checkpoint.verify import ProjectionQuality, Verification
from octomoe.cli import app

# The function `verify` hides its module's name.
MODULE = sys.modules["octomoe.cli.verify"]
MODEL = Path(__file__).parents[2] / "examples" / "tiny-qwen3-moe"
SCALE = "model.layers.1.mlp.experts.7.up_proj.weight_scale"


@pytest.fixture
def made(tmp_path):
    convert_checkpoint(MODEL, tmp_path / "made", target="ct-channel", verify=False)
    return tmp_path / "made"


def run(*arguments):
    environment = {"COLUMNS": "200"}
    return CliRunner().invoke(app, ["verify", *map(str, arguments)], env=environment)


def change(path: Path, edit) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def test_a_sound_checkpoint_is_exit_code_0(made):
    result = run(made, "--against", MODEL, "--workers", "2", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["is_sound"] is True
    assert (found["num_tensors"], found["num_identical"], found["num_quantized"]) == (317, 29, 144)
    assert [q["role"] for q in found["quality"]] == ["gate", "up", "down"] * 3
    assert all(len(q["sqnr_db"]) == 16 for q in found["quality"])
    assert "Sound: 317 tensors checked" in result.stderr
    assert len(result.stderr.splitlines()) < 20


def test_every_layer_has_its_lowest_and_median_sqnr_and_its_scales(made):
    result = run(made, "--against", MODEL)
    assert result.stdout == ""
    rows = [line.split() for line in result.stderr.splitlines()]
    rows = [row for row in rows if row and row[0] in ("0", "1", "2")]
    assert len(rows) == 3
    for row in rows:
        assert row[2:7:4] == ["dB", "dB"]
        assert 31 < float(row[1]) <= float(row[5]) < 33
        assert 0 < float(row[7]) < float(row[8]) < 0.01


def test_a_wrong_scale_is_found_and_is_exit_code_1(made):
    change(made, lambda tensors: tensors[SCALE].mul_(1.5))
    result = run(made, "--against", MODEL)
    assert result.exit_code == 1
    assert "✗ model.layers.1.mlp.experts, expert 7, up: SQNR 6.0 dB, below 27 dB" in result.stderr
    assert "lowest SQNR 6.0 dB (model.layers.1.mlp.experts, up of expert 7), 1 problem." in (
        result.stderr
    )
    assert result.stderr.count("✗") == 1


def test_many_problems_are_counted_and_the_first_listed(made):
    def spoil(tensors):
        for name, tensor in tensors.items():
            if name.endswith("weight_scale"):
                tensor.mul_(2.0)

    change(made, spoil)
    result = run(made, "--against", MODEL)
    assert result.exit_code == 1
    assert result.stderr.count("✗") == 20
    assert "… and 124 more problems" in result.stderr
    assert "144 problems." in result.stderr


def test_a_checkpoint_of_itself_is_not_quantised(tmp_path):
    result = run(MODEL, "--against", MODEL)
    assert result.exit_code == 1
    assert "config.json states no quantisation" in result.stderr
    assert "unchanged" in result.stderr


def test_the_report_is_written(made, tmp_path):
    change(made, lambda tensors: tensors[SCALE].mul_(1.5))
    report = tmp_path / "report.html"
    result = run(made, "--against", MODEL, "--report", report)
    assert result.exit_code == 1
    page = report.read_text(encoding="utf-8")
    assert "Something is off." in page
    assert "expert 7, up: SQNR 6.0 dB, below 27 dB" in page


def test_a_report_that_cannot_be_written_is_refused_first(tmp_path):
    result = run(tmp_path, "--against", MODEL, "--report", tmp_path / "no" / "report.html")
    assert isinstance(result.exception, ValueError)
    assert "verify: --report is" in str(result.exception)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    result = run(tmp_path, "--against", MODEL)
    assert isinstance(result.exception, FileNotFoundError)
    assert "has no config.json" in str(result.exception)
    assert run(MODEL).exit_code == 2


def test_of_many_layers_the_lowest_are_shown(capsys):
    quality = [
        ProjectionQuality(f"layers.{i}.experts", i, "up", [30.0 + i], [0.1], [0.2])
        for i in range(60)
    ]
    found = Verification([], 100, 40, 60, quality, 30.0)
    MODULE.print_verification(MODULE.Console(stderr=True, width=120), found)
    err = capsys.readouterr().err
    assert "the 12 lowest of 60 layers" in err
    assert "41.0 dB" in err
    assert "42.0 dB" not in err


def test_layers_of_one_number_are_told_apart_by_name(capsys):
    quality = [
        ProjectionQuality(f"{tower}.layers.0.experts", 0, "up", [30.0], [0.1], [0.2])
        for tower in ("talker", "thinker")
    ]
    found = Verification([], 100, 40, 60, quality, 29.0)
    MODULE.print_verification(MODULE.Console(stderr=True, width=200), found)
    err = capsys.readouterr().err
    assert "talker.layers.0.experts" in err
    assert "lowest SQNR 29.0 dB (outside the experts)" in err
