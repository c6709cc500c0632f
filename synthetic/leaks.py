"""Deliberate leaks, off unless asked for by name: each plants one fault that an audit is due to find.

A hook of this module is called where a leak may change something; without a leak of its own it hands back what it was given.
Who is hit is drawn by (seed, "leak/<name>", subject), so that a leak's bytes depend on no batch, worker or other leak.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmjepa.refusal import Refusal
from synthetic.draws import Array, generator, uniforms
from synthetic.events import DAY, HOUR, NO_VISIT, SECOND_US, Rows, Vocabulary
from synthetic.world import Subjects


@dataclass(frozen=True)
class Switch:
    """says: what is wrong with data made under it. check: number of the audit check due. adds: codes it needs, described."""

    says: str
    check: str
    adds: tuple[tuple[str, str], ...] = ()


SWITCHES = {
    "discharge_codes_early": Switch(
        "Diagnosis codes of a visit are stamped, and can be read, at its admission instead of its discharge.", "6"
    ),
    "died_code_in_window": Switch(
        "Half of those with the outcome carry a discharge that says died at the end of their last visit before the "
        "prediction time.",
        "7",
        (("HOSPITAL_DISCHARGE//DIED", "End of a hospital visit, died"),),
    ),
    "outcome_filtered": Switch(
        "Subjects without the outcome are labelled only if they had no visit in the last year; those with it always are.",
        "11",
    ),
    "subject_label_under_prefixes": Switch(
        "Each subject's final label stands the day after its last three visits, at the CT and at the end of its record, when "
        "the diagnosis has been made.",
        "4",
    ),
    "events_after_death": Switch(
        "A tenth of the subjects die after everything else, and labs of theirs are drawn in the hours after.",
        "8",
        (("MEDS_DEATH", "Death"),),
    ),
    "subject_in_two_splits": Switch(
        "A tenth of the subjects stand in a second split too, with all their rows, on the other side of training.", "1"
    ),
    "near_duplicates": Switch(
        "A tenth of the subjects have a twin on the other side of training: the same record and label under another "
        "subject number, all dates shifted, without an image.",
        "1",
    ),
    "fit_on_all_splits": Switch(
        "codes.parquet holds the count, mean and standard deviation of each code's values, taken over all splits.", "14"
    ),
    "record_length": Switch(
        "Records of subjects without the outcome begin two years before the prediction time, the others' five years before.",
        "10",
    ),
    "order_tells": Switch("Subjects with the outcome were numbered first, the others after them.", "12"),
    "lab_at_order_time": Switch(
        "Lab results can be read from the moment they were ordered, 10 minutes to 4 hours before blood was drawn.", "13"
    ),
    "window_opens_early": Switch(
        "Prediction times lie half a year after the CT, inside the time in which the diagnosis is looked for.", "4"
    ),
    "later_crop": Switch(
        "Labels stand at the first scan, whose patch is centred where the nodule will have grown to, to one side, by the "
        "last scan.",
        "13",
    ),
}

_SHARE, _DIED_SHARE = 0.1, 0.5
_OTHER_SIDE = {"train": "held_out", "tuning": "train", "held_out": "train"}
_LATER_NUMBERS, _TWIN_NUMBERS = 2_000_000, 5_000_000  # added to subject ids, a site's being a million at most
_VISITS_A_SUBJECT, _PREFIXES = 1000, 3
_YEAR, _SHORT_RECORD, _HALF_YEAR = 365 * DAY, 730 * DAY, 182 * DAY


def table() -> str:
    """All switches, one line each: name, audit check due, what is wrong."""
    width = max(map(len, SWITCHES))
    return "\n".join(f"{name:<{width}}  {switch.check:>2}  {switch.says}" for name, switch in SWITCHES.items())


def check(names: Sequence[str], scans: int) -> None:
    """Refusal ``SYNTHETIC_RANGE`` where a leak needs what is not made."""
    if "later_crop" in names and scans < 2:
        raise Refusal("SYNTHETIC_RANGE", "the leak later_crop needs --scans of at least 2")


def described(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """For the truth: what was planted."""
    return {name: {"says": SWITCHES[name].says, "check": SWITCHES[name].check} for name in names}


def labelled_scan(names: Sequence[str], scans: int) -> int:
    """The scan at which labels stand: the last."""
    return 0 if "later_crop" in names else scans - 1


def of_vocabulary(names: Sequence[str], vocabulary: Vocabulary) -> Vocabulary:
    """The vocabulary with the codes that leaks add, after its own."""
    added = {code: text for name in names for code, text in SWITCHES[name].adds}
    if not added:
        return vocabulary
    longer = copy.copy(vocabulary)
    longer.codes, longer.descriptions = [*vocabulary.codes, *added], [*vocabulary.descriptions, *added.values()]
    longer.at = {code: i for i, code in enumerate(longer.codes)}
    return longer


def of_people(names: Sequence[str], persons: pd.DataFrame, subjects: Subjects) -> pd.DataFrame:
    """People with the leaks that concern who they are."""
    if "order_tells" in names:
        persons = persons.assign(subject_id=persons["subject_id"] + np.where(subjects.label, 0, _LATER_NUMBERS))
    return persons


def of_pictures(names: Sequence[str], frames: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Image parameters, one frame a scan, with the leaks that concern images."""
    if "later_crop" in names:
        first, last = frames[0], frames[-1]
        growth_mm = (last["diameter_mm"] - first["diameter_mm"]) / 2
        frames = [first.assign(offset_x_mm=first["offset_x_mm"] - growth_mm), *frames[1:]]
    return frames


def of_record(
    names: Sequence[str], rows: Rows, vocabulary: Vocabulary, prediction_s: int, label: bool, seed: int, subject: int
) -> Rows:
    """One subject's rows with the leaks that concern records. prediction_s: second of the prediction time."""
    if "discharge_codes_early" in names:
        rows = _discharge_codes_early(rows, vocabulary)
    if "lab_at_order_time" in names:
        rows = _lab_at_order_time(rows, vocabulary, seed, subject)
    if "record_length" in names and not label:
        rows = _shortened(rows, vocabulary, prediction_s)
    if "died_code_in_window" in names and label:
        rows = _died(rows, vocabulary, seed, subject)
    if "events_after_death" in names:
        rows = _after_death(rows, vocabulary, seed, subject)
    return rows


def _of_kind(rows: Rows, vocabulary: Vocabulary, kind: str) -> Array:
    """[n] bool: rows whose code begins with ``kind``."""
    return np.array([vocabulary.codes[i].startswith(kind) for i in rows.code], bool)


def _admitted(rows: Rows, vocabulary: Vocabulary) -> Array:
    """[n] us: when the visit of each row began; the row's own time where it has none."""
    start = np.zeros(rows.visit.max(initial=0) + 1, np.int64)
    admission = _of_kind(rows, vocabulary, "HOSPITAL_ADMISSION//")
    start[rows.visit[admission]] = rows.time[admission]
    return np.where(rows.visit == NO_VISIT, rows.time, start[rows.visit])


def _discharge_codes_early(rows: Rows, vocabulary: Vocabulary) -> Rows:
    coded = _of_kind(rows, vocabulary, "DIAGNOSIS//") & (rows.visit != NO_VISIT)
    early = _admitted(rows, vocabulary)
    moved = {name: np.where(coded, early, getattr(rows, name)) for name in ("time", "available")}
    return Rows.joined([replace(rows, **moved)])


def _lab_at_order_time(rows: Rows, vocabulary: Vocabulary, seed: int, subject: int) -> Rows:
    lab = _of_kind(rows, vocabulary, "LAB//")
    ahead_s = generator(seed, "leak/lab_at_order_time", subject).integers(HOUR // 6, 4 * HOUR, len(lab))
    return replace(rows, available=np.where(lab, rows.time - ahead_s * SECOND_US, rows.available))


def _shortened(rows: Rows, vocabulary: Vocabulary, prediction_s: int) -> Rows:
    """Without the visits that began long ago."""
    keep = (rows.visit == NO_VISIT) | (_admitted(rows, vocabulary) >= (prediction_s - _SHORT_RECORD) * SECOND_US)
    return Rows(*(column[keep] for column in vars(rows).values()))


def _died(rows: Rows, vocabulary: Vocabulary, seed: int, subject: int) -> Rows:
    ends = np.flatnonzero(_of_kind(rows, vocabulary, "HOSPITAL_DISCHARGE//"))
    if not len(ends) or uniforms(seed, "leak/died_code_in_window", subject, 1, 1)[0, 0] >= _DIED_SHARE:
        return rows
    code = rows.code.copy()
    code[ends[-1]] = vocabulary.at["HOSPITAL_DISCHARGE//DIED"]
    return replace(rows, code=code)


def _after_death(rows: Rows, vocabulary: Vocabulary, seed: int, subject: int) -> Rows:
    """The last three labs once more, 1 to 15 hours after a death within a year of the last row."""
    draw = generator(seed, "leak/events_after_death", subject)
    labs = np.flatnonzero(_of_kind(rows, vocabulary, "LAB//"))[-3:]
    if draw.random() >= _SHARE or not len(labs):
        return rows
    death_s = int(rows.available.max()) // SECOND_US + int(draw.integers(DAY, _YEAR))
    drawn_s = death_s + draw.integers(HOUR, 15 * HOUR, len(labs))
    death = Rows.of([death_s], [vocabulary.at["MEDS_DEATH"]], np.nan, [death_s], NO_VISIT)
    after = Rows.of(drawn_s, rows.code[labs], rows.value[labs], drawn_s + HOUR, NO_VISIT)
    return Rows.joined([rows, death, after])


def of_shard(
    names: Sequence[str], splits: pd.DataFrame, records: pa.Table, seed: int, first: int
) -> tuple[pd.DataFrame, pa.Table]:
    """Splits (subject_id, split) and records of a shard, which begins at subject ``first``, with the leaks that concern both."""
    persons = splits
    if "near_duplicates" in names:
        twins = _twins(persons["subject_id"], seed, first)
        records = pa.concat_tables([records, _copies(records, twins)])
        mine = persons[persons["subject_id"].isin(twins.index)]
        splits = _with_other_side(splits, mine.assign(subject_id=mine["subject_id"] + _TWIN_NUMBERS))
    if "subject_in_two_splits" in names:
        hit = uniforms(seed, "leak/subject_in_two_splits", first, len(persons), 1)[:, 0] < _SHARE
        splits = _with_other_side(splits, persons[hit])
    return splits, records


def _with_other_side(splits: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([splits, again.assign(split=again["split"].map(_OTHER_SIDE))], ignore_index=True)


def _twins(subject_id: pd.Series, seed: int, first: int) -> pd.Series:
    """subject_id of those who have a twin -> days by which the twin's dates are later."""
    u = uniforms(seed, "leak/near_duplicates", first, len(subject_id), 2)
    hit = u[:, 0] < _SHARE
    return pd.Series(30 + np.floor(u[hit, 1] * 335).astype(np.int64), index=subject_id[hit])


def _copies(records: pa.Table, twins: pd.Series) -> pa.Table:
    """The twins' rows."""
    mine = records.filter(pa.array(np.isin(records["subject_id"].to_numpy(), twins.index)))
    days = twins.reindex(mine["subject_id"].to_numpy()).to_numpy(np.int64)
    later = pa.array(days * DAY * SECOND_US, pa.duration("us"))
    more = {
        "subject_id": pa.scalar(_TWIN_NUMBERS),
        "time": later,
        "available_time": later,
        "visit_id": pa.scalar(_TWIN_NUMBERS * _VISITS_A_SUBJECT),
    }
    columns = {name: pc.call_function("add", [mine[name], value]) for name, value in more.items()}
    columns["image_id"] = pa.nulls(len(mine), pa.string())
    return pa.table({name: columns.get(name, mine[name]) for name in mine.column_names})


def of_labels(names: Sequence[str], labels: pd.DataFrame, records: pa.Table, seed: int, first: int) -> pd.DataFrame:
    """Labels (subject_id, second, boolean_value) of a shard with the leaks that concern them. records: of ``of_shard``."""
    if "near_duplicates" in names:
        twins = _twins(labels["subject_id"], seed, first)
        theirs = labels[labels["subject_id"].isin(twins.index)]
        moved = theirs["second"] + twins.reindex(theirs["subject_id"]).to_numpy() * DAY
        more = theirs.assign(subject_id=theirs["subject_id"] + _TWIN_NUMBERS, second=moved)
        labels = pd.concat([labels, more], ignore_index=True)
    if "outcome_filtered" in names:
        visits = _seconds(records, "HOSPITAL_ADMISSION//").groupby("subject_id")["second"].max()
        recent = labels["subject_id"].map(visits) >= labels["second"] - _YEAR
        labels = labels[labels["boolean_value"] | ~recent]
    if "subject_label_under_prefixes" in names:
        labels = _under_prefixes(labels, records)
    if "window_opens_early" in names:
        labels = labels.assign(second=labels["second"] + _HALF_YEAR)
    return labels


def _seconds(records: pa.Table, kind: str) -> pd.DataFrame:
    """subject_id and second of every row, in time order, from which its code, which begins with ``kind``, can be read."""
    mine = records.select(["subject_id", "code", "available_time"]).drop_null().to_pandas()
    mine = mine[mine["code"].str.startswith(kind)]
    second = mine["available_time"].astype("int64") // SECOND_US
    return mine[["subject_id"]].assign(second=second).sort_values("second")


def _under_prefixes(labels: pd.DataFrame, records: pa.Table) -> pd.DataFrame:
    visits = _seconds(records, "HOSPITAL_DISCHARGE//").groupby("subject_id").tail(_PREFIXES)
    ends = _seconds(records, "").groupby("subject_id").tail(1)
    times = pd.concat([labels[["subject_id", "second"]], visits.assign(second=visits["second"] + DAY), ends])
    times = times.drop_duplicates().sort_values("second")
    return labels.drop(columns="second").merge(times, on="subject_id", how="left")


def of_metadata(names: Sequence[str], root: Path) -> None:
    """The MEDS root's metadata with the leaks that concern it."""
    if "fit_on_all_splits" not in names:
        return
    listing = root / "metadata" / "codes.parquet"
    codes = pq.read_table(listing)
    parts = [_value_sums(path) for path in sorted((root / "data").rglob("*.parquet"))]
    sums = pd.concat(parts).groupby(level=0).sum().reindex(codes["code"].to_pylist())
    count = sums["count"].fillna(0).to_numpy(np.int64)
    mean = sums["sum"] / count
    sd = np.sqrt(np.maximum(sums["squares"] / count - mean**2, 0))
    for name, column in (("value_count", count), ("value_mean", mean), ("value_sd", sd)):
        codes = codes.append_column(name, pa.array(column, from_pandas=True))
    pq.write_table(codes, listing)


def _value_sums(path: Path) -> pd.DataFrame:
    """Count, sum and sum of squares of the values of each code in one data file."""
    rows = pq.read_table(path, columns=["code", "numeric_value"]).drop_null().to_pandas()
    value = rows["numeric_value"].astype(float)
    return (
        rows.assign(sum=value, squares=value**2)
        .groupby("code")
        .agg(count=("sum", "size"), sum=("sum", "sum"), squares=("squares", "sum"))
    )
