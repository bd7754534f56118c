"""A drawn figure: rendered once, saved as PNG and SVG, and shown on the page panel by panel from the same SVG."""

import copy
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.transforms import Affine2D
from numpy.typing import ArrayLike

from steppe.experiments.analysis.statistics import is_usable
from steppe.experiments.figures.style import CARD, COLORS, GRID, INK, SOFT, Style, use_style
from steppe.experiments.storage.files import write_atomically

_SUFFIXES = ("png", "svg")
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_MARGIN = 4.0  # points around a panel on the page
_LIGHTER = 0.28  # share of white in a method's color on a dark page
_TAGGED = "tagged:"  # begins the ids that `tag` sets

ET.register_namespace("", _SVG[1:-1])
ET.register_namespace("xlink", _XLINK[1:-1])


def tag(artist: Artist, *labels: str, tips: Sequence[str] = ()) -> None:
    """Mark an artist as part of the methods with these labels, which the page can hide.

    `tips` are the texts that are shown when the pointer is over its markers, one text a marker.
    """
    artist.set_gid(_TAGGED + json.dumps([labels, tips]))


def tag_legend(legend: Legend) -> None:
    """Mark each entry of a legend as part of the method that it names."""
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        tag(text, text.get_text())
        if handle is not None:
            tag(handle, text.get_text())


def plot_mean(
    axes: Axes,
    style: Style,
    x: ArrayLike,
    mean: ArrayLike,
    sd: ArrayLike | None = None,
    lowest: ArrayLike = -math.inf,
    *,
    tips: Sequence[str] = (),
    **look: Any,
) -> None:
    """Draw the mean of a method as a line and, one standard deviation to either side, a band that ends at `lowest`.

    The line has a gap where the mean is not usable.
    """
    middle = np.asarray([value if is_usable(value) else math.nan for value in np.asarray(mean).tolist()])
    (line,) = axes.plot(x, middle, style.line, color=style.color, label=style.label, **look)
    tag(line, style.label, tips=[tip for tip, value in zip(tips, middle, strict=False) if is_usable(value)])
    if sd is not None:
        deviation = np.asarray(sd)
        low = np.maximum(middle - deviation, np.asarray(lowest))
        band = axes.fill_between(x, low, middle + deviation, color=style.color, alpha=0.18, linewidth=0)
        tag(band, style.label)


def freeze(figure: Figure) -> None:
    """Compute the layout and fix it, as each file would compute it again and later artists would change it."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)


class Drawing:
    """A figure and the name of its files; the same measurements give the same files.

    Args:
        stem: name of the files.
        plot: builds the figure, when it is first needed.
        layout: False for a figure of which only single panels are shown, which needs no layout: that takes as long as
            everything else.
    """

    def __init__(self, stem: str, plot: Callable[[], Figure], *, layout: bool = True) -> None:
        self.stem, self._plot, self._layout = stem, plot, layout
        self._trees: dict[tuple[tuple[str, str], ...], ET.Element] = {}

    @cached_property
    def figure(self) -> Figure:
        """The figure, in its final layout."""
        with use_style():
            figure = self._plot()
            FigureCanvasAgg(figure)  # the figure would make another one each time that a text is measured
            if not self._layout:
                figure.set_layout_engine("none")
            elif figure.get_layout_engine() is not None:
                freeze(figure)
        return figure

    def save(self, folder: Path) -> list[Path]:
        """Write the figure as PNG and SVG; return the files."""
        files = [folder / f"{self.stem}.{suffix}" for suffix in _SUFFIXES]
        for file in files:
            if file.suffix == ".svg":
                content: bytes = ET.tostring(self._tree({}), encoding="utf-8", xml_declaration=True)
            else:
                with use_style(), io.BytesIO() as buffer:
                    self.figure.savefig(buffer, format=file.suffix[1:])
                    content = buffer.getvalue()
            write_atomically(file, content)
        return files

    def panel(self, index: int, names: Mapping[str, str], description: str) -> str:
        """Return one of the figure's axes as an SVG element in the colors of the page's theme.

        What belongs to a method carries its name, `names[label]`, as `data-method`. Captions and legends outside of
        the axes are left out: the page has its own.
        """
        root, prefix = self._tree(names), f"{self.stem}-{index}-"
        (found,) = (group for group in root.iter(f"{_SVG}g") if group.get("id") == f"axes-{index}")
        axes = copy.deepcopy(found)
        del axes.attrib["id"]
        x, y, width, height = self._box(index)
        view_box = f"{x:.1f} {y:.1f} {width:.1f} {height:.1f}"
        panel = ET.Element(f"{_SVG}svg", {"viewBox": view_box, "role": "img", "aria-label": description})
        ET.SubElement(panel, f"{_SVG}defs").extend(map(copy.deepcopy, _referenced(axes, root)))
        panel.append(axes)
        for element in panel.iter():
            _adapt(element, prefix)
            _shorten(element)
        return ET.tostring(panel, encoding="unicode").replace(f' xmlns="{_SVG[1:-1]}"', "", 1)

    @cached_property
    def _source(self) -> bytes:
        file = io.BytesIO()
        with use_style():
            for index, axes in enumerate(self.figure.axes):
                axes.set_gid(f"axes-{index}")
            self.figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue().replace(b"'DejaVu Sans'", b"'DejaVu Sans', sans-serif")

    def _tree(self, names: Mapping[str, str]) -> ET.Element:
        """Parse the SVG, once for all panels, and turn its tags into names of methods and into tips."""
        key = tuple(names.items())
        if key not in self._trees:
            self._trees[key] = self._parsed(names)
        return self._trees[key]

    def _parsed(self, names: Mapping[str, str]) -> ET.Element:
        root = ET.fromstring(self._source)
        for group in root.iter(f"{_SVG}g"):
            if group.get("id", "").startswith(_TAGGED):
                labels, tips = json.loads(group.attrib.pop("id").removeprefix(_TAGGED))
                if all(label in names for label in labels):
                    group.set("data-method", " ".join(names[label] for label in labels))
                markers = list(group.iter(f"{_SVG}use"))
                if len(markers) == len(tips):  # not so where a point lies outside of the axes
                    for marker, tip in zip(markers, tips, strict=True):
                        ET.SubElement(marker, f"{_SVG}title").text = tip
        return root

    def _box(self, index: int) -> tuple[float, float, float, float]:
        """Left, top, width and height of an axes with all that belongs to it, in points from the top left."""
        pixels = self.figure.axes[index].get_tightbbox()
        assert pixels is not None
        box = pixels.transformed(Affine2D().scale(72 / self.figure.dpi)).padded(_MARGIN)
        return box.x0, 72 * self.figure.get_figheight() - box.y1, box.width, box.height


def save_all(drawings: Iterable[Drawing], folder: Path) -> list[Path]:
    """Write the files of all figures to a folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [file for drawing in drawings for file in drawing.save(folder)]


def color_variable(color: str) -> str:
    """Return the CSS variable of a method's color.

    >>> color_variable("#D55E00")
    '--line-d55e00'
    """
    return f"--line-{color[1:].lower()}"


def theme_css(*, dark: bool) -> str:
    """Return the declarations of the methods' colors, for a light or a dark page."""
    return " ".join(f"{color_variable(color)}: {_on_dark(color) if dark else color};" for color in COLORS)


def _on_dark(color: str) -> str:
    """Lighten a color for a dark page, where black would be invisible.

    >>> _on_dark("#010101"), _on_dark("#0072B2")
    ('#E6E6E6', '#4799C8')
    """
    if color == "#010101":
        return "#E6E6E6"
    red, green, blue = (part + (1 - part) * _LIGHTER for part in to_rgb(color))
    return to_hex((red, green, blue)).upper()


_COORDINATES = {"d", "points", "transform", "x", "y", "x1", "x2", "y1", "y2", "width", "height"}
_THEMED = {INK: "--ink", SOFT: "--soft", GRID: "--grid", CARD: "--card"} | {c: color_variable(c) for c in COLORS}


def _referenced(group: ET.Element, root: ET.Element) -> Iterator[ET.Element]:
    """Yield the clip paths and markers that a group refers to and that are defined elsewhere in the file."""
    defined = {element.get("id"): element for element in root.iter() if "id" in element.attrib}
    own = {element.get("id") for element in group.iter()}
    references = (
        reference[1]
        for element in group.iter()
        for name in ("clip-path", f"{_XLINK}href")
        if (reference := re.search(r"#([^)]*)", element.get(name, "")))
    )
    yield from (defined[name] for name in dict.fromkeys(references) if name not in own)


def _adapt(element: ET.Element, prefix: str) -> None:
    """Make ids unique on a page of many figures, and replace fixed colors by the theme's variables."""
    for name, value in [*element.attrib.items()]:
        if name in ("id", "clip-path", f"{_XLINK}href"):
            del element.attrib[name]
            if name != "id" or element.tag in (f"{_SVG}clipPath", f"{_SVG}path"):  # other ids are referred to nowhere
                name = name.removeprefix(_XLINK)
                element.set(name, re.sub(r"^(url\(#|#|)", rf"\g<1>{prefix}", value, count=1))
        elif name == "style":
            element.set(name, re.sub(r"#[0-9a-f]{6}\b", _themed, value))


def _shorten(element: ET.Element) -> None:
    """Leave out what no reader sees: further digits, indentation, and the font, which the page replaces by its own."""
    element.text, element.tail = (part and part.strip(" \n") for part in (element.text, element.tail))
    for name, value in element.attrib.items():
        if name in _COORDINATES:
            shorter = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
            element.set(name, re.sub(r"\s+", " ", shorter).strip())
        elif name == "style":
            element.set(name, re.sub(r"font-family: [^;]*(; )?", "", value))


def _themed(color: re.Match[str]) -> str:
    variable = _THEMED.get(color[0].upper())
    return f"var({variable})" if variable else color[0]
