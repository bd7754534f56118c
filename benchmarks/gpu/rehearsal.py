"""The whole list at a size that says nothing, on a CPU: so that nothing fails for a silly reason on a GPU."""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu import run
from gpu.plan import pieces
from gpu.table import RENDER

CUT = "article-0"
"""The training that is stopped and carried to another machine in the middle."""

REPEATED = ("article-2", "pareto-1", "pareto-2")
"""Further seeds, which are trained as those before: they are left out unless they are asked for."""


def rehearse(only: Sequence[str] | None = None, *, out: Path | None = None) -> int:
    """Go through the list, cut and carry it on in the middle; answer with the exit status.

    `out` keeps the results, else they are thrown away.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = list(only or (piece.name for piece in pieces() if piece.name not in REPEATED))
        first, second = folder / "first machine", folder / "second machine"
        _call(first, wanted, "--out", str(folder / "carried"), *(["--cut"] if CUT in wanted else []))
        shutil.rmtree(first)
        _call(second, wanted, "--from", str(folder / "carried"), "--out", str(folder / "home"))
        log = second / "state" / "logs" / f"{CUT}.log"
        if CUT in wanted and "goes on at standardized epoch 1." not in log.read_text():
            raise RuntimeError(f"{CUT} was cut after an epoch, and did not go on from there:\n{log.read_text()}")
        missing = [name for name in wanted if not list((second / "results").glob(f"*/{name}.json"))]
        drawn = list(_shown(second / "results", folder / "shown"))
        if out is not None:
            shutil.copytree(second / "results", out, dirs_exist_ok=True)
        for failure in sorted((second / "results").glob("*/failures/*.json")):
            print(f"\n{failure.stem}:", *json.loads(failure.read_text())["log"], sep="\n  ", file=sys.stderr)
    print(
        f"{len(wanted) - len(missing)} of {len(wanted)} pieces, {len(drawn)} figures; {time.monotonic() - began:.0f} s"
    )
    if missing:
        print(f"no result of {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def _call(machine: Path, wanted: Sequence[str], *words: str) -> None:
    """One call of the command."""
    options = ["--tiny", "--device", "cpu", "--machine", "a rehearsal", "--minutes", "60"]
    places = ["--results", str(machine / "results"), "--state", str(machine / "state")]
    status = run.main([*options, *places, *(word for name in wanted for word in ("--only", name)), *words])
    if status:
        raise RuntimeError(f"the command ended with exit status {status}")


def _shown(results: Path, folder: Path) -> Iterator[Path]:
    """Render and draw what there is, as if it had been measured."""
    for path in results.glob("*/*.json"):
        values: dict[str, Any] = json.loads(path.read_text())
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / path.name).write_text(json.dumps(values | {"tiny": False}))
    from gpu import figure

    for name, render in RENDER.items():
        for found in figure.of_name(name, folder):
            print(f"\n{name}\n\n{render(found)}")
            if name in figure.SHOWN:
                yield from figure.draw(name, found, folder / f"{name}.png")
