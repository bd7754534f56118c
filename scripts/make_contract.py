"""Write the tests of each statement into docs/contract.md.

These are the functions named test_cN_..., and all tests of files whose docstring names the statement.

    python scripts/make_contract.py [--check]
"""

import ast
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from measured_parts import write_pages

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "contract.md"
# in the docstring of a file, all of whose tests belong to the statement
_STATEMENT = re.compile(r"\bC\d+\b")


def find_tests() -> Mapping[str, str]:
    """Return the tests of each statement as a line of Markdown."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if not _STATEMENT.search(text) and "def test_c" not in text:
            continue  # to parse a file takes longer than to read it
        tree = ast.parse(text)
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        own: dict[str, list[str]] = defaultdict(list)
        for name in names:
            if match := re.match(r"test_c(\d+)_(.*)", name):
                own[f"C{match[1]}"].append(match[2].replace("_", " "))
        whole = set(_STATEMENT.findall(ast.get_docstring(tree) or "")) - set(own)
        link = f"[{path.stem}](../{path.relative_to(ROOT).as_posix()})"
        for number, tests in {**{number: [] for number in whole}, **own}.items():
            found[number].append(f"{link}: {'; '.join(tests)}" if tests else link)
    return {number: ". ".join(files) for number, files in found.items()}


def page(text: str, tests: Mapping[str, str]) -> str:
    """Return the page with the tests of each statement filled in anew."""

    def fill(item: re.Match[str]) -> str:
        line = f"Tests: {tests.get(item['number'], 'none yet')}."
        return f"{item['statement']}\n\n" + "\n".join(
            textwrap.wrap(line, 120, break_long_words=False, break_on_hyphens=False)
        )

    statement = r"(?P<statement>^\*\*(?P<number>C\d+)\.\*\*.*?)\n\nTests: .*?(?=\n\n|\n?\Z)"
    return re.sub(statement, fill, text, flags=re.MULTILINE | re.DOTALL)


def main(words: Sequence[str] | None = None) -> int:
    """Write the page, or with `--check` return 1 if it is out of date."""
    return write_pages(words, __file__, __doc__, {PAGE: lambda text: page(text, find_tests())})


if __name__ == "__main__":
    sys.exit(main())
