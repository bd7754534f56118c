"""The results as figures: those of `steppe compare`."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu.comparison import by_device, comparison
from gpu.place import Place
from results import Result, load
from steppe.experiments.figures import curves as figures
from steppe.experiments.figures import pareto
from steppe.experiments.figures.style import look, save

SHOWN = ("article", "pareto")
"""What has a picture: its curves, or its Pareto front."""

SEEDS = (0, 1, 2)


def draw(name: str, found: Sequence[Result], path: Path) -> list[Path]:
    """Draw the picture of one device's results as PNG and SVG beside `path`; return the files."""
    known = comparison(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "pareto":
        with look():
            return save(pareto.draw(known.recipe, known.results), path.with_suffix(""))
    with tempfile.TemporaryDirectory() as folder:
        drawn = figures.draw(known.recipe, known.results, Path(folder))
        wanted = [file for file in drawn if file.stem == "overview"]
        return [Path(shutil.copyfile(file, path.with_suffix(file.suffix))) for file in wanted]


def of_name(name: str, folder: Path) -> list[list[Result]]:
    """The results of a name, with all its seeds, device by device."""
    names = [f"{name}-{seed}" for seed in SEEDS] if name in SHOWN else [name]
    return by_device([result for each in names for result in load(each, folder)])


def draw_all(place: Place) -> Iterator[Path]:
    """Draw what has become known since the last time, beside this device's results."""
    for name in SHOWN:
        files = sorted(place.folder.glob(f"{name}-?.json"))
        path = place.folder / f"{name}.png"
        if files and not (path.exists() and path.stat().st_mtime >= max(file.stat().st_mtime for file in files)):
            for found in of_name(name, place.folder.parent):
                if found[0].device == place.device:
                    yield from draw(name, found, path)
