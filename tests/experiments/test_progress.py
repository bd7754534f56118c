import io
from pathlib import Path

import pytest
from rich.console import Console
from tiny import recipe, train_run

from steppe.experiments.execution.progress import Bars, Lines, Reporter, TensorBoard, Together, reporter


def test_the_reporter_fits_the_terminal(tmp_path: Path) -> None:
    here, there = Console(file=io.StringIO(), force_terminal=True), Console(file=io.StringIO())
    assert type(reporter(recipe(), speaks=False, console=here)) is Reporter
    assert isinstance(reporter(recipe(), speaks=True, console=here), Bars)
    assert isinstance(reporter(recipe(), speaks=True, console=there), Lines)
    assert isinstance(reporter(recipe(tensorboard=True, out=tmp_path), speaks=True, console=there), Together)


def test_bars_show_loss_accuracies_speed_and_time(tmp_path: Path) -> None:
    file = io.StringIO()
    two = recipe(seeds=1)
    bars = Bars(two, Console(file=file, force_terminal=True, width=160))
    bars.interval = 0.0
    with bars:
        for run in two.runs():
            records = train_run(run, tmp_path / run.name, reporter=bars)
            bars._bars.refresh()
    shown = file.getvalue()
    for part in ("SGD seed 0", "SAM seed 0", "all runs", f"{records[-1].test_accuracy:.2f} %", "8/8"):
        assert part in shown
    begin = Bars(two, Console(file=io.StringIO(), force_terminal=True, width=160))
    run = next(two.runs())
    begin.begin(run, 1.0, [])
    begin.step(run, 1.5, 0.789, 1234.0)
    (task,) = [task for task in begin._bars.tasks if task.description == "SGD seed 0"]
    assert task.completed == 1.5
    assert "loss 0.789" in task.fields["detail"]
    assert "1,234 images/s" in task.fields["detail"]


def test_lines_are_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = next(recipe().runs())
    records = train_run(run, tmp_path, reporter=Lines())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(records) == 2
    assert lines[-1].startswith("SGD seed 0  standardized epoch 4/4  loss ")
    assert f"gap {records[-1].gap:5.2f}" in lines[-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_measurement(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = next(recipe().runs())
    with TensorBoard(tmp_path / "tensorboard") as board:
        records = train_run(run, tmp_path / "run", reporter=board)
    log = EventAccumulator(str(tmp_path / "tensorboard" / run.name)).Reload()
    assert [(event.step, event.value) for event in log.Scalars("gap")] == [
        (r.standardized_epoch, pytest.approx(r.gap, rel=1e-5)) for r in records
    ]
