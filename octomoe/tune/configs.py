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


@dataclass(frozen=True, slots=True)
class RoutingConfig:
    """How `build_routing` cuts the choices and the experts.

    Attributes:
        choices: that are compared with each other; a power of two.
        bins: experts that are counted at once; a power of two.
        rounds: of `choices` that make a block, counted one after another by one program.
        is_single: one launch does everything; it ignores `rounds`.
        sample: choices that such a launch counts at once; a power of two.
        sum_blocks, sum_experts: counts that are summed at once; powers of two.
        num_warps: of a program; no more threads than choices, which are then counted once each.
    """

    choices: int = 64
    bins: int = 256
    rounds: int = 1
    is_single: bool = False
    sample: int = 1024
    sum_blocks: int = 512
    sum_experts: int = 4
    num_warps: int = 2

    @property
    def slots(self) -> int:
        """Slots that a program clears at once: 16 bytes per thread."""
        return 4 * self.choices

    @property
    def padding(self) -> int:
        """Slots behind each of `bins` experts that a program clears at once: as registers allow."""
        return min(max(8192 // self.bins, 1), 32)
