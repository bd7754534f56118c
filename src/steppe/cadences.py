"""When to pay for the climb: one short class a rule."""

import random
from dataclasses import dataclass
from typing import ClassVar

import torch

from steppe import papers
from steppe.rules import Point


@dataclass(frozen=True)
class Every:
    """Climb at the steps 0, k, 2k, ...; the others are plain steps of the base. A step costs 1 + 1/k passes.

    >>> [Every(3)(Point([], [], rho=[], base_state=[], step=step)) for step in range(5)]
    [True, False, False, True, False]
    """

    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    k: int = 1
    """k, the interval in steps; 1 is SAM."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be 1 or more, got {self.k}: the climb comes at every k-th step")

    def __call__(self, at: Point) -> bool:
        return at.step % self.k == 0


@dataclass(frozen=True)
class Randomly:
    """Climb with probability p at each step (RST); the others are plain steps of the base. A step costs 1 + p passes.

    The draw of a step depends on the seed and on the step's number alone. So a resumed run goes on with the same
    draws, all workers draw alike, and no global random generator is touched or needed. In the paper's terms this is
    RST with the constant scheduling function; its other scheduling functions are not here.

    >>> cadence = Randomly(p=0.5, seed=1)
    >>> [cadence(Point([], [], rho=[], base_state=[], step=step)) for step in range(6)]
    [False, True, True, True, False, True]

    Source: Zhao et al., Randomized Sharpness-Aware Training for Boosting Computational Efficiency in Deep Learning,
    arXiv 2203.09962.
    """

    paper: ClassVar[papers.Paper] = papers.RST
    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    p: float = 0.5
    """p, the probability of a climb; 1 is SAM, 0 the base, and 0.5 saves half of SAM's extra passes."""
    seed: int = 0
    """What makes the draws of two runs differ."""

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p must be between 0 and 1, got {self.p}: it is the probability of a climb")

    def __call__(self, at: Point) -> bool:
        # A string is hashed with SHA-512: neighbouring steps get independent draws, the same on every machine.
        return random.Random(f"{self.seed}/{at.step}").random() < self.p


@dataclass(frozen=True)
class Late:
    """Climb only late in training, from a fraction ``start`` of its steps on; before, plain steps of the base.

    A step costs 2 - start passes on average. Steps beyond ``steps`` climb. The momentum of the base goes on at the
    switch; the authors' code changes there to a second optimizer, whose momentum begins at zero.

    >>> cadence = Late(start=0.75, steps=4)
    >>> [cadence(Point([], [], rho=[], base_state=[], step=step)) for step in range(6)]
    [False, False, False, True, True, True]

    Source: Zhou et al., Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training, arXiv
    2410.10373.
    """

    paper: ClassVar[papers.Paper] = papers.LATE_SAM
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

    def __call__(self, at: Point) -> bool:
        return at.step / self.steps >= self.start


@dataclass(frozen=True)
class GradientNorm:
    """Climb where the gradient is unusually large (AE-SAM): when |g|^2 >= mu + c sigma.

    mu <- delta mu + (1 - delta) |g|^2 and sigma^2 <- delta sigma^2 + (1 - delta) (|g|^2 - mu)^2, both from 0, are the
    running mean and variance of |g|^2; c moves linearly from lambda_2 to lambda_1 over the training, so that climbs
    get more frequent. A step costs between 1 and 2 passes, as the gradients have it: with the usual values about 1.5.

    The decision reads |g|^2 on the host, so on an accelerator each step waits for its first pass, which no cadence that
    depends on values can avoid. A gradient that is not finite does not climb, and is not remembered. No code of
    the authors was found to compare with.

    >>> w, cadence, memory = torch.zeros(1), GradientNorm(steps=4), {}
    >>> for step, g in enumerate([3.0, 1.0, 2.0, 0.5, 0.5]):
    ...     print(step, cadence(Point([w], [torch.tensor([g])], [0.05], [{}], step, memory)))
    0 True
    1 False
    2 True
    3 True
    4 True

    Source: Jiang et al., An Adaptive Policy to Employ Sharpness-Aware Minimization, arXiv 2304.14647.
    """

    paper: ClassVar[papers.Paper] = papers.AE_SAM

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

    def __call__(self, at: Point) -> bool:
        square = at.gradient_norm.double().square()
        own = at.shared_memory_of(self)
        if not bool(square.isfinite()):
            return False
        zero = torch.zeros_like(square)
        mu = torch.lerp(own.get("mu", zero).to(square.device), square, 1 - self.delta)
        variance = torch.lerp(own.get("variance", zero).to(square.device), (square - mu).square(), 1 - self.delta)
        own["mu"], own["variance"] = mu, variance
        done = min(at.step / self.steps, 1.0)
        c = done * self.lambda_1 + (1 - done) * self.lambda_2
        return bool(square >= mu + c * variance.sqrt())
