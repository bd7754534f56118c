"""The figures of flatness: spectra and landscapes."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from steppe.experiments.figures.drawing import Drawing, save_all
from steppe.experiments.figures.landscapes import KINDS, plot_landscapes
from steppe.experiments.figures.spectra import Groups, plot_spectra
from steppe.experiments.figures.style import styles_of
from steppe.flatness import Landscape


def draw(groups: Groups, folder: Path, description: str) -> list[Path]:
    """Save all drawings as PNG and SVG into `folder`; return the files."""
    return save_all(drawings(groups, description), folder)


def drawings(groups: Groups, description: str) -> Iterator[Drawing]:
    """Draw `spectra`, `landscapes` and `eigen_landscapes` where they were measured.

    `description` says in one line what was measured. The first solution of each method has its landscapes drawn; a
    method without a measurement keeps its color reserved.
    """
    styles = dict(zip(groups, styles_of(list(groups)), strict=True))
    groups = {label: solutions for label, solutions in groups.items() if solutions}
    if not groups:
        return
    yield Drawing("spectra", partial(plot_spectra, groups, styles, description))
    for kind in KINDS:
        if landscapes := landscapes_of(groups, kind):
            yield Drawing(f"{kind}s", partial(plot_landscapes, landscapes, kind, description, "first run"))


def landscapes_of(groups: Groups, kind: str) -> dict[str, Landscape]:
    """Return the landscape of each method's first solution, where it was measured."""
    found = {label: getattr(solutions[0], kind) for label, solutions in groups.items()}
    return {label: landscape for label, landscape in found.items() if landscape is not None}
