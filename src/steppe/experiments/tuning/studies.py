"""The trials of one method, in an Optuna study: which values come next, which trials are somebody's, what came out.

A trial belongs to who holds the lock of its folder. One whose holder died is taken up again, from its checkpoints.
"""

from __future__ import annotations

import fcntl
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
from steppe.experiments.tuning.search_space import Listed, Range, Space, Values, grid

if TYPE_CHECKING:
    import optuna

__all__ = ["Result", "Sampler", "Study", "Trial", "guarded", "opened"]

Sampler = Literal["tpe", "random", "grid"]

_STARTUP = 6  # trials at random before TPE has something to go by


@dataclass(frozen=True)
class Result:
    """What is known of a trial: its values, and the last measurement of each of its runs."""

    method: str
    number: int
    values: Values
    state: Literal["complete", "diverged", "running"]
    runs: Sequence[Record] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The result as JSON; `from_json` is the way back."""
        return {**asdict(self), "runs": [run.to_json() for run in self.runs]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        """Make a result of what `to_json` gave."""
        return cls(**{**values, "runs": tuple(Record(**run) for run in values["runs"])})


@dataclass
class Trial:
    """A trial that this process holds."""

    number: int
    recipe: Recipe
    """The recipe with the method at the trial's values."""
    folder: RunFolder
    lock: ExitStack = field(repr=False)


@contextmanager
def opened(url: str | None, path: Path) -> Iterator[optuna.storages.BaseStorage]:
    """Open the database at `url`, or an SQLite file in `path`; ExperimentError when that, or Optuna, is not there."""
    try:
        import optuna
        import sqlalchemy
    except ModuleNotFoundError as error:
        raise ExperimentError(
            f"{error.name} is not installed, and steppe tune needs it: pip install 'steppe[tune]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if url is None:
            there = sqlalchemy.URL.create("sqlite", database=str((path / "study.db").absolute()))
        else:
            there = sqlalchemy.make_url(url)
        # several processes may write into one file: each waits for its turn
        waits = {"connect_args": {"timeout": 60}} if there.drivername.startswith("sqlite") else {}
        text = there.render_as_string(hide_password=False)
        storage = optuna.storages.RDBStorage(text, engine_kwargs=waits)
    except Exception as error:  # a driver that is missing, a server that does not answer, a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        shown = "the study in the run folder" if url is None else f"--storage {url.split('://')[0]}://..."
        raise ExperimentError(
            f"{shown} cannot be opened ({reason}): give the URL of a database that SQLAlchemy speaks, with its driver "
            "installed, or leave --storage out for a file in the run folder"
        ) from error
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Be the only process that decides something in `path`, for a moment; wait for the others."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Study:
    """The trials of a space, `total` of them; several processes may share them through the storage."""

    def __init__(
        self,
        space: Space,
        storage: optuna.storages.BaseStorage,
        path: Path,
        *,
        name: str,
        config: str,
        maximize: bool,
        sampler: Sampler,
        seed: int,
        trials: int,
        run: str | None,
    ) -> None:
        """Open or create the study `name` in `storage`; its trials train in `path`.

        `config` is what the trials depend on: ExperimentError when the study is of another one. `run` is the run
        folder's id where the storage is shared with others, and None where the storage is the folder's own.
        """
        import optuna

        self.space, self._path, self._run, self._optuna = space, path, run, optuna
        combinations = grid(space.dimensions) if sampler == "grid" else None
        self.total = min(trials, len(combinations)) if combinations is not None else trials
        if not space.dimensions:
            self.total = 1
        self._study = optuna.create_study(
            study_name=name,
            storage=storage,
            direction="maximize" if maximize else "minimize",
            load_if_exists=True,
            sampler=_sampler(sampler, seed, space.usual(), combinations),
        )
        if self._study.user_attrs.setdefault("config", config) != config:
            raise ExperimentError(
                f"the storage holds a study {name!r} of another configuration, and its trials could not be compared "
                "with these: choose another --name, or another --storage"
            )
        self._study.set_user_attr("config", config)

    def take(self) -> Trial | None:
        """Hold a trial that is to be trained: one that was left, or else the next one; None when there is none.

        Call it `guarded`.
        """
        for frozen in self._trials():
            if frozen.state is self._optuna.trial.TrialState.RUNNING and self._mine(frozen):
                lock = self._lock(frozen.number)
                if lock is not None:
                    return self._hold(self._optuna.trial.Trial(self._study, frozen._trial_id), lock)
        if len(self._trials()) >= self.total:
            return None
        trial = self._study.ask()
        if self._run is not None:
            trial.set_user_attr("run", self._run)
        lock = self._lock(trial.number)
        assert lock is not None  # nobody else knows this trial yet
        return self._hold(trial, lock)

    def tell(self, trial: Trial, runs: Sequence[Record], value: float) -> None:
        """A trial is complete."""
        self._note(trial, "runs", [run.to_json() for run in runs])
        self._study.tell(trial.number, value)
        trial.lock.close()

    def diverged(self, trial: Trial, reason: str) -> None:
        """A trial's training loss grew without bound: the sampler takes it as worse than any other."""
        self._note(trial, "reason", reason)
        self._study.tell(trial.number, state=self._optuna.trial.TrialState.PRUNED)
        trial.lock.close()

    def results(self) -> list[Result]:
        """Everything that is known, of all who share the study."""
        return [self._result(frozen) for frozen in self._trials()]

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _mine(self, trial: optuna.trial.FrozenTrial) -> bool:
        return self._run is None or trial.user_attrs.get("run") == self._run

    def _folder(self, number: int) -> RunFolder:
        return RunFolder(self._path / "trials" / f"{self.space.spec.folder}-{number:03d}")

    def _lock(self, number: int) -> ExitStack | None:
        """Hold the trial's folder; None when somebody does."""
        stack = ExitStack()
        try:
            stack.enter_context(self._folder(number).locked())
        except ExperimentError:
            return None
        return stack

    def _hold(self, trial: optuna.trial.Trial, lock: ExitStack) -> Trial:
        values = {dimension.name: dimension.round(_suggest(trial, dimension)) for dimension in self.space.dimensions}
        try:
            recipe = self.space.at(values)
        except ValueError as error:
            raise ExperimentError(f"trial {trial.number} of {self.space.spec}: {error}") from error
        return Trial(trial.number, recipe, self._folder(trial.number), lock)

    def _note(self, trial: Trial, key: str, value: Any) -> None:
        frozen = self._trials()[trial.number]
        self._optuna.trial.Trial(self._study, frozen._trial_id).set_user_attr(key, value)

    def _result(self, frozen: optuna.trial.FrozenTrial) -> Result:
        states = self._optuna.trial.TrialState
        values = {d.name: d.round(frozen.params[d.name]) for d in self.space.dimensions if d.name in frozen.params}
        method = str(self.space.spec)
        if frozen.state is states.COMPLETE:
            runs = tuple(Record(**run) for run in frozen.user_attrs["runs"])
            return Result(method, frozen.number, values, "complete", runs)
        if frozen.state is states.PRUNED:
            return Result(method, frozen.number, values, "diverged", reason=frozen.user_attrs["reason"])
        return Result(method, frozen.number, values, "running")


def _suggest(trial: optuna.trial.Trial, dimension: Range | Listed) -> Any:
    if isinstance(dimension, Listed):
        return trial.suggest_categorical(dimension.name, dimension.values)
    if dimension.whole:
        return trial.suggest_int(dimension.name, int(dimension.low), int(dimension.high), log=dimension.log)
    return trial.suggest_float(dimension.name, dimension.low, dimension.high, log=dimension.log)


def _sampler(
    kind: Sampler, seed: int, usual: Values | None, combinations: Sequence[Values] | None
) -> optuna.samplers.BaseSampler:
    """Draw from the trial's number and the trials before it: a study that is gone on with draws what it would have."""
    import optuna

    def make(number: int, name: str) -> optuna.samplers.BaseSampler:
        mixed = int(SeedSequence((seed, number, zlib.crc32(name.encode()))).generate_state(1)[0])
        if kind != "tpe":
            return optuna.samplers.RandomSampler(seed=mixed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=mixed, n_startup_trials=_STARTUP, multivariate=True, constant_liar=True
            )

    class Numbered(optuna.samplers.BaseSampler):
        def infer_relative_search_space(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial
        ) -> dict[str, optuna.distributions.BaseDistribution]:
            if combinations is not None or trial.number == 0:
                return {}
            return make(trial.number, "").infer_relative_search_space(study, trial)

        def sample_relative(
            self,
            study: optuna.Study,
            trial: optuna.trial.FrozenTrial,
            search_space: dict[str, optuna.distributions.BaseDistribution],
        ) -> dict[str, Any]:
            return make(trial.number, "").sample_relative(study, trial, search_space) if search_space else {}

        def sample_independent(
            self,
            study: optuna.Study,
            trial: optuna.trial.FrozenTrial,
            param_name: str,
            param_distribution: optuna.distributions.BaseDistribution,
        ) -> Any:
            if combinations is not None:
                return combinations[trial.number][param_name]
            if trial.number == 0 and usual is not None:
                return usual[param_name]  # whether tuning was worth it is seen against the value that one had
            return make(trial.number, param_name).sample_independent(study, trial, param_name, param_distribution)

    return Numbered()
