"""`octomoe convert` plans, converts, verifies and reports; it refuses what cannot work in one line
on stderr, and says by its exit code whether the result holds.
"""

import json
from importlib import import_module
from pathlib import Path

import pytest
from safetensors.torch import load_file

from octomoe.checkpoint.writer import PARTIAL

# The function `convert` hides its module's name.
MODULE = import_module("octomoe.cli.convert")
EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "tiny-qwen3-moe"
TEXT = EXAMPLES / "heldout.txt"


@pytest.mark.parametrize(
    ("target", "weights", "name", "shape"),
    [
        ("ct-channel", "fp8_row", "layers.2.mlp.experts.5.up_proj.weight_scale", (128, 1)),
        ("octomoe", "fp8_row", "layers.2.mlp.experts.w13_scale", (16, 256, 1)),
    ],
)
def test_a_checkpoint_is_converted_and_verified(octomoe_, tmp_path, target, weights, name, shape):
    path = tmp_path / "made"
    code, out, err = octomoe_("convert", MODEL, path, "--target", target, "--json")
    assert code == 0, err
    made = json.loads(out)
    assert (made["target"], made["weights"], made["family"]) == (target, weights, "qwen3_moe")
    assert (made["num_layers"], made["num_experts"]) == (3, 16)
    assert made["outcome"]["weights"] == {"quantized": 144}
    assert made["verification"]["problems"] == []
    assert made["verification"]["lowest_sqnr_db"] > 31
    assert len(made["verification"]["quality"]) == 9
    assert made["seconds"] > 0
    tensors = load_file(path / "model.safetensors")
    assert tuple(tensors[f"model.{name}"].shape) == shape
    assert sum(t.nbytes for t in tensors.values()) == made["written_bytes"]


def test_the_summary_fits_a_screen_and_names_the_next_command(octomoe_, tmp_path):
    path = tmp_path / "made"
    code, out, err = octomoe_("convert", MODEL, path, "--target", "hf-fp8-block")
    assert (code, out) == (0, "")
    for expected in (
        "3 layers × 16 experts of qwen3_moe",
        "fp8_block128 weights, fp8_group128 activations, for hf-fp8-block",
        "12.5 MB became 7.8 MB (1.60:1) in 1 file",
        "GB/s",
        "144 quantised",
        "29 tensors byte by byte",
        "317 tensors checked, 29 identical to the source's, 144 quantised matrices, lowest SQNR 31",
        f"Next: vllm serve {path}",
    ):
        assert expected in err
    assert len(err.splitlines()) < 24


def test_a_dry_run_shows_the_plan_and_writes_nothing(octomoe_, tmp_path):
    options = ("--target", "ct-channel", "--shard-size", "2MB", "--dry-run", "--json")
    code, out, err = octomoe_("convert", MODEL, tmp_path / "made", *options)
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    planned = json.loads(out)
    assert planned["verification"] is None
    assert planned["outcome"]["weights"] == {}
    for expected in (
        "experts of 3 layers, to fp8_row",
        "passed on byte by byte",
        "model.layers.*.self_attn.q_proj",
        "nothing was written",
        *planned["shards"],
    ):
        assert expected in err


def test_a_dry_run_foretells_what_becomes_of_quantised_weights(octomoe_, tmp_path):
    first = tmp_path / "first"
    assert octomoe_("convert", MODEL, first, "--target", "ct-mxfp8", "--no-verify")[0] == 0
    arguments = ("convert", first, tmp_path / "second", "--target", "hf-fp8-block", "--dry-run")
    code, _, err = octomoe_(*arguments)
    assert code == 0
    assert "144 moved to other power-of-two scales" in err


def test_a_dry_run_of_many_files_shows_some(octomoe_, tmp_path):
    options = ("--target", "ct-channel", "--shard-size", "200kB", "--dry-run")
    _, _, err = octomoe_("convert", MODEL, tmp_path / "made", *options)
    assert "model-00010-of-" in err
    assert "model-00011-of-" not in err
    assert "more" in err


def test_options_reach_the_conversion(octomoe_, tmp_path):
    code, out, _ = octomoe_(
        *("convert", MODEL, tmp_path / "made", "--target", "octomoe", "--weights", "block128"),
        *("--weights-scale", "pow2", "--search", "mse", "--all-linears", "--shard-size", "2MB"),
        *("--keep", "model.layers.0.*", "--modules-to-not-convert", "layers.1.self"),
        *("--include", "model.layers.*", "--expert-wise-scale", "--workers", "1", "--json"),
    )
    assert code == 0
    made = json.loads(out)
    assert made["weights"] == "fp8_block128-pow2"
    assert made["num_layers"] == 2
    assert made["num_linears"] > 0
    assert len(made["shards"]) > 2
    stated = json.loads((tmp_path / "made" / "octomoe_conversion.json").read_text())["options"]
    assert stated["keep"] == ["model.layers.0.*"]
    assert stated["include"] == ["model.layers.*"]
    assert stated["modules_to_not_convert"] == ["layers.1.self"]
    assert (stated["search"], stated["expert_scale"]) == ("mse", "wise")


def test_static_scales_are_measured_on_a_text(octomoe_, tmp_path, monkeypatch):
    asked = []

    def measure(src, text, num_tokens, *, family_file):
        asked.append((src, text, num_tokens))
        return {layer: dict.fromkeys(("gate", "up", "down"), [0.5] * 16) for layer in range(3)}

    monkeypatch.setattr("octomoe.cli.calibrate.calibrate_checkpoint", measure)
    path = tmp_path / "made"
    options = ("--target", "modelopt-fp8", "--calibrate", TEXT, "--calibrate-tokens", "99")
    code, _, err = octomoe_("convert", MODEL, path, *options)
    assert code == 0, err
    assert asked == [(str(MODEL), TEXT, 99)]
    tensors = load_file(path / "model.safetensors")
    assert tensors["model.layers.0.mlp.experts.0.up_proj.input_scale"] == 0.5


def test_averaged_scales_come_with_a_warning_and_without_an_error(octomoe_, tmp_path):
    options = ("--target", "ct-channel", "--expert-scale", "averaged-legacy")
    code, _, err = octomoe_("convert", MODEL, tmp_path / "made", *options)
    assert code == 0
    assert "WARNING: --expert-scale averaged-legacy reproduces a known mistake" in err
    assert err.count("✗") == 20
    assert "… and 124 more problems" in err
    assert "they are expected" in err
    assert "vllm" not in err


def test_a_result_that_does_not_hold_is_exit_code_1(octomoe_, tmp_path, monkeypatch):
    convert_checkpoint = MODULE.convert_checkpoint

    def convert_and_spoil(src, dst, **options):
        done = convert_checkpoint(src, dst, **options)
        file = dst / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1000:] = bytes(1000)
        file.write_bytes(data)
        return done

    monkeypatch.setattr(MODULE, "convert_checkpoint", convert_and_spoil)
    arguments = ("convert", MODEL, tmp_path / "made", "--target", "ct-channel", "--json")
    code, out, err = octomoe_(*arguments)
    assert code == 1
    assert "Something is off" in err
    problems = json.loads(out)["verification"]["problems"]
    assert problems
    assert problems[0] in err


def test_the_report_is_written(octomoe_, tmp_path):
    report = tmp_path / "report.html"
    options = ("--target", "mxfp8", "--report", report)
    code, _, err = octomoe_("convert", MODEL, tmp_path / "made", *options)
    assert code == 0
    assert f"Report: {report}" in err
    page = report.read_text(encoding="utf-8")
    assert "octomoe convert" in page
    assert "3 layers × 16 experts of qwen3_moe" in page
    assert page.count("<svg ") == 2


def test_an_unfinished_conversion_is_refused_and_resumed(octomoe_, tmp_path, monkeypatch):
    path = tmp_path / "made"
    arguments = ("convert", MODEL, path, "--target", "ct-channel", "--shard-size", "2MB")
    with monkeypatch.context() as patch:

        def fail(self, *_):
            raise OSError("the power went")

        patch.setattr("octomoe.checkpoint.destination.Destination.complete", fail)
        assert octomoe_(*arguments)[::2] == (1, "octomoe: the power went\n")
    assert any(file.name.startswith(PARTIAL) for file in path.iterdir())
    code, _, err = octomoe_(*arguments)
    assert code == 1
    assert (
        "holds an unfinished conversion, but needs a new or empty folder; go on with --resume"
        in (err)
    )
    assert octomoe_(*arguments, "--resume")[0] == 0
    code, _, err = octomoe_(*arguments, "--resume")
    assert code == 0
    assert "it was complete already" in err


def test_only_the_first_of_several_processes_speaks(octomoe_, tmp_path, monkeypatch):
    path = tmp_path / "made"
    arguments = ("convert", MODEL, path, "--target", "ct-channel", "--shard-size", "2MB")
    assert octomoe_(*arguments)[0] == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert octomoe_(*arguments, "--resume") == (0, "", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "nonsense"), "target is 'nonsense', but needs one of hf-fp8-block"),
        (("--target", "mxfp8", "--weights", "mxfp8"), "weights is 'mxfp8', but needs none"),
        (("--weights-scale", "round"), "weights_scale is 'round', but needs one of auto"),
        (("--search", "best"), "search is 'best', but needs none or mse"),
        (("--expert-scale", "mean"), "expert_scale is 'mean', but needs one of auto"),
        (
            ("--expert-scale", "shared", "--expert-wise-scale"),
            "--expert-scale is 'shared', but needs one of the two",
        ),
        (("--pad-intermediate", "64"), "pad_intermediate is given for ct-channel, but needs 1"),
        (("--shard-size", "5 apples"), "--shard-size is '5 apples', but needs a size such as"),
        (("--shard-size", "0"), "--shard-size is '0', but needs a size such as"),
        (("--device", "abacus"), "device is 'abacus', but needs cpu, cuda or cuda:0"),
        (("--report", "no/folder/r.html"), "--report is no/folder/r.html, but needs a file in"),
        (("--report", "r.html", "--no-verify"), "--report comes with --no-verify, but needs the"),
        (("--family-file", "no.toml"), "No such file or directory: 'no.toml'"),
        (("--target", "modelopt-fp8"), "needs static activation scales; give --calibrate TEXT"),
        (("--calibrate", "no.txt", "--target", "ct-tensor"), "No such file or directory: 'no.txt'"),
        (("--calibrate", TEXT), "input_scales are given, but needs none"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_work_is_one_line_and_exit_code_1(octomoe_, tmp_path, options, message):
    given = ("--target", "ct-channel") if "--target" not in options else ()
    code, out, err = octomoe_("convert", MODEL, tmp_path / "made", *given, *options)
    assert (code, out) == (1, "")
    assert message in err
    assert err.splitlines()[-1].startswith("octomoe: ")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_refused(octomoe_, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ("convert", MODEL, tmp_path / "made", "--target", "ct-channel", "--device", "cuda")
    code, _, err = octomoe_(*arguments)
    assert code == 1
    assert "device is 'cuda', but needs a CUDA GPU that torch can use; use cpu" in err


def test_sources_and_destinations_that_cannot_work(octomoe_, tmp_path):
    for src, dst, message in (
        (tmp_path / "none", tmp_path / "made", "does not exist, but needs a checkpoint folder"),
        (tmp_path, tmp_path.parent / "made", "has no config.json"),
        (MODEL, MODEL / "made", "lies in the source"),
        (MODEL, EXAMPLES, "is not empty, but needs a new or empty folder"),
    ):
        code, _, err = octomoe_("convert", src, dst, "--target", "ct-channel")
        assert code == 1
        assert message in err
        assert err.count("\n") == 1


def test_a_target_is_needed(octomoe_, tmp_path):
    code, _, err = octomoe_("convert", MODEL, tmp_path / "made")
    assert code == 2
    assert "--target" in err


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("4GiB", 4 << 30),
        ("1.5 kb", 1500),
        ("2m", 2_000_000),
        ("123", 123),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str, num_bytes: int):
    assert MODULE._parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "1e9", "0.1", "nan"])
def test_what_is_no_size(text: str):
    with pytest.raises(ValueError, match="--shard-size is"):
        MODULE._parse_size(text)
