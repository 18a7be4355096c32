"""Configurations worth trying for a layer: what the heuristics choose, and what lies around it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any, Final

from octomoe.core.device import Target
from octomoe.tune.configs import DecodeConfig, ExpertTileConfig, FusedMoeConfig, PrefillConfig
from octomoe.tune.entries import LayerKey
from octomoe.tune.fused_moe import (
    PREFILL_CONFIGS,
    WIDE_CONFIGS,
    decode_config,
    fused_moe_config,
    prefill_config,
    wide_config,
)
from octomoe.tune.kinds import KINDS, Config, kind_of, why_illegal

# Candidates of a kind, and those that are made of the best of them.
MOST: Final = 40
MOST_CROSSED: Final = 16
# Rows of an expert up to which Hopper's kernels for few rows are tried, and from which those for
# many are.
_DECODE_ROWS, _PREFILL_ROWS = 32, 16
# Scales under which both operands are multiplied in 8 bits.
_MEETING_IN_FP8: Final = ("block", "late")
# What a caller can ask for without having the device.
KNOWN_TARGETS: Final = (
    Target("NVIDIA H200", arch=90, sms=132, smem=232448),
    Target("NVIDIA H100 80GB HBM3", arch=90, sms=132, smem=232448),
)


def heuristic_config(
    key: LayerKey, num_tokens: int, target: Target, *, kinds: Iterable[str] = tuple(KINDS)
) -> Config | None:
    """What runs where no table says anything; None where that is op by op.

    Args:
        key, num_tokens: the layer and T.
        target: what it runs on.
        kinds: of `KINDS`, those that can serve the layer.

    >>> key = LayerKey(128, 768, 2048, 8, "block")
    >>> kind_of(heuristic_config(key, 8192, KNOWN_TARGETS[0]))
    'prefill'
    """
    found: list[Config | None] = []
    if _has_whole_tiles(key):
        found += [_decode_default(key, num_tokens, target)]
        found += [_prefill_default(key, num_tokens, target)]
    # Scales of 32 go op by op.
    if key.scales != "mxfp8":
        found += [_portable_default(key, num_tokens, target)]
    kinds = tuple(kinds)
    return next((c for c in found if c is not None and kind_of(c) in kinds), None)


def candidates(
    key: LayerKey,
    num_tokens: int,
    target: Target,
    *,
    also: Sequence[Config] = (),
    kinds: Iterable[str] = tuple(KINDS),
) -> dict[str, tuple[Config, ...]]:
    """Kind -> configurations of it that can run, at most `MOST`, the heuristics' choice first.

    Kinds that cannot serve the layer are left out.

    Args:
        key, num_tokens: the layer and T.
        target: what they shall run on.
        also: further ones, e.g. what was best for fewer tokens.
        kinds: of `KINDS`, those that are asked for.

    >>> key = LayerKey(128, 768, 2048, 8, "block")
    >>> list(candidates(key, 1, KNOWN_TARGETS[0])), list(candidates(key, 8192, KNOWN_TARGETS[0]))
    (['portable', 'decode'], ['portable', 'prefill'])
    """
    found = {}
    for kind in kinds:
        made = _GENERATORS[kind](key, num_tokens, target)
        made[1:1] = [config for config in also if made and kind_of(config) == kind]
        legal = [c for c in dict.fromkeys(made) if why_illegal(c, key.scales, target) is None]
        if legal:
            found[kind] = tuple(legal[:MOST])
    return found


def crossed(ranked: Sequence[Config], scales: str, target: Target) -> list[Config]:
    """New configurations, each of whose fields is one of the best.

    Halves of a layer are tried one at a time; the best of each is likely the best of both.

    Args:
        ranked: of one kind, best first.
        scales, target: what they shall run with.
    """
    if not ranked:
        return []
    best = ranked[0]
    names = [field.name for field in fields(best)]
    flags = [name for name in names if isinstance(getattr(best, name), bool)]
    # What suits weights on one side of a tile does not suit them on the other.
    alike = [c for c in ranked if all(getattr(c, n) == getattr(best, n) for n in flags)]
    values: dict[str, list[Any]] = {}
    for name in names:
        distinct = list(dict.fromkeys(getattr(config, name) for config in alike))
        values[name] = distinct[: 2 if isinstance(distinct[0], int) else 3]
    places = sorted(product(*(range(len(values[name])) for name in names)), key=sum)
    made: list[Config] = [
        replace(best, **{n: values[n][i] for n, i in zip(names, place, strict=True)})
        for place in places
    ]
    new = [c for c in made if c not in ranked and why_illegal(c, scales, target) is None]
    return new[:MOST_CROSSED]


def _portable_default(key: LayerKey, num_tokens: int, target: Target) -> FusedMoeConfig:
    return fused_moe_config(
        num_tokens,
        key.num_choices,
        key.num_experts,
        key.width,
        has_steps=key.scales == "block",
        row_bytes=2 if key.scales == "weight_only" else 1,
        target=target,
    )


def _prefill_default(key: LayerKey, num_tokens: int, target: Target) -> PrefillConfig | None:
    sizes = (num_tokens, key.num_choices, key.num_experts)
    if key.scales in _MEETING_IN_FP8:
        return prefill_config(*sizes, target)
    # Scales of 32 leave registers room where four of them are a word. Of weights alone it is not
    # known whether their scales change by the step, which leaves none.
    has_room = key.scales == "mxfp8" and key.width % 128 == 0 and key.depth % 128 == 0
    return wide_config(*sizes, target, has_room=has_room)


def _decode_default(key: LayerKey, num_tokens: int, target: Target) -> DecodeConfig | None:
    if key.scales not in _MEETING_IN_FP8:
        return None
    sizes = (num_tokens, key.num_choices, key.num_experts, key.width, key.depth)
    return decode_config(*sizes, target)


def _portable(key: LayerKey, num_tokens: int, target: Target) -> list[Config]:
    # Scales of 32 go op by op.
    if key.scales == "mxfp8":
        return []
    default = _portable_default(key, num_tokens, target)
    # What the heuristics choose for fewer and for more tokens.
    others = [num_tokens // 4, num_tokens // 2, 2 * num_tokens, 4 * num_tokens]
    made = [default, *(_portable_default(key, max(n, 1), target) for n in others)]
    ups = _swapped_ups(default.up.rows) if default.is_swapped else _plain_ups()
    downs = _swapped_downs(default.down.rows, key.width) if default.is_swapped else _plain_downs()
    if key.scales != "block":
        # Products of gate and up are held at once: of 128 columns they take more registers than
        # there are.
        ups = [up for up in ups if default.is_swapped or up.columns == 64]
    made += [replace(default, up=up) for up in ups]
    made += [replace(default, down=down) for down in downs]
    made += [replace(default, combined=columns) for columns in (128, 256, 512, 1024)]
    return list(made)


def _swapped_ups(rows: int) -> list[ExpertTileConfig]:
    """For few rows: columns, loads in flight, steps loaded at once, parts of the depth."""
    shapes = (
        (64, 2, 2, 1),
        (64, 3, 2, 1),
        (64, 3, 1, 1),
        (64, 4, 1, 1),
        (64, 3, 2, 2),
        (64, 5, 1, 2),
        (64, 5, 1, 4),
        (64, 3, 2, 4),
        (128, 2, 1, 1),
        (128, 3, 1, 1),
        (128, 2, 2, 1),
    )
    return [
        ExpertTileConfig(rows, columns, num_stages=stages, unroll=unroll, splits=splits)
        for columns, stages, unroll, splits in shapes
    ]


def _swapped_downs(rows: int, width: int) -> list[ExpertTileConfig]:
    """For few rows: columns, loads in flight, tiles of a program; or all of a depth at once."""
    shapes = (
        (128, 2, 1),
        (128, 4, 1),
        (128, 2, 2),
        (128, 3, 2),
        (128, 3, 4),
        (64, 4, 1),
        (64, 6, 1),
    )
    tiles = [
        ExpertTileConfig(rows, columns, num_stages=stages, tiles=tiles)
        for columns, stages, tiles in shapes
    ]
    held = -(-width // 128) * 128
    return tiles + [
        ExpertTileConfig(rows, columns, num_stages=4, held=held) for columns in (64, 128)
    ]


def _plain_ups() -> list[ExpertTileConfig]:
    """For many rows: rows, columns, warps, loads in flight."""
    shapes = (
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (64, 128, 4, 2),
        (64, 128, 4, 3),
        (64, 128, 8, 3),
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 128, 8, 3),
        (128, 128, 8, 4),
    )
    return [ExpertTileConfig(*shape) for shape in shapes]


def _plain_downs() -> list[ExpertTileConfig]:
    """For many rows: rows, columns, warps, loads in flight, tiles of a program, depth held."""
    shapes = (
        (64, 128, 4, 3, 1, 0),
        (64, 128, 4, 3, 2, 0),
        (64, 128, 4, 3, 4, 0),
        (64, 128, 4, 3, 8, 0),
        (64, 128, 4, 4, 4, 0),
        (64, 64, 4, 4, 4, 0),
        (64, 64, 4, 3, 16, 384),
        (128, 128, 8, 3, 1, 0),
        (128, 128, 8, 3, 4, 0),
        (128, 128, 8, 4, 4, 0),
    )
    return [
        ExpertTileConfig(rows, columns, warps, stages, tiles=tiles, held=held)
        for rows, columns, warps, stages, tiles, held in shapes
    ]


def _has_whole_tiles(key: LayerKey) -> bool:
    """Whether sizes are those of Hopper's kernels."""
    return key.width % (128 if key.scales == "block" else 16) == 0 and key.depth % 16 == 0


def _prefill(key: LayerKey, num_tokens: int, target: Target) -> list[Config]:
    rows = num_tokens * key.num_choices / key.num_experts
    if target.arch != 90 or rows < _PREFILL_ROWS or not _has_whole_tiles(key):
        return []
    known = PREFILL_CONFIGS if key.scales in _MEETING_IN_FP8 else WIDE_CONFIGS
    made = [_prefill_default(key, num_tokens, target) or known[0], *known]
    made += [
        config
        for size in (64, 128)
        for up in (4, 3, 2)
        for down in (4, 3, 2)
        if why_illegal(config := PrefillConfig(size, up, down), key.scales, target) is None
    ]
    # Of each size, the first has the most stages.
    deepest = {config.rows: config for config in reversed(made)}.values()
    made += [replace(c, group=group) for c in deepest for group in (2, 4, 16, 32)]
    made += [replace(c, combined=columns) for c in deepest for columns in (256, 512)]
    return list(made)


def _decode(key: LayerKey, num_tokens: int, target: Target) -> list[Config]:
    rows = num_tokens * key.num_choices / key.num_experts
    if target.arch != 90 or rows > _DECODE_ROWS or not _has_whole_tiles(key):
        return []
    default = _decode_default(key, num_tokens, target) or DecodeConfig(
        8 if rows <= 4 else 16, is_encoded=True, is_sorted=True
    )
    # Of 128 columns, what two programs on a multiprocessor hold.
    most = 6 if default.rows == 8 else 5
    made = [default]
    made += [
        replace(default, splits=splits, columns=columns, down_stages=n)
        for splits in (1, 2, 4, 8)
        for columns, n in ((128, 3), (128, most), (256, 3))
    ]
    made += [replace(default, up_stages=n) for n in (3, 4, 5, 6)]
    made += [
        replace(default, down_splits=n, down_stages=3) for n in (2, 4, 8) if 128 * n < key.width
    ]
    made += [replace(default, resident=1, up_stages=n, down_stages=5) for n in (8, 11)]
    made += [replace(default, group=n, down_stages=max(default.down_stages, n)) for n in (1, 3)]
    made += [replace(default, rows=n, up_stages=min(default.up_stages, 5)) for n in (8, 16)]
    made += [replace(default, combined=columns) for columns in (128, 256, 512)]
    made += [
        replace(default, is_encoded=is_encoded, is_sorted=is_sorted)
        for is_encoded, is_sorted in product((False, True), repeat=2)
    ]
    return list(made)


_GENERATORS: Final[Mapping[str, Callable[[LayerKey, int, Target], list[Config]]]] = {
    "portable": _portable,
    "prefill": _prefill,
    "decode": _decode,
}
