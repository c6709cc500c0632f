"""Who is who: the crosswalk from source patients to the cohort's subjects, and salted hashes in place of identifiers.

The crosswalk and its salt stay with their owner, outside the cohort: whoever holds both can undo the hashes.
"""

import csv
import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmjepa.refusal import Refusal

COLUMNS = ("patient_id", "subject_id", "date_shift_days")
MAX_SHIFT_DAYS = 365_000  # a thousand years; far beyond it dates cannot be written
_SHORTEST_SALT = 8


@dataclass(frozen=True)
class Crosswalk:
    """Source patient ids to subject ids and date shifts, and the salt of every hash.

    paired: True when the subject ids are the ones of the records; False when subjects are merely numbered.
    """

    salt: str = field(repr=False)
    paired: bool = True
    files: tuple[Path, ...] = ()
    _subjects: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, csv_file: Path | str, salt_file: Path | str) -> "Crosswalk":
        """Read ``crosswalk.csv`` (columns patient_id, subject_id, date_shift_days) and its salt.

        Raises Refusal CROSSWALK_MISSING, CROSSWALK_COLUMNS, CROSSWALK_VALUE, CROSSWALK_DUPLICATE, SALT_MISSING, SALT_INVALID.
        """
        subjects = _read_subjects(Path(csv_file))
        return cls(read_salt(salt_file), True, (Path(csv_file), Path(salt_file)), subjects)

    @classmethod
    def none(cls, salt: str) -> "Crosswalk":
        """No crosswalk: subjects are numbered once the patients are known (``numbered``) and cannot be paired with records."""
        return cls(_valid_salt(salt, "the salt"), paired=False)

    def numbered(self, patient_ids: Iterable[str]) -> "Crosswalk":
        """Without a crosswalk: the patients as subjects 1, 2, ... in the order of their salted hash; else itself.

        Each gets a date shift of 1 to 10 years back, drawn from the hash, so that no true date enters the cohort.
        """
        if self.paired:
            return self
        hashes = {patient: _hash(self.salt, f"patient:{patient}") for patient in set(patient_ids)}
        order = sorted(hashes, key=hashes.__getitem__)
        subjects = {patient: (n, -365 - int(hashes[patient], 16) % 3286) for n, patient in enumerate(order, start=1)}
        return Crosswalk(self.salt, False, self.files, subjects)

    def subject_id(self, patient_id: str) -> int | None:
        """The cohort's subject of a source patient, None when the crosswalk does not hold the patient."""
        entry = self._subjects.get(patient_id.strip())
        return entry[0] if entry else None

    def date_shift_days(self, patient_id: str) -> int:
        """Days to add to the patient's source dates. Raises KeyError (without the id) for an unknown patient."""
        entry = self._subjects.get(patient_id.strip())
        if entry is None:
            raise KeyError("patient not in the crosswalk")
        return entry[1]

    def image_id(self, uid: str) -> str:
        """The first 16 hex digits of sha256(salt + uid)."""
        return _hash(self.salt, uid)[:16]

    def refuse_inside(self, cohort: Path | str) -> None:
        """Refuse (IDENTITY_IN_COHORT) when the crosswalk or the salt lies inside the cohort."""
        for file in self.files:
            _refuse_inside(file, cohort)


def read_salt(path: Path | str) -> str:
    """The salt in a text file, without the blanks around it. Raises Refusal SALT_MISSING, SALT_INVALID."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Refusal("SALT_MISSING", f"{path} does not exist", "Name the file that holds the salt") from None
    except (OSError, UnicodeDecodeError):
        raise Refusal("SALT_INVALID", f"{path} cannot be read as text") from None
    return _valid_salt(text, str(path))


def salt_at(path: Path | str, *, cohort: Path | str) -> str:
    """The salt at ``path``, made there (readable by its owner alone) when the file does not exist.

    Raises Refusal IDENTITY_IN_COHORT, SALT_INVALID.
    """
    path = Path(path)
    _refuse_inside(path, cohort)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_salt(path)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    return read_salt(path)


def _hash(salt: str, text: str) -> str:
    return hashlib.sha256((salt + text).encode()).hexdigest()


def _valid_salt(text: str, name: str) -> str:
    salt = text.strip()
    if len(salt) < _SHORTEST_SALT:
        raise Refusal(
            "SALT_INVALID",
            f"{name} holds {len(salt)} characters, want >= {_SHORTEST_SALT}",
            "A short salt hides nothing",
        )
    return salt


def _refuse_inside(file: Path, cohort: Path | str) -> None:
    if file.resolve().is_relative_to(Path(cohort).resolve()):
        raise Refusal(
            "IDENTITY_IN_COHORT",
            f"{file} lies inside the cohort {cohort}",
            "Keep the crosswalk and the salt outside the cohort",
        )


def _read_subjects(path: Path) -> dict[str, tuple[int, int]]:
    subjects: dict[str, tuple[int, int]] = {}
    shifts: dict[int, int] = {}
    for row, values in read_rows(path, COLUMNS, "CROSSWALK"):
        patient = values["patient_id"]
        try:
            subject, shift = int(values["subject_id"]), int(values["date_shift_days"])
            if abs(subject) >= 2**63 or abs(shift) > MAX_SHIFT_DAYS:
                raise ValueError
        except ValueError:
            raise Refusal(
                "CROSSWALK_VALUE",
                f"{path} row {row}: subject_id and date_shift_days must be whole numbers of usual size",
            ) from None
        if not patient:
            raise Refusal("CROSSWALK_VALUE", f"{path} row {row}: patient_id is empty")
        if patient in subjects:
            raise Refusal(
                "CROSSWALK_DUPLICATE", f"{path} row {row}: this patient_id was given before", "Keep one row a patient"
            )
        if shifts.setdefault(subject, shift) != shift:
            raise Refusal(
                "CROSSWALK_VALUE", f"{path} row {row}: this subject_id has another date shift in an earlier row"
            )
        subjects[patient] = (subject, shift)
    return subjects


def read_rows(path: Path, columns: tuple[str, ...], prefix: str) -> list[tuple[int, dict[str, str]]]:
    """The rows of a small csv as (row number from 1, stripped values). Raises Refusal ``prefix``_MISSING, _COLUMNS, _VALUE."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            names = [name.strip() for name in reader.fieldnames or ()]
            absent = [name for name in columns if name not in names]
            if absent:
                raise Refusal(
                    f"{prefix}_COLUMNS", f"{path} has no column {', '.join(absent)}", f"It needs {', '.join(columns)}"
                )
            reader.fieldnames = names
            return [
                (n, {name: (values[name] or "").strip() for name in columns})
                for n, values in enumerate(reader, start=1)
            ]
    except FileNotFoundError:
        raise Refusal(f"{prefix}_MISSING", f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error):
        raise Refusal(f"{prefix}_VALUE", f"{path} cannot be read as UTF-8 csv") from None
