"""The measurements that need a GPU, the most valuable first, with the script and the options of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from evidence.recipes import WRONG_LABELS
from results import ROOT, Result, by_device, load

BENCHMARKS = ROOT / "benchmarks"

UNFINISHED = 75
"""Exit status of a training that was stopped and can be resumed ("temporary failure; retry" in sysexits.h)."""

WITHOUT_GRAPHS = "without_cuda_graphs"
"""A file of this name in the folder of a training disables CUDA graphs, which do not work everywhere."""

PARETO_METHODS = (
    *("sgd", "sam", "asam", "gsam", "looksam", "late_sam", "random_sam", "fraction_sam", "friendly_sam", "vasso"),
    "esam",
)
"""The methods of the Pareto figure, compared at the article's setting with the recipe's rho and without momentum."""

PRESETS: tuple[str, ...] = ("sam:rho=0.1", "looksam:rho=0.05", "looksam:rho=0.1")
"""The best methods of the search on the sample, and SAM with the same radius, for the article's setting."""

PRECISIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"bfloat16": {"amp": True}, "float32": {"amp": False}})


@dataclass(frozen=True)
class Training:
    """Runs of a recipe at the article's size, one after the other: the methods and their controls, for each seed."""

    methods: Sequence[str] = ()
    """By default those of the recipe."""
    seeds: Sequence[int] = (0,)
    epochs: int = 150
    """Standardized epochs."""
    recipe: str = "article"
    """The recipe of `steppe compare`; it is trained on the data, in the batches and at the width of `article`."""
    extra_epochs: int = 0
    eval_every: int = 5
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    """Changed fields of the recipe, by the name of the setting. All runs are trained in each setting."""
    flatness: bool = False
    """Measure the flatness of the weights after `epochs` and at the end."""
    minutes: float | None = None
    """Time limit: train for fewer epochs if all of them would take longer, by the measured time of `article-0`.

    A recipe whose learning rate changes takes longer than that, because its steps are not replayed as CUDA graphs.
    """
    same_epochs_as: str | None = None
    """Train for as many epochs as the measurement of this name."""


@dataclass(frozen=True)
class Measurement:
    """One entry of the list: a command that writes one result."""

    name: str
    title: str
    script: str
    """Path below benchmarks/."""
    minutes: float
    """Time limit. A measurement that cannot be resumed is not started when less time is left."""
    options: tuple[str, ...] = ()
    """Arguments of the script."""
    inputs: tuple[str, ...] = ()
    """Options of run.py that are passed to the script: "data", "classic" or "peers"."""
    training: Training | None = None

    @property
    def resumable(self) -> bool:
        """True if the measurement can be stopped at any time and is resumed by the next call."""
        return self.training is not None

    @property
    def code(self) -> list[Path]:
        """Files and folders of the code that is run. A recorded failure is outdated if their content has changed."""
        shared = [ROOT / "src", *BENCHMARKS.glob("*.py"), (BENCHMARKS / self.script).parent]
        return [*shared, ROOT / "tests"] if self.name == "correctness" else shared

    def command(self, given: Sequence[str]) -> str:
        """Return the command that the result reports; `given` are the inputs that this machine has."""
        if self.script.startswith("gpu/"):
            return f"python benchmarks/gpu/run.py --only {self.name}"
        return " ".join(
            ["python", f"benchmarks/{self.script}", *self.options, *(f"--{name} {name.upper()}" for name in given)]
        )


EVIDENCE: Mapping[str, tuple[str, Training]] = MappingProxyType(
    {
        "noisy-labels": (
            "SAM on wrong labels",
            Training(
                recipe="noisy-labels",
                epochs=60,
                eval_every=4,
                settings={name: {"label_noise": share} for name, share in WRONG_LABELS.items()},
                minutes=30,
            ),
        ),
        "annealed": (
            "SAM and its cheap variants with a cosine schedule",
            Training(recipe="annealed", epochs=40, eval_every=4, minutes=30),
        ),
        "vit": (
            "SAM in a vision transformer with AdamW",
            Training(recipe="vit", epochs=40, eval_every=4, minutes=30),
        ),
    }
)
"""The recipes of benchmarks/evidence that are measured at full size, each with its title and a training of one seed."""

SEEDS = (0, 1, 2)
"""The seeds of the measurements that have one for each seed."""


def measurements() -> list[Measurement]:
    """Return all measurements, the most valuable first."""
    correctness = "do the tests pass on this device?"
    precision = Training(seeds=(0, 1, 2), epochs=20, settings=PRECISIONS)
    return [
        Measurement("correctness", correctness, "gpu/correctness.py", 6, inputs=("data",)),
        Measurement(
            "loop", "which training loop is fastest?", "loop/run.py", 5, ("--minutes", "4"), ("data", "classic")
        ),
        _article(0),
        Measurement("step", "the cost of a perturbation", "step/run.py", 6, inputs=("classic", "peers")),
        Measurement("epoch", "images per second of each method", "epoch/run.py", 8),
        _article(1),
        _article(2),
        *(_evidence(recipe, seed) for recipe in EVIDENCE for seed in SEEDS),
        _training("precision", "is bfloat16 as accurate as float32?", precision),
        _pareto(0),
        _pareto(1),
        _pareto(2),
        *_presets(),
    ]


def load_all_seeds(name: str, folder: Path) -> list[list[Result]]:
    """Return the results called `name`, or `name`-0, `name`-1, ... if each seed has its own, by device."""
    names = [each.name for each in measurements() if name in (each.name, each.name.rpartition("-")[0])]
    return by_device([result for each in names for result in load(each, folder)])


def _training(name: str, title: str, training: Training) -> Measurement:
    return Measurement(name, title, "gpu/train.py", 9, (name,), ("data",), training)


def _article(seed: int) -> Measurement:
    training = Training(seeds=(seed,), extra_epochs=50, flatness=True)
    return _training(f"article-{seed}", f"the article's experiment, seed {seed}", training)


def _evidence(recipe: str, seed: int) -> Measurement:
    title, training = EVIDENCE[recipe]
    training = replace(training, seeds=(seed,), same_epochs_as=f"{recipe}-0" if seed else None)
    return _training(f"{recipe}-{seed}", f"{title}, seed {seed}", training)


def _pareto(seed: int) -> Measurement:
    training = Training(PARETO_METHODS, (seed,), eval_every=10, minutes=40, same_epochs_as="pareto-0" if seed else None)
    return _training(f"pareto-{seed}", f"cost against accuracy of many methods, seed {seed}", training)


def _presets() -> list[Measurement]:
    training = Training(("sgd", "sam", *PRESETS), (100, 101, 102), eval_every=10, minutes=60)
    return [_training("presets", "the cheap presets at the article's setting", training)] if PRESETS else []
