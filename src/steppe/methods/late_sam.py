"""Late SAM: SAM in the last part of training only."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

from steppe._checks import check_count, check_unit_interval
from steppe.methods._card import COPY, TOTAL_STEPS, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
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
    """Perturb late in training only, from a fraction ``start`` of its steps on; before, take plain steps of the base.

    A step costs 2 - start passes on average. Steps beyond ``total_steps`` are perturbed. The base's momentum continues
    at the switch; the authors' code changes to a second optimizer there, whose momentum starts at zero. With a small
    ``start`` it is the warm start of Park et al., without which SAM with a large rho can stop at points that are no
    minima of the loss.

    Example:
        >>> cadence = LatePhase(start=0.75, total_steps=4)
        >>> [cadence(Point([], [], rho=[], base_state=[], step=step)) for step in range(6)]
        [False, False, False, True, True, True]

    References:
        Zhou et al., Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training, arXiv
        2410.10373; Park et al., Sharpness-Aware Minimization Can Hallucinate Minimizers, arXiv 2509.21818.
    """

    paper: ClassVar[Paper] = LATE_SAM_PAPER
    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    start: float
    """The fraction of training without perturbation, 0 to 1; 0.875 (175 of 200 epochs) in the paper's first figure."""
    total_steps: int
    """The number of optimizer steps in the training."""

    def __post_init__(self) -> None:
        check_unit_interval("start", self.start, "a fraction of the training")
        check_count("total_steps", self.total_steps, TOTAL_STEPS)

    def __call__(self, point: Point) -> bool:
        return point.step / self.total_steps >= self.start


def late_sam(
    base_optimizer: Base,
    rho: Rho = 0.05,
    *,
    start: float = 0.75,
    total_steps: int,
    **options: Unpack[Options],
) -> SAM:
    """Late SAM: plain steps first, SAM from a fraction of the training on. 2 - start passes per step on average.

    t < start * total_steps:   w <- Base(w, g);   from then on:   w <- Base(w, g_s).

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood, as for SAM.
        start: The fraction of training without perturbation; 0.875 in the paper's first figure.
        total_steps: The number of optimizer steps in the training.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> import torch
        >>> late_sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1), total_steps=1000).cadence
        LatePhase(start=0.75, total_steps=1000)

    References:
        Zhou et al., Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training, arXiv
        2410.10373.
    """
    return SAM(base_optimizer, rho, **options, cadence=LatePhase(start, total_steps))


CARD = MethodCard(
    name="late_sam",
    function=late_sam,
    label="Late SAM",
    paper=LATE_SAM_PAPER,
    summary="Take plain steps first, and use SAM from a fraction `start` of the training on. The paper finds that a "
    "few late epochs of SAM come close to SAM throughout.",
    equation="t < start * total_steps:   w <- Base(w, g)\nfrom then on:              w <- Base(w, g_s)",
    cost="2 - start",
    passes=lambda start: 2 - start,
    memory=COPY,
    when="When a second pass is too expensive for the whole training, and its length is known; with a small `start`, "
    "before SAM with a large rho.",
    when_not="For a training of unknown length, or one that is stopped early.",
    usual={
        "rho": "SAM's; 2.0 in the script of the official code",
        "start": "0.875 in the paper's first figure (175 of 200 epochs); 150 of 160 epochs in the script",
        "total_steps": TOTAL_STEPS,
    },
    verified="official code, read",
    checked="https://github.com/zzp1012/SAM-in-Late-Phase: at the switch it changes to a second optimizer, whose "
    "momentum starts at zero; here the base's momentum continues.",
    caveats=(
        "Steps beyond `total_steps` are perturbed.",
        "A short `start` is also the safeguard of Park et al. (arXiv 2509.21818): SAM with a large rho can stop at "
        "points where only the perturbed gradient vanishes, and less often so after a warm start with the base. Of "
        "that paper, the abstract was read.",
    ),
    required={"total_steps": 10_000},
    other_measurements=(
        "[Cosine schedule and momentum](../evidence/annealed.md), ten seeds: not distinguishable from SGD in "
        "accuracy; calibration error 1.1 points smaller. [With 40 % wrong labels](../evidence/price.md), 20 seeds, "
        "start 0.667 and rho 0.8: 24.3 points better than SGD at 1.33 passes a step, where SAM is 25.1 better.",
        "[LoRA with 40 % wrong labels](../evidence/adapters.md), ten seeds: 3.6 points better than AdamW, and not "
        "distinguishable from AdamW stopped early; the whole encoder: 1.6 better, and 3.0 worse than AdamW stopped "
        "early.",
    ),
    comparison=Comparison(
        summary="plain steps first, SAM from a fraction `start` of the planned steps on, at SAM's rho", capturable=True
    ),
)
