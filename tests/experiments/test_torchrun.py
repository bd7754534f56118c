"""`steppe compare` and its Python function on a user's own task, in processes that torchrun starts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from test_comparison import assert_same, batches

from ranks import start_ranks
from steppe.experiments.errors import ExperimentError
from steppe.experiments.world import join

TASK = """
import os, signal, time
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from steppe.experiments import Task, accuracy

losses, stop_after = 0, int(os.environ.get("STOP_AFTER", "0"))

def loss(outputs, targets):
    global losses
    losses += 1
    if stop_after and losses >= stop_after and os.environ["RANK"] == "1":
        if losses == stop_after:
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun
        time.sleep(0.05)  # it takes a moment to pass the signal on
    return F.cross_entropy(outputs, targets)

def task(**fields):
    inputs = torch.randn(600, 5, generator=torch.Generator().manual_seed(0))
    targets = (inputs[:, 0] > 0).long()
    usual = dict(
        model=lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Dropout(0.3), nn.Linear(8, 2)),
        train=(inputs[:500], targets[:500]),
        test=(inputs[500:], targets[500:]),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        loss=loss,
        metrics={"accuracy": accuracy},
        batch_size=5,  # so that the processes draw different amounts for the dropout
    )
    return Task(**usual | fields)

class Damaged(Dataset):
    def __len__(self):
        return 400

    def __getitem__(self, i):
        if i == 301:
            raise OSError("file 301 is damaged")
        return torch.zeros(5), 1

def damaged():
    return task(train=Damaged())
"""


def torchrun(folder: Path, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Start two processes in a folder that holds the task's module."""
    (folder / "own.py").write_text(TASK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=folder)


def compare(folder: Path, task: str, out: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    options = ["--methods", "base", "sam", "--epochs", "2", "--seeds", "1", "--device", "cpu", "--out", out]
    return torchrun(folder, "-m", "steppe", "compare", task, *options, **variables)


@pytest.mark.slow
def test_stopped_command_that_is_started_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    done = compare(tmp_path, "own:task", "whole")
    assert done.returncode == 0, done.stderr
    stopped = compare(tmp_path, "own:task", "parts", STOP_AFTER="200")
    assert stopped.returncode != 0
    assert stopped.stderr.count("Stopped. To resume: torchrun --nproc-per-node 2 -m steppe compare own:task") == 1
    assert batches(tmp_path / "parts")[0] > 0, "it did not stop within an epoch"
    resumed = compare(tmp_path, "own:task", "parts")
    assert resumed.returncode == 0, resumed.stderr
    assert "base seed 0: resumes at standardized epoch" in resumed.stdout
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_script_gets_the_results_of_several_comparisons_in_each_process(tmp_path: Path) -> None:
    script = """
        import json, os, time
        from pathlib import Path
        import own
        from steppe.experiments import compare, measure

        options = dict(epochs=1, seeds=1, device="cpu")
        first = compare(own.task, ["base", "sam"], out="first", quiet=True, **options)
        if os.environ["RANK"] == "0":
            time.sleep(1)  # the processes need not begin together
        second = compare(own.task(), ["base", "sam"], out="second", **options)
        names = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
        threads = [name for name in names if "gloo" in name]
        try:
            measure(second)
        except RuntimeError as error:
            reason = str(error)
        found = [first.table, second.table, str(second.best), sorted(second.figures()), threads, reason]
        Path(os.environ["RANK"] + ".json").write_text(json.dumps(found))
    """
    (tmp_path / "script.py").write_text(dedent(script))
    done = torchrun(tmp_path, "script.py")
    assert done.returncode == 0, done.stderr
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one[-2] == other[-2] == []  # a thread that outlives its process group may abort Python at its end
    assert one == other
    assert "| SAM |" in one[0]
    assert re.sub(r"[^|]*\|[^|]*\|$", "", one[0], flags=re.M) == re.sub(r"[^|]*\|[^|]*\|$", "", one[1], flags=re.M)
    assert "Start it without torchrun" in one[-1]
    assert done.stdout.count("Report: second") == done.stdout.count("SAM seed 0") == 1
    assert "first" not in done.stdout


@pytest.mark.slow
def test_error_in_one_process_is_one_line_in_each(tmp_path: Path) -> None:
    done = compare(tmp_path, "own:damaged", "out")
    assert done.returncode != 0
    lines = sorted(line for line in done.stderr.splitlines() if line.startswith("steppe: "))
    assert len(lines) == 2, done.stderr
    assert "(OSError: file 301 is damaged), at " in lines[0]
    assert "own.py" in lines[0]
    assert re.search(r"process [01] of 2 lost the connection.*and its own message names the reason", lines[1])
    assert "[rank" not in done.stderr  # no traceback


def joining() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ExperimentError) as raised, join("cpu", None):
            pass
    return str(raised.value)


@pytest.mark.slow
def test_process_group_of_the_user_is_left_alone() -> None:
    for message in start_ranks()(joining):
        assert "in a process group already" in message
