"""A quantised tensor: 8-bit data, its scale, and what both mean."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from octomoe.core.formats import ALL, Format
from octomoe.core.layouts import COMPACT, ScaleLayout, pack, packed_shape, unpack
from octomoe.errors import refusal


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantised tensor, ``value ~= data * scale``. A plain value, never a Tensor subclass.

    Attributes:
        data: ``[rows, columns]`` or ``[experts, rows, columns]``, dtype ``format.element.dtype``.
        scale: dtype ``format.scale_dtype``, shape
            ``packed_scale_shape(format, layout, data.shape)``.
        format: what the numbers mean.
        layout: where the scales lie.

    Raises:
        TypeError: data or scale has another dtype than the format's.
        ValueError: shapes do not fit, or data and scale lie on different devices.

    >>> from octomoe import FP8_TENSOR
    >>> q = QTensor(torch.zeros(2, 128).to(torch.float8_e4m3fn), torch.ones(1, 1), FP8_TENSOR)
    >>> q.dequantize().shape
    torch.Size([2, 128])
    """

    data: Tensor
    scale: Tensor
    format: Format
    layout: ScaleLayout = COMPACT

    def __post_init__(self) -> None:
        for name, tensor, dtype in (
            ("data", self.data, self.format.element.dtype),
            ("scale", self.scale, self.format.scale_dtype),
        ):
            if tensor.dtype != dtype:
                needs = f"{dtype} for {self.format.name}"
                raise TypeError(refusal("QTensor", name, f"has dtype {tensor.dtype}", needs))
        expected = packed_scale_shape(self.format, self.layout, tuple(self.data.shape))
        if tuple(self.scale.shape) != expected:
            got = f"has shape {tuple(self.scale.shape)}"
            needs = (
                f"{expected} for {self.format.name} in layout {self.layout} "
                f"on data {tuple(self.data.shape)}"
            )
            raise ValueError(
                refusal("QTensor", "scale", got, needs, "was it saved for another tensor?")
            )
        if self.scale.device != self.data.device:
            needs = f"the data's device {self.data.device}"
            raise ValueError(refusal("QTensor", "scale", f"is on {self.scale.device}", needs))

    @classmethod
    def from_parts(cls, data: Tensor, scale: Tensor, format: Format) -> Self:
        """Wrap a checkpoint's or an engine's loose tensors, in the shapes those use.

        Args:
            data: the 8-bit data; uint8 bytes are viewed as the format's element type.
            scale: COMPACT scale. Also taken: a scalar or one element for `FP8_TENSOR`, ``[E]`` for
                `FP8_EXPERT`, a scale without its trailing 1 for per-row formats, uint8 bytes for
                E8M0.
            format: what the numbers mean.

        Raises:
            TypeError, ValueError: as `QTensor`.

        >>> from octomoe import FP8_EXPERT
        >>> data = torch.zeros(4, 2, 8).to(torch.float8_e4m3fn)
        >>> QTensor.from_parts(data, torch.ones(4), FP8_EXPERT).scale.shape
        torch.Size([4, 1, 1])
        """
        if data.dtype == torch.uint8:
            data = data.view(format.element.dtype)
        if scale.dtype == torch.uint8 and format.scale_dtype == torch.float8_e8m0fnu:
            scale = scale.view(format.scale_dtype)
        shape = format.scale_shape(tuple(data.shape))
        # Only trailing or leading ones are added: a shape is never guessed from a count.
        given = tuple(scale.shape)
        rest = shape[len(given) :]
        lacks_ones = given == shape[: len(given)] and set(rest) == {1} and format.block[2] == ALL
        is_single = scale.numel() == 1 and set(shape) == {1}
        if lacks_ones or is_single:
            scale = scale.reshape(shape)
        return cls(data, scale, format)

    @property
    def shape(self) -> torch.Size:
        """Shape of the data."""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        """Device of data and scale."""
        return self.data.device

    @property
    def num_bytes(self) -> int:
        """Bytes of data and scale, padding of the layout included."""
        return self.data.nbytes + self.scale.nbytes

    @property
    def compact_scale(self) -> Tensor:
        """The scale in COMPACT layout, shape ``format.scale_shape(data.shape)``."""
        return unpack(self.scale, self.layout, self.format.scale_shape(tuple(self.data.shape)))

    def to(self, device: torch.device | str) -> "QTensor":
        """The same value on another device."""
        return QTensor(self.data.to(device), self.scale.to(device), self.format, self.layout)

    def relayout(self, layout: ScaleLayout) -> "QTensor":
        """The same value with its scales laid out differently; the data is shared, not copied."""
        if layout == self.layout:
            return self
        return QTensor(self.data, pack(self.compact_scale, layout), self.format, layout)

    def expert(self, index: int) -> "QTensor":
        """One expert ``[rows, columns]`` of a 3-D value, sharing memory in COMPACT layout.

        Raises:
            ValueError: the value is not 3-D.
            IndexError: there is no such expert.
        """
        if self.data.dim() != 3:
            needs = "(experts, rows, columns)"
            got = f"has shape {tuple(self.data.shape)}"
            raise ValueError(refusal("QTensor.expert", "data", got, needs))
        if not 0 <= index < self.data.shape[0]:
            needs = f"0 to {self.data.shape[0] - 1}"
            raise IndexError(refusal("QTensor.expert", "index", f"is {index}", needs))
        block = self.format.block[0]
        scale = self.compact_scale[0 if block == ALL else index // block]
        return QTensor(self.data[index], scale, self.format)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``data * scale``, computed in float32 and rounded once to `dtype`."""
        scale = expand_scale(self.compact_scale, self.format, tuple(self.data.shape))
        return (decode(self.data) * scale).to(dtype)


def decode(data: Tensor) -> Tensor:
    """The numbers that 8-bit floats stand for, as float32."""
    if data.device.type != "cpu" or torch.compiler.is_compiling():
        return data.to(torch.float32)
    # A table of all bytes: torch's own cast takes five times as long on a CPU.
    table = torch.arange(256, dtype=torch.uint8).view(data.dtype).to(torch.float32)
    codes = data.contiguous().view(torch.uint8).to(torch.int32)
    return table.index_select(0, codes.view(-1)).view(data.shape)


def packed_scale_shape(
    format: Format, layout: ScaleLayout, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Shape of the scale, in `layout`, of data of `shape`.

    >>> from octomoe import GEMM_READY, MXFP8
    >>> packed_scale_shape(MXFP8, GEMM_READY, (30, 128))
    (4, 32)
    """
    return packed_shape(format.scale_shape(shape), layout, format.scale_dtype)


def expand_scale(scale: Tensor, format: Format, shape: tuple[int, ...]) -> Tensor:
    """Spread a COMPACT scale to broadcast against data of `shape`, as float32.

    Axes whose block is one element or the whole axis are left alone: broadcasting does them.
    """
    spread = scale.to(torch.float32)
    for axis, (size, block) in enumerate(zip(shape, format.block[-len(shape) :], strict=True)):
        if block not in (1, ALL):
            # Five times as fast on a CPU as `repeat_interleave`.
            repeated = spread.unsqueeze(axis + 1)
            repeated = repeated.expand(*spread.shape[: axis + 1], block, *spread.shape[axis + 1 :])
            spread = repeated.flatten(axis, axis + 1).narrow(axis, 0, size)
    return spread
