"""Claims: candidates can run, are few, and have the heuristics' choice first; kinds that cannot
serve a layer are left out; crossing makes new ones out of the best parts.
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octomoe.core.device import Target
from octomoe.tune.candidates import (
    KNOWN_TARGETS,
    MOST,
    MOST_CROSSED,
    candidates,
    crossed,
    heuristic_config,
)
from octomoe.tune.configs import ExpertTileConfig, PrefillConfig
from octomoe.tune.entries import LayerKey
from octomoe.tune.fused_moe import (
    PREFILL_CONFIGS,
    WIDE_CONFIGS,
    decode_config,
    fused_moe_config,
    prefill_config,
)
from octomoe.tune.kinds import KINDS, SCALES, kind_of, why_illegal
from octomoe.tune.tables import BUCKETS

H200 = KNOWN_TARGETS[0]
A100 = Target("NVIDIA A100-SXM4-80GB", arch=80, sms=108, smem=166912)
CPU = Target("cpu")
KEY = LayerKey(128, 768, 2048, 8, "block")

keys = st.builds(
    LayerKey,
    st.integers(1, 512),
    st.integers(1, 16384),
    st.integers(1, 8192),
    st.integers(1, 16),
    st.sampled_from(SCALES),
)


@given(keys, st.integers(1, 1 << 17), st.sampled_from([H200, A100, CPU]))
def test_candidates_can_run_and_are_few(key, num_tokens, target):
    found = candidates(key, num_tokens, target)
    for kind, configs in found.items():
        assert 1 <= len(configs) <= MOST
        assert len(set(configs)) == len(configs)
        assert {kind_of(config) for config in configs} == {kind}
        assert all(why_illegal(config, key.scales, target) is None for config in configs)
        made = crossed(configs, key.scales, target)
        assert len(made) <= MOST_CROSSED
        assert not set(made) & set(configs)
        assert all(why_illegal(config, key.scales, target) is None for config in made)
    assert ("portable" in found) == (key.scales != "mxfp8")
    assert set(found) <= {"portable"} or target is H200
    usual = heuristic_config(key, num_tokens, target)
    if usual is None:
        assert key.scales == "mxfp8"
    else:
        assert found[kind_of(usual)][0] == usual


@pytest.mark.parametrize("num_tokens", BUCKETS)
@pytest.mark.parametrize("scales", ["block", "late", "weight_only"])
def test_the_heuristics_choice_comes_first(num_tokens, scales):
    key = replace(KEY, scales=scales)
    usual = heuristic_config(key, num_tokens, H200)
    found = candidates(key, num_tokens, H200)
    assert usual is not None
    assert found[kind_of(usual)][0] == usual
    assert found["portable"][0] == fused_moe_config(
        num_tokens,
        8,
        128,
        768,
        has_steps=scales == "block",
        row_bytes=2 if scales == "weight_only" else 1,
        target=H200,
    )


def test_kinds_are_tried_where_their_rows_are():
    kinds = {n: set(candidates(KEY, n, H200)) for n in BUCKETS}
    assert all("portable" in found for found in kinds.values())
    assert [n for n in BUCKETS if "decode" not in kinds[n]] == [1024, 2048, 4096, 8192]
    assert [n for n in BUCKETS if "prefill" in kinds[n]] == [256, 512, 1024, 2048, 4096, 8192]
    assert set(KINDS) == set().union(*kinds.values())


@pytest.mark.parametrize(
    "key",
    [replace(KEY, width=700), replace(KEY, width=192), replace(KEY, depth=2050)],
    ids=["odd width", "width of no whole scales", "odd depth"],
)
@pytest.mark.parametrize("num_tokens", [8, 8192])
def test_hopper_serves_whole_tiles_only(key, num_tokens):
    assert set(candidates(key, num_tokens, H200)) == {"portable"}
    assert kind_of(heuristic_config(key, num_tokens, H200)) == "portable"


@pytest.mark.parametrize("scales", ["late", "mxfp8", "weight_only"])
def test_without_steps_whole_tiles_are_of_16(scales):
    fine, odd = replace(KEY, width=192, scales=scales), replace(KEY, width=200, scales=scales)
    assert "prefill" in candidates(fine, 8192, H200)
    assert kind_of(heuristic_config(fine, 8192, H200)) == "prefill"
    assert "prefill" not in candidates(odd, 8192, H200)
    others = (None, fused_moe_config(8192, 8, 128, 200, has_steps=False, target=H200))
    if scales == "weight_only":
        others = (fused_moe_config(8192, 8, 128, 200, has_steps=False, row_bytes=2, target=H200),)
    assert heuristic_config(odd, 8192, H200) in others


def test_heuristics_choose_a_kind_where_it_is_faster():
    assert heuristic_config(KEY, 8192, H200) == prefill_config(8192, 8, 128, H200)
    assert heuristic_config(KEY, 8, H200) == decode_config(8, 8, 128, 768, 2048, H200) is not None
    assert kind_of(heuristic_config(KEY, 128, H200)) == "portable"
    for num_tokens in (8, 8192):
        assert kind_of(heuristic_config(KEY, num_tokens, A100)) == "portable"


def test_heuristics_choose_of_the_kinds_that_can_serve_a_layer():
    assert kind_of(heuristic_config(KEY, 8, H200, kinds=["portable", "prefill"])) == "portable"
    assert kind_of(heuristic_config(KEY, 8192, H200, kinds=["portable", "decode"])) == "portable"
    assert heuristic_config(KEY, 8, H200, kinds=["prefill"]) is None


def test_mxfp8_goes_op_by_op_where_rows_are_few():
    key = replace(KEY, scales="mxfp8")
    assert heuristic_config(key, 8, H200) is None
    assert candidates(key, 8, H200) == {}
    assert kind_of(heuristic_config(key, 8192, H200)) == "prefill"
    assert set(candidates(key, 8192, H200)) == {"prefill"}
    assert heuristic_config(key, 8192, A100) is None


@pytest.mark.parametrize(
    ("change", "config"),
    [
        ({"scales": "mxfp8"}, WIDE_CONFIGS[1]),
        # Scales of a step are no word; or they may change by the step.
        ({"scales": "mxfp8", "width": 720}, WIDE_CONFIGS[0]),
        ({"scales": "mxfp8", "depth": 2064}, WIDE_CONFIGS[0]),
        ({"scales": "weight_only"}, WIDE_CONFIGS[0]),
    ],
    ids=str,
)
def test_a_large_tile_is_usual_where_registers_hold_it(change, config):
    assert heuristic_config(replace(KEY, **change), 8192, H200) == config


@pytest.mark.parametrize("num_tokens", [256, 8192])
def test_operands_that_meet_in_bf16_have_tiles_of_their_own(num_tokens):
    for scales in SCALES:
        found = candidates(replace(KEY, scales=scales), num_tokens, H200)["prefill"]
        known = PREFILL_CONFIGS if scales in ("block", "late") else WIDE_CONFIGS
        assert set(known) <= set(found)
        assert {config.rows for config in found} == {64, 128}
        # Bytes are half as wide, so that tiles of 64 of them leave room for two programs.
        most = max(config.up_stages for config in found if config.rows == 64)
        assert most == (2 if known is PREFILL_CONFIGS else 4)


@pytest.mark.parametrize("num_tokens", [1, 8, 32, 256])
def test_few_rows_are_tried_in_every_way(num_tokens):
    found = candidates(KEY, num_tokens, H200)["decode"]
    assert {config.rows for config in found} == {8, 16}
    assert {config.columns for config in found} == {128, 256}
    assert {config.splits for config in found} == {1, 2, 4, 8}
    assert {config.group for config in found} == {1, 2, 3}
    assert {config.resident for config in found} == {1, 2}
    assert {(config.is_encoded, config.is_sorted) for config in found} == {
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    }


def test_only_kinds_that_are_asked_for():
    assert set(candidates(KEY, 512, H200, kinds=["prefill", "portable"])) == {"prefill", "portable"}
    assert candidates(KEY, 1, H200, kinds=["prefill"]) == {}


def test_what_was_best_before_is_tried_again():
    extra = PrefillConfig(64, up_stages=1, down_stages=1)
    illegal = PrefillConfig(64, up_stages=9, down_stages=1)
    found = candidates(KEY, 8192, H200, also=[extra, illegal])
    assert found["prefill"][:2] == (prefill_config(8192, 8, 128, H200), extra)
    assert illegal not in found["prefill"]
    assert extra not in found["portable"]


def test_without_steps_wide_tiles_are_not_tried():
    found = candidates(replace(KEY, scales="late"), 2048, H200)["portable"]
    assert {config.up.columns for config in found} == {64}


def test_crossing_brings_the_best_halves_together():
    first, *_ = candidates(KEY, 1, H200)["portable"]
    up, down = ExpertTileConfig(16, 64, num_stages=2), ExpertTileConfig(16, 64, num_stages=6)
    ranked = [replace(first, up=up), replace(first, down=down), first]
    made = crossed(ranked, "block", H200)
    assert made[0] == replace(first, up=up, down=down)


def test_crossing_keeps_the_sides_of_the_best():
    first, *_ = candidates(KEY, 1, H200)["portable"]
    other = replace(first, is_swapped=False, combined=64)
    assert crossed([first, other], "block", H200) == []
    assert crossed([], "block", H200) == []
