"""Text as token ids, for every verb that runs a model on some."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from octomoe.errors import refusal

if TYPE_CHECKING:
    from octomoe.integrations.transformers import LoadedModel

# Predictions of the unquantised model are kept in memory to compare with: 4 bytes per token and
# vocabulary entry.
_MAX_PREDICTION_BYTES: Final = 4 << 30
_SEQUENCES_PER_BATCH: Final = 4


def read_batches(
    path: Path, loaded: "LoadedModel", num_tokens: int, length: int, verb: str = "demo"
) -> list[Tensor]:
    """The first tokens of a text, as batches of sequences ``[B, length]``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no UTF-8 text or shorter than one sequence.
    """
    if loaded.max_sequence is not None and length > loaded.max_sequence:
        got = f"is {length}"
        needs = f"at most {loaded.max_sequence}, the model's longest context"
        raise ValueError(refusal(verb, "--sequence", got, needs))
    num_tokens = min(num_tokens, _MAX_PREDICTION_BYTES // (4 * loaded.vocab_size))
    num_sequences = max(num_tokens // length, 1)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            # Characters enough for any tokenizer in use; the last token may be cut short.
            ids = loaded.encode(file.read(16 * num_sequences * length))
    except UnicodeDecodeError as error:
        got = f"is {path}, which is not UTF-8 ({error.reason} at byte {error.start})"
        raise ValueError(refusal(verb, "--text", got, "a UTF-8 text file")) from error
    num_sequences = min(num_sequences, len(ids) // length)
    if num_sequences == 0:
        got = f"is {path} of {len(ids)} tokens"
        do = "give a longer text or a smaller --sequence"
        raise ValueError(refusal(verb, "--text", got, f"at least one of {length} tokens", do))
    tokens_BL = torch.tensor(ids[: num_sequences * length]).view(num_sequences, length)
    return list(torch.split(tokens_BL, _SEQUENCES_PER_BATCH))
