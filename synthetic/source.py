"""A source folder on disk: records, images, identities, labels, and the truth apart from them."""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmjepa.files import atomic_path, fresh_folder, write_json
from mmjepa.progress import bar
from mmjepa.refusal import Refusal
from synthetic import ct, events, images, oracle
from synthetic.catalogue import catalogue
from synthetic.draws import uniforms
from synthetic.presets import describe, find_preset, find_site
from synthetic.world import World

TASK = "malignancy"
SPLITS = ("train", "tuning", "held_out")
_SPLIT_EDGES = (0.70, 0.85)
SHARD = 1000  # subjects a record file is made from
CHUNK = 25  # subjects a worker takes at a time; no byte depends on it
MOST_PATIENTS = 1_000_000


@dataclass(frozen=True)
class Plan:
    """What is asked for; small enough to send to every worker, which draws the rest anew."""

    preset: str
    site: str
    seed: int
    image_format: str

    @property
    def world(self) -> World:
        return _world(self.preset, self.seed)

    @property
    def salt(self) -> str:
        """The salt of this site's hashed identifiers."""
        return images.digest("salt", self.seed, self.site).hex()[:32]

    @property
    def vocabulary(self) -> events.Vocabulary:
        return _vocabulary(self.preset, self.seed, self.site)


@lru_cache
def _world(preset: str, seed: int) -> World:
    return World.named(preset, seed)


@lru_cache
def _vocabulary(preset: str, seed: int, site: str) -> events.Vocabulary:
    return events.Vocabulary(catalogue(seed, _world(preset, seed).loaded("ehr")), site)


def generate(
    out: Path, *, patients: int, site: str, preset: str, seed: int, image_format: str, workers: int
) -> dict[str, Any]:
    """Write a source folder of ``patients`` subjects of one site, whole or not at all; return its summary.

    image_format: ``nifti`` or ``dicom``. The bytes written do not depend on ``workers``.
    Raises Refusal: ``OUTPUT_EXISTS``, ``SYNTHETIC_UNKNOWN`` (preset, site, format), ``SYNTHETIC_RANGE`` (numbers).
    """
    plan = _checked(patients, site, preset, seed, image_format, workers)
    with atomic_path(fresh_folder(out, "folder")) as folder:
        folder.mkdir()
        (folder / "images").mkdir()
        starts = range(0, patients, CHUNK)
        jobs = (joblib.delayed(_make)(plan, first, min(CHUNK, patients - first), folder / "images") for first in starts)
        tables = []
        with (
            bar(f"Patients of site {site}", patients) as progress,
            closing(joblib.Parallel(n_jobs=workers, return_as="generator")(jobs)) as pieces,
        ):
            for first, table in zip(starts, pieces, strict=True):
                tables.append(table)
                progress.advance(min(CHUNK, patients - first))
        people = _people(plan, 0, patients)
        records = pa.concat_tables(tables)
        _write_records(plan, folder / "ehr", people, records)
        _write_identity(plan, folder, people)
        positives = _write_truth(plan, folder, people)
    return {
        "out": os.fspath(out),
        "preset": preset,
        "site": site,
        "seed": seed,
        "patients": patients,
        "positives": positives,
        "ehr_rows": records.num_rows,
        "images": patients,
        "image_format": image_format,
    }


def _checked(patients: int, site: str, preset: str, seed: int, image_format: str, workers: int) -> Plan:
    find_preset(preset)
    find_site(preset, site)
    if image_format not in images.FORMATS:
        raise Refusal(
            "SYNTHETIC_UNKNOWN", f"no image format is called {image_format!r}", f"Known: {', '.join(images.FORMATS)}"
        )
    for what, value, low, high in (
        ("patients", patients, 1, MOST_PATIENTS),
        ("seed", seed, 0, 2**63 - 1),
        ("workers", workers, 1, 1024),
    ):
        if not low <= value <= high:
            raise Refusal("SYNTHETIC_RANGE", f"{what}={value} is outside {low}..{high}")
    return Plan(preset, site, seed, image_format)


def _people(plan: Plan, first: int, count: int) -> pd.DataFrame:
    """Who the subjects are: ids of both worlds, split, index CT time (cohort clock, s), date shift, image name and id."""
    index = range(first, first + count)
    u = uniforms(plan.seed, "people", first, count, 5)
    start = int.from_bytes(images.digest("patient_id", plan.seed, plan.site)[:4], "big")
    shift = (30 + np.floor(u[:, 3] * 1500)).astype(np.int64) * np.where(u[:, 4] < 0.5, -1, 1)
    names = [f"scan_{images.digest('name', plan.seed, plan.site, i).hex()[:12]}" for i in index]
    uids = [images.uid(plan.seed, plan.site, i) for i in index]
    keys = uids if plan.image_format == "dicom" else [f"{name}.nii" for name in names]
    return pd.DataFrame(
        {
            "subject_id": find_site(plan.preset, plan.site).offset + 1 + np.array(index),
            # a bijection of the index: the factor shares no divisor with the modulus
            "patient_id": [f"H{plan.site[0].upper()}{1_000_000 + (start + i * 7_368_787) % 9_000_000}" for i in index],
            "split": np.array(SPLITS)[np.searchsorted(_SPLIT_EDGES, u[:, 0], side="right")],
            "index_s": events.index_time_s(u[:, 1:3]),
            "shift_days": shift,
            "name": names,
            "uid": uids,
            "image_id": [images.image_id(plan.salt, key) for key in keys],
        }
    )


def _make(plan: Plan, first: int, count: int, folder: Path) -> pa.Table:
    """Write the images of a range of subjects and return their record rows."""
    world = plan.world
    subjects = world.sample(find_site(plan.preset, plan.site), first, count)
    people = _people(plan, first, count).to_dict("records")
    protocols = _ct_parameters(plan, subjects.t["image"], first).to_dict("records")
    names, vocabulary, seed = world.loaded("ehr"), plan.vocabulary, plan.seed
    write = images.write_dicom if plan.image_format == "dicom" else images.write_nifti
    parts = []
    for row, person in enumerate(people):
        i, t_ehr = first + row, subjects.t["ehr"][row]
        scan = images.Scan(
            name=person["name"],
            uid=person["uid"],
            patient_id=person["patient_id"],
            female=bool(t_ehr[names.index("b2")] > 0),
            time=_source_time(person),
            origin_mm=images.origin_mm(seed, i),
            voxels=ct.render(protocols[row], seed, i),
            protocol=protocols[row],
        )
        write(scan, folder)
        before = events.history(t_ehr, names, vocabulary, person["index_s"], seed, i)
        after = events.outcome(bool(subjects.y[row]), vocabulary, person["index_s"], seed, i)
        parts.append(_table(events.Rows.joined([before, after]), person, vocabulary))
    return pa.concat_tables(parts).combine_chunks()


def _ct_parameters(plan: Plan, t_image: np.ndarray, first: int) -> pd.DataFrame:
    return ct.parameters(
        t_image, plan.world.loaded("image"), uniforms(plan.seed, "ct/protocol", first, len(t_image), 3)
    )


def _source_time(person: dict) -> datetime:
    """The index CT's date and time as the hospital has it: cohort time minus the person's shift."""
    return datetime.fromtimestamp(person["index_s"] - person["shift_days"] * events.DAY, UTC).replace(tzinfo=None)


def _table(rows: events.Rows, person: dict, vocabulary: events.Vocabulary) -> pa.Table:
    """One subject's rows in MEDS columns."""
    stamp = pa.timestamp("us")
    is_ct = rows.code == vocabulary.at["CT//CHEST"]
    return pa.table(
        {
            "subject_id": np.full(len(rows.time), person["subject_id"], np.int64),
            "time": pa.array(rows.time, stamp, mask=rows.time == events.NO_TIME),
            "code": pa.array([vocabulary.codes[i] for i in rows.code], pa.string()),
            "numeric_value": pa.array(rows.value, pa.float32(), mask=np.isnan(rows.value)),
            "available_time": pa.array(rows.available, stamp, mask=rows.available == events.NO_TIME),
            "visit_id": pa.array(person["subject_id"] * 1000 + rows.visit, mask=rows.visit == events.NO_VISIT),
            "image_id": pa.array([person["image_id"] if hit else None for hit in is_ct], pa.string()),
        }
    )


def _write_records(plan: Plan, root: Path, people: pd.DataFrame, records: pa.Table) -> None:
    """A MEDS 0.4 root: every subject in one file, its rows together and in time order."""
    (root / "metadata").mkdir(parents=True)
    for split in SPLITS:
        (root / "data" / split).mkdir(parents=True)
    for split, number, part in _shards(people, records):
        pq.write_table(part, root / "data" / split / f"{number}.parquet")
    vocabulary = plan.vocabulary
    parents = pa.nulls(len(vocabulary.codes), pa.list_(pa.string()))
    codes = {"code": vocabulary.codes, "description": vocabulary.descriptions, "parent_codes": parents}
    pq.write_table(pa.table(codes), root / "metadata" / "codes.parquet")
    splits = {"subject_id": people["subject_id"].to_numpy(), "split": pa.array(people["split"].tolist(), pa.string())}
    pq.write_table(pa.table(splits), root / "metadata" / "subject_splits.parquet")
    write_json(
        root / "metadata" / "dataset.json",
        {
            "dataset_name": f"synthetic-{plan.preset}-{plan.site}",
            "dataset_version": f"seed-{plan.seed}",
            "etl_name": "synthetic",
            "meds_version": "0.4.1",
            "additional_value_modality_columns": ["image_id"],
            "other_extension_columns": ["available_time", "visit_id"],
        },
    )


def _shards(people: pd.DataFrame, records: pa.Table) -> Iterator[tuple[str, int, pa.Table]]:
    """(split, number, rows) of each record file; which subjects share a file depends on their index and split alone."""
    subject = records["subject_id"].to_numpy()
    for number in range(-(-len(people) // SHARD)):
        block = people.iloc[number * SHARD : (number + 1) * SHARD]
        for split in SPLITS:
            ids = block["subject_id"][block["split"] == split]
            if len(ids):
                mine = np.isin(subject, np.asarray(ids, np.int64))
                yield split, number, records.filter(pa.array(mine)).combine_chunks()


def _write_identity(plan: Plan, folder: Path, people: pd.DataFrame) -> None:
    """Crosswalk and salt; for NIfTI, which names no one, the list of whose image each file is."""
    (folder / "identity").mkdir()
    crosswalk = people[["patient_id", "subject_id", "shift_days"]].rename(columns={"shift_days": "date_shift_days"})
    crosswalk.to_csv(folder / "identity" / "crosswalk.csv", index=False)
    (folder / "identity" / "salt.txt").write_text(plan.salt)
    if plan.image_format == "nifti":
        listing = {
            "file": people["name"] + ".nii",
            "patient_id": people["patient_id"],
            "time": [_source_time(person).isoformat() for person in people.to_dict("records")],
        }
        pd.DataFrame(listing).to_csv(folder / "images" / "images.csv", index=False)


def _write_truth(plan: Plan, folder: Path, people: pd.DataFrame) -> int:
    """Labels, and what nobody may train on: oracle scores, latents, readouts, image parameters. Returns the positives."""
    world, site = plan.world, find_site(plan.preset, plan.site)
    subjects = world.sample(site, 0, len(people))
    subject_id = people["subject_id"].to_numpy()
    time = pa.array(people["index_s"].to_numpy() * events.SECOND_US, pa.timestamp("us"))
    key = {"subject_id": subject_id, "prediction_time": time}
    (folder / "labels" / TASK).mkdir(parents=True)
    pq.write_table(_closed(key | {"boolean_value": subjects.y}), folder / "labels" / TASK / "0.parquet")
    (folder / "truth").mkdir()
    scores = {f"env_bayes_{view}": oracle.env_bayes(world, site, subjects, view) for view in oracle.VIEWS}
    scores["c_blind_both"] = oracle.c_blind(world, site, subjects, "both")
    scores["source_bayes_both"] = oracle.source_bayes(world, subjects, "both")
    pq.write_table(pa.table(key | {"y": subjects.y} | scores), folder / "truth" / "oracle.parquet")
    latents: dict[str, Any] = {"subject_id": subject_id, "y": subjects.y, "eta": subjects.eta}
    for block, part in world.block.items():
        latents |= {f"{block}{j + 1}": column for j, column in enumerate(subjects.z[:, part].T)}
    latents |= {f"c{j + 1}": column for j, column in enumerate(subjects.c.T)}
    for modality, t in subjects.t.items():
        latents |= {f"t_{modality}_{name}": t[:, j] for j, name in enumerate(world.loaded(modality))}
    parameters = _ct_parameters(plan, subjects.t["image"], 0)
    latents |= {f"ct_{name}": parameters[name].to_numpy() for name in parameters if name != "kernel"}
    latents["ct_kernel"] = pa.array(parameters["kernel"].tolist(), pa.string())
    pq.write_table(pa.table(latents), folder / "truth" / "latents.parquet")
    write_json(folder / "truth" / "world.json", {"seed": plan.seed} | describe(world.preset, site))
    return int(subjects.y.sum())


def _closed(columns: dict[str, Any]) -> pa.Table:
    """A label table whose columns are declared non-null, as MEDS wants them."""
    table = pa.table(columns)
    return table.cast(pa.schema([field.with_nullable(False) for field in table.schema]))
