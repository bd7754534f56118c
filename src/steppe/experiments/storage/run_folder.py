"""The run folder: its files, the configuration that owns it, and the lock for one process at a time."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.checkpoint_file import foreign, load_records
from steppe.experiments.storage.files import check_format, read_checked, read_text, write_atomically, write_checked
from steppe.experiments.storage.records import Record, parse_records, read_records

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"

_FORMAT = "steppe run folder, version 3"

log = logging.getLogger(__name__)

Results = Mapping[Run, list[Record]]
"""The measurements of every run of a recipe; an empty list for one that has none yet."""


class RunFolder:
    """A comparison on disk.

    It has config.json, environment.json, summary.md and .json, figures/, and runs/RUN/ with metrics.jsonl and
    checkpoint.pt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    def run(self, run: Run) -> Path:
        """Return the folder of a run's metrics and checkpoint."""
        return self.path / "runs" / run.name

    @contextmanager
    def locked(self, timeout: float = 0.0) -> Iterator[None]:
        """Hold the exclusive lock of the folder, which ends with the process at the latest.

        Waits `timeout` seconds, or without end if it is -1; ExperimentError if another process still holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ExperimentError(f"{self.path} is a file, not a folder: choose another with --out") from None
        try:
            # a new object each time, because a FileLock object can be acquired twice by its own process
            lock = FileLock(self.path / ".lock").acquire(timeout=timeout)
        except Timeout:
            raise ExperimentError(
                f"another process is working in {self.path}, and two would overwrite each other's runs: wait for it, "
                "or choose another folder with --out"
            ) from None
        with lock:
            yield

    def claim(self, recipe: Recipe, processes: int) -> None:
        """Make this the folder of a resolved recipe, or check that it is already.

        Methods and seeds may be added: they are runs of their own and leave the present ones unchanged. ExperimentError
        if it belongs to another configuration, with the differences, or is no run folder.
        """
        config = self.path / "config.json"
        if config.exists():
            before, number = self.read()
            now = recipe.result_options() | {"processes": processes}
            check_same(self.path, before.result_options() | {"processes": number}, now)
        check_unused(self.path)
        write_checked(config, {"format": _FORMAT, "recipe": recipe.to_json(), "processes": processes})

    def configuration(self) -> bytes | None:
        """Return the content of config.json; None if there is none."""
        config = self.path / "config.json"
        return config.read_bytes() if config.is_file() else None

    def configure(self, content: bytes) -> None:
        """Write a former content of config.json again."""
        write_atomically(self.path / "config.json", content)

    def recipe(self) -> Recipe:
        return self.read()[0]

    def read(self) -> tuple[Recipe, int]:
        """Return the recipe and the number of processes of a run; ExperimentError when it is no run folder."""
        config = self.path / "config.json"
        if not config.is_file():
            raise ExperimentError(
                f"{self.path} is not a run folder, as it has no config.json: name the folder of a `steppe compare`"
            )
        if _is_search(config):
            raise ExperimentError(
                f"{self.path} is the folder of a search (steppe tune), and that of a comparison is needed: choose "
                f"another folder with --out. `steppe plot {self.path}` shows the search and the command that compares "
                "its best values"
            )
        return read_checked(config, _configuration, "restore that file, or choose another folder with --out")

    def results(self, recipe: Recipe) -> Results:
        """Read the measurements of every run.

        Metrics that are missing, damaged or not those of the run's checkpoint are replaced by the records of the
        checkpoint, which a note says.

        Raises:
            ExperimentError: if a file is damaged and there is no checkpoint with its records, or a checkpoint is of
                another run or of another configuration.
        """
        return {run: self._records(run) for run in recipe.runs()}

    def _records(self, run: Run) -> list[Record]:
        folder = self.run(run)
        metrics, found, damaged = folder / METRICS, list[Record](), None
        remedy = "run the comparison again, which writes it anew from the checkpoint"
        try:
            found = read_text(metrics, read_records, remedy)
        except FileNotFoundError:
            pass
        except ExperimentError as error:
            damaged = error
        loaded = load_records(folder / CHECKPOINT)
        if loaded is None:
            if damaged is not None:
                raise damaged
            return found
        saved, its_owner = loaded
        if not _is_of(run, its_owner):
            raise foreign(folder / CHECKPOINT)
        # as text, because NaN is not equal to itself
        if damaged is None and json.dumps([record.to_json() for record in found]) == json.dumps(saved):
            return found
        log.warning(
            "Note: %s is missing, damaged or incomplete: the records of the checkpoint beside it are used", metrics
        )
        return parse_records(saved)


def owner(run: Run, processes: int, start: str | None) -> str:
    """Describe everything that a run's result depends on; `start` is the digest of its initial weights, if any."""
    depends_on = run.recipe.result_options() | {"processes": processes} | ({} if start is None else {"start": start})
    return f"{run.name} of {json.dumps(depends_on, sort_keys=True)}"


def _is_of(run: Run, its_owner: str) -> bool:
    """True if the owner of a checkpoint is a run, from whatever initial weights and with however many processes."""
    name, _, depends_on = its_owner.partition(" of ")
    try:
        options = json.loads(depends_on)
    except ValueError:
        return False
    known = json.loads(json.dumps(run.recipe.result_options()))
    return name == run.name and {key: options.get(key) for key in known} == known


def _is_search(config: Path) -> bool:
    try:
        return str(json.loads(config.read_text("utf-8"))["format"]).startswith("steppe tuning")
    except Exception:  # damaged, in any of many ways, which its reader names
        return False


def _configuration(values: Mapping[str, Any]) -> tuple[Recipe, int]:
    check_format(values, _FORMAT)
    processes = values["processes"]
    if isinstance(processes, bool) or not isinstance(processes, int):
        raise TypeError(f"processes is {processes!r}")
    return Recipe.from_json(values["recipe"]), processes


def check_unused(path: Path) -> None:
    """Raise ExperimentError if the folder holds files, but is no run folder."""
    if not (path / "config.json").exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise ExperimentError(
            f"{path} is not a run folder and not empty, and the files of the runs would mix with those: choose another "
            "with --out"
        )


def check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ExperimentError, with every difference, if the folder's configuration is not the one of now."""
    differing = [f"{k} was {before.get(k)} and is {v}" for k, v in now.items() if before.get(k) != v]
    if differing:
        raise ExperimentError(
            f"{path} holds another configuration, and its runs could not be compared with these: "
            f"{'; '.join(differing)}. Use the former values, or choose another folder with --out"
        )
