import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ray_cluster import Begins, jobs, recipe_of, write_module
from rich.console import Console
from tiny import untimed

from steppe.experiments.execution.executor import ExecutionOptions
from steppe.experiments.execution.launch import start_executor
from steppe.experiments.execution.prepared_task import prepare_task
from steppe.experiments.storage.records import read_records
from steppe.experiments.tasks.load import with_task
from steppe.experiments.training.stopping import Stop

HERE = Path(__file__).parent


def train_here(out: Path) -> dict[str, list[float]]:
    """Train the same comparison in this process; return where each run began."""
    of, task = with_task(recipe_of(out))
    reporter = Begins()
    with start_executor(of, ExecutionOptions(runs_at_once=1), Console(quiet=True)) as executor:
        make_task = prepare_task(executor, out, Console(quiet=True), task)
        outcomes = list(executor.run(jobs(executor.recipe), make_task, out, reporter, Stop()))
    assert [outcome.error for outcome in outcomes] == [None] * 4
    return reporter.begins


def assert_same_runs(out: Path, wanted: Path) -> None:
    for job in jobs(recipe_of(wanted)):
        ours, theirs = out / "runs" / job.run.name, job.folder
        a, b = (read_records((folder / "metrics.jsonl").read_text()) for folder in (ours, theirs))
        assert untimed(a) == untimed(b)
        assert len(b) == 2
        a, b = (torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (ours, theirs))
        assert all(map(torch.equal, a.values(), b.values()))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_machines_without_the_folder_and_the_code_send_their_results_and_one_of_them_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent)))}
    done = subprocess.run(
        [sys.executable, str(HERE / "ray_cluster.py"), str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["errors"] == [None] * 4
    assert f"Ray: 2 of 3 machines do not see {tmp_path / 'killed'}: their runs send" in found["printed"]
    (killed,) = found["killed"]
    assert f"{killed}: its worker died (Task failed because the node" in found["printed"]
    first, again = found["begins"][killed]
    assert first == 0 < again

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        train_here(tmp_path / "undisturbed")
        assert_same_runs(tmp_path / "killed", tmp_path / "undisturbed")
        assert found["stopped"]
        begins = train_here(tmp_path / "stopped")
        assert all(begins[name][0] > 0 for name in found["stopped"])
        assert_same_runs(tmp_path / "stopped", tmp_path / "undisturbed")
    finally:
        for module in ("user_task", "user_helpers"):
            sys.modules.pop(module, None)
    assert not [path for out in ("killed", "stopped") for path in (tmp_path / out).glob(".s*")]  # .stop and .shared
