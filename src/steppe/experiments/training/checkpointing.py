"""Save and restore the checkpoint and the metrics of a run in progress."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from steppe.experiments.config.recipe import Run
from steppe.experiments.storage import checkpoints
from steppe.experiments.storage.files import write_atomically
from steppe.experiments.storage.records import Record, write_records
from steppe.experiments.storage.run_folder import CHECKPOINT, METRICS
from steppe.experiments.world import World


class _Resumable(Protocol):
    records: list[Record]

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def owner(run: Run, processes: int, start: str | None) -> str:
    """Describe everything that a run's result depends on; `start` is the digest of its initial weights, if any."""
    depends_on = run.recipe.result() | {"processes": processes} | ({} if start is None else {"start": start})
    return f"{run.name} of {json.dumps(depends_on, sort_keys=True)}"


class CheckpointManager:
    """Keeps the checkpoint and the metrics of a run in its folder; only the first process writes."""

    def __init__(self, folder: Path, run: Run, world: World, start: str | None) -> None:
        self._folder, self._world = folder, world
        self._owner = owner(run, world.size, start)
        self._interval = run.recipe.output.checkpoint_seconds
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """True if the last checkpoint is `checkpoint_seconds` old."""
        return time.monotonic() - self._saved >= self._interval

    def restore(self, training: _Resumable) -> None:
        """Load the checkpoint, if there is one, and truncate the metrics to its records."""
        path = self._folder / CHECKPOINT
        if path.exists():
            training.load_state_dict(checkpoints.load(path, self._owner))
        if self._world.rank == 0:
            self._write_metrics(training.records)
        self._world.barrier()

    def save(self, training: _Resumable) -> None:
        """Save a checkpoint, and the metrics that belong to it."""
        if self._world.rank == 0:
            checkpoints.save(self._folder / CHECKPOINT, self._owner, training.state_dict())
            self._write_metrics(training.records)
        self._saved = time.monotonic()

    def _write_metrics(self, records: Sequence[Record]) -> None:
        write_atomically(self._folder / METRICS, write_records(records))
