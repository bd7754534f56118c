"""The style of every figure: one look for each method, whatever the reader's own matplotlib style is."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from steppe.experiments.analysis.summary import setting
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe

GREY = "#888888"
INK, SOFT, GRID, CARD = "#222222", "#555555", "#E4E4E4", "#FFFFFF"
"""Text, ticks, grid and background; the page replaces them by the colors of its theme."""

# Okabe and Ito's palette, which color-blind readers can tell apart, without its yellow, which is too pale for a line.
# Its black is one step off, as SVG omits the color of what is black and the page could not replace it.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#010101")
_LINES = tuple(product(("-", "--", ":", "-."), COLORS))
_CHARACTERS = 15  # of a caption, per inch

_STYLE: Mapping[Any, Any] = MappingProxyType(
    {
        "axes.axisbelow": True,
        "axes.edgecolor": GREY,
        "axes.grid": True,
        "axes.labelcolor": INK,
        "axes.labelsize": 10,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "font.family": ["DejaVu Sans"],
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "savefig.dpi": 160,
        "svg.fonttype": "none",  # text stays text: smaller, searchable, and in the page's own font
        "svg.hashsalt": "steppe",
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
    }
)


@dataclass(frozen=True)
class Style:
    """The look of a method in every figure of a comparison."""

    label: str
    line: str
    color: str


def styles(recipe: Recipe) -> Mapping[MethodSpec, Style]:
    """Return the style of each method, by its position: methods that are added later leave the others unchanged."""
    methods = recipe.comparison.methods
    return dict(zip(methods, styles_of([method.label for method in methods]), strict=True))


def styles_of(labels: Sequence[str]) -> list[Style]:
    """Return a style for each label, by its position."""
    return [Style(label, *_LINES[index % len(_LINES)]) for index, label in enumerate(labels)]


@contextmanager
def use_style() -> Iterator[None]:
    """Draw in this style, independent of the reader's settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def set_log_scale(axes: Axes, subs: Sequence[int] = (1, 2, 5), *, horizontal: bool = False) -> None:
    """Make an axis with positive numbers logarithmic, with plain numbers at the multiples `subs` of powers of ten."""
    if axes.has_data() and not math.isfinite(axes.dataLim.minposx if horizontal else axes.dataLim.minposy):
        return  # no number is positive, and matplotlib would warn
    axes.set(**{"xscale" if horizontal else "yscale": "log"})
    axis = axes.xaxis if horizontal else axes.yaxis
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def add_caption(figure: Figure, recipe: Recipe, *more: str) -> None:
    """Write above the figure what was trained, over how many runs, and `more`."""
    runs = f"mean ± standard deviation of {recipe.comparison.seeds} runs" if recipe.comparison.seeds > 1 else "one run"
    add_text(figure, setting(recipe), runs, *more)


def add_text(figure: Figure, *sentences: str) -> None:
    """Write sentences above the figure."""
    wrapped = (textwrap.wrap(sentence, int(_CHARACTERS * figure.get_figwidth())) for sentence in sentences)
    figure.suptitle("\n".join(chain.from_iterable(wrapped)), x=0.01, ha="left", fontsize=8.5, color=SOFT)
