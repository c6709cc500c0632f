"""Labels of encounters: readmission for mental illness, its escalation, the chapters of the next encounter.

Only ICD-10 is read: an encounter coded in ICD-9 says nothing about F-codes, so what hangs on it is unknown (NaN, None), not
negative. What lies behind the end of the follow-up is unknown too.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjepa.ehr.encounters import Encounter, EncounterForm
from mmjepa.ehr.stays import DAY_US, NEVER
from mmjepa.ehr.store import EventStore

WINDOW_US = 30 * DAY_US
# Ordinal severity where ICD-10-CM spells one: mild, moderate, severe, severe with psychotic symptoms.
_MOOD = {f"{kind}.{digit}": digit + 1 for kind in ("F32", "F33") for digit in range(4)}
_BIPOLAR = {"F31.11": 1, "F31.12": 2, "F31.13": 3, "F31.2": 4, "F31.31": 1, "F31.32": 2, "F31.4": 3, "F31.5": 4}
_MANIC = {"F30.11": 1, "F30.12": 2, "F30.13": 3, "F30.2": 4, "F31.61": 1, "F31.62": 2, "F31.63": 3, "F31.64": 4}
SEVERITY = _MOOD | _BIPOLAR | _MANIC
_REMISSION = re.compile(r"F30\.[34]|F31\.7|F32\.[45]|F33\.4")
_UNSPECIFIED = re.compile(r"F\d\d(\.\d0|\.\d*9|\.A)?")
DRUG_CLASSES: Mapping[str, tuple[str, ...]] = {
    "ssri": ("citalopram", "escitalopram", "fluoxetine", "fluvoxamine", "paroxetine", "sertraline"),
    "snri": ("desvenlafaxine", "duloxetine", "levomilnacipran", "venlafaxine"),
    "tricyclic": ("amitriptyline", "clomipramine", "desipramine", "doxepin", "imipramine", "nortriptyline"),
    "maoi": ("isocarboxazid", "phenelzine", "tranylcypromine"),
    "antidepressant": ("bupropion", "mirtazapine", "nefazodone", "trazodone", "vilazodone", "vortioxetine"),
    "typical": ("chlorpromazine", "fluphenazine", "haloperidol", "loxapine", "perphenazine", "thiothixene"),
    "atypical": (
        "aripiprazole",
        "brexpiprazole",
        "cariprazine",
        "clozapine",
        "lurasidone",
        "olanzapine",
        "paliperidone",
        "quetiapine",
        "risperidone",
        "ziprasidone",
    ),
    "stabiliser": ("carbamazepine", "divalproex", "lamotrigine", "lithium", "oxcarbazepine", "valproate", "valproic"),
    "benzodiazepine": (
        "alprazolam",
        "chlordiazepoxide",
        "clonazepam",
        "diazepam",
        "lorazepam",
        "oxazepam",
        "temazepam",
    ),
    "anxiolytic": ("buspirone", "hydroxyzine"),
    "stimulant": ("amphetamine", "atomoxetine", "dextroamphetamine", "lisdexamfetamine", "methylphenidate"),
}


@dataclass(frozen=True)
class EncounterLabels:
    """Of each encounter. label_30d, escalation: float64 [n], NaN where unknown. criteria: what fired. next_icd_blocks:
    chapters (first letters of ICD-10) of the next hospital stay, None where unknown."""

    label_30d: np.ndarray
    escalation: np.ndarray
    criteria: list[set[str]]
    next_icd_blocks: list[tuple[str, ...] | None]

    def at(self, context: int) -> dict[str, Any]:
        """The labels of a prediction after encounter ``context`` - 1, made from the sample whose context ends there.

        readmission_30d: an admission within 30 days of that discharge. label_30d: the published one, within 30 days of the
        discharge of the target, two steps ahead. escalation: at the target.
        """
        return {
            "readmission_30d": self.label_30d[context - 1],
            "label_30d": self.label_30d[context],
            "escalation": self.escalation[context],
            "next_icd_blocks": self.next_icd_blocks[context - 1],
        }


def encounter_labels(
    form: EncounterForm, store: EventStore, subject_id: int, followed_until_us: int | None = None
) -> EncounterLabels:
    """Labels of the encounters ``form.of(store, subject_id)``, which see all later stays, those that ended in death too.

    followed_until_us: end of the follow-up, for instance of the data collection; None takes the subject's last row. Who
    died needs no more of it.
    """
    row = store.row(subject_id)
    times = np.asarray(store.times_us[slice(*store.offsets[row : row + 2])])
    until = int(times.max(initial=0)) if followed_until_us is None else followed_until_us
    stays, kept = form.admissions(store, subject_id), form.of(store, subject_id)
    if store.match([form.config.death])[store.codes[slice(*store.offsets[row : row + 2])]].any():
        until = NEVER
    following = [stays[stays.index(visit) + 1 :] for visit in kept]
    criteria = escalations(kept)
    coded = np.cumsum([visit.icd9 for visit in kept]) == 0
    fired = np.array([float(bool(each)) for each in criteria])
    return EncounterLabels(
        np.array([_readmitted(visit, later, until) for visit, later in zip(kept, following, strict=True)]),
        np.where(coded, fired, np.nan),
        criteria,
        [_blocks(later[0]) if later else None for later in following],
    )


def escalations(encounters: list[Encounter]) -> list[set[str]]:
    """Which signs of escalation each encounter shows against all before it; the first shows none."""
    worst: dict[str, int] = {}
    seen: set[str] = set()
    classes: set[str] = set()
    found: list[set[str]] = []
    for visit in encounters:
        mental = [code for code in visit.full if code.startswith("F")] if visit.icd10 else []
        taken = {
            name for name, drugs in DRUG_CLASSES.items() for drug in visit.drugs if {*drugs} & {*_WORD.findall(drug)}
        }
        signs = {sign for code in mental if (sign := _sign(code, worst, seen))}
        if taken - classes:
            signs.add("new_drug_class" if classes else "first_drug")
        found.append(signs if found else set())
        classes |= taken
        seen.update(mental)
        for code in mental:
            worst[code[:3]] = max(worst.get(code[:3], 0), SEVERITY.get(code, 0))
    return found


_WORD = re.compile(r"[a-z]+")


def _sign(code: str, worst: Mapping[str, int], seen: set[str]) -> str | None:
    """What an F-code adds to those before."""
    kind = code[:3]
    if kind not in worst:
        return "f32_to_f33" if kind == "F33" and "F32" in worst else "new_subcategory"
    if code in seen or _REMISSION.match(code):
        return None
    if code in SEVERITY:
        return "severity" if SEVERITY[code] > worst[kind] else None
    return None if _UNSPECIFIED.fullmatch(code) else "new_specifier"


def _readmitted(visit: Encounter, later: list[Encounter], until_us: int) -> float:
    """1 if a stay with an F-code starts within 30 days of the discharge, NaN where that cannot be known."""
    within = [other for other in later if visit.discharge_us < other.admit_us <= visit.discharge_us + WINDOW_US]
    if any(other.icd10 and any(code.startswith("F") for code in other.full) for other in within):
        return 1.0
    unread = any(_unread(other) for other in within)
    return float("nan") if unread or until_us < visit.discharge_us + WINDOW_US else 0.0


def _blocks(visit: Encounter) -> tuple[str, ...] | None:
    return None if _unread(visit) else tuple(sorted({code[0] for code in visit.full if re.match(r"[A-Z]\d", code)}))


def _unread(visit: Encounter) -> bool:
    """Whether the ICD-10 codes of a stay cannot be known: it lasts, or is coded in ICD-9."""
    return visit.discharge_us == NEVER or visit.icd9
