"""YAIB: hourly values as events and labels made at the end of their hour, on made-up grids and on the real demo."""

import numpy as np
import pandas as pd
import pytest

from mmjepa.cohort import Cohort
from mmjepa.ehr.meds_io import open_root
from mmjepa.ingest import ingest

VARIABLES = [
    "alb", "alp", "alt", "ast", "be", "bicar", "bili", "bili_dir", "bnd", "bun", "ca", "cai", "ck", "ckmb", "cl", "crea", "crp",
    "dbp", "fgn", "fio2", "glu", "hgb", "hr", "inr_pt", "k", "lact", "lymph", "map", "mch", "mchc", "mcv", "methb", "mg", "na",
    "neut", "o2sat", "pco2", "ph", "phos", "plt", "po2", "ptt", "resp", "sbp", "temp", "tnt", "urine", "wbc",
]  # fmt: skip
ANCHOR = pd.Timestamp("2000-01-01")
HOUR = pd.Timedelta(hours=1)


def grid(hours_of):
    """Every hour of every stay; heart rate is 100 * stay + hour, creatinine is known at even hours."""
    rows = [(stay, hour) for stay, hours in hours_of.items() for hour in range(hours)]
    frame = pd.DataFrame(rows, columns=["stay_id", "hour"]).astype("int32")
    frame["time"] = pd.to_timedelta(frame["hour"], unit="h").astype("timedelta64[s]")
    for name in VARIABLES:
        frame[name] = np.nan
    frame["hr"] = 100.0 * frame["stay_id"] + frame["hour"]
    frame["crea"] = np.where(frame["hour"] % 2 == 0, 1.0, np.nan)
    return frame


def write(folder, task, change=None):
    """Stay 1 has 20 hours and AKI at hour 9, so labels from 3 to 15; stay 2 has none."""
    folder = folder / task / "demo"
    folder.mkdir(parents=True)
    dyn = grid({2: 25, 1: 25} if task == "mortality24" else {2: 30, 1: 16})
    sta = pd.DataFrame({"stay_id": [1, 2], "age": [61.0, 40.5], "sex": ["Female", None]})
    sta = sta.assign(height=[160.0, np.nan], weight=[60.0, 80.0]).astype({"stay_id": "int32"})
    if task == "mortality24":
        outc = pd.DataFrame({"stay_id": [1, 2], "label": [1, 0]}).astype("int32")
    else:
        outc = dyn[["stay_id", "time"]].assign(label=(dyn["stay_id"] == 1) & dyn["hour"].between(3, 15))
    tables = {"dyn": dyn.drop(columns="hour"), "sta": sta, "outc": outc}
    for name, table in (change(tables) if change else tables).items():
        table.to_parquet(folder / f"{name}.parquet", index=False)
    return folder


def read(out):
    return pd.concat([pd.read_parquet(path) for path in sorted((out / "ehr" / "data").glob("*.parquet"))])


def visible(events, subject, moment, clock):
    """The events of a subject that a model may see, by one of the two clocks."""
    mine = events[(events["subject_id"] == subject) & events["time"].notna()]
    return mine[mine[clock] <= moment]


@pytest.mark.parametrize("clock", ["time", "available_time"])
@pytest.mark.parametrize("task", ["mortality24", "aki"])
def test_the_input_of_a_label_ends_with_its_own_hour_by_either_clock(tmp_path, convert, task, clock):
    code, result, seen = convert("yaib", write(tmp_path, task), tmp_path / "out")
    assert code == 0, seen
    ingest(tmp_path / "out", tmp_path / "cohort")
    labels = Cohort.open(tmp_path / "cohort").labels(task)
    events = read(tmp_path / "out")
    assert len(labels) == result["labels"][task]["rows"] == (2 if task == "mortality24" else 46)
    for row in labels.itertuples():
        hour = (row.prediction_time + pd.Timedelta(microseconds=1) - ANCHOR) / HOUR - 1
        assert hour == 23 or task == "aki"
        rates = visible(events[events["code"] == "hr"], row.subject_id, row.prediction_time, clock)["numeric_value"]
        assert list(rates) == [100.0 * row.subject_id + h for h in range(int(hour) + 1)]
        assert row.value == (row.subject_id == 1 and (task == "mortality24" or 3 <= hour <= 15))


def test_hours_from_the_onset_on_are_not_in_aki_ahead(tmp_path, convert):
    result = convert("yaib", write(tmp_path, "aki"), tmp_path / "out")[1]
    assert result["labels"] == {"aki": {"rows": 46, "positive": 13}, "aki_ahead": {"rows": 39, "positive": 6}}
    labels = pd.read_parquet(tmp_path / "out" / "labels" / "aki_ahead" / "0.parquet")
    last = labels.groupby("subject_id")["prediction_time"].max() + pd.Timedelta(microseconds=1) - ANCHOR
    assert list(last / HOUR) == [9, 30]  # hour 9, where the creatinine that defines the onset lies, is out


def test_static_values_have_no_time_and_empty_cells_no_event(tmp_path, convert):
    result = convert("yaib", write(tmp_path, "mortality24"), tmp_path / "out")[1]
    events = read(tmp_path / "out")
    static = events[events["time"].isna()]
    rows = [tuple(row) for row in static[["subject_id", "code", "numeric_value"]].fillna(-1).to_numpy()]
    assert rows == [
        (1, "sex//Female", -1), (1, "age", 61), (1, "height", 160), (1, "weight", 60), (2, "age", 40.5), (2, "weight", 80)
    ]  # fmt: skip
    assert dict(events["code"].value_counts()) | {"hr": 50, "crea": 26} == dict(events["code"].value_counts())
    assert (result["rows"], result["static_rows"], result["subjects"]) == (82, 6, 2)
    assert open_root(tmp_path / "out" / "ehr").descriptions["crea"] == "creatinine, mg/dL"


def test_the_same_folder_gives_the_same_bytes(tmp_path, convert):
    source = write(tmp_path, "aki")
    for name in ("one", "two"):
        convert("yaib", source, tmp_path / name)
    files = [path for path in sorted((tmp_path / "one").rglob("*")) if path.is_file()]
    assert len(files) == 6
    assert all(
        path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() for path in files
    )


def changed(table, **columns):
    return lambda tables: tables | {table: tables[table].assign(**columns)}


def dropped(table, column):
    return lambda tables: tables | {table: tables[table].drop(columns=column)}


@pytest.mark.parametrize(
    ("task", "change", "code"),
    [
        ("aki", dropped("dyn", "crea"), "SOURCE_COLUMNS"),
        ("aki", changed("dyn", charge=1.0), "SOURCE_COLUMNS"),
        ("aki", dropped("sta", "age"), "SOURCE_COLUMNS"),
        ("aki", dropped("outc", "time"), "YAIB_TASK"),
        ("mortality24", changed("outc", time=pd.to_timedelta(0, unit="h")), "YAIB_TASK"),
        ("mortality24", changed("outc", label=2), "SOURCE_VALUE"),
        ("mortality24", changed("outc", stay_id=7), "SOURCE_VALUE"),
        ("mortality24", changed("outc", stay_id=1), "SOURCE_DUPLICATE"),
        ("mortality24", changed("sta", stay_id=1), "SOURCE_DUPLICATE"),
        (
            "aki",
            lambda t: t | {"dyn": t["dyn"].assign(time=t["dyn"]["time"] + pd.Timedelta(minutes=1))},
            "SOURCE_VALUE",
        ),
        ("aki", changed("dyn", hr="fast"), "SOURCE_VALUE"),
        ("los", None, "YAIB_TASK"),
        ("aki", lambda t: {name: t[name] for name in ("dyn", "sta")}, "SOURCE_FILE_MISSING"),
    ],
)
def test_other_folders_and_columns_are_refused_and_leave_nothing(tmp_path, convert, task, change, code):
    exit_code, result, _ = convert("yaib", write(tmp_path, task, change), tmp_path / "out")
    assert (exit_code, result.get("refused", {}).get("code")) == (2, code)
    assert [path.name for path in tmp_path.iterdir()] == [task]


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("task", "source", "stays", "rows", "labels"),
    [
        ("mortality24", "eicu_demo", 1367, 251_561, {"mortality24": (1367, 70)}),
        ("mortality24", "mimic_demo", 99, 20_763, {"mortality24": (99, 21)}),
        ("aki", "eicu_demo", 1988, 534_831, {"aki": (78_205, 8830), "aki_ahead": (73_563, 4188)}),
        ("aki", "mimic_demo", 113, 38_671, {"aki": (4968, 563), "aki_ahead": (4669, 264)}),
    ],
)
def test_the_real_demo_gives_its_counts_and_every_reading(
    data_folder, tmp_path, convert, task, source, stays, rows, labels
):
    folder = data_folder / "yaib_demo" / task / source
    if not folder.is_dir():
        pytest.skip("yaib_demo is absent")
    code, result, seen = convert("yaib", folder, tmp_path / "out")
    assert code == 0, seen
    assert (result["subjects"], result["rows"] - result["static_rows"]) == (stays, rows)
    assert {name: tuple(one.values()) for name, one in result["labels"].items()} == labels
    dyn = pd.read_parquet(folder / "dyn.parquet").melt(["stay_id", "time"], var_name="code").dropna()
    dyn = dyn.assign(time=ANCHOR + dyn["time"]).sort_values(["stay_id", "time", "code"])
    events = read(tmp_path / "out").dropna(subset="time").sort_values(["subject_id", "time", "code"])
    for ours, theirs in (("subject_id", "stay_id"), ("time", "time"), ("code", "code")):
        assert (events[ours].to_numpy() == dyn[theirs].to_numpy()).all()
    assert (events["numeric_value"].to_numpy() == dyn["value"].to_numpy("float32")).all()
    made = ingest(tmp_path / "out", tmp_path / "cohort")
    assert made["ehr"]["labels"] == {name: one[0] for name, one in labels.items()}
