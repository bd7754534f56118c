"""docs/integrations.md and docs/finetuning.md link only to tests that exist, and no cell of their tables is empty."""

import ast
import itertools
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
TABLES = {"integrations.md": [(18, 6)], "finetuning.md": [(20, 5), (15, 5)]}
"""The numbers of rows and columns of the tables of each page whose rows begin in bold."""
LINKS = {page: re.findall(r'\]\(\s*(\S+\.py)\s+"([^"]+)"\)', (DOCS / page).read_text()) for page in TABLES}


@pytest.mark.parametrize("file", sorted({file for links in LINKS.values() for file, _ in links}))
def test_linked_tests_exist(file):
    path = (DOCS / file).resolve()
    names = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert {name for links in LINKS.values() for link, name in links if link == file} <= names


@pytest.mark.parametrize("page", TABLES)
def test_every_link_to_a_test_file_names_a_test(page):
    assert len(LINKS[page]) == len(re.findall(r"\]\(\s*\.\./tests/", (DOCS / page).read_text())) > 30


@pytest.mark.parametrize("page", TABLES)
def test_tables_have_no_empty_cell(page):
    lines = (DOCS / page).read_text().splitlines()
    tables = [list(rows) for bold, rows in itertools.groupby(lines, lambda line: line.startswith("| **")) if bold]
    cells = [[row.strip("|").split("|") for row in rows] for rows in tables]
    assert [(len(rows), len(rows[0])) for rows in cells] == TABLES[page]
    for rows in cells:
        assert {len(row) for row in rows} == {len(rows[0])}
        assert all(cell.strip() for row in rows for cell in row)
