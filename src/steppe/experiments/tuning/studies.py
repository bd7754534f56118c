"""The trials of one method, in an Optuna study in a database that several processes may share.

A trial is held by the process that locks its folder. If that process dies, another one resumes the trial from its
checkpoints.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.random import SeedSequence

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import RunFolder
from steppe.experiments.tuning.options import Sampler, TuningOptions
from steppe.experiments.tuning.search_space import Space, Values, grid

if TYPE_CHECKING:
    import optuna

_STARTUP = 6  # random trials before TPE


@dataclass(frozen=True)
class TrialResult:
    """The state of a trial, and the last measurement of each of its runs."""

    method: str
    number: int
    values: Values
    state: Literal["complete", "diverged", "running"]
    runs: Sequence[Record] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "runs": [run.to_json() for run in self.runs]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrialResult:
        return cls(**{**values, "runs": tuple(Record(**run) for run in values["runs"])})


@dataclass
class Trial:
    """A trial that this process holds."""

    study: Study
    number: int
    recipe: Recipe
    """The recipe with the method at the trial's values."""
    folder: RunFolder
    lock: ExitStack
    handle: optuna.trial.Trial
    waiting: set[Path] = field(default_factory=set)
    """The folders of the runs that have not ended."""
    errors: list[str] = field(default_factory=list)


@contextmanager
def open_storage(url: str | None, path: Path) -> Iterator[optuna.storages.BaseStorage]:
    """Open the database at `url`, or an SQLite file in `path`; ExperimentError if it or Optuna is missing."""
    try:
        import optuna
        import sqlalchemy
    except ModuleNotFoundError as error:
        raise ExperimentError(
            f"{error.name} is not installed, and steppe tune needs it: pip install 'steppe[tune]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        file = sqlalchemy.URL.create("sqlite", database=str((path / "study.db").absolute()))
        address = file if url is None else sqlalchemy.make_url(url)
        # several processes may write into one file, one after the other
        settings = {"connect_args": {"timeout": 60}} if address.drivername.startswith("sqlite") else {}
        text = address.render_as_string(hide_password=False)
        storage = optuna.storages.RDBStorage(text, engine_kwargs=settings)
    except Exception as error:  # a missing driver, a server that does not answer, a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        shown = "the study in the run folder" if url is None else f"--storage {url.split('://')[0]}://..."
        raise ExperimentError(
            f"{shown} cannot be opened ({reason}): give the URL of a database that SQLAlchemy supports, with its "
            "driver installed, or leave --storage out for a file in the run folder"
        ) from error
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


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
    ) -> None:
        """Open the study in the storage, or create one; ExperimentError if it `depends_on` something else.

        The folders of the trials are in the run folder `path`, whose id is `folder_id` if others share the storage.
        """
        import optuna

        name = f"{space.recipe.name}/{space.spec}"
        self.space, self._path, self._folder_id, self._optuna = space, path, folder_id, optuna
        total = options.max_trials
        if options.sampler == "grid":
            first = grid(space.dimensions)
            total = min(total, len(first))
        else:  # the first trial is the level that tuning must improve on
            usual = space.usual()
            first = [] if usual is None else [usual]
        self.total = total if space.dimensions else 1
        self._study = optuna.create_study(
            study_name=name,
            storage=storage,
            direction="maximize" if options.objective == "accuracy" else "minimize",
            load_if_exists=True,
            sampler=_sampler(options.sampler, options.sampler_seed, first),
        )
        if self._study.user_attrs.setdefault("depends_on", depends_on) != depends_on:
            raise ExperimentError(
                f"the storage holds a study {name!r} of another configuration, and its trials could not be compared "
                "with these: choose another --name, or another --storage"
            )
        self._study.set_user_attr("depends_on", depends_on)

    def take(self) -> Trial | None:
        """Lock the next trial to train: one whose process has ended, or a new one; None if there are none.

        The caller must hold the lock of the run folder.
        """
        for frozen in self._trials():
            ours = self._folder_id is None or frozen.user_attrs.get("folder_id") == self._folder_id
            if ours and frozen.state is self._optuna.trial.TrialState.RUNNING:
                lock = self._lock(frozen.number)
                if lock is not None:
                    return self._trial(self._optuna.trial.Trial(self._study, frozen._trial_id), lock)
        if len(self._trials()) >= self.total:
            return None
        handle = self._study.ask()
        if self._folder_id is not None:
            handle.set_user_attr("folder_id", self._folder_id)
        lock = self._lock(handle.number)
        assert lock is not None  # the trial is new, and the caller holds the run folder
        return self._trial(handle, lock)

    def complete(self, trial: Trial, runs: Sequence[Record], value: float) -> None:
        trial.handle.set_user_attr("runs", [run.to_json() for run in runs])
        self._study.tell(trial.number, value)
        trial.lock.close()

    def diverged(self, trial: Trial, reason: str) -> None:
        """Record that a trial diverged, and release it; the sampler treats it as worse than any other."""
        trial.handle.set_user_attr("reason", reason)
        self._study.tell(trial.number, state=self._optuna.trial.TrialState.PRUNED)
        trial.lock.close()

    def results(self) -> list[TrialResult]:
        return [self._result(frozen) for frozen in self._trials()]

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _folder(self, number: int) -> RunFolder:
        return RunFolder(self._path / "trials" / f"{self.space.spec.folder}-{number:03d}")

    def _lock(self, number: int) -> ExitStack | None:
        """Lock the trial's folder; None if another process holds it."""
        stack = ExitStack()
        try:
            stack.enter_context(self._folder(number).locked())
        except ExperimentError:
            return None
        return stack

    def _trial(self, handle: optuna.trial.Trial, lock: ExitStack) -> Trial:
        try:
            recipe = self.space.at(self.space.rounded({d.name: d.suggest(handle) for d in self.space.dimensions}))
        except ValueError as error:
            raise ExperimentError(f"trial {handle.number} of {self.space.spec}: {error}") from error
        return Trial(self, handle.number, recipe, self._folder(handle.number), lock, handle)

    def _result(self, frozen: optuna.trial.FrozenTrial) -> TrialResult:
        attributes, states = frozen.user_attrs, self._optuna.trial.TrialState
        method, number, values = str(self.space.spec), frozen.number, self.space.rounded(frozen.params)
        if frozen.state is states.COMPLETE:
            runs = tuple(Record(**run) for run in attributes["runs"])
            return TrialResult(method, number, values, "complete", runs)
        if frozen.state is states.PRUNED:
            return TrialResult(method, number, values, "diverged", reason=attributes["reason"])
        return TrialResult(method, number, values, "running")


def _sampler(kind: Sampler, seed: int, first: Sequence[Values]) -> optuna.samplers.BaseSampler:
    """Make a sampler that depends only on the trial's number and the earlier trials, so a resumed study is unchanged.

    Optuna's own samplers draw from a generator whose state is lost with the process. The first trials have the values
    of `first`.
    """
    import optuna

    def make(number: int, name: str = "") -> optuna.samplers.BaseSampler:
        mixed = int(SeedSequence((seed, number, zlib.crc32(name.encode()))).generate_state(1)[0])
        if kind != "tpe":
            return optuna.samplers.RandomSampler(seed=mixed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=mixed, n_startup_trials=_STARTUP, multivariate=True, constant_liar=True
            )

    class Numbered(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
            return (
                make(trial.number).infer_relative_search_space(study, trial)
                if trial.number >= max(1, len(first))
                else {}
            )

        def sample_relative(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: dict[str, Any]
        ) -> dict[str, Any]:
            return make(trial.number).sample_relative(study, trial, search_space) if search_space else {}

        def sample_independent(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial, param_name: str, param_distribution: Any
        ) -> Any:
            if trial.number < len(first):
                return first[trial.number][param_name]
            return make(trial.number, param_name).sample_independent(study, trial, param_name, param_distribution)

    return Numbered()
