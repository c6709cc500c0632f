"""The command line: how verbs end, what stands on which stream."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmjepa import audit as audit_room
from mmjepa import cli, console
from mmjepa.refusal import Refusal

VERBS = ("ingest", "audit", "forms", "pretrain", "embed", "evaluate", "rollout", "plan", "doctor")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def raising(error: BaseException):
    def call(*_: object, **__: object) -> None:
        raise error

    return call


@pytest.fixture
def ends_with(monkeypatch):
    """Make the audit end as told."""

    def end(error: BaseException | None = None, verdict: str = "pass") -> None:
        found = {"verdict": verdict, "findings": [], "path": Path("a"), "nan": float("nan"), "n": np.int64(3)}
        monkeypatch.setattr(audit_room, "audit", raising(error) if error else lambda *_, **__: found)

    return end


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example_and_what_comes_out(capsys, verb):
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"mmjepa {verb}" in text.split("example:")[1]
    assert "comes out:" in text
    assert "--json" in text
    assert "130 interrupted" in text


def test_an_audit_is_given_the_run_and_the_tables_that_were_named(capsys, monkeypatch):
    asked = {}
    monkeypatch.setattr(audit_room, "audit", lambda *names, **given: asked.update(given) or {"verdict": "pass"})
    assert run(capsys, "audit", "c", "--run", "r", "--scores", "s", "--oracle", "o", "--json")[0] == 0
    assert asked == {"run": Path("r"), "scores_file": Path("s"), "oracle_file": Path("o")}


@pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("warn", 0), ("fail", 1)])
def test_the_exit_code_of_an_audit_is_its_verdict(capsys, ends_with, verdict, code):
    ends_with(verdict=verdict)
    assert run(capsys, "audit", "c")[0] == code


def test_json_is_the_only_line_on_standard_output_and_is_strict(capfd, monkeypatch):
    def noisy(*_: object, **__: object) -> dict:
        print("python")
        os.write(1, b"c library\n")
        subprocess.run([sys.executable, "-c", "print('child')"], check=True)
        return {"verdict": "pass", "path": Path("a"), "nan": float("nan"), "n": np.int64(3), "list": (np.float32(0.5),)}

    monkeypatch.setattr(audit_room, "audit", noisy)
    assert cli.main(["audit", "c", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"verdict": "pass", "path": "a", "nan": None, "n": 3, "list": [0.5]}
    assert out.count("\n") == 1
    assert {"python", "c library", "child"} <= set(err.splitlines())


def test_the_text_of_an_audit_is_its_product_and_stands_on_standard_output(capsys, ends_with):
    ends_with()
    assert run(capsys, "audit", "c") == (0, "verdict: pass\n", "")


def test_a_reader_who_has_seen_enough_changes_no_exit_code():
    code = (
        "import sys; from mmjepa import audit, cli; found = {'check': '1', 'name': 'n', 'sentence': 's', 'task': None}\n"
        "audit.audit = lambda *_, **__: {'verdict': 'fail', 'findings': [found | {'verdict': 'pass'}] * 9999}\n"
        "sys.exit(cli.main(['audit', 'c']))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_of_other_verbs_people_read_standard_error(capsys):
    _, out, err = run(capsys, "doctor")
    assert out == ""
    assert "verdict: " in err


@pytest.mark.parametrize(
    "words", [["--labels", "a,b", "c"], ["c", "--labels", "a", "--labels", "b"], ["--labels=a, b", "c"]]
)
def test_label_tasks_are_named_with_commas_or_one_by_one_and_swallow_no_cohort(capsys, monkeypatch, words):
    asked = []
    monkeypatch.setattr(audit_room, "audit", lambda *names, **_: asked.append(names) or {"verdict": "pass"})
    assert run(capsys, "audit", *words, "--json")[0] == 0
    assert asked == [(Path("c"), ["a", "b"])]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ingest", "her", "X", "--out", "c"], "'her' is one word too many"),
        (["ingest", "ehr", "X", "Y", "--out", "c"], "'Y' is one word too many"),
        (["ingest", "ehr", "X", "--ct", "Y", "--out", "c"], "not with ehr"),
        (
            ["ingest", "ehr", "X", "--out", "c", "--workers", "4", "--min-slices", "3", "--form", "blosc2"],
            "--workers, --min-slices, --form: of images",
        ),
        (["ingest", "ehr", "X", "--out", "c", "--explain", "i"], "--explain: of images"),
        (["ingest", "X", "--out", "c", "--rescale", "0,1"], "want them as 1,-1024"),
        (["forms", "c", "--hours", "3"], "want A:B, as 0:6"),
        (["audit", "c", "--labels", "a,,b"], "want one, or several as a,b"),
    ],
)
def test_a_wrong_word_is_named_with_what_would_be_right(capsys, words, said):
    code, _, err = run(capsys, *words)
    assert code == 2
    assert err.startswith("refused: USAGE: ")
    assert said in err


def test_a_refusal_is_one_line_and_code_2(capsys, ends_with):
    ends_with(Refusal("COHORT_MISSING", "c is\nnot a folder", "Make one"))
    code, out, err = run(capsys, "audit", "c")
    assert (code, out, err) == (2, "", "refused: COHORT_MISSING: c is not a folder. Make one\n")
    code, out, _ = run(capsys, "audit", "c", "--json")
    assert code == 2
    assert json.loads(out) == {
        "refused": {"code": "COHORT_MISSING", "message": "c is\nnot a folder", "hint": "Make one"}
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out.bin"), "DISK_FULL"),
        (PermissionError(errno.EACCES, "Permission denied", "out.bin"), "FILE_ACCESS"),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), "PACKAGE_MISSING"),
    ],
)
def test_what_the_system_refuses_is_a_refusal(capsys, ends_with, error, code):
    ends_with(error)
    ended, _, err = run(capsys, "audit", "c")
    assert ended == 2
    assert err.startswith(f"refused: {code}: ")
    assert "Traceback" not in err


def test_an_interruption_says_how_to_go_on_and_ends_with_130(capsys, ends_with):
    ends_with(KeyboardInterrupt())
    assert run(capsys, "audit", "c") == (130, "", f"interrupted. {console.GO_ON}\n")
    ends_with(KeyboardInterrupt("go on with resume=true"))
    code, out, err = run(capsys, "audit", "c", "--json")
    assert (code, json.loads(out)) == (130, {"interrupted": "go on with resume=true"})
    assert "resume=true" in err


def test_a_fault_names_its_place_but_never_its_message_and_debug_shows_all(capsys, ends_with):
    ends_with(KeyError("subject 17"))
    code, _, err = run(capsys, "audit", "c")
    assert code == 70
    assert "KeyError in test_cli.py" in err
    assert "17" not in err.split(", line")[0]
    assert "Traceback" not in err
    code, _, err = run(capsys, "audit", "c", "--debug")
    assert code == 70
    assert "Traceback" in err
    assert "subject 17" in err


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["ingest"], ["audit", "c", "--labels"], ["evaluate", "t", "--draws", "x"]]
)
def test_bad_usage_is_refused_in_one_line_and_as_json(capsys, arguments):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("refused: USAGE: ")
    assert err.count("\n") == 1
    code, out, _ = run(capsys, *arguments, "--json")
    assert (code, json.loads(out)["refused"]["code"]) == (2, "USAGE")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["ingest", "nowhere", "--out", "c"], "SOURCE_MISSING"),
        (["ingest", "--out", "c"], "SOURCE_EMPTY"),
        (["audit", "nowhere"], "COHORT_MISSING"),
        (["evaluate", "nowhere.parquet", "--labels", "nowhere"], "TABLE_MISSING"),
    ],
)
def test_the_real_verbs_refuse_what_is_not_there(tmp_path, monkeypatch, capsys, arguments, code):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *arguments)[2].startswith(f"refused: {code}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_ends_by_the_same_rules(capsys):
    assert console.run(lambda: None) == 0
    assert console.run(raising(Refusal("A", "b"))) == 2
    assert console.run(raising(KeyboardInterrupt())) == 130


def test_the_installed_command_starts_without_a_heavy_import():
    heavy = ["torch", "pandas", "numpy", "transformers", "monai", "pyarrow", "sklearn", "rich", "yaml"]
    code = (
        "import sys, mmjepa.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
        f"assert not set({heavy}) & set(sys.modules), set({heavy}) & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
