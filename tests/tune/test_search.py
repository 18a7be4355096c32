"""Claims: the search finds the best of a landscape, keeps the default where nothing is clearly
faster, weighs routings by the worse ratio, goes on where it was killed, and keeps within its time.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octomoe.tune.candidates import KNOWN_TARGETS, candidates, heuristic_config
from octomoe.tune.configs import PrefillConfig
from octomoe.tune.entries import Entry, LayerKey, Table, read_table, write_table
from octomoe.tune.journal import Journal
from octomoe.tune.kinds import KINDS, kind_of
from octomoe.tune.search import (
    ROUNDS,
    Trials,
    best_of,
    journal_of,
    ratios,
    tune_bucket,
    tune_into,
    tune_layer,
)
from octomoe.tune.timing import Timing

H200 = KNOWN_TARGETS[0]
KEY = LayerKey(128, 768, 2048, 8, "block")
CONTENDERS = [PrefillConfig(64, up_stages=n, down_stages=1) for n in range(1, 21)]
ABOUT = {"format": "block128", "versions": {"triton": "3.9"}}


def number_of(config) -> int:
    return config.up_stages


class Landscape:
    """Measures what a function of a configuration says, and counts."""

    def __init__(self, us, routings=("balanced",)):
        self.us, self.routings, self.asked = us, routings, []

    def measure(self, routing):
        def measure(config, repeats):
            self.asked.append((routing, config, repeats))
            us = self.us(config) if len(self.routings) == 1 else self.us(config, routing)
            return Timing(us, us, us)

        return measure

    def measures(self, num_tokens):
        return {routing: self.measure(routing) for routing in self.routings}

    def trials(self, num_tokens=8, **options):
        return Trials(num_tokens, self.measures(num_tokens), **options)


def work(config) -> float:
    """Some time for a configuration of any kind: its own, and always the same."""
    return 10.0 + (hash(config) % 10007) / 1000


@given(st.permutations(range(20)))
def test_the_best_of_any_order(order):
    land = Landscape(lambda config: 10.0 + order[number_of(config) - 1])
    found = best_of(CONTENDERS, land.trials())
    assert order[number_of(found.choice.config) - 1] == 0
    assert found.choice.us == {"balanced": 10.0}
    assert found.default_us == {"balanced": 10.0 + order[0]}


def test_the_best_are_measured_more_often():
    land = Landscape(lambda config: 1.0 / number_of(config))
    best_of(CONTENDERS, land.trials())
    measured = [sum(repeats == n for _, _, repeats in land.asked) for n, _ in ROUNDS]
    # The default goes on to every round.
    assert measured == [20, ROUNDS[0][1] + 1, ROUNDS[1][1] + 1]


@pytest.mark.parametrize(("gain", "expected"), [(1.005, 1), (1.02, 7)])
def test_the_default_stays_unless_another_is_clearly_faster(gain, expected):
    land = Landscape(lambda config: 10.0 / gain if number_of(config) == 7 else 10.0)
    assert number_of(best_of(CONTENDERS, land.trials()).choice.config) == expected


def test_noise_of_the_first_round_is_corrected_by_the_last():
    def us(config):
        is_first = land.asked[-1][2] == ROUNDS[0][0]
        return {4: 5.0 if is_first else 12.0, 5: 9.0}.get(number_of(config), 10.0)

    land = Landscape(us)
    assert number_of(best_of(CONTENDERS, land.trials()).choice.config) == 5


def test_of_two_routings_the_worse_ratio_counts():
    times = {1: (10.0, 10.0), 2: (5.0, 30.0), 3: (6.0, 9.0)}

    def us(config, routing):
        balanced, skewed = times.get(number_of(config), (20.0, 20.0))
        return balanced if routing == "balanced" else skewed

    found = best_of(CONTENDERS, Landscape(us, ("balanced", "skewed")).trials())
    assert number_of(found.choice.config) == 3
    assert found.choice.us == {"balanced": 6.0, "skewed": 9.0}


def test_ratios_of_nobody():
    assert ratios([]) == []


def test_crossing_adds_contenders():
    extra = PrefillConfig(64, up_stages=100, down_stages=1)
    land = Landscape(lambda config: 100.0 / number_of(config))
    ranks = []

    def cross(ranked):
        ranks.extend(map(number_of, ranked))
        return [extra]

    assert best_of(CONTENDERS, land.trials(), cross=cross).choice.config == extra
    assert ranks == list(range(20, 0, -1))


def test_what_cannot_run_is_left_out_with_its_reason(tmp_path):
    def us(config):
        if number_of(config) % 2:
            raise RuntimeError("out of shared memory")
        return 10.0 + number_of(config)

    journal, seen = Journal(tmp_path / "journal", {}), []
    trials = Landscape(us).trials(journal=journal, on_trial=seen.append)
    found = best_of(CONTENDERS, trials)
    assert number_of(found.choice.config) == 2
    assert found.default_us == {}
    failed = [trial for trial in seen if trial.us is None]
    assert len(failed) == 10
    assert {trial.error for trial in failed} == {"RuntimeError: out of shared memory"}
    outcomes = [json.loads(line)["outcome"] for line in (tmp_path / "journal").open()]
    assert outcomes.count({"error": "RuntimeError: out of shared memory"}) == 10


def test_nothing_runs():
    def us(config):
        raise AssertionError("wrong output")

    assert best_of(CONTENDERS, Landscape(us).trials()) is None
    with pytest.raises(RuntimeError, match="no configuration runs: 8 tokens for LayerKey"):
        tune_bucket(KEY, H200, Landscape(us).trials())


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: misaligned address"),
    ],
)
def test_a_broken_device_ends_the_search_and_is_not_tried_again(tmp_path, error):
    def us(config):
        if number_of(config) == 3:
            raise error
        return 10.0

    with pytest.raises(type(error)):
        best_of(CONTENDERS, Landscape(us).trials(journal=Journal(tmp_path / "journal", {})))
    land = Landscape(us)
    journal = Journal(tmp_path / "journal", {})
    assert number_of(best_of(CONTENDERS, land.trials(journal=journal)).choice.config) == 1
    assert all(number_of(config) > 3 for _, config, n in land.asked if n == ROUNDS[0][0])


def test_without_time_the_default_is_measured_and_kept():
    land = Landscape(lambda config: 1.0 / number_of(config))
    found = best_of(CONTENDERS, land.trials(end=0.0))
    assert number_of(found.choice.config) == 1
    assert len(land.asked) == 1


@given(st.integers(1, 40))
def test_a_search_cut_short_takes_the_best_so_far(count):
    land = Landscape(lambda config: 100.0 - number_of(config))
    found = best_of(CONTENDERS, land.trials(end=count, clock=lambda: len(land.asked)))
    assert len(land.asked) <= count
    assert number_of(found.choice.config) == min(count, 20)


def test_a_bucket_has_the_best_of_each_kind():
    bucket = tune_bucket(KEY, H200, Landscape(work).trials(512))
    kinds = [kind_of(choice.config) for choice in bucket.choices]
    assert set(kinds) == set(KINDS)
    times = [choice.us["balanced"] for choice in bucket.choices]
    assert times == sorted(times)
    for kind, configs in candidates(KEY, 512, H200).items():
        choice = bucket.choice([kind])
        assert choice.us["balanced"] <= min(map(work, configs)) * 1.01
    usual = heuristic_config(KEY, 512, H200)
    assert bucket.default_us == {"balanced": work(usual)}


def test_in_doubt_the_kind_that_the_heuristics_choose():
    times = {"portable": 10.0, "prefill": 9.95, "decode": 9.95}
    bucket = tune_bucket(KEY, H200, Landscape(lambda c: times[kind_of(c)]).trials(512))
    assert kind_of(bucket.choices[0].config) == "portable"
    times["decode"] = 9.8
    bucket = tune_bucket(KEY, H200, Landscape(lambda c: times[kind_of(c)]).trials(512))
    assert kind_of(bucket.choices[0].config) == "decode"


def test_the_best_for_fewer_tokens_is_a_candidate_for_more():
    land = Landscape(work)
    first, second = tune_layer(KEY, (1, 2), land.measures, H200, Journal(None, {}))
    asked = {config for _, config, _ in land.asked[len(land.asked) // 2 :]}
    assert {choice.config for choice in first.choices} <= asked
    assert (first.num_tokens, second.num_tokens) == (1, 2)


def test_time_is_shared_by_the_numbers_of_tokens():
    # A measurement takes a second.
    land = Landscape(work)
    counts: list[int] = []
    for _ in tune_layer(
        KEY,
        (1, 64, 1024),
        land.measures,
        H200,
        Journal(None, {}),
        kinds=["portable"],
        seconds=30,
        clock=lambda: float(len(land.asked)),
    ):
        counts.append(len(land.asked))
    assert counts == [10, 20, 30]


def test_time_is_shared_by_kinds():
    land = Landscape(work)
    tune_bucket(KEY, H200, land.trials(512, end=45, clock=lambda: len(land.asked)))
    kinds = [kind_of(config) for _, config, _ in land.asked]
    assert [kinds.count(kind) for kind in KINDS] == [15, 15, 15]


class Killed(BaseException):
    """The end of a process."""


def killed_after(count, landscape):
    """The same landscape, until it was asked so often."""

    def us(config):
        if len(landscape.asked) > count:
            raise Killed
        return work(config)

    landscape.us = us
    return landscape


@pytest.mark.parametrize("count", [0, 1, 30, 75, 150])
def test_a_killed_search_goes_on_where_it_was(tmp_path, count):
    tokens, path = (1, 64), tmp_path / "tuned.json"

    def run(landscape, out):
        return tune_into(out, KEY, tokens, landscape.measures, H200, about=ABOUT)

    whole = Landscape(work)
    expected = run(whole, tmp_path / "whole.json")
    first, second = killed_after(count, Landscape(None)), Landscape(work)
    with pytest.raises(Killed):
        run(first, path)
    assert journal_of(path).exists() == (count > 0)
    assert run(second, path) == expected
    assert read_table(path) == Table(H200.name, {KEY: expected})
    assert first.asked[:-1] + second.asked == whole.asked
    assert not journal_of(path).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tuned.json", "whole.json"]


def test_a_line_cut_in_two_is_measured_again(tmp_path):
    path, tokens = tmp_path / "tuned.json", (1,)
    land = killed_after(20, Landscape(None))
    with pytest.raises(Killed):
        tune_into(path, KEY, tokens, land.measures, H200, about=ABOUT)
    journal = journal_of(path)
    journal.write_bytes(journal.read_bytes()[:-30])
    land = Landscape(work)
    with pytest.raises(Killed):
        tune_into(path, KEY, tokens, killed_after(1, land).measures, H200, about=ABOUT)
    assert len(land.asked) == 2
    land = Landscape(work)
    tune_into(path, KEY, tokens, land.measures, H200, about=ABOUT)
    whole = Landscape(work)
    tune_into(tmp_path / "whole.json", KEY, tokens, whole.measures, H200, about=ABOUT)
    assert len(land.asked) == len(whole.asked) - 20


@pytest.mark.parametrize(
    ("key", "about"),
    [
        (replace(KEY, width=384), ABOUT),
        (KEY, {"format": "block128", "versions": {"triton": "3.6"}}),
    ],
    ids=["another layer", "another version"],
)
def test_what_was_measured_of_something_else_does_not_count(tmp_path, key, about):
    path = tmp_path / "tuned.json"
    land = killed_after(20, Landscape(None))
    with pytest.raises(Killed):
        tune_into(path, key, (1,), land.measures, H200, about=about)
    land, whole = Landscape(work), Landscape(work)
    tune_into(path, KEY, (1,), land.measures, H200, about=ABOUT)
    tune_into(tmp_path / "whole.json", KEY, (1,), whole.measures, H200, about=ABOUT)
    assert len(land.asked) == len(whole.asked)


@pytest.mark.parametrize("line", ["", "{", "7", "[]", '{"tokens": 8}', '{"outcome": {}}'])
def test_a_journal_ignores_what_is_no_measurement(tmp_path, line):
    path = tmp_path / "journal"
    path.write_text(line)
    journal = Journal(path, {"device": "?"})
    assert journal.find({"tokens": 8}) is None
    journal.add({"tokens": 8}, {"us": 1.0})
    assert Journal(path, {"device": "?"}).find({"tokens": 8}) == {"us": 1.0}
    assert Journal(path, {"device": "!"}).find({"tokens": 8}) is None


def test_an_existing_table_is_merged_into(tmp_path):
    path, other = tmp_path / "tuned.json", replace(KEY, scales="late")
    write_table(path, Table(H200.name, {other: Entry(other, ())}))
    tune_into(path, KEY, (1,), Landscape(work).measures, H200, about=ABOUT)
    done = []
    tune_into(path, KEY, (4,), Landscape(work).measures, H200, about=ABOUT, on_bucket=done.append)
    table = read_table(path)
    assert set(table.entries) == {KEY, other}
    assert [bucket.num_tokens for bucket in table.entries[KEY].buckets] == [1, 4]
    assert done == [table.entries[KEY].buckets[1]]


def test_tokens_for_which_nobody_takes_a_configuration_are_passed_over(tmp_path):
    path, key = tmp_path / "tuned.json", replace(KEY, scales="mxfp8")
    entry = tune_into(path, key, (1, 8192), Landscape(work).measures, H200, about=ABOUT)
    default_us = {"balanced": work(heuristic_config(key, 8192, H200))}
    assert [(b.num_tokens, b.default_us) for b in entry.buckets] == [(8192, default_us)]
    with pytest.raises(ValueError, match="the layer has scales 'mxfp8' and so few rows"):
        tune_into(path, key, (1,), Landscape(work).measures, H200, about=ABOUT)


def test_a_table_of_another_device_is_refused(tmp_path):
    path = tmp_path / "tuned.json"
    write_table(path, Table("NVIDIA H100"))
    with pytest.raises(ValueError, match="is a table for NVIDIA H100, but needs one for NVIDIA"):
        tune_into(Path(path), KEY, (1,), Landscape(work).measures, H200, about=ABOUT)
