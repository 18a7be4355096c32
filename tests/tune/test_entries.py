"""Claims: tables and configurations come back from JSON as they went; whatever is not in order is
refused with the place, what came and what is needed; nobody sees half of a table.
"""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octomoe.core.device import Target
from octomoe.tune.configs import DecodeConfig, ExpertTileConfig, FusedMoeConfig, PrefillConfig
from octomoe.tune.entries import (
    Bucket,
    Choice,
    Entry,
    LayerKey,
    Table,
    entry_to_json,
    read_table,
    write_table,
)
from octomoe.tune.kinds import (
    KINDS,
    SCALES,
    config_from_json,
    config_to_json,
    kind_of,
    why_illegal,
)

H200 = Target("NVIDIA H200", arch=90, sms=132, smem=232448)
KEY = LayerKey(128, 768, 2048, 8, "block")
TILE = ExpertTileConfig(16, 64, num_stages=3, unroll=2, held=768)
PORTABLE = FusedMoeConfig(TILE, TILE, is_swapped=True, has_descriptors=True, combined=256)
PREFILL = PrefillConfig(64, up_stages=2, down_stages=2)
CONFIGS = [PORTABLE, PREFILL, DecodeConfig(16, splits=2)]
BUCKET = Bucket(8, (Choice(PORTABLE, {"balanced": 20.5}),), {"balanced": 22.0})
TABLE = Table("NVIDIA H200", {KEY: Entry(KEY, (BUCKET,), {"model": "Qwen3-30B-A3B, 1 GPU"})})

powers = st.integers(4, 8).map(lambda n: 1 << n)
counts = st.integers(1, 16)
tiles = st.builds(
    ExpertTileConfig,
    powers,
    powers,
    num_warps=st.sampled_from([4, 8]),
    num_stages=counts,
    unroll=counts,
    splits=counts,
    tiles=counts,
    held=st.integers(0, 4096),
)
configs = st.one_of(
    st.builds(FusedMoeConfig, tiles, tiles, st.booleans(), st.booleans(), st.booleans(), powers),
    st.builds(PrefillConfig, powers, counts, counts, counts, powers, st.booleans()),
    st.builds(
        DecodeConfig,
        powers,
        powers,
        *[counts] * 5,
        powers,
        st.booleans(),
        st.booleans(),
    ),
)


@given(configs)
def test_a_configuration_comes_back_from_json(config):
    text = json.dumps(config_to_json(config))
    assert config_from_json(kind_of(config), json.loads(text)) == config


def test_every_kind_has_its_own_type():
    assert {kind_of(config) for config in CONFIGS} == set(KINDS)
    assert len(set(KINDS.values())) == len(KINDS)


def test_fields_with_a_default_may_be_missing():
    fields = {"rows": 64, "up_stages": 2, "down_stages": 2}
    assert config_from_json("prefill", fields) == PREFILL


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fused", {}, "config is of kind 'fused', but needs one of portable, prefill, decode"),
        (["prefill"], {}, r"config is of kind \['prefill'\]"),
        ("prefill", {"row": 64}, r"config has the unknown field 'row'.*; did you mean rows\?"),
        ("prefill", {"rows": None}, "config.rows is None, but needs a whole number from 1"),
        ("prefill", {"rows": 48}, "config.rows is 48, but needs a power of two"),
        ("prefill", {"rows": -64}, "config.rows is -64, but needs a whole number from 1"),
        ("prefill", {"rows": True}, "config.rows is True, but needs a whole number from 1"),
        ("prefill", {"rows": 64.0}, "config.rows is 64.0, but needs a whole number from 1"),
        ("prefill", {"is_chained": 1}, "config.is_chained is 1, but needs true or false"),
        ("portable", {"up": 3}, "config.up is 3, but needs a table of fields"),
        ("portable", {"down": {"rows": 16}}, "config.down lacks columns"),
        ("portable", {"up": {"rows": 16, "columns": 65}}, "config.up.columns is 65"),
    ],
)
def test_a_configuration_out_of_order_is_refused(kind, change, message):
    base = {"portable": PORTABLE, "prefill": PREFILL}.get(str(kind), PREFILL)
    with pytest.raises(ValueError, match=f"read_table: {message}"):
        config_from_json(kind, {**config_to_json(base), **change})


def test_a_configuration_is_a_table():
    with pytest.raises(ValueError, match="config is 7, but needs a table of fields"):
        config_from_json("prefill", 7)
    with pytest.raises(ValueError, match="config lacks rows, up_stages, down_stages"):
        config_from_json("prefill", {})


@pytest.mark.parametrize("config", CONFIGS)
def test_what_fits_is_legal(config):
    assert why_illegal(config, "block", H200) is None


@pytest.mark.parametrize(
    ("config", "scales", "target", "reason"),
    [
        (PORTABLE, "block", Target("NVIDIA A100", arch=80), "TMA and chained .* 9.0, not 8.0"),
        (replace(PORTABLE, up=replace(TILE, held=0, num_stages=8)), "block", H200, "up: .*232448"),
        (replace(PORTABLE, down=replace(TILE, rows=8)), "block", H200, "down: a tile of 8 x 64"),
        # It fits while the depth is short, and not where it is longer than what is held.
        (
            replace(PORTABLE, down=ExpertTileConfig(128, 128, num_stages=8, held=128)),
            "block",
            H200,
            "down: ",
        ),
        (replace(PREFILL, up_stages=5), "mxfp8", H200, "up: 5 stages of tiles of 64 rows"),
        (PrefillConfig(128, 3, 4), "weight_only", H200, "down: 4 stages of tiles of 128 rows"),
        (PREFILL, "block", Target("NVIDIA B200", arch=100), "9.0, not 10.0"),
        (replace(PREFILL, rows=32), "block", H200, "64 or 128 rows, not 32"),
        (replace(PREFILL, up_stages=3), "block", H200, "up: 3 stages of tiles of 64 rows"),
        (replace(PREFILL, down_stages=3), "late", H200, "down: 3 stages of tiles of 64 rows"),
        (DecodeConfig(32), "block", H200, "8 or 16 rows by 128 or 256 columns, not 32 by 128"),
        (DecodeConfig(8, 64), "late", H200, "8 or 16 rows by 128 or 256 columns, not 8 by 64"),
        (DecodeConfig(group=6), "block", H200, "6 steps are asked for together, more than there"),
        (DecodeConfig(up_stages=1), "block", H200, "2 steps are asked for together"),
        (DecodeConfig(8, up_stages=8), "block", H200, "up: 8 stages take"),
        # One more would fit, were it not for scales.
        (DecodeConfig(16, up_stages=6), "late", H200, "up: 6 stages take 115984 .* of 115712"),
        (DecodeConfig(8, columns=256), "block", H200, "down: 5 stages take"),
        (DecodeConfig(), "weight_only", H200, "no scales 'weight_only'"),
        (DecodeConfig(), "mxfp8", H200, "no scales 'mxfp8'"),
        (DecodeConfig(), "block", Target("NVIDIA B200", arch=100), "9.0, not 10.0"),
    ],
)
def test_what_cannot_run_is_not_legal(config, scales, target, reason):
    assert re.search(reason, why_illegal(config, scales, target))


def test_wider_rows_take_more_shared_memory():
    config = replace(PORTABLE, up=ExpertTileConfig(128, 64, num_warps=8, num_stages=6))
    assert why_illegal(config, "block", H200) is None
    assert "up: " in why_illegal(config, "weight_only", H200)


def test_where_nobody_asks_for_shared_memory_anything_fits():
    config = replace(PORTABLE, up=replace(TILE, num_stages=64))
    assert why_illegal(config, "block", Target("?", arch=90)) is None


buckets = st.lists(
    st.builds(
        Bucket,
        st.integers(1, 9000),
        st.lists(
            st.builds(Choice, configs, st.dictionaries(st.text(), st.floats(0.1, 1e6))),
            min_size=1,
            unique_by=lambda choice: kind_of(choice.config),
        ).map(tuple),
        st.dictionaries(st.text(), st.floats(0.1, 1e6)),
    ),
    max_size=3,
    unique_by=lambda bucket: bucket.num_tokens,
).map(lambda found: tuple(sorted(found, key=lambda bucket: bucket.num_tokens)))
sizes = st.integers(1, 1 << 16)
keys = st.builds(LayerKey, sizes, sizes, sizes, sizes, st.sampled_from(SCALES))
entries = st.builds(Entry, keys, buckets, st.dictionaries(st.text(), st.text()))


@given(st.text(), st.lists(entries, max_size=3, unique_by=lambda entry: entry.key))
def test_a_table_comes_back_from_its_file(tmp_path_factory, device, found):
    path = tmp_path_factory.mktemp("table") / "fused_moe.json"
    table = Table(device, {entry.key: entry for entry in found})
    write_table(path, table)
    assert read_table(path) == table


def test_a_file_is_readable_line_by_line(tmp_path):
    path = tmp_path / "new" / "fused_moe.json"
    write_table(path, TABLE)
    lines = path.read_text().splitlines()
    assert '"device": "NVIDIA H200",' in lines
    assert sum('"kind": "portable"' in line for line in lines) == 1
    assert list(path.parent.iterdir()) == [path]
    assert json.loads(path.read_text())["entries"][0] == entry_to_json(TABLE.entries[KEY])


def test_a_table_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "fused_moe.json"
    write_table(path, TABLE)

    def fail(source, destination):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_table(path, Table("NVIDIA H200"))
    assert read_table(path) == TABLE


def test_merging_keeps_what_is_not_measured_again():
    other = replace(BUCKET, num_tokens=1)
    newer = replace(BUCKET, default_us={"balanced": 21.0})
    once = TABLE.merged(Entry(KEY, (other,), {"model": "new"}))
    assert [bucket.num_tokens for bucket in once.entries[KEY].buckets] == [1, 8]
    assert once.entries[KEY].about == {"model": "new"}
    twice = once.merged(Entry(KEY, (newer,)))
    assert twice.entries[KEY].buckets == (other, newer)
    key = replace(KEY, scales="late")
    assert set(twice.merged(Entry(key, (newer,))).entries) == {KEY, key}
    assert set(TABLE.entries) == {KEY}


def test_the_best_of_some_kinds():
    bucket = replace(BUCKET, choices=(Choice(PREFILL, {}), *BUCKET.choices))
    assert bucket.choice(KINDS).config == PREFILL
    assert bucket.choice(["portable", "decode"]).config == PORTABLE
    assert bucket.choice(["decode"]) is None


def change_of(*places_and_value):
    """What puts a value at a place in a table's JSON, or with no value takes it away."""
    *places, last, value = places_and_value

    def change(table):
        for place in places:
            table = table[place]
        if value is None:
            del table[last]
        else:
            table[last] = value

    return change


ENTRY, FIRST = ("entries", 0), ("entries", 0, "buckets", 0)
CHOICE = (*FIRST, "choices", 0)
BUCKET_JSON = entry_to_json(TABLE.entries[KEY])["buckets"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_of("op", "permute"), "op is 'permute', but needs 'fused_moe'"),
        (change_of("device", 5), "the table.device is 5, but needs a str"),
        (change_of("entries", None), "the table has op, device, but needs the fields op, device"),
        (change_of("extra", 5), "the table has op, device, entries, extra"),
        (change_of("entries", [3]), r"entries\[0\] is 3, but needs the fields layer"),
        (change_of("entries", [entry_to_json(TABLE.entries[KEY])] * 2), "one entry per layer"),
        (change_of(*ENTRY, "layer", "width", None), r"entries\[0\].layer has num_experts, depth"),
        (change_of(*ENTRY, "layer", "width", True), r"layer.width is True, but needs a int"),
        (change_of(*ENTRY, "layer", "width", 0), "but needs sizes from 1"),
        (change_of(*ENTRY, "layer", "scales", "int4"), "has scales 'int4', but needs one of block"),
        (change_of(*ENTRY, "buckets", [BUCKET_JSON] * 2), r"for \[8, 8\] tokens, .* rising"),
        (change_of(*FIRST, "tokens", 0), "is for 0 tokens"),
        (change_of(*FIRST, "default_us", {"balanced": -1}), "takes -1 us with balanced"),
        (change_of(*FIRST, "default_us", {"balanced": float("nan")}), "takes nan us"),
        (change_of(*FIRST, "choices", []), "one choice at least"),
        (change_of(*FIRST, "choices", BUCKET_JSON["choices"] * 2), "one per kind"),
        (change_of(*CHOICE, "us", {"balanced": "fast"}), "takes 'fast' us"),
        (change_of(*CHOICE, "kind", "fast"), r"choices\[0\].config is of kind 'fast'"),
        (change_of(*CHOICE, "config", "combined", 3), "config.combined is 3"),
    ],
)
def test_a_table_out_of_order_is_refused(tmp_path, change, message):
    path = tmp_path / "fused_moe.json"
    write_table(path, TABLE)
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b""])
def test_what_is_no_table_is_refused(tmp_path, content):
    path = tmp_path / "fused_moe.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"read_table: .*fused_moe.json: the (file|table)"):
        read_table(path)
