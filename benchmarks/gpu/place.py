"""Where things lie: the results of this device, its failures, and the state of what is in progress."""

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

STATE = ROOT / "build" / "gpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that the list and its pieces share."""
    results.add_arguments(parser)
    parser.add_argument("--state", type=Path, default=STATE, help="the folder of what is in progress")
    parser.add_argument("--data", type=Path, help="the folder of Fashion-MNIST's four files")


class Place:
    """The folders of a device; a rehearsal sees the results of rehearsals only, and the other way round."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device, path = results.place("any", arguments)
        self.folder: Path = path.parent
        self.state: Path = arguments.state

    def result(self, name: str) -> dict[str, Any] | None:
        """What was measured under that name on this device; None where it was not."""
        path = self.folder / f"{name}.json"
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return dict(values["data"]) if values and values["tiny"] == self.arguments.tiny else None

    def failure(self, name: str) -> dict[str, Any] | None:
        """How a piece failed the last time; None where it did not."""
        path = self._failure(name)
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def failed(self, name: str, reason: str, log: Path, code: str) -> None:
        """Write down that a piece failed, with the last lines of its log and the digest of the code that it ran."""
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        write_json(self._failure(name), {"reason": reason, "date": date, "code": code, "log": lines[-40:]})

    def works(self, name: str) -> None:
        """Forget an earlier failure."""
        self._failure(name).unlink(missing_ok=True)

    def _failure(self, name: str) -> Path:
        return self.folder / "failures" / f"{name}.json"


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 of the Python files at and under `paths`, by name and content."""
    found = {file for path in paths for file in [path, *path.rglob("*.py")] if file.is_file()}
    whole = hashlib.sha256()
    for file in sorted(found):
        whole.update(str(file.relative_to(ROOT)).encode())
        whole.update(file.read_bytes())
    return whole.hexdigest()
