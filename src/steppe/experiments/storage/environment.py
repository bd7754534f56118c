"""The environment of a comparison: versions, machine and command, for those who want the same numbers."""

import datetime
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import steppe
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.files import read_text, write_json
from steppe.experiments.storage.run_folder import CHECKPOINT

TASK_CODE = "task_sha256"
"""The entry of a session with the digest of the file of a user's task."""
_PART = "task."
"""The beginning of such an entry for a part of a task that is an object."""
_LISTED = 4


def record_session(
    path: Path, command: Sequence[str], console: Console, task: str = "", parts: Mapping[str, str] | None = None
) -> None:
    """Add this session to the JSON file at `path`, and print a note when the software or the machine has changed.

    So it does when the file of `task`, package.module:name, is another one than that of runs in the folder, as a
    warning if the console is quiet. `parts` are the digests of a task that is an object and has no file.

    Raises:
        ExperimentError: if the folder has runs of another such task. They would be taken for results of this one.
    """
    now = describe(command)
    if parts is not None:
        now |= {_PART + name: digest for name, digest in parts.items()}
    elif task:
        now |= {TASK_CODE: digest_of_module(task)}
    try:
        sessions = read_text(path, _sessions, "the record of earlier sessions is lost, and begun again") or [now]
    except FileNotFoundError:
        sessions = [now]
    except ExperimentError as error:  # no result depends on the record
        console.print(f"Note: {error}", highlight=False, markup=False, soft_wrap=True, emoji=False)
        sessions = [now]
    before = sessions[-1]
    changed = [f"{k} {before.get(k)} -> {now[k]}" for k in ("steppe", "torch", "cpu", "gpu") if before.get(k) != now[k]]
    if changed:
        text = f"Note: since this folder's last session: {', '.join(changed)}. Bits may differ."
        console.print(text, highlight=False, markup=False, soft_wrap=True, emoji=False)
    if former := _runs_before(path.parent, sessions, now):
        if parts is not None:
            raise ExperimentError(
                f"{path.parent} has runs of another task than this one, whose {_differing(sessions, now)}: "
                f"{_listed(former)}. They would be taken for results of this task: choose another folder with out=, or "
                f"delete {path.parent}"
            )
        text = (
            f"Note: the file of {task} was changed since {_listed(former)} in {path.parent} were trained. These stay "
            "results of the former file, and what is finished is not trained again: to train them by this one, delete "
            "their folders, or choose another folder with --out"
        )
        if console.quiet:  # which is no reason to mix results without a word
            warnings.warn(text.removeprefix("Note: "), stacklevel=2)
        console.print(f"{text}.", highlight=False, markup=False, soft_wrap=True, emoji=False)
    write_json(path, [*(session for session in sessions if session is not now), now])


def _runs_before(folder: Path, sessions: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> list[str]:
    """Return the runs of a folder that were last trained before the task was as it is now."""
    same = list(takewhile(lambda session: not _changed(session, now), reversed(sessions)))
    if len(same) == len(sessions):
        return []
    began = math.inf  # of the sessions with this task
    if same:
        with suppress(KeyError, TypeError, ValueError):  # a record that another program has changed
            began = datetime.datetime.fromisoformat(same[-1]["date"]).timestamp()
    return sorted(
        str(checkpoint.parent.relative_to(folder))
        for checkpoint in folder.rglob(CHECKPOINT)
        if checkpoint.stat().st_mtime < began
    )


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the entries about the task that differ; none where they cannot be compared.

    Other versions compile functions to other bytes, and other machines make other numbers of the same data.
    """
    of_parts = any(before.get(name) != now[name] for name in ("python", "torch", "numpy", "cpu", "gpu"))
    names = [name for name in now if name == TASK_CODE or (name.startswith(_PART) and not of_parts)]
    return [name for name in names if name in before and before[name] != now[name]]


def _differing(sessions: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> str:
    last = next(changed for session in reversed(sessions) if (changed := _changed(session, now)))
    names = [f"{name.removeprefix(_PART)}=" for name in last]
    return f"{', '.join(names)} {'differs' if len(names) == 1 else 'differ'}"


def _listed(runs: Sequence[str]) -> str:
    more = f" and {len(runs) - _LISTED} more" if len(runs) > _LISTED else ""
    return f"{', '.join(runs[:_LISTED])}{more}"


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
