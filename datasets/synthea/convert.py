"""Synthea in OMOP CDM 5.3 or 5.4 (csv tables) -> a source folder: MEDS events with the time at which each became known.

python datasets/synthea/convert.py SOURCE OUT
mmjepa ingest OUT --out COHORT
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

sys.path.append(str(Path(__file__).resolve().parents[1]))
import meds_out
import source_folder as shared
from meds_out import DAY_US, TIME, pc

from mmjepa import progress
from mmjepa.refusal import Refusal

ID, TEXT, NUMBER = pa.int64(), pa.string(), pa.float64()
START, END = "VISIT_START", "VISIT_END"


class Rows(NamedTuple):
    """Where a table of events keeps its concept, its moment (``_date``, ``_datetime``) and its value."""

    concept: str
    moment: str
    number: str | None = None
    text: str | None = None
    unit: str | None = None


EVENTS = {
    "condition_occurrence": Rows("condition_concept_id", "condition_start"),
    "drug_exposure": Rows("drug_concept_id", "drug_exposure_start", "quantity"),
    "procedure_occurrence": Rows("procedure_concept_id", "procedure"),
    "measurement": Rows("measurement_concept_id", "measurement", "value_as_number", "value_source_value", "unit_source_value"),
    "observation": Rows("observation_concept_id", "observation", "value_as_number", "value_as_string", "unit_source_value"),
}  # fmt: skip
PERSON = ("gender_concept_id", "race_concept_id", "ethnicity_concept_id")
BIRTH = ("year_of_birth", "month_of_birth", "day_of_birth")
#: Extra columns of the data; ``from_visit`` marks the diagnoses of a visit until its end is known.
EXTRA = {
    "text_value": pa.large_string(),
    "available_time": TIME,
    "visit_id": ID,
    "unit": TEXT,
    "from_visit": pa.bool_(),
}


def main(options: argparse.Namespace) -> dict:
    return convert(options.source, options.out)


def convert(source: Path | str, out: Path | str) -> dict:
    """Write ``out`` from the folder of csv tables; returns counts.

    Raises Refusal OUTPUT_EXISTS, MEDS_EMPTY, OMOP_CONCEPTS (half of the rows of a table have no concept), SOURCE_*.
    """
    source, out = Path(source), Path(out)
    names = ("person", "visit_occurrence", *EVENTS, "death", "concept")
    paths = {name: shared.find_one(source, f"{name}.csv", f"{name}.csv.gz", f"{name.upper()}.csv") for name in names}
    concepts = Concepts(paths)
    with meds_out.new_folder(out) as written:
        shards = meds_out.shard_count(path for name, path in paths.items() if name != "concept")
        root = meds_out.MedsOut(written / "ehr", shards, EXTRA, hold_until_visit_ends)
        add_people(root, paths["person"], concepts)
        add_visits(root, paths["visit_occurrence"], concepts)
        for name in progress.track(list(EVENTS), "converting tables"):
            add_events(root, name, paths[name], concepts)
        add_deaths(root, paths["death"])
        counts = root.close("synthea", concepts.describe)
    return counts | shared.said("left_out", concepts.left_out)


class Concepts:
    """The concepts that the tables use: codes VOCABULARY/CODE and names. left_out: rows without a concept, by table."""

    def __init__(self, paths: dict[str, Path]) -> None:
        used = np.array(sorted(_used_concepts(paths)), np.int64)
        self.left_out: Counter[str] = Counter()
        self._names: dict[str, str] = {}
        columns = {"concept_id": ID, "concept_name": TEXT, "vocabulary_id": TEXT, "concept_code": TEXT}
        ids, codes = [], []
        for table in meds_out.read_tables(paths["concept"], columns):
            table = table.filter(pc.is_in(table["concept_id"], pa.array(used)))
            made = pc.binary_join_element_wise(table["vocabulary_id"], table["concept_code"], "/").to_pylist()
            ids += table["concept_id"].to_pylist()
            codes += made
            self._names.update(zip(made, table["concept_name"].to_pylist(), strict=True))
        if None in codes or len(set(ids)) != len(ids):
            raise Refusal("SOURCE_DUPLICATE", f"a concept of {paths['concept']} is repeated or has no code")
        self._ids, self._codes = pa.array(ids, ID), pa.array(codes, TEXT)

    def known(self, table: pa.Table, column: str, name: str) -> tuple[pa.Table, pa.ChunkedArray]:
        """The rows whose concept is known, and their codes; the rest is counted under ``name``."""
        places = pc.index_in(table[column], self._ids)
        kept = pc.is_valid(places)
        self.left_out[name] += len(table) - pc.sum(kept, min_count=0).as_py()
        return table.filter(kept), pc.take(self._codes, places.filter(kept))

    def codes(self, ids: pa.ChunkedArray, unknown: str) -> pa.ChunkedArray:
        """Code of each concept, ``unknown`` where there is none."""
        return pc.coalesce(pc.take(self._codes, pc.index_in(ids, self._ids)), unknown)

    def describe(self, code: str) -> str | None:
        edge, _, visit = code.partition("//")
        if edge in (START, END):
            return f"{'start' if edge == START else 'end'} of {self._names.get(visit, 'visit')}"
        return self._names.get(code)


def _used_concepts(paths: dict[str, Path]) -> set[int]:
    columns = {"person": PERSON, "visit_occurrence": ("visit_concept_id",)}
    columns |= {name: (rows.concept,) for name, rows in EVENTS.items()}
    used: set[int] = set()
    for name, wanted in columns.items():
        for table in meds_out.read_tables(paths[name], dict.fromkeys(wanted, ID)):
            for column in wanted:
                used.update(pc.unique(table[column]).drop_null().to_pylist())
    return used - {0}  # 0: no matching concept


def moments(table: pa.Table, stem: str, path: Path) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Time and, where the hour is unknown, the day's last microsecond, else null.

    The hour is unknown without a date-time, and at midnight sharp, which is how a bare date is exported as a date-time.
    """
    stamp = pc.coalesce(table[f"{stem}_datetime"], table[f"{stem}_date"])
    if stamp.null_count:
        raise Refusal("SOURCE_VALUE", f"{path} has a row without {stem}_date")
    day = pc.floor_temporal(stamp, unit="day")
    return stamp, pc.if_else(pc.equal(stamp, day), day_end(day), None)


def day_end(day: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.add(day, pa.scalar(DAY_US - 1, pa.duration("us")))


def dated(stem: str) -> dict[str, pa.DataType]:
    return {f"{stem}_date": TIME, f"{stem}_datetime": TIME}


def add_people(root: meds_out.MedsOut, path: Path, concepts: Concepts) -> None:
    """Sex, race and ethnicity without a time; birth, at the middle of the year or month where only that is known."""
    columns = {"person_id": ID, "birth_datetime": TIME} | dict.fromkeys((*PERSON, *BIRTH), ID)
    for table in meds_out.read_tables(path, columns, ("birth_datetime", "month_of_birth", "day_of_birth")):
        for column in PERSON:
            kept, codes = concepts.known(table, column, column.removesuffix("_concept_id"))
            root.add(subject_id=kept["person_id"], code=codes)
        rows = zip(*(table[name].to_pylist() for name in ("birth_datetime", *BIRTH)), strict=True)
        try:
            births = [
                stamp or np.datetime64(f"{year:04d}-{month or 7:02d}-{day or 15:02d}", "us").item()
                for stamp, year, month, day in rows
            ]
        except (ValueError, TypeError):
            raise Refusal("SOURCE_VALUE", f"{path} has a row whose birth is no date") from None
        root.add(subject_id=table["person_id"], code="MEDS_BIRTH", time=pa.array(births, TIME))


def add_visits(root: meds_out.MedsOut, path: Path, concepts: Concepts) -> None:
    """A row at the start and one at the end; a bare end date is that day's last microsecond. No end before its start."""
    ids = {"visit_occurrence_id": ID, "person_id": ID, "visit_concept_id": ID}
    columns = ids | dated("visit_start") | dated("visit_end")
    optional = ("visit_start_datetime", "visit_end_datetime")
    for table in meds_out.read_tables(path, columns, optional):
        codes = concepts.codes(table["visit_concept_id"], "UNKNOWN")  # kept: diagnoses wait for its end
        start, known = moments(table, "visit_start", path)
        keys = {"subject_id": table["person_id"], "visit_id": table["visit_occurrence_id"]}
        root.add(**keys, code=pc.binary_join_element_wise(START, codes, "//"), time=start, available_time=known)
        ended = pc.is_valid(pc.coalesce(table["visit_end_datetime"], table["visit_end_date"]))
        table, codes, start = table.filter(ended), codes.filter(ended), start.filter(ended)
        end, day = moments(table, "visit_end", path)
        end = pc.coalesce(day, end)
        right = pc.greater_equal(end, start)
        concepts.left_out["visit_ends_before_start"] += len(table) - pc.sum(right, min_count=0).as_py()
        keys = {"subject_id": table["person_id"], "visit_id": table["visit_occurrence_id"]}
        rows = pa.table(keys | {"code": pc.binary_join_element_wise(END, codes, "//"), "time": end}).filter(right)
        root.add(**{name: rows[name] for name in rows.column_names})


def add_events(root: meds_out.MedsOut, name: str, path: Path, concepts: Concepts) -> None:
    """The rows of one event table."""
    rows = EVENTS[name]
    columns = {"person_id": ID, rows.concept: ID, "visit_occurrence_id": ID} | dated(rows.moment)
    columns |= {
        column: kind for column, kind in ((rows.number, NUMBER), (rows.text, TEXT), (rows.unit, TEXT)) if column
    }
    optional = ("visit_occurrence_id", f"{rows.moment}_datetime", rows.text or "", rows.unit or "")
    total = 0
    for table in meds_out.read_tables(path, columns, optional):
        total += len(table)
        table, codes = concepts.known(table, rows.concept, name)
        time, known = moments(table, rows.moment, path)
        values: dict[str, Any] = {"numeric_value": table[rows.number]} if rows.number else {}
        if rows.text:
            # The source's text often repeats the number: only what the number does not say is kept.
            values["text_value"] = pc.if_else(pc.is_null(table[rows.number]), table[rows.text], None)
        if rows.unit:
            values["unit"] = table[rows.unit]
        visit = table["visit_occurrence_id"]
        held = pc.is_valid(visit) if name == "condition_occurrence" else None
        keys = {"subject_id": table["person_id"], "visit_id": visit, "from_visit": held}
        root.add(**keys, code=codes, time=time, available_time=known, **values)
    if concepts.left_out[name] * 2 > total:
        raise Refusal(
            "OMOP_CONCEPTS",
            f"{concepts.left_out[name]} of {total} rows of {path} have no concept in concept.csv",
            "Export the vocabulary that the tables were mapped with",
        )


def add_deaths(root: meds_out.MedsOut, path: Path) -> None:
    """A death of unknown hour is at the end of its day, so that the day's care does not follow it."""
    for table in meds_out.read_tables(path, {"person_id": ID} | dated("death"), ("death_datetime",)):
        time, end = moments(table, "death", path)
        root.add(subject_id=table["person_id"], code="MEDS_DEATH", time=pc.coalesce(end, time))


def hold_until_visit_ends(table: pa.Table) -> pa.Table:
    """A diagnosis of a visit is known when the visit ends, never before; the visit and its diagnoses share a shard.

    Where the end is not on record (no date, one before the start, no such visit), it is known with the person's last row.
    """
    held = pc.fill_null(table["from_visit"], False).to_numpy()
    ends = table.filter(pc.starts_with(table["code"], END + "//"))
    order = np.argsort(ends["visit_id"].to_numpy(), kind="stable")
    ids, times = ends["visit_id"].to_numpy()[order], ends["time"].cast(ID).to_numpy()[order]
    known = pc.coalesce(table["available_time"], table["time"]).cast(ID)
    known = pc.fill_null(known, 0).to_numpy().copy()
    wanted = pc.fill_null(table["visit_id"].filter(pa.array(held)), -1).to_numpy()
    place = np.searchsorted(ids, wanted, side="right") - 1
    found = (place >= 0) & (ids[place] == wanted) if len(ids) else np.zeros(len(wanted), bool)
    ended, open_ = np.flatnonzero(held)[found], np.flatnonzero(held)[~found]
    known[ended] = np.maximum(known[ended], times[place[found]])
    people, person = np.unique(table["subject_id"].to_numpy(), return_inverse=True)
    last = np.zeros(len(people), np.int64)
    np.maximum.at(last, person, known)
    known[open_] = last[person[open_]]
    later = known > pc.fill_null(table["time"].cast(ID), np.iinfo(np.int64).max).to_numpy()
    available = pa.array(known, TIME, mask=~later)
    place_of = table.schema.get_field_index("available_time")
    return table.set_column(place_of, "available_time", available).drop_columns(["from_visit"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sys.exit(shared.run(main, parser))
