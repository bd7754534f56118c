"""Numbers that are not finite are results: everything that reads records shows them, and drops none without a word."""

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_tasks import classifier, recipe_of
from own_tasks import run_of as task_run
from rich.console import Console
from tiny import CPU, image_record, recipe

from steppe.experiments.analysis import double_descent
from steppe.experiments.comparison import plot
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.figures import curves
from steppe.experiments.figures import double_descent as double_descent_figure
from steppe.experiments.figures.drawing import Drawing
from steppe.experiments.report import page
from steppe.experiments.report.comparison_result import ComparisonResult
from steppe.experiments.report.figures import Figures
from steppe.experiments.storage.files import write_json_lines
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import Results, RunFolder
from steppe.experiments.tasks.task import Metric, Task
from steppe.experiments.training.run import train
from steppe.experiments.tuning import figure as tuning_figure
from steppe.experiments.tuning.options import TuningOptions
from steppe.experiments.tuning.result import TrialResult, TuningResult
from steppe.experiments.tuning.search_space import spaces

NUMBERS = (math.nan, math.inf, -math.inf, 1e300)
"""The last one is finite, and its square is not."""

Change = Callable[[Run, int, Record], dict[str, float]]
"""(run, epoch, record) -> what changes in the record."""


def everything(record: Record, value: float) -> dict[str, float]:
    return dict.fromkeys([*record.measures, "sharpness", "lambda_max", "gradient_norm"], value)


CHANGES: dict[str, Callable[[float], Change]] = {
    "a run's end": lambda x: lambda run, epoch, _: {"test_accuracy": x, "gap": x} if ends(run, epoch, "sam") else {},
    "a base's end": lambda x: lambda run, epoch, _: {"test_accuracy": x, "gap": x} if ends(run, epoch, "sgd") else {},
    "the beginning": lambda x: lambda run, epoch, record: everything(record, x) if epoch == 2 else {},
    "a method": lambda x: lambda run, _, record: everything(record, x) if str(run.method) == "sam" else {},
    "all": lambda x: lambda run, _, record: everything(record, x),
    "both signs": lambda x: lambda run, _, record: everything(record, x if run.seed else -x / 2),
    "flatness": lambda x: lambda run, _, record: dict.fromkeys(("sharpness", "lambda_max", "gradient_norm"), x),
}


def ends(run: Run, epoch: int, method: str) -> bool:
    return epoch == 4 and run.seed == 1 and str(run.method) == method


def record_of(run: Run, epoch: int) -> Record:
    test = 80.0 + run.seed + epoch + (5.0 + 0.2 * run.seed if str(run.method) == "sam" else 0.0)
    passes = 1.0 if str(run.method) == "sgd" else 2.0
    numbers = 0.5, 90.0 + epoch, 1.0, test, 90.0 + epoch - test, 6.0 * epoch, 100.0, 0.1, 5.0, 0.3
    record = image_record(epoch, epoch / passes, 10 * epoch, 72.0 * epoch, passes, *numbers)
    further = {"test_accuracy (half 1)": test - 1, "test_accuracy (half 2)": test + 1, "test_calibration error": 3.0}
    return replace(record, measures={**record.measures, **further})


def changed(record: Record, change: dict[str, float]) -> Record:
    return Record.from_json(record.to_json() | change)


def write(of: Recipe, change: Change) -> Recipe:
    """Write the run folder of a recipe, with its records changed."""
    folder = RunFolder(of.folder)
    folder.path.mkdir(parents=True)
    folder.claim(of, 1)
    for member in of.members():
        write(member, change)
    for run in [] if of.comparison.widths else of.runs():
        folder.run(run).mkdir(parents=True)
        records = [(epoch, record_of(run, epoch)) for epoch in sorted(run.grid)]
        lines = [changed(record, change(run, epoch, record)).to_json() for epoch, record in records]
        write_json_lines(folder.run(run) / "metrics.jsonl", lines)
    return of


def compared(path: Path, change: Change) -> tuple[Recipe, Results]:
    of = write(recipe(seeds=2, eval_every=2, flatness_every=2, out=path / "run"), change)
    return of, RunFolder(of.folder).results(of)


def shown(of: Recipe, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what `steppe plot` prints, without its figures."""
    monkeypatch.setattr(page, "save_all", lambda drawings, folder: [])
    for section in Figures.SECTIONS:
        monkeypatch.setattr(Figures, section, lambda self: [])
    console = Console(file=io.StringIO(), width=200)
    plot(of.folder, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def strict(text: str) -> Any:
    """Read JSON as other programs do, to which NaN and Infinity are errors."""

    def refuse(name: str) -> float:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize("kind", CHANGES)
def test_comparison_is_reported(kind: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, results = compared(tmp_path, CHANGES[kind](value))
    text = shown(of, monkeypatch)
    summary = strict((of.folder / "summary.json").read_text())
    (verdict,) = summary["verdicts"]
    markdown = (of.folder / "summary.md").read_text()
    (note,) = re.findall("^- SAM against SGD.*", markdown, re.M)
    if kind in ("a run's end", "a base's end", "a method", "all", "both signs"):
        assert "not finite: no verdict" in note
        assert verdict["comparisons"][0]["difference"]["lost"] == (1 if "end" in kind else 2)
        assert "2 paired runs" in note
        assert verdict["verdict"] == "no verdict"
        assert any("not finite" in sentence for sentence in summary["advice"])
        assert "not finite" in text
    else:
        assert note.count(": better") == 2, note
    assert "One run of each" not in (of.folder / "report.html").read_text()  # one of two is lost
    if kind == "the beginning":  # the best moment is another one
        (control,) = [c for c in verdict["comparisons"] if c["control"] == "best_held_out"]
        assert control["verdict"] == "better"
    if math.isnan(value) and kind in ("a method", "all"):
        assert "nan" in markdown
    if kind in ("a run's end", "a method"):
        result = ComparisonResult(of, results, plot(of.folder, Console(quiet=True)))  # type: ignore[arg-type]
        assert str(result.best) == "sgd"


@pytest.mark.parametrize("value", [math.nan, 1e300])
def test_figures_have_gaps_and_name_the_methods(value: float, tmp_path: Path) -> None:
    of, results = compared(tmp_path, CHANGES["a method"](value))
    drawn = {d.stem: d.figure for d in curves.drawings(of, results) if d.stem in ("overview", "pareto", "sharpness")}
    assert len(drawn) == 3
    for name, figure in drawn.items():
        assert re.search(r"not finite[^.]*SAM", figure.get_suptitle()), name
        assert "SGD" not in figure.get_suptitle().partition("not finite")[2], name


@pytest.mark.parametrize("kind", ["all", "both signs", "the beginning"])
def test_figures_are_drawn_where_nothing_is_finite(kind: str, tmp_path: Path) -> None:
    of, results = compared(tmp_path, CHANGES[kind](math.inf))
    for drawing in curves.drawings(of, results):
        if drawing.stem in ("gap", "sharpness"):
            assert "not finite, of SGD, SAM" in drawing.figure.get_suptitle()  # drawn by then


def test_tips_stay_at_their_markers_beside_a_gap(tmp_path: Path) -> None:
    of, results = compared(tmp_path, CHANGES["the beginning"](math.nan))
    (drawing,) = [d for d in curves.drawings(of, results) if d.stem == "gap"]
    svg = drawing.panel(0, {"SGD": "sgd", "SAM": "sam"}, "gap")
    assert [tip.partition(":")[0] for tip in re.findall("<title>(.*?)</title>", svg)] == ["SGD", "SAM"]
    assert "nan" not in svg


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (kind, value)
        for i, kind in enumerate(["a run's end", "a method", "all", "both signs"])
        for j, value in enumerate(NUMBERS)
        if (i + j) % 2 == 0 or kind == "a method"  # whose picture is drawn
    ],
)
def test_double_descent_is_reported(kind: str, value: float, tmp_path: Path) -> None:
    fields = {
        "seeds": 2,
        "eval_every": 2,
        "flatness_every": 2,
        "widths": (1, 2, 3),
        "width": Recipe().model.width,
        "out": tmp_path / "run",
    }
    of = write(recipe(**fields), CHANGES[kind](value))
    summary = double_descent.summarize(of)
    notes = list(summary.notes())
    assert any("SAM: test error is not finite at width 1, 2, 3, so its peak is not known" in note for note in notes)
    assert not any(str(peak.method) == "sam" for peak in summary.peaks)
    summary.write(RunFolder(of.folder))
    strict((of.folder / "summary.json").read_text())
    if kind == "a method":
        Drawing("double_descent", lambda: double_descent_figure._plot(of, summary)).figure.draw_without_rendering()


@pytest.mark.parametrize("value", NUMBERS)
def test_search_is_reported(value: float, tmp_path: Path) -> None:
    """A trial whose other measures are not finite is complete, and one whose mean is not usable is the last."""
    of = recipe(seeds=2, methods=("sam",), out=tmp_path)
    options = TuningOptions(search=("rho=0.05,0.1,0.2",), sampler="grid")
    searched = spaces(of, options.search, baseline=False)
    (space,) = searched
    good = [record_of(run, 4) for run in of.runs()]
    other = [changed(record, {"train_accuracy": value, "gap": -value, "train_loss": value}) for record in good]
    bad = [changed(record, {"test_accuracy": value, "test_loss": value}) for record in good]
    trials = [
        TrialResult(str(space.spec), i, {"rho": rho}, "complete", runs)
        for i, (rho, runs) in enumerate(((0.05, bad), (0.1, good), (0.2, other)))
    ]
    result = TuningResult(of, options, searched, tmp_path, trials)
    (best,) = result.best
    assert {trial.number for trial in best.ranked[:2]} == {1, 2}
    assert best.ranked[2].number == 0
    assert math.isfinite(best.error or math.nan)
    result.write(RunFolder(tmp_path))
    strict((tmp_path / "summary.json").read_text())
    assert [TrialResult.from_json(json.loads(json.dumps(trial.to_json()))).number for trial in trials] == [0, 1, 2]
    result.show(Console(file=io.StringIO(), width=100))
    tuning_figure._figure(result, "rho").draw_without_rendering()


RETURNED: dict[str, Callable[[float], object]] = {
    "number": lambda x: x,
    "tensor": torch.tensor,
    "tensor of one element": lambda x: torch.tensor([x]),
    "numpy": lambda x: torch.tensor(x).numpy()[()],
    "array": lambda x: torch.tensor([x]).numpy(),
}


def with_functions(returned: object) -> Task:
    metric = Metric(lambda outputs, targets: returned)
    return classifier(metrics={"mine": metric}, final_measures=lambda model, stop: {"last": returned})


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.5])
@pytest.mark.parametrize("kind", RETURNED)
def test_result_of_a_users_function_is_a_number_of_its_record(kind: str, value: float, tmp_path: Path) -> None:
    task = with_functions(RETURNED[kind](value))
    run = task_run(task, "base", epochs=1)
    (record,) = train(run, tmp_path, task, CPU)
    assert train(run, tmp_path, task, CPU)[0].to_json().keys() == record.to_json().keys()  # from its checkpoint
    for name in ("test_mine", "last"):
        assert type(record[name]) is float
        assert record[name] == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "the metric mine returned NoneType, and a number is needed"),
        (torch.zeros(2), "the metric mine returned Tensor, and a number is needed"),
        (1j, "the metric mine returned complex, and a number is needed"),
    ],
)
def test_other_results_of_a_users_function_raise(returned: object, message: str, tmp_path: Path) -> None:
    task = with_functions(returned)
    with pytest.raises(ExperimentError, match=message):
        train(task_run(task, "base", epochs=1), tmp_path, task, CPU)


def test_final_measures_that_are_no_numbers_or_of_a_taken_name_raise(tmp_path: Path) -> None:
    for i, (found, message) in enumerate(
        [
            ({"last": None}, "the final measure last returned NoneType"),
            ({"steps": 1}, "'steps', which every record has"),
        ]
    ):
        task = classifier(final_measures=lambda model, stop, found=found: found)
        with pytest.raises(ExperimentError, match=message):
            train(task_run(task, "base", epochs=1), tmp_path / f"{i}", task, CPU)


def test_error_in_a_metric_is_one_line_with_the_users_own(tmp_path: Path) -> None:
    def ratio(outputs: Any, targets: Any) -> float:
        return 1 / 0

    task = classifier(metrics={"ratio": ratio})
    assert recipe_of(task).task.deciding.name == "ratio"
    with pytest.raises(ExperimentError, match=r"metric 'ratio' raised an error \(ZeroDivisionError.*: return 1 / 0$"):
        train(task_run(task, "base", epochs=1), tmp_path, task, CPU)
