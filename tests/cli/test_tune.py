"""`octomoe tune` refuses what it cannot measure, lists what it would, and writes tables and plots.

What is measured on a GPU is made up here; the search is tested in tests/tune.
"""

import json
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from octomoe.bench.layers import RECIPES, Shape, Skew, make_experts
from octomoe.cli import app
from octomoe.cli.tune_view import View, plot_entry, short, verdict
from octomoe.core.device import Target
from octomoe.kernels import decode_moe_sm90 as decode
from octomoe.tune.candidates import KNOWN_TARGETS, candidates
from octomoe.tune.entries import Bucket, Choice, Entry, LayerKey, read_table
from octomoe.tune.kinds import KINDS, kind_of
from octomoe.tune.search import Trial, journal_of
from octomoe.tune.tables import BUCKETS
from octomoe.tune.timing import Timing

# The function `tune` hides its module's name.
MODULE = sys.modules["octomoe.cli.tune"]
H200 = KNOWN_TARGETS[0]
LAYER = ("--num-experts", "128", "--n", "1536", "--k", "2048", "--top-k", "8")
KEY = LayerKey(128, 768, 2048, 8, "block")


def run(*arguments):
    environment = {"COLUMNS": "200"}
    return CliRunner().invoke(app, ["tune", *map(str, arguments)], env=environment)


def microseconds(config) -> float:
    """Some time for each configuration, always the same."""
    return 10.0 + (hash(config) % 10007) / 1000


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is made up; a list of what was asked of it: shape, format, tokens, skews."""
    asked = []

    def bench(device, shape, format, skews):
        def measures(num_tokens):
            asked.append((shape, format, num_tokens, tuple(skews)))
            return {str(skew): measure for skew in skews}

        return MODULE.Bench(H200, measures, ("portable", "prefill"))

    def measure(config, repeats):
        us = microseconds(config)
        return Timing(us, us, us)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(MODULE, "bench_on", bench)
    return asked


def test_without_a_gpu_it_refuses_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*LAYER, "--out", tmp_path / "tuned.json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("octomoe: tune: there is no CUDA device")
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_candidates_anywhere(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    result = run(*LAYER, "--tokens", "1,8192", "--dry-run")
    assert result.exit_code == 0
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0] == "For NVIDIA H200; * is what runs without a table."
    count = sum(len(configs) for configs in candidates(KEY, 1, H200).values())
    assert lines[1] == f"1 tokens: {count} candidates"
    assert sum(line.startswith("  * ") for line in lines) == 2
    assert any("* prefill rows 128" in line for line in lines)
    assert any("* decode rows 8" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", RECIPES)
def test_kinds_that_cannot_serve_a_format_are_not_tried(format):
    recipe = RECIPES[format]
    kinds = MODULE.kinds_for(format)
    assert set(KINDS) - set(kinds) <= {"decode"}
    if recipe.activations is not None:
        experts = make_experts(Shape("", 2, 128, 128, 1), "cpu", recipe)
        reason = decode.why_not(experts, 1, recipe.activations)
        assert ("decode" in kinds) is (reason is None)
    result = run(*LAYER, "--tokens", 1, "--format", format, "--dry-run")
    assert result.exit_code == 0
    assert ("decode rows" in result.stderr) is (format not in ("tensor", "mxfp8", "weight-only"))
    stars = [line.split()[1] for line in result.stderr.splitlines() if line.startswith("  * ")]
    usual = {"tensor": ["portable"], "mxfp8": [], "weight-only": ["portable"]}
    assert stars == usual.get(format, ["decode"])


def test_alpha_moes_flags_mean_the_same(gpu, tmp_path):
    flags = ("--E", 256, "--N", 512, "--K", 7168, "--top-k", 8, "--shared-expert")
    out = tmp_path / "tuned.json"
    result = run(*flags, "--batch-sizes", 8, "--batch-sizes", 64, "--out-file", out)
    assert result.exit_code == 0, result.stderr
    shape = Shape("", 257, 256, 7168, 9, has_shared=True)
    both = (Skew.BALANCED, Skew.SKEWED)
    assert gpu == [(shape, "block128", 8, both), (shape, "block128", 64, both)]
    (key,) = read_table(out).entries
    assert key == LayerKey(257, 256, 7168, 9, "block")
    assert run(*flags, "--no-shared-expert", "--tokens", 8, "--out-config", out).exit_code == 0
    assert gpu[-1][0] == Shape("", 256, 256, 7168, 8)


def test_it_writes_a_table_a_plot_and_json(gpu, tmp_path):
    out, plot = tmp_path / "tuned.json", tmp_path / "tuned.svg"
    result = run(*LAYER, "--tokens", "1,64,1024", "--out", out, "--plot", plot, "--json")
    assert result.exit_code == 0, result.stderr
    table = read_table(out)
    assert table.device == H200.name
    entry = table.entries[KEY]
    assert [bucket.num_tokens for bucket in entry.buckets] == [1, 64, 1024]
    assert set(entry.buckets[0].choices[0].us) == {"balanced", "skewed"}
    assert entry.about["format"] == "block128"
    assert set(entry.about["versions"]) == {"octomoe", "torch", "triton"}
    assert json.loads(result.stdout) == json.loads(out.read_text())["entries"][0]
    assert plot.read_text().startswith("<svg")
    assert "Times as fast as without a table: " in result.stderr
    assert f"export OCTOMOE_TUNED={out}" in result.stderr
    assert not journal_of(out).exists()
    rows = [line for line in result.stderr.splitlines() if " tokens: " in line]
    assert [row.split()[0] for row in rows] == ["1", "64", "1,024"]


@pytest.mark.parametrize("format", RECIPES)
def test_every_format(gpu, tmp_path, format):
    out = tmp_path / "tuned.json"
    arguments = (*LAYER, "--tokens", 2048, "--format", format, "--routing", "skewed", "--out", out)
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    ((_, asked, _, skews),) = gpu
    assert (asked, skews) == (format, (Skew.SKEWED,))
    scales = {"block128": "block", "mxfp8": "mxfp8", "weight-only": "weight_only"}
    (key,) = read_table(out).entries
    assert key.scales == scales.get(format, "late")


def test_all_tokens_unless_some_are_asked_for(gpu, tmp_path):
    assert run(*LAYER, "--routing", "balanced", "--out", tmp_path / "tuned.json").exit_code == 0
    assert tuple(num_tokens for _, _, num_tokens, _ in gpu) == BUCKETS


def test_a_broken_device_is_reported_and_what_was_measured_is_kept(gpu, monkeypatch, tmp_path):
    count = 0

    def measure(config, repeats):
        nonlocal count
        count += 1
        if count == 5:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return Timing(1.0, 1.0, 1.0)

    bench = MODULE.Bench(H200, lambda num_tokens: {"balanced": measure}, ("portable",))
    monkeypatch.setattr(MODULE, "bench_on", lambda *arguments: bench)
    out = tmp_path / "tuned.json"
    result = run(*LAYER, "--tokens", 1, "--out", out)
    assert result.exit_code == 1
    assert "octomoe: CUDA error: unspecified launch failure" in result.stderr
    assert "what was measured is kept: the same command goes on behind it" in result.stderr
    assert journal_of(out).exists()
    assert run(*LAYER, "--tokens", 1, "--out", out).exit_code == 0
    assert not journal_of(out).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "fp4"), "--format is 'fp4', but needs one of block128, tensor, "),
        (("--routing", "odd"), "--routing is 'odd', but needs one of balanced, skewed, both"),
        (("--n", "7"), "--n is 7, but needs an even number"),
        (("--top-k", "129"), "--top-k is 129, but needs at most 128"),
        (("--tokens", "1,x"), "--tokens is 1,x, but needs numbers from 1"),
        (("--tokens", "0"), "--tokens is 0, but needs"),
        (("--tokens", ""), "--tokens is , but needs"),
        (("--plot", "nowhere/plot.svg"), "--plot is nowhere/plot.svg, but needs an .svg file"),
        (("--plot", "plot.png"), "--plot is plot.png, but needs"),
        (("--format", "mxfp8", "--tokens", "1"), "the layer has scales 'mxfp8' and so few rows"),
    ],
)
def test_refusals(gpu, tmp_path, arguments, message):
    result = run(*LAYER, "--out", tmp_path / "tuned.json", *arguments)
    assert result.exit_code == 1
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_device_is_refused():
    result = run(*LAYER, "--dry-run", "--device-name", "Voodoo")
    assert "--device-name is 'Voodoo', but needs one of" in str(result.exception)
    assert run(*LAYER, "--dry-run", "--device-name", KNOWN_TARGETS[1].name).exit_code == 0


def test_a_missing_matplotlib_is_named_before_the_work(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(MODULE, "find_spec", lambda name: None)
    result = run(*LAYER, "--plot", tmp_path / "plot.svg")
    assert "needs the package matplotlib" in str(result.exception)
    assert gpu == []


def bucket_of(num_tokens, us, default_us):
    config = candidates(KEY, num_tokens, H200)["portable"][0]
    times = {"balanced": us, "skewed": us + 1}
    before = {} if default_us is None else {"balanced": default_us, "skewed": default_us + 1}
    return Bucket(num_tokens, (Choice(config, times),), before)


def text_of(view) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def test_the_live_table_grows():
    view = View("Q30", ["balanced", "skewed"])
    view.on_bucket(bucket_of(1, 20.0, 22.0))
    (row,) = (line.split() for line in text_of(view).splitlines() if "portable" in line)
    assert row[:7] == ["1", "20.0", "22.0", "1.10", "21.0", "23.0", "1.10"]
    config = bucket_of(8, 1.0, 1.0).choices[0].config
    view.on_trial(Trial(8, "balanced", config, 5, 30.0))
    view.on_trial(Trial(8, "balanced", config, 5, 25.5, is_old=True))
    view.on_trial(Trial(8, "balanced", config, 5, None, "RuntimeError: no"))
    last = text_of(view).splitlines()[-1].strip()
    assert last == ("8 tokens: measurement 3 (1 cannot run, 1 from the journal), fastest 25.5 µs")
    view.on_bucket(bucket_of(8, 25.5, None))
    assert "measurement" not in text_of(view)


def test_a_verdict_of_what_was_gained():
    entry = Entry(KEY, (bucket_of(1, 20.0, 22.0), bucket_of(8, 20.0, None)))
    assert verdict(entry).startswith("Times as fast as without a table: 1.10 to 1.10")
    assert verdict(Entry(KEY, ())) == "Nothing to compare with was measured."


@pytest.mark.parametrize("kind", ["portable", "prefill", "decode"])
def test_a_configuration_in_few_words(kind):
    config = candidates(KEY, 512, H200)[kind][0]
    assert short(config).startswith(kind_of(config))
    assert "rows" in short(config) or "×" in short(config)


def test_the_plot_shows_routings_tuned_and_not():
    buckets = [bucket_of(n, 20.0 + n / 10, 22.0 + n / 9) for n in BUCKETS]
    svg = plot_entry(Entry(KEY, tuple(buckets)), "Qwen3-30B-A3B")
    for text in ("balanced, tuned", "skewed, not tuned", "times as fast as not tuned", "4,096"):
        assert f">{text}<" in svg
    assert plot_entry(Entry(KEY, (bucket_of(1, 20.0, None),)), "one").startswith("<svg")


@pytest.mark.gpu
def test_a_real_search(tmp_path):
    out = tmp_path / "tuned.json"
    layer = ("--E", 8, "--N", 512, "--K", 512, "--top-k", 2)
    result = run(*layer, "--tokens", 64, "--out", out, "--seconds", 30)
    assert result.exit_code == 0, result.stderr
    assert read_table(out).device == Target.of("cuda").name
