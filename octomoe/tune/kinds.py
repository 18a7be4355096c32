"""The kinds of configuration that a layer of experts may run with: as JSON, and what can run.

A further kind is a line in `KINDS`, one in `Config`, and one in `_RULES` where it has limits.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, fields
from difflib import get_close_matches
from typing import Any, Final, NoReturn, TypeAlias, TypeVar

from octomoe.core.device import Target
from octomoe.errors import refusal
from octomoe.tune.configs import DecodeConfig, ExpertTileConfig, FusedMoeConfig, PrefillConfig

Config: TypeAlias = FusedMoeConfig | PrefillConfig | DecodeConfig
KINDS: Final[Mapping[str, type]] = {
    "portable": FusedMoeConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
}

# How a layer is scaled, as far as a configuration cares: by the step of the depth (128 x 128 and
# 1 x 128); once per product (tensor, expert, row); by 32 of the depth; or weights alone.
SCALES: Final = ("block", "late", "mxfp8", "weight_only")

_POWERS_OF_TWO: Final = ("rows", "columns", "num_warps", "combined")
_MAY_BE_ZERO: Final = ("held",)
# Of the tile of weights, in a step, that Hopper's kernels hold: gate and up rows, or columns of y.
_STEP, _HELD = 128, 256
# Bytes of shared memory that a program takes besides, and that those for few rows leave for tables.
_RESERVED, _SORTED = 1024, 4096

_Any = TypeVar("_Any")


def kind_of(config: Config) -> str:
    """Name of a configuration's kind.

    >>> kind_of(PrefillConfig(64, up_stages=2, down_stages=2))
    'prefill'
    """
    return next(kind for kind, type_ in KINDS.items() if type(config) is type_)


def config_to_json(config: Config) -> dict[str, Any]:
    """Every field by its name, that of a default too: defaults may change.

    >>> config_to_json(PrefillConfig(64, up_stages=2, down_stages=2))["group"]
    8
    """
    return asdict(config)


def config_from_json(kind: object, table: object, where: str = "config") -> Config:
    """The configuration of a kind that `config_to_json` wrote.

    Args:
        kind: one of `KINDS`.
        table: its fields; those with a default may be missing.
        where: what an error says that it is about.

    Raises:
        ValueError: unknown kind or field, missing field, or a value that no kernel takes.

    >>> fields = {"rows": 64, "up_stages": 2, "down_stages": 2}
    >>> config_from_json("prefill", fields)
    PrefillConfig(rows=64, up_stages=2, down_stages=2, group=8, combined=1024, is_chained=True)
    """
    if not isinstance(kind, str) or kind not in KINDS:
        _fail(where, f"is of kind {kind!r}", f"one of {', '.join(KINDS)}")
    config: Config = _build(KINDS[kind], table, where)
    return config


def why_illegal(config: Config, scales: str, target: Target) -> str | None:
    """What keeps a configuration from running on a device; None if nothing does.

    A `target` without shared memory is one that nobody asks.

    >>> h200 = Target("NVIDIA H200", arch=90, sms=132, smem=232448)
    >>> why_illegal(PrefillConfig(128, up_stages=8, down_stages=3), "block", h200)
    'up: 8 stages of tiles of 128 rows take 409600 bytes of shared memory, of 232448'
    """
    rule = _RULES.get(type(config))
    return rule(config, scales, target) if rule else None


def _portable(config: FusedMoeConfig, scales: str, target: Target) -> str | None:
    row_bytes = 2 if scales == "weight_only" else 1
    if target.arch < 90 and (config.has_descriptors or config.is_chained):
        return f"TMA and chained launches need compute capability 9.0, not {target.arch / 10}"
    for name, tile, parts in (("up", config.up, 2), ("down", config.down, 1)):
        if tile.rows < 16 or tile.columns < 16:
            return f"{name}: a tile of {tile.rows} x {tile.columns}, less than 16 x 16"
        # What is held for a short depth is loaded step by step for a longer one.
        unheld = ExpertTileConfig(
            tile.rows, tile.columns, num_stages=tile.num_stages, unroll=tile.unroll
        )
        smem = target.smem or 1 << 30
        if not all(t.is_legal(row_bytes, 1, parts, smem) for t in (tile, unheld)):
            return f"{name}: {tile} takes more than {target.smem} bytes of shared memory"
    return None


def _smem_of_one(target: Target, resident: int) -> int:
    """Bytes of shared memory of each of `resident` programs on a multiprocessor."""
    return ((target.smem or 1 << 30) + _RESERVED) // resident - _RESERVED


def _prefill(config: PrefillConfig, scales: str, target: Target) -> str | None:
    if target.arch != 90:
        return f"it needs compute capability 9.0, not {target.arch / 10}"
    if config.rows not in (64, 128):
        return f"tiles have 64 or 128 rows, not {config.rows}"
    if scales in ("block", "late"):
        smem = _smem_of_one(target, config.resident)
        step = _STEP * (config.rows + _HELD)
        results = {"up": config.rows * _STEP, "down": 4 * config.rows * _STEP}
    else:
        # Operands meet in bf16: rows of two bytes, weights of one, a program per multiprocessor.
        smem = _smem_of_one(target, 1)
        step = _STEP * (2 * config.rows + _HELD)
        results = dict.fromkeys(("up", "down"), 2 * config.rows * _STEP)
    for name, stages in (("up", config.up_stages), ("down", config.down_stages)):
        num_bytes = stages * step + results[name]
        if num_bytes > smem:
            tiles = f"{stages} stages of tiles of {config.rows} rows"
            return f"{name}: {tiles} take {num_bytes} bytes of shared memory, of {smem}"
    return None


def _decode(config: DecodeConfig, scales: str, target: Target) -> str | None:
    if target.arch != 90:
        return f"it needs compute capability 9.0, not {target.arch / 10}"
    if scales not in ("block", "late"):
        return f"its kernels know no scales {scales!r}"
    if config.rows not in (8, 16) or config.columns not in (128, 256):
        got = f"{config.rows} by {config.columns}"
        return f"tiles are 8 or 16 rows by 128 or 256 columns, not {got}"
    for splits in (config.splits, config.down_splits):
        if splits not in (1, 2, 4, 8):
            return f"a depth is cut into 1, 2, 4 or 8 parts, not {splits}"
    if config.group > min(config.up_stages, config.down_stages):
        return f"{config.group} steps are asked for together, more than there are stages"
    smem = _smem_of_one(target, config.resident)
    for name, stages, columns in (
        ("up", config.up_stages, _STEP),
        ("down", config.down_stages, config.columns),
    ):
        # A step of rows and weights, three scales for each row, and three barriers.
        num_bytes = stages * (_STEP * (columns + config.rows) + 12 * config.rows + 24) + _SORTED
        if num_bytes > smem:
            return f"{name}: {stages} stages take {num_bytes} bytes of shared memory, of {smem}"
    return None


_RULES: Final[Mapping[type, Callable[[Any, str, Target], str | None]]] = {
    FusedMoeConfig: _portable,
    PrefillConfig: _prefill,
    DecodeConfig: _decode,
}


def _build(type_: type[_Any], table: object, where: str) -> _Any:
    """A dataclass of numbers, flags and further dataclasses."""
    if not isinstance(table, dict):
        _fail(where, f"is {table!r}", "a table of fields")
    known: dict[str, Field[Any]] = {field.name: field for field in fields(type_)}  # type: ignore[arg-type]
    for name in table:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            do = f"did you mean {near[0]}?" if near else ""
            _fail(where, f"has the unknown field {name!r}", f"one of {', '.join(known)}", do)
    lacking = [n for n, f in known.items() if f.default is MISSING and n not in table]
    if lacking:
        _fail(where, f"lacks {', '.join(lacking)}", "every field without a default")
    return type_(**{n: _value(known[n].type, v, f"{where}.{n}") for n, v in table.items()})


def _value(type_: Any, value: object, where: str) -> object:
    name = where.rpartition(".")[2]
    if type_ is bool:
        if not isinstance(value, bool):
            _fail(where, f"is {value!r}", "true or false")
        return value
    if type_ is not int:
        return _build(type_, value, where)
    least = 0 if name in _MAY_BE_ZERO else 1
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        _fail(where, f"is {value!r}", f"a whole number from {least}")
    if name in _POWERS_OF_TWO and value & (value - 1):
        _fail(where, f"is {value}", "a power of two")
    return value


def _fail(where: str, got: str, needs: str, do: str = "") -> NoReturn:
    raise ValueError(refusal("read_table", where, got, needs, do))
