"""Log the measurements of runs to TensorBoard, to Weights & Biases, to MLflow, or to a service of the user's own."""

import importlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from rich.console import Console

from steppe.experiments.config.recipe import Run
from steppe.experiments.errors import ExperimentError, typed
from steppe.experiments.execution.progress import print_line
from steppe.experiments.storage.files import read_checked, write_checked
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import RunFolder
from steppe.experiments.training.reporter import Reporter


@dataclass(frozen=True, eq=False)  # it is the same object in all calls of a Log
class LoggedRun:
    """A run, as a :class:`Log` gets it."""

    name: str
    """Of its folder: sam-seed0."""
    comparison: str
    """The name of the comparison: demo."""
    method: str
    seed: int
    options: Mapping[str, Any]
    """All options of the comparison by name, each a text, a number, a truth value, None or a list of these."""
    folder: Path
    """The run folder of the comparison."""


class Log:
    """A service that measurements are logged to: the base class for one of your own, `compare(..., log=MyLog())`.

    Several runs may be open at a time. What was logged is noted in the run's folder, so that a comparison that is
    resumed logs each measurement once, also those from before it was logged at all. An error of a method is printed in
    one line, and the training goes on; the same command later logs what is missing.
    """

    name: ClassVar[str] = "own"
    """The service, in messages and in the name of the file log-NAME.json of a run's folder."""

    def open(self, run: LoggedRun, known: str | None, step: int) -> str:
        """Begin a run, or continue the one that an earlier call returned as `known`; return what it is known by.

        `step` is the last one that was logged, 0 for none.
        """
        return run.name

    def record(self, run: LoggedRun, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a measurement by their names in metrics.jsonl; `step` is the standardized epoch."""
        raise NotImplementedError

    def close(self, run: LoggedRun, *, finished: bool) -> None:
        """End a run that was opened; it is not `finished` if the comparison was stopped."""


class TensorBoard(Log):
    """Event files in RUN/tensorboard."""

    name = "tensorboard"

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._writers = SummaryWriter, dict[LoggedRun, SummaryWriter]()

    def open(self, run: LoggedRun, known: str | None, step: int) -> str:
        folder = str(run.folder / "tensorboard" / run.name)
        # drops what was logged after the last step that was noted
        self._writers[run] = self._make(folder, purge_step=step + 1)
        return run.name

    def record(self, run: LoggedRun, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writers[run].add_scalar(name, value, step)
        self._writers[run].flush()  # or a killed process would have noted what is not in the file

    def close(self, run: LoggedRun, *, finished: bool) -> None:
        self._writers.pop(run).close()


class WandB(Log):
    """A run of Weights & Biases for each run, grouped by the comparison, in the project steppe or $WANDB_PROJECT."""

    name = "wandb"

    def __init__(self) -> None:
        self._wandb, self._runs = importlib.import_module("wandb"), dict[LoggedRun, Any]()

    def open(self, run: LoggedRun, known: str | None, step: int) -> str:
        opened = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "steppe"),
            group=run.comparison,
            job_type=run.method,
            name=run.name,
            config={**run.options, "method": run.method, "seed": run.seed},
            dir=str(run.folder),
            id=known,
            resume=None if known is None else "allow",
            reinit="create_new",  # several runs are open at a time
            settings=self._wandb.Settings(console="off", quiet=True),  # the terminal is the progress display's
        )
        self._runs[run] = opened
        return str(opened.id)

    def record(self, run: LoggedRun, step: int, values: Mapping[str, float]) -> None:
        self._runs[run].log(dict(values), step=step)

    def close(self, run: LoggedRun, *, finished: bool) -> None:
        self._runs.pop(run).finish(exit_code=0 if finished else 1)


class MLflow(Log):
    """A run of MLflow for each run, in an experiment by the comparison's name; $MLFLOW_TRACKING_URI says where."""

    name = "mlflow"

    def __init__(self) -> None:
        self._client = importlib.import_module("mlflow").MlflowClient()
        self._entities = importlib.import_module("mlflow.entities")
        self._ids = dict[LoggedRun, str]()

    def open(self, run: LoggedRun, known: str | None, step: int) -> str:
        if known is not None:
            self._client.set_terminated(known, "RUNNING")
            self._ids[run] = known
            return known
        found = self._client.get_experiment_by_name(run.comparison)
        experiment = self._client.create_experiment(run.comparison) if found is None else found.experiment_id
        opened = str(self._client.create_run(experiment, run_name=run.name).info.run_id)
        options = {**run.options, "method": run.method, "seed": run.seed}
        self._client.log_batch(
            opened, params=[self._entities.Param(name, str(value)) for name, value in options.items()]
        )
        self._ids[run] = opened
        return opened

    def record(self, run: LoggedRun, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        # a name of MLflow has no brackets: test_accuracy (half 1)
        named = {re.sub(r"[^\w./ -]", "", name): value for name, value in values.items()}
        self._client.log_batch(self._ids[run], [self._entities.Metric(k, v, now, step) for k, v in named.items()])

    def close(self, run: LoggedRun, *, finished: bool) -> None:
        self._client.set_terminated(self._ids.pop(run), "FINISHED" if finished else "KILLED")


_LOGS: Mapping[str, tuple[Callable[[], Log], str]] = MappingProxyType(
    {
        "tensorboard": (TensorBoard, "pip install 'steppe[tensorboard]'"),
        "wandb": (WandB, "pip install wandb"),
        "mlflow": (MLflow, "pip install mlflow"),
    }
)
"""The services by their names, and how to install what each needs."""


def make_logs(names: Iterable[str]) -> list[Log]:
    """Make the logs that a recipe names; ExperimentError where a package is missing."""
    return [_make(name) for name in names]


def _make(name: str) -> Log:
    kind, install = _LOGS[name]
    try:
        return kind()
    except ImportError as error:
        raise ExperimentError(f"--log {name} needs a package that is not installed ({error}): {install}") from error
    except Exception as error:  # of its configuration: better now than after hours of training
        raise ExperimentError(f"--log {name}: nothing can be logged there ({typed(error)}); or leave it out") from error


@dataclass
class _Entry:
    """What one log has of one run."""

    log: Log
    run: LoggedRun
    file: Path
    known: str | None = None
    step: int = 0
    is_open: bool = False
    failed: bool = False


class Logging(Reporter):
    """Logs the measurements of all runs, and forwards everything to another reporter, which stays the caller's."""

    def __init__(self, logs: Sequence[Log], reporter: Reporter, folder: RunFolder, console: Console) -> None:
        self._logs, self._reporter, self._folder, self._console = logs, reporter, folder, console
        self.interval = reporter.interval
        self._entries = dict[Run, list[_Entry]]()

    def begin(self, run: Run, standardized_epoch: float, records: Sequence[Record]) -> None:
        if run not in self._entries:  # else its worker died, and another one resumes it
            self._entries[run] = [self._entry(log, run) for log in self._logs]
        self._add(run, records)
        self._reporter.begin(run, standardized_epoch, records)

    def step(self, run: Run, standardized_epoch: float, loss: float, samples_per_second: float) -> None:
        self._reporter.step(run, standardized_epoch, loss, samples_per_second)

    def measured(self, run: Run, record: Record) -> None:
        self._add(run, [record])
        self._reporter.measured(run, record)

    def saved(self, run: Run) -> None:
        self._reporter.saved(run)

    def end(self, run: Run, records: Sequence[Record]) -> None:
        self._add(run, records)  # an event of a worker may have been lost
        self._close(run, finished=True)
        self._reporter.end(run, records)

    def __exit__(self, *exception: object) -> None:
        for run in list(self._entries):
            self._close(run, finished=False)

    def _entry(self, log: Log, run: Run) -> _Entry:
        file = self._folder.run(run) / f"log-{log.name}.json"
        recipe = run.recipe
        options = json.loads(json.dumps(recipe.options(), default=str))
        logged = LoggedRun(run.name, recipe.name, str(run.method), run.seed, options, self._folder.path)
        entry = _Entry(log, logged, file)
        with suppress(FileNotFoundError):
            try:
                entry.known, entry.step = read_checked(file, _noted, f"delete it to log {run.name} from its beginning")
            except ExperimentError as error:
                self._give_up(entry, str(error))
        return entry

    def _add(self, run: Run, records: Sequence[Record]) -> None:
        """Log the records that a log does not have."""
        for entry in self._entries.get(run, ()):
            for record in records:
                if record.standardized_epoch > entry.step and not entry.failed:
                    self._log(entry, record)

    def _log(self, entry: _Entry, record: Record) -> None:
        values = {name: float(value) for name, value in record.to_json().items() if name != "standardized_epoch"}
        try:
            if not entry.is_open:
                entry.known, entry.is_open = entry.log.open(entry.run, entry.known, entry.step), True
            entry.log.record(entry.run, record.standardized_epoch, values)
            entry.step = record.standardized_epoch
            write_checked(entry.file, {"known": entry.known, "standardized_epoch": entry.step})
        except Exception as error:  # of a service, of its network, or of the user's own code: no reason to stop a run
            self._give_up(entry, typed(error))

    def _close(self, run: Run, *, finished: bool) -> None:
        for entry in self._entries.pop(run, ()):
            if entry.is_open:
                try:
                    entry.log.close(entry.run, finished=finished)
                except Exception as error:
                    self._give_up(entry, typed(error))

    def _give_up(self, entry: _Entry, reason: str) -> None:
        if not entry.failed:
            print_line(
                self._console,
                f"{entry.log.name}: {entry.run.name} is not logged from here on ({reason}). The training goes on; the "
                "same command logs what is missing",
            )
        entry.failed = True


def _noted(values: Mapping[str, Any]) -> tuple[str, int]:
    """Return what a run is known by, and the last step that was logged; any error for other values."""
    known, step = values["known"], values["standardized_epoch"]
    if not isinstance(known, str) or not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"it notes {known!r} at step {step!r}")
    return known, step
