"""What quantising the experts of real trained models costs, held to figures.

The bundled model is always measured. A larger one is, where OCTOMOE_TEST_MODELS names a folder
with `small-qwen3-moe` and `heldout.txt`.
"""

import os
from pathlib import Path

import pytest

from octomoe.cli.text import read_batches
from octomoe.evaluate.compare import measure_baseline
from octomoe.evaluate.run import run_scheme
from octomoe.evaluate.schemes import SCHEMES
from octomoe.integrations.transformers import experts_of, find_experts, load_model

pytest.importorskip("transformers", minversion="5.16")

EXAMPLES = Path(__file__).parents[2] / "examples"
OTHERS = os.environ.get("OCTOMOE_TEST_MODELS")
# Whole models go through: to fill their memory with NaN takes a third of the time.
pytestmark = [pytest.mark.slow, pytest.mark.plain_memory]

WEIGHTS_ONLY = ("tensor", "expert", "channel", "block128", "mxfp8", "channel, scales averaged")


def measure(model: Path, text: Path, names: tuple[str, ...]):
    """Unquantised perplexity, and name -> result, on the first 64 x 512 tokens."""
    loaded = load_model(model)
    batches = read_batches(text, loaded, 64 * 512, 512)
    originals = {name: experts_of(module) for name, module in find_experts(loaded.model)}
    baseline = measure_baseline(loaded.model, batches, list(originals))
    schemes = [scheme for scheme in SCHEMES if scheme.name in names]
    results = [run_scheme(loaded.model, originals, baseline, scheme) for scheme in schemes]
    return baseline.perplexity, {result.name: result for result in results}


def test_bundled_model():
    names = ("channel", "channel, scales averaged")
    perplexity, results = measure(EXAMPLES / "tiny-qwen3-moe", EXAMPLES / "heldout.txt", names)
    assert perplexity == pytest.approx(10.9748, abs=0.001)
    assert results["channel"].perplexity == pytest.approx(10.985, abs=0.005)
    assert results["channel"].kl < 0.004
    assert results["channel"].top1 > 0.97
    assert results["channel, scales averaged"].perplexity > 12.5


@pytest.mark.skipif(OTHERS is None, reason="OCTOMOE_TEST_MODELS names no folder of models")
def test_larger_model():
    folder = Path(OTHERS)
    perplexity, results = measure(folder / "small-qwen3-moe", folder / "heldout.txt", WEIGHTS_ONLY)
    assert perplexity == pytest.approx(8.5903, abs=0.001)
    assert results["channel"].perplexity == pytest.approx(perplexity, rel=0.002)
    assert results["channel"].kl <= 0.007
    assert results["channel"].top1 >= 0.965
    for name in ("tensor", "expert", "block128", "mxfp8"):
        assert results[name].perplexity == pytest.approx(perplexity, rel=0.004)
    averaged = results["channel, scales averaged"]
    assert averaged.perplexity > 12
    assert averaged.top1 < 0.70
