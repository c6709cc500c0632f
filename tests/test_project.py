"""The project's own promises: pins, lightness, names that must not be shadowed, files that fit together."""

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    name: version
    for name, version in (
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
}
PYTHON_FILES = [
    path for room in ("mmjepa", "synthetic", "recipes", "benchmarks") for path in (ROOT / room).rglob("*.py")
]


def requirements() -> list[Requirement]:
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    return [need for text in [*PROJECT["dependencies"], *extras] if (need := Requirement(text)).name != "mmjepa"]


@pytest.mark.parametrize("need", requirements(), ids=str)
def test_every_requirement_has_a_pin_inside_its_range(need):
    pin = PINS[re.sub(r"[-_.]+", "-", need.name).lower()]
    assert need.specifier.contains(pin, prereleases=True)


def test_the_pins_are_plain_versions_of_normal_names():
    assert all(
        re.fullmatch(r"[a-z0-9-]+", name) and re.fullmatch(r"[0-9][0-9a-z.]*", pin) for name, pin in PINS.items()
    )


def test_torch_has_an_upper_bound_because_an_uncapped_install_takes_gigabytes_of_cuda():
    torch = next(need for need in requirements() if need.name == "torch")
    assert not torch.specifier.contains("2.99")


def test_nothing_passes_for_the_package_datasets():
    assert find_spec("datasets") is None


def test_folders_of_scripts_are_not_packages():
    assert not list((ROOT / "datasets").rglob("__init__.py")) + list((ROOT / "recipes").rglob("__init__.py"))


def test_importing_the_package_imports_no_heavy_library():
    code = "import sys, mmjepa; assert not {'torch', 'numpy', 'pandas', 'monai', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_imports_neither_the_world_nor_scripts():
    wrong = re.compile(r"^\s*(from|import)\s+(synthetic|recipes|datasets|tests)\b", re.MULTILINE)
    assert [path for path in (ROOT / "mmjepa").rglob("*.py") if wrong.search(path.read_text())] == []


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("evaluate", "ct|ehr|sample|encoders|jepa|engine|objectives|baselines|audit"),
        ("ct", "ehr|sample|encoders|jepa|engine|objectives|evaluate|baselines"),
        ("ehr", "ct|sample|encoders|jepa|engine|objectives|evaluate|baselines"),
        ("audit", "sample|encoders|jepa|engine|objectives|evaluate|baselines"),
        ("objectives", "ct|ehr|sample|encoders|jepa|engine|evaluate|audit|cohort"),
        ("encoders", "ct|ehr|sample|engine|objectives|evaluate|audit|cohort"),
        ("engine", "ct|ehr|evaluate|audit|cohort"),
    ],
)
def test_rooms_do_not_import_what_they_must_not_know(room, forbidden):
    wrong = re.compile(
        rf"^\s*(from|import)\s+mmjepa\.({forbidden})\b|^\s*from mmjepa import .*\b({forbidden})\b", re.MULTILINE
    )
    assert [path.name for path in (ROOT / "mmjepa" / room).rglob("*.py") if wrong.search(path.read_text())] == []


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_unpickles_leaves_work_undone_or_swallows_errors(path):
    wrong = r"\bpickle\.loads?\(|allow_pickle=True|weights_only=False|TODO|FIXME|raise NotImplementedError|except Exception: *pass"
    assert re.findall(wrong, path.read_text()) == []


def test_every_relative_link_of_the_documents_leads_somewhere():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in documents for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())]
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_the_readme_names_every_verb_and_every_make_target():
    text = (ROOT / "README.md").read_text()
    verbs = ("ingest", "audit", "pretrain", "embed", "evaluate", "rollout", "plan", "doctor")
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [name for name in verbs if f"mmjepa {name}" not in text] == []
    assert [name for name in targets if name != "help" and f"make {name}" not in text] == []
