"""Arguments of benchmarks/gpu for tests, and results that earlier measurements have left."""

import argparse
import json
from pathlib import Path

from gpu.device_results import DeviceResults


def arguments(folder: Path, **others: object) -> argparse.Namespace:
    """Return the arguments of run.py for a tiny session on a CPU, with all files in `folder`."""
    options = {"device": "cpu", "tiny": True, "machine": "one", "command": None, "minutes": 60.0}
    inputs = {"data": None, "classic": None, "peers": None}
    choice = {"again": False, "only": None, "interrupt": False}
    return argparse.Namespace(**{"results": folder / "results", **options, **inputs, **choice, **others})


def write_result(device: DeviceResults, name: str, data: object) -> None:
    """Write a result of the device."""
    device.folder.mkdir(parents=True, exist_ok=True)
    content = {"tiny": device.arguments.tiny, "data": data}
    (device.folder / f"{name}.json").write_text(json.dumps(content))
