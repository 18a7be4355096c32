"""Configurations of kernels, frozen."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How a kernel that moves bytes cuts its matrix.

    Attributes:
        rows, columns: of a tile; powers of two.
        num_warps: of a program.
    """

    rows: int
    columns: int
    num_warps: int = 4


@dataclass(frozen=True, slots=True)
class PermuteConfig:
    """How a kernel that moves rows between tokens and slots cuts its work.

    Attributes:
        columns: of a row that one program moves; a power of two.
        slots: whose scales one program moves; a power of two.
        scales: of a row that it moves at once; a power of two.
        num_warps: of a program.
    """

    columns: int
    slots: int = 32
    scales: int = 32
    num_warps: int = 4
