"""Reporters that forward the progress of a run to another process, by a file in its folder."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steppe.experiments.config.recipe import Run
from steppe.experiments.storage.records import Record, parse_record, parse_records
from steppe.experiments.training.reporter import Reporter

EVENTS = ".events.jsonl"


class EventWriter(Reporter):
    """Writes the progress into the run's folder, a line for each event."""

    def __init__(self, folder: Path, interval: float) -> None:
        self._path = folder / EVENTS
        self.interval = interval

    def begin(self, run: Run, standardized_epoch: float, records: Sequence[Record]) -> None:
        self._write("begin", standardized_epoch, records, host=platform.node(), pid=os.getpid())

    def step(self, run: Run, standardized_epoch: float, loss: float, samples_per_second: float) -> None:
        self._write("step", standardized_epoch, loss, samples_per_second)

    def measured(self, run: Run, record: Record) -> None:
        self._write("measured", record)

    def end(self, run: Run, records: Sequence[Record]) -> None:
        self._write("end", records)

    def _write(self, event: str, *arguments: Any, **process: Any) -> None:
        self._append(json.dumps({"event": event, "arguments": arguments, **process}, default=Record.to_json) + "\n")

    def _append(self, line: str) -> None:
        # opened anew for each line: on a network file system, other machines see a line when the file is closed
        with self._path.open("a") as file:
            file.write(line)


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
                event, arguments = _parse(line)
            except Exception:  # a damaged line, or the partial one of a killed process; it held no result
                continue
            getattr(self._reporter, event)(self._run, *arguments)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)


def _parse(line: bytes) -> tuple[str, list[Any]]:
    """Return the name of an event and its arguments; any error if the line is not one of `EventWriter`."""
    values = json.loads(line)
    match values["event"], values["arguments"]:
        case "begin", [epoch, records]:
            return "begin", [_number(epoch), parse_records(records)]
        case "step", [*numbers] if len(numbers) == 3:
            return "step", [_number(number) for number in numbers]
        case "measured", [record]:
            return "measured", [parse_record(record)]
        case "end", [records]:
            return "end", [parse_records(records)]
    raise ValueError("it is no event")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)
