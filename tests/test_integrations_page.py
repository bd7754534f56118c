"""docs/integrations.md and docs/finetuning.md link only to tests that exist, and no cell of their tables is empty."""

import ast
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
COLUMNS = {"integrations.md": (18, 6), "finetuning.md": (18, 4)}
"""The numbers of rows and columns of the table of each page, whose rows begin in bold."""
LINKS = {page: re.findall(r'\]\(\s*(\S+\.py)\s+"([^"]+)"\)', (DOCS / page).read_text()) for page in COLUMNS}


@pytest.mark.parametrize("file", sorted({file for links in LINKS.values() for file, _ in links}))
def test_linked_tests_exist(file):
    path = (DOCS / file).resolve()
    names = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert {name for links in LINKS.values() for link, name in links if link == file} <= names


@pytest.mark.parametrize("page", COLUMNS)
def test_every_link_to_a_test_file_names_a_test(page):
    assert len(LINKS[page]) == len(re.findall(r"\]\(\s*\.\./tests/", (DOCS / page).read_text())) > 30


@pytest.mark.parametrize("page", COLUMNS)
def test_table_has_no_empty_cell(page):
    rows = [line.strip("|").split("|") for line in (DOCS / page).read_text().splitlines() if line.startswith("| **")]
    assert {len(row) for row in rows} == {COLUMNS[page][1]}
    assert len(rows) == COLUMNS[page][0]
    for row in rows:
        assert all(cell.strip() for cell in row)
