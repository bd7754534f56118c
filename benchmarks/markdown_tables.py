"""Parts of Markdown tables that several benchmarks share."""

from collections.abc import Sequence

from steppe.experiments.analysis.statistics import Estimate


def row(cells: Sequence[str]) -> str:
    """Return one row of a table.

    >>> row(["a", "b"])
    '| a | b |'
    """
    return f"| {' | '.join(cells)} |"


def mean_and_sd(value: Estimate) -> str:
    """Return the mean of an estimate, with its standard deviation if there is one."""
    return f"{value.mean:.2f}" + ("" if value.sd is None else f"±{value.sd:.2f}")


def difference(value: Estimate) -> str:
    """Return the mean of paired differences, with its confidence interval if there is one."""
    half = value.half_width
    return f"{value.mean:+.2f}" + ("" if half is None else f" [{value.mean - half:+.2f}, {value.mean + half:+.2f}]")
