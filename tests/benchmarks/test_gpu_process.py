"""benchmarks/gpu/process.py: time limits, and no process left behind."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from gpu import process
from steppe.experiments.training.stopping import Stop

ROOT = Path(__file__).parents[2]

IGNORES_SIGTERM = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_process_that_ignores_sigterm_is_killed_with_its_children(tmp_path):
    ended = process.run([sys.executable, "-c", IGNORES_SIGTERM], tmp_path / "log", 1.0, Stop(), grace=0.5)
    assert (ended.status, ended.stopped) == (-signal.SIGKILL, True)
    for _ in range(50):
        if not is_alive(int((tmp_path / "log").read_text())):
            return
        time.sleep(0.1)
    pytest.fail("its child is still alive")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_process_imports_this_checkout_and_may_end_by_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "first")
    command = [sys.executable, "-c", "import os; print(os.environ['PYTHONPATH']); raise SystemExit(7)"]
    ended = process.run(command, tmp_path / "log", 30.0, Stop())
    assert (ended.status, ended.stopped) == (7, False)
    assert (tmp_path / "log").read_text().strip() == f"first{os.pathsep}{ROOT / 'src'}"
