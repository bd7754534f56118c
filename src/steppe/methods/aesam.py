"""AE-SAM: perturb where the gradient norm is unusually large."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Unpack

import torch
from torch.optim import Optimizer

from steppe.methods._card import COPY, LENGTH, NO_CODE, Comparison, MethodCard
from steppe.methods._options import Options, Rho
from steppe.papers import ICLR, Paper
from steppe.rules import Point
from steppe.sam import SAM

AE_SAM_PAPER = Paper(
    "jiang2023aesam",
    ("Weisen Jiang", "Hansi Yang", "Yu Zhang", "James Kwok"),
    "An Adaptive Policy to Employ Sharpness-Aware Minimization",
    "2304.14647",
    2023,
    ICLR,
)


@dataclass(frozen=True)
class GradientNormThreshold:
    """Climb where the gradient is unusually large (AE-SAM): when |g|^2 >= mu + c sigma.

    mu <- delta mu + (1 - delta) |g|^2 and sigma^2 <- delta sigma^2 + (1 - delta) (|g|^2 - mu)^2, both from 0, are the
    running mean and variance of |g|^2; c moves linearly from lambda_2 to lambda_1 over the training, so that climbs
    get more frequent. A step costs between 1 and 2 passes, as the gradients have it: with the usual values about 1.5.

    The decision reads |g|^2 on the host, so on an accelerator each step waits for its first pass, which no cadence that
    depends on values can avoid. A gradient that is not finite does not climb, and is not remembered. No code of
    the authors was found to compare with.

    >>> w, cadence, memory = torch.zeros(1), GradientNormThreshold(steps=4), {}
    >>> for step, g in enumerate([3.0, 1.0, 2.0, 0.5, 0.5]):
    ...     print(step, cadence(Point([w], [torch.tensor([g])], [0.05], [{}], step, memory)))
    0 True
    1 False
    2 True
    3 True
    4 True

    Source: Jiang et al., An Adaptive Policy to Employ Sharpness-Aware Minimization, arXiv 2304.14647.
    """

    paper: ClassVar[Paper] = AE_SAM_PAPER

    steps: int
    """T, how many steps the training has."""
    lambda_1: float = -1.0
    """lambda_1, where c ends; the paper's value."""
    lambda_2: float = 1.0
    """lambda_2, where c begins; the paper's value."""
    delta: float = 0.9
    """delta, the memory of mu and sigma; the paper's value."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}: it is the length of the training in steps")
        if not 0 <= self.delta < 1:
            raise ValueError(f"delta must be at least 0 and less than 1, got {self.delta}: it is the old mean's share")

    def __call__(self, point: Point) -> bool:
        square = point.gradient_norm.double().square()
        own = point.shared_memory_of(self)
        if not bool(square.isfinite()):
            return False
        zero = torch.zeros_like(square)
        mu = torch.lerp(own.get("mu", zero).to(square.device), square, 1 - self.delta)
        variance = torch.lerp(own.get("variance", zero).to(square.device), (square - mu).square(), 1 - self.delta)
        own["mu"], own["variance"] = mu, variance
        done = min(point.step / self.steps, 1.0)
        c = done * self.lambda_1 + (1 - done) * self.lambda_2
        return bool(square >= mu + c * variance.sqrt())


def aesam(
    base_optimizer: Optimizer,
    rho: Rho = 0.05,
    *,
    steps: int,
    lambda_1: float = -1.0,
    lambda_2: float = 1.0,
    delta: float = 0.9,
    **options: Unpack[Options],
) -> SAM:
    """AE-SAM: climb where |g|^2 is unusually large. Between 1 and 2 passes a step, about 1.5 with the usual values.

    ``steps`` is the length of the training, over which climbs get more frequent.

    Source: Jiang et al., An Adaptive Policy to Employ Sharpness-Aware Minimization, arXiv 2304.14647.
    """
    return SAM(base_optimizer, rho, **options, cadence=GradientNormThreshold(steps, lambda_1, lambda_2, delta))


CARD = MethodCard(
    name="aesam",
    function=aesam,
    label="AE-SAM",
    about="A threshold that follows the norm's mean and variance falls over the training, so climbs get more frequent.",
    equation="mu <- delta mu + (1 - delta) |g|^2\n"
    "sigma^2 <- delta sigma^2 + (1 - delta) (|g|^2 - mu)^2\n"
    "climb where |g|^2 >= mu + c sigma;   c goes from lambda_2 to lambda_1",
    cost="about 1.5",
    passes=None,
    memory=COPY,
    when="To spend the second passes where the gradient is unusually large.",
    when_not="On a GPU that must not wait: the decision reads the norm on the host. With `fraction_sam`.",
    usual={
        "rho": "SAM's",
        "steps": LENGTH,
        "lambda_1": "-1",
        "lambda_2": "1",
        "delta": "0.9",
    },
    checked=f"The formulas as transcribed publicly in https://github.com/junaidaliop/zij. {NO_CODE} mu and sigma "
    "start from 0 here.",
    caveats=("The cost depends on the gradients, between 1 and 2, and is known only afterwards.",),
    required={"steps": 10_000},
    comparison=Comparison(
        summary="climbs where the gradient is unusually large, more often over the planned steps, at SAM's rho",
        passes=Fraction(3, 2),
    ),
)
