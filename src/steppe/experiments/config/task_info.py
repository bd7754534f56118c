"""The metrics of a task and its description, which a folder keeps: it can be reported without the user's code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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

    @property
    def form(self) -> str:
        """The format of a value in tables."""
        return ".2f" if self.unit == "%" else ".4g"

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
