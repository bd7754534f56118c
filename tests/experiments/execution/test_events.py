from pathlib import Path

from executing import EventRecorder
from tiny import CPU, dataset, recipe

from steppe.experiments.execution.events import EVENTS, EventReader, EventWriter
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

    records = train(run, tmp_path, dataset(), CPU, Both(tmp_path, 0.0))
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"event": "st')  # killed while it wrote
    reader.poll()
    assert forwarded.all[0] == ("begin", run, 0.0, [])
    assert [call for call in forwarded.all if call[0] == "step"] == direct.all
    assert [call[2] for call in forwarded.all if call[0] == "measured"] == records
    assert forwarded.all[-1] == ("end", run, records)
