"""The options of `steppe tune`."""

from dataclasses import dataclass, replace
from typing import Literal

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.sections import check_ranges
from steppe.experiments.config.task_info import LOSS, MetricInfo
from steppe.experiments.errors import OptionError, unknown
from steppe.experiments.robustness.records import IMAGE_MEASURES
from steppe.experiments.storage.records import AFTER

_Sampler = Literal["tpe", "random", "grid"]


@dataclass(frozen=True)
class TuningOptions:
    """The search space, the sampler and the number of trials."""

    search: tuple[str, ...] = ()
    """Names and values to search, each as NAME=LOW..HIGH (on a logarithmic scale; whole numbers, and with :linear any,
    on a linear one) or NAME=VALUE,VALUE,...: rho=0.01..1 lr=0.02,0.05,0.1 interval=2..8. A name is an argument of a
    method or an option of the recipe. By default rho, from a tenth of each method's usual value to ten times that."""
    trials: int | None = None
    """Trials of each method; by default 20, or the whole of a grid. Raise it later to add some."""
    sampler: _Sampler = "tpe"
    """tpe prefers values near those of good trials, so it trains one trial at a time, unless --runs-at-once or --on ray
    is given; random draws values independently; grid tries all combinations of values."""
    sampler_seed: int = 0
    """Seed of the values. The same seed tries the same values, also after an interruption; with tpe, as long as one
    trial is trained at a time."""
    objective: str = "metric"
    """What the best trial is best in, on the validation data after the last epoch. metric: the task's first metric, of
    images the accuracy. loss, or another metric of the task by its name. Of images also "accuracy under corruptions",
    "calibration error" or another measure of the trained network; with --then "accuracy after the second task"."""
    hold_out: int = 6
    """One in so many training samples, of images so many of each class, is held out for validation; the test set is
    not used. A task of your own may have validation data instead."""
    baseline: bool = True
    """Train the plain base optimizer too, as the level to beat."""
    storage: str | None = None
    """The URL of a database that Optuna supports, for many machines; by default an SQLite file in the run folder."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials={self.trials}: the number of trials must be at least 1")
        if self.hold_out < 2:
            raise ValueError(f"hold_out={self.hold_out}: one in so many samples is held out: use at least 2")
        if self.sampler_seed < 0:
            raise ValueError(f"sampler_seed={self.sampler_seed}: a seed must be at least 0")

    def metric(self, recipe: Recipe) -> MetricInfo:
        """Return what the trials of a recipe are judged by; OptionError if it is not measured."""
        measured = [*recipe.task.metrics, LOSS]
        if not recipe.data.task:
            measured += [MetricInfo(one.name, one.higher_is_better, one.unit) for one in IMAGE_MEASURES]
        if recipe.forgetting.then:
            measured += [replace(metric, name=metric.name + AFTER) for metric in recipe.task.measured]
        known = {"metric": recipe.task.deciding} | {metric.name: metric for metric in measured}
        if self.objective not in known:
            raise OptionError(unknown("objective", str(self.objective), known))
        return known[self.objective]


def field_of(metric: MetricInfo) -> str:
    """Return a metric's field in the records of a trial; the validation data take the place of the test data."""
    return f"test_{metric.name}"
