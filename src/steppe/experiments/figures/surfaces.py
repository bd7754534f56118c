"""Landscapes as surfaces that can be turned: figures of plotly, as JSON for its script.

Colors of the theme are CSS variables, which the page's script replaces by their values.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from steppe.experiments.figures.drawing import color_variable
from steppe.experiments.figures.landscapes import COLORMAP, loss_range
from steppe.experiments.figures.style import Style
from steppe.flatness import Landscape

_LINES = 14
_HIDDEN = {"show": False, "highlight": False}


def is_logarithmic(landscapes: Sequence[Landscape]) -> bool:
    """Return True if the losses are better read on a logarithmic axis: the highest is over 20 times the lowest."""
    low, high = loss_range(landscapes)
    return low > 0 and high / low > 20


def surfaces(landscapes: Mapping[str, Landscape], styles: Mapping[str, Style], *, log: bool) -> dict[str, Any]:
    """Return a figure for each label, all on the same axes and colors; what is not finite is a hole."""
    low, high = loss_range([*landscapes.values()], positive=log)
    span = (math.log10(low), math.log10(high)) if log else (low, high)
    reach = max(max(float(landscape.axis.abs().max()) for landscape in landscapes.values()), 1e-12)
    return {
        label: {
            "data": _traces(landscape, styles[label], span, log=log),
            "layout": {"margin": dict.fromkeys("lrtb", 0), "scene": _scene(span, reach, log=log)},
        }
        for label, landscape in landscapes.items()
    }


def _traces(landscape: Landscape, style: Style, span: tuple[float, float], *, log: bool) -> list[dict[str, Any]]:
    axis = landscape.axis.tolist()
    losses = landscape.losses.T  # losses[i][j] goes along the first direction with i: plotly's rows are y
    z = _rows(losses.log10() if log else losses)
    middle = min(range(len(axis)), key=lambda i: abs(axis[i]))
    # lines of equal height; the script removes them where there is no graphics card, which takes minutes to draw them
    lines = {
        **{"show": True, "usecolormap": False, "color": "rgba(255,255,255,0.28)", "width": 1, "highlight": False},
        **{"start": span[0], "end": span[1], "size": (span[1] - span[0]) / _LINES or 1},
    }
    surface = {
        **{"type": "surface", "x": axis, "y": axis, "z": z, "customdata": _rows(losses), "connectgaps": False},
        **{"cmin": span[0], "cmax": span[1], "colorscale": COLORMAP, "showscale": False},
        "contours": {"x": _HIDDEN, "y": _HIDDEN, "z": lines},
        "lighting": {"ambient": 0.72, "diffuse": 0.55, "specular": 0.06, "roughness": 0.9},
        "hovertemplate": "%{x:.3g}, %{y:.3g}<br>loss %{customdata:.4g}<extra></extra>",
    }
    color = f"var({color_variable(style.color)})"
    solution = {
        **{"type": "scatter3d", "x": [axis[middle]], "y": [axis[middle]], "z": [z[middle][middle]], "mode": "markers"},
        "marker": {"size": 4.5, "color": color, "line": {"color": "#ffffff", "width": 1}},
        "hovertemplate": "the trained weights<extra></extra>",
    }
    return [surface, solution]


def _rows(values: Tensor) -> list[list[float | None]]:
    return [[value if math.isfinite(value) else None for value in row] for row in values.tolist()]


def _scene(span: tuple[float, float], reach: float, *, log: bool) -> dict[str, Any]:
    colors = {
        "gridcolor": "var(--grid)",
        "zerolinecolor": "var(--grid)",
        "linecolor": "var(--line)",
        "color": "var(--soft)",
    }
    axis = {
        **colors,
        **{"range": [-reach, reach], "showspikes": False, "showbackground": False, "nticks": 5},
        **{"tickfont": {"size": 10}, "title": {"text": ""}},
    }
    room = 0.04 * (span[1] - span[0] or 1)
    height = {**axis, "range": [span[0] - room, span[1] + room], **(_exponent_ticks(span) if log else {})}
    return {
        **{"xaxis": axis, "yaxis": axis, "zaxis": height, "dragmode": "turntable"},
        **{"aspectmode": "manual", "aspectratio": {"x": 1, "y": 1, "z": 0.8}},
    }


def _exponent_ticks(span: tuple[float, float]) -> dict[str, Any]:
    """Label an axis of exponents, by which colors and lines are even, with the losses."""
    low, high = span
    step = 0.5 if high - low < 1.5 else max(1, math.ceil((high - low) / 4))
    first = math.floor(low)
    values = [first + i * step for i in range(math.floor((math.ceil(high) - first) / step) + 1)]
    return {"tickmode": "array", "tickvals": values, "ticktext": [f"{10**value:.2g}" for value in values]}
