"""LIDC-IDRI as downloaded -> a source folder: what the readers made of each scan, the patients' diagnoses, a link to the CTs.

    python datasets/lidc/convert.py SOURCE OUT
    mmjepa ingest OUT --out COHORT

The XML reads name their CT by SeriesInstanceUid. Nodules are not matched between readers: labels are of the whole scan.
"""

import argparse
import os
import sys
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

sys.path.append(str(Path(__file__).resolve().parents[1]))
import source_folder as shared

from mmjepa.refusal import Refusal

SPACE = "{http://www.nih.gov}"
SUSPICIOUS = 4  # malignancy 4 "moderately suspicious" and 5 "highly suspicious" of 1..5
DIAGNOSES = {"1": False, "2": True, "3": True}  # 1 benign, 2 primary, 3 metastatic; 0 is unknown
DIAGNOSIS_COLUMNS = ("TCIA Patient ID", "Diagnosis at the Patient Level")
MIN_READERS = 2
FICTITIOUS = datetime(2000, 1, 1)


def main(options: argparse.Namespace) -> dict:
    images = shared.find_one(options.source, "LIDC-IDRI")
    left_out: Counter[str] = Counter()
    reads = read_all(options.source, left_out)
    if not reads:
        raise Refusal("LIDC_NO_READS", f"{options.source} holds no XML read of a CT", "Download the XML files too")
    diagnoses = read_diagnoses(options.source)
    series, skipped = shared.read_series(images)
    if not series:
        raise Refusal("CT_EMPTY", f"no CT image in {images}")
    left_out["series_without_reads"] = sum(one.uid not in reads for one in series)
    with shared.new_source_folder(options.out, (one.patient_id for one in series)) as folder:
        keys = scan_keys(folder, series)
        scans = [(*key, "CT//CHEST", None, folder.people.image_id(one.uid)) for one, key in keys.items()]
        events = folder.write_events(scans, "lidc")
        labels = write_labels(folder, keys, reads, diagnoses, left_out)
        folder.link("images", images)
    return {
        "subjects": len({one.patient_id for one in series}),
        "series": len(series),
        "series_without_time": sum(one.time is None for one in series),
        "events": events,
        "labels": labels,
        **shared.said("left_out", left_out),
        **shared.said("files_skipped", skipped),
    }


def scan_keys(folder: shared.SourceFolder, series: list[shared.Series]) -> dict[shared.Series, tuple]:
    """Each scan's subject and time. Headers often hold a fictitious date alone, which is no moment: such scans of a patient
    are laid on days of their own, and the records tell ingest's readers which image is meant."""
    keys: dict[shared.Series, tuple] = {}
    undated: Counter[str] = Counter()
    for one in series:
        moment = one.time or FICTITIOUS + timedelta(days=undated[one.patient_id])
        undated[one.patient_id] += one.time is None
        keys[one] = (folder.people.subject_id(one.patient_id), folder.moved(one.patient_id, moment))
    return keys


def read_all(source: Path, left_out: Counter[str]) -> dict[str, list[list[int]]]:
    """Every CT read below ``source``: series uid -> for each reader, the malignancy (1..5) of each nodule of 3 mm or more.

    The same read may lie in two places of a download. Raises Refusal LIDC_READS_DIFFER, LIDC_READ_BROKEN.
    """
    reads: dict[str, list[list[int]]] = {}
    paths = sorted(Path(at) / name for at, _, names in os.walk(source) for name in names if name.endswith(".xml"))
    for number, path in enumerate(paths, start=1):
        try:
            found = read_xml(path)
        except (OSError, ElementTree.ParseError, ValueError):
            raise Refusal("LIDC_READ_BROKEN", f"XML file {number} of {len(paths)} in {source} is no read") from None
        if found is None:
            left_out["xml_not_of_a_ct"] += 1
        elif reads.setdefault(found[0], found[1]) != found[1]:
            raise Refusal("LIDC_READS_DIFFER", f"two reads of one series in {source} differ", "Keep one version")
    return reads


def read_xml(path: Path) -> tuple[str, list[list[int]]] | None:
    """The series uid and each reader's malignancy ratings; None for a read of a radiograph. Raises ValueError."""
    root = ElementTree.parse(path).getroot()
    if root.tag != f"{SPACE}LidcReadMessage":
        return None
    uid = root.findtext(f"{SPACE}ResponseHeader/{SPACE}SeriesInstanceUid", "").strip()
    readers = []
    for session in root.iter(f"{SPACE}readingSession"):
        texts = [
            nodule.findtext(f"{SPACE}characteristics/{SPACE}malignancy")
            for nodule in session.iter(f"{SPACE}unblindedReadNodule")
        ]
        readers.append([int(text) for text in texts if text])  # smaller nodules have no characteristics
    if not uid or any(not 0 <= rating <= 5 for ratings in readers for rating in ratings):
        raise ValueError
    return uid, readers


def read_diagnoses(source: Path) -> dict[str, bool]:
    """Patient -> malignant or not, where known, of the diagnosis table saved as csv; empty when the download has none."""
    if not [*source.glob("tcia-diagnosis-data*.csv"), *source.glob("*/tcia-diagnosis-data*.csv")]:
        return {}
    path = shared.find_one(source, "tcia-diagnosis-data*.csv")
    patient, level = DIAGNOSIS_COLUMNS
    table = shared.unique(shared.read_table(path, DIAGNOSIS_COLUMNS, first_line=True), patient, path)
    values = shared.numbers(table, level, path)
    return {name: DIAGNOSES[f"{value:g}"] for name, value in values.items() if f"{value:g}" in DIAGNOSES}  # type: ignore[misc]


def write_labels(
    folder: shared.SourceFolder,
    keys: dict[shared.Series, tuple],
    reads: dict[str, list[list[int]]],
    known: dict[str, bool],
    left_out: Counter[str],
) -> dict[str, int]:
    """How many readers found a nodule of 3 mm or more, or a suspicious one; whether half of them did; the diagnosis."""
    counts: dict[str, list[tuple]] = {"nodule": [], "suspicious": []}
    halves: dict[str, list[tuple]] = {"nodule": [], "suspicious": []}
    of_moment: dict[tuple, set[str]] = {}
    for one, key in keys.items():
        of_moment.setdefault(key, set()).add(str(reads.get(one.uid)))
    for one, key in keys.items():
        readers = reads.get(one.uid, [])
        if len(of_moment[key]) > 1:
            left_out["series_of_one_moment_with_other_reads"] += 1
            continue
        if len(readers) < MIN_READERS:
            continue
        marks = {"nodule": map(bool, readers), "suspicious": (max(own, default=0) >= SUSPICIOUS for own in readers)}
        for task, marked in marks.items():
            count = sum(marked)
            counts[task].append((*key, count))
            halves[task].append((*key, 2 * count >= len(readers)))
    written = {task: folder.write_labels(task, rows) for task, rows in halves.items()}
    for task, rows in counts.items():
        written[f"readers_{task}"] = folder.write_labels(f"readers_{task}", rows, "integer_value")
    diagnosed = [(*key, known[one.patient_id]) for one, key in keys.items() if one.patient_id in known]
    return written | {"malignant": folder.write_labels("malignant", diagnosed)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sys.exit(shared.run(main, parser))
