"""AE-SAM: perturb at the steps with an unusually large gradient."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Unpack

import torch

from steppe._checks import check_below_one, check_count, check_finite
from steppe.methods._card import COPY, NO_CODE, TOTAL_STEPS, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
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
    """Perturb when the gradient is unusually large (AE-SAM): when |g|^2 >= mu + c sigma.

    mu <- delta mu + (1 - delta) |g|^2 and sigma^2 <- delta sigma^2 + (1 - delta) (|g|^2 - mu)^2, both from 0, are the
    running mean and variance of |g|^2. c moves linearly from lambda_2 to lambda_1 over the training, so that perturbed
    steps become more frequent. A step costs between 1 and 2 passes, depending on the gradients; with the usual values
    about 1.5.

    The decision reads |g|^2 on the host, so on an accelerator each step waits for its first pass; no cadence that
    depends on values can avoid this. A step with a gradient that is not finite is not perturbed, and leaves mu and
    sigma unchanged. No code by the authors was found to compare with.

    Example:
        >>> w, cadence, memory = torch.zeros(1), GradientNormThreshold(total_steps=4), {}
        >>> for step, g in enumerate([3.0, 1.0, 2.0, 0.5, 0.5]):
        ...     print(step, cadence(Point([w], [torch.tensor([g])], [0.05], [{}], step, memory)))
        0 True
        1 False
        2 True
        3 True
        4 True

    References:
        Jiang et al., An Adaptive Policy to Employ Sharpness-Aware Minimization, arXiv 2304.14647.
    """

    paper: ClassVar[Paper] = AE_SAM_PAPER

    total_steps: int
    """T, the number of optimizer steps in the training."""
    lambda_1: float = -1.0
    """lambda_1, the last value of c; the paper's value."""
    lambda_2: float = 1.0
    """lambda_2, the first value of c; the paper's value."""
    delta: float = 0.9
    """delta, the share of the old mean in mu and sigma^2; the paper's value."""

    def __post_init__(self) -> None:
        check_count("total_steps", self.total_steps, TOTAL_STEPS)
        check_finite("lambda_1", self.lambda_1, "the last value of c")
        check_finite("lambda_2", self.lambda_2, "the first value of c")
        check_below_one("delta", self.delta, "the share of the old mean in the new one")

    def __call__(self, point: Point) -> bool:
        square = point.gradient_norm.double().square()
        own = point.shared_memory_of(self)
        if not bool(square.isfinite()):
            return False
        zero = torch.zeros_like(square)
        mu = torch.lerp(own.get("mu", zero).to(square.device), square, 1 - self.delta)
        variance = torch.lerp(own.get("variance", zero).to(square.device), (square - mu).square(), 1 - self.delta)
        own["mu"], own["variance"] = mu, variance
        progress = min(point.step / self.total_steps, 1.0)
        c = progress * self.lambda_1 + (1 - progress) * self.lambda_2
        return bool(square >= mu + c * variance.sqrt())


def aesam(
    base_optimizer: Base,
    rho: Rho = 0.05,
    *,
    total_steps: int,
    lambda_1: float = -1.0,
    lambda_2: float = 1.0,
    delta: float = 0.9,
    **options: Unpack[Options],
) -> SAM:
    """AE-SAM: SAM at the steps with an unusually large gradient. Between 1 and 2 passes per step, usually about 1.5.

    A step is perturbed when |g|^2 >= mu + c sigma, with running mean mu and deviation sigma of |g|^2.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood, as for SAM.
        total_steps: T, the number of optimizer steps in the training, over which c moves.
        lambda_1: lambda_1, the last value of c; usually -1.
        lambda_2: lambda_2, the first value of c; usually 1.
        delta: delta, the share of the old mean in mu and sigma^2; usually 0.9.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> aesam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1), total_steps=1000).cadence
        GradientNormThreshold(total_steps=1000, lambda_1=-1.0, lambda_2=1.0, delta=0.9)

    References:
        Jiang et al., An Adaptive Policy to Employ Sharpness-Aware Minimization, arXiv 2304.14647.
    """
    return SAM(base_optimizer, rho, **options, cadence=GradientNormThreshold(total_steps, lambda_1, lambda_2, delta))


CARD = MethodCard(
    name="aesam",
    function=aesam,
    label="AE-SAM",
    paper=AE_SAM_PAPER,
    summary="Perturb only at the steps with an unusually large gradient norm. The threshold follows the norm's mean "
    "and variance and falls over the training, so that perturbed steps become more frequent.",
    equation="mu <- delta mu + (1 - delta) |g|^2\n"
    "sigma^2 <- delta sigma^2 + (1 - delta) (|g|^2 - mu)^2\n"
    "perturb if |g|^2 >= mu + c sigma;   c goes from lambda_2 to lambda_1",
    cost="about 1.5",
    passes=None,
    memory=COPY,
    when="To make the second pass only where the gradient is unusually large.",
    when_not="If the host must not wait for the GPU: it reads the norm at every step. Together with `fraction_sam`.",
    usual={
        "rho": "SAM's",
        "total_steps": TOTAL_STEPS,
        "lambda_1": "-1",
        "lambda_2": "1",
        "delta": "0.9",
    },
    verified="other code, read",
    checked=f"The formulas as transcribed publicly in https://github.com/junaidaliop/zij. {NO_CODE} mu and sigma "
    "start from 0 here.",
    caveats=(
        "The cost depends on the gradients, between 1 and 2, and is known only afterwards.",
        "A perturbation for each micro-batch (`closures.micro_batches`) is an error: mu and sigma describe batches.",
    ),
    required={"total_steps": 10_000},
    comparison=Comparison(
        summary="perturbs where the gradient is unusually large, more often over the planned steps, at SAM's rho",
        passes=Fraction(3, 2),
    ),
)
