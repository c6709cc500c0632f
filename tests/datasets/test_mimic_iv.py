"""The check of MIMIC-IV in MEDS notices an emptied or slipped column, and passes on the real demo."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

CHECK = Path(__file__).parents[2] / "datasets" / "mimic_iv" / "check.py"
#: code, rows, number (None = none); both layouts of laboratory codes
ROWS = [
    ("MEDS_BIRTH", 4, None), ("GENDER//F", 4, None), ("HOSPITAL_ADMISSION//EW EMER.//UNK", 5, None),
    ("HOSPITAL_DISCHARGE//HOME", 5, None), ("ICU_ADMISSION//MICU", 3, None), ("ICU_DISCHARGE//MICU", 3, None),
    ("DIAGNOSIS//ICD//10//I10", 20, None), ("MEDICATION//START//Aspirin", 9, None), ("PROCEDURE//START//225792", 4, None),
    ("LAB//RESULT//50912//mg/dL", 30, 1.1), ("LAB//50983//mEq/L", 30, 140.0), ("LAB//SPECIMEN_COLLECTED//50912//STAT", 30, None),
    ("LAB//220045//bpm", 40, 90.0), ("LAB//223900//UNK", 40, None), ("LAB//223901//UNK", 10, 5.0),
    ("INFUSION_START//221906", 6, 0.1), ("INFUSION_START//225158", 6, None), ("INFUSION_END//225158", 12, 500.0),
    ("SUBJECT_FLUID_OUTPUT//226559//mL", 9, 80.0), ("SUBJECT_WEIGHT_AT_INFUSION//KG", 9, 70.0), ("BMI (kg/m2)", 2, None),
]  # fmt: skip


def write(folder, rows=ROWS):
    frame = pd.DataFrame(
        [(code, number) for code, n, number in rows for _ in range(n)], columns=["code", "numeric_value"]
    )
    frame = frame.astype({"numeric_value": "float32"}).assign(subject_id=1, time=pd.Timestamp("2150-01-01"))
    for part in ("data/train", "metadata"):
        (folder / part).mkdir(parents=True)
    frame.to_parquet(folder / "data" / "train" / "0.parquet", index=False)
    frame[["code"]].drop_duplicates().to_parquet(folder / "metadata" / "codes.parquet", index=False)
    return folder


@pytest.fixture
def check(monkeypatch, capfd):
    def run(root):
        monkeypatch.setattr(sys, "argv", [str(CHECK), str(root), "--json"])
        monkeypatch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        result = json.loads(capfd.readouterr().out)
        wrong = [name for name, one in result.get("families", {}).items() if not one["ok"]]
        return ended.value.code, result, wrong

    return run


def test_a_root_like_mimic_iv_passes_with_its_rows_and_shares(tmp_path, check):
    code, result, wrong = check(write(tmp_path / "root"))
    assert (code, result["ok"], wrong, result["rows_of_no_family"]) == (0, True, [], 2)
    assert result["families"]["chart without a unit"] == {
        "ok": True,
        "rows": 50,
        "numbers": 0.2,
        "expected": [0.05, 0.6],
    }
    assert result["families"]["creatinine, mg/dL"]["in_range"] == 1.0


def without(prefix):
    return [row for row in ROWS if not row[0].startswith(prefix)]


def valued(number, prefix=""):
    return [(code, n, number if code.startswith(prefix) and old is not None else old) for code, n, old in ROWS]


@pytest.mark.parametrize(
    ("rows", "some"),
    [
        (valued(None), {"laboratory with a unit", "infusion amounts", "weights"}),
        (valued(12345.0, "LAB//RESULT//50912"), {"creatinine, mg/dL"}),
        (without("DIAGNOSIS"), {"diagnoses"}),
        (
            [(code.replace("LAB//2", "CHART//2"), n, old) for code, n, old in ROWS],
            {"heart rate, /min", "chart with a unit"},
        ),
        (
            [(code, n, 1.0 if old is None else old) for code, n, old in ROWS],
            {"sex", "specimens", "chart without a unit"},
        ),
    ],
)
def test_an_emptied_or_slipped_column_is_noticed(tmp_path, check, rows, some):
    code, result, wrong = check(write(tmp_path / "root", rows))
    assert (code, result["ok"]) == (1, False)
    assert some <= set(wrong)


def test_what_is_not_a_meds_root_is_refused(tmp_path, check):
    assert check(tmp_path)[1]["refused"]["code"] == "MEDS_MISSING"
    root = write(tmp_path / "root")
    file = root / "data" / "train" / "0.parquet"
    pd.read_parquet(file).drop(columns="numeric_value").to_parquet(file)
    assert check(root)[:2] == (2, check(root)[1])
    assert check(root)[1]["refused"]["code"] == "MEDS_UNREADABLE"


@pytest.mark.real_data
def test_the_real_demo_passes_and_fails_once_its_numbers_are_gone(data_folder, tmp_path, check):
    root = data_folder / "mimic_iv_demo_meds"
    if not root.is_dir():
        pytest.skip("mimic_iv_demo_meds is absent")
    code, result, wrong = check(root)
    assert (code, wrong) == (0, [])
    assert (result["families"]["diagnoses"]["rows"], result["families"]["heart rate, /min"]["rows"]) == (4506, 13_913)
    shutil.copytree(root / "metadata", tmp_path / "metadata")
    for path in sorted((root / "data").rglob("*.parquet"))[:1]:
        (tmp_path / "data").mkdir()
        pd.read_parquet(path).assign(numeric_value=np.float32("nan")).to_parquet(tmp_path / "data" / path.name)
    assert check(tmp_path)[0] == 1
