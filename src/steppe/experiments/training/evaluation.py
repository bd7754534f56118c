"""What is measured: loss and accuracy over a whole split in eval mode, the same for every method."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from steppe.experiments.data.datasets import Split, normalize
from steppe.experiments.world import World

__all__ = ["Record", "Score", "evaluate", "read_records", "write_records"]

# Images in one forward pass: it changes no result but the last bits, only memory and speed.
_CHUNK, _CHUNK_ON_A_GPU = 500, 5000


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy, and accuracy in percent."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Record:
    """One line of metrics.jsonl. Accuracies are percent, `gap` is percentage points."""

    standardized_epoch: int
    """The point of the grid, the same for every method; it is measured after the step that reached it."""
    epoch: int | float
    """The run's own epochs: images seen, an image once however many passes were made over it, in training sets."""
    steps: int
    """Optimizer steps."""
    gradient_evaluations: int | float
    """Images times passes, as they happened; a pass without backward counts a third."""
    passes: float
    """Gradient evaluations by images seen: what a step cost on average."""
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    gap: float
    seconds: float
    """Time spent training, without measuring and saving."""
    images_per_second: float
    """Images seen by that time."""
    sharpness: float | None = None
    """S(w) at the recipe's rho; this and the following where flatness was measured."""
    lambda_max: float | None = None
    """The largest eigenvalue of the Hessian."""
    gradient_norm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as JSON has it, without what was not measured."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def evaluate(
    network: nn.Module,
    split: Split,
    world: World,
    autocast: Callable[[], AbstractContextManager[object]],
    pause: Callable[[], None],
) -> Score:
    """Measure `network` on a split, shared out over the processes; `pause()` is called between its chunks.

    The network is left in training mode.
    """
    share = world.share(len(split))
    images, labels = split.images[share], split.labels[share]
    sums = torch.zeros(2, dtype=torch.float64, device=labels.device)
    chunk = _CHUNK_ON_A_GPU if labels.is_cuda else _CHUNK
    network.eval()
    try:
        with torch.no_grad():
            for x, y in zip(torch.split(images, chunk), torch.split(labels, chunk), strict=True):
                pause()
                with autocast():
                    logits = network(normalize(x))
                sums[0] += F.cross_entropy(logits.float(), y, reduction="sum")
                sums[1] += (logits.argmax(1) == y).sum()
    finally:
        network.train()
    loss, correct = (world.total(sums) / len(split)).tolist()
    return Score(loss, 100.0 * correct)


def write_records(records: Iterable[Record]) -> bytes:
    """Turn records into JSON lines."""
    return "".join(json.dumps(record.to_json()) + "\n" for record in records).encode()


def read_records(text: str) -> list[Record]:
    """Turn JSON lines into records; ValueError or TypeError when they are none."""
    return [Record(**json.loads(line)) for line in text.splitlines()]
