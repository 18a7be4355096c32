"""Claims: a layer's own entry comes first, and of its buckets the nearest; then the nearest layer
that is near enough; then nothing. A user's table comes before the packaged one. Tables of other
devices and configurations that cannot run are never used.
"""

import logging
from dataclasses import replace
from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octomoe.core.device import Target
from octomoe.core.formats import (
    FP8_CHANNEL,
    FP8_GROUP128,
    FP8_TENSOR,
    FP8_TOKEN,
    MXFP8,
)
from octomoe.tune import tables
from octomoe.tune.configs import ExpertTileConfig, FusedMoeConfig, PrefillConfig
from octomoe.tune.entries import Bucket, Choice, Entry, LayerKey, Table, write_table
from octomoe.tune.tables import BUCKETS, NEAR, distance, scales_of, table_config, table_path

H200 = Target("NVIDIA H200", arch=90, sms=132, smem=232448)
KEY = LayerKey(128, 768, 2048, 8, "block")
TILE = ExpertTileConfig(16, 64)


def config_of(number: int) -> FusedMoeConfig:
    """A configuration that is told from others."""
    return FusedMoeConfig(replace(TILE, splits=number), TILE)


def entry_of(key: LayerKey, *tokens: int, first: int = 0) -> Entry:
    """The bucket for n tokens has `config_of(first + n)`."""
    buckets = [Bucket(n, (Choice(config_of(first + n), {"balanced": 1.0}),), {}) for n in tokens]
    return Entry(key, tuple(buckets))


def look_up(key: LayerKey, num_tokens: int, target: Target = H200, **options):
    """`table_config` of a layer."""
    sizes = key.num_choices, key.num_experts, key.width, key.depth, key.scales
    return table_config(num_tokens, *sizes, target, **options)


def number_of(config) -> int | None:
    return None if config is None else config.up.splits


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A function that puts entries in the place of the packaged tables."""
    monkeypatch.setattr(tables, "_PACKAGED", tmp_path / "packaged")
    monkeypatch.delenv(tables.VARIABLE, raising=False)

    def put(*entries: Entry, device: str = H200.name) -> None:
        path = table_path(tmp_path / "packaged", device)
        write_table(path, Table(device, {entry.key: entry for entry in entries}))
        forget()

    forget()
    yield put
    forget()


def forget() -> None:
    tables._ladder.cache_clear()
    tables._entries.cache_clear()


def test_the_nearest_bucket_by_ratio(packaged):
    packaged(entry_of(KEY, *BUCKETS))
    found = {n: number_of(look_up(KEY, n)) for n in range(1, 9000)}
    for num_tokens, bucket in found.items():
        nearest = min(BUCKETS, key=lambda b: abs(log2(b / num_tokens)))
        assert bucket == nearest
    assert number_of(look_up(KEY, 10**6)) == 8192


def test_no_tokens_need_no_configuration(packaged):
    packaged(entry_of(KEY, *BUCKETS))
    assert look_up(KEY, 0) is None


@given(st.sets(st.integers(1, 8192), min_size=1, max_size=6), st.integers(1, 8192))
def test_any_buckets(tmp_path_factory, buckets, num_tokens):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("tables")
        patch.setattr(tables, "_PACKAGED", folder)
        entry = entry_of(replace(KEY, width=700), *sorted(buckets))
        write_table(table_path(folder, H200.name), Table(H200.name, {entry.key: entry}))
        forget()
        found = number_of(look_up(entry.key, num_tokens))
        forget()
    least = min(abs(log2(b / num_tokens)) for b in buckets)
    if least <= 1:
        assert found in buckets
        assert abs(log2(found / num_tokens)) == pytest.approx(least)
    elif found is not None:
        # Another bucket of the same layer, which `distance` finds near enough.
        assert distance(entry.key, 1 << round(log2(num_tokens)), entry.key, found) <= NEAR


def test_a_bucket_too_far_away_is_none(packaged):
    packaged(entry_of(KEY, 64))
    assert [number_of(look_up(KEY, n)) for n in (31, 32, 64, 128, 129)] == [None, 64, 64, 64, None]


def test_an_unknown_layer_takes_the_nearest(packaged):
    near, far = replace(KEY, width=704), replace(KEY, width=384)
    packaged(entry_of(far, *BUCKETS), entry_of(near, *BUCKETS, first=10000))
    assert number_of(look_up(KEY, 8)) == 10008
    # A shared expert is one expert and one choice more.
    shared = replace(near, num_experts=129, num_choices=9)
    assert number_of(look_up(shared, 1)) == 10001
    assert look_up(replace(KEY, width=2048), 8) is None
    assert look_up(replace(KEY, depth=7168), 8) is None


def test_rows_of_an_expert_count_not_tokens(packaged):
    packaged(entry_of(KEY, *BUCKETS))
    # Twice as many experts with half of the width: as many rows at twice the tokens.
    key = replace(KEY, num_experts=256, num_choices=16)
    one, other = (distance(key, 1024, KEY, n) for n in (1024, 2048))
    assert one < other
    assert number_of(look_up(key, 1024)) == 1024


def test_scales_are_never_mixed(packaged):
    packaged(entry_of(KEY, *BUCKETS))
    assert look_up(replace(KEY, scales="late"), 8) is None


def test_gaps_of_a_layer_are_filled_by_its_neighbours(packaged):
    packaged(entry_of(KEY, 8), entry_of(replace(KEY, width=704), *BUCKETS, first=10000))
    assert number_of(look_up(KEY, 8)) == 8
    assert number_of(look_up(KEY, 1024)) == 11024


def test_only_kinds_that_are_asked_for(packaged):
    prefill = PrefillConfig(128, up_stages=4, down_stages=3)
    choices = (Choice(prefill, {}), Choice(config_of(7), {}))
    packaged(Entry(KEY, (Bucket(1024, choices, {}),)))
    assert look_up(KEY, 1024) == prefill
    assert look_up(KEY, 1024, kinds=("portable",)) == config_of(7)
    assert look_up(KEY, 1024, kinds=("decode",)) is None


def test_what_cannot_run_is_passed_over(packaged):
    large = FusedMoeConfig(replace(TILE, num_stages=32), TILE)
    packaged(Entry(KEY, (Bucket(8, (Choice(large, {}),), {}),)))
    assert look_up(KEY, 8) is None


def test_unknown_devices_have_no_table(packaged):
    packaged(entry_of(KEY, *BUCKETS))
    for name in ("NVIDIA H200 NVL", "cpu", ""):
        assert look_up(KEY, 8, replace(H200, name=name)) is None


def test_nonsense_sizes_find_nothing(packaged):
    packaged(entry_of(KEY, *BUCKETS))
    assert look_up(replace(KEY, num_experts=0), 8) is None
    assert look_up(replace(KEY, num_choices=0), 8) is None


def test_a_users_file_comes_first(packaged, tmp_path, monkeypatch):
    packaged(entry_of(KEY, 8), entry_of(replace(KEY, scales="late"), 8))
    path = tmp_path / "mine.json"
    write_table(path, Table(H200.name, {KEY: entry_of(KEY, 8, first=100)}))
    monkeypatch.setenv(tables.VARIABLE, str(path))
    forget()
    assert number_of(look_up(KEY, 8)) == 108
    assert number_of(look_up(replace(KEY, scales="late"), 8)) == 8


def test_a_users_folder(packaged, tmp_path, monkeypatch):
    path = table_path(tmp_path / "mine", H200.name)
    write_table(path, Table(H200.name, {KEY: entry_of(KEY, 8, first=100)}))
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path / "mine"))
    assert number_of(look_up(KEY, 8)) == 108


def test_a_users_table_for_another_device_is_ignored_with_one_warning(
    packaged, tmp_path, monkeypatch, caplog
):
    packaged(entry_of(KEY, 8))
    path = tmp_path / "mine.json"
    write_table(path, Table("NVIDIA H100", {KEY: entry_of(KEY, 8, first=100)}))
    monkeypatch.setenv(tables.VARIABLE, str(path))
    forget()
    with caplog.at_level(logging.WARNING):
        assert [number_of(look_up(KEY, n)) for n in (4, 8, 16)] == [8, 8, 8]
    assert len(caplog.records) == 1
    assert "nothing for NVIDIA H200: " in caplog.text
    assert "is a table for NVIDIA H100" in caplog.text


def test_a_users_folder_without_the_device_is_ignored_with_a_warning(
    packaged, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path))
    forget()
    with caplog.at_level(logging.WARNING):
        assert look_up(KEY, 8) is None
    assert "fused_moe.json is no file" in caplog.text


def test_a_users_table_that_is_not_there_is_refused(packaged, tmp_path, monkeypatch):
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path / "typo.json"))
    forget()
    with pytest.raises(ValueError, match=r"OCTOMOE_TUNED is .*typo.json, which does not exist"):
        look_up(KEY, 8)


def test_entries_are_searched_once_per_layer(packaged):
    packaged(entry_of(KEY, *BUCKETS))
    for num_tokens in range(1, 1000):
        look_up(KEY, num_tokens)
        look_up(replace(KEY, width=704), num_tokens)
    assert tables._ladder.cache_info().misses == 2


sizes = st.integers(1, 1 << 14)
problems = st.tuples(
    st.builds(LayerKey, sizes, sizes, sizes, st.integers(1, 16), st.just("block")),
    st.integers(1, 8192),
)


@given(problems, problems)
def test_distance_is_symmetric_and_zero_to_itself(one, other):
    assert distance(*one, *one) == 0
    assert distance(*one, *other) == pytest.approx(distance(*other, *one))
    assert distance(*one, *other) >= 0


def test_distance_is_what_it_says():
    other = LayerKey(64, 512, 4096, 4, "block")
    # 0.5 rows of an expert in both; active experts are 128 (1 - (127/128)^64) and as many for 64.
    one_active = 128 * (1 - (127 / 128) ** 64)
    other_active = 64 * (1 - (63 / 64) ** 32)
    num_bytes = log2(one_active * 768 * 2048 / (other_active * 512 * 4096))
    expected = abs(num_bytes) / 2 + log2(768 / 512) / 2 + log2(2) / 4
    assert distance(KEY, 8, other, 8) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("format", "scales"),
    [
        (FP8_GROUP128, "block"),
        (FP8_TOKEN, "late"),
        (FP8_TENSOR, "late"),
        (FP8_CHANNEL, "late"),
        (MXFP8, "mxfp8"),
        (None, "weight_only"),
    ],
)
def test_scales_follow_from_the_activations(format, scales):
    assert scales_of(format) == scales


def test_packaged_tables_are_in_order():
    for path in tables._PACKAGED.glob("*/*.json"):
        table = tables.read_table(path)
        assert table_path(tables._PACKAGED, table.device) == path
        for entry in table.entries.values():
            assert all(bucket.choices for bucket in entry.buckets)
