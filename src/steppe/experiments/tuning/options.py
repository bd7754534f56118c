"""The options of `steppe tune`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

Objective = Literal["accuracy", "loss"]
Sampler = Literal["tpe", "random", "grid"]

MEASURES: Mapping[Objective, str] = MappingProxyType({"accuracy": "test_accuracy", "loss": "test_loss"})
"""The field of a record that a trial is judged by; the held-out images take the place of the test set."""

_TRIALS = 20


@dataclass(frozen=True)
class TuningOptions:
    """The search space, the sampler and the number of trials."""

    search: tuple[str, ...] = ()
    """Names and values to search, each as NAME=LOW..HIGH (on a logarithmic scale; whole numbers, and with :linear any,
    on a linear one) or NAME=VALUE,VALUE,...: rho=0.01..1 lr=0.02,0.05,0.1 interval=2..8. A name is an argument of a
    method or an option of the recipe. By default rho, from a tenth of each method's usual value to ten times that."""
    trials: int | None = None
    """Trials of each method; by default 20, or the whole of a grid. Raise it later to add some."""
    sampler: Sampler = "tpe"
    """tpe prefers values near those of good trials, so it trains one trial at a time, unless --runs-at-once or --on ray
    is given; random draws values independently; grid tries all combinations of values."""
    sampler_seed: int = 0
    """Seed of the values. The same seed tries the same values, also after an interruption; with tpe, as long as one
    trial is trained at a time."""
    objective: Objective = "accuracy"
    """The best trial has the highest validation accuracy, or the lowest validation loss, after the last epoch."""
    hold_out: int = 6
    """One in so many training images of each class is held out for validation; the test set is not used."""
    baseline: bool = True
    """Train the plain base optimizer too, as the level to beat."""
    storage: str | None = None
    """The URL of a database that Optuna supports, for many machines; by default an SQLite file in the run folder."""

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials={self.trials}: the number of trials must be at least 1")
        if self.hold_out < 2:
            raise ValueError(f"hold_out={self.hold_out}: one in so many images is held out: use at least 2")
        if self.sampler_seed < 0:
            raise ValueError(f"sampler_seed={self.sampler_seed}: a seed must be at least 0")

    @property
    def max_trials(self) -> int:
        return self.trials or (10**9 if self.sampler == "grid" else _TRIALS)

    def result(self) -> dict[str, Any]:
        """Return the options that the trials depend on, apart from their number."""
        return {k: v for k, v in asdict(self).items() if k not in ("trials", "storage")} | {"search": [*self.search]}
