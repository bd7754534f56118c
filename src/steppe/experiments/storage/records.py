"""The records of metrics.jsonl: one for each measurement of a run."""

import json
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
    """Turn JSON lines into records; ValueError or TypeError when a line is not a record."""
    return [Record(**json.loads(line)) for line in text.splitlines()]
