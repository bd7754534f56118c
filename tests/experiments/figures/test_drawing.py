"""Panels of a drawing: pieces of the saved SVG, in the colors of the page, that stay text."""

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from matplotlib.figure import Figure

from steppe.experiments.figures.drawing import Drawing, color_variable, tag, theme_css
from steppe.experiments.figures.style import COLORS

NAMES = {"SGD": "sgd", "<b>": "sam:rho=0.1"}


def plot() -> Figure:
    figure = Figure(layout="constrained")
    for axes in figure.subplots(1, 2):
        for (label, color), y in zip((("SGD", COLORS[0]), ("<b>", COLORS[-1])), (1.0, 2.0), strict=True):
            (line,) = axes.plot([0, 1], [y, y], "o-", color=color, label=label)
            tag(line, label, tips=[f"{label}: {y}", "</svg><script>"])
        axes.set_title("<i>title</i>")
    figure.suptitle("a caption")
    return figure


def test_panel_is_the_piece_of_the_saved_svg_with_the_same_points(tmp_path: Path) -> None:
    drawing = Drawing("two", plot)
    saved = {file.suffix: file for file in drawing.save(tmp_path)}
    whole = ET.parse(saved[".svg"]).getroot()
    markers = [(use.get("x"), use.get("y")) for use in whole.iter("{http://www.w3.org/2000/svg}use")]
    panels = [drawing.panel(index, NAMES, "described") for index in range(2)]
    found = [pair for panel in panels for pair in re.findall(r'<use [^>]*?x="([^"]*)" y="([^"]*)"', panel)]
    assert [float(x) for pair in found for x in pair] == pytest.approx(
        [float(x or "nan") for pair in markers for x in pair], abs=0.006
    )
    assert "a caption" in saved[".svg"].read_text()
    assert not any("a caption" in panel for panel in panels)


def test_panels_share_no_ids_and_refer_to_their_own() -> None:
    drawing = Drawing("two", plot)
    ids, references = [], []
    for index in range(2):
        panel = drawing.panel(index, NAMES, "described")
        ids.append(set(re.findall(r' id="([^"]*)"', panel)))
        references.append(set(re.findall(r"#([^\";)]*)[\")]", panel)))
    assert ids[0]
    assert not ids[0] & ids[1]
    assert all(reference <= own for reference, own in zip(references, ids, strict=True))


def test_labels_and_tips_stay_text() -> None:
    panel = ET.fromstring(Drawing("two", plot).panel(0, NAMES, '"><script>'))
    assert panel.get("aria-label") == '"><script>'
    assert not [element for element in panel.iter() if element.tag in ("script", "i", "b")]
    tips = [title.text for title in panel.iter("title")]
    assert tips == ["SGD: 1.0", "</svg><script>", "<b>: 2.0", "</svg><script>"]
    assert [group.get("data-method") for group in panel.iter("g") if "data-method" in group.attrib] == [*NAMES.values()]


def test_panel_has_the_colors_of_the_theme() -> None:
    panel = Drawing("two", plot).panel(0, NAMES, "described")
    for color in (COLORS[0], COLORS[-1]):
        assert f"var({color_variable(color)})" in panel
        assert color.lower() not in panel
        assert color_variable(color) in theme_css(dark=False)
    assert not set(theme_css(dark=True).split(";")[:-1]) & set(theme_css(dark=False).split(";")[:-1])


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_files_are_the_same_bytes_each_time(tmp_path: Path, suffix: str) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Drawing("two", plot).save(tmp_path / name)
    assert (tmp_path / "a" / f"two.{suffix}").read_bytes() == (tmp_path / "b" / f"two.{suffix}").read_bytes()
