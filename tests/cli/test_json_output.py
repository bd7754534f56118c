"""`--json` of every command: one JSON document on stdout and nothing else; an error on stderr and a status."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import BUDGET, command_line
from user_tasks import regression

from steppe.cli import main
from steppe.cli.grammar import grammar
from steppe.experiments import Task
from steppe.experiments.analysis.verdicts import FLATNESS

TRAINED = ["--epochs", "1", "--seeds", "1", "--device", "cpu", "--threads", "1"]
MEASURED = [
    *("--samples", "20", "--processes", "1", "--m", "8", "--ascent-steps", "1", "--restarts", "1", "--pairs", "2"),
    *("--num-eigenvalues", "2", "--tol", "0.5", "--probes", "2", "--density-probes", "1", "--density-iterations", "3"),
    *("--points", "0"),
]


def talkative() -> Task:
    """A task that prints, as does a library that it calls."""
    print("Python prints")
    with open(1, "w", closefd=False) as stdout:  # the descriptor that worker processes inherit
        stdout.write("the system prints\n")
    return regression()


def network() -> Any:
    return regression().model()


def samples() -> Any:
    return regression().train


def document(words: list[str], capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command with --json, and return the document that is all that it prints on stdout."""
    capfd.readouterr()
    assert command_line([*words, "--json"], draws=False) == 0
    out, err = capfd.readouterr()
    assert words[1] != f"{__name__}:talkative" or {"Python prints", "the system prints"} <= set(err.splitlines())
    return json.loads(out, parse_constant=pytest.fail)


def test_every_command_prints_one_document(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, task = tmp_path / "run", f"{__name__}:talkative"
    compared = document(["compare", task, "--out", str(run), *TRAINED], capfd)
    assert [row["method"] for row in compared["rows"]] == ["base", "sam"]
    measured = document(["measure", str(run), *MEASURED], capfd)
    assert measured["folder"] == str(run)
    values = json.loads((run / "runs" / "sam-seed0" / FLATNESS).read_text())["measures"]
    (verdict,) = measured["flatness"]
    of_loss = next(row for row in verdict["measures"] if row["name"] == "loss")
    base = json.loads((run / "runs" / "base-seed0" / FLATNESS).read_text())["measures"]
    assert of_loss["difference"]["mean"] == pytest.approx(values["loss"]["value"] - base["loss"]["value"])
    assert document(["plot", str(run)], capfd)["rows"] == measured["rows"]


def test_measures_of_a_model_are_one_document(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["--model", f"{__name__}:network", "--data", f"{__name__}:samples", "--loss", "user_tasks:mse"]
    out = tmp_path / "flatness"
    found = document(["measure", *given, "--out", str(out), *MEASURED], capfd)
    assert found["measured"] == {"network": json.loads((out / "network.json").read_text())} | found["measured"]
    assert found["measured"]["network"]["settings"]["m"] == BUDGET.m
    assert found["folder"] == str(out)


def test_search_is_one_document(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    search = ["--search", "rho=0.02,0.2", "--sampler", "grid", "--methods", "sam"]
    out = tmp_path / "search"
    found = document(["tune", f"{__name__}:talkative", "--out", str(out), *TRAINED, *search], capfd)
    assert found == {"folder": str(out), **json.loads((out / "summary.json").read_text())}


WRONG = {
    "compare": ["nowhere:task"],
    "finetune": ["--shots", "0"],
    "tune": ["nowhere:task"],
    "measure": ["nothing/here"],
    "plot": ["nothing/here"],
    "methods": ["nothing_here"],
    "recipes": ["nothing_here"],
}


def test_errors_of_all_commands_are_tried() -> None:
    commands = grammar().commands
    assert WRONG.keys() == {name for name, command in commands.items() if command.option("--json") is not None}


@pytest.mark.parametrize("command", WRONG)
def test_error_is_one_line_on_stderr_and_a_status(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, *WRONG[command], "--json"]) in (1, 2)
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("steppe: ")
