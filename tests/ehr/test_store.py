"""The event store holds exactly the source's rows, each with its own subject, and never shows a later one."""

import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjepa.ehr import store as store_module
from mmjepa.ehr.store import EventStore, given_us, to_us
from mmjepa.refusal import Refusal

ARRAYS = (
    "subjects",
    "offsets",
    "times_us",
    "available_us",
    "hadm_id",
    "codes",
    "values",
    "static_offsets",
    "static_codes",
    "static_values",
)


def write_root(root, frame, shards=1, splits=None):
    """Write a frame with subject_id, time (hours, NaN = static), code, value and perhaps available, hadm, image, as a MEDS root."""
    (root / "metadata").mkdir(parents=True)
    (root / "data").mkdir()
    hours = lambda column: pd.to_datetime(frame[column] * 3600, unit="s").astype("datetime64[us]")  # noqa: E731
    events = pd.DataFrame({"subject_id": frame["subject_id"], "time": hours("time"), "code": frame["code"]})
    events["numeric_value"] = frame["value"].astype(np.float32)
    if "available" in frame:
        events["available_time"] = hours("available")
    if "hadm" in frame:
        events["hadm_id"] = frame["hadm"].astype("Int64")
    if "image" in frame:
        events["image_id"] = frame["image"]
    for i, subjects in enumerate(np.array_split(events["subject_id"].unique(), shards)):
        events[events["subject_id"].isin(subjects)].to_parquet(root / "data" / f"{i}.parquet", index=False)
    pd.DataFrame({"code": events["code"].unique()}).to_parquet(root / "metadata" / "codes.parquet")
    if splits:
        pd.DataFrame(splits).to_parquet(root / "metadata" / "subject_splits.parquet")
    return root


def world(subjects, code_of, seed=0):
    """Random events: a static and up to nine timed rows a subject, with ties, late availability and missing values."""
    rng = np.random.default_rng(seed)
    rows = []
    for subject in subjects:
        times = np.sort(rng.integers(0, 5, rng.integers(0, 10)))
        late = np.where(rng.random(len(times)) < 0.5, times + rng.integers(-1, 4, len(times)), np.nan)
        rows += [(subject, np.nan, np.nan, code_of(subject, "static"), np.nan)]
        rows += [
            (subject, t, a, code_of(subject, rng.integers(3)), rng.choice([np.nan, t]))
            for t, a in zip(times, late, strict=True)
        ]
    return pd.DataFrame(rows, columns=["subject_id", "time", "available", "code", "value"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.permutations(range(-2, 6)))
def test_as_of_equals_brute_force_for_any_sharding_and_subject_order(seed, shards, subjects):
    frame = world(subjects, lambda _, kind: f"C//{kind}", seed)
    with tempfile.TemporaryDirectory() as folder:
        store = EventStore.in_memory(write_root(Path(folder) / "ehr", frame, shards))
    for t in (-1, 0, 2, 2.5, 9):
        t_us = int(t * 3_600_000_000)
        start, stop = store.as_of(np.array(subjects), np.full(len(subjects), t_us))
        for subject, a, b in zip(subjects, start, stop, strict=True):
            own = frame[(frame["subject_id"] == subject) & frame["time"].notna()]
            own = own.assign(available=own["available"].fillna(own["time"]))
            known = own[own["available"] <= t].sort_values("available", kind="stable")
            assert [store.vocabulary[code] for code in store.codes[a:b]] == known["code"].tolist()
            np.testing.assert_array_equal(store.values[a:b], known["value"].astype(np.float32))
            np.testing.assert_array_equal(store.times_us[a:b], known["time"] * 3_600_000_000)
            np.testing.assert_array_equal(store.available_us[a:b], known["available"] * 3_600_000_000)


def test_rows_keep_their_admission_and_image_when_availability_reorders_them(tmp_path):
    frame = pd.DataFrame(
        {
            "subject_id": [7, 7, 7, 7, 8],
            "time": [np.nan, 1.0, 2.0, 3.0, 1.0],
            "available": [np.nan, 9.0, np.nan, 3.0, np.nan],
            "code": ["SEX", "LATE", "SOON", "CT//CHEST", "SOON"],
            "value": [np.nan, 1.0, 2.0, 3.0, 4.0],
            "hadm": [None, 11, None, 13, 14],
            "image": [None, None, None, "one", None],
        }
    )
    for store in (
        EventStore.in_memory(write_root(tmp_path / "a", frame)),
        EventStore.build(write_root(tmp_path / "b", frame, shards=2), tmp_path / "store"),
    ):
        assert [store.vocabulary[code] for code in store.codes] == ["SOON", "CT//CHEST", "LATE", "SOON"]
        assert store.hadm_id.tolist() == [-1, 13, 11, 14]
        assert store.image_ids == {1: "one"}
        assert store.values.tolist() == [2, 3, 1, 4]
        assert store.static_codes.tolist() == [store.vocabulary.index("SEX")]


def test_without_admissions_every_row_has_none_and_no_file_holds_them(tmp_path):
    root = write_root(tmp_path / "ehr", world([1, 2], lambda _, kind: f"C//{kind}"))
    store = EventStore.build(root, tmp_path / "store")
    assert store.hadm_id.shape == store.codes.shape
    assert (np.asarray(store.hadm_id) == -1).all()
    assert store.hadm_id.strides == (0,)


def test_every_row_carries_its_own_subject_and_no_other(tmp_path):
    subjects = [5, 3, 900, 17, 4]
    frame = world(subjects, lambda subject, kind: f"S{subject}//{kind}", seed=3)
    store = EventStore.in_memory(write_root(tmp_path / "ehr", frame, shards=3))
    seen = 0
    for row, subject in enumerate(store.subjects):
        own = [
            *store.codes[slice(*store.offsets[row : row + 2])],
            *store.static_codes[slice(*store.static_offsets[row : row + 2])],
        ]
        assert {store.vocabulary[code].split("//")[0] for code in own} == {f"S{subject}"}
        seen += len(own)
    assert seen == len(frame)


def test_the_same_content_has_the_same_fingerprint_however_it_lies(tmp_path):
    frame = world(range(8), lambda _, kind: f"C//{kind}")
    one = EventStore.in_memory(write_root(tmp_path / "a", frame))
    three = EventStore.build(
        write_root(tmp_path / "b", frame.sort_values("subject_id", ascending=False, kind="stable"), 3),
        tmp_path / "store",
    )
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(three, name))
    assert one.fingerprint == three.fingerprint == EventStore.open(tmp_path / "store").fingerprint
    changed = frame.assign(value=frame["value"].where(frame.index != frame["value"].first_valid_index(), 7))
    assert EventStore.in_memory(write_root(tmp_path / "c", changed)).fingerprint != one.fingerprint


def test_another_process_opens_the_maps_by_path(tmp_path):
    root = write_root(tmp_path / "ehr", world(range(500), lambda _, kind: f"C//{kind}"))
    built = EventStore.build(root, tmp_path / "store")
    sent = pickle.dumps(built)
    assert len(sent) < 500
    assert isinstance(pickle.loads(sent).codes, np.memmap)
    in_memory = EventStore.in_memory(root)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(in_memory)).codes, built.codes)


def test_images_and_splits_are_found_by_row_and_name(tmp_path):
    frame = pd.DataFrame(
        {"subject_id": [9, 9, 9, 2], "time": [np.nan, 1.0, 2.0, 3.0], "code": ["A", "A", "CT//CHEST", "CT//CHEST"]}
    )
    frame["value"], frame["image"] = np.nan, [None, None, "i1", "i2"]
    root = write_root(tmp_path / "ehr", frame, 2, {"subject_id": [2, 9], "split": ["held_out", "train"]})
    for store in (EventStore.in_memory(root), EventStore.build(root, tmp_path / "store")):
        assert store.image_ids == {0: "i2", 2: "i1"}
        assert {name: ids.tolist() for name, ids in store.splits.items()} == {"held_out": [2], "train": [9]}
        assert store.match(["CT"]).tolist() == [code.startswith("CT") for code in store.vocabulary]


def test_prefixes_match_whole_parts_only(tmp_path):
    frame = pd.DataFrame({"subject_id": 1, "time": 1.0, "code": ["LAB//1", "LAB//12", "LAB", "LABEL"], "value": np.nan})
    store = EventStore.in_memory(write_root(tmp_path / "ehr", frame))
    assert [code for code, hit in zip(store.vocabulary, store.match(["LAB//1"]), strict=True) if hit] == ["LAB//1"]
    assert store.match(["LAB"]).sum() == 3


def test_an_unknown_subject_is_refused_without_its_id(tmp_path):
    store = EventStore.in_memory(write_root(tmp_path / "ehr", world([1, 2], lambda _, kind: f"C//{kind}")))
    for unknown in (-5, 99991):
        with pytest.raises(Refusal, match="SUBJECT_UNKNOWN") as caught:
            store.as_of(np.array([1, unknown]), np.zeros(2, np.int64))
        assert "number 1 " in str(caught.value)
        assert str(unknown) not in str(caught.value)


def test_a_missing_or_damaged_store_is_refused(tmp_path):
    with pytest.raises(Refusal, match="STORE_MISSING"):
        EventStore.open(tmp_path)
    EventStore.build(write_root(tmp_path / "ehr", world([1, 2], lambda _, kind: f"C//{kind}")), tmp_path / "store")
    for content in (b"x", b""):
        (tmp_path / "store" / "codes.npy").write_bytes(content)
        with pytest.raises(Refusal, match="STORE_BROKEN"):
            EventStore.open(tmp_path / "store")


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x.astype(np.float64), lambda x: x[:, None]])
def test_an_array_of_another_length_or_type_is_refused(tmp_path, change):
    frame = world(range(6), lambda _, kind: f"C//{kind}").assign(hadm=3)
    EventStore.build(write_root(tmp_path / "ehr", frame), tmp_path / "store")
    for name in ARRAYS:
        file = tmp_path / "store" / f"{name}.npy"
        whole = file.read_bytes()
        np.save(file, change(np.load(file)))
        with pytest.raises(Refusal, match="STORE_BROKEN"):
            EventStore.open(tmp_path / "store")
        file.write_bytes(whole)
    assert len(EventStore.open(tmp_path / "store").subjects) == 6


@pytest.mark.parametrize("text", ["[]", '{"version": 2}', "{", "\x00"])
def test_a_store_json_without_its_entries_is_refused(tmp_path, text):
    EventStore.build(write_root(tmp_path / "ehr", world([1, 2], lambda _, kind: f"C//{kind}")), tmp_path / "store")
    (tmp_path / "store" / "store.json").write_text(text)
    with pytest.raises(Refusal, match="STORE_BROKEN"):
        EventStore.open(tmp_path / "store")


def test_offsets_that_do_not_ascend_are_refused(tmp_path):
    EventStore.build(write_root(tmp_path / "ehr", world(range(6), lambda _, kind: f"C//{kind}")), tmp_path / "store")
    offsets = np.load(tmp_path / "store" / "offsets.npy")
    offsets[1] = offsets[-1] + 1
    np.save(tmp_path / "store" / "offsets.npy", offsets)
    with pytest.raises(Refusal, match="STORE_BROKEN"):
        EventStore.open(tmp_path / "store")


def test_another_process_refuses_a_store_that_was_built_anew_from_other_records(tmp_path):
    frame = world([1, 2, 3], lambda _, kind: f"C//{kind}", seed=5)
    root = write_root(tmp_path / "ehr", frame)
    sent = pickle.dumps(EventStore.build(root, tmp_path / "store"))
    shutil.rmtree(root)
    EventStore.build(write_root(root, frame.assign(value=7.0)), tmp_path / "store")
    with pytest.raises(Refusal, match="STORE_CHANGED"):
        pickle.loads(sent)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_store_that_is_replaced_while_it_is_opened_is_read_from_one_of_both(tmp_path, monkeypatch, deleted):
    frame = world([1, 2, 3], lambda _, kind: f"C//{kind}", seed=5)
    for value in (1.0, 2.0):
        place = tmp_path / f"{value:.0f}"
        EventStore.build(write_root(place / "ehr", frame.assign(value=value)), place / "store")
    load = store_module._load

    def replaced(path):
        if path.stem == "values" and (tmp_path / "2" / "store").exists():
            (tmp_path / "1" / "store").rename(tmp_path / "old")
            (tmp_path / "2" / "store").rename(tmp_path / "1" / "store")
            if deleted:
                raise FileNotFoundError
        return load(path)

    monkeypatch.setattr(store_module, "_load", replaced)
    store = EventStore.open(tmp_path / "1" / "store")
    assert set(store.values.tolist()) == {2.0}
    monkeypatch.undo()
    assert store.fingerprint == EventStore.open(tmp_path / "1" / "store").fingerprint


def test_a_store_opened_by_a_relative_path_is_found_from_anywhere(tmp_path, monkeypatch):
    EventStore.build(write_root(tmp_path / "ehr", world([1, 2], lambda _, kind: f"C//{kind}")), tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(EventStore.open("store"))
    monkeypatch.chdir("/")
    assert pickle.loads(sent).subjects.tolist() == [1, 2]


@pytest.mark.parametrize("times", [pd.Series, list, lambda x: np.array(x, object), lambda x: x[0]])
def test_to_us_refuses_a_time_zone_instead_of_moving_it(times):
    with pytest.raises(Refusal, match="TIME_ZONE"):
        to_us(times([pd.Timestamp("2020-01-01", tz="America/New_York")]))


def test_to_us_reads_pandas_times():
    assert to_us(pd.Series(pd.to_datetime(["1970-01-01 00:00:01"]))).tolist() == [1_000_000]


@pytest.mark.real_data
def test_the_mimic_demo_store_equals_its_parquet(data_folder):
    root = data_folder / "mimic_iv_demo_meds"
    store = EventStore.in_memory(root)
    assert (len(store.subjects), len(store.codes) + len(store.static_codes)) == (100, 916_166)
    frame = pd.concat(pd.read_parquet(path) for path in (root / "data").rglob("*.parquet"))
    frame = frame[frame["time"].notna()].sort_values("subject_id", kind="stable")
    np.testing.assert_array_equal(store.times_us, to_us(frame["time"]))
    np.testing.assert_array_equal(store.values, frame["numeric_value"])
    assert (np.array(store.vocabulary, object)[store.codes] == frame["code"].to_numpy()).all()
    families = frame.groupby(frame["code"].str.split("//").str[0])["numeric_value"].count()
    assert families["LAB"] == np.isfinite(store.values[store.match(["LAB"])[store.codes]]).sum() > 300_000


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("kind", [pd.Series, np.asarray, pd.DatetimeIndex, lambda x: pd.Series(x).tolist(), list])
def test_as_of_reads_a_date_time_of_any_unit_as_the_time_that_it_says(tmp_path, unit, kind):
    store = EventStore.in_memory(write_root(tmp_path / "ehr", world(range(9), lambda _, kind: f"C//{kind}")))
    asked_us = (np.arange(9) - 2) * 3_600_000_000
    times = kind(asked_us.astype("datetime64[us]").astype(f"datetime64[{unit}]"))
    for found, want in zip(store.as_of(store.subjects, times), store.as_of(store.subjects, asked_us), strict=True):
        assert found.tolist() == want.tolist()
    assert given_us(times).tolist() == asked_us.tolist()


@pytest.mark.parametrize("code", ["TIME_TYPE", "TIME_ZONE"])
def test_as_of_refuses_what_says_no_time_and_a_zone(tmp_path, code):
    store = EventStore.in_memory(write_root(tmp_path / "ehr", world([1], lambda _, kind: f"C//{kind}")))
    zoned = [pd.Timestamp("2020-01-01", tz="America/New_York")]
    wrong = {
        "TIME_ZONE": (zoned, pd.Series(zoned), pd.DatetimeIndex(zoned)),
        "TIME_TYPE": (
            *([1.5], ["2020-01-01"], [np.timedelta64(1, "s")], [True], [None], [pd.NaT], [np.datetime64("NaT")]),
            np.array(["2020-01-01"], "datetime64[ns]").astype(object),  # numpy makes it a number that has lost its unit
            *(pd.Series(["2020-01-01T00:00+02:00"]), pd.Series([1, None], dtype="Int64")),
        ),
    }
    for times in wrong[code]:
        with pytest.raises(Refusal, match=code) as info:
            store.as_of(np.array([1]), times)
        assert "2020" not in info.value.message


def test_whole_numbers_are_microseconds_whatever_holds_them():
    for times in ([5, 7], pd.Series([5, 7]), pd.Series([5, 7], dtype="Int64"), np.array([5, 7], np.int32), (5, 7)):
        assert given_us(times).tolist() == [5, 7]
    assert given_us([]).dtype == np.int64
