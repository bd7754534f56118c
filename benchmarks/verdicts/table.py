"""Render the results as Markdown: how many seeds are needed, and how often equal methods are called different."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.stats import binomtest

from markdown_tables import row
from results import Result
from steppe.experiments.analysis.statistics import estimate

Rows = Sequence[Mapping[str, Any]]


def render(result: Result) -> str:
    """Return all tables."""
    return "\n".join(part(result) for part in (render_seeds, render_calibration, render_flatness))


def render_seeds(result: Result) -> str:
    """Return the number of seeds by the size of a difference, and the shares that were found with it."""
    return "\n".join([*_needed(result.data), "", result.source]) + "\n"


def render_calibration(result: Result) -> str:
    """Return the shares of comparisons that call equal methods different, simulated and real, and real power."""
    data = result.data
    comparisons = data["same"][0]["comparisons"]
    lines = [
        f"**Equal methods, simulated**: percentage of {comparisons:,} comparisons that call them different, with its "
        "95 % interval; of two methods, by the distribution of a run's number and the seeds.",
        *("", *_shares("a run's number", [each | {"label": each["shape"]} for each in data["same"] if _alone(each)])),
        "",
        "**Several equal methods against a base, simulated**, normally distributed: percentage of comparisons that "
        "call any of them different, by the number of methods.",
        *("", *_shares("methods", [each | {"label": str(each["methods"])} for each in data["same"] if _normal(each)])),
        "",
        "**Equal means, unequal distributions, simulated**: the base is normal, and the method is skewed and spreads "
        "ten times as far. These methods do differ, but not in their means.",
        *("", *_shares("", [each | {"label": "one skewed method"} for each in data["unequal_shapes"]])),
        "",
        f"**Equal methods, real**: {data['runs']} runs of each method, compared with other runs of the same method in "
        "disjoint groups, which were drawn many times; percentage called different, with the 95 % interval from ten "
        "disjoint sets of runs.",
        *("", *_real_same(data["real"])),
        "",
        "**SAM against SGD, real**: percentage of comparisons that find the difference, and that which the table of "
        "seeds predicts from its size in standard deviations.",
        *("", *_real_different(data["real"])),
        *("", result.source),
    ]
    return "\n".join(lines) + "\n"


def render_flatness(result: Result) -> str:
    """Return the shares of comparisons that call the flatness of equal methods different, simulated and real."""
    data = result.data.get("flatness")
    if data is None:
        return ""
    comparisons = data["simulated"][0]["comparisons"]
    simulated = [
        each | {"label": f"{each['methods']} method{'s'[: each['methods'] > 1]}, correlation {each['correlation']:g}"}
        for each in data["simulated"]
    ]
    real = [each | {"label": f"{m.upper()}: {each['shown']}"} for m, of in data["real"].items() for each in of]
    lines = [
        f"**Flatness of equal methods, simulated**: percentage of {comparisons:,} comparisons that call any of the "
        "measures of any method flatter or sharper, by the correlation of the measures.",
        *("", *_shares("", simulated)),
        "",
        f"**Reports on equal methods, real**: {data['runs']} runs of each method on digits, compared with other runs "
        "of the same method; percentage of comparisons in which a difference is found in a number, and in any of them.",
        *("", *_by_seeds("", real, lambda each: _percent(each["shares"]))),
        *("", result.source),
    ]
    return "\n".join(lines) + "\n"


def _needed(data: Mapping[str, Any]) -> list[str]:
    needed = {(each["effect"], each["methods"], each["share"]): each["seeds"] for each in data["needed"]}
    measured = {each["effect"]: each for each in data["power"]}
    counts, shares = (sorted({key[i] for key in needed}) for i in (1, 2))
    columns = [(m, share) for m in counts for share in (shares if m == 1 else [0.8])]
    names = [f"{m} method{'s'[: m > 1]}, found in {100 * share:.0f} %" for m, share in columns]
    lines = _head(["difference / standard deviation", *names, "found in simulation, 1 method, 80 %"])
    for effect in sorted({key[0] for key in needed}):
        cells = ["more than 1,000" if (n := needed[effect, *column]) is None else str(n) for column in columns]
        found = measured[effect]
        cells.append(f"{100 * found['found'] / found['comparisons']:.0f} %")
        lines.append(row([f"{effect:g}", *cells]))
    return lines


def _shares(title: str, found: Rows) -> list[str]:
    return _by_seeds(title, found, _binomial)


def _real_same(problems: Rows) -> list[str]:
    rows = [
        {"label": f"{problem['problem']}: {method.upper()}, {each['methods']} against one"} | each
        for problem in problems
        for method, found in problem["same"].items()
        for each in found
    ]
    return _by_seeds("runs", rows, lambda each: _percent(each["shares"]))


def _real_different(problems: Rows) -> list[str]:
    rows = [
        {"label": f"{problem['problem']}: a difference of {abs(each['effect']):.2f} standard deviations"} | each
        for problem in problems
        for each in problem["different"]
    ]
    return _by_seeds("runs", rows, lambda each: f"{_percent(each['shares'])}; {100 * each['expected']:.0f}")


def _by_seeds(title: str, found: Rows, cell: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """Return a table with a row for each label, and a column for each number of seeds."""
    seeds = sorted({each["seeds"] for each in found})
    lines = _head([title, *(f"{n} seeds" for n in seeds)])
    for label in dict.fromkeys(each["label"] for each in found):
        cells = {each["seeds"]: cell(each) for each in found if each["label"] == label}
        lines.append(row([label, *(cells.get(n, "") for n in seeds)]))
    return lines


def _percent(shares: Sequence[float]) -> str:
    """Return the mean of independent shares and its interval."""
    value = estimate([100 * share for share in shares])
    half = value.half_width or 0.0
    return f"{value.mean:.1f} [{max(value.mean - half, 0):.1f}, {min(value.mean + half, 100):.1f}]"


def _binomial(found: Mapping[str, Any]) -> str:
    interval = binomtest(found["different"], found["comparisons"]).proportion_ci()
    share = found["different"] / found["comparisons"]
    return f"{100 * share:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _alone(found: Mapping[str, Any]) -> bool:
    return bool(found["methods"] == 1)


def _normal(found: Mapping[str, Any]) -> bool:
    return bool(found["shape"] == "normal")


def _head(names: Sequence[str]) -> list[str]:
    return [row(names), "|---|" + "---:|" * (len(names) - 1)]
