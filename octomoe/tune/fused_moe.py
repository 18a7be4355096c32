"""Which configuration `fused_moe` takes: by the rows that an expert gets on average."""

from dataclasses import replace
from functools import lru_cache
from math import ceil, floor
from typing import Final

from octomoe.core.device import Target
from octomoe.tune.configs import DecodeConfig, ExpertTileConfig, FusedMoeConfig, PrefillConfig

# Rows of an expert up to which a tile has 16 and 32 slots, and up to which it has 64 in any case.
_FEW, _SOME, _MANY = 12, 24, 64
# Widths up to which the down-projection of few rows takes two tiles per program.
_NARROW = 256
# Rows of an expert from which Hopper's kernels for many rows are faster, and from which they are so
# with tiles of 128.
_PREFILL, _WIDE = 100, 200
PREFILL_CONFIGS: Final = (
    PrefillConfig(64, up_stages=2, down_stages=2),
    PrefillConfig(128, up_stages=4, down_stages=3),
)
# The same for operands that meet in bf16.
_WIDE_FEW, _WIDE_MANY = 24, 200
WIDE_CONFIGS: Final = (
    PrefillConfig(64, up_stages=4, down_stages=4),
    PrefillConfig(128, up_stages=3, down_stages=3),
)
# Rows of an expert up to which Hopper's kernels for few rows are faster, also if it is narrow, and
# up to which a tile of theirs has 8 rows.
_DECODE, _DECODE_NARROW, _DECODE_FEW = 2.25, 12, 4
# The first of them where tensor cores take rows in so many pieces.
_DECODE_PIECES: Final = {2: 14, 4: 6}
# Choices that programs sort by themselves, and programs that keep memory busy.
_SORTED, _BUSY = 32, 80
# A depth of w2 of which parts are worth adding.
_LONG = 1024
# What each doubling of the parts of a depth costs: their sums are written and read.
_COST = 1.3
# The longest depth of the down-projection whose rows fit beside its weights, and the longest for
# which a program brings all weights of a tile before there are rows.
_SHORT, _EARLY = 384, 768


def fused_moe_config(
    num_tokens: int,
    num_choices: int,
    num_experts: int,
    width: int,
    *,
    has_steps: bool = True,
    row_bytes: int = 1,
    weight_bytes: int = 1,
    target: Target,
) -> FusedMoeConfig:
    """How to run a layer of experts of `width` F for tokens with `num_choices` experts each.

    Elements of x and h have `row_bytes`, those of weights `weight_bytes`. `has_steps`: h gets a
    scale for every 128 columns.

    Measured on an H200 with 128 x 128 scales; other formats and devices take the same tiles.

    >>> h200 = Target("NVIDIA H200", arch=90, sms=132)
    >>> fused_moe_config(1, 8, num_experts=128, width=384, target=h200).up.splits
    4
    >>> fused_moe_config(8192, 8, num_experts=128, width=768, target=h200).up.rows
    128
    """
    sizes = (num_tokens, num_choices, num_experts, width)
    return _fused_moe_config(*sizes, has_steps, row_bytes, weight_bytes, target)


@lru_cache(maxsize=1024)
def _fused_moe_config(
    num_tokens: int,
    num_choices: int,
    num_experts: int,
    width: int,
    has_steps: bool,
    row_bytes: int,
    weight_bytes: int,
    target: Target,
) -> FusedMoeConfig:
    """Kept: without a graph, every call of the op asks."""
    rows = num_tokens * num_choices / max(num_experts, 1)
    active = num_experts * (1 - (1 - 1 / max(num_experts, 1)) ** (num_tokens * num_choices))
    sms = max(target.sms, 1)
    if rows <= _FEW:
        up = _up_of_few(active * ceil(width / 64), sms)
        if rows > _FEW / 2 and width <= 128:
            # One tile has all of a scale's columns: it activates and quantises them itself.
            up = ExpertTileConfig(16, 128, num_stages=2, unroll=2)
        # Weights that wait to be converted fill the registers.
        early = _EARLY if row_bytes == weight_bytes else 0
        down = _down_of_few(num_tokens, width, early)
    elif rows <= _SOME:
        up = ExpertTileConfig(32, 64, num_stages=3)
        down = ExpertTileConfig(32, 128, num_stages=3, tiles=4)
    else:
        programs = active * ceil(rows / 64) * ceil(width / 128)
        up = _up_of_many(programs, sms)
        if rows > _MANY and width > 128:
            up = ExpertTileConfig(128, 128, num_warps=8, num_stages=4)
        if not has_steps:
            # Without scales between them, products of gate and up are held at once: of 128 columns
            # they take more registers than there are.
            up = replace(up, columns=64, num_stages=3)
        down = ExpertTileConfig(64, 128, num_stages=3, tiles=4)
        if width <= _SHORT:
            down = ExpertTileConfig(64, 64, num_stages=3, tiles=16, held=_SHORT)
    has_tma = target.arch >= 90
    return FusedMoeConfig(
        _legal(up, row_bytes, weight_bytes, 2, target.smem),
        _legal(down, row_bytes, weight_bytes, 1, target.smem),
        is_swapped=rows <= _SOME,
        has_descriptors=has_tma,
        is_chained=has_tma,
        combined=_combined(num_tokens),
    )


def prefill_config(
    num_tokens: int, num_choices: int, num_experts: int, target: Target
) -> PrefillConfig | None:
    """How Hopper's kernels for many rows run; None where an expert has too few for them.

    >>> prefill_config(8192, 8, 128, Target("NVIDIA H200", arch=90, sms=132)).rows
    128
    """
    rows = num_tokens * num_choices / max(num_experts, 1)
    if target.arch != 90 or rows < _PREFILL:
        return None
    return PREFILL_CONFIGS[rows >= _WIDE]


def wide_config(
    num_tokens: int, num_choices: int, num_experts: int, target: Target, *, has_room: bool
) -> PrefillConfig | None:
    """The same for operands that meet in bf16; `has_room`: registers hold a tile of 128.

    >>> wide_config(512, 8, 128, Target("NVIDIA H200", arch=90, sms=132), has_room=True).rows
    64
    """
    rows = num_tokens * num_choices / max(num_experts, 1)
    if target.arch != 90 or rows < _WIDE_FEW:
        return None
    return WIDE_CONFIGS[rows >= _WIDE_MANY and has_room]


def decode_config(
    num_tokens: int,
    num_choices: int,
    num_experts: int,
    width: int,
    depth: int,
    target: Target,
    *,
    pieces: int = 1,
) -> DecodeConfig | None:
    """How Hopper's kernels for few rows run; None where an expert has too many for them.

    `width`, `depth`: F and D. `pieces`: that tensor cores take a row in, 2 of bf16, 4 of MXFP8.

    >>> h200 = Target("NVIDIA H200", arch=90, sms=132)
    >>> decode_config(1, 10, 512, 128, 2048, h200).splits
    4
    >>> decode_config(32, 8, 128, 384, 4096, h200).is_sorted
    True
    """
    choices = num_tokens * num_choices
    rows = choices / max(num_experts, 1)
    most = _DECODE_NARROW if width <= 128 else _DECODE
    most = _DECODE_PIECES.get(pieces, most)
    if target.arch != 90 or choices == 0 or rows > most:
        return None
    few = rows <= _DECODE_FEW
    if choices > _SORTED and pieces > 1:
        is_narrow = few or pieces > 2
        return DecodeConfig(
            8 if is_narrow else 16,
            256 if is_narrow else 128,
            up_stages=5,
            down_stages=3 if is_narrow else 4,
            combined=_combined(num_tokens),
            is_sorted=True,
        )
    if choices > _SORTED:
        return DecodeConfig(
            8 if few else 16,
            256,
            up_stages=6 if few else 5,
            down_stages=3,
            combined=_combined(num_tokens),
            is_encoded=True,
            is_sorted=True,
        )
    splits = 1
    while splits < 8 and choices * ceil(width / 64) * splits < _BUSY and depth >= 512 * splits:
        splits *= 2
    down_splits, is_long = 1, width >= _LONG
    while choices * ceil(depth / 128) * down_splits < 2 * _BUSY and width >= _LONG * down_splits:
        down_splits *= 2
    down_splits = min(down_splits, 8)
    return DecodeConfig(
        8,
        128,
        splits,
        up_stages=4,
        down_stages=5 if is_long else 2,
        combined=128,
        down_splits=down_splits,
    )


def _legal(
    tile: ExpertTileConfig, row_bytes: int, weight_bytes: int, parts: int, smem: int
) -> ExpertTileConfig:
    """`tile`, or what is left of it in `smem` bytes of shared memory (0: nobody asks)."""
    smem = smem or 1 << 30
    while not tile.is_legal(row_bytes, weight_bytes, parts, smem):
        if tile.held or tile.unroll > 1:
            tile = replace(tile, held=0, unroll=1)
        elif tile.num_stages > 1:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        else:
            tile = replace(tile, columns=tile.columns // 2)
    return tile


def _combined(num_tokens: int) -> int:
    """Columns of a program that sums over experts: few tokens wait for memory, many fill it."""
    if num_tokens <= 8:
        return 128
    return 256 if num_tokens <= 512 else 1024


def _up_of_many(programs: float, sms: int) -> ExpertTileConfig:
    """Two programs with two loads in flight on a multiprocessor, or one with three.

    The latter, where the former would leave a good part of a GPU idle in the end.
    """
    two, one = programs / (2 * sms), programs / sms
    if one / ceil(one) > 1.25 * two / ceil(two):
        return ExpertTileConfig(64, 128, num_stages=3)
    return ExpertTileConfig(64, 128, num_stages=2)


def _down_of_few(num_tokens: int, width: int, early: int) -> ExpertTileConfig:
    """All weights of a tile ahead of its rows where that is little, else two loads in flight.

    `early`: the longest depth for which a program can do that.
    """
    if width <= early and (width <= 128 or num_tokens == 1):
        return ExpertTileConfig(16, 128 if width <= _SHORT else 64, num_stages=4, held=early)
    if num_tokens == 1:
        return ExpertTileConfig(16, 128, num_stages=4)
    return ExpertTileConfig(16, 128, num_stages=2, tiles=2 if width <= _NARROW else 1)


def _up_of_few(programs: float, sms: int) -> ExpertTileConfig:
    """The tiles, of those that a multiprocessor can hold, whose waves fill a GPU best."""
    # Programs that a multiprocessor holds, and a little for more of them in flight.
    choices = (
        (2, 1.0, ExpertTileConfig(16, 64, num_stages=3, unroll=2)),
        (3, 0.99, ExpertTileConfig(16, 64, num_stages=2, unroll=2)),
        (2, _COST, ExpertTileConfig(16, 64, num_stages=3, unroll=2, splits=2)),
        # The steps of a short way are loaded one by one.
        (2, _COST**2, ExpertTileConfig(16, 64, num_stages=5, splits=4)),
    )

    def time(resident: int, cost: float, tile: ExpertTileConfig) -> float:
        waves = programs * tile.splits / (resident * sms)
        rest = waves - floor(waves)
        # Half of the programs keep memory busy. How many there are is not known to a tenth.
        last = rest if waves > 1 and rest < 0.1 else (1 + rest) / 2
        return cost * resident * (floor(waves) + last) / tile.splits

    return min(choices, key=lambda choice: time(*choice))[2]
