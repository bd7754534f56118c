"""The list: what is measured, the most valuable first, and what each piece needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from results import ROOT

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent

FAMILY = (
    *("sgd", "sam", "asam", "gsam", "looksam", "late_sam", "random_sam", "fraction_sam", "friendly_sam", "vasso"),
    "esam",
)
"""Methods that are compared at the article's setting: with the recipe's rho, and without momentum."""

PRESETS: tuple[str, ...] = ("sam:rho=0.1", "looksam:rho=0.05", "looksam:rho=0.1")
"""The winner of the search on the sample, and SAM with the same radius, for the article's setting."""

PRECISIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"bfloat16": {"amp": True}, "float32": {"amp": False}})


@dataclass(frozen=True)
class Training:
    """Runs of the recipe `article`, one after the other."""

    methods: Sequence[str] = ("sgd", "sam")
    seeds: Sequence[int] = (0,)
    epochs: int = 150
    """Standardized epochs."""
    extra_epochs: int = 0
    eval_every: int = 5
    ways: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    """Fields of the recipe, for each way in which all of it is trained."""
    flatness: bool = False
    """Measure how flat the weights are, after `epochs` and at the end."""
    minutes: float | None = None
    """Take fewer epochs, where by the article's measured time these would take longer."""
    like: str | None = None
    """Take as many epochs as the result of that name."""


@dataclass(frozen=True)
class Piece:
    """One measurement: a command of its own, and a result of its own."""

    name: str
    title: str
    script: str
    """Below benchmarks/."""
    minutes: float
    """It is stopped after that; one that cannot go on is not begun when less is left."""
    options: tuple[str, ...] = ()
    training: Training | None = None

    @property
    def goes_on(self) -> bool:
        """Whether it can be stopped, and goes on at the next call."""
        return self.training is not None

    @property
    def code(self) -> list[Path]:
        """What it runs: a failure says nothing any more when this has changed."""
        shared = [ROOT / "src", BENCHMARKS / "results.py", BENCHMARKS / "timing.py", (BENCHMARKS / self.script).parent]
        return [*shared, ROOT / "tests"] if self.name == "correctness" else shared


def _training(name: str, title: str, training: Training) -> Piece:
    return Piece(name, title, "gpu/train.py", 9, (name,), training)


def _article(seed: int) -> Piece:
    about = Training(seeds=(seed,), extra_epochs=50, flatness=True)
    return _training(f"article-{seed}", f"the article's experiment, seed {seed}", about)


def _family(seed: int) -> Piece:
    about = Training(FAMILY, (seed,), eval_every=10, minutes=40, like="pareto-0" if seed else None)
    return _training(f"pareto-{seed}", f"the family at the article's setting, seed {seed}", about)


def _presets() -> list[Piece]:
    about = Training(("sgd", "sam", *PRESETS), (100, 101, 102), eval_every=10, minutes=60)
    return [_training("presets", "the cheap presets at the article's setting", about)] if PRESETS else []


def pieces() -> list[Piece]:
    """All of it, the most valuable first."""
    precision = Training(seeds=(0, 1, 2), epochs=20, ways=PRECISIONS)
    return [
        Piece("correctness", "is it right on this device?", "gpu/correctness.py", 6),
        Piece("loop", "which training loop is fastest?", "loop/run.py", 5, ("--minutes", "4")),
        _article(0),
        Piece("step", "the price of a climb", "step/run.py", 6),
        Piece("epoch", "images in a second, method by method", "epoch/run.py", 8),
        _article(1),
        _article(2),
        _training("precision", "is bfloat16 as accurate as float32?", precision),
        _family(0),
        _family(1),
        _family(2),
        *_presets(),
    ]
