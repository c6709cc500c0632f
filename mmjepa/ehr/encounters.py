"""Encounters: a hospital stay as a set of codes and drugs with a day (the stop-gradient system, tannerorourke/chronos-lens).

A diagnosis is stamped at the discharge, so an encounter is known only when it has ended and its discharge is on record.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mmjepa.config import build, to_plain
from mmjepa.ehr.choices import check_choices
from mmjepa.ehr.daily import DIED
from mmjepa.ehr.saved import Form, load_form
from mmjepa.ehr.stays import DAY_US, NEVER, pair_intervals
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.text import match_intervals
from mmjepa.refusal import Refusal

KIND, VERSION = "encounters", 1
PAD, UNKNOWN, EMPTY, FIRST = 0, 1, 2, 3
_ICD = re.compile(r"ICD(?://|[-_])?(9|10)(?:CM)?//?([A-Z0-9.]+)", re.IGNORECASE)


@dataclass(frozen=True)
class EncountersConfig:
    """Code prefixes (of whole ``//`` or ``/`` parts) of the rows that make an encounter.

    drug_start, drug_stop: what stands behind them, up to the next ``//``, is the drug. drug: families whose codes of two
        parts, as ``MEDICATION//heparin``, are a start too; a third part says what happened (``Not Given``) and is not read.
    drugs_when: ``stay`` takes drugs started in the encounter; ``admission``, as published, those running at its admission,
        of which inpatient orders have few: see ``EncounterForm.coverage``. A start without a stop runs for a day.
    max_encounters: the first ones that are kept; nobody is left out for having more.
    """

    admission: str = "HOSPITAL_ADMISSION"
    discharge: str = "HOSPITAL_DISCHARGE"
    death: str = "MEDS_DEATH"
    diagnosis: tuple[str, ...] = ("DIAGNOSIS", "CONDITION", "ICD9CM", "ICD10CM", "SNOMED")
    drug_start: tuple[str, ...] = ("MEDICATION//START", "MEDICATION//STARTED", "RxNorm")
    drug_stop: tuple[str, ...] = ("MEDICATION//STOP", "MEDICATION//STOPPED")
    drug: tuple[str, ...] = ("MEDICATION",)
    drugs_when: Literal["stay", "admission"] = "stay"
    max_encounters: int = 20

    def __post_init__(self) -> None:
        check_choices(self)
        if self.max_encounters < 1:
            raise ValueError("max_encounters must be at least 1")


class Encounter(NamedTuple):
    """One hospital stay; times in us, ``discharge_us`` NEVER while it lasts. day: days since the first admission.

    codes: sorted, as the model sees them (ICD-10 dotted, its F-codes cut to three characters, ICD-9 as it is). full: the
    same uncut, for labels. icd10, icd9: whether any of either. drugs: sorted, lower case. alive: at discharge.
    known_us: when the last of its rows became known; with ``drugs_when="admission"`` their stops may come later.
    """

    admit_us: int
    discharge_us: int
    day: float
    codes: tuple[str, ...]
    full: tuple[str, ...]
    icd10: bool
    icd9: bool
    drugs: tuple[str, ...]
    alive: bool
    known_us: int = NEVER


@dataclass(frozen=True)
class _Codes:
    """What a store's codes are: bool [vocabulary] by kind; code -> (as the model sees it, uncut, ICD version) or drug."""

    kind: dict[str, np.ndarray]
    died: np.ndarray
    diagnoses: dict[int, tuple[str, str, int]]
    drugs: dict[int, str]


@dataclass(frozen=True, eq=False)
class EncounterForm(Form):
    """The fitted form. ``vocabulary[i]`` has token FIRST + i, ascending. coverage: counts of training encounters, of those
    with a diagnosis and of those with a drug."""

    config: EncountersConfig
    vocabulary: tuple[str, ...] = field(repr=False)
    coverage: dict[str, int]
    names: dict[str, str] = field(repr=False)
    fitted_on: str
    _tables: dict[str, _Codes] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        """Number of tokens, PAD, UNKNOWN and EMPTY included."""
        return FIRST + len(self.vocabulary)

    @classmethod
    def fit(
        cls,
        store: EventStore,
        subjects: Iterable[int],
        config: EncountersConfig | None = None,
        names: Mapping[str, tuple[str, str]] | None = None,
    ) -> "EncounterForm":
        """Fit on ``subjects``: pass training subjects only. names: code -> (name, unit), which names drugs.

        Raises Refusal ENCOUNTERS_EMPTY.
        """
        named = {code: name for code, (name, _) in (names or {}).items()}
        form = cls(config or EncountersConfig(), (), {}, named, store.fingerprint)
        found = [
            visit for subject in np.unique(np.fromiter(subjects, np.int64)) for visit in form.of(store, int(subject))
        ]
        if not found:
            raise Refusal(
                "ENCOUNTERS_EMPTY",
                f"no training subject has an ended encounter ({form.config.admission} to {form.config.discharge})",
                "Set admission and discharge to the cohort's codes, or check its splits",
            )
        counts = {
            "encounters": len(found),
            "with_diagnosis": sum(bool(visit.codes) for visit in found),
            "with_drug": sum(bool(visit.drugs) for visit in found),
        }
        vocabulary = sorted({token for visit in found for token in (*visit.codes, *visit.drugs)})
        return cls(form.config, tuple(vocabulary), counts, named, store.fingerprint, form._tables)

    def of(self, store: EventStore, subject_id: int, t_us: int = NEVER) -> list[Encounter]:
        """The first ``max_encounters`` of a subject that ended alive by ``t_us`` (int64 us, included) as known then."""
        ended = min(t_us, NEVER - 1)
        known = [visit for visit in self.admissions(store, subject_id, t_us) if visit.discharge_us <= ended]
        return [visit for visit in known if visit.alive][: self.config.max_encounters]

    def admissions(self, store: EventStore, subject_id: int, t_us: int = NEVER) -> list[Encounter]:
        """All hospital stays as known at ``t_us``: also those that last, or ended in death. For labels."""
        codes = self._codes(store)
        (start,), (stop,) = store.as_of(np.array([subject_id]), np.array([t_us]))
        code, time = np.asarray(store.codes[start:stop]), np.asarray(store.times_us[start:stop])
        hadm = np.asarray(store.hadm_id[start:stop])
        at = {name: np.flatnonzero(table[code]) for name, table in codes.kind.items()}
        stays = pair_intervals(np.sort(time[at["admission"]]), np.sort(time[at["discharge"]]))
        if not stays:
            return []
        visit_of = _Assigned(stays, time[at["admission"]], hadm[at["admission"]])
        sets: list[set[tuple[str, str, int]]] = [set() for _ in stays]
        rows = at["diagnosis"]
        visits = visit_of(time[rows], hadm[rows])
        for row, visit in zip(rows.tolist(), visits.tolist(), strict=True):
            if visit >= 0:
                sets[visit].add(codes.diagnoses[int(code[row])])
        marks = np.append(at["admission"], at["discharge"])
        drug_rows, drug_visits = self._drug_rows(codes, code, time, hadm, at, stays, visit_of)
        drugs: list[set[str]] = [set() for _ in stays]
        for row, visit in zip(drug_rows.tolist(), drug_visits.tolist(), strict=True):
            if visit >= 0 and (drug := codes.drugs.get(int(code[row]))):
                drugs[visit].add(drug)
        of_visit = np.concatenate([visits, visit_of(time[marks], np.full(len(marks), -1)), drug_visits])
        available = np.asarray(store.available_us[start:stop])[np.concatenate([rows, marks, drug_rows])]
        known = np.array([admit for admit, _ in stays])
        np.maximum.at(known, of_visit[of_visit >= 0], available[of_visit >= 0])
        deaths = [*time[at["death"]].tolist(), *time[codes.died[code]].tolist()]
        ends = min(deaths, default=NEVER)
        return [
            Encounter(
                admit,
                discharge,
                (admit - stays[0][0]) / DAY_US,
                tuple(sorted({short for short, _, _ in found})),
                tuple(sorted({full for _, full, _ in found})),
                any(version == 10 for *_, version in found),
                any(version == 9 for *_, version in found),
                tuple(sorted(taken)),
                discharge < NEVER and ends > discharge,
                known_us,
            )
            for (admit, discharge), found, taken, known_us in zip(stays, sets, drugs, known.tolist(), strict=True)
        ]

    def encode(self, encounter: Encounter) -> np.ndarray:
        """int64 [T], ascending: the encounter's tokens; an empty one is EMPTY, a token of its own."""
        places = self._places
        found = {places.get(token, UNKNOWN) for token in (*encounter.codes, *encounter.drugs)}
        return np.array(sorted(found) or [EMPTY], np.int64)

    @classmethod
    def load(cls, path: Path | str, *, expected: str | None = None) -> "EncounterForm":
        """Read the JSON. Raises the refusals of ``saved.load_form``."""
        content = load_form(path, KIND, VERSION, expected)
        config = build(EncountersConfig, content["config"])
        return cls(config, tuple(content["vocabulary"]), content["coverage"], content["names"], content["fitted_on"])

    def _content(self) -> dict[str, Any]:
        known = {"kind": KIND, "version": VERSION, "fitted_on": self.fitted_on, "config": to_plain(self.config)}
        return known | {"vocabulary": list(self.vocabulary), "coverage": self.coverage, "names": self.names}

    @cached_property
    def _places(self) -> dict[str, int]:
        return {token: FIRST + i for i, token in enumerate(self.vocabulary)}

    def _drug_rows(
        self,
        codes: _Codes,
        code: np.ndarray,
        time: np.ndarray,
        hadm: np.ndarray,
        at: Mapping[str, np.ndarray],
        stays: list[tuple[int, int]],
        visit_of: "_Assigned",
    ) -> tuple[np.ndarray, np.ndarray]:
        """The starts of drugs, and the stay of each, -1 for none."""
        if self.config.drugs_when == "stay":
            rows = at["drug_start"]
            return rows, visit_of(time[rows], hadm[rows])
        both = np.sort(np.append(at["drug_start"], at["drug_stop"]))
        named = [codes.drugs.get(one, "") for one in code[both].tolist()]
        item, ends = np.unique(named, return_inverse=True)[1], np.isin(both, at["drug_stop"])
        starts, stops, closer = match_intervals(item, time[both], ends, NEVER // 4)
        rows = both[starts]
        stops = np.where(closer < 0, time[rows] + DAY_US, stops)
        admits = np.array([admit for admit, _ in stays])
        visits = np.searchsorted(admits, time[rows])
        running = visits < len(stays)
        return rows, np.where(running & (admits[np.minimum(visits, len(stays) - 1)] <= stops), visits, -1)

    def _codes(self, store: EventStore) -> _Codes:
        """What the store's codes are; made once a store."""
        if store.fingerprint not in self._tables:
            config = self.config
            prefixes = {"admission": (config.admission,), "discharge": (config.discharge,), "death": (config.death,)}
            prefixes |= {"diagnosis": config.diagnosis, "drug_start": config.drug_start, "drug_stop": config.drug_stop}
            rests = {kind: [_rest(code, names) for code in store.vocabulary] for kind, names in prefixes.items()}
            bare = [_rest(code, config.drug if code.count("//") == 1 else ()) for code in store.vocabulary]
            rests["drug_start"] = [a if a is not None else b for a, b in zip(rests["drug_start"], bare, strict=True)]
            kind = {name: np.array([rest is not None for rest in each], bool) for name, each in rests.items()}
            died = np.array([bool(DIED.search(code.replace("_", " "))) for code in store.vocabulary], bool)
            diagnoses = {int(i): read_code(store.vocabulary[i]) for i in np.flatnonzero(kind["diagnosis"])}
            drugs = {}
            for i in np.flatnonzero(kind["drug_start"] | kind["drug_stop"]).tolist():
                code = store.vocabulary[i]
                rest = rests["drug_start"][i] or rests["drug_stop"][i] or ""
                name = self.names.get(code) or store.descriptions.get(code) or rest.split("//")[0]
                drugs[i] = "" if name == "UNK" else " ".join(name.lower().split())
            self._tables[store.fingerprint] = _Codes(kind, died & kind["discharge"], diagnoses, drugs)
        return self._tables[store.fingerprint]


class _Assigned:
    """Finds the stay of a row: by the admission's number where both have one, else by time (the earlier of two that touch)."""

    def __init__(self, stays: list[tuple[int, int]], admitted_us: np.ndarray, hadm: np.ndarray) -> None:
        self._admits, self._ends = (np.array(column) for column in zip(*stays, strict=True))
        numbered = hadm >= 0
        order = np.argsort(hadm[numbered], kind="stable")
        self._hadm = hadm[numbered][order]
        self._visit = np.searchsorted(self._admits, admitted_us[numbered][order])

    def __call__(self, time_us: np.ndarray, hadm: np.ndarray) -> np.ndarray:
        """int64 [rows]: the stay of each row, -1 for none."""
        visit = np.searchsorted(self._admits, time_us, side="right") - 1
        earlier = np.maximum(visit - 1, 0)
        visit = np.where((visit > 0) & (self._ends[earlier] == time_us), earlier, visit)
        visit = np.where(time_us <= self._ends[np.maximum(visit, 0)], visit, -1)
        if len(self._hadm):
            place = np.minimum(np.searchsorted(self._hadm, hadm), len(self._hadm) - 1)
            elsewhere = np.where(hadm < 0, visit, -1)  # a number of no known admission: its own may come later
            visit = np.where(self._hadm[place] == hadm, self._visit[place], elsewhere)
        return visit


def read_code(code: str) -> tuple[str, str, int]:
    """A diagnosis as the model sees it, uncut, and its ICD version (0: another system, left as it is).

    ``DIAGNOSIS//ICD//10//F3210`` gives (``F32``, ``F32.10``, 10), ``DIAGNOSIS//ICD//9//4019`` (``4019``, ``4019``, 9).
    """
    found = _ICD.search(code)
    if found is None or found.end() < len(code):
        return code, code, 0
    version, bare = int(found[1]), found[2]
    if version == 9:
        return bare, bare, 9
    bare = bare.replace(".", "").upper()
    full = bare[:3] + (f".{bare[3:]}" if len(bare) > 3 else "")
    return (bare[:3] if bare.startswith("F") else full), full, 10


def _rest(code: str, prefixes: Iterable[str]) -> str | None:
    """What stands behind the longest of the prefixes that a code has, None if it has none."""
    for prefix in sorted(prefixes, key=len, reverse=True):
        if code == prefix:
            return ""
        if code.startswith(f"{prefix}/"):
            return code.removeprefix(prefix).lstrip("/")
    return None
