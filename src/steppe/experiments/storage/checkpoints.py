"""Checkpoints: one file for each run, replaced atomically and verified when it is loaded."""

import io
import json
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steppe.experiments.config.recipe import Run
from steppe.experiments.errors import ExperimentError, first_line
from steppe.experiments.storage.files import write_atomically, write_json_lines
from steppe.experiments.storage.run_folder import CHECKPOINT, METRICS
from steppe.experiments.world import World

_FORMAT = "steppe run checkpoint, version 3"


def owner(run: Run, processes: int, start: str | None) -> str:
    """Describe everything that a run's result depends on; `start` is the digest of its initial weights, if any."""
    depends_on = run.recipe.result_options() | {"processes": processes} | ({} if start is None else {"start": start})
    return f"{run.name} of {json.dumps(depends_on, sort_keys=True)}"


def save(path: Path, owner: str, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors and plain Python values) as the checkpoint of `owner`, atomically."""
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "owner": owner, **state}, buffer)
    write_atomically(path, buffer.getbuffer())


def load(path: Path, owner: str) -> dict[str, Any]:
    """Load a checkpoint of `save`, with its tensors on the CPU.

    Raises:
        ExperimentError: if the file is damaged, is no checkpoint of `save`, or belongs to another owner.
    """
    remedy = f"Delete {path} to train this run again from its beginning; the others are kept."
    try:
        # torch does not compare the checksums that it writes, so a flipped bit would be loaded as a weight
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # damaged archives raise many kinds of errors, in zipfile and in torch
        raise ExperimentError(
            f"the checkpoint {path} is damaged ({first_line(error)}), so the run cannot resume. {remedy}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ExperimentError(f"{path} is not a checkpoint of a run of this version. {remedy}")
    if state["owner"] != owner:
        raise ExperimentError(f"{path} belongs to another run or another configuration than this one. {remedy}")
    return state


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

    def load(self) -> dict[str, Any] | None:
        """Load the checkpoint, or None if there is none, and truncate the metrics to its records."""
        path = self._folder / CHECKPOINT
        state = load(path, self._owner) if path.exists() else None
        if self._world.rank == 0:
            write_json_lines(self._folder / METRICS, [] if state is None else state["records"])
        self._world.barrier()
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Save a checkpoint, and the metrics that belong to it."""
        if self._world.rank == 0:
            save(self._folder / CHECKPOINT, self._owner, state)
            write_json_lines(self._folder / METRICS, state["records"])
        self._saved = time.monotonic()
