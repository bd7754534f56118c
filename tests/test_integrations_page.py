"""docs/integrations.md links only to tests that exist, and no cell of its table is empty."""

import ast
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"
LINKS = re.findall(r'\]\(\s*(\S+\.py)\s+"([^"]+)"\)', PAGE.read_text())


@pytest.mark.parametrize("file", sorted({file for file, _ in LINKS}))
def test_linked_tests_exist(file):
    path = (PAGE.parent / file).resolve()
    names = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert {name for link, name in LINKS if link == file} <= names


def test_every_link_to_a_test_file_names_a_test():
    assert len(LINKS) == len(re.findall(r"\]\(\s*\.\./tests/", PAGE.read_text())) > 50


def test_table_has_no_empty_cell():
    rows = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| **")]
    assert len(rows) == 18
    for row in rows:
        assert len(row) == 6
        assert all(cell.strip() for cell in row)
