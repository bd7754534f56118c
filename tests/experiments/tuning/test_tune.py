"""`steppe tune`: its trials and files, and resuming after an interruption."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from executing import FakeRay
from searching import command, trials, tuned
from tiny import CPU, command_line, dataset, options

from steppe.cli import main
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.execution.executor import Job, Outcome
from steppe.experiments.execution.launch import InProcessExecutor
from steppe.experiments.storage.records import read_records
from steppe.experiments.tuning import tune

pytest.importorskip("optuna")

HELPERS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    patch = pytest.MonkeyPatch()
    threads = torch.get_num_threads()
    assert tuned(command(out), patch) == 0
    patch.undo()
    torch.set_num_threads(threads)
    return out


def test_search_never_reads_the_test_set_and_leaves_a_complete_folder(undisturbed: Path) -> None:
    found = trials(undisturbed)  # the fixture's test set raises when it is read
    assert [(t["method"], t["number"]) for t in found] == [("sgd", 0), *(("sam", n) for n in range(8))]
    assert {t["state"] for t in found} == {"complete"}
    values = [t["values"]["rho"] for t in found[1:]]  # type: ignore[index]
    assert values[0] == 0.05  # the usual value comes first
    assert len(set(values)) == 8
    assert all(0.005 <= value <= 0.5 for value in values)
    names = {str(path.relative_to(undisturbed)) for path in undisturbed.iterdir()}
    assert names >= {"config.json", "environment.json", "study.db", "trials.jsonl", "summary.md", "summary.json"}
    assert {path.name for path in (undisturbed / "figures").iterdir()} == {"rho.png", "rho.svg"}
    summary = (undisturbed / "summary.md").read_text()
    assert "The test set was not used" in summary
    assert re.search(r"steppe compare demo .*--methods sgd sam:rho=", summary)
    (run,) = (undisturbed / "trials" / "sam-000" / "runs").glob("*seed1")
    assert read_records((run / "metrics.jsonl").read_text())[-1].standardized_epoch == 2


@pytest.mark.slow
def test_killed_search_resumes_to_the_same_trials(undisturbed: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "run", random.Random(1)
    program = (
        f"import sys; sys.path.insert(0, {str(HELPERS)!r}); import searching, pytest; "
        f"sys.exit(searching.tuned(sys.argv[1:], pytest.MonkeyPatch()))"
    )
    words = command(out, checkpoint_seconds=0)
    process = subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while len(list(out.glob("trials/*/runs/*/checkpoint.pt"))) < 8:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(chance.uniform(0.0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    patch = pytest.MonkeyPatch()
    with patch.context():
        assert tuned(words, patch) == 0
    patch.undo()
    assert trials(out) == trials(undisturbed)
    assert sorted(p.name for p in (out / "trials").iterdir()) == sorted(
        p.name for p in (undisturbed / "trials").iterdir()
    )


@pytest.mark.slow
def test_methods_can_be_added(tmp_path: Path) -> None:
    fields = {"sampler": "grid", "search": "rho=0.02,0.2", "seeds": 1}
    assert tuned(command(tmp_path / "run", **fields, methods="sam"), draws=False) == 0
    before, study = trials(tmp_path / "run"), tmp_path / "run" / "trials" / "sam-001" / "runs"
    written = {path: path.stat().st_mtime_ns for path in study.rglob("*.jsonl")}
    assert tuned(command(tmp_path / "run", **fields, methods="sam late_sam"), draws=False) == 0
    after = trials(tmp_path / "run")
    assert [t for t in after if t["method"] != "late_sam"] == before
    assert [t["values"] for t in after if t["method"] == "late_sam"] == [{"rho": 0.02}, {"rho": 0.2}]
    assert {path: path.stat().st_mtime_ns for path in study.rglob("*.jsonl")} == written


@pytest.mark.slow
def test_trials_can_be_added_but_no_other_option_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"sampler": "grid", "search": "rho=0.02,0.2,2", "seeds": 1}
    assert tuned(command(tmp_path / "run", **fields, trials=2), draws=False) == 0
    before = trials(tmp_path / "run")
    assert [t["values"] for t in before] == [{}, {"rho": 0.02}, {"rho": 0.2}]
    assert tuned(command(tmp_path / "run", **fields, trials=9)) == 0
    after = trials(tmp_path / "run")
    assert after[:3] == before
    assert [t["values"] for t in after[3:]] == [{"rho": 2.0}]
    capsys.readouterr()
    assert tuned(command(tmp_path / "run", **fields, trials=9, lr=0.2)) == 1
    assert "lr was 0.05 and is 0.2" in capsys.readouterr().err
    assert command_line(["compare", *options(out=tmp_path / "run")]) == 1
    assert "choose another folder with --out" in capsys.readouterr().err
    made = [tmp_path / "run" / name for name in ("summary.md", "summary.json", "figures/rho.png", "figures/rho.svg")]
    content = [path.read_bytes() for path in made]
    for path in (*made, tmp_path / "run" / "study.db"):
        path.unlink()
    assert command_line(["plot", str(tmp_path / "run")]) == 0  # from the folder alone, without Optuna
    assert [path.read_bytes() for path in made] == content


def test_diverged_trial_counts_as_worst_and_does_not_end_the_search(tmp_path: Path) -> None:
    fields = {"sampler": "grid", "search": "lr=0.05,1e30", "seeds": 1, "methods": "sgd"}
    assert tuned(command(tmp_path / "run", **fields), draws=False) == 0
    good, bad = trials(tmp_path / "run")
    assert (good["state"], bad["state"]) == ("complete", "diverged")
    assert "diverged in epoch 1" in str(bad["reason"])
    assert (
        "Diverged, and counted as worse than all others: sgd trial 1 (lr 1e+30)"
        in (tmp_path / "run" / "summary.md").read_text()
    )


def test_shared_storage_shares_the_trials(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/shared.db"
    fields = {"seeds": 1, "storage": storage, "sampler": "random"}
    assert tuned(command(tmp_path / "one", **fields, trials=2), draws=False) == 0
    assert tuned(command(tmp_path / "two", **fields, trials=3), draws=False) == 0
    one, two = trials(tmp_path / "one"), trials(tmp_path / "two")
    assert two[:3] == one
    assert [path.name for path in (tmp_path / "two" / "trials").iterdir()] == ["sam-002"]


@pytest.mark.slow
def test_trials_on_ray_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray := FakeRay(sam_rho_0_05_seed1=1))
    fields = {"sampler": "grid", "search": "rho=0.02,0.05"}
    assert tuned(command(tmp_path / "local", **fields), monkeypatch) == 0
    assert tuned(command(tmp_path / "ray", **fields, on="ray"), monkeypatch) == 0
    assert ray.most_at_once == 2  # of several trials at a time
    assert trials(tmp_path / "ray") == trials(tmp_path / "local")


class EagerExecutor(InProcessExecutor):
    """Takes all jobs that it is given before it trains the first one."""

    def __init__(self, recipe: Recipe, pool: object, capacity: int, console: object) -> None:
        super().__init__(recipe, CPU)
        self.capacity, self.taken = capacity, list[int]()
        EagerExecutor.last = self

    last: "EagerExecutor"

    def run(self, jobs: Iterable[Job], *rest: Any) -> Generator[Outcome, None, None]:
        given = list(jobs)
        self.taken.append(len(given))
        yield from super().run(given, *rest)


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        ({"sampler": "tpe"}, [2, 2, 2]),
        pytest.param({"sampler": "tpe", "runs_at_once": 4}, [6], marks=pytest.mark.slow),
        pytest.param({"sampler": "random"}, [6], marks=pytest.mark.slow),
    ],
)
def test_tpe_trains_one_trial_at_a_time_unless_runs_at_once_is_given(
    words: dict[str, object], taken: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steppe.experiments.execution.launch.LocalExecutor", EagerExecutor)
    monkeypatch.setattr("steppe.experiments.data.datasets.load", lambda name, data_dir=None: dataset())
    monkeypatch.setattr("steppe.experiments.tuning.tune.draw", lambda *_: None)
    monkeypatch.setattr("steppe.experiments.execution.cpus.available", lambda: 4)
    fields = {"out": tmp_path / "run", "methods": "sam", "seeds": 2, "epochs": 1, "eval_every": 1, "trials": 3}
    assert main(["tune", "demo", *options(**fields, **words), "--no-baseline"]) == 0
    assert EagerExecutor.last.taken == taken
    assert EagerExecutor.last.capacity == (
        2 if taken[0] == 2 else 4
    )  # the runs of one trial, or as many as there is room for


def test_missing_optuna_is_reported_with_the_command_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "steppe.experiments.tuning.studies", raising=False)  # of an earlier test
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert command_line(command(tmp_path / "run")) == 1
    assert capsys.readouterr().err.endswith(
        "optuna is not installed, and steppe tune needs it: pip install 'steppe[tune]'\n"
    )


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--search", "roh=0.1..1"], "did you mean 'rho'?"),
        (["--sampler", "grid"], "a grid needs its values"),
        (["--hold-out", "1"], "at least 2"),
        (["--trials", "0"], "at least 1"),
        (["--log", "tensorboard"], "log the comparison that confirms the best values"),
    ],
)
def test_invalid_search_is_explained_before_anything_is_trained(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(["tune", *words]) == 2
    assert answer in capsys.readouterr().err


def test_password_is_kept_out_of_the_record() -> None:
    assert tune._without_password("mysql://me:secret@host/db") == "mysql://me:***@host/db"


def test_search_is_judged_by_any_measure_of_the_held_out_images(tmp_path: Path) -> None:
    words = ["--objective", "calibration error", "--sampler", "grid", "--search", "rho=0.02,0.4"]
    assert command_line([*command(tmp_path / "run", methods="sam", trials=2), *words], draws=False) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["objective"], summary["higher_is_better"]) == ("validation calibration error", False)
    errors = {
        trial["number"]: sum(run["test_calibration error"] for run in trial["runs"])  # type: ignore[attr-defined]
        for trial in trials(tmp_path / "run")
        if trial["method"] == "sam"
    }
    assert errors[0] != errors[1]
    (best,) = [best for best in summary["best"] if best["method"] == "sam"]
    assert best["trial"] == min(errors, key=errors.__getitem__)
    assert "| validation calibration error % |" in (tmp_path / "run" / "summary.md").read_text()


def test_search_is_judged_by_what_is_left_after_a_second_task(tmp_path: Path) -> None:
    words = ["--objective", "accuracy after the second task", "--sampler", "grid", "--search", "rho=0.05,0.1"]
    given = command(tmp_path / "run", methods="sam", trials=2, then="rotated", then_epochs=1)
    assert command_line([*given, *words], draws=False) == 0
    (best, *_) = json.loads((tmp_path / "run" / "summary.json").read_text())["best"]
    of = {(t["method"], t["number"]): t["runs"] for t in trials(tmp_path / "run")}
    runs = of[best["method"], best["trial"]]
    measured = [run["test_accuracy after the second task"] for run in runs]  # type: ignore[attr-defined]
    assert best["validation"]["mean"] == pytest.approx(sum(measured) / len(measured))


def test_search_trains_no_second_task_that_does_not_decide(tmp_path: Path) -> None:
    given = command(tmp_path / "run", methods="sam", trials=2, then="rotated", then_epochs=1)
    assert command_line([*given, "--sampler", "grid", "--search", "rho=0.05,0.1"], draws=False) == 0
    runs = [run for trial in trials(tmp_path / "run") for run in trial["runs"]]  # type: ignore[attr-defined]
    assert runs
    assert not any("second task" in name for run in runs for name in run)
    assert "--then rotated" in (tmp_path / "run" / "summary.md").read_text()  # the command that confirms measures it


@pytest.mark.parametrize("objective", ["acuracy under blur", "accuracy after the second task"])
def test_unknown_objective_is_an_error_before_training(
    objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line([*command(tmp_path / "run"), "--objective", objective]) == 2
    assert f"objective: '{objective}' is unknown" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
