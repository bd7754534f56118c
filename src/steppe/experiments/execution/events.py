"""How a run in another process tells how it goes: a file of events beside its metrics, and somebody who reads it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steppe.experiments.config.recipe import Run
from steppe.experiments.execution.progress import Reporter
from steppe.experiments.storage.records import Record

__all__ = ["EVENTS", "EventReader", "EventWriter"]

EVENTS = ".events.jsonl"


class EventWriter(Reporter):
    """Writes what it is told into a run's folder, a line an event."""

    def __init__(self, folder: Path, interval: float) -> None:
        self._path = folder / EVENTS
        self.interval = interval

    def begin(self, run: Run, standardized_epoch: float, records: Sequence[Record]) -> None:
        """Write where the unit starts, and in which process."""
        who = {"host": platform.node(), "pid": os.getpid()}
        self._write("begin", at=standardized_epoch, records=[asdict(r) for r in records], **who)

    def step(self, run: Run, standardized_epoch: float, loss: float, images_per_second: float) -> None:
        """Write how it trains."""
        self._write("step", at=standardized_epoch, loss=loss, speed=images_per_second)

    def measured(self, run: Run, record: Record) -> None:
        """Write the measurement."""
        self._write("measured", record=asdict(record))

    def end(self, run: Run, records: Sequence[Record]) -> None:
        """Write that it is finished."""
        self._write("end", records=[asdict(r) for r in records])

    def _write(self, what: str, **values: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # opened anew for each line: on a network file system that is what makes others see it
        with self._path.open("a") as file:
            file.write(json.dumps({"what": what, **values}) + "\n")


class EventReader:
    """Tells a reporter what a unit's `EventWriter` wrote since it was last asked."""

    def __init__(self, run: Run, folder: Path, reporter: Reporter) -> None:
        self._unit, self._path, self._reporter = run, folder / EVENTS, reporter
        self._read = 0
        self.close()  # what an earlier session left is no news

    def poll(self) -> None:
        """Tell what is new."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return
        lines, _, _ = content.rpartition(b"\n")  # the last line may not be whole yet
        self._read += len(lines) + 1 if lines else 0
        for line in lines.splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # the half line of a process that was killed: it is only news
                continue
            self._tell(event)

    def close(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)

    def _tell(self, event: dict[str, Any]) -> None:
        run, to = self._unit, self._reporter
        match event["what"]:
            case "begin":
                to.begin(run, event["at"], [Record(**values) for values in event["records"]])
            case "step":
                to.step(run, event["at"], event["loss"], event["speed"])
            case "measured":
                to.measured(run, Record(**event["record"]))
            case "end":
                to.end(run, [Record(**values) for values in event["records"]])
