"""The loss around solutions, as contours and as surfaces that can be turned, and on the lines between solutions.

The page's script draws the surfaces, from numbers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from steppe.experiments.figures.drawing import plot_mean, tag, tag_legend
from steppe.experiments.figures.spectra import Groups
from steppe.experiments.figures.style import Style, add_text, set_log_scale
from steppe.flatness import Landscape

COLORMAP = ((0.0, "#0f2f38"), (0.2, "#1d5560"), (0.4, "#3c7f74"), (0.6, "#7da978"), (0.8, "#c3c87f"), (1.0, "#f6e9b2"))
"""Colors of the loss, from low to high."""

KINDS: Mapping[str, tuple[str, str]] = {
    "landscape": ("two random directions", "filter norms"),
    "eigen_landscape": ("its two top eigenvectors", "|e|"),
}
"""By the field of `Flatness`: the directions, and the unit of the axes."""

_LEVELS = 14
_WIDTH = 4.2  # inches a landscape
# White that the page does not replace by the color of its background.
_WHITE = "#FEFEFE"


def loss_range(landscapes: Sequence[Landscape], *, positive: bool = False) -> tuple[float, float]:
    """Return the lowest and the highest finite loss, of the positive ones if `positive`."""
    losses = torch.cat([landscape.losses.flatten() for landscape in landscapes])
    losses = losses[losses.isfinite() & (losses > 0 if positive else losses.isfinite())]
    return (float(losses.min()), float(losses.max())) if len(losses) else (0.1, 1.0)


def plot_landscapes(landscapes: Mapping[str, Landscape], kind: str, description: str, *more: str) -> Figure:
    """Draw contours side by side, on the same axes and colors; what is not finite stays white."""
    directions, unit = KINDS[kind]
    figure = Figure(figsize=(_WIDTH * len(landscapes) + 0.9, _WIDTH + 0.5), layout="constrained")
    panels = figure.subplots(1, len(landscapes), squeeze=False, sharex=True, sharey=True)[0]
    low, high = loss_range([*landscapes.values()])
    low = max(low, 1e-8)
    levels = torch.logspace(math.log10(low * 0.999), math.log10(max(high, low * 1.01) * 1.001), _LEVELS).tolist()
    colors = {"norm": LogNorm(low, levels[-1]), "cmap": LinearSegmentedColormap.from_list("", COLORMAP)}
    filled = None
    for axes, (label, landscape) in zip(panels, landscapes.items(), strict=True):
        axis, losses = landscape.axis.numpy(), landscape.losses.clamp_min(low).T.numpy()  # matplotlib's rows are y
        filled = axes.contourf(axis, axis, losses, levels=levels, **colors)
        axes.contour(axis, axis, losses, levels=levels, colors=_WHITE, linewidths=0.4, alpha=0.6)
        axes.plot(0, 0, "+", color=_WHITE, markersize=9)
        axes.set(title=label, xlabel=f"first direction, in {unit}", aspect="equal")
        axes.tick_params(labelleft=True)  # each panel also stands by itself on the page
        axes.grid(visible=False)
    panels[0].set_ylabel(f"second direction, in {unit}")
    assert filled is not None
    figure.colorbar(filled, ax=list(panels), label="loss", shrink=0.85, format="%.2g")
    add_text(figure, description, f"Loss around the solution, {directions}", *more)
    return figure


def plot_profiles(groups: Groups, styles: Mapping[str, Style], description: str) -> Figure:
    """Draw the loss along the first random direction, on a linear and on a logarithmic axis.

    The mean over the runs, its band one standard deviation to either side.
    """
    profiles = profiles_of(groups)
    figure = Figure(figsize=(11.2, 4.2), layout="constrained")
    for axes, log in zip(figure.subplots(1, 2), (False, True), strict=True):
        for label, measured in profiles.items():
            if measured:
                losses = torch.stack([losses for _, losses in measured])
                # where one run is not finite there is a gap: a mean over the others would be another quantity
                losses = torch.where(losses.isfinite(), losses, math.nan)
                sd = losses.std(0) if len(losses) > 1 else None
                x, lowest = measured[0][0], losses.min(0).values
                plot_mean(axes, styles[label], x, losses.mean(0), sd, lowest, linewidth=2.0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set(title="Along the first direction", xlabel="length along the direction", ylabel="training loss")
        if log:
            set_log_scale(axes)
        tag_legend(axes.legend())
    add_text(figure, description)
    return figure


def profiles_of(groups: Groups) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return the axis and the losses of each solution along the first direction, where the grid goes through it."""
    return {
        label: [
            (landscape.axis, landscape.losses[:, int((landscape.axis == 0).nonzero()[0])])
            for landscape in (flat.landscape for flat in solutions)
            if landscape is not None and (landscape.axis == 0).any()
        ]
        for label, solutions in groups.items()
    }


def plot_lines(
    lines: Sequence[Mapping[str, Any]], styles: Mapping[str, Style], description: str, *, log: bool = False
) -> Figure:
    """Draw the losses between pairs of solutions, training and test side by side; `styles` by method."""
    figure = Figure(figsize=(11.2, 4.2), layout="constrained")
    for axes, split in zip(figure.subplots(1, 2), ("train", "test"), strict=True):
        for line in lines:
            start, style, is_first = styles[line["a"]], styles[line["b"]], line["seed"] == lines[0]["seed"]
            losses = [math.nan if loss is None else loss for loss in line[split]]
            label = f"{start.label} (0) to {style.label} (1)" if is_first else None
            (drawn,) = axes.plot(line["axis"], losses, style.line, color=style.color, linewidth=1.2, label=label)
            tag(drawn, start.label, style.label)
        title = f"{'Training' if split == 'train' else 'Test'} loss on the straight line"
        axes.set(title=title, xlabel="t, from one solution to the other", ylabel="cross-entropy")
        if log:
            set_log_scale(axes)
        axes.legend()
    reestimated = any(line["reestimated"] for line in lines)
    statistics = ", BatchNorm's statistics estimated anew at each point" if reestimated else ""
    add_text(figure, description, f"one line a seed{statistics}")
    return figure


def is_logarithmic(landscapes: Sequence[Landscape]) -> bool:
    """Return True if the losses are better read on a logarithmic axis: the highest is over 20 times the lowest."""
    low, high = loss_range(landscapes)
    return low > 0 and high / low > 20


def surface(landscape: Landscape) -> dict[str, Any]:
    """Return the axis and the losses of a landscape as JSON: losses[i][j] at axis[i] along the first direction.

    Five digits are more than a drawing shows; what is not finite is None.
    """
    return {"axis": _short(landscape.axis.tolist()), "losses": [_short(row) for row in landscape.losses.tolist()]}


def _short(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
