"""Which configuration to take for a problem."""

from octomoe.core.formats import ALL, Format
from octomoe.tune.configs import PermuteConfig, TileConfig

# Elements of a tile: enough bytes in flight to hide memory latency, few enough for registers.
_TILE_ELEMENTS = 8192
_MAX_COLUMNS = 16384
# Bytes of a row that one program moves: one load of 16 bytes per thread, twice.
_ROW_BYTES = 4096


def quantize_config(shape: tuple[int, ...], format: Format) -> TileConfig:
    """How to cut data of `shape`; a tile holds whole scale blocks where `format` allows.

    >>> from octomoe.core.formats import FP8_GROUP128
    >>> quantize_config((4096, 7168), FP8_GROUP128)
    TileConfig(rows=16, columns=512, num_warps=8)
    """
    *_, num_rows, num_columns = shape
    _, block_rows, block_columns = format.block
    if block_rows == 1 and block_columns == ALL and num_columns <= _MAX_COLUMNS:
        columns = _power_of_two(num_columns)
        rows = max(min(_TILE_ELEMENTS // columns, _power_of_two(num_rows)), 1)
        return TileConfig(rows, columns, 8 if rows * columns >= _TILE_ELEMENTS else 4)
    # Sizes that are no powers of two, or too large, are nobody's tile: two kernels serve them.
    columns = max(min(512, _power_of_two(num_columns)), _as_tile(block_columns))
    rows = max(_TILE_ELEMENTS // columns, _as_tile(block_rows))
    return TileConfig(rows, columns, 8)


def _as_tile(size: int) -> int:
    return size if 0 < size <= 256 and size & (size - 1) == 0 else 1


def permute_config(num_columns: int, item_bytes: int) -> PermuteConfig:
    """How to move rows of `num_columns` elements of `item_bytes` bytes.

    >>> permute_config(7168, item_bytes=2)
    PermuteConfig(columns=2048, slots=32, scales=32, num_warps=4)
    """
    return PermuteConfig(min(_power_of_two(num_columns), _ROW_BYTES // item_bytes))


def _power_of_two(size: int) -> int:
    """The next power of two.

    >>> _power_of_two(5), _power_of_two(0)
    (8, 1)
    """
    return 1 << max(size - 1, 0).bit_length()
