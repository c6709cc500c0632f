"""Checks of the record itself: who is in which split, when things became known, what the codes give away."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmjepa.audit.events import ALWAYS, CODED_AFTERWARDS, DAY_US, DEATH, DIED, DISCHARGE, NEVER, Events
from mmjepa.audit.finding import Finding, judge, not_applicable
from mmjepa.refusal import Refusal

HOUR_US = 3_600_000_000
MIN_TWIN_EVENTS = 20  # shorter records can be equal by chance


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except pa.ArrowInvalid:
        raise Refusal("MEDS_UNREADABLE", f"{path} cannot be read as parquet", "Copy or export it again") from None


def subject_in_two_places(ehr: Path) -> list[Finding]:
    """Check 1: a subject in two splits, or in two data files. ``ehr`` is a MEDS root."""
    findings = []
    splits = ehr / "metadata" / "subject_splits.parquet"
    if splits.is_file():
        table = _read(splits, ["subject_id", "split"]).to_pandas()
        twice = int((table.groupby("subject_id")["split"].nunique() > 1).sum())
        findings.append(
            judge(
                "1",
                "subject in two splits",
                twice,
                f"{twice} subjects stand in more than one split",
                "Give each subject one split",
            )
        )
    else:
        findings.append(not_applicable("1", "subject in two splits", "the cohort has no subject_splits.parquet"))
    files = [
        np.unique(_read(path, ["subject_id"])["subject_id"].to_numpy())
        for path in sorted((ehr / "data").rglob("*.parquet"))
    ]
    _, times = np.unique(np.concatenate(files), return_counts=True) if files else (None, np.zeros(0, int))
    twice = int((times > 1).sum())
    advice = "MEDS wants a subject in exactly one file; merge their rows"
    return [
        *findings,
        judge("1b", "subject in two files", twice, f"{twice} subjects stand in more than one file", advice),
    ]


def near_duplicates(events: Events, splits: Mapping[str, np.ndarray]) -> Finding:
    """Check 1: subjects whose records hold the same multiset of (code, value), in different splits.

    splits: name -> subject ids.
    """
    split_of = {int(subject): name for name, subjects in splits.items() for subject in subjects}
    where: dict[str, set[str]] = {}
    people: dict[str, int] = {}
    value_bits = np.nan_to_num(events.values, nan=-1e30).view(np.int32)
    order = np.lexsort((value_bits, events.codes, events.subject))
    offsets = np.searchsorted(events.subject[order], np.arange(len(events.subjects) + 1))
    rows = np.stack([events.codes[order], value_bits[order]], axis=1)
    for index, subject in enumerate(events.subjects):
        start, stop = offsets[index], offsets[index + 1]
        if stop - start >= MIN_TWIN_EVENTS:
            digest = hashlib.blake2b(rows[start:stop].tobytes(), digest_size=16).hexdigest()
            where.setdefault(digest, set()).add(split_of.get(int(subject), ""))
            people[digest] = people.get(digest, 0) + 1
    count = sum(people[digest] for digest, names in where.items() if len(names) > 1)
    sentence = f"{count} subjects share their codes and values, one for one, with a subject of another split"
    return judge(
        "1c", "exact duplicates of records", count, sentence, "Keep one of them, or put them in the same split"
    )


def same_image_twice(index: pd.DataFrame) -> Finding:
    """Check 1: one source image under two subjects."""
    count = int((index.groupby("source_hash")["subject_id"].nunique() > 1).sum())
    sentence = f"{count} images stand under more than one subject"
    return judge("1d", "image of two subjects", count, sentence, "Mend the crosswalk and ingest again")


def coded_afterwards(events: Events) -> list[Finding]:
    """Check 6: diagnosis and DRG rows. They are assigned after the stay they describe, so no row may be visible during it."""
    coded = np.flatnonzero(events.matching(CODED_AFTERWARDS))
    if not len(coded):
        return [not_applicable("6", "diagnoses stamped at discharge", "the record has no diagnosis or DRG rows")]
    ends = np.flatnonzero(events.matching(DISCHARGE))
    at_end = pd.MultiIndex.from_arrays([events.subject[coded], events.times_us[coded]]).isin(
        pd.MultiIndex.from_arrays([events.subject[ends], events.times_us[ends]])
    )
    inside, start_us, end_us = events.stays.current(events.subject[coded], events.available_us[coded])
    early = inside & ~at_end & (events.available_us[coded] < end_us) & (events.times_us[coded] >= start_us)
    stamped, seen = int(at_end.sum()), int(early.sum())
    return [
        judge(
            "6",
            "diagnoses stamped at discharge",
            stamped,
            f"{stamped:,} of {len(coded):,} diagnosis and DRG rows carry exactly a discharge time",
            "The hourly text leaves these codes out; other inputs must end before the discharge or block them",
            fires="warn",
        ),
        judge(
            "6b",
            "diagnoses visible during their stay",
            seen,
            f"{seen:,} diagnosis and DRG rows are visible inside a stay before its discharge",
            "Set their available_time to the discharge; same-stay codes give the outcome away",
        ),
    ]


def death_in_discharge_codes(events: Events) -> list[Finding]:
    """Check 7: discharge codes that spell the outcome, and discharges visible before their own time."""
    ends = events.matching(DISCHARGE)
    if not ends.any():
        return [not_applicable("7", "discharge codes that carry death", "the record has no discharge codes")]
    died = np.flatnonzero(events.matching(DISCHARGE, also=DIED))
    death_us = events.recorded_deaths_us[events.subject[died]]
    ahead = int(((death_us != NEVER) & (death_us - events.times_us[died] > HOUR_US)).sum())
    early = int((events.available_us[ends] < events.times_us[ends]).sum())
    return [
        judge(
            "7",
            "discharge codes that carry death",
            len(died),
            f"{len(died)} discharge codes say that the subject died; {ahead} stand over an hour before the recorded death",
            "They are the label: the hourly text leaves them out; elsewhere no prediction time may lie after them",
            fires="warn",
        ),
        judge(
            "7b",
            "discharge visible before its time",
            early,
            f"{early} discharge rows are available before the discharge",
            "Set available_time to the discharge time",
        ),
    ]


def ends_without_a_time(visible: Events) -> Finding:
    """Check 7: deaths and discharges among the static rows, which an input shows at every prediction time.

    visible: events with the static rows.
    """
    static = (visible.matching(DEATH) | visible.matching(DISCHARGE)) & (visible.times_us == ALWAYS)
    count = int(static.sum())
    sentence = f"{count} deaths and discharges have no time, so that they are visible from the start"
    return judge("7d", "death or discharge without a time", count, sentence, "Give them their time, or drop the rows")


def after_death(events: Events) -> list[Finding]:
    """Check 8: events after death, and deaths that are dates without an hour."""
    deaths = events.recorded_deaths_us
    if (deaths == NEVER).all():
        return [not_applicable("8", "events after death", "the record has no death")]
    after = events.times_us > events.deaths_us[events.subject]
    people = len(np.unique(events.subject[after]))
    midnight = int(((deaths != NEVER) & (deaths % DAY_US == 0)).sum())
    return [
        judge(
            "8",
            "events after death",
            int(after.sum()),
            f"{int(after.sum()):,} events of {people} subjects follow the recorded death",
            "Drop them: ICU stays end at death and leave them out; elsewhere no prediction time may lie there (check 4)",
        ),
        judge(
            "8b",
            "deaths that are dates",
            midnight,
            f"{midnight} of {int((deaths != NEVER).sum())} death times are midnight, a date without an hour",
            "ICU stays read them as the end of that day; leave these subjects out of horizons under 24 h",
            fires="warn",
        ),
    ]


def known_before_it_happened(events: Events) -> Finding:
    """Check 13: an event available before its own time."""
    early = events.available_us < events.times_us
    codes = len(np.unique(events.codes[early]))
    sentence = f"{int(early.sum()):,} events of {codes} codes are available before they happened"
    return judge(
        "13",
        "available before its time",
        int(early.sum()),
        sentence,
        "Mend available_time; results are known after, not before",
    )
