"""What a quantised number is: element type, scale type, scale block, rounding.

    value ~= data * scale        scale.shape == ceil(data.shape / block)

The block is a triple over (experts, rows, columns); ``ALL`` spans the whole axis. Two-dimensional
data has no experts axis and uses the last two entries.

Sources: OCP 8-bit floating point (OFP8) 1.0 for E4M3 and E5M2; OCP Microscaling (MX) 1.0 for E8M0
and blocks of 32. E8M0 scales are rounded up ("RCEIL"), so no element ever saturates.
"""

import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from typing import Final, Literal, Self

import torch

from octomoe.errors import refusal

# A block entry that spans its whole axis.
ALL: Final = -1

Block = tuple[int, int, int]


class Rounding(StrEnum):
    """How a scale is rounded: to float32 as computed, or up to a power of two."""

    EXACT = "exact"
    POW2 = "pow2"


@dataclass(frozen=True, slots=True)
class Element:
    """An 8-bit floating-point element type.

    Attributes:
        name: short name, part of a format's name.
        dtype: torch dtype of the stored bytes.
        max: largest magnitude that may be stored.
        pow2_target: largest magnitude a block is scaled to under power-of-two scales. For the
            240-limited type it is 224 = 448 / 2, so that data of E4M3FN is converted by halving.
        has_nan: whether a stored byte may be NaN.
    """

    name: str
    dtype: torch.dtype
    max: float
    pow2_target: float
    has_nan: bool


E4M3FN: Final = Element("e4m3fn", torch.float8_e4m3fn, 448.0, 448.0, has_nan=True)
E5M2: Final = Element("e5m2", torch.float8_e5m2, 57344.0, 57344.0, has_nan=True)
# IEEE-like E4M3 as AWS Neuron reads it: bytes 0x78-0x7f and 0xf8-0xff mean Inf and NaN there, so
# they are never produced; a NaN in the input goes into the block's scale instead.
E4M3_240: Final = Element("e4m3_240", torch.float8_e4m3fn, 240.0, 224.0, has_nan=False)

_ELEMENTS: Final = {element.name: element for element in (E4M3FN, E5M2, E4M3_240)}

_BASE_NAMES: Final[dict[tuple[torch.dtype, Block], str]] = {
    (torch.float32, (ALL, ALL, ALL)): "fp8_tensor",
    (torch.float32, (1, ALL, ALL)): "fp8_expert",
    (torch.float32, (1, 1, ALL)): "fp8_row",
    (torch.float32, (1, 1, 128)): "fp8_group128",
    (torch.float32, (1, 128, 128)): "fp8_block128",
    (torch.float32, (1, 128, 1)): "fp8_column128",
    (torch.float8_e8m0fnu, (1, 1, 32)): "mxfp8",
    (torch.float8_e8m0fnu, (1, 32, 32)): "mxfp8_2d",
}
_BASE_KEYS: Final = {name: key for key, name in _BASE_NAMES.items()}
_ALIASES: Final = {"fp8_token": "fp8_row", "fp8_channel": "fp8_row"}
_CUSTOM_BLOCK: Final = re.compile(r"(fp8|mxfp8)\[(all|\d+),(all|\d+),(all|\d+)\]")


@dataclass(frozen=True, slots=True)
class Format:
    """A way to store a tensor in 8 bits. Immutable; compared by value; spelled by `name`.

    Attributes:
        block: scale block over (experts, rows, columns); positive sizes or `ALL`.
        scale_dtype: ``torch.float32`` or ``torch.float8_e8m0fnu`` (E8M0: a power of two in a byte).
        element: type of the stored data.
        rounding: rounding of the scale; E8M0 scales are always powers of two.
        target_max: magnitude the largest value of a block is scaled to (2 to `element.max`);
            0 picks the element's own.
        name: the format's spelling, which follows from the rest; `Format.parse` reads it back.

    Raises:
        ValueError: a block entry is neither positive nor `ALL`, an E8M0 scale is asked to be exact,
            the scale dtype is another one, or `target_max` exceeds the element's range.

    >>> FP8_BLOCK128.scale_shape((8, 7168, 2048))
    (8, 56, 16)
    >>> FP8_BLOCK128.derive(rounding="pow2").name, FP8_ROW.derive(element=E4M3_240).name
    ('fp8_block128-pow2', 'fp8_row-e4m3_240')
    """

    block: Block
    scale_dtype: torch.dtype = torch.float32
    element: Element = E4M3FN
    rounding: Rounding = Rounding.EXACT
    target_max: float = 0.0
    # Stored, since ops ask for it at every call and torch.compile traces them.
    name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))
        if self.rounding not in tuple(Rounding):
            needs = "exact or pow2"
            raise ValueError(refusal("Format", "rounding", f"is {self.rounding!r}", needs))
        if len(self.block) != 3 or any(size < 1 and size != ALL for size in self.block):
            raise ValueError(
                refusal("Format", "block", f"is {self.block}", "three positive sizes or ALL")
            )
        if self.scale_dtype not in (torch.float32, torch.float8_e8m0fnu):
            needs = "torch.float32 or torch.float8_e8m0fnu"
            raise ValueError(refusal("Format", "scale_dtype", f"is {self.scale_dtype}", needs))
        if self.scale_dtype == torch.float8_e8m0fnu and self.rounding != Rounding.POW2:
            raise ValueError(
                refusal("Format", "rounding", "is exact with E8M0 scales", 'rounding "pow2"')
            )
        if self.target_max == 0.0:
            object.__setattr__(self, "target_max", _default_target(self.element, self.rounding))
        # Below 2 the scale of the largest float32 would have no E8M0 byte.
        if not 2.0 <= self.target_max <= self.element.max:
            needs = f"a value in [2, {self.element.max:g}] for {self.element.name}"
            raise ValueError(refusal("Format", "target_max", f"is {self.target_max:g}", needs))
        object.__setattr__(self, "name", _spell(self))

    def derive(
        self,
        *,
        rounding: Rounding | Literal["exact", "pow2"] | None = None,
        element: Element | None = None,
        target_max: float = 0.0,
    ) -> Self:
        """The same block with another rounding, element or target; the rest follows."""
        return replace(
            self,
            # A wrong name is refused by the constructor, in its words.
            rounding=self.rounding if rounding is None else rounding,  # type: ignore[arg-type]
            element=self.element if element is None else element,
            target_max=target_max,
        )

    @staticmethod
    def parse(name: str) -> "Format":
        """Read a format's name, with or without the leading ``fp8_``.

        Args:
            name: e.g. ``"mxfp8"``, ``"block128"``, ``"channel-pow2"``, ``"fp8[all,1,all]"``.

        Raises:
            ValueError: no format is spelled like this; the message lists those with a name.

        >>> Format.parse("channel") == FP8_ROW
        True
        """
        return _parse(name)

    @property
    def min_scale(self) -> float:
        """The smallest scale, which an all-zero block gets: 2^-127 for E8M0, else 2^-126."""
        return 2.0**-127 if self.scale_dtype == torch.float8_e8m0fnu else 2.0**-126

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the COMPACT scale of data of this shape: ``ceil(shape / block)``.

        Args:
            shape: shape of the data, 2-D (rows, columns) or 3-D (experts, rows, columns).

        Raises:
            ValueError: the shape has another rank.
        """
        self._check_rank(shape)
        block = self.block[-len(shape) :]
        return tuple(1 if b == ALL else -(-size // b) for size, b in zip(shape, block, strict=True))

    def _check_rank(self, shape: tuple[int, ...]) -> None:
        if len(shape) not in (2, 3):
            needs = "(rows, columns) or (experts, rows, columns)"
            raise ValueError(refusal(f"Format {self.name}", "shape", f"is {tuple(shape)}", needs))


def _default_target(element: Element, rounding: Rounding) -> float:
    return element.pow2_target if rounding == Rounding.POW2 else element.max


def _spell(format: Format) -> str:
    is_mx = format.scale_dtype == torch.float8_e8m0fnu
    base = _BASE_NAMES.get((format.scale_dtype, format.block))
    if base is None:
        sizes = ",".join("all" if size == ALL else str(size) for size in format.block)
        base = f"{'mxfp8' if is_mx else 'fp8'}[{sizes}]"
    parts = [base]
    if format.element != E4M3FN:
        parts.append(format.element.name)
    if format.rounding == Rounding.POW2 and not is_mx:
        parts.append("pow2")
    if format.target_max != _default_target(format.element, format.rounding):
        parts.append(f"max{format.target_max!r}".removesuffix(".0"))
    return "-".join(parts)


@cache
def _parse(name: str) -> Format:
    """The format spelled `name`. Kept: ops parse names at every call."""
    base, *parts = name.strip().lower().split("-")
    if base not in _BASE_KEYS and f"fp8_{base}" in (_BASE_KEYS | _ALIASES):
        base = f"fp8_{base}"
    key = _BASE_KEYS.get(_ALIASES.get(base, base)) or _parse_custom_block(base)
    if key is None:
        raise ValueError(_unknown_name(name))
    scale_dtype, block = key
    rounding = Rounding.POW2 if scale_dtype == torch.float8_e8m0fnu else Rounding.EXACT
    element, target_max = E4M3FN, 0.0
    for part in parts:
        if part in _ELEMENTS:
            element = _ELEMENTS[part]
        elif part == "pow2":
            rounding = Rounding.POW2
        elif re.fullmatch(r"max\d+(\.\d+)?", part):
            target_max = float(part.removeprefix("max"))
        else:
            raise ValueError(_unknown_name(name))
    return Format(block, scale_dtype, element, rounding, target_max)


def _parse_custom_block(base: str) -> tuple[torch.dtype, Block] | None:
    match = _CUSTOM_BLOCK.fullmatch(base)
    if match is None:
        return None
    sizes = [ALL if text == "all" else int(text) for text in match.groups()[1:]]
    dtype = torch.float8_e8m0fnu if match.group(1) == "mxfp8" else torch.float32
    return dtype, (sizes[0], sizes[1], sizes[2])


def _unknown_name(name: str) -> str:
    known = ", ".join([*_BASE_KEYS, *_ALIASES])
    do = "add -pow2, -e5m2 or -e4m3_240 for those variants"
    return refusal("Format.parse", "name", f"is {name!r}", f"one of: {known}", do)


FP8_TENSOR: Final = Format((ALL, ALL, ALL))
FP8_EXPERT: Final = Format((1, ALL, ALL))
FP8_ROW: Final = Format((1, 1, ALL))
FP8_TOKEN: Final = FP8_ROW
FP8_CHANNEL: Final = FP8_ROW
FP8_GROUP128: Final = Format((1, 1, 128))
FP8_BLOCK128: Final = Format((1, 128, 128))
FP8_COLUMN128: Final = Format((1, 128, 1))
MXFP8: Final = Format((1, 1, 32), torch.float8_e8m0fnu, rounding=Rounding.POW2)
MXFP8_E5M2: Final = MXFP8.derive(element=E5M2)
MXFP8_2D: Final = Format((1, 32, 32), torch.float8_e8m0fnu, rounding=Rounding.POW2)

FORMATS: Final = tuple(Format.parse(name) for name in _BASE_KEYS)


def is_gemm_pair(weight: Format | None, activation: Format | None) -> bool:
    """Whether a grouped GEMM may multiply these: both scales change at the same places along K.

    Weight-only (``activation=None``) takes any weight; a quantised activation needs a quantised
    weight.

    >>> is_gemm_pair(FP8_BLOCK128, FP8_GROUP128), is_gemm_pair(FP8_BLOCK128, FP8_TOKEN)
    (True, False)
    """
    if activation is None:
        return True
    return weight is not None and weight.block[2] == activation.block[2]
