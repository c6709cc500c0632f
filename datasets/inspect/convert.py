"""INSPECT as downloaded -> a source folder: labels and splits at each CT angiography, links to the NIfTI files and the records.

    python datasets/inspect/convert.py SOURCE OUT [--meds FOLDER]
    mmjepa ingest OUT --out COHORT

Without --meds (the OMOP tables come from elsewhere and are made into MEDS by other tools) the records hold the scans alone.
"""

import argparse
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

import pandas as pd

sys.path.append(str(Path(__file__).resolve().parents[1]))
import source_folder as shared

from mmjepa.refusal import Refusal

MAPPING = ("impression_id", "image_id", "person_id", "procedure_DATETIME")
TASKS = (
    "pe_positive_nlp",
    *(f"{months}_month_{what}" for what in ("mortality", "readmission") for months in (1, 6, 12)),
    "12_month_PH",
)
VALUES = {"TRUE": True, "FALSE": False, "CENSORED": None, "CENSOR": None, "": None}
SPLITS = {"train": "train", "valid": "tuning", "test": "held_out"}
ENDING = ".nii.gz"


def main(options: argparse.Namespace) -> dict:
    images = shared.find_one(options.source, "CTPA")
    left_out: Counter[str] = Counter()
    scans = read_scans(options.source, images, left_out)
    split_of = splits(scans)
    with shared.new_source_folder(options.out, scans["person_id"], numbered=False) as folder:
        people, times = scans["person_id"].astype(int), scans["time"]
        keys = {str(scan): (people[scan], times[scan]) for scan in scans.index}
        if options.meds:
            link_records(folder, options.meds)
        else:
            folder.write_events(sorted({(*key, "CT//CHEST", None) for key in keys.values()}), "inspect")
        folder.write_splits(split_of)
        labels = {task: folder.write_labels(task, label_rows(scans[task], keys, task)) for task in TASKS}
        link_images(folder, images, scans)
    return {"subjects": len(split_of), "scans": len(scans), "labels": labels, **shared.said("left_out", left_out)}


def read_scans(source: Path, images: Path, left_out: Counter[str]) -> pd.DataFrame:
    """One row a scan on disk with a time, indexed by impression_id: image_id, person_id, time, split and the labels' texts."""
    mapping = _table(source, "study_mapping_*.tsv", MAPPING)
    scans = mapping.join(_table(source, "labels_*.tsv", ("impression_id", *TASKS)), how="inner")
    left_out["scans_without_labels"] = len(mapping) - len(scans)
    labelled = len(scans)
    scans = scans.join(_table(source, "splits_*.tsv", ("impression_id", "split")), how="inner")
    left_out["scans_without_split"] = labelled - len(scans)
    scans["image_id"] = scans["image_id"].str.removesuffix(ENDING)
    present = scans["image_id"].isin({path.name.removesuffix(ENDING) for path in images.iterdir()})
    timed = scans["procedure_DATETIME"] != ""
    left_out["scans_without_file"], left_out["scans_without_time"] = (
        int((~present).sum()),
        int((present & ~timed).sum()),
    )
    scans = scans[present & timed].copy()
    if scans.empty:
        raise Refusal("CT_EMPTY", f"no scan of {images} has a file, labels, a split and a time")
    if scans["image_id"].duplicated().any():
        raise Refusal("SOURCE_DUPLICATE", f"two studies of the mapping in {source} name the same image")
    try:
        scans["time"] = [pd.Timestamp(datetime.fromisoformat(text)) for text in scans["procedure_DATETIME"]]
    except ValueError:
        raise Refusal("SOURCE_VALUE", f"a procedure_DATETIME in {source} is not an ISO date and time") from None
    if any(time.tzinfo for time in scans["time"]) or not scans["person_id"].str.fullmatch(r"\d{1,18}").all():
        raise Refusal("SOURCE_VALUE", f"the mapping in {source} holds a time zone, or a person_id that is not a number")
    return scans


def _table(source: Path, pattern: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """A table by impression_id; rows repeated whole, which the release has, count once."""
    path = shared.find_one(source, pattern)
    return shared.unique(shared.read_table(path, columns, "\t").drop_duplicates(), columns[0], path)


def splits(scans: pd.DataFrame) -> dict[int, str]:
    """Each person's split. Raises Refusal INSPECT_SPLIT when it is unknown or differs between scans of one person."""
    found: dict[int, str] = {}
    for person, split in zip(scans["person_id"], scans["split"], strict=True):
        if found.setdefault(int(person), SPLITS.get(split, "")) != SPLITS.get(split) or split not in SPLITS:
            raise Refusal("INSPECT_SPLIT", "a split is not train, valid or test, or a person is in two of them")
    return found


def label_rows(texts: pd.Series, keys: dict[str, tuple], task: str) -> list[tuple]:
    """Yes or no at the scan; the censored get no label. Raises Refusal SOURCE_VALUE, INSPECT_LABELS_DIFFER."""
    rows: dict[tuple, bool] = {}
    for scan, text in texts.items():
        if text.upper() not in VALUES:
            raise Refusal("SOURCE_VALUE", f"{task} holds a value that is not TRUE, FALSE or Censored")
        value, key = VALUES[text.upper()], keys[str(scan)]
        if value is not None and rows.setdefault(key, value) != value:
            raise Refusal("INSPECT_LABELS_DIFFER", f"two scans of one person and moment differ in {task}")
    return [(*key, value) for key, value in rows.items()]


def link_records(folder: shared.SourceFolder, meds: Path) -> None:
    """The MEDS data and codes as links; the release's splits are written beside them, in place of other splits."""
    if not (meds / "data").is_dir() or not (meds / "metadata" / "codes.parquet").is_file():
        raise Refusal(
            "MEDS_MISSING", f"{meds} is not a MEDS root", "Name a folder with data/ and metadata/codes.parquet"
        )
    (folder.path / "ehr" / "metadata").mkdir(parents=True)
    folder.link("ehr/data", meds / "data")
    for name in ("codes.parquet", "dataset.json"):
        if (meds / "metadata" / name).is_file():
            folder.link(f"ehr/metadata/{name}", meds / "metadata" / name)


def link_images(folder: shared.SourceFolder, images: Path, scans: pd.DataFrame) -> None:
    """A link for each scan, and beside them ``images.csv``: NIfTI holds neither person nor date."""
    (folder.path / "images").mkdir()
    for image in scans["image_id"]:
        folder.link(f"images/{image}{ENDING}", images / f"{image}{ENDING}")
    table = pd.DataFrame({"file": scans["image_id"] + ENDING, "patient_id": scans["person_id"]})
    table["time"] = [time.isoformat() for time in scans["time"]]
    table.to_csv(folder.path / "images" / "images.csv", index=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meds", type=Path, help="a MEDS root of the OMOP tables whose subject_id is person_id")
    sys.exit(shared.run(main, parser))
