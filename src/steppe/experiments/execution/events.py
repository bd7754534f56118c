"""Progress of a run in another process: a file of events in its folder, written there and read here."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steppe.experiments.config.recipe import Run
from steppe.experiments.storage.records import Record
from steppe.experiments.training.reporter import Reporter

EVENTS = ".events.jsonl"


class EventWriter(Reporter):
    """Writes the progress into the run's folder, a line for each event."""

    def __init__(self, folder: Path, interval: float) -> None:
        self._path = folder / EVENTS
        self.interval = interval

    def begin(self, run: Run, standardized_epoch: float, records: Sequence[Record]) -> None:
        self._write("begin", standardized_epoch, records, host=platform.node(), pid=os.getpid())

    def step(self, run: Run, standardized_epoch: float, loss: float, images_per_second: float) -> None:
        self._write("step", standardized_epoch, loss, images_per_second)

    def measured(self, run: Run, record: Record) -> None:
        self._write("measured", record)

    def end(self, run: Run, records: Sequence[Record]) -> None:
        self._write("end", records)

    def _write(self, event: str, *arguments: Any, **process: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # opened anew for each line: on a network file system, other machines see a line when the file is closed
        with self._path.open("a") as file:
            file.write(json.dumps({"event": event, "arguments": arguments, **process}, default=asdict) + "\n")


class EventReader:
    """Forwards the events of a run's `EventWriter` to a reporter."""

    def __init__(self, run: Run, folder: Path, reporter: Reporter) -> None:
        self._run, self._path, self._reporter = run, folder / EVENTS, reporter
        self._offset = 0
        self.close()  # drop the events of an earlier session

    def poll(self) -> None:
        """Forward the events that were written since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return
        lines, _, _ = content.rpartition(b"\n")  # the last line may be incomplete
        self._offset += len(lines) + 1 if lines else 0
        for line in lines.splitlines():
            try:
                event = json.loads(line, object_hook=lambda d: d if "event" in d else Record(**d))
            except ValueError:  # the partial line of a killed process; it held no result
                continue
            getattr(self._reporter, event["event"])(self._run, *event["arguments"])

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
