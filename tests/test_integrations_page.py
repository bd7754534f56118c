"""docs/integrations.md: every test that it names exists, and every cell of its table is a test or says why not."""

import ast
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"
LINKS = re.findall(r'\]\(\s*(\S+\.py)\s+"([^"]+)"\)', PAGE.read_text())


@pytest.mark.parametrize("file", sorted({file for file, _ in LINKS}))
def test_the_tests_that_it_names_exist(file):
    path = (PAGE.parent / file).resolve()
    names = {node.name for node in ast.current_pass(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert {name for link, name in LINKS if link == file} <= names


def test_every_link_to_a_test_names_one():
    assert len(LINKS) == len(re.findall(r"\]\(\s*\.\./tests/", PAGE.read_text())) > 50


def test_no_cell_is_empty():
    rows = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| **")]
    assert len(rows) == 17
    for row in rows:
        assert len(row) == 6
        assert all(cell.strip() for cell in row)
