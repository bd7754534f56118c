"""Where results lie: ``results/<device>/<name>.json``, each with the device, the versions, the date and its command.

The documentation reads them (``python scripts/make_performance.py``); a name without a file is "not yet measured".
"""

import argparse
import datetime
import json
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


@dataclass(frozen=True)
class Result:
    """One file: what was measured, and where, when and how."""

    name: str
    device: str
    """The device in words, as in "NVIDIA H100 80GB HBM3"."""
    on_gpu: bool
    date: str
    command: str
    torch: str
    versions: dict[str, str]
    """Of everything else that took part."""
    data: dict[str, Any]
    tiny: bool = False
    """Whether it is a rehearsal (``--tiny``), and says nothing."""

    @property
    def where(self) -> str:
        """What the documentation says under a table."""
        others = "".join(f", {name} {version}" for name, version in self.versions.items())
        return f"{self.device}, torch {self.torch}{others}, {self.date}; `{self.command}`"


def add_arguments(parser: argparse.ArgumentParser, *, device: str | None = None) -> None:
    """The options that all benchmarks have; ``device`` for one that knows only one."""
    if device is None:
        parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    else:
        parser.set_defaults(device=device)
    parser.add_argument("--tiny", action="store_true", help="at a size that says nothing: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the results")
    parser.add_argument("--machine", help="what to call the machine; by default its GPU, or its CPU")


def save(name: str, data: dict[str, Any], arguments: argparse.Namespace, **versions: str | None) -> Path:
    """Write a result, in the place of an older one of the same device; return its file."""
    on_gpu = arguments.device == "cuda"
    device, path = place(name, arguments)
    values = {
        "device": device,
        "on_gpu": on_gpu,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": _command(),
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


def kept(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is known of this device under that name: the data of an earlier call that was not a rehearsal."""
    path = place(name, arguments)[1]
    if not path.exists() or (earlier := read(path)).tiny:
        return {}
    return earlier.data


def read(path: Path) -> Result:
    """One file."""
    return Result(path.stem, **json.loads(path.read_text(encoding="utf-8")))


def load(name: str, folder: Path = RESULTS) -> list[Result]:
    """All devices' results of that name, CPUs first; rehearsals are none."""
    found = [read(path) for path in folder.glob(f"*/{name}.json")]
    return sorted((r for r in found if not r.tiny), key=lambda result: (result.on_gpu, result.device))


def place(name: str, arguments: argparse.Namespace) -> tuple[str, Path]:
    """What the device is called, and the file of that name."""
    device = arguments.machine or _name(arguments.device == "cuda")
    return device, arguments.results / _slug(device) / f"{name}.json"


def _name(on_gpu: bool) -> str:
    if on_gpu:
        return torch.cuda.get_device_name()
    from steppe.experiments.storage.environment import describe

    here = describe([])
    return f"{here['cpus']} cores of an {here['cpu']}"


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _command() -> str:
    """As somebody would type it in the repository's root: not where the result goes, and no paths of this machine."""
    script, *words = sys.argv
    path = Path(script).resolve()
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    for option in ("--results", "--machine"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return shlex.join(["python", str(shown), *(Path(word).name if word.startswith("/") else word for word in words)])
