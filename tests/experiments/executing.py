"""Executors under test, and a command line in a process of its own."""

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import RecordingReporter, make_task, options, recipe, untimed

from steppe.experiments.config.recipe import Run
from steppe.experiments.execution.executor import ExecutionOptions, Job, Outcome
from steppe.experiments.execution.forwarding import EVENTS
from steppe.experiments.execution.launch import start_executor
from steppe.experiments.storage.records import read_records
from steppe.experiments.training.stopping import Stop

TINY = Path(__file__).with_name("tiny.py")
FIELDS: dict[str, Any] = {"epochs": 8, "extra_epochs": 8, "eval_every": 4}
DEMO = {"channels_last": True}


def jobs(folder: Path, **fields: object) -> Iterator[Job]:
    return (Job(run, folder / run.name) for run in recipe(**fields).runs())


class EventRecorder(RecordingReporter):
    """Records every call of a reporter's methods."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[object, ...]] = []

    def begin(self, run: Run, *rest: object) -> None:
        self.all.append(("begin", run, *rest))

    def step(self, run: Run, *rest: object) -> None:
        self.all.append(("step", run, *rest))

    def measured(self, run: Run, *rest: object) -> None:
        self.all.append(("measured", run, *rest))

    def end(self, run: Run, *rest: object) -> None:
        self.all.append(("end", run, *rest))


class DeadError(Exception):
    pass


class BugError(DeadError):
    pass


class FakeRay:
    """A Ray of two CPUs that executes each task at once; `deaths` is how often the worker of a run dies."""

    exceptions = SimpleNamespace(RayError=DeadError, RayTaskError=BugError)

    def __init__(self, **deaths: int) -> None:
        self.deaths, self.most_at_once = deaths, 0

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, object]]:
        return [
            {"NodeID": "here", "Alive": True, "Resources": {"CPU": 2.0}},
            {"NodeID": "gone", "Alive": False, "Resources": {"CPU": 64.0}},
        ]

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(get_node_id=lambda: "here")

    def put(self, value: object) -> object:
        return value

    def remote(self, **_: object) -> Callable[[object], SimpleNamespace]:
        return lambda work: SimpleNamespace(remote=partial(partial, work))

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.most_at_once = max(self.most_at_once, len(references))
        return references[:1], references[1:]

    def get(self, reference: "partial[object]") -> object:
        name = re.sub(r"\W", "_", reference.args[0].job.run.name) if reference.args else ""
        if self.deaths.get(name, 0):
            self.deaths[name] -= 1
            raise DeadError("The worker was killed.\nAnd much more.")
        return reference()

    def cancel(self, reference: object, force: bool) -> None:
        pass


def train_on_ray(
    ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[list[Outcome], str]:
    monkeypatch.setitem(sys.modules, "ray", ray)
    console = Console(file=io.StringIO(), width=300)
    fields = {"epochs": 2, "seeds": 2}
    with start_executor(recipe(**fields), ExecutionOptions("ray", **options), console) as executor:
        work = jobs(tmp_path, **fields)
        outcomes = list(executor.run(work, make_task(), tmp_path, RecordingReporter(), Stop()))
    return outcomes, console.file.getvalue()  # type: ignore[attr-defined]


def assert_same(runs: Path, wanted: Path) -> None:
    for run in ("sgd-seed0", "sam-seed0"):
        ours, theirs = (read_records((path / run / "metrics.jsonl").read_text()) for path in (runs, wanted))
        assert len(theirs) == (2 if run == "sgd-seed0" else 4)
        assert untimed(ours) == untimed(theirs)
        weights, others = (
            torch.load(path / run / "checkpoint.pt", weights_only=True)["model"] for path in (runs, wanted)
        )
        assert all(map(torch.equal, weights.values(), others.values()))


def worker(folder: Path) -> int:
    """Return the id of the process that trains a run."""
    begins = [json.loads(line) for line in (folder / EVENTS).read_text().splitlines() if "begin" in line]
    return int(begins[-1]["pid"])


def start_process(out: Path, *words: str) -> "subprocess.Popen[str]":
    """Start a comparison in its own process and process group, as a shell does."""
    fields = options(out=out, checkpoint_seconds=0, **FIELDS)
    return subprocess.Popen(
        [sys.executable, str(TINY), "compare", "demo", *fields, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def within_an_epoch(folder: Path, process: "subprocess.Popen[str]", *, but: int = 0) -> int:
    """Wait until a run's checkpoint lies within an epoch; return the id of its worker, other than `but`."""
    wait_for(process, lambda: _checkpoint(folder)["batch"] and worker(folder) != but, "the run did not start")
    return worker(folder)


def measured(folder: Path, process: "subprocess.Popen[str]", *, standardized_epoch: float) -> None:
    """Wait until a run's checkpoint has the measurement at a standardized epoch."""
    wait_for(
        process,
        lambda: _checkpoint(folder)["records"][-1]["standardized_epoch"] >= standardized_epoch,
        "the run did not come to its measurement",
    )


def wait_for(process: "subprocess.Popen[str]", happened: Callable[[], bool], message: str) -> None:
    """Wait until something has happened in a process, whose files may not be there yet."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        with suppress(OSError, RuntimeError, IndexError):
            if happened():
                return
        time.sleep(0.01)
    raise AssertionError(message)


def _checkpoint(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return checkpoint
