"""Read and write results: ``results/<device>/<name>.json``, with the device, the versions, the date and the command.

The documentation is made from them by ``python scripts/make_performance.py``.
"""

import argparse
import datetime
import json
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steppe.experiments.storage.environment import describe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


@dataclass(frozen=True)
class Result:
    """The content of one file: the measured data, with device, date, command and versions."""

    name: str
    device: str
    """The name of the device, such as "NVIDIA H100 80GB HBM3"."""
    on_gpu: bool
    date: str
    command: str
    torch: str
    versions: dict[str, str]
    """Versions of other software, by name."""
    data: dict[str, Any]
    tiny: bool = False
    """True for a rehearsal (``--tiny``), whose numbers are meaningless."""

    @property
    def source(self) -> str:
        """The line below a table of the documentation: device, versions, date and command."""
        others = "".join(f", {name} {version}" for name, version in self.versions.items())
        return f"{self.device}, torch {self.torch}{others}, {self.date}; `{self.command}`"


def add_arguments(parser: argparse.ArgumentParser, *, device: str | None = None) -> None:
    """Add the options shared by all benchmarks; `device` for a benchmark of one device only."""
    if device is None:
        parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    else:
        parser.set_defaults(device=device)
    parser.add_argument("--tiny", action="store_true", help="run in a meaningless, tiny size, as a test")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the results")
    parser.add_argument("--machine", help="the name of the machine; by default that of its GPU or CPU")
    parser.add_argument("--command", help=argparse.SUPPRESS)  # stored in the result in place of the command line


def save(name: str, data: dict[str, Any], arguments: argparse.Namespace, **versions: str | None) -> Path:
    """Write a result, replacing an older one of the same device; return its file."""
    on_gpu = arguments.device == "cuda"
    path = result_path(name, arguments)
    values = {
        "device": device_name(arguments),
        "on_gpu": on_gpu,
        "date": today(),
        "command": arguments.command or _command_line(),
        "torch": torch.__version__.partition("+")[0],
        "versions": {
            "python": platform.python_version(),
            **({"CUDA": torch.version.cuda} if on_gpu else {}),
            **{k: v for k, v in versions.items() if v},
        },
        "tiny": arguments.tiny,
        "data": data,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return path


def saved_data(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the data of an earlier result of this device; empty without one, or after a rehearsal."""
    path = result_path(name, arguments)
    if not path.exists() or (earlier := read(path)).tiny:
        return {}
    return earlier.data


def read(path: Path) -> Result:
    """Read one file."""
    return Result(path.stem, **json.loads(path.read_text(encoding="utf-8")))


def load(name: str, folder: Path = RESULTS) -> list[Result]:
    """Read the results called `name` of all devices, CPUs first, without rehearsals."""
    found = [read(path) for path in folder.glob(f"*/{name}.json")]
    return sorted((r for r in found if not r.tiny), key=lambda result: (result.on_gpu, result.device))


def by_device(found: Sequence[Result]) -> list[list[Result]]:
    """Group results by device."""
    devices: dict[str, list[Result]] = {}
    for result in found:
        devices.setdefault(result.device, []).append(result)
    return list(devices.values())


def result_path(name: str, arguments: argparse.Namespace) -> Path:
    """Return the file of a result of this device."""
    folder = re.sub(r"[^a-z0-9]+", "-", device_name(arguments).lower()).strip("-")
    return Path(arguments.results) / folder / f"{name}.json"


def device_name(arguments: argparse.Namespace) -> str:
    """Return the name of the machine, its GPU or its CPU."""
    if arguments.machine:
        return str(arguments.machine)
    if arguments.device == "cuda":
        return torch.cuda.get_device_name()
    machine = describe([])
    return f"{machine['cpus']} cores of an {machine['cpu']}"


def today() -> str:
    """Return the date, as results have it."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _command_line() -> str:
    """Return the command as typed in the repository's root, without --results, --machine and absolute paths."""
    script, *words = sys.argv
    path = Path(script).resolve()
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    for option in ("--results", "--machine"):
        if option in words:
            index = words.index(option)
            del words[index : index + 2]
    return shlex.join(["python", str(shown), *(Path(word).name if word.startswith("/") else word for word in words)])
