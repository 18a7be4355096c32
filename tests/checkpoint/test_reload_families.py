"""Claims: a checkpoint of every model family that Transformers has a class for is converted,
verified, and computes in Transformers what the stored bytes and scales say.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from octomoe import convert_checkpoint
from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.source import Checkpoint
from octomoe.core.qtensor import QTensor
from octomoe.integrations.transformers_checkpoint import load_checkpoint

pytestmark = pytest.mark.plain_memory


def logits_of(path: Path, like: Path) -> Tensor:
    model = load_checkpoint(path, like=like).model
    tokens_BL = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=tokens_BL, use_cache=False)[0]


def test_every_family_converts_verifies_and_reloads(tiny_model_type, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(tiny_model_type)
    conversion = convert_checkpoint(source, tmp_path / "out", target="ct-channel")
    assert conversion.verification.problems == []
    made, original = Reader(Checkpoint(tmp_path / "out")), Reader(Checkpoint(source))
    assert len(made.layers) == len(original.layers)
    for ours, theirs in zip(made.layers, original.layers, strict=True):
        for role, weight in original.expert(theirs, 3).weights.items():
            stored = made.expert(ours, 3).weights[role]
            assert isinstance(stored, QTensor)
            assert (stored.dequantize() - weight).norm() < 0.05 * weight.norm()
    expected, actual = logits_of(source, source), logits_of(tmp_path / "out", source)
    # Some tokens go to another expert than before; a wrong layout leaves nothing in common.
    assert (actual - expected).norm() < 0.3 * expected.norm()
    assert not torch.equal(actual, expected)
