"""The checkpoint of a run and the metrics that belong to it."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steppe.experiments.config.recipe import Run
from steppe.experiments.storage.checkpoint_file import load, one_line_errors, save
from steppe.experiments.storage.files import write_json_lines
from steppe.experiments.storage.run_folder import CHECKPOINT, METRICS, owner
from steppe.experiments.world import World


class CheckpointManager:
    """Keeps the checkpoint and the metrics of a run in its folder; only the first process writes."""

    def __init__(
        self, folder: Path, run: Run, world: World, start: str | None, on_save: Callable[[], None] = lambda: None
    ) -> None:
        self._folder, self._world, self._on_save = folder, world, on_save
        self._owner = owner(run, world.size, start)
        self._interval = run.recipe.output.checkpoint_seconds
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """True if the last checkpoint is `checkpoint_seconds` old."""
        return time.monotonic() - self._saved >= self._interval

    def resume(self, load_state_dict: Callable[[Mapping[str, Any]], None]) -> None:
        """Load the checkpoint, if there is one, by a function, and truncate the metrics to its records.

        Raises ExperimentError if it is damaged, or if the function raises any error.
        """
        path = self._folder / CHECKPOINT
        state = load(path, self._owner) if path.exists() else None
        if state is not None:
            with one_line_errors(path):
                load_state_dict(state)
        if self._world.rank == 0:
            write_json_lines(self._folder / METRICS, [] if state is None else state["records"])
        self._world.barrier()

    def save(self, state: Mapping[str, Any]) -> None:
        """Save a checkpoint, and the metrics that belong to it."""
        if self._world.rank == 0:
            save(self._folder / CHECKPOINT, self._owner, state)
            write_json_lines(self._folder / METRICS, state["records"])
            self._on_save()
        self._saved = time.monotonic()
