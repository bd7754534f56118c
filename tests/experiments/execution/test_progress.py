import io
from pathlib import Path

import pytest
from rich.console import Console
from tiny import image_record, recipe, train_run

from steppe.experiments.execution.progress import JobProgress, ProgressDisplay, RunProgress


def terminal(width: int = 160) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width)


def printed(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_bars_show_loss_accuracies_speed_and_time(tmp_path: Path) -> None:
    console, two = terminal(), recipe(seeds=1)
    progress = RunProgress(console, sum(run.standardized_epochs for run in two.runs()))
    progress.interval = 0.0
    with progress:
        for run in two.runs():
            records = train_run(run, tmp_path / run.name, reporter=progress)
            progress._bars.refresh()
    for part in ("SGD seed 0", "SAM seed 0", "all runs", f"{records[-1]['test_accuracy']:.2f} %", "8/8"):
        assert part in printed(console)
    progress = RunProgress(terminal(), 8)
    run = next(two.runs())
    progress.begin(run, 1.0, [])
    progress.step(run, 1.5, 0.789, 1234.0)
    (task,) = [task for task in progress._bars.tasks if task.description == "SGD seed 0"]
    assert task.completed == 1.5
    assert "loss 0.789" in task.fields["detail"]
    assert "1,234 images/s" in task.fields["detail"]


def test_several_runs_have_a_bar_each_and_one_that_begins_again_moves_back() -> None:
    progress = RunProgress(terminal(), 8)
    first, second = recipe().runs()
    for run, epoch in ((first, 2.0), (second, 1.0), (first, 1.0)):
        progress.begin(run, epoch, [])
    completed = {task.description: task.completed for task in progress._bars.tasks}
    assert completed == {"all runs": 2.0, "SGD seed 0": 1.0, "SAM seed 0": 1.0}
    progress.end(first, [image_record(4, 2, 10, 100, 2.0, 0.1, 99.0, 0.5, 80.0, 19.0, 1.0, 1.0)])
    completed = {task.description: task.completed for task in progress._bars.tasks}
    assert completed == {"all runs": 5.0, "SAM seed 0": 1.0}


def test_without_a_terminal_each_measurement_is_a_plain_line(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    run = next(recipe().runs())
    with RunProgress(console, run.standardized_epochs) as progress:
        records = train_run(run, tmp_path, reporter=progress)
    lines = printed(console).splitlines()
    assert len(lines) == len(records) == 2
    assert lines[-1].startswith("SGD seed 0  standardized epoch 4/4  loss ")
    assert f"gap {records[-1]['gap']:5.2f}" in lines[-1]
    assert f"test {records[-1]['test_accuracy']:5.2f} %" in lines[-1]


@pytest.mark.parametrize(("epoch", "state"), [(1.5, "resumes"), (4.0, "is finished")])
def test_without_a_terminal_a_resumed_run_is_a_plain_line(epoch: float, state: str) -> None:
    console = Console(file=io.StringIO(), width=80)
    RunProgress(console, 4, "validation").begin(next(recipe().runs()), epoch, [])
    assert printed(console) == f"SGD seed 0: {state} at standardized epoch {epoch:.2f}\n"


def test_late_message_of_a_finished_job_shows_no_bar() -> None:
    progress = JobProgress(terminal(100), 2)
    progress.show("a", "ascending", 1)
    progress.show("b", "ascending", 1)
    progress.done("a")
    progress.show("a", "ascending", 2)
    assert list(progress._tasks) == ["b"]


@pytest.mark.parametrize("width", [80, 60])
def test_narrow_terminal_shortens_only_the_detail(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    display = ProgressDisplay(console, "all runs", 80, "standardized epochs")
    display.update("run", "package:factory: 0", 3, 20, "loss 0.123  train 88.11 %  test 81.22 %  1,234 images/s")
    console.print(display._bars.get_renderable())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("package:factory: 0", "3/80", "3/20", "-:--:--", "loss 0.1", "…"):
        assert part in text
