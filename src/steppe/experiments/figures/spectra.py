"""The Hessian's spectral density and leading eigenvalues, and the generalization gap over each measure of flatness."""

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from steppe.experiments.figures.drawing import plot_mean, tag, tag_legend
from steppe.experiments.figures.style import CARD, GREY, Style, add_text
from steppe.flatness import FAMILIES, Density, Flatness
from steppe.flatness.families import labels_by_family

BANDWIDTH = 0.005
"""The Gaussian's standard deviation by which a spectrum is smoothed, as a share of the range of all eigenvalues."""

_GRID = 600
_LOWEST = 1e-7  # of the density's largest value: below it there is only a Gaussian's flank

Groups = Mapping[str, Sequence[Flatness]]
"""The flatness of each method, one solution a seed, by its label."""


def smoothing(groups: Groups, bandwidth: float = BANDWIDTH) -> float:
    """Return the standard deviation of the Gaussian by which the spectra are smoothed, in units of the eigenvalues."""
    low, high = _range(groups)
    return bandwidth * max(high - low, 1e-12)


def _range(groups: Groups) -> tuple[float, float]:
    nodes = torch.cat([flat.density.nodes.flatten() for solutions in groups.values() for flat in solutions])
    return float(nodes.min()), float(nodes.max())


def plot_spectra(groups: Groups, styles: Mapping[str, Style], description: str, bandwidth: float = BANDWIDTH) -> Figure:
    """Draw the mean density of each method, smoothed by a Gaussian of `bandwidth` times the range."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    sigma, (low, high) = smoothing(groups, bandwidth), _range(groups)
    x = torch.linspace(low - 3 * sigma, high + 3 * sigma, _GRID, dtype=torch.float64)
    largest = 0.0
    for label, solutions in groups.items():
        mean, error = mean_density([flat.density for flat in solutions], x, sigma)
        largest = max(largest, float(mean.max()))
        style = styles[label]
        plot_mean(axes, style, x, mean, error, lowest=0.0, linewidth=1.6)
        for flat in solutions:
            values = flat.eigenvalues.tolist()
            (ticks,) = axes.plot(values, [_LOWEST * largest * 1.6] * len(values), "|", color=style.color, markersize=9)
            tag(ticks, label, tips=[f"{label}: eigenvalue {value:.4g}" for value in values])
    axes.set_yscale("log")
    axes.set_ylim(_LOWEST * largest, 3 * largest)
    axes.axvline(0.0, color=GREY, linewidth=0.8)
    axes.set(title="Spectral density of the Hessian", xlabel="eigenvalue", ylabel="density")
    tag_legend(axes.legend())
    legend = f"smoothed by a Gaussian of {sigma:.2g}; band: standard error; ticks: largest eigenvalues"
    add_text(figure, description, legend)
    return figure


def mean_density(densities: Sequence[Density], x: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Return the mean over solutions and its standard error: over them, or over the probes of a single one."""
    values, errors = zip(*(density.smoothed(x, bandwidth) for density in densities), strict=True)
    stacked = torch.stack(values)
    if len(stacked) == 1:
        return stacked[0], errors[0].nan_to_num(0.0)
    return stacked.mean(0), stacked.std(0) / math.sqrt(len(stacked))


def plot_eigenvalues(groups: Groups, styles: Mapping[str, Style], description: str) -> Figure:
    """Draw the largest eigenvalues of each run, by their rank."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for label, solutions in groups.items():
        for flat in solutions:
            values = flat.eigenvalues.tolist()
            ranks = range(1, len(values) + 1)
            (line,) = axes.plot(ranks, values, color=styles[label].color, linewidth=1.2, alpha=0.45)
            tag(line, label)
            (points,) = axes.plot(ranks, values, "o", color=styles[label].color, markersize=5)
            tag(points, label, tips=[f"{label}: {value:.4g}" for value in values])
    axes.set(title="Leading eigenvalues of the Hessian", xlabel="rank", ylabel="eigenvalue")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    add_text(figure, description)
    return figure


def measures_of(groups: Groups) -> dict[str, str]:
    """Return the finite measures of whole networks, in the order of `FAMILIES`, and what each is called."""
    labels = {name: label for family in FAMILIES.values() for name, label in family.measures.items()}
    measured = [flat.measures for solutions in groups.values() for flat in solutions]
    of_layers = labels_by_family(name for measures in measured for name in measures)["layers"]
    names = dict.fromkeys([*labels, *(name for measures in measured for name in measures if name not in of_layers)])
    return {
        name: labels.get(name, name.replace("_", " "))
        for name in names
        if any(name in measures and math.isfinite(measures[name].value) for measures in measured)
    }


def plot_gap_over(
    groups: Groups,
    gaps: Mapping[str, Sequence[tuple[int, float | None]]],
    styles: Mapping[str, Style],
    description: str,
) -> Figure:
    """Draw the generalization gap over each of `measures_of`, one point a run.

    `gaps` are the seed and the gap of each solution; None where it is unknown.
    """
    measures, columns = measures_of(groups), 4
    rows = math.ceil(len(measures) / columns)
    figure = Figure(figsize=(5.6 * columns, 4.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, title) in zip(panels, measures.items(), strict=False):
        axes.set(title="Gap over flatness", xlabel=title, ylabel="generalization gap, points")
        for label, solutions in groups.items():
            known = [
                (flat.measures[name].value, gap, seed)
                for flat, (seed, gap) in zip(solutions, gaps[label], strict=True)
                if gap is not None and name in flat.measures and math.isfinite(flat.measures[name].value)
            ]
            if known:
                x, y, _ = zip(*known, strict=True)
                look = {"color": styles[label].color, "markersize": 9, "alpha": 0.85, "markeredgecolor": CARD}
                (points,) = axes.plot(x, y, "o", **look)
                tag(points, label, tips=[f"{label}, seed {seed}: {a:.4g}, gap {b:.2f}" for a, b, seed in known])
    for axes in panels[len(measures) :]:
        axes.remove()
    add_text(figure, description)
    return figure
