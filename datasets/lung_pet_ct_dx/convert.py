"""Lung-PET-CT-Dx as downloaded -> a source folder: a short record, histology and stage labels, links to the CTs and boxes.

    python datasets/lung_pet_ct_dx/convert.py SOURCE OUT
    mmjepa ingest OUT --out COHORT

Time zero of a label is the scan. Histology and stage are in the labels alone, never in the records.
"""

import argparse
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd

sys.path.append(str(Path(__file__).resolve().parents[1]))
import source_folder as shared

from mmjepa.refusal import Refusal

HISTOLOGY = {"A": "adenocarcinoma", "B": "small_cell", "E": "large_cell", "G": "squamous"}
STAGES = {"nodes": "N-Stage", "metastasis": "M-Stage"}
COLUMNS = ("NewPatientID", "Sex", "Age", "weight (kg)", "Smoking History", *STAGES.values())
NUMBERS = {"Age": "LUNG_DX//AGE//years", "weight (kg)": "LUNG_DX//WEIGHT//kg"}
_CASE = re.compile(r"([A-Z])(\d+)$")
_SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_MAX_PART_BYTES = 64 << 20


def main(options: argparse.Namespace) -> dict:
    images = shared.find_one(options.source, "Lung-PET-CT-Dx")
    boxes = shared.find_one(options.source, "Annotation")
    clinical = read_clinical(shared.find_one(options.source, "statistics-clinical-*.xlsx"))
    series, skipped = shared.read_series(images)
    if not series:
        raise Refusal("CT_EMPTY", f"no CT image in {images}")
    left_out = Counter(series_without_time=sum(one.time is None for one in series))
    left_out["patients_without_clinical_row"] = len(
        {one.patient_id for one in series if case(one) not in clinical.index}
    )
    with shared.new_source_folder(options.out, (one.patient_id for one in series)) as folder:
        events = folder.write_events(record(folder, clinical, series), "lung_pet_ct_dx")
        labels = write_labels(folder, clinical, [one for one in series if one.time])
        folder.link("images", images)
        folder.link("boxes", boxes)
    return {
        "subjects": len({one.patient_id for one in series}),
        "series": len(series),
        "events": events,
        "labels": labels,
        "boxes": count_boxes(boxes, series),
        **shared.said("left_out", left_out),
        **shared.said("files_skipped", skipped),
    }


def case(one: shared.Series) -> str:
    """``A0002`` of the PatientID ``Lung_Dx-A0002``: how the clinical table and the boxes name the patient."""
    return case_of(one.patient_id)


def case_of(patient_id: str) -> str:
    found = _CASE.search(patient_id)
    return found.group() if found else ""


def read_clinical(path: Path) -> pd.DataFrame:
    """The clinical table as text, indexed by case. Raises Refusal as ``read_table`` does."""
    try:
        rows = list(sheet_rows(path))
    except (OSError, KeyError, IndexError, ValueError, zipfile.BadZipFile, ElementTree.ParseError):
        raise Refusal("SOURCE_UNREADABLE", f"{path} cannot be read as an xlsx table") from None
    width = max(map(len, rows), default=0)
    table = shared.table_of([row + [""] * (width - len(row)) for row in rows], COLUMNS, path)
    table["NewPatientID"] = table["NewPatientID"].map(case_of)
    for name in NUMBERS:
        table[name] = shared.numbers(table, name, path, ("", "NA", "N/A", "-"))
    return shared.unique(table, "NewPatientID", path)


def sheet_rows(path: Path) -> Iterator[list[str]]:
    """The cells of an xlsx file's first sheet as text (ECMA-376: shared strings, inline strings and numbers)."""
    with zipfile.ZipFile(path) as book:
        shared_texts: list[str] = []
        if "xl/sharedStrings.xml" in book.namelist():
            shared_texts = [_text(item) for item in _part(book, "xl/sharedStrings.xml").iter(f"{_SHEET}si")]
        for row in _part(book, "xl/worksheets/sheet1.xml").iter(f"{_SHEET}row"):
            cells: list[str] = []
            for cell in row.iter(f"{_SHEET}c"):
                at = _column(cell.get("r", ""), len(cells))
                text = _text(cell) if cell.get("t") == "inlineStr" else cell.findtext(f"{_SHEET}v", "")
                cells += [""] * (at - len(cells))
                cells.append(shared_texts[int(text)] if cell.get("t") == "s" else text)
            yield cells


def _part(book: zipfile.ZipFile, name: str) -> ElementTree.Element:
    if book.getinfo(name).file_size > _MAX_PART_BYTES:
        raise ValueError("a part of the file is far larger than the table")
    return ElementTree.fromstring(book.read(name))


def _text(element: ElementTree.Element) -> str:
    return "".join(piece.text or "" for piece in element.iter(f"{_SHEET}t"))


def _column(reference: str, following: int) -> int:
    """The place, from 0, of a cell such as ``AB7``; cells may leave the reference out."""
    place = 0
    for letter in re.match(r"[A-Z]{0,3}", reference).group():  # type: ignore[union-attr]
        place = 26 * place + ord(letter) - ord("A") + 1
    return place - 1 if place > following else following


def record(folder: shared.SourceFolder, clinical: pd.DataFrame, series: list[shared.Series]) -> list[tuple]:
    """Sex without a time; age, weight and smoking, which carry no date, at midnight before the patient's first scan."""
    first: dict[str, shared.Series] = {}
    for one in sorted((one for one in series if one.time), key=lambda one: one.time):  # type: ignore[arg-type, return-value]
        first.setdefault(one.patient_id, one)
    rows: list[tuple] = []
    for patient, one in first.items():
        if case(one) not in clinical.index:
            continue
        person, subject = clinical.loc[case(one)], folder.people.subject_id(patient)
        when = folder.moved(patient, one.time).normalize()  # type: ignore[arg-type]
        rows.append((subject, None, f"GENDER//{person['Sex'].upper()[:1] or 'UNKNOWN'}", None))
        rows += [(subject, when, code, person[name]) for name, code in NUMBERS.items() if pd.notna(person[name])]
        if person["Smoking History"] in ("0", "1"):
            rows.append((subject, when, f"LUNG_DX//SMOKING_HISTORY//{person['Smoking History']}", None))
    return rows


def write_labels(folder: shared.SourceFolder, clinical: pd.DataFrame, series: list[shared.Series]) -> dict[str, int]:
    """One yes/no task for each histology (the letter of the id) and for spread to nodes and beyond (the clinical stage)."""
    labels: dict[str, list[tuple]] = {task: [] for task in (*HISTOLOGY.values(), *STAGES)}
    for one in series:
        key = (folder.people.subject_id(one.patient_id), folder.moved(one.patient_id, one.time))  # type: ignore[arg-type]
        if histology := HISTOLOGY.get(case(one)[:1]):
            for task in HISTOLOGY.values():
                labels[task].append((*key, task == histology))
        if case(one) in clinical.index:
            for task, column in STAGES.items():
                stage = clinical[column][case(one)][:1]
                if stage in ("0", "1", "2", "3"):
                    labels[task].append((*key, stage != "0"))
    return {task: folder.write_labels(task, rows) for task, rows in labels.items()}


def count_boxes(boxes: Path, series: list[shared.Series]) -> dict[str, int]:
    """How many annotated slices belong to a CT slice here; the others are of PET, of captures or not downloaded."""
    slices = {uid for one in series for uid in one.sop_uids}
    names = [path.stem for path in boxes.glob("*/*.xml")]
    found = sum(name in slices for name in names)
    return {"slices_here": found, "slices_elsewhere": len(names) - found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sys.exit(shared.run(main, parser))
