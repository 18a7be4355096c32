"""Where the scales lie in memory: three layouts; `pack` and `unpack` are exact inverses.

For a COMPACT scale of shape ``[*lead, rows, columns]``:

    COMPACT      [*lead, rows, columns]                          what is stored and dispatched
    GEMM_READY   [*lead, columns, roundup(rows, 16 bytes)]       scale-major; what TMA loads
    INTERLEAVED  [*lead, ceil(rows/128), ceil(columns/4), 32, 16]  128x4 atoms of 512 bytes for
                 tensor cores that take scales: scale (row, column) of an atom lies at
                 byte ``(row % 32) * 16 + (row // 32) * 4 + column`` (for one-byte scales)

Sources: 16-byte alignment of TMA strides (CUDA programming guide, tensor maps) for GEMM_READY;
PTX ISA, tcgen05 block-scaled matrix multiply, scale factor layout, for INTERLEAVED.
"""

from enum import StrEnum

import torch
from torch import Tensor
from torch.nn.functional import pad

from octomoe.errors import refusal


class ScaleLayout(StrEnum):
    """Memory layout of a scale tensor; see the module's table."""

    COMPACT = "compact"
    GEMM_READY = "gemm_ready"
    INTERLEAVED = "interleaved"


COMPACT = ScaleLayout.COMPACT
GEMM_READY = ScaleLayout.GEMM_READY
INTERLEAVED = ScaleLayout.INTERLEAVED

_ROW_BYTES = 16
_ATOM_ROWS = 128
_ATOM_COLUMNS = 4


def packed_shape(
    scale_shape: tuple[int, ...], layout: ScaleLayout, dtype: torch.dtype
) -> tuple[int, ...]:
    """Shape that a COMPACT scale of `scale_shape` and `dtype` has in `layout`.

    >>> packed_shape((5, 3), GEMM_READY, torch.float32)
    (3, 8)
    >>> packed_shape((5, 3), GEMM_READY, torch.float8_e8m0fnu)
    (3, 16)
    """
    *lead, rows, columns = scale_shape
    match layout:
        case ScaleLayout.COMPACT:
            return tuple(scale_shape)
        case ScaleLayout.GEMM_READY:
            return (*lead, columns, _round_up(rows, _ROW_BYTES // dtype.itemsize))
        case ScaleLayout.INTERLEAVED:
            return (*lead, -(-rows // _ATOM_ROWS), -(-columns // _ATOM_COLUMNS), 32, 16)


def pack(scale: Tensor, layout: ScaleLayout) -> Tensor:
    """Lay a COMPACT scale out in `layout`; padding is zero bytes.

    Args:
        scale: ``[*lead, rows, columns]``, float32 or E8M0.
        layout: the layout wanted.

    Returns:
        A contiguous tensor of shape `packed_shape`, same dtype and device.
    """
    *lead, rows, columns = scale.shape
    match layout:
        case ScaleLayout.COMPACT:
            return scale.contiguous()
        case ScaleLayout.GEMM_READY:
            num_rows = packed_shape((rows, columns), layout, scale.dtype)[1]
            padded = _pad_bytes(scale, num_rows, columns)
            # clone, not contiguous: with one column the latter would keep its stride of 1.
            return padded.transpose(-1, -2).clone(memory_format=torch.contiguous_format)
        case ScaleLayout.INTERLEAVED:
            num_row_atoms, num_column_atoms = packed_shape((rows, columns), layout, scale.dtype)[:2]
            padded = _pad_bytes(scale, num_row_atoms * _ATOM_ROWS, num_column_atoms * _ATOM_COLUMNS)
            # (row atom, row // 32, row % 32, column atom, column % 4) of every scale.
            atoms = padded.reshape(*lead, num_row_atoms, 4, 32, num_column_atoms, _ATOM_COLUMNS)
            n = len(lead)
            order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)
            return atoms.permute(order).reshape(*lead, num_row_atoms, num_column_atoms, 32, 16)


def unpack(packed: Tensor, layout: ScaleLayout, scale_shape: tuple[int, ...]) -> Tensor:
    """The COMPACT scale of shape `scale_shape` that `pack` laid out; drops the padding.

    Args:
        packed: tensor of shape ``packed_shape(scale_shape, layout, packed.dtype)``.
        layout: the layout it is in.
        scale_shape: shape of the COMPACT scale.

    Returns:
        A contiguous tensor of shape `scale_shape`.

    Raises:
        ValueError: `packed` has another shape.
    """
    expected = packed_shape(scale_shape, layout, packed.dtype)
    if tuple(packed.shape) != expected:
        needs = f"{expected} for a {layout} scale of {tuple(scale_shape)}"
        raise ValueError(refusal("unpack", "packed", f"has shape {tuple(packed.shape)}", needs))
    *lead, rows, columns = scale_shape
    match layout:
        case ScaleLayout.COMPACT:
            return packed.contiguous()
        case ScaleLayout.GEMM_READY:
            scale = packed.transpose(-1, -2)[..., :rows, :]
            return scale.clone(memory_format=torch.contiguous_format)
        case ScaleLayout.INTERLEAVED:
            num_row_atoms, num_column_atoms = expected[-4:-2]
            atoms = packed.reshape(*lead, num_row_atoms, num_column_atoms, 32, 4, _ATOM_COLUMNS)
            n = len(lead)
            order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)
            padded = atoms.permute(order).reshape(
                *lead, num_row_atoms * _ATOM_ROWS, num_column_atoms * _ATOM_COLUMNS
            )
            return padded[..., :rows, :columns].contiguous()


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad_bytes(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Pad the last two axes at their ends with zero bytes (torch cannot pad E8M0 directly)."""
    data = scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
    padded = pad(data, (0, columns - data.shape[-1], 0, rows - data.shape[-2]))
    return padded.view(scale.dtype)
