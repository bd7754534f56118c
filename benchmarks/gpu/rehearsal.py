"""Rehearse all measurements on a CPU in a tiny size, to find errors before time on a GPU is spent."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu.measurements import EVIDENCE, SEEDS, load_all_seeds, measurements
from gpu.session import Session
from gpu.table import RENDER
from steppe.experiments.training.stopping import Stop

INTERRUPTED = "article-0"
"""The training that is interrupted after its first evaluation, and then resumed."""

REPEATED = ("article-2", *(f"{name}-{seed}" for name in ("pareto", *EVIDENCE) for seed in SEEDS[1:]))
"""Measurements that differ from others only by their seeds: left out unless they are selected."""


def rehearse(only: Sequence[str] | None = None, *, keep: Path | None = None) -> int:
    """Run the measurements in a tiny size; return the exit status.

    One training is interrupted, and resumed from a copy of the results folder, as on a second machine. The results are
    copied to `keep`, if given.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = list(only or (each.name for each in measurements() if each.name not in REPEATED))
        first, second = folder / "first machine", folder / "second machine"
        _measure(first, names, interrupt=INTERRUPTED in names)
        shutil.move(first, second)  # the results folder is all that a further call needs
        _measure(second, names)
        if INTERRUPTED in names:
            _check_resumed(second)
        missing = [name for name in names if not list(second.glob(f"*/{name}.json"))]
        figures = list(_render(second, folder / "rendered"))
        if keep is not None:
            shutil.copytree(second, keep, dirs_exist_ok=True)
        for failure in sorted(second.glob("*/failures/*.json")):
            print(f"\n{failure.stem}:", *json.loads(failure.read_text())["log"], sep="\n  ", file=sys.stderr)
    done = f"{len(names) - len(missing)} of {len(names)} measurements, {len(figures)} figures"
    print(f"{done}; {time.monotonic() - began:.0f} s")
    if missing:
        print(f"no result of {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def _measure(results: Path, names: Sequence[str], *, interrupt: bool = False) -> None:
    """Run one session."""
    options: dict[str, Any] = {"device": "cpu", "tiny": True, "machine": "a rehearsal", "minutes": 60}
    options |= dict.fromkeys(("data", "classic", "peers")) | {"again": False}
    Session(argparse.Namespace(results=results, only=names, interrupt=interrupt, **options), Stop()).run()


def _check_resumed(results: Path) -> None:
    (log,) = results.glob(f"*/in_progress/logs/{INTERRUPTED}.log")
    if "at standardized epoch 1." not in log.read_text():
        raise RuntimeError(
            f"{INTERRUPTED} was not resumed where it was interrupted, after one epoch:\n{log.read_text()}"
        )


def _render(results: Path, folder: Path) -> Iterator[Path]:
    """Print the tables and draw the figures of a rehearsal, as if it had been measured."""
    from gpu import figure  # matplotlib is needed by the rehearsal only

    for path in results.glob("*/*.json"):
        values: dict[str, Any] = json.loads(path.read_text())
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / path.name).write_text(json.dumps(values | {"tiny": False}))
    for name, render in RENDER.items():
        for found in load_all_seeds(name, folder):
            print(f"\n{name}\n\n{render(found)}")
            if name in figure.FIGURES:
                yield from figure.draw(name, found, folder / f"{name}.png")
