"""The benchmark of the best rho over widths: it runs, and the page says what its stored results say."""

import re
from pathlib import Path

import mup
import results

ROOT = Path(__file__).resolve().parents[2]


def test_benchmark_writes_results_and_draws_them(tmp_path, monkeypatch):
    arguments = ["--tiny", "--results", str(tmp_path), "--images", str(tmp_path), "--machine", "test"]
    monkeypatch.setattr("sys.argv", ["mup.py", *arguments])
    monkeypatch.setattr(mup, "WIDTHS", (8, 16))
    mup.main()
    found = results.read(tmp_path / "test" / "mup.json")
    assert found.tiny
    assert set(found.data) == {"one_for_all", "by_layer"}
    one, by_layer = (found.data[case] for case in ("one_for_all", "by_layer"))
    assert one["8"] == by_layer["8"]
    assert one["16"] != by_layer["16"]
    assert [axes.get_title() for axes in mup.plot(found.data).axes] == list(mup.TITLES.values())


def test_page_names_the_best_rho_of_each_width():
    (result,) = results.load("mup")
    page = (ROOT / "docs" / "tuning.md").read_text()
    for case, title in mup.TITLES.items():
        (row,) = re.findall(rf"^\| {re.escape(title)} \|(.*)\|$", page, re.MULTILINE)
        assert [float(cell) for cell in row.split("|")] == [mup.best(by_rho) for by_rho in result.data[case].values()]
    assert result.date in page
