"""The experiments of docs/evidence: a recipe, its settings, the radii that are searched, and what decides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from steppe.experiments.robustness.corruptions import CORRUPTIONS

RADII = "rho=0.05,0.1,0.2"
WRONG_LABELS = {f"{100 * share:.0f} % wrong": share for share in (0.2, 0.4, 0.6)}
"""The settings of the recipe noisy-labels, each with its share of wrong labels."""


@dataclass(frozen=True)
class Evidence:
    """A recipe of `steppe compare`, its radii chosen on held-out data and then confirmed by other seeds."""

    tuned: Sequence[str]
    """The methods whose radius is searched."""
    others: Sequence[str] = ()
    """Further methods of the comparison, such as the averaged base."""
    settings: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"": ()})
    """Further options of the recipe, by the name of a setting."""
    base: str = "sgd"
    search: Sequence[str] = (RADII,)
    objective: str = "metric"
    """What decides on the held-out data, see `steppe tune --objective`."""
    seeds: int = 2
    """Runs of each trial of the search."""
    measures: Sequence[str] = ("accuracy", "accuracy under corruptions", "calibration error")
    """What the tables and the figure show; the first one decides."""


EVIDENCE: Mapping[str, Evidence] = {
    "noisy-labels": Evidence(
        ["sam"],
        ["sgd+ema"],
        search=["rho=0.05,0.1,0.2,0.4"],
        settings={name: ["--label-noise", str(share)] for name, share in WRONG_LABELS.items()},
    ),
    "corruptions": Evidence(
        ["sam"],
        objective="accuracy under corruptions",
        seeds=3,
        measures=[
            "accuracy under corruptions",
            *(f"accuracy under {name}" for name in CORRUPTIONS),
            *("accuracy", "calibration error", "accuracy at 3 bits"),
        ],
    ),
    "annealed": Evidence(["sam", "late_sam", "looksam"], ["sgd+ema"]),
    "forgetting": Evidence(
        ["sam"],
        settings={"rotated": ["--then", "rotated"], "digits": ["--then", "digits"]},
        objective="accuracy after the second task",
        measures=["accuracy after the second task", "accuracy forgotten", "accuracy on the second task", "accuracy"],
    ),
    "vit": Evidence(
        ["sam"],
        objective="accuracy under corruptions",
        base="adamw",
        measures=["accuracy under corruptions", "accuracy under gaussian_noise", "accuracy", "calibration error"],
    ),
    "text": Evidence(["sam"], base="base", seeds=3, measures=["accuracy"]),
}
