"""The crosswalk: who is who, and what never leaves it."""

import hashlib
import os

import pytest

from mmjepa.identity import Crosswalk, read_salt, salt_at
from mmjepa.refusal import Refusal

SALT = "a salt for tests"
HEADER = "patient_id,subject_id,date_shift_days\n"


def read(tmp_path, text):
    (tmp_path / "salt.txt").write_text(SALT + "\n")
    (tmp_path / "crosswalk.csv").write_text(text, encoding="utf-8")
    return Crosswalk.read(tmp_path / "crosswalk.csv", tmp_path / "salt.txt")


def test_a_crosswalk_gives_subject_shift_and_hash(tmp_path):
    crosswalk = read(tmp_path, "\ufeff" + HEADER + "NA,3,-40\n 007 ,12,5\n")
    assert crosswalk.paired
    assert (crosswalk.subject_id("NA"), crosswalk.date_shift_days("NA")) == (3, -40)
    assert crosswalk.subject_id("007 ") == 12
    assert crosswalk.subject_id("7") is None
    assert crosswalk.image_id("1.2.3") == hashlib.sha256(f"{SALT}1.2.3".encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("patient_id,subject_id\nSECRET,1\n", "CROSSWALK_COLUMNS"),
        (HEADER + "SECRET,1,0\nSECRET,2,0\n", "CROSSWALK_DUPLICATE"),
        (HEADER + "SECRET,one,0\n", "CROSSWALK_VALUE"),
        (HEADER + "SECRET,1\n", "CROSSWALK_VALUE"),
        (HEADER + ",1,0\n", "CROSSWALK_VALUE"),
        (HEADER + "SECRET,1,9999999\n", "CROSSWALK_VALUE"),
        (HEADER + "SECRET,99999999999999999999,0\n", "CROSSWALK_VALUE"),
        (HEADER + "SECRET,1,0\nOTHER,1,5\n", "CROSSWALK_VALUE"),
    ],
)
def test_a_bad_crosswalk_is_refused_without_naming_anyone(tmp_path, text, code):
    with pytest.raises(Refusal) as caught:
        read(tmp_path, text)
    assert caught.value.code == code
    assert "SECRET" not in str(caught.value)


def test_missing_files_and_short_salts_are_refused(tmp_path):
    (tmp_path / "short").write_text("abc")
    with pytest.raises(Refusal, match="SALT_INVALID"):
        read_salt(tmp_path / "short")
    with pytest.raises(Refusal, match="SALT_MISSING"):
        read_salt(tmp_path / "none")
    with pytest.raises(Refusal, match="CROSSWALK_MISSING"):
        Crosswalk.read(tmp_path / "none", tmp_path / "none")


def test_without_a_crosswalk_a_subject_and_its_shift_depend_on_patient_and_salt_alone():
    one = Crosswalk.none(SALT).numbered(["A", "B", "C"])
    two = Crosswalk.none(SALT).numbered(["C", "D", "A", "A"])
    other = Crosswalk.none(SALT + "2").numbered(["A"])
    assert not one.paired
    assert [one.subject_id(n) for n in "AC"] == [two.subject_id(n) for n in "AC"]
    assert [one.date_shift_days(n) for n in "AC"] == [two.date_shift_days(n) for n in "AC"]
    assert len({one.subject_id(n) for n in "ABC"} | {other.subject_id("A")}) == 4
    assert all(0 < (one.subject_id(n) or 0) < 2**53 for n in "ABC")
    assert all(-4015 < one.date_shift_days(n) <= -365 for n in "ABC")
    assert one.subject_id("D") is None


def test_two_patients_of_one_subject_id_are_refused(monkeypatch):
    monkeypatch.setattr("mmjepa.identity._SUBJECTS", 2)
    with pytest.raises(Refusal, match="SUBJECT_ID_TWICE"):
        Crosswalk.none(SALT).numbered(["A", "B", "C"])


def test_a_pipe_in_place_of_a_salt_or_crosswalk_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "salt.txt").write_text(SALT)
    with pytest.raises(Refusal, match="SALT_INVALID"):
        read_salt(tmp_path / "pipe")
    with pytest.raises(Refusal, match="CROSSWALK_VALUE"):
        Crosswalk.read(tmp_path / "pipe", tmp_path / "salt.txt")


def test_a_fresh_salt_is_kept_private_reused_and_never_inside_the_cohort(tmp_path):
    salt = salt_at(tmp_path / "identity/salt.txt", cohort=tmp_path / "cohort")
    assert len(salt) == 64
    assert (tmp_path / "identity/salt.txt").stat().st_mode & 0o077 == 0
    assert salt_at(tmp_path / "identity/salt.txt", cohort=tmp_path / "cohort") == salt
    with pytest.raises(Refusal, match="IDENTITY_IN_COHORT"):
        salt_at(tmp_path / "cohort/../cohort/identity/salt.txt", cohort=tmp_path / "cohort")


def test_neither_salt_nor_patients_show_when_a_crosswalk_is_printed(tmp_path):
    shown = repr(read(tmp_path, HEADER + "SECRET,1,0\n"))
    assert SALT not in shown
    assert "SECRET" not in shown
