"""The contact sheet."""

import matplotlib.image
import pytest

from mmjepa.refusal import Refusal
from synthetic import look, plan
from synthetic.presets import find_sites


def test_a_sheet_is_drawn_and_an_existing_one_kept(tmp_path):
    made = plan.checked(0, look.PATCHES, "internal", "li2025", 1, "nifti", 1, 32, 2, [])
    look.contact_sheet(tmp_path / "sheet.png", made)
    picture = matplotlib.image.imread(tmp_path / "sheet.png")
    assert picture.shape[0] > picture.shape[1] > 1000
    assert picture[..., :3].std() > 0.1
    before = (tmp_path / "sheet.png").read_bytes()
    with pytest.raises(Refusal, match="OUTPUT_EXISTS"):
        look.contact_sheet(tmp_path / "sheet.png", made)
    assert (tmp_path / "sheet.png").read_bytes() == before
    with pytest.raises(Refusal, match="png, pdf, svg"):
        look.contact_sheet(tmp_path / "sheet.docx", made)


@pytest.mark.parametrize("bias", [-10, 10])
def test_a_site_where_all_or_none_have_the_outcome_is_drawn(bias, tmp_path):
    sites = find_sites("li2025", ["internal"], [f"bias_shift={bias}"])
    made = plan.checked(0, look.PATCHES, sites, "li2025", 0, "nifti", 1, 32, 1, [])
    assert look.contact_sheet(tmp_path / "sheet.png", made)["patches"] == look.PATCHES
