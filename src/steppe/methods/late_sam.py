"""Late SAM: SAM in the last part of training only."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

from torch.optim import Optimizer

from steppe.methods._card import COPY, LENGTH, Comparison, MethodCard
from steppe.methods._options import Options, Rho
from steppe.papers import ICLR, Paper
from steppe.rules import Point
from steppe.sam import SAM

LATE_SAM_PAPER = Paper(
    "zhou2025late",
    ("Zhanpeng Zhou", "Mingze Wang", "Yuchen Mao", "Bingrui Li", "Junchi Yan"),
    "Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training",
    "2410.10373",
    2025,
    ICLR,
)


@dataclass(frozen=True)
class LatePhase:
    """Climb only late in training, from a fraction ``start`` of its steps on; before, plain steps of the base.

    A step costs 2 - start passes on average. Steps beyond ``steps`` climb. The momentum of the base goes on at the
    switch; the authors' code changes there to a second optimizer, whose momentum begins at zero.

    >>> cadence = LatePhase(start=0.75, steps=4)
    >>> [cadence(Point([], [], rho=[], base_state=[], step=step)) for step in range(6)]
    [False, False, False, True, True, True]

    Source: Zhou et al., Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training, arXiv
    2410.10373.
    """

    paper: ClassVar[Paper] = LATE_SAM_PAPER
    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    start: float
    """The fraction of training without climbs, 0 to 1; the paper's first figure has 175 of 200 epochs, 0.875."""
    steps: int
    """How many steps the training has."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1:
            raise ValueError(f"start must be between 0 and 1, got {self.start}: it is a fraction of the training")
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}: it is the length of the training in steps")

    def __call__(self, point: Point) -> bool:
        return point.step / self.steps >= self.start


def late_sam(
    base_optimizer: Optimizer, rho: Rho = 0.05, *, start: float = 0.75, steps: int, **options: Unpack[Options]
) -> SAM:
    """Late SAM: plain steps first, SAM from a fraction ``start`` of ``steps`` on. 2 - start passes a step on average.

    Source: Zhou et al., Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training, arXiv
    2410.10373.
    """
    return SAM(base_optimizer, rho, **options, cadence=LatePhase(start, steps))


CARD = MethodCard(
    name="late_sam",
    function=late_sam,
    label="Late SAM",
    about="A few late epochs of SAM come close to SAM throughout, the paper finds.",
    equation="t < start * steps:   w <- Base(w, g)\nfrom then on:        w <- Base(w, g_s)",
    cost="2 - start",
    passes=lambda start: 2 - start,
    memory=COPY,
    when="Where a second pass is too dear for the whole training, and its length is known.",
    when_not="For a training of unknown length, or one that is stopped early.",
    usual={
        "rho": "SAM's",
        "start": "0.875 in the paper's first figure (175 of 200 epochs)",
        "steps": LENGTH,
    },
    checked="The official code, https://github.com/zzp1012/SAM-in-Late-Phase, was read: at the switch it changes "
    "to a second optimizer, whose momentum begins at zero; here the base's momentum goes on.",
    caveats=("Steps beyond `steps` climb.",),
    required={"steps": 10_000},
    comparison=Comparison(
        summary="plain steps first, SAM from a fraction `start` of the planned steps on, at SAM's rho", capturable=True
    ),
)
