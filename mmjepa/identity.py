"""Who is who: the crosswalk from source patients to the cohort's subjects, and salted hashes in place of identifiers.

The crosswalk and its salt stay with their owner, outside the cohort: whoever holds both can undo the hashes.
"""

import csv
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmjepa.refusal import Refusal

COLUMNS = ("patient_id", "subject_id", "date_shift_days")
MAX_SHIFT_DAYS = 365_000  # a thousand years; far beyond it dates cannot be written
_SHORTEST_SALT = 8
_SUBJECTS = 2**53 - 1  # what every reader of a table holds exactly, floats included


@dataclass(frozen=True)
class Crosswalk:
    """Source patient ids to subject ids and date shifts, and the salt of every hash.

    paired: True when the subject ids are the ones of the records; False when they come from the salted hash of the patient.
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
        """No crosswalk: subjects are hashes of the patients (``numbered``) and cannot be paired with records."""
        return cls(_valid_salt(salt, "the salt"), paired=False)

    def numbered(self, patient_ids: Iterable[str]) -> "Crosswalk":
        """Without a crosswalk: each patient gets a subject id (1 to 2**53 - 1) and a date shift; else itself.

        Both come from the salted hash of the patient alone, so that they stay whoever else comes or goes. The shift is 1 to 10
        years back: no true date enters the cohort. Raises Refusal SUBJECT_ID_TWICE.
        """
        if self.paired:
            return self
        hashes = {patient: _hash(self.salt, f"patient:{patient}") for patient in set(patient_ids)}
        check_subjects(each[:16] for each in hashes.values())
        subjects = {patient: (_subject_of(each[:16]), -365 - int(each, 16) % 3286) for patient, each in hashes.items()}
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


def check_subjects(hashes: Iterable[str]) -> None:
    """Refuse (SUBJECT_ID_TWICE) when two patients, each known by the first 16 hex digits of its hash, get one subject id."""
    hashes = set(hashes)
    if len({_subject_of(each) for each in hashes}) < len(hashes):
        raise Refusal("SUBJECT_ID_TWICE", "two patients get the same subject id", "Use another salt")


def read_salt(path: Path | str) -> str:
    """The salt in a text file, without the blanks around it. Raises Refusal SALT_MISSING, SALT_INVALID."""
    try:
        _check_file(Path(path))
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


def _subject_of(hashed: str) -> int:
    return 1 + int(hashed, 16) % _SUBJECTS


def _check_file(path: Path) -> None:
    """Raise OSError for what is no file: to read a pipe would wait for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a file")


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
    try:
        inside = file.resolve().is_relative_to(Path(cohort).resolve())
    except (OSError, RuntimeError):  # links in a circle
        raise Refusal("SALT_INVALID", f"{file} leads nowhere") from None
    if inside:
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


def read_rows(path: Path, columns: tuple[str, ...], prefix: str, name: str = "") -> list[tuple[int, dict[str, str]]]:
    """The rows of a small csv as (row number from 1, stripped values). name: for people, where the path is not what they typed.

    Raises Refusal ``prefix``_MISSING, _COLUMNS, _VALUE.
    """
    name = name or str(path)
    try:
        _check_file(path)
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            names = [column.strip() for column in reader.fieldnames or ()]
            absent = [column for column in columns if column not in names]
            if absent:
                raise Refusal(
                    f"{prefix}_COLUMNS", f"{name} has no column {', '.join(absent)}", f"It needs {', '.join(columns)}"
                )
            reader.fieldnames = names
            return [
                (n, {column: (values[column] or "").strip() for column in columns})
                for n, values in enumerate(reader, start=1)
            ]
    except FileNotFoundError:
        raise Refusal(f"{prefix}_MISSING", f"{name} does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error):
        raise Refusal(f"{prefix}_VALUE", f"{name} cannot be read as UTF-8 csv") from None
