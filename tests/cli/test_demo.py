"""`octomoe demo` measures the bundled model, writes its report, and refuses what it cannot use.

The figures are those of the README for the first 64 x 512 tokens; here fewer are run.
"""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from octomoe.cli import app, comparison
from octomoe.evaluate.schemes import SCHEMES

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "tiny-qwen3-moe"
TEXT = EXAMPLES / "heldout.txt"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    report = tmp_path_factory.mktemp("demo") / "report.html"
    arguments = ["demo", "--tokens", "2048", "--report", str(report), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), result.stderr, report


def test_every_scheme_is_measured(demo):
    comparison, _, _ = demo
    assert [r["name"] for r in comparison["results"]] == [s.name for s in SCHEMES]
    assert comparison["num_tokens"] == 2048


def test_sound_schemes_cost_little_and_the_averaged_one_collapses(demo):
    comparison, _, _ = demo
    for result in comparison["results"]:
        if result["name"] == "channel, scales averaged":
            assert result["kl"] > 0.1
            assert result["perplexity"] > 1.1 * comparison["perplexity"]
            assert result["sqnr_db"] < 15
        else:
            assert result["kl"] < 0.01
            assert result["perplexity"] == pytest.approx(comparison["perplexity"], rel=0.01)
            assert result["sqnr_db"] > 31
            assert min(result["layer_sqnr_db"].values()) > 22
            assert 1.0 < result["bytes_per_weight"] < 1.04


def test_the_table_and_the_report_reach_the_user(demo):
    _, stderr, report = demo
    assert "block128 × group128" in stderr
    assert str(report) in stderr.replace("\n", "")
    assert report.read_text(encoding="utf-8").count("channel, scales averaged") >= 1


def test_a_text_that_is_too_short_is_refused(octomoe_, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    code, _, err = octomoe_("demo", "--model", MODEL, "--text", text)
    assert code == 1
    assert "needs at least one of 512 tokens; give a longer text" in err


def test_a_binary_file_is_no_text(octomoe_, tmp_path):
    text = tmp_path / "binary"
    text.write_bytes(b"\xff\xfe\x00")
    code, _, err = octomoe_("demo", "--text", text)
    assert code == 1
    assert "which is not UTF-8" in err


def test_a_folder_without_a_model_is_refused(octomoe_, tmp_path):
    code, _, err = octomoe_("demo", "--model", tmp_path, "--text", TEXT)
    assert code == 1
    assert "holds no config.json, but needs a folder with a Hugging Face checkpoint" in err


def test_a_dense_model_is_refused(octomoe_, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "qwen3",
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    code, _, err = octomoe_("demo", "--model", tmp_path)
    assert code == 1
    assert "no experts" in err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sequence", "2048", "--sequence is 2048, but needs at most 1024"),
        ("--report", "no/such/folder/report.html", "needs a file in an existing folder"),
        ("--text", "no-such-file.txt", "No such file or directory: 'no-such-file.txt'"),
    ],
)
def test_options_that_cannot_work_are_refused_before_the_work(octomoe_, option, value, message):
    code, _, err = octomoe_("demo", option, value)
    assert code == 1
    assert message in err


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_before_the_work(package, monkeypatch):
    monkeypatch.setattr(comparison, "find_spec", lambda name: None if name == package else name)
    result = CliRunner().invoke(app, ["demo"])
    assert isinstance(result.exception, ImportError)
    assert f"demo: needs the package {package}" in str(result.exception)
