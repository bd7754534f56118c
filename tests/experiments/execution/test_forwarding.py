from pathlib import Path

from executing import EventRecorder
from mutations import mutate
from tiny import CPU, make_task, recipe, train_run

from steppe.experiments.execution.forwarding import EVENTS, EventReader, EventWriter
from steppe.experiments.storage.records import Record
from steppe.experiments.training.run import train


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
