"""A folder of ICU stays on disk: records in MEDS, labels of death, and the truth apart from them: states, other policies."""

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mmjepa.files import atomic_path, fresh_folder, write_json
from mmjepa.progress import bar
from mmjepa.refusal import Refusal
from synthetic import events, tables
from synthetic.draws import uniforms
from synthetic.icu import NONE, POLICIES, Icu, Stays, simulate
from synthetic.icu_filter import ParticleFilter
from synthetic.icu_oracle import DEATHS
from synthetic.icu_records import IcuVocabulary, hourly_truth, records
from synthetic.plan import check_range, split_of
from synthetic.presets import Site
from synthetic.workers import in_order

SHARD = 250  # stays a worker takes at a time, and a record file is made from
PARTICLES = 256
_OFFSET = 5_000_000  # of subject ids within a site's block, so that nobody is a CT subject as well


def generate(
    out: Path, *, patients: int, site: Site, law: Icu, seed: int, workers: int, first: int = 0
) -> dict[str, Any]:
    """Write ``patients`` stays of one site from number ``first`` on, whole or not at all; return the summary.

    ``ehr/`` a MEDS root; ``labels/icu_death_by_<hour>h`` for stays that last beyond the hours seen; ``truth/``: ``states`` of
    every hour and ``stays`` under the policies observed, never and always (same patients, same noise), ``oracle`` the exact
    observer's risk for every label. The bytes do not depend on ``workers``; memory does not grow with ``patients``.
    Raises Refusal: ``OUTPUT_EXISTS``, ``DISK_FULL``, ``SYNTHETIC_RANGE``.
    """
    check_range(first, patients, seed, workers)
    if law.hours <= max(last for _, last in DEATHS):
        raise Refusal("SYNTHETIC_RANGE", f"hours={law.hours}: the labels need 48 at least")
    end = first + patients
    ranges = [(start, min(SHARD, end - start)) for start in range(first, end, SHARD)]
    totals = {"deaths": 0, "ehr_rows": 0}
    with atomic_path(fresh_folder(out, "folder")) as folder:
        folder.mkdir(parents=True)
        with (
            bar(f"ICU stays of site {site.name}", patients) as progress,
            closing(in_order(partial(_shard, site, law, seed), ranges, workers)) as pieces,
            tables.Tables(folder) as written,
        ):
            for number, piece in enumerate(pieces):
                splits, rows, deaths = piece.pop("splits"), piece.pop("records"), piece.pop("deaths")
                tables.add_records(written, number, splits, rows)
                for name, columns in piece.items():
                    written.add(f"{name}.parquet", columns, closed=name.startswith("labels/"))
                totals["deaths"] += deaths
                totals["ehr_rows"] += rows.num_rows
                progress.advance(len(splits))
        vocabulary = IcuVocabulary(site.name)
        codes = dict(zip(vocabulary.codes, vocabulary.descriptions, strict=True))
        tables.write_metadata(folder / "ehr", f"synthetic-icu-{site.name}", f"seed-{seed}", codes)
        write_json(
            folder / "truth" / "world.json", {"seed": seed, "site": site.name, "particles": PARTICLES} | asdict(law)
        )
    return {"out": os.fspath(out), "site": site.name, "seed": seed, "first": first, "patients": patients, **totals}


def _shard(site: Site, law: Icu, seed: int, first: int, count: int) -> dict[str, Any]:
    """Everything that is written of a range of stays."""
    arms = {policy: simulate(law, seed, first, count, policy) for policy in POLICIES}
    stays = arms["observed"]
    u = uniforms(seed, "icu/people", first, count, 3)
    subject_id = site.offset + _OFFSET + 1 + stays.index
    start_s = events.index_time_s(u[:, 1:]) // events.HOUR * events.HOUR
    vocabulary = IcuVocabulary(site.name)
    rows = [
        tables.record(records(stays, i, vocabulary, int(start_s[i]), seed), number, number * 1000, vocabulary.codes, {})
        for i, number in enumerate(subject_id.tolist())
    ]
    made: dict[str, Any] = {
        "splits": pd.DataFrame({"subject_id": subject_id, "split": split_of(u[:, 0])}),
        "records": pa.concat_tables(rows).combine_chunks(),
        "deaths": int((stays.death_h != NONE).sum()),
        "truth/states": _arms(
            {name: {"subject_id": np.repeat(subject_id, law.hours), **_hours(arm)} for name, arm in arms.items()}
        ),
        "truth/stays": _arms({name: {"subject_id": subject_id, **_ends(arm)} for name, arm in arms.items()}),
    }
    for seen_h, last_h in DEATHS:
        there = stays.end_h > seen_h
        died = (stays.death_h[there] != NONE) & (stays.death_h[there] <= last_h)
        when = pa.array((start_s[there] + (seen_h + 1) * events.HOUR) * events.SECOND_US, pa.timestamp("us"))
        key = {"subject_id": subject_id[there], "prediction_time": when}
        task = f"icu_death_by_{last_h + 1}h"
        risk = ParticleFilter(law, stays.world, PARTICLES, seed).risk(stays.take(there), seen_h, last_h)
        made[f"labels/{task}/0"] = key | {"boolean_value": died}
        made[f"truth/oracle_{task}"] = key | {"y": died, "risk": risk}
    return made


def _hours(stays: Stays) -> dict[str, Any]:
    return {name: column for name, column in hourly_truth(stays).items() if name != "stay"}


def _ends(stays: Stays) -> dict[str, Any]:
    return {name: getattr(stays, name) for name in ("death_h", "discharge_h", "onset_h", "deteriorating")}


def _arms(columns: Mapping[str, Mapping[str, Any]]) -> pa.Table:
    """The arms below one another, with a column ``policy``."""
    arms = [
        pa.table({"policy": pa.array([name] * len(arm["subject_id"]), pa.string()), **arm})
        for name, arm in columns.items()
    ]
    return pa.concat_tables(arms)
