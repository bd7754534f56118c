"""The run folder: what it holds, whose it is, and that one process at a time works in it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steppe.experiments.config.recipe import LATER, Recipe, Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.files import write_json
from steppe.experiments.storage.records import Record, read_records

__all__ = ["CHECKPOINT", "METRICS", "Results", "RunFolder"]

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"

_FORMAT = "steppe run folder, version 2"

Results = Mapping[Run, list[Record]]
"""The measurements of every unit of a recipe; an empty list for one that has none yet."""


class RunFolder:
    """A comparison on disk:

    config.json, environment.json, summary.md and .json, figures/, and runs/UNIT/ with metrics.jsonl and checkpoint.pt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def figures(self) -> Path:
        """Where the figures are."""
        return self.path / "figures"

    def run(self, run: Run) -> Path:
        """Where a unit keeps its metrics and its checkpoint."""
        return self.path / "runs" / run.name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; ExperimentError when another process does. The lock ends with the process, however."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ExperimentError(f"{self.path} is a file, not a folder: choose another with --out") from None
        with (self.path / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ExperimentError(
                    f"another process is working in {self.path}, and two would spoil each other's runs: wait for it, "
                    "or choose another folder with --out"
                ) from None
            yield

    def claim(self, recipe: Recipe, processes: int) -> None:
        """Make this the folder of a resolved recipe, or see that it is already.

        Raises ExperimentError when it belongs to another configuration, listing what differs, or to something else.
        Methods and seeds may be added: they are runs of their own and change nothing of those that are there.
        """
        config = self.path / "config.json"
        if config.exists():
            self._compare(*self._config(), recipe, processes)
        elif any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise ExperimentError(
                f"{self.path} is not a run folder and not empty, and the run's files would mix with what is there: "
                "choose another with --out"
            )
        write_json(config, {"format": _FORMAT, "recipe": recipe.to_json(), "processes": processes})

    def recipe(self) -> Recipe:
        """The recipe whose folder this is; ExperimentError when there is none."""
        return self._config()[0]

    def claimed(self) -> tuple[Recipe, int]:
        """The recipe, and the number of processes that its runs were trained in."""
        return self._config()

    def results(self, recipe: Recipe) -> Results:
        """Read the measurements of every unit; ExperimentError when a file is damaged."""
        return {run: self._records(self.run(run) / METRICS) for run in recipe.runs()}

    def _config(self) -> tuple[Recipe, int]:
        config = self.path / "config.json"
        if not config.is_file():
            raise ExperimentError(
                f"{self.path} is not a run folder, it has no config.json: name the folder that `steppe compare` made"
            )
        try:
            values: dict[str, Any] = json.loads(config.read_text())
            if values["format"] != _FORMAT:
                raise ValueError(f"its format is {values['format']!r}")
            return Recipe.from_json(values["recipe"]), int(values["processes"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ExperimentError(
                f"{config} is damaged or of another version ({error}): choose another folder with --out"
            ) from error

    def _compare(self, theirs: Recipe, their_processes: int, recipe: Recipe, processes: int) -> None:
        before = {**LATER, **theirs.result(), "processes": their_processes}
        now = {**LATER, **recipe.result(), "processes": processes}
        differing = [f"{k} was {before[k]} and is {now[k]}" for k in now if now[k] != before[k]]
        if differing:
            raise ExperimentError(
                f"{self.path} holds another configuration, and its runs could not be compared with these: "
                f"{'; '.join(differing)}. Take the values that were, or choose another folder with --out"
            )

    @staticmethod
    def _records(path: Path) -> list[Record]:
        if not path.exists():
            return []
        try:
            return read_records(path.read_text())
        except (ValueError, TypeError) as error:
            raise ExperimentError(
                f"{path} is damaged ({error}): run the comparison again, it is written anew from the checkpoint"
            ) from error
