"""Run the measurements that are missing, in order, until the time is up."""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gpu import process
from gpu.device_results import DeviceResults, digest
from gpu.measurements import BENCHMARKS, UNFINISHED, WITHOUT_GRAPHS, Measurement, measurements
from steppe.experiments.training.stopping import Stop

SECONDS_FOR_FIGURES = 20.0
"""Seconds at the end of a call that are left for drawing figures."""

MIN_SECONDS = 30.0
"""A training is not started with fewer seconds left, because compiling alone may take as long."""

MAX_SECONDS_WITHOUT_SAVING = 240.0
"""A training that runs for longer and saves nothing has failed."""


class Session:
    """One call of run.py: measure what is missing, in the order of the list."""

    def __init__(self, args: argparse.Namespace, stop: Stop) -> None:
        self.args, self.stop, self.results = args, stop, DeviceResults(args)
        self._ends = time.monotonic() + 60 * args.minutes - SECONDS_FOR_FIGURES
        self._interrupt = args.interrupt

    @property
    def seconds_left(self) -> float:
        """Seconds until no further measurement may run."""
        return self._ends - time.monotonic()

    def measurements(self) -> Iterator[Measurement]:
        """Yield the measurements selected by --only; all of them by default."""
        return (each for each in measurements() if not self.args.only or each.name in self.args.only)

    def status(self, measurement: Measurement) -> str:
        """Return "done", "failed", "started" or "to do"."""
        if self.results.result(measurement.name) is not None:
            return "done"
        failure = self.results.failure(measurement.name)
        if failure is not None and failure["code"] == digest(measurement.code) and not self.args.again:
            return "failed"
        return "started" if self.results.run_folder(measurement.name).exists() else "to do"

    def show(self) -> None:
        """Print the status of each measurement."""
        for each in self.measurements():
            status = self.status(each)
            failure = self.results.failure(each.name) if status == "failed" else None
            print(f"{status:7} {each.name:14} {each.title}{': ' + failure['reason'] if failure else ''}")

    def run(self) -> None:
        """Measure until the time is up, a signal arrives, or nothing is left."""
        for each in self.measurements():
            if self.status(each) in ("done", "failed"):
                continue
            least = MIN_SECONDS + process.GRACE if each.resumable else 60 * each.minutes
            if self.seconds_left < least:
                left = max(self.seconds_left, 0) / 60
                _print(each, f"postponed: it takes {least / 60:.1f} minutes, and {left:.1f} are left")
            elif not self._measure(each):
                return

    def _measure(self, measurement: Measurement) -> bool:
        """Run a measurement; return True if there may be time for further ones."""
        name, log = measurement.name, self.results.log(measurement.name)
        if self.results.failure(name) is not None:
            # The failed code has changed (or --again is given), so its unfinished runs are deleted.
            shutil.rmtree(self.results.run_folder(name), ignore_errors=True)
            self.results.clear_failure(name)
        saved = self._saved_files(measurement)
        ended = self._run_process(measurement, log)
        took = f"{ended.seconds:.0f} s"
        if ended.status == 0 and self.results.result(name) is not None:
            _print(measurement, f"done in {took}{_summary(log)}")
            return True
        if self.stop:
            _print(measurement, f"stopped after {took}")
            return False
        unfinished = measurement.resumable and (ended.status == UNFINISHED or ended.stopped)
        if unfinished and (ended.seconds < MAX_SECONDS_WITHOUT_SAVING or self._saved_files(measurement) != saved):
            _print(measurement, f"not finished after {took}: the next call resumes it")
            return False
        reason = f"it saved nothing in {took}" if unfinished else _reason(measurement, ended)
        if measurement.training and self._disable_graphs(measurement):
            _print(measurement, f"failed ({reason}); once more, without CUDA graphs")
            return self.seconds_left < MIN_SECONDS + process.GRACE or self._measure(measurement)
        self.results.record_failure(name, reason, digest(measurement.code))
        _print(measurement, f"failed after {took}: {reason}; {log}")
        return True

    def _run_process(self, measurement: Measurement, log: Path) -> process.Ended:
        seconds, grace = 60 * measurement.minutes, 5.0
        if measurement.resumable:
            seconds, grace = min(seconds, self.seconds_left - process.GRACE), process.GRACE
        return process.run(self._command(measurement), log, seconds, self.stop, grace=grace)

    def _command(self, measurement: Measurement) -> list[str]:
        args = self.args
        given = [name for name in measurement.inputs if getattr(args, name) is not None]
        command = [sys.executable, str(BENCHMARKS / measurement.script), *measurement.options]
        command += ["--device", args.device, "--results", str(args.results), "--command", measurement.command(given)]
        command += ["--machine", args.machine] if args.machine else []
        command += ["--tiny"] if args.tiny else []
        for name in given:
            command += [f"--{name}", str(getattr(args, name))]
        if self._interrupt and measurement.training:
            command, self._interrupt = [*command, "--interrupt"], False
        return command

    def _saved_files(self, measurement: Measurement) -> list[tuple[str, int]]:
        """Return the files of a training's runs and their times, without its plan.json, which every call writes."""
        files = (self.results.run_folder(measurement.name) / "runs").rglob("*")
        return sorted((str(file), file.stat().st_mtime_ns) for file in files)

    def _disable_graphs(self, measurement: Measurement) -> bool:
        """Train without CUDA graphs from now on; return False if that was tried before."""
        mark = self.results.run_folder(measurement.name) / WITHOUT_GRAPHS
        if mark.exists():
            return False
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        return True


def _print(measurement: Measurement, message: str) -> None:
    print(f"{measurement.name}: {message}", flush=True)


def _reason(measurement: Measurement, ended: process.Ended) -> str:
    if ended.stopped:
        return f"it took longer than {measurement.minutes:g} minutes"
    return f"exit status {ended.status}" if ended.status else "it ended without a result"


def _summary(log: Path) -> str:
    """Return the last line of a log if it begins with "= ", the mark of a summary."""
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return f": {lines[-1].removeprefix('= ')}" if lines and lines[-1].startswith("= ") else ""
