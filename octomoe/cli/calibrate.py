"""Static activation scales of a checkpoint, for `octomoe convert --calibrate`."""

from pathlib import Path

from rich.console import Console

from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.source import Checkpoint
from octomoe.cli.comparison import batch_progress
from octomoe.cli.text import read_batches
from octomoe.errors import refusal
from octomoe.evaluate.calibrate import LayerScales, calibrate
from octomoe.integrations.transformers import experts_of, find_experts
from octomoe.integrations.transformers_checkpoint import layers_by_module, load_reader

_SEQUENCE = 512


def calibrate_checkpoint(
    src: str | Path, text: Path, num_tokens: int, *, family_file: Path | None = None
) -> dict[int, dict[str, list[float]]]:
    """Run text through a checkpoint and measure what enters its experts.

    Args:
        src: the checkpoint; the whole model is loaded.
        text: UTF-8.
        num_tokens: tokens of it to use.
        family_file: further family records.

    Returns:
        Layer number -> role -> one scale per expert, as `octomoe.convert_checkpoint` takes them.

    Raises:
        ValueError: the text is too short, or the model has no experts that can be measured.
    """
    console = Console(stderr=True)
    reader = Reader(Checkpoint(src), family_file)
    loaded = load_reader(reader, reader)
    originals = {name: experts_of(module) for name, module in find_experts(loaded.model)}
    if not originals:
        got = f"is {src}, whose experts Transformers does not expose"
        raise ValueError(refusal("convert", "--calibrate", got, "a model with exposed experts"))
    length = min(_SEQUENCE, loaded.max_sequence or _SEQUENCE)
    batches = read_batches(text, loaded, num_tokens, length, "convert")
    with batch_progress(console) as progress:
        task = progress.add_task("calibrating", total=len(batches))
        found = calibrate(loaded.model, originals, batches, lambda: progress.advance(task))
    layers = layers_by_module(reader, list(originals))
    numbers = {name: layer.layer for name, layer in layers.items()}
    num_tokens = sum(batch.numel() for batch in batches)
    console.print(f"Calibrated on {num_tokens} tokens: {_unseen(numbers, found)}")
    return {
        numbers[name]: {
            "gate": list(scales.w13_E),
            "up": list(scales.w13_E),
            "down": list(scales.w2_E),
        }
        for name, scales in found.items()
    }


def _unseen(numbers: dict[str, int], found: dict[str, LayerScales]) -> str:
    unseen = [(numbers[name], scales.unseen) for name, scales in found.items() if scales.unseen]
    if not unseen:
        return "every expert saw some."
    count = sum(len(experts) for _, experts in unseen)
    layers = ", ".join(f"{layer}: {list(experts)}" for layer, experts in unseen[:5])
    return f"{count} experts saw none and have their layer's scale (layer {layers})."
