"""The folder of one device: its results, its failures, and the runs and logs in progress."""

import argparse
import datetime
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import results
from results import ROOT
from steppe.experiments.storage.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options shared by run.py and its measurements."""
    results.add_arguments(parser)
    parser.add_argument("--data", type=Path, help="the folder of Fashion-MNIST's four files")


class DeviceResults:
    """Results, failures and runs in progress of one device.

    A rehearsal (``--tiny``) reads results of rehearsals only, and a measurement reads results of measurements only.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = results.device_name(arguments)
        self.folder = results.result_path("any", arguments).parent

    def run_folder(self, name: str) -> Path:
        """The folder of a training in progress."""
        return self.folder / "in_progress" / name

    def log(self, name: str) -> Path:
        """The file with the output of a measurement."""
        return self.folder / "in_progress" / "logs" / f"{name}.log"

    def result(self, name: str) -> dict[str, Any] | None:
        """Return the data measured under `name`, or None."""
        path = self.folder / f"{name}.json"
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return dict(values["data"]) if values and values["tiny"] == self.arguments.tiny else None

    def failure(self, name: str) -> dict[str, Any] | None:
        """Return the recorded failure of a measurement, or None."""
        path = self._failure_path(name)
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def record_failure(self, name: str, reason: str, code: str) -> None:
        """Record a failure with the last lines of its log and the digest of the code that ran."""
        log = self.log(name)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        write_json(self._failure_path(name), {"reason": reason, "date": date, "code": code, "log": lines[-40:]})

    def clear_failure(self, name: str) -> None:
        """Delete a recorded failure."""
        self._failure_path(name).unlink(missing_ok=True)

    def _failure_path(self, name: str) -> Path:
        return self.folder / "failures" / f"{name}.json"


def digest(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the Python files at and below `paths`, by name and content."""
    files = {file for path in paths for file in [path, *path.rglob("*.py")] if file.is_file()}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(str(file.relative_to(ROOT)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
