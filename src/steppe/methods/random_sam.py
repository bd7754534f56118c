"""RST: perturb at each step with probability p."""

import random
from dataclasses import dataclass
from typing import ClassVar, Unpack

from steppe._checks import check_seed, check_unit_interval
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import Paper
from steppe.rules import Point
from steppe.sam import SAM

RST_PAPER = Paper(
    "zhao2022rst",
    ("Yang Zhao", "Hao Zhang", "Xiuyuan Hu"),
    "Randomized Sharpness-Aware Training for Boosting Computational Efficiency in Deep Learning",
    "2203.09962",
    2022,
)


@dataclass(frozen=True)
class Bernoulli:
    """Perturb with probability p at each step (RST); the other steps are plain steps of the base.

    A step costs 1 + p passes on average. The draw of a step depends only on the seed and on the step's number. So a
    resumed run continues with the same draws, all workers draw alike, and no global random generator is used. In the
    paper's terms this is RST with the constant scheduling function; its other scheduling functions are not
    implemented.

    Example:
        >>> cadence = Bernoulli(p=0.5, seed=1)
        >>> [cadence(Point([], [], rho=[], base_state=[], step=step)) for step in range(6)]
        [False, True, True, True, False, True]

    References:
        Zhao et al., Randomized Sharpness-Aware Training for Boosting Computational Efficiency in Deep Learning, arXiv
        2203.09962.
    """

    paper: ClassVar[Paper] = RST_PAPER
    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    p: float = 0.5
    """p, the probability of a perturbed step; 1 is SAM, 0 the base, and 0.5 saves half of SAM's extra passes."""
    seed: int = 0
    """The seed of the draws."""

    def __post_init__(self) -> None:
        check_unit_interval("p", self.p, "the probability of a perturbed step")
        check_seed(self.seed)

    def __call__(self, point: Point) -> bool:
        # A string is hashed with SHA-512: neighboring steps get independent draws, the same on every machine.
        return random.Random(f"{self.seed}/{point.step}").random() < self.p


def random_sam(
    base_optimizer: Base, rho: Rho = 0.05, *, p: float = 0.5, seed: int = 0, **options: Unpack[Options]
) -> SAM:
    """RST: SAM at each step with probability p, else a plain step. 1 + p passes per step on average.

    With probability p w <- Base(w, g_s), else w <- Base(w, g).

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood, as for SAM.
        p: p, the probability of a perturbed step; 0.5 saves half of SAM's extra passes.
        seed: The seed of the draws.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: p is out of range.

    Example:
        >>> import torch
        >>> random_sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).cadence
        Bernoulli(p=0.5, seed=0)

    References:
        Zhao et al., Randomized Sharpness-Aware Training for Boosting Computational Efficiency in Deep Learning, arXiv
        2203.09962.
    """
    return SAM(base_optimizer, rho, **options, cadence=Bernoulli(p, seed))


CARD = MethodCard(
    name="random_sam",
    function=random_sam,
    label="RST",
    paper=RST_PAPER,
    summary="Perturb at each step with probability p. The other steps are plain steps of the base, so p sets the cost.",
    equation="with probability p:  w <- Base(w, g_s)\nelse:                w <- Base(w, g)",
    cost="1 + p",
    passes=lambda p: 1 + p,
    memory=COPY,
    when="When a second pass at every step is too expensive; it needs no schedule, and no gradient of earlier steps.",
    when_not="When every step must take the same time.",
    usual={"rho": "SAM's", "p": "0.5 saves half of SAM's extra passes; 1 is SAM, 0 the base"},
    verified="texts only",
    checked="Of the paper, only the abstract was read. Of its scheduling functions this is the constant one; the "
    "others are not implemented.",
    caveats=("All workers perturb at the same steps: the decision depends only on the seed and the step's number.",),
    short_run={"p": 1.0},
    other_measurements=(
        "[Cosine schedule and momentum](../evidence/price.md), 20 seeds, p 0.333 and rho 0.4: 0.7 points better than "
        "SGD at 1.33 passes a step (SAM 0.6), 2.0 under Gaussian noise (SAM 1.5), calibration error 7.3 smaller (SAM "
        "6.1). With p 0.1 and rho 0.05 not distinguishable from SGD in accuracy.",
    ),
    comparison=Comparison(summary="perturbs at each step with probability p, at SAM's rho", capturable=True),
)
