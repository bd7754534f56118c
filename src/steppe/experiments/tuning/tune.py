"""`steppe tune`: search rho, and whatever else is named, at equal compute, by images that are held out of training."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rich.console import Console

from steppe.experiments.compare import sign
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data import datasets as data
from steppe.experiments.data.validation import hold_out
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.board import board
from steppe.experiments.execution.executor import ExecutionOptions, Executor, Job, Outcome, start
from steppe.experiments.figures.rho import draw
from steppe.experiments.storage.files import write_atomically, write_json
from steppe.experiments.storage.records import Record
from steppe.experiments.training.pretraining import reduced, with_start
from steppe.experiments.training.stopping import on_signals
from steppe.experiments.tuning.result import Findings, Tuning, find
from steppe.experiments.tuning.search_space import spaces
from steppe.experiments.tuning.studies import Result, Sampler, Study, Trial, guarded, opened
from steppe.experiments.world import launched

__all__ = ["Options", "again", "is_tuning", "tune"]

_FORMAT = "steppe tuning, version 1"
_TRIALS = 20


@dataclass(frozen=True)
class Options:
    """What is searched, and how."""

    search: tuple[str, ...] = ()
    """What to search, each as NAME=LOW..HIGH (on a logarithmic scale; whole numbers, and with :linear any, on a linear
    one) or NAME=VALUE,VALUE,...: rho=0.01..1 lr=0.02,0.05,0.1 k=2..8. A name is an argument of a method or an option
    of the recipe. By default rho, from a tenth of each method's usual value to ten times that."""
    trials: int | None = None
    """Trials of each method; by default 20, or the whole of a grid. Raise it later to add some."""
    sampler: Sampler = "tpe"
    """tpe looks where earlier trials were good, so it trains one at a time, unless told otherwise by --runs-at-once or
    --on ray; random does not; grid tries all combinations of values."""
    sampler_seed: int = 0
    """Seed of what is tried. The same seed tries the same values, also when it was interrupted; with tpe, as long as
    one trial is trained at a time."""
    objective: Literal["accuracy", "loss"] = "accuracy"
    """What is best: the highest validation accuracy, or the lowest validation loss, after the last epoch."""
    hold_out: int = 6
    """One in so many training images of each class is held out to choose by; the test set is not touched."""
    baseline: bool = True
    """Train the plain base optimizer too, as the level to beat."""
    storage: str | None = None
    """The URL of a database that Optuna speaks, for many machines; by default an SQLite file in the run folder."""

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials={self.trials}: the number of trials must be at least 1")
        if self.hold_out < 2:
            raise ValueError(f"hold_out={self.hold_out}: one in so many images is held out, at least 2: some must stay")
        if self.sampler_seed < 0:
            raise ValueError(f"sampler_seed={self.sampler_seed}: a seed must be at least 0")

    @property
    def budget(self) -> int:
        """The most trials of a method."""
        return self.trials or (10**9 if self.sampler == "grid" else _TRIALS)

    def result(self) -> dict[str, Any]:
        """What the trials depend on, besides how many there are."""
        return {k: v for k, v in asdict(self).items() if k not in ("trials", "storage")} | {"search": [*self.search]}


def tune(
    recipe: Recipe, options: Options, command: Sequence[str], console: Console, where: ExecutionOptions
) -> Findings:
    """Train the trials that are not trained yet, then say what was found and draw it.

    Raises Stopped, ExperimentError and DataError as `compare` does, and ValueError when the search makes no sense.
    """
    if launched() > 1:
        raise ExperimentError(
            "steppe tune under torchrun: trials are independent runs, and need no processes that train one together. "
            "Start it without torchrun, with --on ray for many at a time, or several times in one run folder"
        )
    recipe, path = reduced(recipe, console), folder(recipe)
    # trials may have the same units, whose logs would be written over each other
    plain = replace(recipe, tensorboard=False)
    with (
        start(plain, where, console, most=recipe.seeds if _in_turn(options, where) else None) as executor,
        opened(options.storage, _made(path)) as storage,
    ):
        found = spaces(executor.recipe, options.search, baseline=options.baseline)
        with guarded(path):
            run = _claim(path, recipe, executor.recipe, options)
            sign(path / "environment.json", [_without_password(word) for word in command], console)
            studies = [
                Study(
                    space,
                    storage,
                    path,
                    name=f"{recipe.name}/{space.spec}",
                    config=json.dumps(_depends_on(executor.recipe, options), sort_keys=True),
                    maximize=options.objective == "accuracy",
                    sampler=options.sampler,
                    seed=options.sampler_seed,
                    trials=options.budget,
                    run=None if options.storage is None else run,
                )
                for space in found
            ]
        held_out = hold_out(data.load(recipe.dataset, recipe.data_dir), options.hold_out)
        held_out = with_start(held_out, executor, path, console)
        try:
            _train(executor, studies, held_out, path, options, console, in_turn=_in_turn(options, where))
        finally:
            with guarded(path):
                _keep(path, studies)
    return again(path, console)


def folder(recipe: Recipe) -> Path:
    """Where a recipe is tuned; its comparison has another place."""
    return recipe.out if recipe.out is not None else Path("runs") / f"{recipe.name}-tune"


def is_tuning(path: Path) -> bool:
    """Whether `steppe tune` made this folder."""
    try:
        return bool(json.loads((path / "config.json").read_text())["format"] == _FORMAT)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def again(path: Path, console: Console) -> Findings:
    """Say what was found and draw it, from the run folder alone."""
    try:
        config = json.loads((path / "config.json").read_text())
        recipe = Recipe.from_json(config["recipe"])
        options = Options(**{**config["options"], "search": tuple(config["options"]["search"])})
        lines = (path / "trials.jsonl").read_text().splitlines()
        results = [Result.from_json(json.loads(line)) for line in lines]
        found = spaces(recipe, options.search, baseline=options.baseline)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExperimentError(
            f"{path} is damaged or of another version ({error}): run `steppe tune` again, or take another --out"
        ) from error
    tuning = Tuning(recipe, found, options.objective, options.hold_out, path)
    findings = find(tuning, results)
    with guarded(path):
        write_atomically(path / "summary.md", findings.markdown().encode())
        write_json(path / "summary.json", findings.json())
        draw(tuning, results, findings, path / "figures")
    findings.show(console)
    console.print(f"Figures: {path / 'figures'}", highlight=False, markup=False, soft_wrap=True)
    return findings


@dataclass
class _Open:
    """A trial in progress."""

    study: Study
    trial: Trial
    waiting: set[Path]
    errors: list[str]


def _in_turn(options: Options, where: ExecutionOptions) -> bool:
    """Whether a trial waits for the one before, and only its own runs share the machine.

    tpe proposes by what is known, so that with several in progress what it tries would depend on who ends first.
    """
    return options.sampler == "tpe" and where.on == "here" and where.runs_at_once is None


def _train(
    executor: Executor,
    studies: Sequence[Study],
    held_out: data.Dataset,
    path: Path,
    options: Options,
    console: Console,
    *,
    in_turn: bool,
) -> None:
    in_progress: dict[Path, _Open] = {}
    seeds, epochs = executor.recipe.seeds, executor.recipe.epochs
    left = sum(study.total - sum(result.state != "running" for result in study.results()) for study in studies)
    teller = board(max(0, left) * seeds * epochs, console, "validation")
    try:
        with teller, on_signals() as stop:
            trials = _trials(studies, path, in_progress)
            for jobs in trials if in_turn else [chain.from_iterable(trials)]:
                with closing(executor.run(jobs, held_out, path, teller, stop)) as outcomes:
                    for outcome in outcomes:
                        _finish(outcome, in_progress, options)
    finally:
        for one in in_progress.values():
            one.trial.lock.close()


def _trials(studies: Sequence[Study], path: Path, in_progress: dict[Path, _Open]) -> Iterator[list[Job]]:
    """Take one trial after the other, and give its runs."""
    for study in studies:
        while True:
            with guarded(path):
                trial = study.take()
            if trial is None:
                break
            jobs = [Job(run, trial.folder.run(run)) for run in trial.recipe.runs()]
            folders = {job.folder for job in jobs}  # two trials may have the same units: they differ in these
            in_progress.update(dict.fromkeys(folders, _Open(study, trial, folders, [])))
            yield jobs


def _finish(outcome: Outcome, in_progress: dict[Path, _Open], options: Options) -> None:
    one = in_progress.pop(outcome.job.folder)
    one.waiting.remove(outcome.job.folder)
    if outcome.error is not None:
        if " diverged in epoch " not in outcome.error:
            raise ExperimentError(outcome.error)
        one.errors.append(outcome.error)
    if one.waiting:
        return
    if one.errors:
        one.study.diverged(one.trial, one.errors[0])
        return
    runs = [records[-1] for records in one.trial.folder.results(one.trial.recipe).values()]
    one.study.tell(one.trial, runs, fmean(_objective(run, options) for run in runs))


def _objective(record: Record, options: Options) -> float:
    # the held-out images are in the place of the test set
    return record.test_accuracy if options.objective == "accuracy" else record.test_loss


def _keep(path: Path, studies: Sequence[Study]) -> None:
    """Write what is known into the run folder, where it can be read without Optuna."""
    lines = [json.dumps(result.to_json()) + "\n" for study in studies for result in study.results()]
    write_atomically(path / "trials.jsonl", "".join(lines).encode())


def _made(path: Path) -> Path:
    if path.is_dir() and not (path / "config.json").exists() and any(p.name[0] != "." for p in path.iterdir()):
        raise ExperimentError(
            f"{path} is not a run folder and not empty, and the files of the trials would mix with what is there: "
            "choose another with --out"
        )
    if (path / "config.json").exists() and not is_tuning(path):
        raise ExperimentError(
            f"{path} is the folder of a comparison or of another version, not of `steppe tune`: choose another "
            "with --out"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def _claim(path: Path, asked: Recipe, resolved: Recipe, options: Options) -> str:
    """Make this the folder of this search, or see that it is already; return the folder's id."""
    file, depends_on = path / "config.json", _depends_on(resolved, options)
    run = uuid.uuid4().hex
    if file.exists():
        before = json.loads(file.read_text())
        run, theirs = before["id"], before["depends_on"]
        differing = [f"{k} was {theirs.get(k)} and is {v}" for k, v in depends_on.items() if theirs.get(k) != v]
        if differing:
            raise ExperimentError(
                f"{path} holds another search, and its trials could not be compared with these: "
                f"{'; '.join(differing)}. Take the values that were, or choose another folder with --out"
            )
    write_json(
        file,
        {
            "format": _FORMAT,
            "held_out": "test_loss, test_accuracy and gap of the trials are on images held out of the training set",
            "id": run,
            "recipe": asked.to_json(),
            "options": {**asdict(options), "storage": None},
            "depends_on": depends_on,
        },
    )
    return run


def _depends_on(recipe: Recipe, options: Options) -> dict[str, Any]:
    whole = recipe.to_json()
    named = {name: whole[name] for name in ("methods", "seeds", "first_seed")}
    # as JSON has it, so that it can be compared with what is read back
    values: dict[str, Any] = json.loads(json.dumps(recipe.result() | named | options.result()))
    return values


def _without_password(word: str) -> str:
    """Keep a database's password out of the record.

    >>> _without_password("postgresql://me:secret@host/db")
    'postgresql://me:***@host/db'
    """
    return re.sub(r"(://[^:/@\s]+):[^@\s]+@", r"\1:***@", word)
