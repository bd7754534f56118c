"""Accuracy, loss, generalization gap and sharpness over compute and over time."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from steppe import flatness
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.figures import pareto
from steppe.experiments.figures.drawing import Drawing, save_all, tag, tag_legend
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


@dataclass(frozen=True)
class Extent:
    """The horizontal axis: a field of `Record`, its label, and the suffix of the files' names."""

    field: str
    title: str
    suffix: str = ""


QUANTITIES = (
    Quantity("train_loss", "Training loss", "cross-entropy", log=True),
    Quantity("train_accuracy", "Training accuracy", "%"),
    Quantity("test_accuracy", "Test accuracy", "%"),
    Quantity("gap", "Generalization gap", "percentage points"),
)

_TRACKED = (
    Quantity("sharpness", "Sharpness S(w)", "rise of the training loss", log=True),
    Quantity("lambda_max", "Largest eigenvalue of the Hessian", "of the training loss", log=True),
)

EXTENTS = (
    Extent("standardized_epoch", "standardized epochs = gradient evaluations / training images"),
    Extent("seconds", "training time in seconds, without measuring", suffix="_seconds"),
)


def draw(recipe: Recipe, results: Results, folder: Path) -> list[Path]:
    """Save all drawings as PNG and SVG into `folder`; return the files."""
    return save_all(drawings(recipe, results), folder)


def drawings(recipe: Recipe, results: Results) -> Iterator[Drawing]:
    """Yield each quantity over each extent, all of them as `overview`, `pareto`, and `sharpness` where it was measured.

    A line is the mean over the runs, its band one standard deviation to either side; one run is a thin line.
    """
    for extent in EXTENTS:
        for quantity in QUANTITIES:
            yield Drawing(f"{quantity.field}{extent.suffix}", partial(_plot_single, recipe, results, quantity, extent))
        yield Drawing(f"overview{extent.suffix}", partial(_plot_overview, recipe, results, extent))
    yield Drawing("pareto", partial(pareto.draw, recipe, results))
    if tracked(results):
        for extent in EXTENTS:
            yield Drawing(f"sharpness{extent.suffix}", partial(_plot_sharpness, recipe, results, extent))


def tracked(results: Results) -> list[Quantity]:
    """Return the measures of flatness that at least one record has."""
    records = [record for of_run in results.values() for record in of_run]
    return [q for q in _TRACKED if any(getattr(record, q.field) is not None for record in records)]


def _plot_single(recipe: Recipe, results: Results, quantity: Quantity, extent: Extent) -> Figure:
    figure = Figure(figsize=(6.4 + _legend_width(recipe), 4.4), layout="constrained")
    axes = figure.add_subplot()
    _plot(axes, quantity, extent, recipe, results)
    _add_legend(axes, recipe)
    add_caption(figure, recipe)
    return figure


def _plot_overview(recipe: Recipe, results: Results, extent: Extent) -> Figure:
    figure = Figure(figsize=(10.5 + _legend_width(recipe), 7.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for axes, quantity in zip(panels.flat, QUANTITIES, strict=True):
        _plot(axes, quantity, extent, recipe, results)
    for axes in panels[0]:
        axes.set_xlabel("")
    _add_legend(panels[0, 1], recipe)
    add_caption(figure, recipe)
    return figure


def _plot_sharpness(recipe: Recipe, results: Results, extent: Extent) -> Figure:
    """Draw S(w) and the largest eigenvalue, with the value above which a full-batch step would be unstable."""
    quantities = tracked(results)
    figure = Figure(figsize=(5.25 * len(quantities) + _legend_width(recipe), 4.6), layout="constrained")
    edges = False
    for axes, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
        _plot(axes, quantity, extent, recipe, results)
        if quantity.field == "lambda_max" and _has_edges(recipe):
            for method, style in styles(recipe).items():
                edges |= _plot_edge(axes, method, style, extent, recipe, results)
    edge = "pale: the edge of stability of full-batch steps, 2/lr for SGD, for SAM by its gradient norm"
    samples = f"on {recipe.evaluation.flatness_samples} training images, rho {recipe.training.rho:g}"
    _add_legend(figure.axes[0], recipe)
    add_caption(figure, recipe, samples, *([edge] if edges else []))
    return figure


def _has_edges(recipe: Recipe) -> bool:
    """Return True if the base is plain gradient descent, the only one whose edge of stability is drawn."""
    return recipe.training.base == "sgd" and not recipe.base_momentum and not recipe.training.weight_decay


def _plot_edge(axes: Axes, method: MethodSpec, style: Style, extent: Extent, recipe: Recipe, results: Results) -> bool:
    """Draw the edge of stability of a method; return False for a method whose edge is not known."""
    points = _points(method, "gradient_norm", results)
    if method.name not in ("sgd", "sam") or not points:
        return False
    lr, rho = recipe.training.lr, method.rho(recipe.training.rho) if method.name == "sam" else 0.0

    def edge(record: Record) -> float:
        if method.name == "sgd" or record.gradient_norm is None:
            return float(flatness.edge_of_stability(lr))
        return float(flatness.sam_edge_of_stability(lr, rho, record.gradient_norm))

    x, y = _means(points, extent.field), [statistics.fmean(map(edge, records)) for records in points]
    for line in axes.plot(x, y, style.line, color=style.color, linewidth=3, alpha=0.3):
        tag(line, style.label)
    return True


def _plot(axes: Axes, quantity: Quantity, extent: Extent, recipe: Recipe, results: Results) -> None:
    for method, style in styles(recipe).items():
        if points := _points(method, quantity.field, results):
            _plot_line(axes, quantity, extent, style, points)
    axes.set_title(quantity.title)
    axes.set_xlabel(extent.title)
    axes.set_ylabel(quantity.unit)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if quantity.log:
        set_log_scale(axes)
    is_longer = any(run.standardized_epochs > recipe.comparison.epochs for run in results)
    if extent.field == "standardized_epoch" and is_longer:
        axes.axvline(recipe.comparison.epochs, color=GREY, linewidth=0.8, linestyle="--")


def _points(method: MethodSpec, field: str, results: Results) -> list[list[Record]]:
    """Return the records of a method that have a value, those of one standardized epoch together."""
    points: dict[int, list[Record]] = {}
    for record in (record for run, records in results.items() if run.method == method for record in records):
        if getattr(record, field) is not None:
            points.setdefault(record.standardized_epoch, []).append(record)
    return [points[epoch] for epoch in sorted(points)]


def _means(points: Sequence[Sequence[Record]], field: str) -> list[float]:
    return [statistics.fmean(getattr(record, field) for record in records) for records in points]


def _plot_line(
    axes: Axes, quantity: Quantity, extent: Extent, style: Style, points: Sequence[Sequence[Record]]
) -> None:
    """Draw the mean of one method's runs, and its standard deviation as a band."""
    x, mean = _means(points, extent.field), _means(points, quantity.field)
    values = [[getattr(record, quantity.field) for record in records] for records in points]
    several = any(len(v) > 1 for v in values)
    sd = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    width = 2.0 if several else 1.2
    look = {"color": style.color, "linewidth": width, "marker": "o", "markersize": 3, "label": style.label}
    (line,) = axes.plot(x, mean, style.line, **look)  # type: ignore[arg-type]
    tips = [f"{style.label}: {m:.4g}" + (f" ± {s:.2g}" if s else "") for m, s in zip(mean, sd, strict=True)]
    tag(line, style.label, tips=tips)
    if several:
        # mean - sd may be negative, which a logarithmic axis cannot show: the band then ends at the smallest value
        low = [max(m - s, min(v)) if quantity.log else m - s for m, s, v in zip(mean, sd, values, strict=True)]
        high = [m + s for m, s in zip(mean, sd, strict=True)]
        tag(axes.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0), style.label)


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
