"""Sections of a recipe that say which runs there are, when they are measured and where they are stored."""

from dataclasses import dataclass
from pathlib import Path

from steppe.experiments.config.checks import at_least
from steppe.experiments.config.method_spec import MethodSpec


@dataclass(frozen=True)
class ComparisonConfig:
    """The methods, the seeds and the compute of each run."""

    methods: tuple[MethodSpec, ...] = (MethodSpec("sgd"), MethodSpec("sam"))
    """The methods, each as NAME or NAME:KEY=VALUE,... (looksam:interval=2). The others are compared with the first."""
    epochs: int = 20
    """Standardized epochs: the compute of each method. One is as many gradient evaluations as there are training
    images, so an epoch of SAM (two passes) counts as 2."""
    extra_epochs: int = 0
    """Further standardized epochs for methods with more than one pass a step; they have rows of their own."""
    widths: tuple[int, ...] = ()
    """Compare at each of these widths, and draw the errors over the number of parameters; `width` is then not used."""
    seeds: int = 3
    """Runs of each method. Raise it later to add runs to the same folder; one run gives no verdict."""
    first_seed: int = 0
    """Seed of the first run. Methods of one seed share initial weights and the order of the images."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(sorted(self.widths)))

    def check(self) -> None:
        """Raise ValueError for a value that is out of range."""
        at_least(
            self,
            {
                "epochs": (1, "the compute that each method gets"),
                "extra_epochs": (0, "further compute for the methods with more than one pass a step"),
                "seeds": (1, "runs of each method"),
                "first_seed": (0, "the first run's seed"),
            },
        )
        if not self.methods or len(set(self.methods)) < len(self.methods):
            named = " ".join(map(str, self.methods))
            raise ValueError(f"methods={named!r}: name at least one method, each of them once")
        if self.widths and (self.widths[0] < 1 or len(set(self.widths)) < len(self.widths)):
            named = " ".join(map(str, self.widths))
            raise ValueError(f"widths={named}: channels of the network's first stage, each at least 1 and there once")


@dataclass(frozen=True)
class EvaluationConfig:
    """The measurements during training."""

    eval_every: int = 2
    """Standardized epochs from one measurement on the whole training and test set to the next."""
    flatness_every: int | None = None
    """Measure sharpness S(w) at `rho`, the largest eigenvalue of the Hessian and the gradient norm as well: every so
    many standardized epochs, a multiple of `eval_every`, and at the end. By default not."""
    flatness_samples: int = 256
    """Training images for these measurements, drawn by the run's seed, in evaluation mode."""

    def check(self) -> None:
        """Raise ValueError for a value that is out of range."""
        at_least(
            self,
            {
                "eval_every": (1, "standardized epochs from one measurement to the next"),
                "flatness_every": (1, "standardized epochs from one measurement of flatness to the next"),
                "flatness_samples": (1, "training images that flatness is measured on"),
            },
        )


@dataclass(frozen=True)
class OutputConfig:
    """The run folder, checkpoints and logs."""

    out: Path | None = None
    """The run folder; by default runs/NAME. The same command in the same folder resumes it."""
    checkpoint_seconds: float = 60.0
    """Seconds from one checkpoint within an epoch to the next; there is always one at an epoch's end."""
    tensorboard: bool = False
    """Log to RUN/tensorboard as well (needs the tensorboard extra)."""

    def check(self) -> None:
        """Raise ValueError for a value that is out of range."""
        at_least(self, {"checkpoint_seconds": (0, "seconds from one checkpoint within an epoch to the next")})
