import importlib.util
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from executing import FakeRay, assert_same, measured, start_process, train_on_ray, within_an_epoch
from rich.console import Console
from tiny import command_line, options, recipe

from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution import ray as ray_module
from steppe.experiments.execution.executor import ExecutionOptions
from steppe.experiments.execution.launch import start_executor

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def test_missing_ray_is_reported_with_the_command_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command_line(["compare", *options(out=tmp_path / "run"), "--on", "ray"]) == 1
    assert capsys.readouterr().err.endswith("pip install 'steppe[ray]'\n")
    assert not (tmp_path / "run").exists()


def test_run_that_fits_on_no_machine_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExperimentError, match="takes 3 CPUs and 0 GPUs, and the largest .* has 2 CPUs and 0 GPUs"):
        train_on_ray(FakeRay(), tmp_path, monkeypatch, cpus_per_run=3)


def test_default_precision_is_chosen_on_the_machines_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    for answer in (True, False):
        monkeypatch.setattr(ray_module, "has_bfloat16", lambda *, on_gpu, answer=answer: answer and not on_gpu)
        with start_executor(recipe(amp=None), ExecutionOptions("ray"), Console()) as executor:
            assert executor.recipe.hardware.amp is answer


def listening_addresses(pid: int) -> set[str]:
    """Return the network addresses at which a process and its descendants listen, IPv4 in IPv6 as IPv4."""
    psutil = pytest.importorskip("psutil")
    process = psutil.Process(pid)
    found = set()
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            found |= {c.laddr.ip for c in one.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return {address.removeprefix("::ffff:") for address in found}


@pytest.mark.slow
@needs_ray
def test_run_killed_on_ray_is_retried_and_stopped_on_ray_resumes_locally(undisturbed: Path, tmp_path: Path) -> None:
    runs = (out := tmp_path / "run") / "runs"
    process = start_process(out, "--on", "ray", "--cpus-per-run", "1")
    killed = within_an_epoch(runs / "sam-seed0", process)
    assert listening_addresses(process.pid) == {"127.0.0.1"}
    os.kill(killed, signal.SIGKILL)
    retried = within_an_epoch(runs / "sam-seed0", process, but=killed)
    os.kill(retried, signal.SIGSTOP)  # it waits until the other run ends
    measured(runs / "sgd-seed0", process, standardized_epoch=8)
    process.send_signal(signal.SIGINT)
    os.kill(retried, signal.SIGCONT)
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert "sam-seed0: its worker died" in printed
    assert "retry 1 of 3" in printed
    assert "SAM seed 0: resumes at standardized epoch" in printed
    assert "SGD seed 0  standardized epoch 8/8" in printed  # it finished on Ray
    loading, _, message = errors.splitlines()  # and none of Ray's own
    assert loading == "Loading PyTorch ..."
    assert message.startswith("Stopped. To resume: steppe compare demo ")
    assert not list(out.glob(".stop*"))
    words = message.partition("steppe ")[2].split()
    assert command_line(["local" if word == "ray" else word for word in words], draws=False) == 0
    assert_same(runs, undisturbed)
