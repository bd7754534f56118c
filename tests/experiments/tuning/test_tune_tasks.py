"""`steppe tune package.module:task`: the task's own metric, data and optimizer."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from searching import trials
from tiny import command_line

pytest.importorskip("optuna")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tune(out: Path, task: str, *words: str, draws: bool = False) -> int:
    given = ["--epochs", "2", "--seeds", "2", "--device", "cpu", "--threads", "1", "--sampler", "grid", "--search"]
    search = () if any("=" in word for word in words[:1]) else ("rho=0.02,0.2",)
    return command_line(["tune", f"user_tasks:{task}", "--out", str(out), *given, *search, *words], draws=draws)


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert tune(out, "regression", "lr=0.0001,0.02", "rho=0.02,0.2", draws=True) == 0
    return out


def test_trials_are_judged_by_the_deciding_metric_in_its_direction(searched: Path) -> None:
    found = summary(searched)
    assert (found["objective"], found["higher_is_better"]) == ("validation mse", False)
    for best in found["best"]:
        of_method = [trial for trial in trials(searched) if trial["method"] == best["method"]]
        means = {t["number"]: sum(run["test_mse"] for run in t["runs"]) for t in of_method}  # type: ignore[attr-defined]
        assert best["trial"] == min(means, key=means.__getitem__)
        assert best["values"]["lr"] == 0.02  # with the other one, hardly anything is learned in two epochs
    assert [best["method"] for best in found["best"]] == ["base", "sam"]


def test_words_of_the_report_are_those_of_the_task(searched: Path) -> None:
    text = (searched / "summary.md").read_text()
    assert "| trial | validation mse cm² | validation loss | train mse cm² | gap, cm² | runs |" in text
    assert "Chosen by the lowest validation mse after 2 standardized epochs (mean of 2 runs), on one in 6" in text
    assert "on one in 6 of the training samples, which were held out of training. The test data were not used." in text
    assert re.search(r"base, lr 0\.02: [\d.]+±[\d.]+ cm², the best of 2 trials", text)
    assert "expect a higher value on other samples" in text
    assert not re.search(r"image|accuracy|%(?! interval)|points", text.replace("95 % interval", ""))
    assert {path.name for path in (searched / "figures").iterdir()} == {"lr.png", "lr.svg", "rho.png", "rho.svg"}
    drawn = (searched / "figures" / "lr.svg").read_text()
    assert "Validation mse" in drawn
    assert "Gap, validation minus training mse" in drawn


def test_command_that_confirms_names_the_task(searched: Path) -> None:
    (command,) = summary(searched)["confirm"]
    assert command.startswith("steppe compare user_tasks:regression ")
    assert "--methods base sam:rho=" in command
    assert "--lr 0.02" in command
    assert "--task" not in command
    assert "--name" not in command


def test_first_trial_has_the_learning_rate_of_the_own_optimizer(tmp_path: Path) -> None:
    words = ["--sampler", "random", "--trials", "1", "--seeds", "1", "--epochs", "1", "--methods", "base"]
    assert tune(tmp_path / "run", "regression", "lr=0.001..0.5", *words) == 0
    assert [trial["values"] for trial in trials(tmp_path / "run")] == [{"lr": 0.02}]


def test_own_validation_data_judge_and_nothing_is_held_out(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert tune(out, "with_validation", "--epochs", "1", "--seeds", "1", "--no-baseline", draws=True) == 0
    assert "on the task's own validation data. The test data were not used." in (out / "summary.md").read_text()
    (_, trial, _) = trials(out)
    (run,) = trial["runs"]  # type: ignore[misc]
    assert run["steps"] == 2  # SAM's two of the three batches of 16 that all 48 samples make, for 48 evaluations
    assert "validation: the task" in (out / "figures" / "rho.svg").read_text()


def test_task_without_metrics_is_judged_by_its_loss(tmp_path: Path) -> None:
    assert tune(tmp_path / "run", "by_loss", "--epochs", "1", "--seeds", "1", "--no-baseline") == 0
    found = summary(tmp_path / "run")
    assert (found["objective"], found["higher_is_better"]) == ("validation loss", False)
    assert "| trial | validation loss | train loss | gap | runs |" in (tmp_path / "run" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("task", "words", "answer"),
    [
        ("with_validation", ["--hold-out", "4"], "hold_out=4: the task has validation data of its own"),
        ("too_few", [], "8 training samples are too few to hold out one in 6"),
        ("missing", [], "has no missing"),
    ],
)
def test_unusable_task_is_named_before_a_folder_is_made(
    task: str, words: list[str], answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(tmp_path / "run", task, *words) == 1
    assert answer in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
