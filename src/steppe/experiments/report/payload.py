"""What the page draws, as JSON: the figures' numbers, computed once and here."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from steppe.experiments.analysis.statistics import Estimate, estimate
from steppe.experiments.config.method_spec import parse
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.figures import pareto
from steppe.experiments.figures.curves import EXTENTS, FLATNESS, QUANTITIES, Quantity
from steppe.experiments.figures.style import styles
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import Results
from steppe.flatness import FAMILIES, Flatness, Landscape

__all__ = ["dumps", "on_dark", "payload", "tracked"]

_DASHES: Mapping[str, str] = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
_DRAWN = ("density", "eigenvalues", "landscape", "eigen_landscape")
_LIGHTER = 0.28  # of white in a color on a dark page


def payload(
    recipe: Recipe, results: Results, flatness: Mapping[Run, Flatness], lines: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that the page's script reads."""
    look = styles(recipe)
    quantities = [*QUANTITIES, *tracked(results)]
    return {
        "methods": [
            {
                "name": method,
                "label": style.label,
                "light": style.color,
                "dark": on_dark(style.color),
                "dash": _DASHES[style.line],
            }
            for method, style in look.items()
        ],
        "epochs": recipe.epochs,
        "further": any(run.standardized_epochs > recipe.epochs for run in results),
        "extents": [{"field": extent.field, "title": extent.title} for extent in EXTENTS],
        "quantities": {q.field: {"title": q.title, "unit": q.run, "log": q.log} for q in quantities},
        "curves": [
            {"method": method, "field": quantity.field, **curve}
            for method in recipe.methods
            for quantity in quantities
            if (curve := _curve(results, method, quantity)) is not None
        ],
        "pareto": list(_pareto(recipe, results)),
        "measures": {name: label for family in FAMILIES.values() for name, label in family.measures.items()},
        "runs": [
            {
                "method": run.method,
                "seed": run.seed,
                "gap": results[run][-1].gap if results[run] else None,
                "values": {name: measure.value for name, measure in flat.measures.items()},
                "profile": flat.landscape and _profile(flat.landscape),
                **{k: v for k, v in flat.to_json().items() if k in _DRAWN},
            }
            for run, flat in flatness.items()
        ],
        "lines": list(lines),
    }


def tracked(results: Results) -> list[Quantity]:
    """The measures of flatness that some record has."""
    records = [record for of_unit in results.values() for record in of_unit]
    return [q for q in FLATNESS if any(getattr(record, q.field) is not None for record in records)]


def dumps(value: Any) -> str:
    """Write JSON that no browser takes for a tag, inside a script element either; what is not finite is null.

    >>> dumps({"a": [math.nan, "</script>"]})
    '{"a":[null,"\\\\u003c/script\\\\u003e"]}'
    """
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def on_dark(color: str) -> str:
    """Lighten a color for a dark page; black would not be seen there at all.

    >>> on_dark("#000000"), on_dark("#0072B2")
    ('#E6E6E6', '#4799C8')
    """
    if color == "#000000":
        return "#E6E6E6"
    parts = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * _LIGHTER):02X}" for part in parts)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _curve(results: Results, method: str, quantity: Quantity) -> dict[str, Any] | None:
    """One method's line over both extents, as in the figures; None where nothing was measured."""
    points: dict[int, list[Record]] = {}
    for record in (record for run, records in results.items() if run.method == method for record in records):
        if getattr(record, quantity.field) is not None:
            points.setdefault(record.standardized_epoch, []).append(record)
    if not points:
        return None
    at = [points[epoch] for epoch in sorted(points)]
    found = [estimate([getattr(record, quantity.field) for record in records]) for records in at]
    least = [min(getattr(record, quantity.field) for record in records) for records in at]
    low = [e.mean - (e.sd or 0.0) for e in found]
    return {
        "x": {e.field: [statistics.fmean(getattr(r, e.field) for r in records) for records in at] for e in EXTENTS},
        "mean": [e.mean for e in found],
        "sd": [e.sd for e in found],
        "low": [max(a, b) for a, b in zip(low, least, strict=True)] if quantity.log else low,
        "high": [e.mean + (e.sd or 0.0) for e in found],
        "several": any(e.n > 1 for e in found),
    }


def _profile(landscape: Landscape) -> dict[str, Any] | None:
    """The line through the minimum along the first direction; None where no row of the grid goes through it."""
    (through,) = (landscape.axis == 0).nonzero(as_tuple=True)
    if not len(through):
        return None
    return {"axis": landscape.axis.tolist(), "losses": landscape.losses[:, int(through[0])].tolist()}


def _pareto(recipe: Recipe, results: Results) -> Iterator[dict[str, Any]]:
    """The panels of the Pareto picture: costs with what they reach, and the front of the means."""
    epochs = pareto.common_epochs(recipe, results)
    planned = [method for method in recipe.methods if parse(method).method.follows_plan]
    after = _chosen(recipe, results, lambda records: pareto.after_epochs(records, epochs))
    same_epochs = {method: runs for method, runs in after.items() if method not in planned}
    same_compute = _chosen(
        recipe, results, lambda r: next((x for x in r if x.standardized_epoch == recipe.epochs), None)
    )
    base = next((m for m in same_epochs if parse(m).method.plain), next(iter(same_epochs), ""))
    seconds = max(estimate([r.seconds for r in same_epochs[base]]).mean, 1e-9) if base else 1.0
    cheap = f"after the same number of epochs ({epochs:.3g})"
    yield _panel("passes a step", "gradient evaluations an image and epoch", cheap, same_epochs, lambda r: r.passes)
    relative = f"seconds a step, {parse(base).label if base else 'the first'} = 1"
    yield _panel("time a step", relative, cheap, same_epochs, lambda r: r.seconds / seconds)
    spent = f"after the same compute ({recipe.epochs} standardized epochs)"
    yield _panel("training time", "training time, seconds", spent, same_compute, lambda r: r.seconds)


def _chosen(
    recipe: Recipe, results: Results, choose: Callable[[Sequence[Record]], Record | None]
) -> dict[str, list[Record]]:
    """By method, the record of each run that is looked for; methods without one are left out."""
    found = {
        method: [record for run in results if run.method == method and (record := choose(results[run])) is not None]
        for method in recipe.methods
    }
    return {method: records for method, records in found.items() if records}


def _panel(
    name: str, axis: str, when: str, reached: Mapping[str, Sequence[Record]], cost: Callable[[Record], float]
) -> dict[str, Any]:
    costs = {method: estimate([cost(record) for record in records]) for method, records in reached.items()}
    panel: dict[str, Any] = {"name": name, "axis": axis, "when": when, "methods": list(reached)}
    panel["cost"] = [_both(costs[method]) for method in reached]
    for field, better in (("test_accuracy", 1), ("gap", -1)):
        values = [estimate([getattr(record, field) for record in records]) for records in reached.values()]
        points = [(costs[method].mean, -better * value.mean) for method, value in zip(reached, values, strict=True)]
        panel[field] = {"values": [_both(value) for value in values], "front": pareto.front(points)}
    return panel


def _both(value: Estimate) -> dict[str, float | None]:
    return {"mean": value.mean, "sd": value.sd}
