"""Does a MEDS root look like MIMIC-IV made by MIMIC-IV-MEDS? Exit code 1 where it does not.

python datasets/mimic_iv/check.py MEDS_ROOT
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import meds_check
from meds_check import Family

#: Shares measured on the open demo, widened; patterns cover versions 0.0 (the demo in MEDS) and 0.2.
FAMILIES = (
    Family("births", "^MEDS_BIRTH$", (0, 0)),
    Family("sex", "^GENDER//", (0, 0)),
    Family("hospital admissions", "^HOSPITAL_ADMISSION//", (0, 0)),
    Family("hospital discharges", "^HOSPITAL_DISCHARGE//", (0, 0)),
    Family("ICU admissions", "^ICU_ADMISSION//", (0, 0)),
    Family("ICU discharges", "^ICU_DISCHARGE//", (0, 0)),
    Family("diagnoses", "^DIAGNOSIS//ICD//", (0, 0)),
    Family("medications", "^MEDICATION//", (0, 0)),
    Family("procedures", "^PROCEDURE//", (0, 0)),
    Family("laboratory with a unit", "^LAB//(RESULT//)?5\\d{4}//.*[^K]$", (0.85, 1)),
    Family("chart with a unit", "^LAB//2\\d{5}//.*[^K]$", (0.95, 1)),
    Family("chart without a unit", "^LAB//2\\d{5}//UNK$", (0.05, 0.6)),
    Family("specimens", "^LAB//SPECIMEN_COLLECTED//", (0, 0), required=False),
    Family("creatinine, mg/dL", "^LAB//(RESULT//)?50912//mg/dL$", (0.9, 1), (0.1, 15)),
    Family("sodium, mEq/L", "^LAB//(RESULT//)?50983//mEq/L$", (0.9, 1), (100, 180)),
    Family("heart rate, /min", "^LAB//220045//", (0.95, 1), (20, 250)),
    Family("infusion rates", "^INFUSION_START//", (0.3, 0.8)),
    Family("infusion amounts", "^INFUSION_END//", (0.9, 1)),
    Family("fluid output", "^SUBJECT_FLUID_OUTPUT//", (0.9, 1)),
    Family("weights", "^SUBJECT_WEIGHT_AT_INFUSION", (0.9, 1), (20, 300)),
)


def check(root: Path | str) -> dict:
    """What ``meds_check.check`` finds of the families of MIMIC-IV."""
    return meds_check.check(root, FAMILIES)


if __name__ == "__main__":
    sys.exit(meds_check.run(check, __doc__))
