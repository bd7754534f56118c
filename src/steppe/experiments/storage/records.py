"""The records of metrics.jsonl: one for each measurement of a run."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """One line of metrics.jsonl. Accuracies are in percent, `gap` in percentage points."""

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
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    gap: float
    seconds: float
    """Time spent on training, without measuring and saving."""
    images_per_second: float
    """Samples seen by that time."""
    sharpness: float | None = None
    """S(w) at the recipe's rho; this and the following fields are None where flatness was not measured."""
    lambda_max: float | None = None
    """The largest eigenvalue of the Hessian."""
    gradient_norm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON has it, without fields that are None."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def read_records(text: str) -> list[Record]:
    """Turn JSON lines into records; ValueError or TypeError if a line is not a record."""
    return parse_records(map(json.loads, text.splitlines()))


def parse_records(values: Iterable[Mapping[str, Any]]) -> list[Record]:
    """Turn JSON objects into records, in the order of a run; ValueError or TypeError if they are none."""
    records = [parse_record(each) for each in values]
    epochs = [record.standardized_epoch for record in records]
    if epochs != sorted(set(epochs)):
        raise ValueError(f"the measurements are not in the order of a run, but at the epochs {epochs}")
    return records


def parse_record(values: Mapping[str, Any]) -> Record:
    """Turn a JSON object into a record; ValueError or TypeError if it is none."""
    record = Record(**values)
    for name, value in values.items():
        whole = name in ("standardized_epoch", "steps")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise TypeError(f"{name} is {value!r} and not a {'whole ' * whole}number")
        float(value)  # OverflowError for an integer that no result can be
    return record
