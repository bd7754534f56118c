"""What was measured of flatness, drawn: spectra over each other, landscapes side by side, lines between solutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from steppe.experiments.figures.style import GREY, Style, in_turn, look, save, tell
from steppe.flatness import Density, Flatness, Landscape

__all__ = ["draw", "draw_lines"]

_BANDWIDTH = 0.005  # of the spectra's whole range
_GRID = 600
_LEAST = 1e-7  # of the density's greatest value: below it, a Gaussian's flank is all there is
_LEVELS = 14
_WIDTH = 4.2  # inches a landscape

Groups = Mapping[str, Sequence[Flatness]]
"""What was measured of each method, a solution a seed, by its label; in the order that gives them their looks."""


def draw(groups: Groups, folder: Path, told: str) -> list[Path]:
    """Draw `spectra`, `landscapes` and `eigen_landscapes`, where there are any, as PNG and SVG; return the files.

    `told` is what was measured, in a line. A method of which nothing was measured keeps its color free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    styles = dict(zip(groups, in_turn(list(groups)), strict=True))
    groups = {label: of for label, of in groups.items() if of}
    if not groups:
        return []
    with look():
        files = save(_spectra(groups, styles, told), folder / "spectra")
        for stem, title, run in (
            ("landscape", "Loss around the first run's solution, two random directions", "filter norms"),
            ("eigen_landscape", "Loss around the first run's solution, its two top eigenvectors", "|e|"),
        ):
            surfaces = {label: surface for label, of in groups.items() if (surface := getattr(of[0], stem)) is not None}
            if surfaces:
                files += save(_landscapes(surfaces, title, run, told), folder / f"{stem}s")
    return files


def draw_lines(lines: Sequence[Mapping[str, Any]], styles: Mapping[str, Style], folder: Path, told: str) -> list[Path]:
    """Draw the losses between pairs of solutions as `lines`, training and test side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    with look():
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        for axes, split in zip(figure.subplots(1, 2), ("train", "test"), strict=True):
            for line in lines:
                style, first = styles[line["b"]], line["seed"] == lines[0]["seed"]
                losses = [math.nan if loss is None else loss for loss in line[split]]
                label = f"{styles[line['a']].label} (0) to {style.label} (1)" if first else None
                axes.plot(line["axis"], losses, style.line, color=style.color, linewidth=1.2, label=label)
            axes.set_title(f"{'Training' if split == 'train' else 'Test'} loss on the straight line")
            axes.set_xlabel("t, of the way from one solution to the other")
            axes.set_ylabel("cross-entropy")
            axes.legend()
        made = ", BatchNorm's statistics estimated anew at each point" if any(x["reestimated"] for x in lines) else ""
        tell(figure, told, f"a line a seed{made}")
        return save(figure, folder / "lines")


def _spectra(groups: Groups, styles: Mapping[str, Style], told: str) -> Figure:
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    found = [density for of in groups.values() for density in (one.density for one in of)]
    low, high = (float(pick([pick(d.nodes.flatten().tolist()) for d in found])) for pick in (min, max))
    bandwidth = _BANDWIDTH * max(high - low, 1e-12)
    x = torch.linspace(low - 3 * bandwidth, high + 3 * bandwidth, _GRID, dtype=torch.float64)
    greatest = 0.0
    for label, of in groups.items():
        mean, spread = _density([one.density for one in of], x, bandwidth)
        greatest = max(greatest, float(mean.max()))
        style = styles[label]
        axes.plot(x, mean, style.line, color=style.color, linewidth=1.6, label=style.label)
        axes.fill_between(x, (mean - spread).clamp_min(0), mean + spread, color=style.color, alpha=0.18, linewidth=0)
        for one in of:
            tops = one.eigenvalues.tolist()
            axes.plot(tops, [_LEAST * greatest * 1.6] * len(tops), "|", color=style.color, markersize=9)
    axes.set_yscale("log")
    axes.set_ylim(_LEAST * greatest, 3 * greatest)
    axes.axvline(0.0, color=GREY, linewidth=0.8)
    axes.set_title("Spectral density of the Hessian")
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    axes.legend()
    tell(figure, told, f"smoothed by a Gaussian of {bandwidth:.2g}; band: standard error; ticks: largest eigenvalues")
    return figure


def _density(densities: Sequence[Density], x: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """The mean over solutions, with its standard error: over them, or over the probes of a single one."""
    values, errors = zip(*(density.at(x, bandwidth) for density in densities), strict=True)
    every = torch.stack(values)
    if len(every) == 1:
        return every[0], errors[0].nan_to_num(0.0)
    return every.mean(0), every.std(0) / math.sqrt(len(every))


def _landscapes(surfaces: Mapping[str, Landscape], title: str, run: str, told: str) -> Figure:
    """Contours side by side, on the same axes and colors; what is not finite stays white."""
    figure = Figure(figsize=(_WIDTH * len(surfaces) + 0.9, _WIDTH + 0.5), layout="constrained")
    panels = figure.subplots(1, len(surfaces), squeeze=False, sharex=True, sharey=True)[0]
    finite = torch.cat([s.losses[s.losses.isfinite()].flatten() for s in surfaces.values()])
    low, high = max(float(finite.min()), 1e-8), float(finite.max())
    levels = torch.logspace(math.log10(low * 0.999), math.log10(max(high, low * 1.01) * 1.001), _LEVELS).tolist()
    drawn = None
    for axes, (label, surface) in zip(panels, surfaces.items(), strict=True):
        axis, losses = surface.axis.numpy(), surface.losses.clamp_min(low).T.numpy()  # matplotlib's rows are y
        drawn = axes.contourf(axis, axis, losses, levels=levels, norm=LogNorm(low, levels[-1]), cmap="viridis")
        axes.contour(axis, axis, losses, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
        axes.plot(0, 0, "+", color="white", markersize=9)
        axes.set_title(label)
        axes.set_aspect("equal")
        axes.set_xlabel(f"first direction, in {run}")
        axes.grid(visible=False)
    panels[0].set_ylabel(f"second direction, in {run}")
    assert drawn is not None
    figure.colorbar(drawn, ax=list(panels), label="loss", shrink=0.85, format="%.2g")
    tell(figure, told, title)
    return figure
