"""Logs of a comparison: each measurement once, whatever stops, dies or fails; a fake in the place of each service."""

import io
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from executing import FakeRay
from rich.console import Console
from tiny import RecordingReporter, command_line, options, recipe, train_run

from steppe.experiments import Log, LoggedRun
from steppe.experiments.config.recipe import Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.logs import Logging, make_logs
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import RunFolder
from steppe.experiments.training.reporter import Reporter


class Memory(Log):
    """Keeps what it gets; fails at one step."""

    name = "memory"

    def __init__(self, fails_at: int = 0) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.values: dict[str, Mapping[str, float]] = {}
        self.fails_at = fails_at

    def open(self, run: LoggedRun, known: str | None, step: int) -> str:
        self.calls.append(("open", (run.name, known, step)))
        return f"id of {run.name}"

    def record(self, run: LoggedRun, step: int, values: Mapping[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("no network")
        self.calls.append(("record", (run.name, step)))
        self.values[run.name] = values

    def close(self, run: LoggedRun, *, finished: bool) -> None:
        self.calls.append(("close", (run.name, finished)))

    @property
    def steps(self) -> list[int]:
        return [values[1] for name, values in self.calls if name == "record"]


@contextmanager
def logging(folder: Path, *logs: Log, reporter: Reporter | None = None) -> Iterator[tuple[Logging, io.StringIO]]:
    printed = io.StringIO()
    with Logging(logs, reporter or Reporter(), RunFolder(folder), Console(file=printed, width=200)) as found:
        yield found, printed


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Record]]:
    """A run and its records, at the standardized epochs 2 and 4."""
    run = next(recipe(name="tiny").runs())
    return run, train_run(run, tmp_path_factory.mktemp("run"))


def test_run_is_opened_logged_and_closed_and_its_progress_is_forwarded(
    tmp_path: Path, trained: tuple[Run, list[Record]]
) -> None:
    run, records = trained
    memory, reporter = Memory(), RecordingReporter()
    with logging(tmp_path, memory, reporter=reporter) as (logs, _):
        logs.begin(run, 0.0, [])
        logs.step(run, 0.5, 2.3, 100.0)
        for record in records:
            logs.measured(run, record)
        logs.end(run, records)
    assert memory.calls == [
        ("open", (run.name, None, 0)),
        ("record", (run.name, 2)),
        ("record", (run.name, 4)),
        ("close", (run.name, True)),
    ]
    assert memory.values[run.name]["test_accuracy"] == records[-1]["test_accuracy"]
    assert (reporter.records, reporter.steps) == (records, [2.3])


def test_resumed_run_is_logged_once_and_known_by_its_id(tmp_path: Path, trained: tuple[Run, list[Record]]) -> None:
    run, records = trained
    first, second, third = Memory(), Memory(), Memory()
    with logging(tmp_path, first) as (logs, _):
        logs.begin(run, 0.0, [])
        logs.measured(run, records[0])
        logs.begin(run, 1.0, [])  # its worker died, and the run is measured there again
        logs.measured(run, records[0])
    assert (first.steps, first.calls[-1]) == ([2], ("close", (run.name, False)))
    with logging(tmp_path, second) as (logs, _):
        logs.begin(run, 2.0, records[:1])
        logs.measured(run, records[1])
        logs.end(run, records)
    assert second.calls[:2] == [("open", (run.name, f"id of {run.name}", 2)), ("record", (run.name, 4))]
    with logging(tmp_path, third) as (logs, _):  # a finished run: nothing to log, and so nothing to open
        logs.begin(run, 4.0, records)
        logs.end(run, records)
    assert third.calls == []


def test_measurements_from_before_there_was_a_log_are_logged(tmp_path: Path, trained: tuple[Run, list[Record]]) -> None:
    run, records = trained
    memory = Memory()
    with logging(tmp_path, memory) as (logs, _):
        logs.begin(run, 4.0, records)
        logs.end(run, records)
    assert memory.steps == [2, 4]


def test_error_of_a_service_is_one_line_and_the_next_session_logs_what_is_missing(
    tmp_path: Path, trained: tuple[Run, list[Record]]
) -> None:
    run, records = trained
    failing, reporter, working = Memory(fails_at=2), RecordingReporter(), Memory()
    with logging(tmp_path, failing, reporter=reporter) as (logs, printed):
        logs.begin(run, 0.0, [])
        for record in records:
            logs.measured(run, record)
        logs.end(run, records)
    assert printed.getvalue().count("\n") == 1
    assert "memory: sgd-seed0 is not logged from here on (ConnectionError: no network)" in printed.getvalue()
    assert (failing.steps, reporter.records) == ([], records)
    with logging(tmp_path, working) as (logs, _):
        logs.begin(run, 4.0, records)
        logs.end(run, records)
    assert working.steps == [2, 4]


def test_damaged_note_stops_the_log_and_nothing_else(tmp_path: Path, trained: tuple[Run, list[Record]]) -> None:
    run, records = trained
    note = RunFolder(tmp_path).run(run) / "log-memory.json"
    note.parent.mkdir(parents=True)
    note.write_text('{"known": 3}')
    memory = Memory()
    with logging(tmp_path, memory) as (logs, printed):
        logs.begin(run, 4.0, records)
        logs.end(run, records)
    assert memory.calls == []
    assert "delete it to log sgd-seed0 from its beginning" in printed.getvalue()


def scalars(folder: Path, name: str = "gap") -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars(name)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_event_files_of_tensorboard_have_each_measurement_once(
    tmp_path: Path, trained: tuple[Run, list[Record]]
) -> None:
    run, records = trained
    for known in (0, 1, 2):  # three sessions
        with logging(tmp_path, *make_logs(["tensorboard"])) as (logs, printed):
            logs.begin(run, 2.0 * known, records[:known])
            for record in records[known : known + 1]:
                logs.measured(run, record)
        assert printed.getvalue() == ""
    expected = [(r.standardized_epoch, pytest.approx(r["gap"], rel=1e-5)) for r in records]
    assert scalars(tmp_path / "tensorboard" / run.name) == expected


class FakeWandB(ModuleType):
    """In the place of `wandb`."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[str, int]] = []
        self.finished: list[int] = []
        self.Settings = lambda **values: values

    def init(self, **values: Any) -> SimpleNamespace:
        self.inits.append(values)
        known = values["id"] or f"new-{values['name']}"
        return SimpleNamespace(
            id=known,
            log=lambda numbers, step: self.logged.append((known, step)),
            finish=lambda exit_code: self.finished.append(exit_code),
        )


def test_wandb_continues_the_run_of_its_id(
    tmp_path: Path, trained: tuple[Run, list[Record]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, records = trained
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandB())
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for known in (0, 1):
        with logging(tmp_path, *make_logs(["wandb"])) as (logs, printed):
            logs.begin(run, 2.0 * known, records[:known])
            logs.measured(run, records[known])
            if known:
                logs.end(run, records)
        assert printed.getvalue() == ""
    assert [(one["id"], one["resume"], one["group"]) for one in wandb.inits] == [
        (None, None, "tiny"),
        (f"new-{run.name}", "allow", "tiny"),
    ]
    assert (wandb.inits[0]["project"], wandb.inits[0]["config"]["lr"]) == ("steppe", run.recipe.training.lr)
    assert (wandb.logged, wandb.finished) == ([(f"new-{run.name}", 2), (f"new-{run.name}", 4)], [1, 0])


class FakeMLflow(ModuleType):
    """In the place of `mlflow` and of `mlflow.entities`."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.experiments: dict[str, str] = {}
        self.params = dict[str, str]()
        self.metrics: list[tuple[str, str, int]] = []
        self.status: list[tuple[str, str]] = []
        self.MlflowClient = lambda: self
        self.Metric = lambda key, value, timestamp, step: (key, step)
        self.Param = lambda key, value: (key, value)

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        assert name not in self.experiments
        self.experiments[name] = "7"
        return "7"

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        assert experiment == "7"
        return SimpleNamespace(info=SimpleNamespace(run_id=f"new-{run_name}"))

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        self.params |= dict(params)
        self.metrics += [(run, *metric) for metric in metrics]

    def set_terminated(self, run: str, status: str) -> None:
        self.status.append((run, status))


def test_mlflow_continues_the_run_of_its_id_and_gets_names_that_it_takes(
    tmp_path: Path, trained: tuple[Run, list[Record]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, records = trained
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", mlflow)
    half = Record(**vars(records[0]) | {"measures": {**records[0].measures, "test_accuracy (half 1)": 1.0}})
    for known, record in ((0, half), (1, records[1])):
        with logging(tmp_path, *make_logs(["mlflow"])) as (logs, printed):
            logs.begin(run, 2.0 * known, records[:known])
            logs.measured(run, record)
            if known:
                logs.end(run, records)
        assert printed.getvalue() == ""
    name = f"new-{run.name}"
    assert [step for _, key, step in mlflow.metrics if key == "gap"] == [2, 4]
    assert (name, "test_accuracy half 1", 2) in mlflow.metrics
    assert mlflow.status == [(name, "KILLED"), (name, "RUNNING"), (name, "FINISHED")]
    assert (mlflow.params["lr"], mlflow.params["method"]) == (str(run.recipe.training.lr), "sgd")


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("tensorboard", "torch.utils.tensorboard", "pip install 'steppe[tensorboard]'"),
        ("wandb", "wandb", "pip install wandb"),
        ("mlflow", "mlflow", "pip install mlflow"),
    ],
)
def test_missing_package_is_an_error_that_says_how_to_install_it(
    name: str, module: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExperimentError, match=f"--log {name} needs a package that is not installed") as error:
        make_logs([name])
    assert str(error.value).endswith(install)


def test_service_that_refuses_its_configuration_is_an_error_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses() -> None:
        raise RuntimeError("no such store\nand much more")

    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    sys.modules["mlflow"].MlflowClient = refuses  # type: ignore[attr-defined]
    with pytest.raises(
        ExperimentError, match=r"^--log mlflow: nothing can be logged there \(RuntimeError: no such store"
    ):
        make_logs(["mlflow"])


def test_command_logs_each_run_to_several_services_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandB())
    monkeypatch.setitem(sys.modules, "ray", FakeRay(sam_seed0=1))  # a worker that dies once
    fields = options(out=tmp_path, epochs=2, log="wandb tensorboard", on="ray", gpus_per_run=0)
    for _ in range(2):
        assert command_line(["compare", "demo", *fields], draws=False) == 0
    assert "its worker died" in capsys.readouterr().out
    assert Counter(wandb.logged) == {("new-sgd-seed0", 1): 1, ("new-sgd-seed0", 2): 1, ("new-sam-seed0", 2): 1}
    assert [step for step, _ in scalars(tmp_path / "tensorboard" / "sam-seed0")] == [2]
