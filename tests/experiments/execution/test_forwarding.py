from pathlib import Path

import pytest
from executing import EventRecorder, jobs
from mutations import mutate
from tiny import CPU, RecordingReporter, make_task, recipe, train_run

from steppe.experiments.execution.forwarding import EVENTS, EventReader, EventWriter, TensorBoard
from steppe.experiments.execution.launch import InProcessExecutor
from steppe.experiments.storage.records import Record
from steppe.experiments.training.run import train
from steppe.experiments.training.stopping import Stop


def test_reader_forwards_every_event_of_the_writer(tmp_path: Path) -> None:
    run = next(recipe().runs())
    direct, forwarded = EventRecorder(), EventRecorder()
    (tmp_path / EVENTS).write_text('{"event": "end", "arguments": [[]]}\n')  # of an earlier session
    reader = EventReader(run, tmp_path, forwarded)

    class Both(EventWriter):
        def step(self, *values: object) -> None:
            super().step(*values)  # type: ignore[arg-type]
            direct.step(*values)  # type: ignore[arg-type]
            reader.poll()

    records = train(run, tmp_path, make_task()(run.recipe), CPU, Both(tmp_path, 0.0))
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"event": "st')  # killed while it wrote
    reader.poll()
    assert forwarded.all[0] == ("begin", run, 0.0, [])
    assert [call for call in forwarded.all if call[0] == "step"] == direct.all
    assert [call[2] for call in forwarded.all if call[0] == "measured"] == records
    assert forwarded.all[-1] == ("end", run, records)


def test_damaged_events_are_dropped(tmp_path: Path) -> None:
    run = next(recipe().runs())
    records = train_run(run, tmp_path / "run")
    writer = EventWriter(tmp_path, 0.0)
    writer.begin(run, 0.0, [])
    writer.step(run, 0.5, 2.3, 100.0)
    writer.measured(run, records[0])
    writer.end(run, records)
    intact = (tmp_path / EVENTS).read_text()
    forms = {"begin": [float, list], "step": [float] * 3, "measured": [Record], "end": [list]}
    for seed in range(200):
        reporter = EventRecorder()
        reader = EventReader(run, tmp_path, reporter)
        events = tmp_path / "events.jsonl"  # by this name, the values in it are damaged too
        events.write_text(intact)
        mutate(events, seed)
        events.rename(tmp_path / EVENTS)
        reader.poll()
        assert all([type(one) for one in arguments] == forms[str(name)] for name, _, *arguments in reporter.all)


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder / name)).Reload()
    return [(event.step, event.value) for event in log.Scalars("gap")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_measurement_is_logged(tmp_path: Path) -> None:
    run = next(recipe().runs())
    with TensorBoard(tmp_path / "tensorboard") as reporter:
        records = train_run(run, tmp_path / "run", reporter=reporter)
    expected = [(r.standardized_epoch, pytest.approx(r["gap"], rel=1e-5)) for r in records]
    assert logged(tmp_path / "tensorboard", run.name) == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_executor_logs_the_runs_that_ask_for_it_and_forwards_their_progress(tmp_path: Path) -> None:
    reporter = RecordingReporter()
    of, (job, *_) = recipe(tensorboard=True), jobs(tmp_path, tensorboard=True)
    list(InProcessExecutor(of, CPU).run([job], make_task(), tmp_path, reporter, Stop()))
    assert [step for step, _ in logged(tmp_path / "tensorboard", job.run.name)] == [2, 4]
    assert [record.standardized_epoch for record in reporter.records] == [2, 4]
    assert reporter.steps
