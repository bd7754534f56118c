"""The records of metrics.jsonl: one for each measurement of a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Record:
    """One line of metrics.jsonl."""

    standardized_epoch: int
    """The point of the grid, the same for every method; it is measured after the step that reached it."""
    epoch: int | float
    """The run's own epochs: samples seen, each once however many passes used it, divided by the training set's size."""
    steps: int
    """Optimizer steps."""
    gradient_evaluations: int | float
    """Samples times passes, as they happened; a pass without backward counts a third."""
    passes: float
    """Gradient evaluations by samples seen: the average cost of a step."""
    measures: Mapping[str, float]
    """What the task measures, in its units: `train_loss`, `test_loss`, `train_NAME` and `test_NAME` of each metric, and
    `gap`, by how much the deciding metric is better on the training data."""
    seconds: float
    """Time spent on training, without measuring and saving."""
    images_per_second: float
    """Samples seen by that time, of any data: the public key in metrics.jsonl is older than tasks of other data."""
    sharpness: float | None = None
    """S(w) at the recipe's rho; this and the following fields are None where flatness was not measured."""
    lambda_max: float | None = None
    """The largest eigenvalue of the Hessian."""
    gradient_norm: float | None = None

    def __getitem__(self, name: str) -> Any:
        """Return a measure, or another number, by its name in metrics.jsonl."""
        return self.measures[name] if name in self.measures else getattr(self, name)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON has it, the measures one by one, without fields that are None."""
        values = dict[str, Any]()
        for name, value in asdict(self).items():
            values |= value if name == "measures" else {} if value is None else {name: value}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Record":
        """Make a record from what `to_json` returned, without a check."""
        own = {name: value for name, value in values.items() if name in RECORD_FIELDS}
        return cls(**own, measures={name: float(value) for name, value in values.items() if name not in RECORD_FIELDS})


RECORD_FIELDS = {field.name: field for field in fields(Record) if field.name != "measures"}
_MEASURES = ("train_loss", "test_loss", "gap")
_WHOLE = ("standardized_epoch", "steps")


HALVES = (" (half 1)", " (half 2)")
"""After the name of a measure: its value on one half of the test data."""
AFTER, FORGOTTEN, ON_SECOND = " after the second task", " forgotten", " on the second task"
"""After the name of a metric: its value after training on a second task, what was lost by it, and that task's own."""
AVERAGE = "ema"
"""The average of the weights that is measured beside those of a plain method."""
AVERAGED = f" ({AVERAGE})"
"""After the name of a measure: its value with averaged weights."""


def record_at(records: Sequence[Record], standardized_epoch: int) -> Record | None:
    """Return the measurement of a run at a point of the grid; None if there is none."""
    return next((r for r in records if r.standardized_epoch == standardized_epoch), None)


def parse_record(values: Any) -> Record:
    """Make a record from the output of `to_json`; ValueError or TypeError when it is not a record."""
    if not isinstance(values, Mapping):
        raise TypeError(f"a record is {type(values).__name__} and not an object")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is {value!r} and not a number")
        float(value)  # OverflowError for an integer that no result can be
    for name in _WHOLE:
        if not isinstance(values.get(name), int):
            raise TypeError(f"{name} is {values.get(name)!r} and not a whole number")
    if missing := [name for name in _MEASURES if name not in values]:
        raise ValueError(f"a record has no {missing[0]}")
    return Record.from_json(values)


def parse_records(values: Any) -> list[Record]:
    """Make records from a list; ValueError or TypeError when one is not a record, or they are out of order."""
    records = [parse_record(one) for one in values]
    epochs = [record.standardized_epoch for record in records]
    if any(a >= b for a, b in pairwise(epochs)):
        raise ValueError("the records are not in the order of their standardized epochs")
    return records


def read_records(text: str) -> list[Record]:
    """Turn JSON lines into records; ValueError or TypeError when a line is not a record."""
    return parse_records([json.loads(line) for line in text.splitlines()])
