import io

import pytest
from rich.console import Console

from steppe.experiments.analysis.tables import Table

LONG = "root mean squared error"
ROWS = [["base", "60", "1.835±0.18", "1.671±0.11", "5"], ["SAM (rho 0.1)", "60", "2.193±0.1", "1.961±0.06", "5"]]


def shown(table: Table, width: int) -> str:
    text = io.StringIO()
    table.show(Console(file=text, width=width), [])
    return text.getvalue()


@pytest.mark.parametrize("name", [LONG, LONG.replace(" ", "_")])
def test_long_headings_are_wrapped_before_methods(name: str) -> None:
    headings = ["method", "std.\nepochs", f"train\n{name}", f"test\n{name}", "runs"]
    lines = shown(Table(headings, {"": ROWS}, optional=[(1,)]), 56).splitlines()
    assert [line.split() for line in lines[-2:]] == [[*row[0].split(), *row[1:]] for row in ROWS]
    assert max(map(len, lines)) <= 56
    assert sum("mean" in line for line in lines) == 1
    assert "…" not in "".join(lines)


def test_headings_stay_whole_where_they_fit() -> None:
    headings = ["method", "epochs", f"train {LONG}", f"test {LONG}", "runs"]
    assert f"train {LONG}" in shown(Table(headings, {"": ROWS}), 100)


def test_methods_wrap_before_a_column_is_left_out() -> None:
    table = Table(["method", "epochs", "train", "test", "runs"], {"": ROWS}, optional=[(1,)])
    text = shown(table, 46)
    assert "epochs" in text
    assert all(word in text for word in ("SAM", "(rho", "0.1)"))
    assert "epochs" not in shown(table, 38)
