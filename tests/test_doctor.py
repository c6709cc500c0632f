import importlib
from importlib import metadata

import pytest

from mmjepa import cli
from mmjepa import doctor as room
from mmjepa.doctor import doctor


def part(result: dict, name: str) -> dict:
    return next(part for part in result["parts"] if part["part"] == name)


def test_this_installation_is_sound_and_every_part_that_is_not_ok_says_what_to_do():
    result = doctor()
    assert (result["verdict"], result["broken"]) == ("OK", [])
    assert {"python", "torch", "threads", "cuda", "torchvision", "timm", "datasets", "disk"} <= {
        p["part"] for p in result["parts"]
    }
    assert all(bool(p["advice"]) == (p["state"] != "OK") for p in result["parts"])


@pytest.mark.parametrize(("version", "state"), [("2.0.1", "broken"), (None, "missing")])
def test_a_core_package_that_is_absent_or_out_of_range_is_broken(monkeypatch, version, state):
    real = metadata.version

    def fake(name: str) -> str:
        if name != "peft":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", fake)
    result = doctor()
    assert (part(result, "peft")["state"], result["verdict"]) == (state, "broken")


@pytest.mark.parametrize(
    ("error", "state", "says"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), "broken", "does not match this torch"),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), "missing", "not installed"),
        (ImportError("libfoo.so: cannot open"), "broken", "libfoo"),
    ],
)
def test_timm_without_a_fitting_torchvision_is_told_from_timm_not_installed(monkeypatch, error, state, says):
    real = importlib.import_module

    def fake(name: str) -> object:
        if name in ("timm", "torchvision"):
            raise error if name == "timm" or "::" in str(error) else ModuleNotFoundError(name=name)
        return real(name)

    monkeypatch.setattr(room.importlib, "import_module", fake)
    result = doctor()
    assert part(result, "timm")["state"] == state
    assert result["verdict"] == ("limited" if state == "broken" else "OK")
    assert ("timm" in result["broken"]) == (state == "broken")
    assert says in part(result, "timm")["found"]


def test_a_folder_that_passes_for_datasets_is_seen(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert part(doctor(), "datasets")["state"] == "broken"


def test_a_folder_that_cannot_be_written_is_seen(monkeypatch):
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(room.tempfile, "TemporaryFile", refuse)
    assert part(doctor(), "disk")["state"] == "broken"


def test_a_broken_part_is_in_the_verdict_that_people_read(monkeypatch, capsys):
    monkeypatch.setattr(room, "MIN_FREE_GB", 1e9)
    assert cli.main(["doctor"]) == 0
    assert "verdict: limited (broken: disk)" in capsys.readouterr().err
