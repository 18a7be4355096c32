"""Tensors outside the experts: copied, made plain numbers, or quantised."""

import torch

from octomoe.checkpoint.encode import encode, values_of
from octomoe.checkpoint.header import DTYPE_NAMES, Planned
from octomoe.checkpoint.jobs import (
    Group,
    Job,
    Outcome,
    Write,
    check_finite,
    scale_bytes,
    scale_planned,
)
from octomoe.checkpoint.options import Options
from octomoe.checkpoint.reader import Reader


def copy_group(reader: Reader, name: str, new_name: str) -> Group:
    """A tensor as it is, piece by piece."""
    entry = reader.checkpoint.tensors[name]

    def run(write: Write) -> Outcome:
        for offset, data in reader.checkpoint.chunks(name):
            write(new_name, data, offset)
        return Outcome()

    planned = Planned(new_name, entry.dtype, entry.shape)
    return Group((planned,), (Job(run, entry.num_bytes),))


def dequantize_group(reader: Reader, name: str, new_name: str, dtype: torch.dtype) -> Group:
    """A quantised tensor as plain numbers, for readers that would not know its scheme."""
    entry = reader.checkpoint.tensors[name]

    def run(write: Write) -> Outcome:
        write(new_name, values_of(reader.weight(name), dtype))
        return Outcome()

    planned = Planned(new_name, DTYPE_NAMES[dtype], entry.shape)
    return Group((planned,), (Job(run, entry.num_bytes),))


def linear_group(reader: Reader, name: str, new_name: str, options: Options) -> Group:
    """A linear layer's weight, quantised."""
    entry, format, target = reader.checkpoint.tensors[name], options.format, options.found_target
    base = new_name.removesuffix(".weight")
    scale_shape = format.scale_shape(entry.shape)
    if target.scale_shape is not None:
        # Outside the experts every engine takes a scalar.
        scale_shape = target.scale_shape if target.name.startswith("ct-") else ()

    def run(write: Write) -> Outcome:
        outcome = Outcome()
        encoded = encode(reader.weight(name), options.numerics)
        check_finite(encoded, name)
        outcome.add(encoded)
        write(new_name, encoded.q.data)
        write(base + target.scale, scale_bytes(encoded.q.scale))
        return outcome

    outputs = (
        Planned(new_name, DTYPE_NAMES[format.element.dtype], entry.shape),
        scale_planned(base + target.scale, format, scale_shape),
    )
    return Group(outputs, (Job(run, entry.num_bytes),))
