"""Draw the results as figures, those of `steppe compare`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu.comparison import comparison
from gpu.device_results import DeviceResults
from gpu.measurements import load_all_seeds
from results import Result
from steppe.experiments.figures import curves

FIGURES = {"article": "overview", "annealed": "pareto", "pareto": "pareto"}
"""Results with a figure, and its name in a comparison."""


def draw(name: str, found: Sequence[Result], path: Path) -> list[Path]:
    """Draw the figure of one device's results as PNG and SVG beside `path`; return the files."""
    known = comparison(found)
    (drawing,) = [each for each in curves.drawings(known.recipe, known.records) if each.stem == FIGURES[name]]
    drawing.stem = path.stem
    path.parent.mkdir(parents=True, exist_ok=True)
    return drawing.save(path.parent)


def draw_all(device: DeviceResults) -> Iterator[Path]:
    """Draw the figures that are older than this device's results, beside these; yield the files."""
    for name in FIGURES:
        files = sorted(device.folder.glob(f"{name}-?.json"))
        path = device.folder / f"{name}.png"
        if files and not (path.exists() and path.stat().st_mtime >= max(file.stat().st_mtime for file in files)):
            for found in load_all_seeds(name, device.folder.parent):
                if found[0].device == device.device:
                    yield from draw(name, found, path)
