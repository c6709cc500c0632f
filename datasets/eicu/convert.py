"""eICU-CRD in MEDS as eICU-MEDS makes it -> a source folder whose dates no longer tell when the stay ends.

    python datasets/eicu/convert.py SOURCE OUT
    mmjepa ingest OUT --out COHORT

eICU has offsets and no dates. eICU-MEDS sets every hospital discharge on 31 December, so the date of any row tells how many
days of the stay are left. Here each subject moves by whole days to a first ICU admission on 2000-01-01: hours of day and
distances stay as they are. Birth, sex and what else the ETL repeats for each unit stay is kept once, for the number of such
rows, known early, tells of a later stay.
"""

import argparse
import shutil
import sys
from pathlib import Path

import meds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).resolve().parents[1]))
import meds_check
import meds_out
import source_folder as shared
from meds_check import Family
from meds_out import pc

from mmjepa.ehr.meds_io import open_root
from mmjepa.refusal import Refusal

ANCHOR_DAY = np.datetime64("2000-01-01", "D").astype(np.int64)
ADMISSION, ENTRY = "ICU_ADMISSION//", "HOSPITAL_ADMISSION//"
HALF_YEAR_US = 182.625 * meds_out.DAY_US
#: What the ETL writes once for each unit stay, though a subject has it once: the first row stays (1) or the last (-1).
ONCE = {"GENDER//": 1, "RACE//": 1, ENTRY: 1, "HOSPITAL_DISCHARGE//": -1, "MEDS_DEATH": -1}
NEVER = np.iinfo(np.int64).max
#: Codes and values as the event configuration of eICU-MEDS 0.1.0 makes them; rows without a value get no vital sign there.
FAMILIES = (
    Family("births", "^MEDS_BIRTH$", (0, 0)),
    Family("sex", "^GENDER//", (0, 0)),
    Family("hospital admissions", "^HOSPITAL_ADMISSION//", (0, 0)),
    Family("hospital discharges", "^HOSPITAL_DISCHARGE//", (0, 0)),
    Family("ICU admissions", "^ICU_ADMISSION//", (0, 0)),
    Family("ICU discharges", "^ICU_DISCHARGE//", (0, 0)),
    Family("diagnoses", "^DIAGNOSIS//", (0, 0)),
    Family("admission diagnoses", "^ADMISSION_DIAGNOSIS//", (0, 0)),
    Family("treatments", "^TREATMENT//", (0, 0)),
    Family("medications started", "^MEDICATION//STARTED//", (0, 1)),
    Family("medications stopped", "^MEDICATION//STOPPED//", (0, 0)),
    Family("laboratory results", "^LAB//RESULT//", (0.8, 1)),
    Family("specimens", "^LAB//SPECIMEN_DRAWN//", (0, 0)),
    Family("periodic vitals", "^VITALS//PERIODIC//", (0.99, 1)),
    Family("aperiodic vitals", "^VITALS//APERIODIC//", (0.99, 1)),
    Family("creatinine, mg/dL", "^LAB//RESULT//creatinine//", (0.9, 1), (0.1, 15)),
    Family("sodium, mmol/L", "^LAB//RESULT//sodium//", (0.9, 1), (100, 180)),
    Family("heart rate, /min", "^VITALS//PERIODIC//HEARTRATE$", (0.99, 1), (20, 250)),
    Family("weight on admission, kg", "^ICU_ADMISSION_WEIGHT$", (0.99, 1), (20, 300)),
)


def main(options: argparse.Namespace) -> dict:
    return convert(options.source, options.out)


def convert(source: Path | str, out: Path | str) -> dict:
    """Write ``out`` from the MEDS root of eICU-MEDS, shard by shard; returns counts.

    Raises Refusal EICU_UNLIKE (see ``check``), EICU_NO_ADMISSION, OUTPUT_EXISTS, MEDS_*.
    """
    source, out = Path(source), Path(out)
    check(source)
    root = open_root(source)
    subjects: list[int] = []
    rows = 0
    with meds_out.new_folder(out) as written:
        (written / "ehr" / "metadata").mkdir(parents=True)
        for path in root.shards:
            table = moved(told_once(pq.read_table(path)), path)
            subjects += pc.unique(table["subject_id"]).to_pylist()
            rows += len(table)
            target = written / "ehr" / path.relative_to(root.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, target)
        shutil.copyfile(root.path / meds.code_metadata_filepath, written / "ehr" / meds.code_metadata_filepath)
        meds_out.write_facts(written / "ehr", "eicu")
        meds_out.write_splits(written / "ehr", {one: meds_out.draw_split("eicu", one) for one in subjects})
    return {"rows": rows, "subjects": len(subjects), "codes": len(root.codes)}


def check(root: Path) -> None:
    """Raises Refusal EICU_UNLIKE, naming what differs, when codes or shares of numbers are not those of eICU in MEDS."""
    families = meds_check.check(root, FAMILIES)["families"]
    wrong = [
        f"{name} ({one['rows']} rows, numbers in {one['numbers']}, want {one['expected']})"
        for name, one in families.items()
        if not one["ok"]
    ]
    if wrong:
        raise Refusal("EICU_UNLIKE", f"{root} does not look like eICU: {'; '.join(wrong)}", "Was it made by eICU-MEDS?")


def told_once(table: pa.Table) -> pa.Table:
    """The rows without those that repeat for each unit stay: the kinds of ``ONCE``, and births but that of the first stay.

    A birth is the stay's admission (of the unit or the hospital, by the version of the ETL) less whole years, or whole years
    and a half: the first stay's is the one that lies so before the first admission, of several the latest.
    """
    code = table["code"].cast(pa.string())
    time = pc.fill_null(table["time"].cast(pa.int64()), np.iinfo(np.int64).min).to_numpy()
    people, place = np.unique(table["subject_id"].to_numpy(), return_inverse=True)
    keep = np.ones(len(table), bool)

    def rows_of(prefix: str) -> np.ndarray:
        rows = np.flatnonzero(pc.starts_with(code, prefix).to_numpy())
        return rows[np.argsort(time[rows], kind="stable")]

    def keep_first(rows: np.ndarray) -> None:
        keep[rows] = False
        keep[rows[np.unique(place[rows], return_index=True)[1]]] = True

    for prefix, step in ONCE.items():
        keep_first(rows_of(prefix)[::step])
    births = rows_of("MEDS_BIRTH")[::-1]
    off = np.full(len(births), np.inf)
    for prefix in (ADMISSION, ENTRY):
        first, rows = np.full(len(people), np.nan), rows_of(prefix)[::-1]
        first[place[rows]] = time[rows]  # the earliest is written last
        years = (first[place[births]] - time[births]) / HALF_YEAR_US
        off = np.fmin(off, np.abs(years - np.round(years)))
    keep_first(births[np.argsort(np.round(off, 5), kind="stable")])  # 5 digits: some 3 minutes
    return table.filter(pa.array(keep))


def moved(table: pa.Table, path: Path) -> pa.Table:
    """Every timestamp of the rows moved by their subject's whole days. Raises Refusal EICU_NO_ADMISSION."""
    people, place = np.unique(table["subject_id"].to_numpy(), return_inverse=True)
    times = pc.fill_null(table["time"].cast(pa.int64()), NEVER).to_numpy()
    admission = pc.starts_with(table["code"].cast(pa.string()), ADMISSION).to_numpy()
    first = np.full(len(people), NEVER)
    np.minimum.at(first, place[admission], times[admission])
    if (first == NEVER).any():
        raise Refusal("EICU_NO_ADMISSION", f"{(first == NEVER).sum()} subjects of {path} have no dated {ADMISSION} row")
    shift = ((ANCHOR_DAY - first // meds_out.DAY_US) * meds_out.DAY_US)[place]
    for name in [field.name for field in table.schema if pa.types.is_timestamp(field.type)]:
        change = pa.array(shift).cast(pa.duration("us"))
        column = pc.add(table[name].cast(meds_out.TIME), change)
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sys.exit(shared.run(main, parser))
