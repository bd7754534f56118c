"""Accuracy, loss, generalization gap and sharpness over compute and over time."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from steppe import flatness
from steppe.experiments.analysis.statistics import estimate, is_usable
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.task_info import LOSS
from steppe.experiments.figures import pareto
from steppe.experiments.figures.drawing import Drawing, plot_mean, tag, tag_legend
from steppe.experiments.figures.style import GREY, Style, add_caption, set_log_scale, styles
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import Results

_MANY = 4  # methods, from which on the legend is beside the curves and not among them


@dataclass(frozen=True)
class Quantity:
    """A field of `Record` that is drawn, its title, and its unit."""

    field: str
    title: str
    unit: str
    log: bool = False

    @property
    def stem(self) -> str:
        """The field as a part of a file's name; a user may give any name to a metric."""
        return re.sub(r"\W+", "_", self.field)


@dataclass(frozen=True)
class Extent:
    """The horizontal axis: a field of `Record`, its label, and the suffix of the files' names."""

    field: str
    title: str
    suffix: str = ""


def quantities(recipe: Recipe) -> list[Quantity]:
    """Return what is drawn of every task: its losses, its deciding metric, and the gap."""
    metric, loss = recipe.task.deciding, "" if recipe.data.task else "cross-entropy"
    unit = {"points": "percentage points"}.get(metric.unit_of_change, metric.unit_of_change)
    first = Quantity("train_loss", "Training loss", loss, log=True)
    if metric is LOSS:
        return [first, Quantity("test_loss", "Test loss", loss, log=True), Quantity("gap", "Generalization gap", unit)]
    return [
        first,
        Quantity(f"train_{metric.name}", f"Training {metric.name}", metric.unit),
        Quantity(f"test_{metric.name}", f"Test {metric.name}", metric.unit),
        Quantity("gap", "Generalization gap", unit),
    ]


_TRACKED = (
    Quantity("sharpness", "Sharpness S(w)", "rise of the training loss", log=True),
    Quantity("lambda_max", "Largest eigenvalue of the Hessian", "of the training loss", log=True),
)

EXTENTS = (
    Extent("standardized_epoch", "standardized epochs = gradient evaluations / training samples"),
    Extent("seconds", "training time in seconds, without measuring", suffix="_seconds"),
)


def drawings(recipe: Recipe, results: Results) -> Iterator[Drawing]:
    """Yield each quantity over each extent, all of them as `overview`, `pareto`, and `sharpness` where it was measured.

    A line is the mean over the runs, its band one standard deviation to either side; one run is a thin line.
    """
    for extent in EXTENTS:
        for quantity in quantities(recipe):
            plot = partial(_plot_panels, recipe, results, extent, [quantity], (6.4, 4.4))
            yield Drawing(f"{quantity.stem}{extent.suffix}", plot)
        overview = partial(_plot_panels, recipe, results, extent, quantities(recipe), (10.5, 7.4), legend=1)
        yield Drawing(f"overview{extent.suffix}", overview)
    yield Drawing("pareto", partial(pareto.draw, recipe, results))
    if tracked(results):
        for extent in EXTENTS:
            yield Drawing(f"sharpness{extent.suffix}", partial(_plot_sharpness, recipe, results, extent))


def tracked(results: Results) -> list[Quantity]:
    """Return the measures of flatness that at least one record has."""
    records = [record for of_run in results.values() for record in of_run]
    return [q for q in _TRACKED if any(record[q.field] is not None for record in records)]


def _plot_panels(
    recipe: Recipe,
    results: Results,
    extent: Extent,
    quantities: Sequence[Quantity],
    size: tuple[float, float],
    *sentences: str,
    legend: int = 0,
) -> Figure:
    """Draw each quantity in its own panel, at most two beside each other; a panel has the index `legend`."""
    figure = Figure(figsize=(size[0] + _legend_width(recipe), size[1]), layout="constrained")
    columns = min(len(quantities), 2)
    figure.subplots(-(-len(quantities) // columns), columns, sharex="col", squeeze=False)
    for index, (axes, quantity) in enumerate(zip(figure.axes, quantities, strict=False)):
        _plot(axes, quantity, extent, recipe, results)
        if index < len(quantities) - columns:
            axes.set_xlabel("")
    _add_legend(figure.axes[legend], recipe)
    add_caption(figure, recipe, *sentences, *_about_gaps(recipe, results, quantities))
    return figure


def _plot_sharpness(recipe: Recipe, results: Results, extent: Extent) -> Figure:
    """Draw S(w) and the largest eigenvalue, with the value above which a full-batch step would be unstable."""
    quantities = tracked(results)
    edges = _edges(recipe, results) if quantities[-1].field == "lambda_max" else {}
    sentences = [f"on {recipe.evaluation.flatness_samples} training samples, rho {recipe.training.rho:g}"]
    if edges:
        sentences.append("pale: the edge of stability of full-batch steps, 2/lr for SGD, for SAM by its gradient norm")
    figure = _plot_panels(recipe, results, extent, quantities, (5.25 * len(quantities), 4.6), *sentences)
    for method, (points, values) in edges.items():
        style = styles(recipe)[method]
        x = _means(points, extent.field)
        (line,) = figure.axes[-1].plot(x, values, style.line, color=style.color, linewidth=3, alpha=0.3)
        tag(line, style.label)
    return figure


def _edges(recipe: Recipe, results: Results) -> dict[MethodSpec, tuple[list[list[Record]], list[float]]]:
    """Return the edge of stability of SGD and SAM at each measurement; none unless the base is plain descent."""
    lr, edges = recipe.training.lr or math.nan, {}
    if recipe.training.base != "sgd" or recipe.base_momentum or recipe.training.weight_decay:
        return {}

    def edge(method: MethodSpec, gradient_norm: float) -> float:
        if not 0 <= gradient_norm < math.inf:
            return math.nan
        if method.name == "sgd":
            return float(flatness.edge_of_stability(lr))
        return float(flatness.sam_edge_of_stability(lr, method.rho(recipe.training.rho), gradient_norm))

    for method in recipe.comparison.methods:
        points = _points(method, "gradient_norm", results)
        if points and method.name in ("sgd", "sam"):
            norms = ([record.gradient_norm for record in records] for records in points)
            edges[method] = points, [estimate([edge(method, n) for n in of if n is not None]).mean for of in norms]
    return edges


def _plot(axes: Axes, quantity: Quantity, extent: Extent, recipe: Recipe, results: Results) -> None:
    for method, style in styles(recipe).items():
        if points := _points(method, quantity.field, results):
            _plot_line(axes, quantity, style, _means(points, extent.field), points)
    axes.set(title=quantity.title, xlabel=extent.title, ylabel=quantity.unit)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if quantity.log:
        set_log_scale(axes)
    is_longer = any(run.standardized_epochs > recipe.comparison.epochs for run in results)
    if extent.field == "standardized_epoch" and is_longer:
        axes.axvline(recipe.comparison.epochs, color=GREY, linewidth=0.8, linestyle="--")


def _about_gaps(recipe: Recipe, results: Results, quantities: Sequence[Quantity]) -> Iterator[str]:
    """Yield a sentence with the methods that have numbers which cannot be drawn, if there are any."""
    gaps = [
        method.label
        for method in recipe.comparison.methods
        if not all(
            is_usable(record[quantity.field])
            for quantity in quantities
            for records in _points(method, quantity.field, results)
            for record in records
        )
    ]
    if gaps:
        yield f"gaps: numbers that are not finite, of {', '.join(gaps)}"


def _points(method: MethodSpec, field: str, results: Results) -> list[list[Record]]:
    """Return the records of a method that have a value, those of one standardized epoch together."""
    points: dict[int, list[Record]] = {}
    for record in (record for run, records in results.items() if run.method == method for record in records):
        if record[field] is not None:
            points.setdefault(record.standardized_epoch, []).append(record)
    return [points[epoch] for epoch in sorted(points)]


def _means(points: Sequence[Sequence[Record]], field: str) -> list[float]:
    return [estimate([record[field] for record in records]).mean for records in points]


def _plot_line(axes: Axes, quantity: Quantity, style: Style, x: list[float], points: Sequence[list[Record]]) -> None:
    """Draw the mean of one method's runs, and its standard deviation as a band."""
    values = [[record[quantity.field] for record in records] for records in points]
    each = [estimate(v) for v in values]
    mean, sd = [e.mean for e in each], [e.sd or 0.0 for e in each]
    several = any(len(v) > 1 for v in values)
    # mean - sd may be negative, which a logarithmic axis cannot show: the band then ends at the smallest value
    lowest = [min(v) if quantity.log else -math.inf for v in values]
    tips = [f"{style.label}: {m:.4g}" + (f" ± {s:.2g}" if s else "") for m, s in zip(mean, sd, strict=True)]
    look = {"linewidth": 2.0 if several else 1.2, "marker": "o", "markersize": 3}
    plot_mean(axes, style, x, mean, sd if several else None, lowest, tips=tips, **look)


def _add_legend(axes: Axes, recipe: Recipe) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles and _legend_width(recipe):
        axes.get_figure().legend(handles, labels, loc="outside right upper")  # type: ignore[union-attr]
    elif handles:  # there are none before the first measurement
        tag_legend(axes.legend())


def _legend_width(recipe: Recipe) -> float:
    """Return the inches that a legend beside the curves takes; 0 where the legend is among them."""
    longest = max(len(style.label) for style in styles(recipe).values())
    return 0.8 + 0.09 * longest if len(recipe.comparison.methods) >= _MANY else 0.0
