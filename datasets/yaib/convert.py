"""A YAIB task folder (dyn, sta, outc) -> a source folder: hourly values as MEDS events, labels as MEDS labels.

    python datasets/yaib/convert.py SOURCE OUT
    mmjepa ingest OUT --out COHORT

SOURCE is <task>/<source>/, for instance mortality24/eicu_demo.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).resolve().parents[1]))
import meds_out
import source_folder as shared
from meds_out import pc

from mmjepa.refusal import Refusal

#: The 48 hourly variables and their units (ricu's concept dictionary).
VARIABLES = {
    "alb": "albumin, g/dL", "alp": "alkaline phosphatase, IU/L", "alt": "alanine aminotransferase, IU/L",
    "ast": "aspartate aminotransferase, IU/L", "be": "base excess, mEq/L", "bicar": "bicarbonate, mEq/L",
    "bili": "total bilirubin, mg/dL", "bili_dir": "direct bilirubin, mg/dL", "bnd": "band neutrophils, %",
    "bun": "blood urea nitrogen, mg/dL", "ca": "calcium, mg/dL", "cai": "ionised calcium, mmol/L",
    "ck": "creatine kinase, IU/L", "ckmb": "creatine kinase MB, ng/mL", "cl": "chloride, mEq/L",
    "crea": "creatinine, mg/dL", "crp": "C-reactive protein, mg/L", "dbp": "diastolic blood pressure, mmHg",
    "fgn": "fibrinogen, mg/dL", "fio2": "fraction of inspired oxygen, %", "glu": "glucose, mg/dL",
    "hgb": "haemoglobin, g/dL", "hr": "heart rate, /min", "inr_pt": "prothrombin time, INR", "k": "potassium, mEq/L",
    "lact": "lactate, mmol/L", "lymph": "lymphocytes, %", "map": "mean arterial pressure, mmHg",
    "mch": "mean cell haemoglobin, pg", "mchc": "mean cell haemoglobin concentration, %",
    "mcv": "mean cell volume, fL", "methb": "methaemoglobin, %", "mg": "magnesium, mg/dL", "na": "sodium, mEq/L",
    "neut": "neutrophils, %", "o2sat": "oxygen saturation, %", "pco2": "carbon dioxide tension, mmHg", "ph": "pH of blood",
    "phos": "phosphate, mg/dL", "plt": "platelets, K/uL", "po2": "oxygen tension, mmHg",
    "ptt": "partial thromboplastin time, s", "resp": "respiratory rate, /min", "sbp": "systolic blood pressure, mmHg",
    "temp": "temperature, C", "tnt": "troponin T, ng/mL", "urine": "urine output, mL", "wbc": "white blood cells, K/uL",
}  # fmt: skip
STATIC = {"age": "age, years", "height": "height, cm", "weight": "weight, kg"}
TASKS = ("mortality24", "aki")
ANCHOR_US = 946_684_800_000_000  # 2000-01-01 00:00, the admission of every stay: the source holds no date
AKI_WINDOW_HOURS = 6  # positive from 6 hours before onset to 6 hours after


def main(options: argparse.Namespace) -> dict:
    return convert(options.source, options.out)


def convert(folder: Path | str, out: Path | str) -> dict:
    """Write ``out`` from one task folder of one source; returns counts. ``folder`` ends in <task>/<source>.

    Subjects are stays. Hour h of a stay holds what was read in [h, h + 1): its events have ``time`` = anchor + h and
    ``available_time`` = the last microsecond of the hour. A label of hour h is made at that same last microsecond, so that
    its input, inclusive, ends with hour h by either clock; ``mortality24`` is made at the end of hour 23.
    Raises Refusal YAIB_TASK, OUTPUT_EXISTS, MEDS_EMPTY, and the SOURCE_* codes.
    """
    folder, out = Path(folder), Path(out)
    task = folder.resolve().parent.name
    if task not in TASKS:
        raise Refusal("YAIB_TASK", f"{folder} does not lie in a folder {' or '.join(TASKS)}", "Name <task>/<source>")
    paths = {name: shared.find_one(folder, f"{name}.parquet") for name in ("dyn", "sta", "outc")}
    extra = set(pq.read_schema(paths["dyn"]).names) - {"stay_id", "time", *VARIABLES}
    if extra:
        raise Refusal("SOURCE_COLUMNS", f"{paths['dyn']} has the unknown variables {', '.join(sorted(extra))}")
    with meds_out.new_folder(out) as written:
        root = meds_out.MedsOut(written / "ehr", 1, {"available_time": meds_out.TIME})
        stays = add_static(root, paths["sta"])
        add_hours(root, paths["dyn"], stays)
        labels = write_labels(written, task, paths["outc"], stays)
        counts = root.close("yaib", lambda code: (VARIABLES | STATIC).get(code))
    return counts | {"labels": labels}


def add_static(root: meds_out.MedsOut, path: Path) -> np.ndarray:
    """Age, sex, height and weight as rows without a time; returns the stays, ascending."""
    columns = {"stay_id": pa.int64(), "sex": pa.string()} | dict.fromkeys(STATIC, pa.float64())
    table = pa.concat_tables(meds_out.read_tables(path, columns))
    stays = np.sort(table["stay_id"].to_numpy())
    if table["stay_id"].null_count or (np.diff(stays) == 0).any():
        raise Refusal("SOURCE_DUPLICATE", f"a stay_id of {path} is empty or repeated")
    sexes = table.filter(pc.is_valid(table["sex"]))
    root.add(subject_id=sexes["stay_id"], code=pc.binary_join_element_wise("sex", sexes["sex"], "//"))
    for name in STATIC:
        known = table.filter(pc.is_valid(table[name]))
        root.add(subject_id=known["stay_id"], code=name, numeric_value=known[name])
    return stays


def add_hours(root: meds_out.MedsOut, path: Path, stays: np.ndarray) -> None:
    """One event a reading; empty cells are left out."""
    columns = {"stay_id": pa.int64(), "time": pa.duration("s")} | dict.fromkeys(VARIABLES, pa.float64())
    for table in meds_out.read_tables(path, columns):
        subjects, hours = table["stay_id"].to_numpy(), whole_hours(table["time"], path)
        check_stays(subjects, stays, path)
        start, end = hour_start(hours), hour_end(hours)
        for name in VARIABLES:
            values = table[name].to_numpy()
            read = np.isfinite(values)
            moments = {"time": start[read], "available_time": end[read]}
            root.add(subject_id=subjects[read], code=name, numeric_value=values[read], **moments)


def write_labels(folder: Path, task: str, path: Path, stays: np.ndarray) -> dict[str, dict[str, int]]:
    """The task's labels and, for AKI, ``aki_ahead``: the hours before onset alone; rows and positives of each."""
    hourly = "time" in pq.read_schema(path).names
    if hourly != (task == "aki"):
        raise Refusal("YAIB_TASK", f"{path} holds {'hourly' if hourly else 'one label a stay'}, which {task} does not")
    columns = {"stay_id": pa.int64(), "label": pa.int64()} | ({"time": pa.duration("s")} if hourly else {})
    table = pa.concat_tables(meds_out.read_tables(path, columns))
    values, subjects = table["label"].to_numpy(), table["stay_id"].to_numpy()
    if table["label"].null_count or not np.isin(values, (0, 1)).all():
        raise Refusal("SOURCE_VALUE", f"a label of {path} is neither 0 nor 1")
    check_stays(subjects, stays, path)
    hours = whole_hours(table["time"], path) if hourly else np.full(len(values), 23)
    if len(np.unique(np.stack([subjects, hours]), axis=1).T) != len(values):
        raise Refusal("SOURCE_DUPLICATE", f"a stay and hour of {path} is repeated")
    kept = {task: np.ones(len(values), bool)}
    if hourly:
        kept["aki_ahead"] = hours < onset_hours(subjects, hours, values)
    written = {}
    for name, mask in kept.items():
        times = pa.array(hour_end(hours[mask])).cast(meds_out.TIME)
        rows = meds_out.write_labels(folder, name, subjects[mask], times, values[mask].astype(bool))
        written[name] = {"rows": rows, "positive": int(values[mask].sum())}
    return written


def onset_hours(subjects: np.ndarray, hours: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each row's hour of onset in its stay, far off without one.

    The source excludes onsets in the first 6 hours and starts a positive run 6 hours before onset, so onset is 6 hours
    after the first positive hour.
    """
    never = np.iinfo(np.int64).max
    people, rows = np.unique(subjects, return_inverse=True)
    first = np.full(len(people), never)
    np.minimum.at(first, rows, np.where(values == 1, hours + AKI_WINDOW_HOURS, never))
    return first[rows]


def whole_hours(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    seconds = column.cast(pa.int64())
    if seconds.null_count or (seconds.to_numpy() % 3600).any() or (seconds.to_numpy() < 0).any():
        raise Refusal("SOURCE_VALUE", f"a time of {path} is not a whole number of hours from 0")
    return seconds.to_numpy() // 3600


def check_stays(subjects: np.ndarray, stays: np.ndarray, path: Path) -> None:
    if not np.isin(subjects, stays).all():
        raise Refusal("SOURCE_VALUE", f"{path} holds a stay_id that sta.parquet does not")


def hour_start(hours: np.ndarray) -> np.ndarray:
    return ANCHOR_US + hours * meds_out.HOUR_US


def hour_end(hours: np.ndarray) -> np.ndarray:
    """The last microsecond of the hour: after every reading in it, before every reading of the next."""
    return hour_start(hours + 1) - 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sys.exit(shared.run(main, parser))
