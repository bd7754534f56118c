"""scripts/make_cards.py: the pages of docs/methods, from the cards and from what was measured."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import make_cards
import memory
from live_memory import SkippedKernels
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.storage.files import write_json_lines
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import METRICS, RunFolder
from steppe.methods import cards
from steppe.methods.cards import card
from steppe.methods.registry import CARDS
from support import rest_is_slow

ROOT = Path(__file__).parents[2]


def test_pages_are_current():
    for name, text in make_cards.pages().items():
        page = ROOT / "docs" / "methods" / name
        assert page.read_text(encoding="utf-8") == text, "run python scripts/make_cards.py"
    assert {page.name for page in (ROOT / "docs" / "methods").iterdir()} == set(make_cards.pages())


def test_memory_of_each_method_is_measured():
    values = json.loads(make_cards.MEASURED.read_text(encoding="utf-8"))
    missing = set(CARDS) - set(values["memory"]["methods"])
    again = f"benchmarks/memory.py {' '.join(missing)} --json FILE, and scripts/make_cards.py --memory FILE"
    assert not missing, f"run {again}"
    assert not make_cards.private(values)


# SAM, and one whose gradients, one whose passes and one whose copies differ
_COUNTED_FAST = ("sam", "gsam", "late_sam", "sampa")


@pytest.mark.parametrize("name", rest_is_slow(CARDS, lambda name: name in _COUNTED_FAST))
def test_memory_counted_again_agrees(name):
    method = CARDS[name]
    if method.needs_adapters:
        pytest.importorskip("peft")
    with SkippedKernels():  # the bytes of a real run, in a third of its time
        counted = memory.extra(method)
    again = f"run benchmarks/memory.py {name} --json FILE, and scripts/make_cards.py --memory FILE"
    assert asdict(counted) == pytest.approx(cards.measured()["memory"]["methods"][name], abs=0.02), again


def run_folder(path: Path, tests: dict[str, list[float]], **fields) -> Path:
    """A run folder of `steppe compare` with two measurements per run, and these test accuracies at the end."""
    recipe = Recipe().replace(methods=tuple(tests), epochs=4, seeds=3, out=path, **fields)
    path.mkdir()
    folder = RunFolder(path)
    folder.claim(recipe, 1)
    for run in recipe.runs():
        test = tests[str(run.method)][run.seed]
        measures = {"train_loss": 0.1, "train_accuracy": 99.0, "test_loss": 1.0, "test_accuracy": test}
        measures["gap"] = 99.0 - test
        records = [Record(e, e, 10, 100, 1.5, measures, 30.0 * e, 100.0) for e in (2, 4)]
        write_json_lines(folder.run(run) / METRICS, [record.to_json() for record in records])
    session = {"date": "2026-11-22T10:00:00+00:00", "steppe": "0.1.0", "torch": "2.13.0", "cpu": "A CPU", "threads": 2}
    (path / "environment.json").write_text(json.dumps([session]))
    return path


def test_run_folder_becomes_numbers_on_the_cards(tmp_path, monkeypatch):
    tests = {"sgd": [80.0, 81.0, 82.0], "sam": [81.0, 82.1, 83.1], "gsam:rho=0.1": [79.0, 80.1, 81.1]}
    run = run_folder(tmp_path / "run", tests)
    measured, pages = tmp_path / "measured.json", tmp_path / "pages"
    measured.write_text('{"memory": null, "comparisons": []}')
    monkeypatch.setattr(make_cards, "MEASURED", measured)
    monkeypatch.setattr(make_cards, "PAGES", pages)
    assert make_cards.main([str(run)]) == 0
    monkeypatch.setattr(cards, "measured", lambda: json.loads(measured.read_text()))
    (one,) = cards.measured()["comparisons"]
    assert (one["base"], one["sam"], one["standardized_epochs"]) == ("sgd", "sam", 4)
    assert str(tmp_path) not in measured.read_text()
    text = card("gsam")
    assert "| SGD |  | 1.50 | 99.00±0.00 | 81.00±1.00 | 18.00±1.00 | 3 |" in text
    assert "| GSAM (rho 0.1) | 0.1 | 1.50 | 99.00±0.00 | 80.07±1.05 |" in text
    flat = " ".join(text.split())
    assert "against SGD, 3 paired runs: test accuracy -0.93 points, 95 % interval [-1.19, -0.68]: worse;" in flat
    assert "against SAM, 3 paired runs: test accuracy -2.00 points, 95 % interval [-2.10, -1.90]: worse;" in flat
    assert "not yet measured on fashion-mnist" in card("looksam").lower()
    index = cards.index()
    assert "| correct labels, 3 runs: test accuracy worse than the base and worse than SAM, gap" in index
    assert "| GSAM (rho 0.1) | -0.93 [-1.19, -0.68] worse |" in index
    assert "--methods sgd sam gsam:rho=0.1" in index


def test_run_folder_replaces_what_it_measures_again_and_nothing_else(tmp_path, monkeypatch):
    measured = tmp_path / "measured.json"
    measured.write_text('{"memory": null, "comparisons": []}')
    monkeypatch.setattr(make_cards, "MEASURED", measured)
    monkeypatch.setattr(make_cards, "PAGES", tmp_path / "pages")
    values = [80.0, 81.0, 82.0]

    def stored_after(name: str, *methods: str, **fields) -> list[list[str]]:
        folder = run_folder(tmp_path / name, dict.fromkeys(("sgd", "sam", *methods), values), **fields)
        assert make_cards.main([str(folder)]) == 0
        return [[row["method"] for row in one["rows"]][2:] for one in json.loads(measured.read_text())["comparisons"]]

    assert stored_after("first", "gsam") == [["gsam"]]
    assert stored_after("other methods", "looksam") == [["gsam"], ["looksam"]]
    assert stored_after("other labels", "gsam", label_noise=0.4) == [["gsam"], ["looksam"], ["gsam"]]
    assert stored_after("again", "gsam:rho=0.1", "asam") == [["looksam"], ["gsam"], ["gsam:rho=0.1", "asam"]]


def test_no_card_has_a_gap_between_wrong_labels_and_correct_ones(tmp_path, monkeypatch):
    tests = {"sgd": [80.0, 81.0, 82.0], "sam": [81.0, 82.1, 83.1], "gsam:rho=0.1": [79.0, 80.1, 81.1]}
    found = make_cards.comparison(run_folder(tmp_path / "run", tests, label_noise=0.4))
    monkeypatch.setattr(cards, "measured", lambda: {"memory": None, "comparisons": [found]})
    of_method, _, _ = card("gsam").partition("## Checked against")
    assert "40 % wrong training labels" in of_method
    assert "| 81.00±1.00 | 3 |" in of_method
    assert "gap" not in of_method.partition("## Measured")[2]
    assert "| 40 % wrong labels, 3 runs: test accuracy worse than the base and worse than SAM |" in cards.index()


def test_accuracy_under_corruptions_is_a_column_where_it_was_measured(tmp_path):
    path = run_folder(tmp_path / "run", {"sgd": [80.0, 81.0, 82.0]})
    assert "corruptions" not in "".join(cards._table(make_cards.comparison(path)["rows"]))
    for metrics in path.rglob(METRICS):
        records = [Record.from_json(json.loads(line)) for line in metrics.read_text().splitlines()]
        records[-1].measures["test_accuracy under corruptions"] = 70.0
        write_json_lines(metrics, [record.to_json() for record in records])
    head, _, line = cards._table(make_cards.comparison(path)["rows"])
    assert "| test accuracy % | corrupted images % | gap, points |" in head
    assert "| 81.00±1.00 | 70.00±0.00 | 18.00±1.00 |" in line


def test_memory_of_some_methods_is_merged(tmp_path, monkeypatch):
    measured, some = tmp_path / "measured.json", tmp_path / "memory.json"
    numbers = {"within": 1.0, "between": 0.5}
    measured.write_text(json.dumps({"memory": {"methods": {"sam": numbers, "gone": numbers}}, "comparisons": []}))
    some.write_text(json.dumps({"torch": "2.13.0", "methods": {"gsam": numbers}}))
    monkeypatch.setattr(make_cards, "MEASURED", measured)
    monkeypatch.setattr(make_cards, "PAGES", tmp_path / "pages")
    assert make_cards.main(["--memory", str(some)]) == 0
    assert json.loads(measured.read_text())["memory"] == {
        "torch": "2.13.0",
        "methods": {"sam": numbers, "gsam": numbers},
    }


def test_folder_without_a_run_is_an_error_of_one_line(tmp_path, capsys):
    assert make_cards.main([str(tmp_path)]) == 1
    assert "is not a run folder" in capsys.readouterr().err


def test_stale_pages_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_cards, "PAGES", tmp_path)
    assert make_cards.main(["--check"]) == 1
    assert "gsam.md is stale" in capsys.readouterr().err


def test_one_run_has_no_verdict_and_several_specs_share_a_card():
    value = {"n": 1, "mean": 0.5, "sd": None, "interval_95": None, "verdict": "no verdict"}
    row = {"method": "sgd", "label": "SGD", "rho": None}
    row |= dict.fromkeys(("passes", "train_accuracy", "test_accuracy", "gap"), value)
    rows = [row, row | {"method": "gsam", "label": "GSAM"}, row | {"method": "gsam:rho=0.1", "label": "GSAM (rho 0.1)"}]
    differences = [
        {"method": m, "reference": "sgd", "test_accuracy": value, "gap": value} for m in ("gsam", "gsam:rho=0.1")
    ]
    environment = {"date": "2026-11-22", "steppe": "0.1.0", "torch": "2.13.0", "gpu": "A GPU"}
    run = {"rows": rows, "differences": differences, "base": "sgd", "sam": None, "environment": environment}
    run |= {"setting": "a network", "labels": "correct labels", "standardized_epochs": 2, "command": "steppe compare"}
    with pytest.MonkeyPatch.context() as patch:
        runs = [run, run, run | {"setting": "another network"}]
        patch.setattr(cards, "measured", lambda: {"memory": None, "comparisons": runs})
        text = card("gsam")
    assert " ".join(text.split()).count("no verdict") == 8
    assert text.count("| GSAM (rho 0.1) |") == 2
    assert "Memory not yet measured." in text
