"""The search for the fastest configuration of a layer, by successive halving.

All candidates are timed a few times, the best of them more often.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any, Final, TypeAlias

import torch

from octomoe.core.device import Target
from octomoe.errors import refusal
from octomoe.tune.candidates import candidates, crossed, heuristic_config
from octomoe.tune.entries import Bucket, Choice, Entry, LayerKey, Table, read_table, write_table
from octomoe.tune.journal import Journal
from octomoe.tune.kinds import KINDS, Config, config_to_json, kind_of
from octomoe.tune.timing import Timing

# Times a configuration for so many repeats, and checks what it computes.
Measure: TypeAlias = Callable[[Config, int], Timing]

# Repeats of a round, and how many go on to the next.
ROUNDS: Final = ((5, 8), (15, 3), (40, 1))
# What is not faster than the heuristics' choice by this is noise.
MARGIN: Final = 1.01
# What Triton's own launcher says of errors that outlast their kernel.
_FATAL: Final = (
    "illegal memory access",
    "illegal instruction",
    "launch failure",
    "misaligned address",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trial:
    """A measurement: its time, or why there is none.

    Attributes:
        num_tokens, routing, config, repeats: what was measured.
        us: the median; None if it could not run.
        error: why it could not run.
        is_old: it was read from the journal.
    """

    num_tokens: int
    routing: str
    config: Config
    repeats: int
    us: float | None
    error: str = ""
    is_old: bool = False


@dataclass(frozen=True)
class Trials:
    """How one number of tokens is measured.

    Attributes:
        num_tokens: T.
        measures: routing -> how to measure with it.
        journal: what was measured already.
        on_trial: told of every measurement.
        end: when there is no time for further ones, as `clock` says.
        clock: seconds.
    """

    num_tokens: int
    measures: Mapping[str, Measure]
    journal: Journal = field(default_factory=lambda: Journal(None, {}))
    on_trial: Callable[[Trial], None] = lambda trial: None
    end: float = inf
    clock: Callable[[], float] = monotonic

    def is_over(self) -> bool:
        """Whether there is no time for further ones."""
        return self.clock() >= self.end

    def share(self, count: int) -> "Trials":
        """The same for one of `count` searches that share the time that is left."""
        now = self.clock()
        return replace(self, end=now + (self.end - now) / count)

    def times(self, config: Config, repeats: int) -> dict[str, float] | None:
        """Microseconds with each routing, None if it cannot run with one."""
        found: dict[str, float] = {}
        for routing in self.measures:
            trial = self._trial(routing, config, repeats)
            self.on_trial(trial)
            if trial.us is None:
                return None
            found[routing] = trial.us
        return found

    def _trial(self, routing: str, config: Config, repeats: int) -> Trial:
        what = {
            "tokens": self.num_tokens,
            "routing": routing,
            "repeats": repeats,
            "kind": kind_of(config),
            "config": config_to_json(config),
        }
        outcome = self.journal.find(what)
        is_old = outcome is not None
        if outcome is None:
            try:
                outcome = asdict(self.measures[routing](config, repeats))
            # A compiler, a driver and a check of outputs have errors of their own. Whatever it is,
            # this configuration is none, and the journal says why.
            except Exception as error:
                outcome = {"error": f"{type(error).__name__}: {error}"}
                _log.info("%d tokens, %s: %s", self.num_tokens, config, outcome["error"])
                self.journal.add(what, outcome)
                if _is_fatal(error):
                    # Nothing runs in this process any more; the next one will not try it again.
                    raise
            else:
                self.journal.add(what, outcome)
        us, error_text = outcome.get("us"), outcome.get("error", "")
        return Trial(self.num_tokens, routing, config, repeats, us, error_text, is_old)


def ratios(times: Sequence[Mapping[str, float]]) -> list[float]:
    """For each contender, the larger of its ratios to the best of each routing.

    >>> ratios([{"balanced": 10.0, "skewed": 30.0}, {"balanced": 11.0, "skewed": 20.0}])
    [1.5, 1.1]
    """
    best = {routing: min(t[routing] for t in times) for routing in (times[0] if times else ())}
    return [max(t[routing] / best[routing] for routing in best) for t in times]


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search among configurations of a kind.

    Attributes:
        choice: the best.
        default_us: what the first took; empty if it could not run.
    """

    choice: Choice
    default_us: Mapping[str, float]


def best_of(
    contenders: Sequence[Config],
    trials: Trials,
    *,
    cross: Callable[[Sequence[Config]], Sequence[Config]] = lambda ranked: (),
    rounds: Sequence[tuple[int, int]] = ROUNDS,
) -> Found | None:
    """The fastest configuration: the first unless another is faster by `MARGIN`.

    With several routings, the one whose worse ratio to each routing's best is the least.

    Args:
        contenders: the one to keep in doubt first.
        trials: how to measure.
        cross: makes further contenders from those of the first round, best first.
        rounds: repeats, and how many go on, of each.

    Returns:
        None if none can run.
    """
    default, pool = contenders[0], list(contenders)
    found: dict[Config, dict[str, float]] = {}
    for number, (repeats, kept) in enumerate(rounds):
        if found and trials.is_over():
            break
        measured: dict[Config, dict[str, float]] = {}
        is_whole = _measure_all(pool, repeats, trials, measured)
        if number == 0 and measured:
            is_whole &= _measure_all(cross(_ranked(measured)), repeats, trials, measured)
        if measured and (is_whole or not found):
            found = measured
        if not is_whole or not found:
            break
        pool = [c for c in _ranked(found)[:kept] if c != default]
        if default in found:
            pool.insert(0, default)
    if not found:
        return None
    score = dict(zip(found, ratios(list(found.values())), strict=True))
    best = min(found, key=lambda config: score[config])
    if score.get(default, inf) < MARGIN * score[best]:
        best = default
    return Found(Choice(best, found[best]), found.get(default, {}))


def tune_bucket(
    key: LayerKey,
    target: Target,
    trials: Trials,
    *,
    also: Sequence[Config] = (),
    kinds: Sequence[str] = tuple(KINDS),
) -> Bucket:
    """Search the best configuration of every kind for a number of tokens.

    Raises:
        RuntimeError: no configuration can run.
    """
    num_tokens = trials.num_tokens
    config = heuristic_config(key, num_tokens, target, kinds=kinds)
    usual = "" if config is None else kind_of(config)
    found: dict[str, Found] = {}
    contenders = candidates(key, num_tokens, target, also=also, kinds=kinds)
    cross = partial(crossed, scales=key.scales, target=target)
    for index, (kind, configs) in enumerate(contenders.items()):
        best = best_of(configs, trials.share(len(contenders) - index), cross=cross)
        if best is not None:
            found[kind] = best
    if not found:
        got = f"{num_tokens} tokens for {key}"
        raise RuntimeError(f"tune: no configuration runs: {got}; the journal says why")
    score = dict(zip(found, ratios([f.choice.us for f in found.values()]), strict=True))
    # In doubt, the kind that the heuristics choose.
    order = sorted(found, key=lambda kind: score[kind] / (MARGIN if kind == usual else 1.0))
    default_us = found[usual].default_us if usual in found else {}
    return Bucket(num_tokens, tuple(found[kind].choice for kind in order), default_us)


def tune_layer(
    key: LayerKey,
    tokens: Sequence[int],
    measures: Callable[[int], Mapping[str, Measure]],
    target: Target,
    journal: Journal,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    on_trial: Callable[[Trial], None] = lambda trial: None,
    seconds: float = inf,
    clock: Callable[[], float] = monotonic,
) -> Iterator[Bucket]:
    """Search the best configurations for each number of tokens, one after another.

    Args:
        key: the layer.
        tokens: numbers of them.
        measures: for a number of tokens, routing -> how to measure.
        target: what it runs on.
        journal: what was measured already.
        kinds: of configurations that `measures` takes.
        on_trial: told of every measurement.
        seconds: for all of it; what is left is shared by the numbers of tokens that are left.
        clock: seconds.
    """
    end = clock() + seconds
    also: tuple[Config, ...] = ()
    for index, num_tokens in enumerate(tokens):
        trials = Trials(num_tokens, measures(num_tokens), journal, on_trial, end, clock)
        trials = trials.share(len(tokens) - index)
        bucket = tune_bucket(key, target, trials, also=also, kinds=kinds)
        also = tuple(choice.config for choice in bucket.choices)
        yield bucket


def tune_into(
    path: Path,
    key: LayerKey,
    tokens: Sequence[int],
    measures: Callable[[int], Mapping[str, Measure]],
    target: Target,
    *,
    about: Mapping[str, Any],
    kinds: Sequence[str] = tuple(KINDS),
    on_trial: Callable[[Trial], None] = lambda trial: None,
    on_bucket: Callable[[Bucket], None] = lambda bucket: None,
    seconds: float = inf,
) -> Entry:
    """`tune_layer`, merged into a table's file after each number of tokens.

    Numbers of tokens for which no kernel takes a configuration are passed over. Until all are done,
    measurements lie beside the file; a search that was cut short goes on from them.

    Args:
        path: the file; it need not exist.
        key, tokens, measures, target, kinds, on_trial, seconds: see `tune_layer`.
        about: formats and versions: measurements under others do not count, and the entry has it.
        on_bucket: told of every number of tokens that is done.

    Raises:
        ValueError: the file is a table for another device, or not in order; or no kernel takes a
            configuration for this layer.
        RuntimeError: no configuration can run, or the device does not run anything any more.
    """
    table = read_table(path) if path.exists() else Table(target.name)
    if table.device != target.name:
        got = f"is a table for {table.device}"
        raise ValueError(refusal("tune", str(path), got, f"one for {target.name}, or a new file"))
    tokens = [n for n in tokens if candidates(key, n, target, kinds=kinds)]
    if not tokens:
        got = f"has scales {key.scales!r} and so few rows that no kernel takes a configuration"
        raise ValueError(refusal("tune", "the layer", got, "more tokens, or other scales"))
    same = {"device": target.name, "layer": asdict(key), "about": dict(about)}
    journal = Journal(journal_of(path), same)
    for bucket in tune_layer(
        key, tokens, measures, target, journal, kinds=kinds, on_trial=on_trial, seconds=seconds
    ):
        table = table.merged(Entry(key, (bucket,), about))
        write_table(path, table)
        on_bucket(bucket)
    journal.remove()
    return table.entries[key]


def journal_of(path: Path) -> Path:
    """Where measurements for a table lie until it is done.

    >>> journal_of(Path("tuned.json")).name
    'tuned.json.journal'
    """
    return path.with_name(f"{path.name}.journal")


def _is_fatal(error: Exception) -> bool:
    """Whether it leaves a device on which nothing runs."""
    return isinstance(error, torch.AcceleratorError) or any(words in str(error) for words in _FATAL)


def _measure_all(
    pool: Sequence[Config],
    repeats: int,
    trials: Trials,
    measured: dict[Config, dict[str, float]],
) -> bool:
    """Measure contenders, the first in any case; False if time ran out."""
    for config in pool:
        if measured and trials.is_over():
            return False
        times = trials.times(config, repeats)
        if times is not None:
            measured[config] = times
    return True


def _ranked(measured: Mapping[Config, Mapping[str, float]]) -> list[Config]:
    scores = zip(measured, ratios(list(measured.values())), strict=True)
    return [config for config, _ in sorted(scores, key=lambda pair: pair[1])]
