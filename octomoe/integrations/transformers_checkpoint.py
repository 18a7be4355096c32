"""Converted checkpoints in Hugging Face Transformers: load any target as it is stored.

Transformers builds the model from plain numbers; its experts are then replaced by the stored ones,
so that what runs is what the checkpoint holds, bytes and scales.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octomoe.checkpoint.names import ExpertLayer
from octomoe.checkpoint.reader import Reader
from octomoe.checkpoint.source import Checkpoint
from octomoe.checkpoint.state_dict import plain_state_dict, read_experts
from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import Format
from octomoe.core.qtensor import QTensor
from octomoe.errors import refusal
from octomoe.integrations.transformers import LoadedModel, activation_of, find_experts


def load_checkpoint(
    path: str | Path, *, like: str | Path | None = None, family_file: str | Path | None = None
) -> LoadedModel:
    """Load a checkpoint of any scheme that `octomoe convert` reads or writes, as plain float32.

    Args:
        path: the checkpoint.
        like: the checkpoint it was made from, whose names and layout Transformers knows; itself by
            default.
        family_file: further family records.

    Returns:
        The model, in float32 arithmetic, with the tokenizer of `like`.

    Raises:
        ImportError: Transformers is not installed.
        ValueError: the checkpoint does not hold what the model needs, or more.
    """
    records = None if family_file is None else Path(family_file)
    reader = Reader(Checkpoint(path), records)
    named = reader if like is None else Reader(Checkpoint(like), records)
    return load_reader(reader, named)


def load_reader(reader: Reader, like: Reader) -> LoadedModel:
    """`load_checkpoint` for checkpoints that are open already."""
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(like.checkpoint.path, local_files_only=True)
    for each in (config, config.get_text_config()):
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    architecture = (config.architectures or ["AutoModelForCausalLM"])[0]
    kind: Any = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
    state_dict = plain_state_dict(reader, like, torch.float32)
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=state_dict,
        dtype=torch.float32,
        output_loading_info=True,
    )
    for what in ("missing_keys", "mismatched_keys"):
        if info[what]:
            got = f"leaves {what.replace('_', ' ')}: {sorted(map(str, info[what]))[:3]}"
            raise ValueError(refusal("load_checkpoint", reader.checkpoint.path, got, "all weights"))
    text_config = config.get_text_config()
    return LoadedModel(
        model.eval(),
        _encoder(like.checkpoint.path),
        text_config.vocab_size,
        getattr(text_config, "max_position_embeddings", None),
        2,
    )


def stored_experts(
    reader: Reader, model: nn.Module
) -> tuple[dict[str, ExpertWeights], Format | None]:
    """The experts as stored, by name of the model's experts modules, and the activation format.

    Layers that are not quantised are left out.
    """
    found = {}
    layers = layers_by_module(reader, [name for name, _ in find_experts(model)])
    for name, layer in layers.items():
        stored = read_experts(reader, layer)
        if isinstance(stored.w13, QTensor):
            found[name] = ExpertWeights(
                stored.w13,
                stored.w2,
                activation_of(model.get_submodule(name)),
                stored.w13_bias,
                stored.w2_bias,
                stored.w13_input_scale,
                stored.w2_input_scale,
            )
    return found, reader.scheme.activations


def layers_by_module(reader: Reader, modules: Sequence[str]) -> dict[str, ExpertLayer]:
    """Which of the checkpoint's layers each of a model's experts modules is.

    Args:
        reader: the checkpoint.
        modules: names of all experts modules of the model, in its order.

    Raises:
        NotImplementedError: there are more or fewer of them than layers with experts.
    """
    layers = sorted((x for x in reader.layers if not x.is_mtp), key=lambda layer: layer.layer)
    if len(modules) != len(layers):
        got = f"has {len(modules)} experts modules of the standard interface"
        needs = f"the checkpoint's {len(layers)}"
        raise NotImplementedError(refusal("layers_by_module", "modules", got, needs))
    return dict(zip(modules, layers, strict=True))


def _encoder(path: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer: Any = None

    def encode(text: str) -> list[int]:
        nonlocal tokenizer
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids

    return encode
