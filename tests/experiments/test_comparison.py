"""`steppe compare` in real processes that are killed, stopped, or started twice in one folder."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from tiny import command_line, options

from steppe.cli import main

TINY = Path(__file__).with_name("tiny.py")


def command(out: Path, **fields: object) -> list[str]:
    given = {"out": out, "checkpoint_seconds": 0, "epochs": 8} | fields
    return ["compare", "demo", *options(**given)]


def start(words: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, str(TINY), *words], stdout=PIPE, stderr=PIPE, text=True)


def content(out: Path) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    """All metrics without their times, and all weights."""
    lines = [json.loads(s) for path in sorted(out.glob("runs/*/metrics.jsonl")) for s in path.read_text().splitlines()]
    states = [torch.load(path, weights_only=True)["model"] for path in sorted(out.glob("runs/*/checkpoint.pt"))]
    untimed = [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]
    return untimed, [t for state in states for t in state.values()]


def assert_same(out: Path, wanted: Path) -> None:
    (lines, weights), (wanted_lines, wanted_weights) = content(out), content(wanted)
    assert lines == wanted_lines
    assert len(weights) == len(wanted_weights)
    assert all(map(torch.equal, weights, wanted_weights))


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def batches(out: Path) -> list[int]:
    """How many batches of its epoch each run has seen."""
    return [torch.load(path, weights_only=True)["batch"] for path in out.glob("runs/*/checkpoint.pt")]


def wait_for_checkpoint(out: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until the process has written one."""

    def written() -> set[tuple[Path, int]]:
        return {(path, path.stat().st_mtime_ns) for path in out.glob("runs/*/checkpoint.pt")}

    before, end = written(), time.monotonic() + 60
    while written() == before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert command_line(command(out), draws=False) == 0
    return out


@pytest.mark.slow
def test_an_undisturbed_run_leaves_a_complete_folder_from_which_alone_plot_draws_everything(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command_line(command(out)) == 0
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    quantities = {"train_loss", "train_accuracy", "test_accuracy", "gap", "overview"}
    figures = {"controls", "pareto", "robustness", *quantities, *(f"{quantity}_seconds" for quantity in quantities)}
    assert names == {
        *(".lock", "config.json", "environment.json", "summary.md", "summary.json", "report.html"),
        *(f"figures/{figure}.{suffix}" for figure in figures for suffix in ("png", "svg")),
        *(f"runs/{run}/{file}" for run in ("sgd-seed0", "sam-seed0") for file in ("metrics.jsonl", "checkpoint.pt")),
    }
    (session,) = json.loads((out / "environment.json").read_text())
    assert session["torch"] == torch.__version__
    assert session["command"].startswith("steppe compare demo --width 2")
    out = out.rename(tmp_path / "elsewhere")
    made = [*out.glob("summary.*"), *(out / "figures").iterdir()]
    before = {path: path.read_bytes() for path in made}
    for path in [*made, *out.glob("runs/*/checkpoint.pt")]:
        path.unlink()
    assert main(["plot", str(out)]) == 0
    assert {path: path.read_bytes() for path in made} == before


@pytest.mark.slow
def test_a_killed_comparison_resumes_to_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "run", random.Random(0)
    process = start(command(out))
    wait_for_checkpoint(out, process)
    time.sleep(chance.uniform(0.0, 0.3))
    kill(process)
    process = start(command(out))
    wait_for_checkpoint(out, process)
    while not any(batch in (1, 2) for batch in batches(out)):  # early in an epoch, which has five
        assert process.poll() is None, process.communicate()
    kill(process)
    assert any(batches(out)), "the kill came within an epoch"
    assert command_line(command(out), draws=False) == 0
    assert_same(out, undisturbed)


@pytest.mark.slow
def test_a_stopped_comparison_prints_the_command_that_resumes_it(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(command(out))
    wait_for_checkpoint(out, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    words = errors.strip().splitlines()[-1].removeprefix("Stopped. To resume: steppe ").split()
    assert words == command(out)
    assert command_line(words, draws=False) == 0
    assert_same(out, undisturbed)


def test_the_same_command_again_trains_nothing_and_seeds_can_be_added(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, out := tmp_path / "run")
    assert command_line(command(out, seeds=2), draws=False) == 0
    assert "SGD seed 0: is finished" in capsys.readouterr().out
    assert "2 paired runs" in (out / "summary.md").read_text()
    assert len(content(out)[0]) == 2 * len(content(undisturbed)[0])
    assert len(json.loads((out / "environment.json").read_text())) == 2


def test_another_configuration_is_one_line_of_error_and_changes_no_file(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    assert command_line(command(undisturbed, lr=0.1)) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "lr was 0.05 and is 0.1" in errors
    assert {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_two_processes_give_the_same_curve_as_one(tmp_path: Path) -> None:
    # a small step keeps rounding from growing; 72 images are 4 * 15 + 12, and 15 are shared as 7 + 8
    fields = {"norm": "group", "width": 4, "batch_size": 15, "lr": 0.01, "epochs": 4, "eval_every": 2}
    fields["methods"] = "sam looksam"
    assert command_line(command(tmp_path / "one", **fields), draws=False) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TINY)]
    words = [*torchrun, *command(tmp_path / "two", **fields)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    one, two = (content(tmp_path / name)[0] for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        for name, tolerance in {
            "train_loss": 1e-4,
            "test_loss": 1e-4,
            "train_accuracy": 1.4,
            "test_accuracy": 2,
        }.items():
            assert b[name] == pytest.approx(a[name], abs=tolerance)  # an accuracy within one image
        assert b["gradient_evaluations"] == a["gradient_evaluations"]
