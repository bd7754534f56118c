"""The example files: their folder, their definitions, and their source with smaller numbers."""

import runpy
from pathlib import Path
from types import SimpleNamespace

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(name: str) -> SimpleNamespace:
    """Return what the example defines, without running its main part."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / name), run_name="example"))


def run_example(name: str, capsys) -> tuple[dict, str]:
    """Run the example; return its variables and what it printed."""
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__"), capsys.readouterr().out


def source_with(name: str, *replacements: tuple[str, str]) -> str:
    """Return the example's source after these replacements."""
    source = (EXAMPLES / name).read_text()
    for old, new in replacements:
        assert source.count(old) == 1, f"{old!r} must stand in {name} once"
        source = source.replace(old, new)
    return source
