"""Render what a recipe showed, the means and the differences to every control, and how the radii were chosen."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from evidence.measured import Measured
from evidence.recipes import EVIDENCE
from markdown_tables import mean_and_sd, row
from steppe.experiments.analysis.metric_verdicts import CONTROLS
from steppe.experiments.analysis.statistics import Estimate
from steppe.experiments.analysis.words import BETTER, WORSE
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.storage.records import AVERAGE, AVERAGED


def render(measured: Measured) -> str:
    """Return the tables of a recipe."""
    measures = EVIDENCE[measured.recipe].measures
    lines: list[str] = []
    if beside := measured.side_by_side:
        lines += [
            "Means on the test data, with the difference to the base in brackets; **bold** is better and *italic* is",
            "worse, beyond chance:",
            "",
            *_side_by_side(beside, measures),
            "",
        ]
    if settings := measured.others:
        lines += [
            "Means and standard deviations, on the test data:",
            "",
            *_means(settings, measures),
            "",
            "Differences to the base, paired by seed, with 95 % intervals; **bold** is better and *italic* is worse,",
            "beyond chance; a control is tested only where equal compute shows a difference:",
            "",
            *_differences(settings, measures),
            "",
        ]
    return "\n".join([*lines, measured.source])


def render_search(measured: Measured) -> str:
    """Return the commands that made the tables of a recipe, and what was found on the held-out data."""
    return "\n".join([*_commands(measured.settings), "", *_trials(measured.settings)])


def verdicts(summary: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return the verdicts of a summary by method and measure; the averaged base is a control of the others."""
    every = [*summary["verdicts"], *summary.get("robustness", []), *summary.get("forgetting", [])]
    return {
        (verdict["method"], verdict["metric"]["name"]): verdict
        for verdict in every
        if verdict["method"] != averaged(verdict["base"])
    }


def averaged(base: str) -> str:
    """Return the spec of a base with averaged weights."""
    return f"{base}+{AVERAGE}"


def label(method: str) -> str:
    """Return the label of a method's spec."""
    return MethodSpec.parse(method).label


def _commands(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the commands that chose the radii and that confirmed them."""
    yield "Chosen on held-out data, and confirmed by:"
    yield ""
    yield "```"
    for found in settings.values():
        if found["search"]:
            yield found["search"]
        yield found["command"]
    yield "```"


def _trials(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was found on the held-out data at each radius."""
    runs = max(len(trial["found"]) for found in settings.values() for trial in found["trials"])
    yield f"Held-out data, {'one run' if runs == 1 else f'mean of {runs} runs'} at each radius:"
    yield ""
    for setting, found in settings.items():
        for method in dict.fromkeys(trial["method"] for trial in found["trials"]):
            tried = {
                (name, value): fmean(trial["found"])
                for trial in found["trials"]
                if trial["method"] == method
                for name, value in trial["values"].items()
            }
            means = (f"{name + ' ' if name != 'rho' else ''}{v:g}: {tried[name, v]:.2f}" for name, v in sorted(tried))
            yield f"- {setting + ', ' if setting else ''}{label(method)}: {', '.join(means)}"


def _means(settings: Mapping[str, Any], measures: Sequence[str]) -> Iterator[str]:
    """Yield the table of means: a row for each method and for the base with averaged weights."""
    first = next(iter(settings.values()))["summary"]["rows"][0]
    shown = [name for name in measures if f"test_{name}" in first]
    named = _columns(settings)
    yield row([*named, "method", *shown, "train accuracy", "passes", "runs"])
    yield "|" + "---|" * (len(named) + 1) + "---:|" * (len(shown) + 3)
    for setting, found in settings.items():
        base = found["summary"]["rows"][0]["method"]
        rows = {one["method"]: one for one in found["summary"]["rows"]}
        run_of_average = rows.pop(averaged(base), {})
        for i, each in enumerate(rows.values()):
            name = label(each["method"])
            cells = [_mean(each, f"test_{measure}") for measure in shown]
            costs = [_mean(each, "train_accuracy"), f"{each['passes']['mean']:.2f}", str(each["passes"]["n"])]
            yield row([*(["" if i else setting] if named else []), name, *cells, *costs])
            if i == 0:
                names = [f"test_{measure}" for measure in shown]
                with_average = [
                    _mean(each, f"{name}{AVERAGED}") if f"{name}{AVERAGED}" in each else _mean(run_of_average, name)
                    for name in names
                ]
                yield row([*([""] if named else []), f"{name}, averaged weights", *with_average, "", "", costs[-1]])


def _side_by_side(settings: Mapping[str, Any], measures: Sequence[str]) -> Iterator[str]:
    """Yield a table with a row for each method, and the radius and the measures in each setting as columns."""
    found = {
        name: {_without_radius(one["method"]): one for one in of["summary"]["rows"]} for name, of in settings.items()
    }
    judged = {name: verdicts(of["summary"]) for name, of in settings.items()}
    columns = [f"{name}: {column}" for name in settings for column in ("rho", *measures)]
    yield row(["method", "passes", *columns])
    yield "|---|" + "---:|" * (1 + len(columns))
    for method, first in next(iter(found.values())).items():
        cells = [method.label, f"{first['passes']['mean']:.2f}"]
        for name, rows in found.items():
            one = rows.get(method, {})
            rho = dict(MethodSpec.parse(one["method"]).overrides).get("rho", "") if one else ""
            cells += [str(rho), *(_with_difference(one, measure, judged[name]) for measure in measures)]
        yield row(cells)


def _without_radius(method: str) -> MethodSpec:
    spec = MethodSpec.parse(method)
    return replace(spec, overrides=tuple((name, value) for name, value in spec.overrides if name != "rho"))


def _with_difference(
    values: Mapping[str, Any], measure: str, judged: Mapping[tuple[str, str], Mapping[str, Any]]
) -> str:
    """Return a mean, with the difference to the base at equal compute in brackets."""
    if f"test_{measure}" not in values:
        return "–"
    mean, verdict = f"{values[f'test_{measure}']['mean']:.1f}", judged.get((values["method"], measure))
    return mean if verdict is None else f"{mean} ({_at_equal_compute(verdict)})"


def _at_equal_compute(verdict: Mapping[str, Any]) -> str:
    comparison = verdict["comparisons"][0]
    return _emphasized(f"{comparison['difference']['mean']:+.1f}", comparison["verdict"])


def _columns(settings: Mapping[str, Any]) -> list[str]:
    """Return the heading of the settings; none where there is only one."""
    return ["setting"] if len(settings) > 1 else []


def _mean(values: Mapping[str, Any], name: str) -> str:
    return mean_and_sd(Estimate(**values[name])) if name in values else "–"


def _differences(settings: Mapping[str, Any], measures: Sequence[str]) -> Iterator[str]:
    """Yield the table of differences: a row for each method and measure, a column for each control."""
    named = _columns(settings)
    yield row([*named, "method", "measure", *(control.phrase for control in CONTROLS.values())])
    yield "|" + "---|" * (len(named) + 2) + "---:|" * len(CONTROLS)
    for setting, found in settings.items():
        by_name = verdicts(found["summary"])
        methods = dict.fromkeys(method for method, _ in by_name)
        for method in methods:
            for i, measure in enumerate(name for name in measures if (method, name) in by_name):
                compared = {each["control"]: each for each in by_name[method, measure]["comparisons"]}
                cells = ["" if i else label(method), measure, *(_difference(compared.get(name)) for name in CONTROLS)]
                is_first = method == next(iter(methods)) and i == 0
                yield row([*([setting if is_first else ""] if named else []), *cells])


def _difference(comparison: Mapping[str, Any] | None) -> str:
    if comparison is None:
        return "–"
    difference = comparison["difference"]
    text = f"{difference['mean']:+.2f}"
    if difference["interval_95"] is not None:
        low, high = difference["interval_95"]
        text += f" [{low:+.2f}, {high:+.2f}]"
    return _emphasized(text, comparison["verdict"])


def _emphasized(text: str, verdict: str) -> str:
    return {BETTER: f"**{text}**", WORSE: f"*{text}*"}.get(verdict, text)
