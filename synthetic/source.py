"""A source folder on disk: records, images, identities, labels, and the truth apart from them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from threadpoolctl import threadpool_limits

from mmjepa.files import atomic_path, fresh_folder, write_json
from mmjepa.progress import bar
from synthetic import concepts, ct, events, images, leaks, tables, truth
from synthetic.plan import Plan, image_id, people, pictures, scan_name, scan_second, scan_time, scan_uid
from synthetic.presets import describe, find_preset
from synthetic.workers import in_order
from synthetic.world import Subjects

TASK = "malignancy"
SHARD = 1000  # subjects a record file is made from
CHUNK = 25  # subjects a worker takes at a time; no byte depends on it


def generate(out: Path, plan: Plan, patients: int, workers: int, first: int = 0) -> dict[str, Any]:
    """Write a source folder of ``patients`` subjects from number ``first`` on, whole or not at all; return its summary.

    The bytes written do not depend on ``workers``, and memory does not grow with ``patients``.
    Raises Refusal: ``OUTPUT_EXISTS``, ``DISK_FULL``.
    """
    totals = {"positives": 0, "ehr_rows": 0, "images": 0}
    with atomic_path(fresh_folder(out, "folder")) as folder:
        for part in ("images", "identity"):
            (folder / part).mkdir(parents=True)
        ranges, end = list(_ranges(first, patients)), first + patients
        make = partial(_make, plan, folder / "images")
        with (
            threadpool_limits(1),  # their number decides the last bits of a product
            bar(f"Patients of site {plan.name}", patients) as progress,
            closing(in_order(make, ranges, workers)) as pieces,
            tables.Tables(folder) as written,
        ):
            shard: list[pa.Table] = []
            begun, number = first, 0
            for (start, count), piece in zip(ranges, pieces, strict=True):
                shard.append(piece)
                progress.advance(count)
                if start + count in (begun + SHARD, end):
                    span = range(begun, start + count)
                    _write_shard(plan, folder, written, number, span, pa.concat_tables(shard), totals)
                    shard, begun, number = [], start + count, number + 1
        _write_once(plan, folder)
    return {
        "out": os.fspath(out),
        "preset": plan.preset,
        "site": plan.name,
        "seed": plan.seed,
        "first": first,
        "patients": patients,
        **totals,
        "image_format": plan.image_format,
        "size": plan.size,
        "scans": plan.scans,
        "leaks": list(plan.leaks),
    }


def _ranges(first: int, patients: int) -> Iterator[tuple[int, int]]:
    """(first, count) of each worker's piece; none spans two shards."""
    for shard in range(first, first + patients, SHARD):
        end = min(shard + SHARD, first + patients)
        for start in range(shard, end, CHUNK):
            yield start, min(CHUNK, end - start)


def _make(plan: Plan, folder: Path, first: int, count: int) -> pa.Table:
    """Write the images of a range of subjects and return their record rows."""
    subjects = plan.sample(first, count)
    persons = people(plan, first, count, subjects)
    shown = [frame.to_dict("records") for frame in pictures(plan, first, persons, subjects)]
    facts = concepts.draw(subjects.t, plan.seed, first)
    parts = []
    for row, person in enumerate(persons.to_dict("records")):
        if not person["unpaired"]:
            for scan, records in enumerate(shown):
                _write_image(plan, person, first + row, scan, records[row], _sex(plan, subjects, row), folder)
        rows = record(plan, person, first + row, subjects, row, facts[row])
        site, number = person["site"], person["subject_id"]
        ids = {
            scan_second(person, scan) * events.SECOND_US: image_id(plan, plan.sites[site], first + row, scan)
            for scan in range(plan.scans)
        }
        parts.append(tables.record(rows, number, number * 1000, plan.vocabularies[site].codes, ids))
    return pa.concat_tables(parts).combine_chunks()


def _sex(plan: Plan, subjects: Subjects, row: int) -> str:
    """F or M; empty where there is no record."""
    if not subjects.seen_ehr[row]:
        return ""
    return "F" if events.background(subjects.t["ehr"][row], plan.world.loaded("ehr"))["female"] else "M"


def _write_image(plan: Plan, person: dict, subject: int, scan: int, row: dict, sex: str, folder: Path) -> None:
    site = plan.sites[person["site"]]
    write = images.write_dicom if plan.image_format == "dicom" else images.write_nifti
    image = images.Scan(
        name=scan_name(plan, site, subject, scan),
        uid=scan_uid(plan, site, subject, scan),
        patient_id=person["patient_id"],
        sex=sex,
        time=scan_time(person, scan),
        origin_mm=images.origin_mm(plan.seed, row["body"]),
        voxels=ct.render(row, plan.seed, row["body"], scan, size=plan.size),
        protocol=row,
    )
    write(image, folder)


def record(
    plan: Plan, person: Mapping[Any, Any], subject: int, subjects: Subjects, row: int, facts: np.ndarray
) -> events.Rows:
    """One subject's rows, the leaks asked for included. row: of ``subjects``; facts: [64] its concepts."""
    vocabulary = plan.vocabularies[person["site"]]
    ct_code = vocabulary.at["CT//CHEST"]
    times = [scan_second(person, scan) for scan in range(plan.scans)]
    rows = events.history(
        subjects.t["ehr"][row],
        plan.world.loaded("ehr"),
        vocabulary,
        times[0],
        plan.seed,
        subject,
        concepts=facts,
        seen=bool(subjects.seen_ehr[row]),
    )
    days = float(subjects.diagnosis_days[row])
    after = events.outcome(bool(subjects.y[row]), vocabulary, times[-1], diagnosis_days=days)
    later = events.Rows.of(times[1:], [ct_code] * len(times[1:]), np.nan, times[1:], events.NO_VISIT)
    rows = events.Rows.joined([rows, later, after])
    if person["unpaired"]:
        rows = events.Rows(*(column[rows.code != ct_code] for column in vars(rows).values()))
    asked_s, label = times[plan.labelled_scan], bool(subjects.label[row])
    return leaks.of_record(plan.leaks, rows, vocabulary, asked_s, label, plan.seed, subject)


def _write_shard(
    plan: Plan,
    folder: Path,
    written: tables.Tables,
    number: int,
    span: range,
    records: pa.Table,
    totals: dict[str, int],
) -> None:
    """Everything of shard ``number``, the subjects of ``span``, but the images; ``totals`` are brought up to date."""
    first, count = span.start, len(span)
    subjects = plan.sample(first, count)
    persons = people(plan, first, count, subjects)
    splits, records = leaks.of_shard(plan.leaks, persons[["subject_id", "split"]], records, plan.seed, first)
    tables.add_records(written, number, splits, records)
    _write_identity(plan, folder, first, persons)
    ends = [scan_second(person, plan.labelled_scan) for person in persons.to_dict("records")]
    labels = pd.DataFrame({"subject_id": persons["subject_id"], "second": ends, "boolean_value": subjects.label})
    labels = leaks.of_labels(plan.leaks, labels, records, plan.seed, first)
    key = {"subject_id": labels["subject_id"].to_numpy(), "prediction_time": _stamps(labels["second"].to_numpy())}
    label = {"boolean_value": labels["boolean_value"].to_numpy()}
    written.add(f"labels/{TASK}/0.parquet", key | label, closed=True)
    shown = pictures(plan, first, persons, subjects)
    key = {"subject_id": persons["subject_id"].to_numpy(), "prediction_time": _stamps(np.array(ends))}
    written.add("truth/oracle.parquet", key | {"y": subjects.y} | truth.scores(plan, persons, subjects, shown))
    written.add("truth/latents.parquet", truth.latents(plan, first, persons, subjects, shown))
    totals["positives"] += int(subjects.label.sum())
    totals["ehr_rows"] += records.num_rows
    totals["images"] += int((~persons["unpaired"]).sum()) * plan.scans


def _stamps(seconds: np.ndarray) -> pa.Array:
    return pa.array(seconds * events.SECOND_US, pa.timestamp("us"))


def _write_identity(plan: Plan, folder: Path, first: int, persons: pd.DataFrame) -> None:
    """Crosswalk; for NIfTI, which names no one, the list of whose image each file is."""
    crosswalk = persons[["patient_id", "subject_id", "shift_days"]].rename(columns={"shift_days": "date_shift_days"})
    _append(crosswalk, folder / "identity" / "crosswalk.csv")
    if plan.image_format == "nifti":
        listing = [
            {
                "file": f"{scan_name(plan, plan.sites[person['site']], first + row, scan)}.nii",
                "patient_id": person["patient_id"],
                "time": scan_time(person, scan).isoformat(),
            }
            for row, person in enumerate(persons.to_dict("records"))
            for scan in range(plan.scans)
            if not person["unpaired"]
        ]
        _append(pd.DataFrame(listing, columns=["file", "patient_id", "time"]), folder / "images" / "images.csv")


def _append(frame: pd.DataFrame, path: Path) -> None:
    frame.to_csv(path, mode="a", header=not path.exists(), index=False)


def _write_once(plan: Plan, folder: Path) -> None:
    """What does not depend on the subjects."""
    (folder / "identity" / "salt.txt").write_text(plan.salt)
    codes: dict[str, str] = {}
    for vocabulary in plan.vocabularies:
        codes |= dict(zip(vocabulary.codes, vocabulary.descriptions, strict=True))
    tables.write_metadata(folder / "ehr", f"synthetic-{plan.preset}-{plan.name}", f"seed-{plan.seed}", codes)
    leaks.of_metadata(plan.leaks, folder / "ehr")
    preset = find_preset(plan.preset)
    world = {"seed": plan.seed, "size": plan.size, "scans": plan.scans, "leaks": leaks.described(plan.leaks)}
    write_json(folder / "truth" / "world.json", world | {"sites": [describe(preset, site) for site in plan.sites]})
