"""What the README and the pages of docs/ show runs."""

import re
import shlex
from pathlib import Path

import pytest

from mmjepa.cli import main, make_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
VOC = """<annotation><size><width>32</width><height>32</height></size><object><name>A</name>
<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>15</xmax><ymax>15</ymax></bndbox></object></annotation>"""


def test_the_python_quick_start_runs(icu_run, icu_cohort, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "icu").symlink_to(icu_run)
    (tmp_path / "cohort").symlink_to(icu_cohort)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README", "exec"), {})
    said = capsys.readouterr().out
    assert said.startswith("trajectory")
    assert "copy_forward" in said
    assert (tmp_path / "states.parquet").is_file()


@pytest.mark.parametrize("command", re.findall(r"\| `mmjepa (.*?)` \|", README))
def test_every_verb_of_the_table_is_spelt_as_the_command_line_wants_it(command):
    options = make_parser().parse_args(shlex.split(command))
    assert callable(options.call)


def test_every_config_that_is_named_exists():
    named = set(re.findall(r"recipes/configs/\w+\.yaml", README))
    assert len(named) >= 4
    assert all((Path(__file__).parents[1] / path).is_file() for path in named)


@pytest.fixture
def ct_source(tmp_path):
    """What docs/ct.md reads: a source of three DICOM series, boxes on two slices of one of them, a MONAI ViT's weights."""
    import pydicom
    import torch
    from monai.networks.nets import ViT

    from synthetic import generate

    generate(tmp_path / "source", patients=3, image_format="dicom")
    (tmp_path / "boxes").mkdir()
    for path in sorted((tmp_path / "source" / "images").rglob("*.dcm"))[3:5]:
        uid = pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID
        (tmp_path / "boxes" / f"{uid}.xml").write_text(VOC)
    net = ViT(1, (32, 32, 32), (8, 8, 8), hidden_size=48, mlp_dim=96, num_layers=2, num_heads=4)
    torch.save(net.state_dict(), tmp_path / "vit.pt")


def test_every_block_of_the_ct_page_runs(ct_source, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "ct.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```(sh|python)\n(.*?)```", page, flags=re.DOTALL)
    assert page.count("```") == 2 * len(blocks) + 2  # and one that is not run
    for kind, block in blocks:
        if kind == "sh":
            assert all(main(shlex.split(line, comments=True)[1:]) == 0 for line in block.splitlines())
        else:
            exec(compile(block, "docs/ct.md", "exec"), names)
    said = capsys.readouterr().out
    assert "0 images without a box, cropped anywhere" in said
    assert "1 accepted, {} refused" in said
    for shape in re.findall(r"# \[(\d[\d, ]+)\]", page):  # the shapes that comments promise
        assert f"torch.Size([{shape}])" in said
    assert names["batch"].voxels.shape == (4, 3, 32, 32, 32)


def test_every_block_of_the_ehr_page_runs(tmp_path, monkeypatch, capsys):
    from synthetic.cli import main as synthetic

    page = (ROOT / "docs" / "ehr.md").read_text()
    monkeypatch.chdir(tmp_path)
    assert synthetic(["generate", "--icu", "--patients", "60", "--out", "source"]) == 0
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    names: dict[str, object] = {}
    for kind, block in re.findall(r"```(sh|python)\n(.*?)```", page, flags=re.DOTALL):
        if kind == "sh":
            assert all(main(shlex.split(line, comments=True)[1:]) == 0 for line in block.splitlines())
        else:
            exec(compile(block, "docs/ehr.md", "exec"), names)
    assert "39 labels, 8 true" in capsys.readouterr().err
    assert (tmp_path / "cohort" / "labels" / "hospital_mortality" / "task.json").is_file()
    assert names["batch"].codes.shape[1] <= 128
    assert names["daily"].hash


@pytest.mark.parametrize("page", ["README.md", "docs/ct.md", "docs/ehr.md", "datasets/README.md", "BENCHMARKS.md"])
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text())
    assert all(((ROOT / page).parent / link).exists() for link in links)
