"""ARWP: random weight perturbation, smaller in filters with large gradients, in a single pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from steppe._checks import check_below_one, check_nonnegative, check_seed
from steppe._engine.callers import warn
from steppe.methods._card import COPY, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.methods.mixed_rwp import MIXED_RWP_PAPER
from steppe.methods.rwp import filter_norms, noise
from steppe.papers import Paper
from steppe.rules import Combination, Point, ScaledDirection
from steppe.rules.ops import copy_, foreach, norm, where_finite, widen
from steppe.rules.perturbed_gradient import PerturbedGradient
from steppe.sam import SAM

_DEFAULT_COMBINATION = PerturbedGradient()


@dataclass(frozen=True)
class RunningSquares:
    """Keep v <- beta v + g_s^2 for :class:`AdaptiveNoise`, and give the update gradient of another combination.

    v is updated at perturbed steps only, and starts from 0. The memory is one copy of the gradient.

    Example:
        >>> point = Point([torch.zeros(1)], [], rho=[0.05], base_state=[{}], step=0)
        >>> RunningSquares()(point, [torch.tensor([2.0])])
        [tensor([2.])]
        >>> point.memory_of(RunningSquares())[0]["v"]
        tensor([4.])
    """

    paper: ClassVar[Paper] = MIXED_RWP_PAPER

    combination: Combination = _DEFAULT_COMBINATION
    """The combination that gives the update gradient."""
    beta: float = 0.99
    """beta, the share of the old sum; 0.99 in the authors' scripts."""

    def __post_init__(self) -> None:
        check_below_one("beta", self.beta, "the share of the old sum of squares in the new one")

    @property
    def needs_unperturbed_gradient(self) -> bool:
        """True if the combination needs g."""
        return self.combination.needs_unperturbed_gradient

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if perturbed:
            g = [widen(part) for part in perturbed]
            new = foreach(torch._foreach_mul, g, g)
            pairs = zip(point.memory_of(self), new, strict=True)
            v = [own.setdefault("v", torch.zeros_like(square)) for own, square in pairs]
            foreach(torch._foreach_add_, new, v, alpha=self.beta)
            copy_(v, where_finite(norm(g), new, v))
        return self.combination(point, perturbed)


@dataclass(frozen=True)
class AdaptiveNoise:
    """Perturb by Gaussian noise that is smaller where gradients are large (ARWP): e = rho |w_f| r / sqrt(1 + eta v_f).

    v_f is the sum, over the filter f, of the running sum of squared gradients that :class:`RunningSquares` keeps; for a
    weight of one dimension it is that of each entry. So this rule is used together with that combination. |w_f| r is
    the noise of :class:`~steppe.GaussianNoise` with ``filterwise``.
    """

    paper: ClassVar[Paper] = MIXED_RWP_PAPER
    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    eta: float = 0.1
    """eta, the weight of the squared gradients; 0.1 in the authors' scripts, and 0 is RWP."""
    seed: int = 0
    """The seed of the noise."""

    def __post_init__(self) -> None:
        check_nonnegative("eta", self.eta, "the weight of the squared gradients in 1 + eta v")
        check_seed(self.seed)

    def __call__(self, point: Point) -> ScaledDirection:
        memory = point.memory.get(RunningSquares.__name__, {})
        if point.step and not memory:
            warn(
                "AdaptiveNoise has no squared gradients of the steps before, so that it is GaussianNoise. "
                "Give the optimizer combination=steppe.methods.arwp.RunningSquares(), which keeps them, or use "
                "steppe.variants.arwp (after loading the checkpoint of another method, only the first step lacks them)"
            )
        sums = [memory.get(p, {}).get("v") for p in point.parameters]
        lengths = zip(filter_norms(point.weights), sums, strict=True)
        return ScaledDirection(noise(point, self.seed, [self._reduced(length, v) for length, v in lengths]))

    def _reduced(self, length: Tensor, v: Tensor | None) -> Tensor:
        """Return |w_f| / sqrt(1 + eta v_f)."""
        if v is None:
            return length
        v = widen(v)
        of_filter = v.sum(dim=list(range(1, v.dim())), keepdim=True) if v.dim() > 1 else v
        return length / (1 + self.eta * of_filter).sqrt()


def arwp(
    base_optimizer: Base,
    rho: Rho = 0.001,
    *,
    eta: float = 0.1,
    beta: float = 0.99,
    seed: int = 0,
    **options: Unpack[Options],
) -> SAM:
    """ARWP: perturb by Gaussian noise that is smaller where gradients are large. A single pass per step, at w + e.

    e = rho |w_f| r / sqrt(1 + eta v_f) in each filter f, with Gaussian r and v <- beta v + g_s^2. In the authors'
    recipe rho grows over the training: add ``steppe.rho_schedule.CosineRho(optimizer, total_steps, end=11 * rho)``.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the standard deviation of e relative to the filter's norm; 0.001 at first in the authors' script.
        eta: eta, the weight of the squared gradients; 0.1 in the authors' script, and 0 is RWP.
        beta: beta, the share of the old sum in v; 0.99 in the authors' script.
        seed: The seed of the noise.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> arwp(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        AdaptiveNoise(eta=0.1, seed=0)

    References:
        Li et al., Revisiting Random Weight Perturbation for Efficiently Improving Generalization, arXiv 2404.00357.
    """
    perturbation, combination = AdaptiveNoise(eta, seed), RunningSquares(beta=beta)
    return SAM(base_optimizer, rho, **options, perturbation=perturbation, combination=combination)


CARD = MethodCard(
    name="arwp",
    function=arwp,
    label="ARWP",
    paper=MIXED_RWP_PAPER,
    summary="Perturb by Gaussian noise, in each filter in proportion to its norm, and less where gradients have been "
    "large. A step costs what a step of the base costs.",
    equation="e = rho |w_f| r / sqrt(1 + eta v_f)      in each filter f; r Gaussian; v_f = the sum of v over f\n"
    "w <- Base(w, g_s),   v <- beta v + g_s^2,   from v = 0",
    cost="1",
    passes=1,
    memory=f"{COPY}; from step to step, v",
    when="When a second pass is too expensive: the authors' recipe for noise in a single pass.",
    when_not="Without memory for one more gradient: `rwp` keeps none.",
    usual={
        "rho": "0.001, growing along a cosine to 0.011 (official code)",
        "eta": "0.1 in the script, 1 by default (official code)",
        "beta": "0.99 in the script, 0.9 by default (official code)",
    },
    verified="official code, read",
    checked="https://github.com/nblt/mARWP: its `ARWP` has this formula. The sum v_f of a bias is that of each entry. "
    "The body of the paper was not read.",
    caveats=(
        "This function keeps rho constant: add `steppe.rho_schedule.CosineRho(optimizer, total_steps, end=11 * rho)`.",
        "v depends on the size of the loss: a mean over the batch. With a loss scaler, give `scaler=`.",
        "The only pass is at w + e: the reported loss and BatchNorm's statistics are those of that point.",
        "A perturbation for each micro-batch (`closures.micro_batches`) is an error: v describes batches.",
    ),
    other_measurements=(
        "[Cosine schedule and momentum](../evidence/family.md), ten seeds: accuracy not distinguishable from "
        "SGD's, calibration error 1.0 smaller. With 40 % wrong labels, at rho 0.04, 23.4 points better for one pass "
        "a step, where SAM is 24.9 better for two; [20 other runs](../evidence/price.md): 23.3, SAM 25.1.",
    ),
    comparison=Comparison(
        summary=f"perturbs by noise, less where gradients are large, at a constant rho / 5 ({USUAL_RATIO})",
        rho_factor=0.2,
    ),
)
