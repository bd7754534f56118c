"""How every figure looks, and how it is saved: the same measurements give the same file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from steppe.experiments.analysis.summary import setting
from steppe.experiments.config.method_spec import parse
from steppe.experiments.config.recipe import Recipe

__all__ = ["GREY", "Style", "caption", "freeze", "in_turn", "look", "save", "styles", "tell"]

GREY = "#888888"

# Okabe and Ito's palette, which color-blind readers can tell apart, without its yellow: too pale for a line.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = tuple(product(("-", "--", ":", "-."), _COLOURS))
_SUFFIXES = ("png", "svg")
_CHARACTERS = 15  # of a caption in an inch

_LOOK: Mapping[Any, Any] = MappingProxyType(
    {
        "axes.axisbelow": True,
        "axes.edgecolor": GREY,
        "axes.grid": True,
        "axes.labelcolor": "#333333",
        "axes.labelsize": 10,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "font.family": ["DejaVu Sans"],
        "grid.color": "#E4E4E4",
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "savefig.dpi": 160,
        "svg.hashsalt": "steppe",
        "xtick.color": "#555555",
        "ytick.color": "#555555",
    }
)


@dataclass(frozen=True)
class Style:
    """A method's look in every figure of a comparison."""

    label: str
    line: str
    color: str


def styles(recipe: Recipe) -> Mapping[str, Style]:
    """Give each method a line of its own, by its place: methods that are added leave the others theirs."""
    return dict(zip(recipe.methods, in_turn([parse(method).label for method in recipe.methods]), strict=True))


def in_turn(labels: Sequence[str]) -> list[Style]:
    """Give each label the look of its place."""
    return [Style(label, *_LINES[index % len(_LINES)]) for index, label in enumerate(labels)]


@contextmanager
def look() -> Iterator[None]:
    """Draw as here, whatever style the reader has set."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        yield


def caption(figure: Figure, recipe: Recipe, *more: str) -> None:
    """Say what was trained, over how many runs, and `more`."""
    runs = f"mean ± standard deviation of {recipe.seeds} runs" if recipe.seeds > 1 else "one run"
    tell(figure, setting(recipe), runs, *more)


def tell(figure: Figure, *sentences: str) -> None:
    """Write above the figure what it shows."""
    wrapped = (textwrap.wrap(sentence, int(_CHARACTERS * figure.get_figwidth())) for sentence in sentences)
    figure.suptitle("\n".join(chain.from_iterable(wrapped)), x=0.01, ha="left", fontsize=8.5, color="#555555")


def freeze(figure: Figure) -> None:
    """Compute the layout once and for all: each file would compute it again, and what is drawn later would move it."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write the figure as PNG and SVG; return the files."""
    if figure.get_layout_engine() is not None:
        freeze(figure)
    files = [stem.with_suffix(f".{suffix}") for suffix in _SUFFIXES]
    for file in files:
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
