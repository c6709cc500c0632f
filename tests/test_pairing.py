"""An image is paired with its own subject's record at a time when both are known, or counted with the reason."""

from datetime import datetime, timedelta

import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from mmjepa.cohort import Cohort
from mmjepa.ct.store import VolumeStore
from mmjepa.ehr.store import EventStore
from mmjepa.ingest import ingest
from mmjepa.pairing import NO_IMAGE, REASONS, pair, pairing_table
from mmjepa.refusal import Refusal

DAY_ONE = datetime(2020, 1, 1)


def day(number):
    return None if number is None else DAY_ONE + timedelta(days=number)


def make_store(folder, rows):
    """A store of (subject, day, day when available, code, image_id)."""
    frame = pd.DataFrame(rows, columns=["subject_id", "time", "available_time", "code", "image_id"])
    for name in ("time", "available_time"):
        frame[name] = pd.Series(
            [day(None if number != number else number) for number in frame[name]], dtype="datetime64[us]"
        )
    frame["image_id"] = frame["image_id"].astype(object)
    for part in ("data", "metadata"):
        (folder / part).mkdir(parents=True)
    frame.to_parquet(folder / "data" / "0.parquet")
    pd.DataFrame({"code": frame["code"].unique()}).to_parquet(folder / "metadata" / "codes.parquet")
    return EventStore.in_memory(folder)


@pytest.fixture
def store(tmp_path):
    """Subject 1: labs at days 0 and 10 (the latter known at 12), a CT row at day 9; subject 2: a CT row and a lab after it."""
    rows = [
        (1, None, None, "GENDER//F", None),
        (1, 0, 0, "LAB//A", None),
        (1, 9, 9, "CT//CHEST", "one"),
        (1, 10, 12, "LAB//A", None),
        (2, 3, 3, "CT//CHEST", "two"),
        (2, 5, 5, "LAB//A", None),
    ]
    return make_store(tmp_path, rows)


def index(*rows):
    frame = pd.DataFrame(rows, columns=["image_id", "subject_id", "time"])
    frame["time"] = pd.Series(
        [day(None if number != number else number) for number in frame["time"]], dtype="datetime64[us]"
    )
    return frame


def test_as_of_scan_predicts_at_the_scan(store):
    frame, report = pair(index(("one", 1, 9), ("x", 1, 30)), store)
    assert frame.to_numpy().tolist() == [["one", 1, pd.Timestamp(day(9))], ["x", 1, pd.Timestamp(day(30))]]
    assert str(frame["prediction_time"].dtype) == "datetime64[us]"
    assert (report["images"], report["paired"], sum(report["unmatched"].values())) == (2, 2, 0)


def test_every_unmatched_image_is_counted_with_its_reason(store):
    rows = [("a", 7, 9), ("two", 1, 9), ("b", 1, None), ("c", 1, -1), ("two", 2, 3)]
    frame, report = pair(index(*rows), store)
    assert frame.empty
    assert {name: n for name, n in report["unmatched"].items() if n} == {
        "subject_not_in_records": 1,
        "other_subject_in_records": 1,
        "no_time": 1,
        "no_event_in_window": 2,
    }


def test_an_image_without_a_time_takes_the_time_of_its_row_in_the_records(store):
    frame, _ = pair(index(("one", 1, None)), store)
    assert frame["prediction_time"].tolist() == [pd.Timestamp(day(9))]


def test_the_window_counts_only_events_that_were_available_by_the_scan(store):
    at_eleven = index(("x", 1, 11))
    assert (
        pair(at_eleven, store, window_days=10.9)[1]["unmatched"]["no_event_in_window"] == 1
    )  # day 10 is known at day 12
    assert pair(at_eleven, store, window_days=11)[1]["paired"] == 1
    assert pair(index(("x", 1, 12)), store, window_days=2)[1]["paired"] == 1


@pytest.mark.parametrize(("scan", "expected"), [(1, 1), (9, 12), (11, 12), (20, 20), (-3, 0)])
def test_nearest_predicts_when_both_are_known(store, scan, expected):
    frame, _ = pair(index(("x", 1, scan)), store, rule="nearest")
    assert frame["prediction_time"].tolist() == [pd.Timestamp(day(expected))]


def test_nearest_ignores_image_rows_and_events_outside_the_window(store):
    assert pair(index(("two", 2, 3)), store, rule="nearest")[0]["prediction_time"].tolist() == [pd.Timestamp(day(5))]
    assert pair(index(("two", 2, 3)), store, rule="nearest", window_days=1.9)[1]["unmatched"]["no_event_in_window"] == 1


def test_nothing_to_pair_gives_an_empty_frame(store):
    frame, report = pair(index(), store)
    assert frame.columns.tolist() == ["image_id", "subject_id", "prediction_time"]
    assert report["images"] == report["paired"] == 0
    assert frame["subject_id"].dtype == np.int64


def test_bad_requests_are_refused(store):
    with pytest.raises(Refusal, match="PAIRING_INDEX"):
        pair(index().drop(columns="time"), store)
    labels = index()[["subject_id"]].assign(prediction_time=index()["time"])
    for bad in (
        {"rule": "closest"},
        {"scans": "some"},
        {"scans": "nearest"},
        {"labels": labels},
        {"rule": "as_of_order"},
        {"orders": ["CT//ORDER"]},
        {"rule": "as_of_order", "orders": ["NOWHERE"]},
        {"window_days": -1},
        {"window_days": float("nan")},
    ):
        with pytest.raises(Refusal, match="PAIRING_RULE"):
            pair(index(), store, **bad)


def test_who_has_no_image_is_a_row_of_its_own_and_counted(store):
    rows = index(("x", 1, 9), ("y", 7, 9))
    table = pairing_table(rows, store)
    assert table["subject_id"].tolist() == [1, 7, 2]
    assert table["reason"].tolist() == ["", "subject_not_in_records", NO_IMAGE]
    assert table["image_id"].tolist()[:2] == ["x", "y"]
    assert table["image_id"].isna().tolist() == [False, False, True]
    assert table["prediction_time"].isna().tolist() == [False, True, True]
    assert pair(rows, store)[1]["subjects"] == {
        "paired": 1,
        "records_alone": 1,
        "images_alone": 1,
        "both_but_unpaired": 0,
    }


def test_the_report_tells_how_far_apart(store):
    table = pairing_table(index(("x", 1, 4), ("y", 1, 13), ("z", 2, 1)), store)
    assert table["days_apart"].tolist()[:2] == [4.0, 3.0]  # from day 0; from day 10, known at day 12
    report = pair(index(("x", 1, 4), ("y", 1, 13)), store)[1]
    assert report["days_apart"] == {"0%": 3.0, "25%": 3.25, "50%": 3.5, "75%": 3.75, "100%": 4.0}
    assert pair(index(("x", 1, 2)), store, rule="nearest")[1]["days_apart"]["50%"] == 2.0


@pytest.fixture
def ordered(tmp_path):
    """Subject 1: a lab at day 0, CT orders at days 5 and 8, an order of something else at day 9; subject 2: an order at day 3."""
    rows = [
        (1, 0, 0, "LAB//A", None),
        (1, 5, 5, "CT//ORDER//CHEST", None),
        (1, 8, 8, "CT//ORDER//CHEST", None),
        (1, 9, 9, "CT//ORDERLY", None),
        (2, 3, 3, "CT//ORDER", None),
    ]
    return make_store(tmp_path / "ordered", rows)


def test_as_of_order_predicts_at_the_latest_order_before_the_scan(ordered):
    rows = index(("a", 1, 10), ("b", 1, 8), ("c", 1, 7.5), ("d", 1, 4), ("e", 2, 3))
    asked = {"rule": "as_of_order", "orders": ["CT//ORDER"]}
    table = pairing_table(rows, ordered, **asked)
    assert table["prediction_time"].tolist()[:3] == [pd.Timestamp(day(n)) for n in (8, 8, 5)]
    assert table["reason"].tolist() == ["", "", "", "no_order_in_window", ""]
    assert table["days_apart"].tolist()[:3] == [2.0, 0.0, 2.5]
    _, report = pair(rows, ordered, window_days=2, **asked)
    assert (report["paired"], report["unmatched"]["no_order_in_window"]) == (3, 2)


@pytest.mark.parametrize(("scans", "kept"), [("all", "abcd"), ("first", "ab"), ("last", "d")])
def test_of_several_scans_those_of_one_moment_are_kept(store, scans, kept):
    rows = index(("a", 1, 2), ("b", 1, 2), ("c", 1, 5), ("d", 1, 9))
    frame, report = pair(rows, store, scans=scans)
    assert "".join(frame["image_id"]) == kept
    assert report["unmatched"]["other_scan_taken"] == 4 - len(kept)


def test_the_scan_nearest_to_a_label_is_the_last_one_known_by_then(store):
    rows = index(("a", 1, 2), ("b", 1, 5), ("c", 1, 9), ("d", 1, 20), ("e", 2, 6))
    labels = pd.DataFrame({"subject_id": [1, 1, 1], "prediction_time": [day(8.9), day(1), day(12)]})
    table = pairing_table(rows, store, scans="nearest", labels=labels)
    assert table["reason"].tolist() == ["other_scan_taken", "", "", "no_label_after", "no_label_after"]


@pytest.mark.parametrize(("scans", "kept"), [("first", ["", "other_scan_taken"]), ("last", ["other_scan_taken", ""])])
def test_two_scans_of_one_order_are_two_scans(ordered, scans, kept):
    rows = index(("a", 1, 5.5), ("b", 1, 7.5))
    asked = {"rule": "as_of_order", "orders": ["CT//ORDER"]}
    assert pairing_table(rows, ordered, scans=scans, **asked)["reason"].tolist()[:2] == kept
    label = pd.DataFrame({"subject_id": [1], "prediction_time": [day(6)]})
    found = pairing_table(rows, ordered, scans="nearest", labels=label, **asked)
    assert found["reason"].tolist()[:2] == ["", "no_label_after"]  # at day 6 the second was ordered and not yet made


PAIRS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), max_size=8)
EVENTS = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 12), st.integers(-1, 3), st.booleans()), min_size=1, max_size=20
)


@settings(max_examples=60, deadline=None)
@given(
    scans=PAIRS, events=EVENTS, window=st.sampled_from([None, 0, 2]), rule=st.sampled_from(["as_of_scan", "nearest"])
)
def test_pairs_equal_a_slow_reading(tmp_path_factory, scans, events, window, rule):
    rows = sorted((s, d, d + late, "CT" if image else "LAB") for s, d, late, image in events)
    named = [(*row, f"i{n}" if row[3] == "CT" else None) for n, row in enumerate(rows)]
    store = make_store(tmp_path_factory.mktemp("slow"), named)
    table = pairing_table(
        index(*((f"s{n}", *scan) for n, scan in enumerate(scans))), store, rule=rule, window_days=window
    )
    limit = 10**9 if window is None else window
    for row, (subject, at) in zip(table.itertuples(), scans, strict=False):
        mine = [(d, known) for s, d, known, code in rows if s == subject and code == "LAB"]
        expected = None
        if rule == "as_of_scan" and any(known <= at and d >= at - limit for d, known in mine):
            expected = at
        if rule == "nearest" and mine:
            d, known = min(mine, key=lambda one: (abs(one[0] - at), max(one)))
            expected = max(at, d, known) if abs(d - at) <= limit else None
        assert (None if row.reason else row.prediction_time) == (
            None if expected is None else pd.Timestamp(day(expected))
        )
        assert row.reason in ("", *REASONS)


def write_scan(folder, patient, date, clock):
    """Six DICOM slices of one series."""
    uid = generate_uid()
    folder.mkdir(parents=True)
    for k in range(6):
        data = pydicom.Dataset()
        data.file_meta, data.preamble = FileMetaDataset(), bytes(128)
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CTImageStorage, generate_uid(), uid
        data.PatientID, data.Modality, data.ImageType = patient, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.AcquisitionDate, data.AcquisitionTime = date, clock
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0.0, 0.0, 2.0 * k]
        data.PixelSpacing, data.SliceThickness = [0.7, 0.8], 2.0
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 5, 7, 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = np.random.default_rng(k).integers(0, 3000, (5, 7)).astype("<u2").tobytes()
        pydicom.dcmwrite(folder / f"{k}.dcm", data, enforce_file_format=True)


def test_dates_of_the_scanner_plus_the_shift_are_those_of_the_cohort_from_dicom_to_pair(tmp_path):
    source = tmp_path / "source"
    truth = {11: ("P-A", datetime(2020, 3, 1, 10, 15), -40), 22: ("P-B", datetime(2019, 12, 31, 23, 30), 25)}
    events = []
    for subject, (patient, at, shift) in truth.items():
        write_scan(source / "images" / patient, patient, f"{at:%Y%m%d}", f"{at:%H%M%S}")
        events.append((subject, at + timedelta(days=shift, hours=-1), "LAB//A"))
        events.append((subject, at + timedelta(days=shift, hours=6), "LAB//A"))
    events.append((33, datetime(2020, 1, 1), "LAB//A"))
    for part in ("ehr/data", "ehr/metadata", "identity"):
        (source / part).mkdir(parents=True)
    frame = pd.DataFrame(events, columns=["subject_id", "time", "code"]).astype({"time": "datetime64[us]"})
    frame.to_parquet(source / "ehr" / "data" / "0.parquet")
    pd.DataFrame({"code": ["LAB//A"]}).to_parquet(source / "ehr" / "metadata" / "codes.parquet")
    lines = [f"{patient},{subject},{shift}" for subject, (patient, _, shift) in truth.items()]
    (source / "identity" / "crosswalk.csv").write_text(
        "patient_id,subject_id,date_shift_days\n" + "\n".join(lines) + "\n"
    )
    (source / "identity" / "salt.txt").write_text("a salt for tests\n")
    result = ingest(source, tmp_path / "cohort")
    cohort = Cohort.open(tmp_path / "cohort")
    table = pairing_table(VolumeStore(cohort.path).index, cohort.events()).set_index("subject_id")
    for subject, (_, at, shift) in truth.items():
        assert table.loc[subject, "reason"] == ""
        assert abs(table.loc[subject, "prediction_time"] - pd.Timestamp(at + timedelta(days=shift))) < timedelta(
            seconds=1
        )
        assert table.loc[subject, "days_apart"] == pytest.approx(1 / 24, abs=1e-4)
    assert table.loc[33, "reason"] == NO_IMAGE
    assert result["pairing"]["subjects"] == {"paired": 2, "records_alone": 1, "images_alone": 0, "both_but_unpaired": 0}
    assert result["pairing"]["days_apart"]["50%"] == pytest.approx(0.042)
