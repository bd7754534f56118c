"""The environment of a comparison: versions, machine and command, for those who want the same numbers."""

import datetime
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import steppe
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.files import read_text, write_json

TASK_CODE = "task_sha256"
"""The entry of a session with the digest of the file of a user's task."""


def record_session(path: Path, command: Sequence[str], console: Console, task: str = "") -> None:
    """Add this session to the JSON file at `path`, and print a note when the software or the machine has changed.

    So has the software if the file of `task`, package.module:name, is another one than before.
    """
    now = describe(command) | ({TASK_CODE: digest_of_module(task)} if task else {})
    try:
        sessions = read_text(path, _sessions, "the record of earlier sessions is lost, and begun again") or [now]
    except FileNotFoundError:
        sessions = [now]
    except ExperimentError as error:  # no result depends on the record
        console.print(f"Note: {error}", highlight=False, markup=False, soft_wrap=True, emoji=False)
        sessions = [now]
    before = sessions[-1]
    changed = [f"{k} {before.get(k)} -> {now[k]}" for k in ("steppe", "torch", "cpu", "gpu") if before.get(k) != now[k]]
    if TASK_CODE in before and TASK_CODE in now and before[TASK_CODE] != now[TASK_CODE]:
        changed.append(f"the file of {task} was changed")
    if changed:
        text = f"Note: since this folder's last session: {', '.join(changed)}. Bits may differ."
        console.print(text, highlight=False, markup=False, soft_wrap=True, emoji=False)
    write_json(path, [*(session for session in sessions if session is not now), now])


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """Read the sessions of a folder; none if the file is missing or damaged, as no result depends on it."""
    try:
        return read_text(path, _sessions, "")
    except (FileNotFoundError, ExperimentError):
        return []


def _sessions(text: str) -> list[dict[str, Any]]:
    sessions = json.loads(text)
    if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
        raise TypeError("it is no list of sessions")
    if any(isinstance(value, list | dict) for session in sessions for value in session.values()):
        raise TypeError("a session has texts and numbers only")
    return sessions


def describe(command: Sequence[str]) -> dict[str, Any]:
    """Return versions, machine, threads, time and the command as JSON has them."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "steppe": steppe.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": platform.platform(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor without such a line
        return platform.processor() or platform.machine()


def digest_of_module(name: str) -> str | None:
    """Return the SHA-256 of the file of an imported module, package.module[:name]; None if it has none."""
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    try:
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:  # in an archive
        return None


def _commit() -> str | None:
    """Return the commit of Steppe's source, marked if files have changed since; None outside of a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        # fails if Steppe is installed inside another project's checkout
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
