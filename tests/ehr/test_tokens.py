"""Joint tokens: the right subject, nothing from later, fitted on training subjects only, unchanged since they were fitted."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjepa.ehr.batches import BatchesConfig, EventBatches
from mmjepa.ehr.saved import Form
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.tokens import FIRST, PAD, UNKNOWN, JointTokens, TokensConfig
from mmjepa.refusal import Refusal

HOUR_US = 3_600_000_000
CODES = ["A", "B", "CT//CHEST", "MEDS_DEATH", "RARE"]
CONFIG = TokensConfig(min_count=2)


def store_of(events, statics=(), images=(), fingerprint="x"):
    """events: (subject, hour, code, value or nan, hour when available); statics: (subject, code, value). In memory, no files."""
    ids = np.unique([row[0] for row in [*events, *statics]]).astype(np.int64)
    timed = sorted(events, key=lambda row: (row[0], row[4], row[1]))
    static = sorted(statics, key=lambda row: row[0])
    vocabulary = sorted({*CODES, *(row[2] for row in timed), *(row[1] for row in static)})

    def column(rows, at, kind, scale=1):
        return np.array([row[at] * scale for row in rows], kind)

    def offsets(rows):
        return np.searchsorted(column(rows, 0, np.int64), np.append(ids, np.iinfo(np.int64).max))

    return EventStore(
        subjects=ids,
        offsets=offsets(timed),
        times_us=column(timed, 1, np.int64, HOUR_US),
        available_us=column(timed, 4, np.int64, HOUR_US),
        codes=np.array([vocabulary.index(row[2]) for row in timed], np.int32),
        values=column(timed, 3, np.float32),
        static_offsets=offsets(static),
        static_codes=np.array([vocabulary.index(row[1]) for row in static], np.int32),
        static_values=column(static, 2, np.float32),
        hadm_id=np.full(len(timed), -1),
        image_rows=np.array(sorted(images), np.int64),
        image_ids={row: f"image{row}" for row in images},
        vocabulary=vocabulary,
        descriptions={},
        splits={},
        fingerprint=fingerprint,
    )


def encode(tokens, store, subject, hour, most=100):
    (start,), (stop,) = store.as_of(np.array([subject]), np.array([hour * HOUR_US]))
    return tokens.encode(store, subject, int(start), int(stop), hour * HOUR_US, most)


rows = st.tuples(
    st.integers(1, 3),
    st.integers(0, 20),
    st.sampled_from([*CODES, "C"]),
    st.sampled_from([np.nan, 1.0, 2.0, 9.0]),
    st.integers(0, 5),
)
worlds = st.lists(rows.map(lambda row: (*row[:4], row[1] + row[4])), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(worlds, st.integers(-1, 22), st.integers(0, 12))
def test_encode_equals_brute_force(events, hour, most):
    statics = [(subject, "A", 2.0) for subject in (1, 2, 3)] + [(2, "MEDS_DEATH", np.nan)]
    store = store_of(events, statics, images=[0])
    tokens = JointTokens.fit(store, [1, 2, 3], TokensConfig(min_count=2, winsor=(0.1, 0.9)))
    frame = pd.DataFrame(
        sorted(events, key=lambda row: (row[0], row[4], row[1])),
        columns=["subject", "time", "code", "value", "available"],
    )
    for subject in (1, 2, 3):
        own = frame[(frame["subject"] == subject) & (frame["available"] <= hour) & (frame.index != 0)]
        own = own[~own["code"].isin(["CT//CHEST", "MEDS_DEATH"])]
        static = [("A", 2.0)][:most]
        own = own.tail(most - len(static)) if most > len(static) else own.head(0)
        found = encode(tokens, store, subject, hour, most)
        named = [tokens.codes[token - FIRST] if token >= FIRST else "?" for token in found["codes"]]
        expected = [*static, *zip(own["code"], own["value"], strict=True)]
        assert named == [code if code in tokens.codes else "?" for code, _ in expected]
        assert found["days"].tolist() == pytest.approx([0.0] * len(static) + ((own["time"] - hour) / 24).tolist())
        for code, value, scaled, has in zip(
            named, (value for _, value in expected), found["values"], found["has_value"], strict=True
        ):
            at = tokens.codes.index(code) if code != "?" else -1
            known = at >= 0 and value == value and tokens.mean[at] == tokens.mean[at]
            assert has == known
            want = (np.clip(value, tokens.low[at], tokens.high[at]) - tokens.mean[at]) / tokens.std[at] if known else 0
            assert scaled == pytest.approx(want, abs=1e-6)
        assert {name: column.dtype.name for name, column in found.items()} == {
            "codes": "int64",
            "values": "float32",
            "has_value": "bool",
            "days": "float32",
        }
        assert PAD not in found["codes"]


@settings(max_examples=30, deadline=None)
@given(worlds, worlds, st.integers(0, 20))
def test_changing_what_becomes_known_later_leaves_the_tokens_unchanged(events, others, hour):
    tokens = JointTokens.fit(store_of(events * 2 + [(1, 0, "A", 1.0, 0)] * 2), [1], CONFIG)
    past = [row for row in events if row[4] <= hour]
    statics = [(subject, "A", 1.0) for subject in (1, 2, 3)]
    one, other = (
        store_of(past + [row for row in future if row[4] > hour], statics, fingerprint=name)
        for name, future in (("one", events), ("other", others))
    )
    for subject in (1, 2, 3):
        for name, column in encode(tokens, one, subject, hour).items():
            np.testing.assert_array_equal(column, encode(tokens, other, subject, hour)[name])


def test_every_subject_gets_its_own_code_and_no_other():
    events = [(s, h, f"S{s}", float(s), h) for s in range(1, 30) for h in range(s % 7)]
    statics = [(s, f"S{s}", np.nan) for s in range(1, 30)]
    store = store_of(events, statics)
    tokens = JointTokens.fit(store, range(1, 30), TokensConfig(min_count=1))
    for s in range(1, 30):
        found = encode(tokens, store, s, 9)["codes"]
        assert {tokens.codes[token - FIRST] for token in found} == {f"S{s}"}
        assert len(found) == 1 + s % 7
    with pytest.raises(ValueError, match="not the subject's own"):
        tokens.encode(store, 4, 0, 1, 9, 9)


def test_old_rows_are_found_behind_many_that_give_no_token():
    """Newest first: 20 excluded rows, then the three that count; 20 more are not yet available."""
    events = [(1, h, "A", float(h), h) for h in range(3)]
    events += [(1, 3, "MEDS_DEATH", np.nan, 3)] * 20 + [(1, 4, "B", 1.0, 99)] * 20
    store = store_of(events)
    found = encode(JointTokens.fit(store, [1], CONFIG), store, 1, 4, most=2)
    np.testing.assert_allclose(found["days"], np.array([-3, -2]) / 24, rtol=1e-6)


def test_only_training_subjects_are_fitted_on():
    train = [(1, h, "A", float(h), h) for h in range(5)]
    one, other = (
        store_of(train + [(2, h, code, 99.0, h) for h in range(5)], fingerprint="same") for code in ("A", "B")
    )
    assert JointTokens.fit(one, [1], CONFIG).hash == JointTokens.fit(other, [1], CONFIG).hash
    assert JointTokens.fit(one, [1, 2], CONFIG).hash != JointTokens.fit(one, [1], CONFIG).hash
    assert JointTokens.fit(one, [1], CONFIG).high.tolist() == [4.0]


def test_rare_codes_are_unknown_and_excluded_ones_give_no_token():
    events = [
        (1, 0, code, np.nan, 0) for code in ("A", "A", "RARE", "MEDS_DEATH", "MEDS_DEATH", "CT//CHEST", "CT//CHEST")
    ]
    store = store_of(events)
    tokens = JointTokens.fit(store, [1], CONFIG)
    assert tokens.codes == ("A",)
    assert tokens.size == 3
    assert encode(tokens, store, 1, 0)["codes"].tolist() == [FIRST, FIRST, UNKNOWN]


def test_infinite_values_do_not_spoil_the_statistics():
    events = [(1, h, "A", value, h) for h, value in enumerate([1.0, 2.0, 3.0, np.inf])]
    tokens = JointTokens.fit(store_of(events), [1], CONFIG)
    assert tokens.high.tolist() == [3.0]
    assert np.isfinite(encode(tokens, store_of(events), 1, 9)["values"]).all()


BINS = TokensConfig(min_count=1, values="bins", bins=4)


@settings(max_examples=60, deadline=None)
@given(worlds, st.integers(-1, 22))
def test_a_token_with_a_bin_says_the_code_and_how_many_training_quantiles_its_value_has_reached(events, hour):
    store = store_of(events, [(subject, "A", 2.0) for subject in (1, 2, 3)])
    plain = JointTokens.fit(store, [1, 2, 3], TokensConfig(min_count=1))
    tokens = JointTokens.fit(store, [1, 2, 3], BINS)
    assert tokens.codes == plain.codes
    meaning = {UNKNOWN: None}
    for code, first, edges, mean in zip(tokens.codes, tokens.first, tokens.edges, tokens.mean, strict=True):
        known = edges[~np.isnan(edges)]
        values = [v for s, _, c, v, _ in [*events, *((s, 0, "A", 2.0, 0) for s in (1, 2, 3))] if c == code and v == v]
        wanted = [np.sort(values)[int(np.ceil(k / 4 * (len(values) - 1)))] for k in (1, 2, 3)] if values else []
        assert known.tolist() == sorted(set(wanted))
        assert (mean == mean) == bool(values)
        meaning |= {int(first) + k: (code, k - 1) for k in range(len(known) + 2 if values else 1)}
    assert sorted(meaning) == list(range(1, tokens.size))
    for subject in (1, 2, 3):
        if not any(row[0] == subject for row in events):
            continue
        one, other = encode(plain, store, subject, hour), encode(tokens, store, subject, hour)
        assert not other["has_value"].any()
        assert not other["values"].any()
        np.testing.assert_array_equal(one["days"], other["days"])
        for old, new, has, scaled in zip(one["codes"], other["codes"], one["has_value"], one["values"], strict=True):
            code, number = meaning[int(new)]
            assert code == plain.codes[old - FIRST]
            assert (number >= 0) == has
            if has and tokens.high[tokens.codes.index(code)] > tokens.low[tokens.codes.index(code)]:
                at = tokens.codes.index(code)
                value = scaled * plain.std[at] + plain.mean[at]
                reached = [edge for edge in tokens.edges[at] if value >= edge - 1e-3]
                assert number == len(reached)


def test_bins_are_those_of_training_subjects_and_outliers_fall_into_the_last_ones():
    train = [(1, h, "A", float(h), h) for h in range(9)]
    held_out = [(2, h, "A", value, h) for h, value in enumerate([-1e9, 4.0, 1e9, np.inf, np.nan])]
    store = store_of(train + held_out)
    tokens = JointTokens.fit(store, [1], BINS)
    assert tokens.edges.tolist() == [[2.0, 4.0, 6.0]]
    assert encode(tokens, store, 2, 9)["codes"].tolist() == [FIRST + 1, FIRST + 3, FIRST + 4, FIRST + 4, FIRST]
    assert tokens.size == FIRST + 5


@pytest.mark.parametrize("config", [BINS, CONFIG])
def test_batches_hold_the_tokens_that_encoding_gives(config):
    events = [(s, h, "AB"[h % 2], float(h * s % 7) if h % 3 else np.nan, h) for s in (1, 2, 3) for h in range(4 * s)]
    store = store_of(events, [(s, "A", float(s)) for s in (1, 2, 3)])
    tokens = JointTokens.fit(store, [1, 2], config)
    settings = BatchesConfig(length=9, static="prepend", values=True)
    times = np.full(3, 11 * HOUR_US)
    batch = EventBatches(store, store.subjects, times, tokens=tokens, config=settings).batch(np.arange(3))
    for row, subject in enumerate((1, 2, 3)):
        found = encode(tokens, store, subject, 11, most=9)
        inside = batch.present[row].numpy()
        np.testing.assert_array_equal(batch.codes[row].numpy()[inside], found["codes"])
        np.testing.assert_array_equal(batch.has_value[row].numpy()[inside], found["has_value"])


def test_saved_bins_load_unchanged(tmp_path):
    events = [(1, h, code, value, h) for h in range(9) for code, value in (("A", h / 3), ("B", np.nan))]
    tokens = JointTokens.fit(store_of(events), [1], BINS)
    tokens.save(tmp_path / "tokens.json")
    loaded = JointTokens.load(tmp_path / "tokens.json", expected=tokens.hash)
    np.testing.assert_array_equal(loaded.edges, tokens.edges)
    assert (loaded.size, loaded.first.tolist()) == (tokens.size, tokens.first.tolist())
    assert tokens.hash != JointTokens.fit(store_of(events), [1], TokensConfig(min_count=1)).hash


def test_saved_tokens_load_unchanged_and_changed_ones_are_refused(tmp_path):
    events = [(1, h, code, value, h) for h in range(9) for code, value in (("A", h / 3), ("B", np.nan))]
    tokens = JointTokens.fit(store_of(events), [1], CONFIG)
    file = tmp_path / "tokens.json"
    tokens.save(file)
    loaded = JointTokens.load(file, expected=tokens.hash)
    assert (loaded.hash, loaded.fitted_on, loaded.codes, loaded.config) == (tokens.hash, "x", tokens.codes, CONFIG)
    np.testing.assert_array_equal(loaded.mean, tokens.mean)
    with pytest.raises(Refusal, match="FORM_HASH"):
        JointTokens.load(file, expected=replace(tokens, fitted_on="y").hash)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"mean": [0.0, None]}))
    with pytest.raises(Refusal, match="FORM_HASH"):
        JointTokens.load(file)
    EmptyForm(content["version"]).save(file)
    with pytest.raises(Refusal, match="FORM_BROKEN"):
        JointTokens.load(file)


class EmptyForm(Form):
    """Joint tokens by kind, version and hash, with nothing fitted."""

    def __init__(self, version: int) -> None:
        self.version = version

    def _content(self) -> dict[str, object]:
        return {"kind": "tokens", "version": self.version}


def test_no_frequent_code_is_refused():
    with pytest.raises(Refusal, match="TOKENS_EMPTY"):
        JointTokens.fit(store_of([(1, 0, "A", 1.0, 0)]), [1], CONFIG)


@pytest.mark.real_data
def test_the_mimic_demo_encodes_within_limits(data_folder):
    store = EventStore.in_memory(data_folder / "mimic_iv_demo_meds")
    tokens = JointTokens.fit(store, store.splits["train"])
    assert np.nanmax(np.abs(tokens.high)) < 1e6  # the source holds 585,573 mL and more
    start, stop = store.as_of(store.subjects, np.full(100, store.times_us.max()))
    for subject, a, b in zip(store.subjects.tolist(), start.tolist(), stop.tolist(), strict=True):
        found = tokens.encode(store, subject, a, b, int(store.times_us[b - 1]), 512)
        assert len(found["codes"]) <= 512
        assert np.isfinite(found["values"]).all()
        assert (found["days"] <= 0).all()
