"""A process with a time limit, whose output goes to a file and which leaves nothing behind."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from steppe.experiments.training.stopping import Stop

GRACE = 25.0
"""Seconds that a process has to save its work when it is asked to stop."""

_LOOK_EVERY = 0.2


@dataclass(frozen=True)
class Ended:
    """How it ended: its exit status, the seconds that it took, and whether it was asked to stop."""

    status: int
    seconds: float
    asked: bool


def run(words: Sequence[str], log: Path, seconds: float, stop: Stop, *, grace: float = GRACE) -> Ended:
    """Run a command for `seconds` at most; then, or when `stop` is asked for, let it end, and end it after `grace`.

    Whatever it has started ends with it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    src = Path(__file__).resolve().parents[2] / "src"
    known = os.environ.get("PYTHONPATH")
    # what is there already comes first: it may be a folder of peers, or hold back what must not be imported
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([known, str(src)] if known else [str(src)])}
    began = time.monotonic()
    asked: float | None = None
    with log.open("ab") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(words, **streams, env=environment, start_new_session=True)
        try:
            while process.poll() is None:
                now = time.monotonic()
                if asked is None and (stop or now - began > seconds):
                    asked = now
                    process.terminate()  # it alone: its helpers are needed until it has saved
                if asked is not None and now - asked > grace:
                    break
                time.sleep(_LOOK_EVERY)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(process.returncode, time.monotonic() - began, asked is not None)
