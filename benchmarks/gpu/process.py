"""Run a process with a time limit, write its output to a file, and kill every process that it started."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from results import ROOT
from steppe.experiments.training.stopping import Stop

GRACE = 25.0
"""Seconds between SIGTERM and SIGKILL, in which a training saves its checkpoint."""

_POLL_INTERVAL = 0.2


@dataclass(frozen=True)
class Ended:
    """Exit status and duration of a process."""

    status: int
    """The exit status; negative for a signal."""
    seconds: float
    stopped: bool
    """True if SIGTERM was sent to it."""


def run(command: Sequence[str], log: Path, seconds: float, stop: Stop, *, grace: float = GRACE) -> Ended:
    """Run a command; after `seconds`, or as soon as `stop` is set, send SIGTERM, and SIGKILL after `grace` seconds.

    All processes that it started are killed with it. Its output is appended to `log`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    terminated: float | None = None
    with log.open("ab") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **streams, env=_environment(), start_new_session=True)
        try:
            while process.poll() is None:
                now = time.monotonic()
                if terminated is None and (stop or now - began > seconds):
                    terminated = now
                    process.terminate()  # not the whole group: a training needs its own processes to save a checkpoint
                if terminated is not None and now - terminated > grace:
                    break
                time.sleep(_POLL_INTERVAL)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(process.returncode, time.monotonic() - began, terminated is not None)


def _environment() -> dict[str, str]:
    """Return the environment with this checkout's src at the end of PYTHONPATH.

    The folders that are on it already come first: one of them may have other implementations, or hide packages in a
    test.
    """
    known = os.environ.get("PYTHONPATH")
    src = str(ROOT / "src")
    return os.environ | {"PYTHONPATH": os.pathsep.join([known, src] if known else [src])}
