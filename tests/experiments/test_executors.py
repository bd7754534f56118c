"""Where runs are trained: the results do not depend on it, nor on what happens to the workers."""

import importlib.util
import io
import json
import multiprocessing
import os
import re
import signal
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
from tiny import CPU, Told, command_line, dataset, options, recipe, untimed

from steppe.experiments.config.recipe import Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution import cpus
from steppe.experiments.execution import ray as on_ray
from steppe.experiments.execution.cpus import available
from steppe.experiments.execution.events import EVENTS, EventReader, EventWriter
from steppe.experiments.execution.executor import ExecutionOptions, InProcess, Job, Outcome, failures
from steppe.experiments.execution.executor import start as begin
from steppe.experiments.execution.local import Processes
from steppe.experiments.storage.records import read_records
from steppe.experiments.training.run import train
from steppe.experiments.training.stopping import Stop

TINY = Path(__file__).with_name("tiny.py")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def jobs(folder: Path, **fields: object) -> Iterator[Job]:
    return (Job(run, folder / run.name) for run in recipe(**fields).runs())


def test_here_takes_the_next_job_only_when_the_last_one_has_ended(tmp_path: Path) -> None:
    taken: list[str] = []

    def watched() -> Iterator[Job]:
        for job in jobs(tmp_path, seeds=2, epochs=2):
            taken.append(job.run.name)
            yield job

    outcomes = InProcess(recipe(), CPU).run(watched(), dataset(), tmp_path, Told(), Stop())
    assert taken == []
    assert next(outcomes).job.run.name == "sgd-seed0"
    assert taken == ["sgd-seed0"]
    assert [outcome.job.run.name for outcome in outcomes] == ["sam-seed0", "sgd-seed1", "sam-seed1"]


def test_a_run_that_fails_does_not_end_the_others_and_is_told_of_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "demo", *options(seeds=2, out=tmp_path / "run")]
    damaged = tmp_path / "run" / "runs" / "sgd-seed0" / "checkpoint.pt"
    assert command_line(words, draws=False) == 0
    damaged.write_bytes(b"no checkpoint")
    (tmp_path / "run" / "runs" / "sam-seed1" / "checkpoint.pt").unlink()
    capsys.readouterr()
    assert command_line(words, draws=False) == 1
    out, err = capsys.readouterr()
    assert "SAM seed 1  standardized epoch 4/4" in out
    assert "SAM against SGD" in out
    assert err.count("\n") == 1
    assert f"the checkpoint {damaged} is damaged" in err


def test_several_failures_are_counted_and_told() -> None:
    one, two, three = (Job(run, Path()) for run in recipe(methods=("sgd", "sam", "asam")).runs())
    assert failures([Outcome(one), Outcome(two)]) is None
    assert failures([Outcome(one), Outcome(two, "no luck")]) == "no luck"
    told = failures([Outcome(one, "no luck"), Outcome(two), Outcome(three, "no disk")])
    assert told == "2 of 3 runs failed: (1) no luck; (2) no disk"


@pytest.mark.parametrize(
    ("field", "value", "meaning"),
    [("runs_at_once", 0, "at least 1"), ("cpus_per_run", 0, "at least 1"), ("gpus_per_run", -0.5, "0 or more")],
)
def test_a_wrong_room_is_named_with_its_meaning(field: str, value: float, meaning: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}={value}: .*{meaning}"):
        ExecutionOptions(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "answer"), [("--on ray", "Start steppe without torchrun"), ("--runs-at-once 2", "Leave one of them out")]
)
def test_torchrun_and_several_runs_at_a_time_do_not_mix(
    words: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line(["compare", *options(out=tmp_path / "run", norm="group"), *words.split()]) == 1
    assert answer in capsys.readouterr().err


def test_runs_at_once_are_not_for_ray() -> None:
    with pytest.raises(ValueError, match="say how much a run takes"):
        ExecutionOptions("ray", runs_at_once=2)


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({"cpu.max": "150000 50000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "500000", "cpu/cpu.cfs_period_us": "100000"}, 5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_the_limits_of_a_container_are_seen(
    files: dict[str, str], share: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert available(tmp_path) == share


@pytest.mark.parametrize(
    ("said", "threads", "most", "wanted"),
    [(None, 1, None, 4), (None, 2, None, 2), (None, 8, None, 1), (None, 1, 3, 3), (6, 2, None, 6), (6, 1, 1, 1)],
)
def test_as_many_at_a_time_as_the_cpus_have_room_for(
    said: int | None, threads: int, most: int | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "available", lambda: 4)
    with begin(recipe(threads=threads), ExecutionOptions(runs_at_once=said), Console(), most=most) as executor:
        assert executor.together == (wanted > 1)
        assert not isinstance(executor, Processes) or executor._room() == wanted


def test_a_missing_ray_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command_line(["compare", *options(out=tmp_path / "run"), "--on", "ray"]) == 1
    assert capsys.readouterr().err.endswith("pip install 'steppe[ray]'\n")
    assert not (tmp_path / "run").exists()


class Heard(Told):
    """Remembers all that a reporter can be told."""

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


def test_what_a_worker_tells_is_heard_word_for_word(tmp_path: Path) -> None:
    run = next(recipe().runs())
    direct, relayed = Heard(), Heard()
    (tmp_path / EVENTS).write_text('{"what": "end", "records": []}\n')  # of an earlier session
    event_reader = EventReader(run, tmp_path, relayed)

    class Both(EventWriter):
        def step(self, *told: object) -> None:
            super().step(*told)  # type: ignore[arg-type]
            direct.step(*told)  # type: ignore[arg-type]
            event_reader.poll()

    records = train(run, tmp_path, dataset(), CPU, Both(tmp_path, 0.0))
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"what": "st')  # killed while it wrote
    event_reader.poll()
    assert relayed.all[0] == ("begin", run, 0.0, [])
    assert [told for told in relayed.all if told[0] == "step"] == direct.all
    assert [told[2] for told in relayed.all if told[0] == "measured"] == records
    assert relayed.all[-1] == ("end", run, records)


# --- on a Ray that is made up, for what a real one does not do on demand ---


class DeadError(Exception):
    pass


class MistakeError(DeadError):
    pass


class MadeUp:
    """A Ray of two CPUs that does each task at once; `deaths` tells how often a unit's worker dies."""

    exceptions = SimpleNamespace(RayError=DeadError, RayTaskError=MistakeError)

    def __init__(self, **deaths: int) -> None:
        self.deaths, self.most = deaths, 0

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

    def put(self, value: object) -> object:
        return value

    def remote(self, **_: object) -> Callable[[object], SimpleNamespace]:
        return lambda work: SimpleNamespace(remote=partial(partial, work))

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.most = max(self.most, len(references))
        return references[:1], references[1:]

    def get(self, reference: "partial[object]") -> object:
        name = re.sub(r"\W", "_", reference.args[0].job.run.name) if reference.args else ""
        if self.deaths.get(name, 0):
            self.deaths[name] -= 1
            raise DeadError("The worker was killed.\nAnd much more.")
        return reference()

    def cancel(self, reference: object, force: bool) -> None:
        pass


def on(ray: MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **where: Any) -> tuple[list[Outcome], str]:
    monkeypatch.setitem(sys.modules, "ray", ray)
    console = Console(file=io.StringIO(), width=300)
    with begin(recipe(epochs=2, seeds=2), ExecutionOptions("ray", **where), console) as executor:
        work = jobs(tmp_path, epochs=2, seeds=2)
        outcomes = list(executor.run(work, dataset(), tmp_path, Told(), Stop()))
    return outcomes, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_worker_that_dies_again_and_again_is_given_up_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = MadeUp(sam_seed0=4, sgd_seed1=3)
    outcomes, told = on(ray, tmp_path, monkeypatch)
    assert ray.most == 2
    assert sorted(outcome.job.run.name for outcome in outcomes) == ["sam-seed0", "sam-seed1", "sgd-seed0", "sgd-seed1"]
    (failed,) = [outcome for outcome in outcomes if outcome.error is not None]
    assert failed.job.run.name == "sam-seed0"
    assert "its worker died 4 times, the last time because The worker was killed." in str(failed.error)
    assert told.count("its worker died (The worker was killed)") == 6
    assert (
        "sgd-seed1: its worker died (The worker was killed); it goes on from its checkpoint in another, retry 3" in told
    )


def test_a_run_that_fails_on_ray_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sam-seed1").mkdir()
    (tmp_path / "sam-seed1" / "checkpoint.pt").write_bytes(b"no checkpoint")
    outcomes, told = on(MadeUp(), tmp_path, monkeypatch)
    assert [bool(outcome.error) for outcome in outcomes] == [False, False, False, True]
    assert "is damaged" in str(outcomes[-1].error)
    assert told == ""


def test_a_run_that_fits_on_no_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExperimentError, match="takes 3 CPUs and 0 GPUs, and the largest .* has 2 CPUs and 0 GPUs"):
        on(MadeUp(), tmp_path, monkeypatch, cpus_per_run=3)


def test_what_is_faster_is_asked_where_the_runs_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", MadeUp())
    for answer in (True, False):
        monkeypatch.setattr(on_ray, "has_bfloat16", lambda *, on_gpu, answer=answer: answer and not on_gpu)
        with begin(recipe(amp=None), ExecutionOptions("ray"), Console()) as executor:
            assert executor.recipe.amp is answer


# --- in processes ---


FIELDS: dict[str, Any] = {"epochs": 8, "extra_epochs": 8, "eval_every": 4}
DEMO = {"channels_last": True}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    for _ in InProcess(recipe(**FIELDS, **DEMO), CPU).run(
        jobs(folder, **FIELDS, **DEMO), dataset(), folder, Told(), Stop()
    ):
        pass
    return folder


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
    """The process that trains a unit."""
    begins = [json.loads(line) for line in (folder / EVENTS).read_text().splitlines() if "begin" in line]
    return int(begins[-1]["pid"])


class Killer(Heard):
    """Kills SAM's first process at its second step."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.killed = folder, 0
        self.workers: set[int] = set()

    def begin(self, run: Run, *rest: object) -> None:
        super().begin(run, *rest)
        self.workers.add(worker(self.folder / run.name))

    def step(self, run: Run, *rest: object) -> None:
        super().step(run, *rest)
        steps = sum(told[:2] == ("step", run) for told in self.all)
        if run.name == "sam-seed0" and steps == 2 and not self.killed:
            self.killed = worker(self.folder / run.name)
            os.kill(self.killed, signal.SIGKILL)


@pytest.mark.slow
def test_several_at_a_time_have_the_bits_of_one_and_one_that_is_killed_is_retried(
    undisturbed: Path, tmp_path: Path
) -> None:
    given = {**FIELDS, **DEMO, "seeds": 2, "checkpoint_seconds": 0.0}
    console, killer = Console(file=io.StringIO(), width=300), Killer(tmp_path)
    before = set(multiprocessing.active_children())  # other tests keep theirs
    with begin(recipe(**given), ExecutionOptions(runs_at_once=2), console) as executor:
        outcomes = list(executor.run(jobs(tmp_path, **given), dataset(), tmp_path, killer, Stop()))
        (tmp_path / "sgd-seed1" / "checkpoint.pt").write_bytes(b"no checkpoint")
        again = list(executor.run(jobs(tmp_path, **given), dataset(), tmp_path, Told(), Stop()))
    assert [bool(outcome.error) for outcome in outcomes] == [False] * 4
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert told.startswith("sam-seed0: its worker died (it was ended by SIGKILL, ")
    assert told.count("\n") == 1
    first, second, *_ = (told[0] for told in killer.all if told[0] in ("begin", "end"))
    assert (first, second) == ("begin", "begin")  # both at a time
    (*_, gone_on) = (told for told in killer.all if told[0] == "begin" and told[1].name == "sam-seed0")  # type: ignore[attr-defined]
    assert gone_on[2] > 0  # type: ignore[operator]
    assert len(killer.workers) == 3  # for five beginnings: a process takes one run after the other
    assert [outcome.job.run.name for outcome in again if outcome.error] == ["sgd-seed1"]
    assert_same(tmp_path, undisturbed)
    assert not list(tmp_path.glob(".stop*"))
    assert {path.name for path in (tmp_path / "sam-seed0").iterdir()} == {".lock", "checkpoint.pt", "metrics.jsonl"}
    assert set(multiprocessing.active_children()) <= before


def test_a_mistake_in_a_worker_arrives_with_its_traceback(tmp_path: Path) -> None:
    broken = dataset()
    broken.train.images.resize_(0, 1, 28, 28)  # as many labels as before
    before = set(multiprocessing.active_children())
    with (
        pytest.raises(RuntimeError, match=r"a worker failed:(.|\n)*train\("),
        begin(recipe(), ExecutionOptions(runs_at_once=2), Console()) as executor,
    ):
        list(executor.run(jobs(tmp_path), broken, tmp_path, Told(), Stop()))
    assert set(multiprocessing.active_children()) <= before


def start(out: Path, *words: str) -> "subprocess.Popen[str]":
    """Compare in a process of its own, and in a group of its own, as a shell would start it."""
    fields = options(out=out, checkpoint_seconds=0, **FIELDS)
    return subprocess.Popen(
        [sys.executable, str(TINY), "compare", "demo", *fields, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def within_an_epoch(folder: Path, process: "subprocess.Popen[str]", *, but: int = 0) -> int:
    """Wait until a unit's checkpoint lies within an epoch; return its worker, which is another one than `but`."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        with suppress(OSError, RuntimeError, IndexError):
            if torch.load(folder / "checkpoint.pt", weights_only=True)["batch"] and worker(folder) != but:
                return worker(folder)
        time.sleep(0.01)
    raise AssertionError("it did not begin")


@pytest.mark.slow
def test_stopped_then_killed_it_goes_on_here(undisturbed: Path, tmp_path: Path) -> None:
    runs = (out := tmp_path / "run") / "runs"
    process = start(out, "--runs-at-once", "2")
    within_an_epoch(runs / "sam-seed0", process)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the workers too
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130
    _, said = errors.splitlines()
    assert said.startswith("Stopped. To go on: steppe compare demo ")
    assert not list(out.glob(".stop*"))
    process = start(out, "--runs-at-once", "2")
    within_an_epoch(runs / "sam-seed0", process)
    process.kill()
    process.communicate(timeout=200)  # which reads until the last worker has gone as well
    assert len(torch.load(runs / "sam-seed0" / "checkpoint.pt", weights_only=True)["records"]) < 4  # at once
    assert command_line(said.partition("steppe ")[2].replace("at-once 2", "at-once 1").split(), draws=False) == 0
    assert_same(runs, undisturbed)


# --- on Ray ---


@pytest.mark.slow
@needs_ray
def test_killed_on_ray_it_is_retried_and_stopped_there_it_goes_on_here(undisturbed: Path, tmp_path: Path) -> None:
    runs = (out := tmp_path / "run") / "runs"
    process = start(out, "--on", "ray", "--cpus-per-run", "1")
    killed = within_an_epoch(runs / "sam-seed0", process)
    os.kill(killed, signal.SIGKILL)
    within_an_epoch(runs / "sam-seed0", process, but=killed)
    process.send_signal(signal.SIGINT)
    told, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert "sam-seed0: its worker died" in told
    assert "retry 1 of 3" in told
    assert "SAM seed 0: goes on at standardized epoch" in told
    assert "SGD seed 0  standardized epoch 8/8" in told  # it came to its end on Ray
    _, said = errors.splitlines()  # nor has Ray anything to say
    assert said.startswith("Stopped. To go on: steppe compare demo ")
    assert not list(out.glob(".stop*"))
    words = said.partition("steppe ")[2].split()
    assert command_line(["here" if word == "ray" else word for word in words], draws=False) == 0
    assert_same(runs, undisturbed)
