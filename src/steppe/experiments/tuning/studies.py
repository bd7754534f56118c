"""The trials of one method, in an Optuna study in a database that several processes may share.

A trial is held by the process that locks its folder. If that process dies, another one resumes the trial from its
checkpoints. This module needs Optuna; :mod:`.tune` imports it only to search.
"""

from __future__ import annotations

import math
import sqlite3
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
import sqlalchemy
from numpy.random import SeedSequence
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from steppe.experiments.analysis.statistics import estimate
from steppe.experiments.config.methods import Value
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.errors import ExperimentError, reason
from steppe.experiments.execution.executor import Executor, Job, MakeTask, Outcome
from steppe.experiments.execution.progress import RunProgress
from steppe.experiments.storage.files import CHECKSUM, checksum
from steppe.experiments.storage.records import parse_record
from steppe.experiments.storage.run_folder import RunFolder
from steppe.experiments.training.stopping import Stopped, on_signals
from steppe.experiments.tuning.options import TuningOptions, field_of
from steppe.experiments.tuning.result import TrialResult
from steppe.experiments.tuning.search_space import Choices, Dimension, Space, Values, grid

_TRIALS = 20
_STARTUP = 6  # random trials before TPE


@contextmanager
def _one_line_errors(name: str, remedy: str) -> Iterator[None]:
    """Turn any error of the database or of its content into an ExperimentError of one line."""
    try:
        yield
    except (ExperimentError, Stopped):
        raise
    except Exception as error:  # a damaged file raises errors of SQLite, SQLAlchemy, Optuna and of the values' types
        raise ExperimentError(f"{name} cannot be used ({reason(_cause(error))}): {remedy}") from error


def _cause(error: BaseException) -> BaseException:
    """Return the database's own error, without the statement that SQLAlchemy adds in further lines."""
    return _cause(error.__cause__) if error.__cause__ is not None else error


def _in_words(url: str | None, path: Path) -> tuple[str, str]:
    """Return the name of a database in errors, and the remedy."""
    if url is None:
        file = path / "study.db"
        return str(file), (
            "make room if the disk is full; if it is damaged, delete it, and the same command makes it again from the "
            f"checkpoints in {path / 'trials'}"
        )
    return f"--storage {url.split('://')[0]}://...", (
        "give the URL of a database that SQLAlchemy supports, with its driver installed, or leave --storage out for a "
        "file in the run folder"
    )


@contextmanager
def open_storage(url: str | None, path: Path) -> Iterator[optuna.storages.RDBStorage]:
    """Open the database at `url`, or an SQLite file in `path`; ExperimentError if it cannot be opened."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _one_line_errors(*_in_words(url, path)):
        file = sqlalchemy.URL.create("sqlite", database=str((path / "study.db").absolute()))
        address = file if url is None else sqlalchemy.make_url(url)
        # several processes may write into one file, one after the other
        settings = {"connect_args": {"timeout": 60}} if address.drivername.startswith("sqlite") else {}
        text = address.render_as_string(hide_password=False)
        if url is None and (path / "study.db").exists():
            _check_integrity(path / "study.db")
        storage = optuna.storages.RDBStorage(text, engine_kwargs=settings)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _check_integrity(file: Path) -> None:
    """Let SQLite look through its file; without that, a damaged page is found when it is needed, or never."""
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=60)) as database:
        (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise ValueError(found)


@dataclass(eq=False)
class Trial:
    """A trial that this process holds."""

    study: Study
    handle: optuna.trial.Trial
    recipe: Recipe
    """The recipe with the method at the trial's values."""
    folder: RunFolder
    lock: ExitStack
    errors: list[str] = field(default_factory=list)
    """The errors of its runs that diverged."""


class Study:
    """The trials of a space, at most `total`; several processes may share them through the storage."""

    def __init__(
        self,
        space: Space,
        storage: optuna.storages.BaseStorage,
        path: Path,
        options: TuningOptions,
        *,
        depends_on: str,
        folder_id: str | None,
        own: Values = MappingProxyType({}),
    ) -> None:
        """Open the study in the storage, or create one; ExperimentError if it `depends_on` something else.

        The folders of the trials are in the run folder `path`, whose id is `folder_id` if others share the storage.
        `own` are the values of the task's own optimizer.
        """
        self.space, self._path, self._folder_id = space, path, folder_id
        metric = options.metric(space.recipe)
        self._measure = field_of(metric)
        self._database = _in_words(options.storage, path)
        if options.sampler == "grid":
            first = grid(space.dimensions)
            total = min(options.trials or len(first), len(first))
        else:  # the first trial is the level that tuning must improve on
            usual = space.usual(own)
            first = [] if usual is None else [usual]
            total = options.trials or _TRIALS
        self.total = total if space.dimensions else 1
        with _one_line_errors(*self._database):
            self._study = optuna.create_study(
                study_name=f"{space.recipe.name}/{space.spec}",
                storage=storage,
                direction="maximize" if metric.higher_is_better else "minimize",
                load_if_exists=True,
                sampler=_NumberedSampler(options, first),
            )
            self._claim(depends_on)

    def _claim(self, depends_on: str) -> None:
        """Make the study one of these inputs, or check that it is already."""
        if self._study.user_attrs.setdefault("depends_on", depends_on) != depends_on:
            raise ExperimentError(
                f"the storage holds a study {self._study.study_name!r} of another configuration, and its trials could "
                "not be compared with these: choose another --name, or another --storage"
            )
        self._study.set_user_attr("depends_on", depends_on)

    def take(self) -> Trial | None:
        """Lock the next trial to train: one whose process has ended, or a new one; None if there are none."""
        with RunFolder(self._path).locked(timeout=-1), _one_line_errors(*self._database):
            for frozen in self._trials():
                ours = self._folder_id is None or frozen.user_attrs.get("folder_id") == self._folder_id
                if ours and frozen.state is TrialState.RUNNING and (trial := self._hold(frozen)) is not None:
                    return trial
            if len(self._trials()) >= self.total:
                return None
            new = self._study.ask()
            if self._folder_id is not None:
                new.set_user_attr("folder_id", self._folder_id)
            return self._hold(new)

    def _hold(self, trial: FrozenTrial | optuna.trial.Trial) -> Trial | None:
        """Lock a trial's folder and choose its values; None if another process holds it."""
        folder, lock = RunFolder(self._path / "trials" / f"{self.space.spec.folder}-{trial.number:03d}"), ExitStack()
        try:
            lock.enter_context(folder.locked())
        except ExperimentError:
            return None
        handle = optuna.trial.Trial(self._study, trial._trial_id)
        values = {dimension.name: _suggest(handle, dimension) for dimension in self.space.dimensions}
        try:
            recipe = self.space.at(self.space.rounded(values))
        except ValueError as error:
            raise ExperimentError(f"trial {trial.number} of {self.space.spec}: {error}") from error
        return Trial(self, handle, recipe, folder, lock)

    def end(self, trial: Trial) -> None:
        """Record the result of a trial whose runs have ended, and release it.

        The sampler treats one that diverged as worse than any other.
        """
        goal = math.nan
        if not trial.errors:
            runs = [records[-1] for records in trial.folder.results(trial.recipe).values()]
            goal = estimate([run[self._measure] for run in runs]).mean
        with _one_line_errors(*self._database):
            if math.isfinite(goal):
                self._tell(trial, goal, "runs", [run.to_json() for run in runs])
            else:
                why = f"its {self._measure.replace('test_', 'validation ')} is {goal}"
                self._tell(trial, None, "reason", (trial.errors or [why])[0])
        trial.lock.close()

    def _tell(self, trial: Trial, goal: float | None, name: str, result: Any) -> None:
        """Record the end of a trial with its result, and with a checksum, which SQLite has none of."""
        trial.handle.set_user_attr(name, result)
        trial.handle.set_user_attr(CHECKSUM, checksum([trial.handle.params, goal, result]))
        self._study.tell(trial.handle, goal, state=TrialState.PRUNED if goal is None else None)

    def results(self) -> list[TrialResult]:
        with _one_line_errors(*self._database):
            return [self._result(frozen) for frozen in self._trials()]

    def _result(self, frozen: FrozenTrial) -> TrialResult:
        method, number, values = str(self.space.spec), frozen.number, self.space.rounded(frozen.params)
        result = frozen.user_attrs.get("runs" if frozen.state is TrialState.COMPLETE else "reason")
        written = frozen.user_attrs.get(CHECKSUM)
        if frozen.state.is_finished() and written not in (None, checksum([frozen.params, frozen.value, result])):
            raise ValueError(f"the result of trial {number} of {method} was changed since it was written")
        if frozen.state is TrialState.COMPLETE:
            runs = tuple(map(parse_record, frozen.user_attrs["runs"]))
            return TrialResult(method, number, values, "complete", runs)
        if frozen.state is TrialState.PRUNED:
            return TrialResult(method, number, values, "diverged", reason=str(frozen.user_attrs["reason"]))
        return TrialResult(method, number, values, "running")

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)


def train_trials(
    studies: Sequence[Study], executor: Executor, make_task: MakeTask, path: Path, console: Console, *, one_by_one: bool
) -> None:
    """Train the remaining trials; at the end, release those in progress, so that any process can resume them."""
    results, comparison = [r for study in studies for r in study.results()], executor.recipe.comparison
    remaining = sum(study.total for study in studies) - sum(r.state != "running" for r in results)
    total = max(0, remaining) * comparison.seeds * comparison.epochs
    in_progress: dict[Path, Trial] = {}
    try:
        with RunProgress(console, total, "validation", executor.recipe.task) as progress, on_signals() as stop:
            jobs = _jobs(studies, in_progress)
            for group in jobs if one_by_one else [chain.from_iterable(jobs)]:
                with closing(executor.run(group, make_task, path, progress, stop)) as outcomes:
                    for outcome in outcomes:
                        _record(outcome, in_progress)
    finally:
        for trial in in_progress.values():
            trial.lock.close()


def _jobs(studies: Sequence[Study], in_progress: dict[Path, Trial]) -> Iterator[list[Job]]:
    """Take one trial after the other, and yield the jobs of its runs."""
    for study in studies:
        for trial in iter(study.take, None):
            jobs = [Job(run, trial.folder.run(run)) for run in trial.recipe.runs()]
            # by their folders, as runs of two trials may be equal
            in_progress.update({job.folder: trial for job in jobs})
            yield jobs


def _record(outcome: Outcome, in_progress: dict[Path, Trial]) -> None:
    """Record the end of a run; with its last run, a trial is complete or has diverged."""
    trial = in_progress.pop(outcome.job.folder)
    if outcome.error is not None:
        if " diverged in epoch " not in outcome.error:
            raise ExperimentError(outcome.error)
        trial.errors.append(outcome.error)
    if trial not in in_progress.values():
        trial.study.end(trial)


def _suggest(trial: optuna.trial.Trial, dimension: Dimension) -> Value:
    """Let the sampler choose a value of a dimension."""
    if isinstance(dimension, Choices):
        return trial.suggest_categorical(dimension.name, dimension.values)  # type: ignore[return-value]  # none is None
    if dimension.integer:
        return trial.suggest_int(dimension.name, int(dimension.low), int(dimension.high), log=dimension.log)
    return trial.suggest_float(dimension.name, dimension.low, dimension.high, log=dimension.log)


class _NumberedSampler(BaseSampler):
    """A sampler that depends only on the trial's number and the earlier trials, so a resumed study is unchanged.

    Optuna's own samplers draw from a generator whose state is lost with the process. The first trials have the values
    of `first`.
    """

    def __init__(self, options: TuningOptions, first: Sequence[Values]) -> None:
        self._kind, self._seed, self._first = options.sampler, options.sampler_seed, first

    def _sampler(self, number: int, name: str = "") -> BaseSampler:
        mixed = int(SeedSequence((self._seed, number, zlib.crc32(name.encode()))).generate_state(1)[0])
        if self._kind != "tpe":
            return optuna.samplers.RandomSampler(seed=mixed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=mixed, n_startup_trials=_STARTUP, multivariate=True, constant_liar=True
            )

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        if trial.number < max(1, len(self._first)):
            return {}
        return self._sampler(trial.number).infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self._sampler(trial.number).sample_relative(study, trial, search_space) if search_space else {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        if trial.number < len(self._first):
            return self._first[trial.number][param_name]
        sampler = self._sampler(trial.number, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)
