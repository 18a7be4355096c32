"""Which configuration to take for a problem."""

from octomoe.core.formats import ALL, Block, Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.tune.configs import PermuteConfig, RoutingConfig, TileConfig

# Elements of a tile: enough bytes in flight to hide memory latency, few enough for registers.
_TILE_ELEMENTS = 8192
_MAX_COLUMNS = 16384
# How small the tiles of a small matrix may become.
_FEWEST_ELEMENTS = 1024
# Of a kernel that evaluates activations: threads of a program, and elements that each of them holds
# (with 64 in float32, gate and up beside them, registers run out).
_COMPUTING_THREADS = 256
_ACTIVATED_PER_THREAD = 32
# Bytes of a row that one program moves: one load of 16 bytes per thread, twice.
_ROW_BYTES = 4096
# A counting block of choices, the most blocks whose counts are summed, and the most experts whose
# counts a program can hold.
_CHOICES = 64
_MAX_BLOCKS = 1024
_MAX_BINS = 4096
# Where one launch stops: each of its programs counts all choices, in time choices x bins, and all
# of them clear the slots, with few stores in flight.
_SINGLE_COUNTS = 2048 * 256
_SINGLE_SLOTS = 65536


def quantize_config(
    shape: tuple[int, ...], format: Format, layout: ScaleLayout = COMPACT, *, sms: int = 0
) -> TileConfig:
    """How to cut data of `shape`; a tile holds whole scale blocks where `format` allows.

    A small matrix is cut finer, to have work for all of `sms` multiprocessors.

    >>> from octomoe.core.formats import FP8_GROUP128
    >>> quantize_config((4096, 7168), FP8_GROUP128)
    TileConfig(rows=8, columns=1024, num_warps=4)
    """
    num_columns = shape[-1]
    block_experts, block_rows, block_columns = format.block
    widest = _power_of_two(num_columns)
    if block_rows == ALL and block_columns == ALL:
        columns = min(2048, widest)
        return TileConfig(_TILE_ELEMENTS // columns, columns, num_warps=8)
    # Sizes that are no powers of two, or too large, are nobody's tile: two kernels serve them.
    fewest_rows, fewest_columns = _as_tile(block_rows), _as_tile(block_columns)
    # Scales that lie row after row are written in runs of as many as a tile has rows.
    columns = 1024 if block_rows == 1 and layout == COMPACT else 256
    if fewest_rows > 1:
        columns = max(_TILE_ELEMENTS // fewest_rows, fewest_columns)
    if block_experts == 1 and block_columns == ALL and num_columns <= _MAX_COLUMNS:
        fewest_columns = columns = widest
    columns = max(min(columns, widest), fewest_columns)
    rows = max(_TILE_ELEMENTS // columns, fewest_rows)
    rows, columns = _cut_finer(shape, rows, columns, fewest_rows, fewest_columns, sms)
    return TileConfig(rows, columns, _warps(rows * columns))


def _cut_finer(
    shape: tuple[int, ...], rows: int, columns: int, fewest_rows: int, fewest_columns: int, sms: int
) -> tuple[int, int]:
    """Rows and columns of smaller tiles, until there are two for each multiprocessor."""
    *_, num_rows, num_columns = shape
    while -(-num_rows // rows) * -(-num_columns // columns) < 2 * sms:
        if rows > fewest_rows and rows * columns > _FEWEST_ELEMENTS:
            rows //= 2
        elif columns > fewest_columns and rows * columns > _FEWEST_ELEMENTS:
            columns //= 2
        else:
            break
    return rows, columns


def _warps(num_elements: int) -> int:
    """Warps of a program: 64 elements per thread, which on an H200 hide the latency of memory."""
    return max(min(num_elements // (64 * 32), 4), 1)


def _as_tile(size: int) -> int:
    return size if 0 < size <= 256 and size & (size - 1) == 0 else 1


def activation_quantize_config(
    shape: tuple[int, ...], format: Format, layout: ScaleLayout = COMPACT, *, sms: int = 0
) -> TileConfig:
    """How to cut an activation's result of `shape`, finer if few tiles serve `sms` multiprocessors.

    >>> from octomoe.core.formats import FP8_BLOCK128, FP8_ROW
    >>> activation_quantize_config((4096, 2048), FP8_ROW)
    TileConfig(rows=4, columns=2048, num_warps=8)
    >>> activation_quantize_config((4096, 2048), FP8_BLOCK128)
    TileConfig(rows=128, columns=128, num_warps=16)
    """
    return _computed_tile(shape, format.block, layout, _ACTIVATED_PER_THREAD, sms)


def activation_bwd_config(
    shape: tuple[int, ...], format: Format | None, layout: ScaleLayout = COMPACT, *, sms: int = 0
) -> TileConfig:
    """How to cut an activation's result of `shape`, to compute gradients of its gate and up.

    >>> activation_bwd_config((4096, 2048), None)
    TileConfig(rows=8, columns=512, num_warps=8)
    """
    block = (1, 1, 1) if format is None else format.block
    return _computed_tile(shape, block, layout, _ACTIVATED_PER_THREAD // 2, sms)


def _computed_tile(
    shape: tuple[int, ...], block: Block, layout: ScaleLayout, per_thread: int, sms: int
) -> TileConfig:
    """A tile of whole scale blocks if it can be, for a kernel that holds float32 in registers."""
    num_columns = shape[-1]
    _, block_rows, block_columns = block
    elements = _COMPUTING_THREADS * per_thread
    fewest_rows, fewest_columns = _as_tile(block_rows), _as_tile(block_columns)
    if block_rows == 1 and block_columns == ALL and num_columns <= _MAX_COLUMNS:
        columns = fewest_columns = _power_of_two(num_columns)
    else:
        # Scales that lie row after row are written in runs of as many as a tile has rows.
        widest = min(512 if layout == COMPACT else 256, _power_of_two(num_columns))
        columns = max(min(widest, elements // fewest_rows), fewest_columns)
    rows = max(elements // columns, fewest_rows)
    rows, columns = _cut_finer(shape, rows, columns, fewest_rows, fewest_columns, sms)
    num_warps = rows * columns // (32 * per_thread)
    return TileConfig(rows, columns, min(max(num_warps, 1), 32))


def permute_config(num_columns: int, item_bytes: int, num_scales: int = 0) -> PermuteConfig:
    """How to move rows of `num_columns` elements of `item_bytes` bytes with `num_scales` scales.

    >>> permute_config(7168, item_bytes=1, num_scales=56)
    PermuteConfig(columns=4096, slots=32, scales=32, num_warps=8)
    """
    columns = min(_power_of_two(num_columns), _ROW_BYTES // item_bytes)
    side = 64 if num_scales > 64 else 32
    return PermuteConfig(columns, side, side, num_warps=8 if item_bytes == 1 else 4)


def routing_config(num_choices: int, num_experts: int, num_slots: int) -> RoutingConfig:
    """How to sort `num_choices` choices among `num_experts` experts.

    >>> routing_config(64, num_experts=256, num_slots=64).is_single
    True
    >>> routing_config(2**20, num_experts=256, num_slots=2**20).rounds
    16
    """
    # Bins below a warp's threads are no cheaper.
    bins = min(max(_power_of_two(num_experts), 32), _MAX_BINS)
    counts = num_choices * max(num_experts, 256)
    if counts <= _SINGLE_COUNTS and num_slots <= _SINGLE_SLOTS:
        sample = min(max(_power_of_two(num_choices), _CHOICES), 1024)
        return RoutingConfig(_CHOICES, bins, is_single=True, sample=sample)
    # Few blocks keep the sums short; blocks of half as many choices as experts keep the counts
    # small: two for each choice.
    block = max(-(-num_choices // _MAX_BLOCKS), min(num_experts // 2, num_choices), 1)
    return RoutingConfig(_CHOICES, bins, rounds=_power_of_two(-(-block // _CHOICES)))


def _power_of_two(size: int) -> int:
    """The next power of two.

    >>> _power_of_two(5), _power_of_two(0)
    (8, 1)
    """
    return 1 << max(size - 1, 0).bit_length()
