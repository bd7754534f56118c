"""The figures of the page: panels of the drawings, and the choices under which each is visible."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.figure
from markupsafe import Markup

from steppe.experiments.analysis.summary import Summary, setting
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.figures import controls, curves, robustness
from steppe.experiments.figures.curves import Extent, Quantity
from steppe.experiments.figures.drawing import Drawing
from steppe.experiments.figures.flatness import drawings as flatness_drawings
from steppe.experiments.figures.flatness import landscapes_of
from steppe.experiments.figures.landscapes import (
    KINDS,
    is_logarithmic,
    loss_range,
    plot_lines,
    plot_profiles,
    profiles_of,
    surface,
)
from steppe.experiments.figures.spectra import (
    BANDWIDTH,
    Groups,
    measures_of,
    plot_eigenvalues,
    plot_gap_over,
    plot_spectra,
    smoothing,
)
from steppe.experiments.figures.style import styles
from steppe.experiments.report.numbers import number
from steppe.experiments.storage.run_folder import Results
from steppe.flatness import Flatness, Landscape

_BANDWIDTHS = (0.001, BANDWIDTH, 0.02, 0.1)
_SCALES = {"linear": "Linear", "log": "Log"}


@dataclass(frozen=True)
class Choice:
    """A group of buttons of which one is pressed; figures name it and one of its values in `data-when`."""

    label: str
    options: Mapping[str, str]
    """Text of the buttons, by value."""
    default: str


@dataclass(frozen=True)
class Panel:
    """One panel as SVG, and the values of choices under which it is visible."""

    name: str
    svg: Markup
    when: Mapping[str, str]
    method: str
    """The method that it shows; empty where it shows several."""


class Figures:
    """Everything that is drawn of a run folder; `saved` are the drawings that belong into its folder figures/."""

    SECTIONS = ("curves", "tracked", "controls", "pareto", "robustness", "gap_over", "spectra", "landscapes", "through")
    """The methods that yield the figures of a section, in this order: later ones may use earlier ones' choices."""

    def __init__(
        self,
        recipe: Recipe,
        results: Results,
        summary: Summary,
        measured: Mapping[Run, Flatness],
        lines: Sequence[Mapping[str, Any]],
    ) -> None:
        self._recipe, self._results, self._measured, self._lines = recipe, results, measured, lines
        self._description = setting(recipe)
        self._styles = styles(recipe)
        self._names = {method.label: str(method) for method in recipe.comparison.methods}
        self._by_label = {style.label: style for style in self._styles.values()}
        self._by_name = {str(method): style for method, style in self._styles.items()}
        self._groups: Groups = {
            method.label: [flat for run, flat in measured.items() if run.method == method]
            for method in recipe.comparison.methods
        }
        self._known: Groups = {label: flats for label, flats in self._groups.items() if flats}
        self.choices: dict[str, Choice] = {}
        self.surfaces: dict[str, dict[str, Any]] = {}
        """By kind and seed: the losses around each method's weights, and the ranges that they share."""
        self.legends: list[tuple[str, str, Mapping[str, str]]] = []
        """Lowest and highest loss of each set of landscapes, and when it is visible."""
        self.about_lines = ""
        drawings = [
            *curves.drawings(recipe, results),
            *controls.drawings(recipe, summary),
            *robustness.drawings(recipe, summary),
            *flatness_drawings(self._groups, self._description),
        ]
        if lines:
            drawings.append(Drawing("lines", partial(plot_lines, lines, self._by_name, self._description)))
        self.saved: Mapping[str, Drawing] = {drawing.stem: drawing for drawing in drawings}

    def curves(self) -> Iterator[Panel]:
        """The quantities over compute or time."""
        texts = {"standardized_epoch": "Standardized epochs", "seconds": "Seconds"}
        self.choices["extent"] = Choice("Horizontal axis", texts, "standardized_epoch")
        for extent in curves.EXTENTS:
            for quantity in curves.quantities(self._recipe):
                yield self._curve(quantity.stem, 0, quantity, extent)

    def tracked(self) -> Iterator[Panel]:
        """The measures of flatness that were taken during training."""
        for extent in curves.EXTENTS:
            for index, quantity in enumerate(curves.tracked(self._results)):
                yield self._curve("sharpness", index, quantity, extent)

    def _curve(self, stem: str, index: int, quantity: Quantity, extent: Extent) -> Panel:
        about = f"{quantity.title} of each method over {extent.title}"
        return self._panel(quantity.field, self.saved[stem + extent.suffix], index, about, extent=extent.field)

    def pareto(self) -> Iterator[Panel]:
        costs = ("Passes a step", "Time a step", "Training time")
        self.choices["cost"] = Choice("Cost", {str(i): text for i, text in enumerate(costs)}, "0")
        metric = self._recipe.task.deciding.name
        for row, (name, title) in enumerate(((f"test_{metric}", f"test {metric}"), ("gap", "generalization gap"))):
            for column, cost in enumerate(costs):
                about = f"{cost} against {title}, one point a method"
                yield self._panel(f"pareto-{name}", self.saved["pareto"], 3 * row + column, about, cost=str(column))

    def controls(self) -> Iterator[Panel]:
        """How much better each method is than the base in each of its forms."""
        if "controls" in self.saved:
            about = "Differences to the base at equal compute and to its controls, one row a method and measure"
            yield self._panel("controls", self.saved["controls"], 0, about)

    def robustness(self) -> Iterator[Panel]:
        """The accuracies on corrupted images and with rounded weights, and their differences to the first method."""
        if "robustness" not in self.saved:
            return
        drawing, first = self.saved["robustness"], self._recipe.comparison.methods[0].label
        what = ("Accuracy on clean and corrupted images and with rounded weights", f"Differences of it to {first}")
        for index, about in enumerate(what[: len(drawing.figure.axes)]):
            name = ("robustness", "robustness-difference")[index]
            yield self._panel(name, drawing, index, f"{about}, one point a method")

    def gap_over(self) -> Iterator[Panel]:
        measures = measures_of(self._groups)
        if not measures:
            return
        gaps: dict[str, list[tuple[int, float | None]]] = {label: [] for label in self._known}
        for run in self._measured:
            records = self._results.get(run, [])
            gaps[run.method.label].append((run.seed, records[-1]["gap"] if records else None))
        drawing = self._drawing("gap_over_flatness", plot_gap_over, self._known, gaps, self._by_label)
        self.choices["measure"] = Choice("Measure", measures, next(iter(measures)))
        for index, (name, title) in enumerate(measures.items()):
            about = f"Generalization gap over {title}, one point a run"
            yield self._panel("gap-over", drawing, index, about, measure=name)

    def spectra(self) -> Iterator[Panel]:
        """Spectra at several bandwidths, and the leading eigenvalues."""
        if not self._known:
            return
        texts = {f"{bandwidth:g}": f"σ = {number(smoothing(self._known, bandwidth), 2)}" for bandwidth in _BANDWIDTHS}
        self.choices["bandwidth"] = Choice("Bandwidth", texts, f"{BANDWIDTH:g}")
        for bandwidth in _BANDWIDTHS:
            drawing = self.saved["spectra"]
            if bandwidth != BANDWIDTH:
                plot = partial(plot_spectra, bandwidth=bandwidth)
                drawing = self._drawing(f"spectra_{bandwidth:g}", plot, self._known, self._by_label)
            about = "Spectral density of the Hessian, one line a method"
            yield self._panel("spectrum", drawing, 0, about, bandwidth=f"{bandwidth:g}")
        drawing = self._drawing("eigenvalues", plot_eigenvalues, self._known, self._by_label)
        yield self._panel("eigenvalues", drawing, 0, "Leading eigenvalues of the Hessian by rank")

    def landscapes(self) -> Iterator[Panel]:
        """Contours of each method's first solution; afterwards the surfaces of all solutions are in `surfaces`.

        Contours of all of them would make a page of many seeds several times as large.
        """
        by_seed: dict[int, dict[str, list[Flatness]]] = {}
        for run, flat in self._measured.items():
            by_seed.setdefault(run.seed, {})[run.method.label] = [flat]
        all_found = ((kind, seed, landscapes_of(by_seed[seed], kind)) for kind in KINDS for seed in sorted(by_seed))
        found = {(kind, str(seed)): landscapes for kind, seed, landscapes in all_found if landscapes}
        if not found:
            return
        first_kind, first_seed = next(iter(found))
        scale = "log" if is_logarithmic([*found[first_kind, first_seed].values()]) else "linear"
        texts = dict(zip(KINDS, ("Random", "Eigenvectors"), strict=True))
        self.choices |= {
            "view": Choice("View", {"3d": "Surface", "2d": "Contours"}, "2d"),
            "kind": Choice("Directions", {kind: texts[kind] for kind, _ in found}, first_kind),
            "scale": Choice("Loss axis", _SCALES, scale),
            "seed": Choice("Seed", {seed: f"Seed {seed}" for _, seed in found}, first_seed),
        }
        for kind in self.choices["kind"].options:
            yield from self._contours(kind)
        for (kind, seed), landscapes in found.items():
            values = [*landscapes.values()]
            self._add_legend(values, view="3d", kind=kind, seed=seed)
            self.surfaces.setdefault(kind, {})[seed] = {
                "linear": loss_range(values),
                "log": loss_range(values, positive=True),
                "methods": {self._names[label]: surface(landscape) for label, landscape in landscapes.items()},
            }

    def _contours(self, kind: str) -> Iterator[Panel]:
        drawing, landscapes = self.saved[f"{kind}s"], landscapes_of(self._known, kind)
        self._add_legend([*landscapes.values()], view="2d", kind=kind)
        for index, label in enumerate(landscapes):
            about = f"Contours of the training loss around the weights of {label}, first run"
            yield self._panel("contour", drawing, index, about, self._names[label], view="2d", kind=kind)

    def _add_legend(self, landscapes: Sequence[Landscape], **when: str) -> None:
        low, high = loss_range(landscapes)
        self.legends.append((number(low, 4), number(high, 4), when))

    def through(self) -> Iterator[Panel]:
        """The loss along a direction, and from one solution to another."""
        has_profiles = any(profiles_of(self._known).values())
        if not has_profiles and not self._lines:
            return
        self.choices.setdefault("scale", Choice("Loss axis", _SCALES, "linear"))
        if has_profiles:
            drawing = self._drawing("profiles", plot_profiles, self._known, self._by_label)
            about = "Loss along the first random direction, one line a method"
            for index, scale in enumerate(("linear", "log")):
                yield self._panel("profile", drawing, index, about, scale=scale)
        if self._lines:
            self.about_lines = "Weights and buffers are interpolated as they are."
            if any(line["reestimated"] for line in self._lines):
                self.about_lines = "BatchNorm's statistics were estimated anew at each point of a line."
            logarithmic = self._drawing("lines_log", partial(plot_lines, log=True), self._lines, self._by_name)
            drawings = {"linear": self.saved["lines"], "log": logarithmic}
            for index, split in enumerate(("training", "test")):
                for scale, drawing in drawings.items():
                    about = f"The {split} loss on the straight line between the weights of two methods"
                    yield self._panel(f"lines-{split}", drawing, index, about, scale=scale)

    def is_visible(self, when: Mapping[str, str]) -> bool:
        """Return True if a figure is visible before the first choice."""
        return all(self.choices[name].default == value for name, value in when.items())

    def _drawing(self, stem: str, plot: Callable[..., matplotlib.figure.Figure], *arguments: Any) -> Drawing:
        """Return a drawing that is on the page only."""
        return Drawing(stem, partial(plot, *arguments, self._description), layout=False)

    def _panel(self, name: str, drawing: Drawing, index: int, description: str, method: str = "", **when: str) -> Panel:
        return Panel(name, Markup(drawing.panel(index, self._names, description)), when, method)
