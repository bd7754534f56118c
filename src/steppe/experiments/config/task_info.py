"""The metrics of a task and its description, which a folder keeps: it can be reported without the user's code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EQUAL = 4 * 2.0**-23
"""Relative difference of two measures up to which only rounding separates them: metrics are often means in float32."""


def difference(a: float, b: float) -> float:
    """Return a - b; 0 where only rounding separates the two, also that of a mean in float32.

    >>> difference(0.9, 0.8999999762), difference(0.5, 0.25)
    (0.0, 0.25)
    """
    found = a - b
    return 0.0 if abs(found) <= EQUAL * min(abs(a), abs(b)) else found


@dataclass(frozen=True)
class MetricInfo:
    """A metric by its name, its direction and its unit."""

    name: str
    higher_is_better: bool = True
    unit: str = ""

    @property
    def better(self) -> int:
        """The sign of an improvement."""
        return 1 if self.higher_is_better else -1

    def advantage(self, a: float, b: float) -> float:
        """Return by how much `a` is better than `b`."""
        return difference(a, b) if self.higher_is_better else difference(b, a)

    @property
    def form(self) -> str:
        """The format of a value in tables."""
        return "z.2f" if self.unit == "%" else "z.4g"  # z: 0 has no minus sign

    @property
    def unit_of_change(self) -> str:
        """The unit of a difference between two values."""
        return "points" if self.unit == "%" else self.unit

    def with_unit(self, name: str) -> str:
        """Return a column's or an axis's name with the unit."""
        return f"{name}, {self.unit}" if self.unit else name


LOSS = MetricInfo("loss", higher_is_better=False)


@dataclass(frozen=True)
class TaskInfo:
    """A task in words and numbers, as config.json keeps it."""

    description: str = ""
    """The model and the data; empty for the built-in tasks, whose options describe them."""
    metrics: tuple[MetricInfo, ...] = (MetricInfo("accuracy", unit="%"),)
    """Beside the loss; the first one decides."""

    @property
    def measured(self) -> tuple[MetricInfo, ...]:
        """The metrics, and the loss where there is none."""
        return self.metrics or (LOSS,)

    @property
    def deciding(self) -> MetricInfo:
        """The metric that decides a comparison: the first one, or the loss."""
        return self.measured[0]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TaskInfo":
        """Read the output of `dataclasses.asdict`; TypeError or KeyError when it is not."""
        return cls(str(values["description"]), tuple(MetricInfo(**metric) for metric in values["metrics"]))


IMAGES = TaskInfo()
