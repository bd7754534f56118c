"""The options of `steppe tune`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TuningOptions:
    """The search space, the sampler and the number of trials."""

    search: tuple[str, ...] = ()
    """Names and values to search, each as NAME=LOW..HIGH (on a logarithmic scale; whole numbers, and with :linear any,
    on a linear one) or NAME=VALUE,VALUE,...: rho=0.01..1 lr=0.02,0.05,0.1 interval=2..8. A name is an argument of a
    method or an option of the recipe. By default rho, from a tenth of each method's usual value to ten times that."""
    trials: int | None = None
    """Trials of each method; by default 20, or the whole of a grid. Raise it later to add some."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """tpe prefers values near those of good trials, so it trains one trial at a time, unless --runs-at-once or --on ray
    is given; random draws values independently; grid tries all combinations of values."""
    sampler_seed: int = 0
    """Seed of the values. The same seed tries the same values, also after an interruption; with tpe, as long as one
    trial is trained at a time."""
    objective: Literal["accuracy", "loss"] = "accuracy"
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
    def by_accuracy(self) -> bool:
        return self.objective == "accuracy"

    @property
    def measure(self) -> str:
        """The field of a record that a trial is judged by; the held-out images take the place of the test set."""
        return f"test_{self.objective}"
