from pathlib import Path

import pytest
from executing import jobs
from tiny import CPU, RecordingReporter, dataset, recipe, train_run

from steppe.experiments.execution.local import InProcessExecutor
from steppe.experiments.execution.tensorboard import TensorBoard
from steppe.experiments.training.stopping import Stop


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder / name)).Reload()
    return [(event.step, event.value) for event in log.Scalars("gap")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_measurement_is_logged(tmp_path: Path) -> None:
    run = next(recipe().runs())
    with TensorBoard(tmp_path / "tensorboard") as reporter:
        records = train_run(run, tmp_path / "run", reporter=reporter)
    expected = [(r.standardized_epoch, pytest.approx(r.gap, rel=1e-5)) for r in records]
    assert logged(tmp_path / "tensorboard", run.name) == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_executor_logs_the_runs_that_ask_for_it_and_forwards_their_progress(tmp_path: Path) -> None:
    reporter = RecordingReporter()
    of, (job, *_) = recipe(tensorboard=True), jobs(tmp_path, tensorboard=True)
    list(InProcessExecutor(of, CPU).run([job], dataset(), tmp_path, reporter, Stop()))
    assert [step for step, _ in logged(tmp_path / "tensorboard", job.run.name)] == [2, 4]
    assert [record.standardized_epoch for record in reporter.records] == [2, 4]
    assert reporter.steps
