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
        is_sparse: choices without a slot are skipped, not read in vain.
        is_chained: rows move while a kernel before brings their scales to rows.
    """

    columns: int
    slots: int = 32
    scales: int = 32
    num_warps: int = 4
    is_sparse: bool = False
    is_chained: bool = False


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
        sum_warps: of a program that sums.
        place_warps: of a program that turns ranks into slots.
        num_warps: of any other; no more threads than choices, which are then counted once each.
        is_chained: kernels are launched before their predecessors end.
    """

    choices: int = 64
    bins: int = 256
    rounds: int = 1
    is_single: bool = False
    sample: int = 1024
    sum_blocks: int = 512
    sum_experts: int = 4
    sum_warps: int = 8
    place_warps: int = 4
    num_warps: int = 2
    is_chained: bool = False

    @property
    def block(self) -> int:
        """Choices that one program counts."""
        return self.rounds * self.choices

    @property
    def placed(self) -> int:
        """Choices of a block that one program places at once; a power of two."""
        return min(1 << (self.block - 1).bit_length(), 16 * self.choices)

    @property
    def slots(self) -> int:
        """Slots that a program clears at once: 16 bytes per thread."""
        return 4 * self.choices

    @property
    def padding(self) -> int:
        """Slots behind each of `bins` experts that a program clears at once: as registers allow."""
        return min(max(1024 // self.bins, 1), 8)


@dataclass(frozen=True, slots=True)
class ExpertTileConfig:
    """How one half of a layer of experts is cut.

    Attributes:
        rows: slots of a tile, all of one expert; a power of two.
        columns: of a tile, rows of weights; a power of two.
        num_warps: of a program.
        num_stages: loads in flight.
        unroll: steps along the depth that are loaded at once (up).
        splits: parts of the depth, each a program's (up).
        tiles: that a program computes one after another (down).
        held: the longest depth whose rows a program keeps for all of its tiles; a single tile's
            weights are loaded before there are rows (down).
    """

    rows: int
    columns: int
    num_warps: int = 4
    num_stages: int = 3
    unroll: int = 1
    splits: int = 1
    tiles: int = 1
    held: int = 0

    def is_legal(self, row_bytes: int, weight_bytes: int, parts: int, smem: int) -> bool:
        """Whether it can run.

        Args:
            row_bytes, weight_bytes: of an element.
            parts: gate and up rows are two.
            smem: bytes of shared memory that a program may use.
        """
        columns = self.columns * parts
        loads = (
            self.num_stages * self.unroll * 128 * (self.rows * row_bytes + columns * weight_bytes)
        )
        if self.held:
            num_stages = self.num_stages if self.tiles > 1 else 1
            loads = self.held * (self.rows * row_bytes + num_stages * columns * weight_bytes)
        # Bytes that meet wider rows lie there once more.
        converted = 128 * columns * row_bytes if row_bytes != weight_bytes else 0
        return max(loads + converted, 4 * self.rows * columns) <= smem


@dataclass(frozen=True, slots=True)
class FusedMoeConfig:
    """How `fused_moe` runs.

    Attributes:
        up, down: how the two halves are cut.
        is_swapped: weight rows take the side of the tensor core's tile that has 64 at least.
        has_descriptors: weights are loaded by TMA.
        is_chained: kernels are launched before their predecessors end.
        combined: columns that a program of the combine sums.
    """

    up: ExpertTileConfig
    down: ExpertTileConfig
    is_swapped: bool = False
    has_descriptors: bool = False
    is_chained: bool = False
    combined: int = 1024

    @property
    def rows(self) -> int:
        """What the slots of an expert are a multiple of."""
        return max(self.up.rows, self.down.rows)


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """How a grouped GEMM cuts its work.

    Attributes:
        rows, columns: of a tile of the result.
        depth: of a step of the sum.
        parts: of a step; a scale that is constant over a part multiplies its product.
        num_warps: of a program.
        num_stages: steps that lie in shared memory at once.
        group: tiles of rows whose programs run side by side.
        is_swapped: columns take that side of the tensor core's tile which has 64 at least.
    """

    rows: int
    columns: int
    depth: int
    parts: int = 1
    num_warps: int = 4
    num_stages: int = 3
    group: int = 8
    is_swapped: bool = False

    def is_legal(self, row_bytes: int, column_bytes: int, product_bytes: int, smem: int) -> bool:
        """Whether it can run.

        Args:
            row_bytes, column_bytes: of an element of each side as it is loaded.
            product_bytes: of an element as tensor cores take it.
            smem: bytes of shared memory that a program may use.
        """
        part = self.depth // self.parts
        sizes = (self.rows, self.columns, self.depth, self.parts, self.num_warps)
        is_cut = all(size > 0 and size & (size - 1) == 0 for size in sizes)
        # 16 bytes of out are turned together; an instruction takes 32 bytes of the depth.
        is_cut &= min(self.rows, self.columns) >= 16 and part * product_bytes >= 32
        step = self.rows * row_bytes + self.columns * column_bytes
        loads = self.num_stages * self.depth * step
        # What is converted or turned lies there once more; the result comes when all that is gone.
        converted = part * (self.rows + self.columns) * product_bytes
        result = 4 * self.rows * self.columns
        return is_cut and max(loads + converted, result) <= smem


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How Hopper's kernels for many rows run.

    Attributes:
        rows: slots of a tile, 64 or 128: two programs on a multiprocessor, or one.
        up_stages, down_stages: steps along the depth that lie in shared memory at once.
        group: blocks of slots that take turns over all columns.
        combined: columns that a program of the combine sums.
        is_chained: kernels are launched before their predecessors end.
    """

    rows: int
    up_stages: int
    down_stages: int
    group: int = 8
    combined: int = 1024
    is_chained: bool = True

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds."""
        return 128 // self.rows


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How Hopper's kernels for few rows run.

    Attributes:
        rows: slots of a tile: 8 or 16.
        columns: rows of w2 of a tile, 128 or 256.
        splits: parts of the depth of w13, each a tile's: 1, 2, 4 or 8.
        up_stages, down_stages: steps along the depth that lie in shared memory at once.
        group: of these steps, whose weights are asked for together.
        resident: programs that a multiprocessor is to hold.
        combined: columns that a program of the combine sums.
        is_encoded: rows are quantised by a kernel before, not on their way.
        is_sorted: a routing is built before; otherwise every program sorts the choices, if these
            are no more than 128.
        down_splits: the same of the depth of w2.
    """

    rows: int = 8
    columns: int = 128
    splits: int = 1
    up_stages: int = 5
    down_stages: int = 5
    group: int = 2
    resident: int = 2
    combined: int = 256
    is_encoded: bool = False
    is_sorted: bool = False
    down_splits: int = 1
