"""An image is paired with its own subject's record at a time when both are known, or counted with the reason."""

from datetime import datetime, timedelta

import numpy as np
import pandas as pd
import pytest

from mmjepa.ehr.store import EventStore
from mmjepa.pairing import pair
from mmjepa.refusal import Refusal

DAY_ONE = datetime(2020, 1, 1)


def day(number):
    return None if number is None else DAY_ONE + timedelta(days=number)


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
    frame = pd.DataFrame(rows, columns=["subject_id", "time", "available_time", "code", "image_id"])
    for name in ("time", "available_time"):
        frame[name] = pd.Series(
            [day(None if number != number else number) for number in frame[name]], dtype="datetime64[us]"
        )
    for part in ("data", "metadata"):
        (tmp_path / part).mkdir()
    frame.to_parquet(tmp_path / "data" / "0.parquet")
    pd.DataFrame({"code": frame["code"].unique()}).to_parquet(tmp_path / "metadata" / "codes.parquet")
    return EventStore.in_memory(tmp_path)


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
    assert report["unmatched"] == {
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
    with pytest.raises(Refusal, match="PAIRING_RULE"):
        pair(index(), store, rule="closest")
