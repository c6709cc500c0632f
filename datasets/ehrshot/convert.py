"""EHRSHOT as downloaded (EHRSHOT_ASSETS) -> a source folder: MEDS events, the release's splits, labels and few-shot lists.

python datasets/ehrshot/convert.py SOURCE OUT
mmjepa ingest OUT --out COHORT
"""

import argparse
import json
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).resolve().parents[1]))
import meds_out
import source_folder as shared
from meds_out import TIME, pc

from mmjepa import progress
from mmjepa.refusal import Refusal

BIRTH = ("SNOMED/3950001",)
DEATH = ("Death Type/OMOP generated", "Condition Type/OMOP4822053")
SPLITS = {"train": "train", "val": "tuning", "test": "held_out"}
#: The findings of ``chexpert``, whose value is a number of 14 bits, the first finding in the highest.
FINDINGS = (
    "no_finding", "enlarged_cardiomediastinum", "cardiomegaly", "lung_lesion", "lung_opacity", "edema", "consolidation",
    "pneumonia", "atelectasis", "pneumothorax", "pleural_effusion", "pleural_other", "fracture", "support_devices",
)  # fmt: skip
LABELS = {"patient_id": pa.int64(), "prediction_time": TIME, "label_type": pa.string(), "value": pa.string()}
SHOTS = pa.schema(
    {"subject_id": pa.int64(), "prediction_time": TIME, "boolean_value": pa.bool_(), "k": pa.int64()}
    | {"replicate": pa.int64(), "split": pa.string()}
)


def main(options: argparse.Namespace) -> dict:
    return convert(options.source, options.out)


def convert(source: Path | str, out: Path | str) -> dict:
    """Write ``out`` from the unpacked assets; returns counts.

    Raises Refusal EHRSHOT_SPLIT, EHRSHOT_TASK, OUTPUT_EXISTS, MEDS_EMPTY, SOURCE_*.
    """
    source, out = Path(source), Path(out)
    events = shared.find_one(source, "ehrshot.csv", "ehrshot.csv.gz")
    split_of = read_splits(shared.find_one(source, "person_id_map.csv"))
    benchmark = shared.find_one(source, "benchmark")
    tasks = sorted(path.parent for path in benchmark.glob("*/labeled_patients.csv"))
    left_out: Counter[str] = Counter()
    with meds_out.new_folder(out) as written:
        extra = {"text_value": pa.large_string(), "unit": pa.string(), "visit_id": pa.string()}
        root = meds_out.MedsOut(written / "ehr", meds_out.shard_count([events]), extra)
        add_events(root, events, split_of)
        counts = root.close("ehrshot", lambda code: None, split_of)
        labels = {}
        for task in progress.track(tasks, "reading labels"):
            labels |= write_task(written, task, split_of, left_out)
            write_shots(written, task)
    return counts | {"labels": labels} | shared.said("left_out", left_out)


def read_splits(path: Path) -> dict[int, str]:
    """Each person's split. Raises Refusal EHRSHOT_SPLIT when it is unknown, or a person has two."""
    table = pa.concat_tables(meds_out.read_tables(path, {"omop_person_id": pa.int64(), "split": pa.string()}))
    people, splits = table["omop_person_id"].to_pylist(), table["split"].to_pylist()
    if len(set(people)) != len(people) or None in people or not set(splits) <= set(SPLITS):
        raise Refusal("EHRSHOT_SPLIT", f"{path} names a person twice, or a split that is not train, val or test")
    return {person: SPLITS[split] for person, split in zip(people, splits, strict=True)}


def add_events(root: meds_out.MedsOut, path: Path, split_of: dict[int, str]) -> None:
    """A row each event at its start; a visit's end is a row of its own, so that no length of stay is known at admission."""
    columns = {"patient_id": pa.int64(), "start": TIME, "end": TIME, "code": pa.string(), "omop_table": pa.string()}
    columns |= dict.fromkeys(("value", "unit", "visit_id"), pa.string())
    people = pa.array(sorted(split_of), pa.int64())
    for table in meds_out.read_tables(path, columns):
        if any(table[name].null_count for name in ("patient_id", "start", "code")):
            raise Refusal("SOURCE_VALUE", f"{path} has a row without patient_id, start or code")
        if not pc.all(pc.is_in(table["patient_id"], people)).as_py():
            raise Refusal("EHRSHOT_SPLIT", f"{path} holds a person that person_id_map.csv does not")
        codes = pc.if_else(pc.is_in(table["code"], pa.array(BIRTH)), "MEDS_BIRTH", table["code"])
        codes = pc.if_else(pc.is_in(table["code"], pa.array(DEATH)), "MEDS_DEATH", codes)
        values = meds_out.numbers(table["value"])
        texts = pc.if_else(pc.is_null(values), table["value"], None)
        keys = {"subject_id": table["patient_id"], "unit": table["unit"], "visit_id": table["visit_id"]}
        root.add(**keys, time=table["start"], code=codes, numeric_value=values, text_value=texts)
        ended = pc.and_(
            pc.equal(table["omop_table"], "visit_occurrence"), pc.greater_equal(table["end"], table["start"])
        )
        visits = table.filter(pc.fill_null(ended, False))
        ends = pc.binary_join_element_wise("VISIT_END", visits["code"], "//")
        root.add(subject_id=visits["patient_id"], visit_id=visits["visit_id"], time=visits["end"], code=ends)


def write_task(folder: Path, task: Path, split_of: dict[int, str], left_out: Counter[str]) -> dict[str, dict[str, int]]:
    """The labels of one task, at the release's prediction times; rows and positives of each task written.

    Boolean tasks as they are; ``lab_*`` whether the value is abnormal (level >= 1), as the benchmark scores it, and the level
    as ``lab_*_level``; ``chexpert`` as 14 tasks. Labels of one moment that differ are left out.
    """
    table = pa.concat_tables(meds_out.read_tables(task / "labeled_patients.csv", LABELS))
    if any(table[name].null_count for name in LABELS):
        raise Refusal("SOURCE_VALUE", f"{task / 'labeled_patients.csv'} has an empty cell")
    found: dict[tuple[int, datetime], set[str]] = {}
    for person, time, value in zip(
        *(table[name].to_pylist() for name in ("patient_id", "prediction_time", "value")), strict=True
    ):
        found.setdefault((person, time), set()).add(value.lower())
    keys = [key for key, values in found.items() if len(values) == 1 and key[0] in split_of]
    left_out["labels_without_split"] += sum(key[0] not in split_of for key in found)
    left_out["labels_that_differ"] += sum(len(values) > 1 for key, values in found.items() if key[0] in split_of)
    texts = [next(iter(found[key])) for key in keys]
    written = {}
    for name, values, kind in decoded(task, texts, set(table["label_type"].to_pylist())):
        times = pa.array([time for _, time in keys], TIME)
        rows = meds_out.write_labels(folder, name, [person for person, _ in keys], times, values, kind)
        written[name] = {"rows": rows, "positive": int(np.count_nonzero(values))}
    return written


def decoded(task: Path, texts: list[str], kinds: set[str]) -> list[tuple[str, np.ndarray, str]]:
    """(task name, values, MEDS value column) of what one file says. Raises Refusal EHRSHOT_TASK, SOURCE_VALUE."""
    if kinds <= {"boolean"}:
        if not set(texts) <= {"true", "false"}:
            raise Refusal("SOURCE_VALUE", f"a boolean label of {task.name} is neither True nor False")
        return [(task.name, np.array([text == "true" for text in texts], bool), "boolean_value")]
    limit = 1 << len(FINDINGS) if task.name == "chexpert" else 4
    if task.name != "chexpert" and not task.name.startswith("lab_"):
        raise Refusal(
            "EHRSHOT_TASK", f"{task.name} has labels of type {', '.join(sorted(kinds))}, known for lab_* and chexpert"
        )
    if not all(text.isdecimal() and int(text) < limit for text in texts):
        raise Refusal("SOURCE_VALUE", f"a label of {task.name} is not a whole number from 0 to {limit - 1}")
    values = np.array([int(text) for text in texts], np.int64)
    if task.name == "chexpert":
        bits = [(values >> (len(FINDINGS) - 1 - place)) & 1 == 1 for place in range(len(FINDINGS))]
        return [(f"chexpert_{name}", bit, "boolean_value") for name, bit in zip(FINDINGS, bits, strict=True)]
    return [(task.name, values >= 1, "boolean_value"), (f"{task.name}_level", values, "integer_value")]


def write_shots(folder: Path, task: Path) -> None:
    """``few_shot/<task>.parquet``: the release's draws, a row a drawn label; a label drawn twice has two rows.

    k: how many a class. The draws "all" (k = -1) are every label of the split and are not repeated here.
    """
    path = task / "all_shots_data.json"
    if not path.is_file():
        return
    try:
        drawn = json.loads(path.read_text())
        for name, by_k in drawn.items():
            rows = [
                row for k, replicates in by_k.items() if int(k) > 0
                for replicate, shot in replicates.items() for row in _shot_rows(shot, int(k), int(replicate))
            ]  # fmt: skip
            name = name if task.name != "chexpert" else f"chexpert_{name.lower().replace(' ', '_')}"
            (folder / "few_shot").mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows, SHOTS), folder / "few_shot" / f"{name}.parquet")
    except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        raise Refusal("SOURCE_VALUE", f"{path} is not laid out as the release's few-shot lists") from None


def _shot_rows(shot: dict[str, list], k: int, replicate: int) -> list[dict]:
    return [
        dict(
            zip(
                SHOTS.names,
                (person, datetime.fromisoformat(time), bool(value), k, replicate, SPLITS[split]),
                strict=True,
            )
        )
        for split in ("train", "val")
        for person, time, value in zip(
            shot[f"patient_ids_{split}_k"], shot[f"label_times_{split}_k"], shot[f"label_values_{split}_k"], strict=True
        )
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sys.exit(shared.run(main, parser))
