"""Which configuration to take for a problem."""

from dataclasses import replace

from octomoe.core.device import Target
from octomoe.core.formats import ALL, Block, Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.tune.configs import GemmConfig, PermuteConfig, RoutingConfig, TileConfig

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
# Of a row whose product with another is summed at once, 16 elements in a thread: with 32, so many
# registers are used that too few programs are at work to hide the latency of memory.
_SUMMED_COLUMNS = 4096
# Choices of a token that a router makes; where there are more, they come from a mask, and most have
# no slot.
_MOST_CHOSEN = 16
# A counting block of choices, the most blocks whose counts are summed, and the most experts whose
# counts a program can hold.
_CHOICES = 64
_MAX_BLOCKS = 1024
_MAX_BINS = 2048
# Where one launch stops: each of its programs counts all choices, in time choices x bins, and all
# of them clear the slots, with few stores in flight.
_SINGLE_COUNTS = 2048 * 256
_SINGLE_SLOTS = 65536
# Shared memory that a program on sm90 may use.
_SM90_SMEM = 232448


def quantize_config(
    shape: tuple[int, ...],
    format: Format,
    layout: ScaleLayout = COMPACT,
    *,
    is_seeded: bool = False,
    sms: int = 0,
) -> TileConfig:
    """How to cut data of `shape`; a tile holds whole scale blocks where `format` allows.

    A small matrix is cut finer, to have work for all of `sms` multiprocessors.

    >>> from octomoe.core.formats import FP8_GROUP128
    >>> quantize_config((4096, 7168), FP8_GROUP128)
    TileConfig(rows=8, columns=1024, num_warps=4)
    """
    return _plain_tile(shape, format.block, layout, is_seeded, sms)


def quantize_both_config(
    shape: tuple[int, ...],
    row_format: Format,
    column_format: Format,
    *,
    is_seeded: bool = False,
    sms: int = 0,
) -> TileConfig | None:
    """How to cut data of `shape` so that a tile holds whole scale blocks of both formats.

    None where such a tile would be too large: a row of many columns by 128 rows, or 128 x 128 with
    random bits, for which registers do not suffice.

    >>> from octomoe.core.formats import FP8_COLUMN128, FP8_GROUP128, FP8_ROW
    >>> quantize_both_config((4096, 7168), FP8_GROUP128, FP8_COLUMN128)
    TileConfig(rows=128, columns=128, num_warps=16)
    >>> quantize_both_config((4096, 7168), FP8_ROW, FP8_COLUMN128) is None
    True
    """
    block = _common_block(row_format, column_format)
    config = _plain_tile(shape, block, COMPACT, True, sms)
    return config if config.rows * config.columns <= _most_of_both(is_seeded) else None


def _plain_tile(
    shape: tuple[int, ...], block: Block, layout: ScaleLayout, is_heavy: bool, sms: int
) -> TileConfig:
    """A tile of whole scale blocks if it can be, for a kernel that moves bytes.

    A heavy one draws random bits, or writes two formats.
    """
    num_columns = shape[-1]
    block_experts, block_rows, block_columns = block
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
    # 64 elements per thread hide the latency of memory on an H200. Random bits for these would take
    # 242 registers; half of them take 122.
    per_thread, most = (32, 16) if is_heavy else (64, 4)
    return TileConfig(rows, columns, max(min(rows * columns // (per_thread * 32), most), 1))


def _common_block(row_format: Format, column_format: Format) -> Block:
    """The least block that holds whole blocks of both formats, if these are powers of two."""
    experts, rows, columns = (
        ALL if ALL in sizes else max(sizes)
        for sizes in zip(row_format.block, column_format.block, strict=True)
    )
    return experts, rows, columns


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


def activation_quantize_both_config(
    shape: tuple[int, ...],
    row_format: Format,
    column_format: Format,
    *,
    is_seeded: bool = False,
    sms: int = 0,
) -> TileConfig | None:
    """How to cut an activation's result of `shape` for two formats; None as for quantising alone.

    >>> from octomoe.core.formats import FP8_COLUMN128, FP8_GROUP128
    >>> activation_quantize_both_config((4096, 2048), FP8_GROUP128, FP8_COLUMN128)
    TileConfig(rows=128, columns=128, num_warps=16)
    """
    block = _common_block(row_format, column_format)
    config = _computed_tile(shape, block, COMPACT, _ACTIVATED_PER_THREAD, sms)
    return config if config.rows * config.columns <= _most_of_both(is_seeded) else None


def activation_bwd_config(
    shape: tuple[int, ...], format: Format | None, layout: ScaleLayout = COMPACT, *, sms: int = 0
) -> TileConfig:
    """How to cut an activation's result of `shape`, to compute gradients of its gate and up.

    >>> activation_bwd_config((4096, 2048), None)
    TileConfig(rows=8, columns=512, num_warps=8)
    """
    block = (1, 1, 1) if format is None else format.block
    return _computed_tile(shape, block, layout, _ACTIVATED_PER_THREAD // 2, sms)


def activation_bwd_both_config(
    shape: tuple[int, ...],
    row_format: Format,
    column_format: Format,
    *,
    is_seeded: bool = False,
    sms: int = 0,
) -> TileConfig | None:
    """The same for gradients of the gate and up, of `shape` each.

    >>> from octomoe.core.formats import MXFP8, MXFP8_2D
    >>> activation_bwd_both_config((4096, 2048), MXFP8, MXFP8_2D)
    TileConfig(rows=32, columns=128, num_warps=8)
    """
    block = _common_block(row_format, column_format)
    config = _computed_tile(shape, block, COMPACT, _ACTIVATED_PER_THREAD // 2, sms)
    if config.rows * config.columns > _TILE_ELEMENTS:
        # Then the gate and up have programs of their own.
        config = _computed_tile(shape, block, COMPACT, _ACTIVATED_PER_THREAD, sms)
    return config if config.rows * config.columns <= _most_of_both(is_seeded) else None


def _most_of_both(is_seeded: bool) -> int:
    """Elements of the largest tile of which registers can make two formats."""
    return _TILE_ELEMENTS if is_seeded else 2 * _TILE_ELEMENTS


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
    # With 32, threads have 64 registers each, and AMD's programs too many threads.
    return TileConfig(rows, columns, min(max(num_warps, 1), 16))


def permute_config(
    num_columns: int,
    item_bytes: int,
    num_scales: int = 0,
    num_choices: int = 1,
    *,
    target: Target | None = None,
) -> PermuteConfig:
    """How to move rows of `num_columns` elements of `item_bytes` bytes with `num_scales` scales.

    >>> permute_config(7168, item_bytes=1, num_scales=56).columns
    4096
    """
    columns = min(_power_of_two(num_columns), _ROW_BYTES // item_bytes)
    side = 128 if num_scales > 64 else 32
    return PermuteConfig(
        columns,
        slots=side,
        scales=side,
        num_warps=8 if item_bytes == 1 else 4,
        is_sparse=num_choices > _MOST_CHOSEN,
        is_chained=target is not None and target.arch >= 90,
    )


def unpermute_bwd_config(num_columns: int) -> PermuteConfig:
    """How to take gradients of rows of `num_columns` elements.

    >>> unpermute_bwd_config(7168).scales
    64
    """
    columns = min(max(_power_of_two(num_columns), 32), _SUMMED_COLUMNS)
    num_warps = max(columns // 1024, 1)
    return PermuteConfig(columns, scales=16 * num_warps, num_warps=num_warps, is_sparse=True)


def routing_config(
    num_choices: int, num_experts: int, num_slots: int, target: Target | None = None
) -> RoutingConfig:
    """How to sort `num_choices` choices among `num_experts` experts on `target`.

    >>> routing_config(64, num_experts=256, num_slots=64).is_single
    True
    >>> routing_config(2**20, num_experts=256, num_slots=2**20).rounds
    16
    """
    target = target or Target("cpu")
    # A warp of AMD's has twice the threads.
    num_warps = 1 if target.is_hip else 2
    # Bins below a warp's threads are no cheaper; with 32, Triton 3.6 spilled a register.
    bins = min(max(_power_of_two(num_experts), 64), _MAX_BINS)
    counts = num_choices * max(num_experts, 256)
    if counts <= _SINGLE_COUNTS and num_slots <= _SINGLE_SLOTS:
        sample = min(max(_power_of_two(num_choices), _CHOICES), 512)
        return RoutingConfig(
            _CHOICES,
            bins,
            is_single=True,
            sample=sample,
            num_warps=num_warps,
            is_chained=target.arch >= 90,
        )
    # Few blocks keep the sums short; blocks of half as many choices as experts keep the counts
    # small: two for each choice.
    block = max(-(-num_choices // _MAX_BLOCKS), min(num_experts // 2, num_choices), 1)
    rounds = _power_of_two(-(-block // _CHOICES))
    is_chained = target.arch >= 90
    return RoutingConfig(_CHOICES, bins, rounds, num_warps=num_warps, is_chained=is_chained)


def grouped_gemm_config(
    num_rows: int,
    num_experts: int,
    num_columns: int,
    *,
    item_bytes: tuple[int, int],
    span: int = 0,
    is_turned: bool = False,
    is_scaled_by_column: bool = False,
    is_odd: bool = False,
    target: Target | None = None,
) -> GemmConfig:
    """How to cut ``[num_rows, num_columns]``, of which each expert has its own rows.

    Args:
        num_rows, num_experts, num_columns: of the result.
        item_bytes: per element of the rows and of the weights.
        span: of the depth, over which all scales are constant; 0 for all of it.
        is_turned: whether neighbouring weights belong to neighbouring columns.
        is_scaled_by_column: whether products have a scale per column.
        is_odd: whether elements are loaded one by one.
        target: what it runs on.

    >>> grouped_gemm_config(16384, 8, 4096, item_bytes=(1, 1), span=128).depth
    128
    >>> grouped_gemm_config(64, 128, 4096, item_bytes=(1, 1), span=32).parts
    4
    """
    sms = target.sms if target else 0
    num_groups = min(num_rows, num_experts)
    rows_each = num_rows / max(num_groups, 1)
    depth = _depth(item_bytes, span)
    if max(item_bytes) == 4 or is_odd:
        config = _untensored(item_bytes)
    elif rows_each <= 32 and not (is_turned and min(item_bytes) == 1):
        # Bound by the bytes of the weights: several programs per multiprocessor load them.
        rows = 16 if rows_each <= 16 else 32
        parts, depth = (128 // span, 128) if span in (32, 64) else (1, depth)
        config = GemmConfig(rows, 128, depth, parts, group=1, is_swapped=True)
        num_tiles = (num_groups + num_rows // rows) * -(-num_columns // 128)
        if num_tiles < 3 * sms:
            # Or few, with more loads in flight.
            config = replace(config, columns=64, num_stages=6)
    elif is_scaled_by_column and span % depth == 0:
        config = GemmConfig(64 if rows_each <= 64 else 128, 64, depth, num_warps=8)
    elif rows_each <= 64:
        config = GemmConfig(64, 128, depth)
    else:
        config = GemmConfig(128, 128, depth, num_warps=8)
    return _fitting(config, item_bytes, span, target)


def grouped_gemm_wgrad_config(
    *,
    item_bytes: tuple[int, int],
    span: int = 0,
    is_scaled_by_column: bool = False,
    is_odd: bool = False,
    target: Target | None = None,
) -> GemmConfig:
    """How to cut what a grouped GEMM sums over the slots of an expert.

    Args:
        item_bytes: per element of both sides.
        span: of slots, over which all scales are constant; 0 for all of them.
        is_scaled_by_column: whether products have a scale per column.
        is_odd: whether elements are loaded one by one.
        target: what it runs on.

    >>> grouped_gemm_wgrad_config(item_bytes=(1, 1), span=128).depth
    64
    """
    depth = _depth(item_bytes, span)
    if max(item_bytes) == 4 or is_odd:
        config = _untensored(item_bytes)
    elif is_scaled_by_column and span % depth == 0:
        config = GemmConfig(128, 64, depth, num_warps=8)
    else:
        # Bytes become bf16 on their way.
        config = GemmConfig(128, 128, 64, num_warps=8)
    return _fitting(config, item_bytes, span, target, fewest_bytes=2)


def _untensored(item_bytes: tuple[int, int]) -> GemmConfig:
    """For float32, which no tensor core multiplies, or elements that are loaded one by one."""
    if max(item_bytes) < 4:
        return GemmConfig(64, 64, 32, num_stages=2)
    return GemmConfig(64, 64 if min(item_bytes) == 4 else 32, 16, num_stages=2)


def _depth(item_bytes: tuple[int, int], span: int) -> int:
    """Of a step of a product: 128 bytes of what tensor cores multiply."""
    return 128 if item_bytes == (1, 1) and span % 128 == 0 else 64


def _fitting(
    config: GemmConfig,
    item_bytes: tuple[int, int],
    span: int,
    target: Target | None,
    fewest_bytes: int = 1,
) -> GemmConfig:
    """A configuration with as many stages, then columns, as shared memory holds.

    Tensor cores take `fewest_bytes` per element at least.
    """
    smem = (target.smem if target else 0) or _SM90_SMEM
    # Values under their scales are bf16, or float32 at worst.
    is_scaled_before = span % (config.depth // config.parts) != 0
    product_bytes = 4 if is_scaled_before else max(fewest_bytes, *item_bytes)
    smaller = (
        replace(config, columns=config.columns >> halvings, num_stages=stages)
        for halvings in range(config.columns.bit_length() - 4)
        for stages in range(config.num_stages, 0, -1)
    )
    return next(c for c in smaller if c.is_legal(*item_bytes, product_bytes, smem))


def _power_of_two(size: int) -> int:
    """The next power of two.

    >>> _power_of_two(5), _power_of_two(0)
    (8, 1)
    """
    return 1 << max(size - 1, 0).bit_length()
