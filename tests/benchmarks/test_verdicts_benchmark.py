"""benchmarks/verdicts: calibration by simulated and by given numbers, the saved runs, the tables, and the page."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import make_verdicts
import results
from verdicts import calibration, run


@pytest.fixture
def trained(monkeypatch):
    """Make runs from random numbers, and record which were made."""
    made = []

    def train(problem, method, seed):
        made.append((problem.description, method, seed))
        return float(np.random.default_rng([len(problem.description), method == "sam", seed]).normal(method == "sam"))

    def train_and_measure(problem, method, seed):
        draws = np.random.default_rng([method == "sam", seed]).lognormal(size=2 + len(calibration.FLATNESS))
        return dict(zip(["test", "gap", *calibration.FLATNESS], map(float, draws), strict=True))

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "train_and_measure", train_and_measure)
    return made


def main(folder: Path, monkeypatch, *words: str) -> None:
    words = (*words, "--measured-runs", "20")
    monkeypatch.setattr(sys, "argv", ["run.py", "--results", str(folder), "--machine", "one", *words])
    run.main()


def test_equal_methods_are_rarely_called_different():
    found = list(calibration.simulate_same([3], [1, 3], 400))
    assert [each["methods"] for each in found] == [1, 3] + [1] * (len(calibration.SHAPES) - 1)
    for each in found:
        assert each["different"] <= 0.08 * each["comparisons"], each


def test_different_methods_are_called_different():
    numbers = np.random.default_rng(0).standard_normal((2, 5))
    assert not calibration.different(numbers)
    numbers[1] += 30
    assert calibration.different(numbers)


def test_flatness_of_equal_methods_is_rarely_called_different():
    for each in calibration.simulate_flatness([3], 60):
        assert each["different"] <= 0.15 * each["comparisons"], each
    numbers = np.random.default_rng(0).lognormal(size=(len(calibration.FLATNESS), 2, 5))
    assert not calibration.flatness_differs(numbers)
    numbers[3, 1] += 300
    assert calibration.flatness_differs(numbers)


def test_whole_reports_are_wrong_where_any_of_their_parts_is():
    rng = np.random.default_rng(0)
    runs = [
        {
            name: rng.normal(scale=1e-3) + 10 * (-1) ** (i // 3) * (name == "gap")
            for name in ("test", "gap", *calibration.FLATNESS)
        }
        for i in range(60)
    ]
    with pytest.MonkeyPatch.context() as patch:  # three of one kind against three of the other
        patch.setattr(calibration.np.random, "default_rng", lambda _: Unshuffled())
        found = {each["shown"]: np.mean(each["shares"]) for each in calibration.compare_same_reports(runs, 3, 1)}
    assert found["generalization gap"] == found["any of these"] == 1
    assert max(found["test accuracy"], found["flatness, any measure"]) < 0.5


class Unshuffled:
    def permutation(self, values):
        return values


def test_groups_of_real_runs_are_disjoint_and_shares_come_by_block():
    values = [*np.random.default_rng(0).standard_normal(400)]
    same = calibration.compare_same(values, seeds=5, methods=1, rounds=2)
    assert (same["comparisons"], same["disjoint"], len(same["shares"])) == (80, 40, calibration.BLOCKS)
    shifted = [value + 100 * (-1) ** i for i, value in enumerate(values)]
    assert sum(calibration.compare_same(shifted, 5, 1, 2)["shares"]) < 2
    ours = [value + 3 for value in np.random.default_rng(1).standard_normal(400)]
    found = calibration.compare_different(ours, values, seeds=10, rounds=2)
    assert found["shares"] == [1.0] * calibration.BLOCKS
    assert found["effect"] == pytest.approx(3 / 2**0.5, rel=0.2)
    assert found["expected"] > 0.99


@pytest.mark.slow
def test_runs_are_saved_and_not_repeated(trained, tmp_path, monkeypatch, capsys):
    words = ("--runs", "40", "--comparisons", "4")
    main(tmp_path, monkeypatch, *words)
    assert len(trained) == len(set(trained)) == 4 * 40
    first = capsys.readouterr().out
    assert all(
        f"**{title}" in first
        for title in ("Equal methods, simulated", "Equal methods, real", "SAM against SGD", "Reports on equal")
    )
    main(tmp_path, monkeypatch, *words)
    assert len(trained) == 4 * 40
    main(tmp_path, monkeypatch, "--runs", "60", "--comparisons", "4")
    assert len(trained) == len(set(trained)) == 4 * 60
    text = make_verdicts.page(
        "".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in make_verdicts.PARTS), tmp_path
    )
    assert "| difference / standard deviation |" in text
    assert make_verdicts.page(text, tmp_path) == text
    (before,) = results.load("verdicts", tmp_path)
    main(tmp_path, monkeypatch, "--only", "flatness", "--comparisons", "60")
    (after,) = results.load("verdicts", tmp_path)
    assert {name for name in before.data if before.data[name] != after.data[name]} == {"flatness"}


def test_saved_runs_of_other_settings_are_trained_again(trained, tmp_path, monkeypatch):
    main(tmp_path, monkeypatch, "--runs", "20", "--comparisons", "2")
    changed = {name: run.replace(problem, lr=1.0) for name, problem in run.PROBLEMS.items() if name == "digits"}
    monkeypatch.setattr(run, "PROBLEMS", {**run.PROBLEMS, **changed})
    main(tmp_path, monkeypatch, "--runs", "20", "--comparisons", "2")
    assert len(trained) == 4 * 20 + 2 * 20


def test_real_runs_depend_on_the_seed_and_the_method_only():
    problem = run.replace(run.PROBLEMS["diabetes"], epochs=2)
    first = [run.train(problem, method, seed) for method in ("sgd", "sam") for seed in (0, 1)]
    assert len(set(first)) == 4
    assert [run.train(problem, method, seed) for method in ("sgd", "sam") for seed in (0, 1)] == first


def test_page_of_verdicts_is_up_to_date():
    text = make_verdicts.PAGE.read_text(encoding="utf-8")
    assert make_verdicts.page(text) == text, "run python scripts/make_verdicts.py"


def test_measured_shares_of_equal_methods_are_at_most_five_percent():
    for result in results.load("verdicts"):
        for found in result.data["same"]:
            error = 3 * (0.05 * 0.95 / found["comparisons"]) ** 0.5
            assert found["different"] / found["comparisons"] <= 0.05 + error, found
        for problem in result.data["real"]:
            for found in (each for of in problem["same"].values() for each in of):
                shares = np.array(found["shares"])
                assert shares.mean() - 3 * shares.std(ddof=1) / len(shares) ** 0.5 <= 0.05, found

        for found in result.data["flatness"]["simulated"]:
            error = 3 * (0.05 * 0.95 / found["comparisons"]) ** 0.5
            assert found["different"] / found["comparisons"] <= 0.05 + error, found
        for found in (each for of in result.data["flatness"]["real"].values() for each in of):
            shares = np.array(found["shares"])
            allowed = 0.15 if found["shown"] == "any of these" else 0.05
            assert shares.mean() - 3 * shares.std(ddof=1) / len(shares) ** 0.5 <= allowed, found


def test_real_reports_have_every_measure():
    problem = run.replace(run.PROBLEMS["digits"], epochs=2)
    found = run.train_and_measure(problem, "sgd", 0)
    assert {"test", "gap", *calibration.FLATNESS} <= found.keys()
    assert run.train(problem, "sgd", 0) == found["test"]


def test_page_of_verdicts_has_all_parts():
    with pytest.raises(ValueError, match=re.escape("must contain <!-- begin seeds -->")):
        make_verdicts.page("")
