"""Every file of every kind of folder is damaged at random; each command must notice it, or give the same result.

A command may end with the result of the undamaged folder (healed, with a note), or with an error of one line that names
the file and what to do: never with another exception, and never with another result.
"""

import dataclasses
import io
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny
import torch
from mutations import damage_bytes, mutate
from rich.console import Console
from tiny import dataset, recipe
from torch import nn

from steppe.experiments.comparison import compare, plot
from steppe.experiments.data import datasets as data
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.executor import ExecutionOptions
from steppe.experiments.figures import double_descent
from steppe.experiments.measuring.jobs import MeasuringOptions
from steppe.experiments.measuring.measure_runs import measure_runs
from steppe.experiments.measuring.user_inputs import load_weights
from steppe.experiments.report import page
from steppe.experiments.report.figures import Figures
from steppe.experiments.tuning import tune as tuning
from steppe.experiments.tuning.options import TuningOptions
from steppe.experiments.tuning.tune import report_tuning, tune
from support import rest_is_slow

BUDGET = dataclasses.replace(tiny.BUDGET, pairs=1, num_eigenvalues=1, density_iterations=2)
MEASURING = MeasuringOptions(samples=16, budget=BUDGET, processes=1)
FIELDS: dict[str, object] = {"methods": ("sgd", "sam"), "width": 1, "epochs": 2}
LOCAL = ExecutionOptions(runs_at_once=1)
Command = Callable[[Path, Console], object]


def compare_again(path: Path, console: Console) -> None:
    """Compare with all that a run may measure: robustness, and forgetting after a second task."""
    compare(recipe(**FIELDS, seeds=2, then="rotated", then_epochs=1, out=path), ["steppe"], console, LOCAL)


def compare_widths_again(path: Path, console: Console) -> None:
    compare(recipe(methods=("sgd", "sam"), epochs=1, width=16, widths=(1, 2), out=path), ["steppe"], console, LOCAL)


def measure_again(path: Path, console: Console) -> None:
    measure_runs(path, MEASURING, console)
    plot(path, console)


def tune_again(path: Path, console: Console) -> None:
    options = TuningOptions(search=("rho=0.05,0.1",), sampler="grid")
    tune(recipe(**FIELDS, out=path), options, ["steppe"], console, LOCAL)


COMMANDS: dict[str, tuple[str, Command]] = {
    "plot": ("compared", plot),
    "compare": ("compared", compare_again),
    "measure": ("compared", measure_again),
    "plot widths": ("wide", plot),
    "compare widths": ("wide", compare_widths_again),
    "plot a search": ("tuned", report_tuning),
    "tune": ("tuned", tune_again),
}


@pytest.fixture(autouse=True)
def tiny_and_undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)


def undrawn(patch: pytest.MonkeyPatch) -> None:
    """Load the tiny data, and draw no figures, which take longer than the runs."""
    patch.setattr(data, "load", lambda name, data_dir=None: dataset(40, 20))
    patch.setattr(page, "save_all", lambda drawings, folder: [])
    for section in Figures.SECTIONS:
        patch.setattr(Figures, section, lambda self: [])
    patch.setattr(tuning, "draw", lambda result, folder: [])
    patch.setattr(double_descent, "draw", lambda recipe, summary, folder: [])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folders")
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        quiet = Console(quiet=True)
        compare_again(path / "compared", quiet)
        measure_again(path / "compared", quiet)
        tune_again(path / "tuned", quiet)
        compare_widths_again(path / "wide", quiet)
    return path


def files_of(folder: Path) -> list[Path]:
    """The files that commands read."""
    kinds = (".json", ".jsonl", ".pt", ".db")
    written = ("summary.json",)
    return sorted(f.relative_to(folder) for f in folder.rglob("*") if f.suffix in kinds and f.name not in written)


def summary(folder: Path) -> str:
    return (folder / "summary.json").read_text().replace(str(folder), "FOLDER")


def damage(command: str, folders: Path, seeds: Sequence[int], tmp_path: Path) -> list[str]:
    """Damage one file after the other; return what went wrong."""
    kind, run = COMMANDS[command]
    original = folders / kind
    files = files_of(original)
    expected = summary(original)
    wrong = []
    for seed in seeds:
        path = Path(shutil.copytree(original, tmp_path / f"{seed}", symlinks=True))
        file = path / files[seed % len(files)]
        what = f"{file.relative_to(path)}: {mutate(file, seed)}"
        console = Console(file=io.StringIO(), width=500)
        try:
            run(path, console)
        except ExperimentError as error:
            text = str(error)
            if "\n" in text or file.name not in text or str(path) not in text:
                wrong.append(f"{what}: unclear: {text!r}")
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {error}")
        else:
            if summary(path) != expected:
                wrong.append(f"{what}: another result")
        shutil.rmtree(path)
    return wrong


@pytest.mark.parametrize("command", rest_is_slow(COMMANDS, lambda name: name in ("compare", "tune")))
def test_damaged_file_gives_a_clear_error_or_the_same_result(command: str, folders: Path, tmp_path: Path) -> None:
    assert damage(command, folders, range(5), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(("command", "times"), [*zip(COMMANDS, (120, 60, 50, 60, 40, 120, 60), strict=True)])
def test_much_damage_gives_clear_errors_or_the_same_result(
    command: str, times: int, folders: Path, tmp_path: Path
) -> None:
    assert damage(command, folders, range(100, 100 + times), tmp_path) == []


@pytest.mark.parametrize("form", ["state dict", "checkpoint"])
def test_damaged_weights_are_refused_or_read_as_they_were(form: str, tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    weights, path = network().state_dict(), tmp_path / "weights.pt"
    wrong = []
    for seed in range(60):
        torch.save(weights if form == "state dict" else {"model": weights, "epoch": 3}, path)
        what = damage_bytes(path, random.Random(seed))
        model = network()
        try:
            load_weights(model, path)
        except ExperimentError as error:
            if "\n" in str(error) or str(path) not in str(error):
                wrong.append(f"{what}: unclear: {error}")
        else:
            if not all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()):
                wrong.append(f"{what}: other weights")
    assert wrong == []
