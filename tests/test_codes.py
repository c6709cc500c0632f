"""``docs/codes.md`` holds every code of the CT path, and no other."""

import ast
import re
from pathlib import Path

from mmjepa.ct.manifest import _MEANINGS

ROOT = Path(__file__).parents[1]
ROOMS = (
    *(ROOT / "mmjepa" / "ct").glob("*.py"),
    *(ROOT / "mmjepa" / f"{name}.py" for name in ("files", "identity", "ingest")),
)
PREFIXES = ("CROSSWALK", "IMAGES_CSV")  # of codes that name the table they are about


def codes_in(path: Path) -> set[str]:
    """The first arguments of Refusal and Left."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Refusal", "Left") and node.args:
            first = node.args[0]
            if isinstance(first, ast.JoinedStr):
                found |= {prefix + end for prefix in PREFIXES for end in re.findall("_[A-Z]+", ast.unparse(first))}
            else:
                found |= {part.value for part in ast.walk(first) if isinstance(part, ast.Constant)}
    return {code for code in found if re.fullmatch(r"[A-Z][A-Z0-9_]+", str(code))}


def test_a_hint_that_names_a_setting_names_its_flag_too():
    texts = [
        node.value for path in ROOMS for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
    ]
    hints = [str(text) for text in texts if re.search(r"(rescale|tilt|nifti_hu)=\w", str(text))]
    assert len(hints) >= 6
    assert [hint for hint in hints if not re.search("--(rescale|tilt|nifti-hu)", hint)] == []


def test_every_code_of_the_ct_path_is_explained_and_nothing_else_is():
    used = set().union(*map(codes_in, ROOMS), _MEANINGS)
    lines = [line for line in (ROOT / "docs" / "codes.md").read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == 3 and all(row) for row in rows)
    explained = {code for row in rows for code in re.findall(r"`([A-Z0-9_]+)`", row[0])}
    assert sorted(used - explained) == []
    assert sorted(explained - used) == []
