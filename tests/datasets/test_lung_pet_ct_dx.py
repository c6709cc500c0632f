"""Lung-PET-CT-Dx: histology and stage labels at the scan, a record without either, boxes counted by slice."""

import zipfile
from datetime import datetime
from xml.sax.saxutils import escape

import pandas as pd
import pytest

from mmjepa.cohort import Cohort
from mmjepa.ingest import ingest

#: The header of statistics-clinical-20201221.xlsx; the M of M-Stage is a full-width letter there.
HEADER = [
    "No.", "NewPatientID", "Sex", "Age", "weight (kg)", "T-Stage", "N-Stage", "Ｍ-Stage", "Histopathological grading",
    "Smoking History",
]  # fmt: skip
ROWS = [
    ["1", "A0001", "M", "61", "70.5", "2a", "1", "0", "2", "1"],
    ["2", "G0002", "F", "58", "", "1", "0", "1a", "", "0"],
    ["3", "B0003", "F", "70", "50", "is", "X", "", "", ""],
]


def write_xlsx(path, rows):
    """As spreadsheet programs do: text in a shared table, numbers in place, empty cells left out."""
    texts: list[str] = []
    lines = []
    for n, row in enumerate(rows, start=1):
        cells = ""
        for letter, value in zip("ABCDEFGHIJ", row, strict=False):
            if value.replace(".", "").isdigit():
                cells += f'<c r="{letter}{n}"><v>{value}</v></c>'
            elif value:
                cells += f'<c r="{letter}{n}" t="s"><v>{len(texts)}</v></c>'
                texts.append(value)
        lines.append(f'<row r="{n}">{cells}</row>')
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    strings = "".join(f"<si><t>{escape(text)}</t></si>" for text in texts)
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("xl/sharedStrings.xml", f"<sst {space}>{strings}</sst>")
        book.writestr(
            "xl/worksheets/sheet1.xml", f"<worksheet {space}><sheetData>{''.join(lines)}</sheetData></worksheet>"
        )


def make_download(source, write_series):
    """Three patients of the clinical table, one that it lacks, a PET series, boxes of one CT slice and of none here."""
    images = source / "manifest-1" / "Lung-PET-CT-Dx"
    for patient, day in (("A0001", 1), ("G0002", 2), ("B0003", 3), ("E0004", 4)):
        scan = datetime(2007, 4, day, 17, 35)
        uids = write_series(images / f"Lung_Dx-{patient}" / "04-01-2007-x" / "3.000000-1", f"Lung_Dx-{patient}", scan)
    write_series(images / "Lung_Dx-A0001" / "04-01-2007-x" / "4.000000-2", "Lung_Dx-A0001", datetime(2007, 4, 1), "PT")
    boxes = source / "Lung-PET-CT-Dx-Annotations-XML-Files-rev12222020" / "Annotation" / "E0004"
    boxes.mkdir(parents=True)
    for name in (uids[0], "1.2.3"):
        (boxes / f"{name}.xml").write_text("<annotation/>")
    write_xlsx(source / "statistics-clinical-20201221.xlsx", [HEADER, *ROWS])
    return source


@pytest.fixture
def download(tmp_path, write_series):
    return make_download(tmp_path / "download", write_series)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, write_series, convert_apart):
    """The source folder made of a download by a process of its own; leave it as it is."""
    folder = tmp_path_factory.mktemp("lung_dx")
    source = make_download(folder / "download", write_series)
    code, result, seen = convert_apart("lung_pet_ct_dx", source, folder / "source")
    assert code == 0, seen
    return folder / "source", result, seen


def test_the_cohort_has_histology_and_stage_at_every_scan(converted, tmp_path, people):
    out = converted[0]
    made = ingest(out, tmp_path / "cohort")
    assert (made["ct"]["accepted"], made["ct"]["skipped"], made["subjects_with_both"]) == (4, {"CT_NOT_CT": 4}, 3)
    cohort = Cohort.open(tmp_path / "cohort")
    name_of = {subject: name[-5:] for name, (subject, _) in people(out).items()}
    found = {
        task: {name_of[row.subject_id]: row.value for row in cohort.labels(task).itertuples()} for task in cohort.tasks
    }
    of_type = {"adenocarcinoma": "A0001", "squamous": "G0002", "small_cell": "B0003", "large_cell": "E0004"}
    expected = {task: {name: name == one for name in of_type.values()} for task, one in of_type.items()}
    stages = {"nodes": {"A0001": True, "G0002": False}, "metastasis": {"A0001": False, "G0002": True}}
    assert found == expected | stages
    index = pd.read_parquet(tmp_path / "cohort" / "ct" / "index.parquet")
    assert set(cohort.labels("squamous")["prediction_time"]) == set(index["time"])


def test_the_record_holds_neither_histology_nor_stage(converted):
    events = pd.read_parquet(converted[0] / "ehr" / "data" / "0.parquet")
    assert set(events["code"]) == {
        "GENDER//M", "GENDER//F", "LUNG_DX//AGE//years", "LUNG_DX//WEIGHT//kg", "LUNG_DX//SMOKING_HISTORY//0",
        "LUNG_DX//SMOKING_HISTORY//1",
    }  # fmt: skip
    assert sorted(events["numeric_value"].dropna()) == [50, 58, 61, 70, 70.5]


def test_boxes_are_linked_and_counted_by_the_slices_they_belong_to(converted):
    out, result, _ = converted
    assert result["boxes"] == {"slices_here": 1, "slices_elsewhere": 1}
    assert len(list((out / "boxes").glob("*/*.xml"))) == 2
    assert result["left_out"] == {"patients_without_clinical_row": 1, "series_without_time": 0}


def test_nothing_seen_or_written_names_a_person(converted):
    out, _, seen = converted
    files = [path for part in ("ehr", "labels") for path in (out / part).rglob("*") if path.is_file()]
    told = seen.encode() + b"".join(path.read_bytes() for path in files)
    assert not any(text in told for text in (b"A0001", b"Planted", b"2007"))


@pytest.mark.parametrize("column", ["NewPatientID", "N-Stage", "Smoking History"])
def test_a_clinical_table_without_a_column_is_refused_and_leaves_nothing(download, tmp_path, convert, column):
    header = [name.replace(column, "other") for name in HEADER]
    write_xlsx(download / "statistics-clinical-20201221.xlsx", [header, *ROWS])
    code, result, _ = convert("lung_pet_ct_dx", download, tmp_path / "source")
    assert (code, result["refused"]["code"]) == (2, "SOURCE_COLUMNS")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download"]


def test_broken_doubled_and_wordy_tables_are_refused(download, tmp_path, convert):
    path = download / "statistics-clinical-20201221.xlsx"
    for rows, code in (
        ([HEADER, ROWS[0], ROWS[0]], "SOURCE_DUPLICATE"),
        ([HEADER, [*ROWS[0][:3], "old", *ROWS[0][4:]]], "SOURCE_VALUE"),
    ):
        write_xlsx(path, rows)
        assert convert("lung_pet_ct_dx", download, tmp_path / "source")[1]["refused"]["code"] == code
    path.write_bytes(path.read_bytes()[:200])
    assert convert("lung_pet_ct_dx", download, tmp_path / "source")[1]["refused"]["code"] == "SOURCE_UNREADABLE"


@pytest.mark.real_data
def test_the_boxes_of_a_real_scan_belong_to_its_slices(data_folder, tmp_path, convert):
    source = tmp_path / "download"
    (source / "Lung-PET-CT-Dx").mkdir(parents=True)
    for name in ("A0002_B40f", "A0002_B70f"):
        (source / "Lung-PET-CT-Dx" / name).mkdir()
        for path in (data_folder / "chest_ct" / name).iterdir():
            (source / "Lung-PET-CT-Dx" / name / path.name).symlink_to(path)
    (source / "Annotation").mkdir()
    (source / "Annotation" / "A0002").symlink_to(data_folder / "chest_ct" / "boxes_A0002")
    write_xlsx(source / "statistics-clinical-20201221.xlsx", [HEADER, ["1", "A0002", "F", "53", *["1"] * 6]])
    code, result, _ = convert("lung_pet_ct_dx", source, tmp_path / "source")
    assert (code, result["series"], result["subjects"]) == (0, 2, 1)
    assert result["boxes"]["slices_here"] > 0
    assert result["labels"]["adenocarcinoma"] == 1  # two reconstructions of one moment
