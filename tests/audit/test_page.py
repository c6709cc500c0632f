"""The page on the audit names every check there is, and every key of a declaration."""

import ast
import json
import re
from dataclasses import fields
from pathlib import Path

from mmjepa.audit.declared import Declaration, read_declaration

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "audit.md").read_text()


def test_the_page_has_one_row_for_each_check_and_for_no_other():
    checks = set()
    for path in (ROOT / "mmjepa" / "audit").glob("*.py"):
        constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        checks |= {value for value in constants if isinstance(value, str) and re.fullmatch(r"1?\d[a-h]?", value)}
    rows = re.findall(r"^\| (\d+[a-h]?) \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(checks)
    assert {int(re.sub(r"\D", "", check)) for check in checks} == set(range(1, 17))


def test_the_example_declares_every_key_and_is_read(tmp_path):
    example = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0]
    assert set(json.loads(example)) == {field.name for field in fields(Declaration)}
    (tmp_path / "task.json").write_text(example)
    assert read_declaration(tmp_path).flow[-1].subjects == 85
