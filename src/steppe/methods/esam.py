"""ESAM: perturb a random share of the weights, update with selected samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe._checks import check_positive_share, check_seed
from steppe._engine.losses import backward
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._closures import Loss, count_samples
from steppe.methods._options import Base, Options, Rho
from steppe.methods._step_function import CountedForward, LabeledBatch, StepFunction
from steppe.papers import ICLR, Paper, cites
from steppe.rules import Modifier, Perturbation, Point, ScaledDirection
from steppe.rules.l2 import L2
from steppe.rules.masks import apply_masks, check_single_ascent_step
from steppe.rules.ops import uniform, uniform_number
from steppe.rules.subsets import perturb_subset
from steppe.sam import SAM

ESAM_PAPER = Paper(
    "du2022esam",
    (
        "Jiawei Du",
        "Hanshu Yan",
        "Jiashi Feng",
        "Joey Tianyi Zhou",
        "Liangli Zhen",
        "Rick Siow Mong Goh",
        "Vincent Y. F. Tan",
    ),
    "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks",
    "2110.03141",
    2022,
    ICLR,
)


@dataclass(frozen=True)
class Stochastic(Modifier):
    """Perturb a random share of the weights (ESAM's SWP): e = m * e(rule) / beta, P(m_i = 1) = beta.

    So e is the rule's on average, and longer than rho. The draw depends on the seed and the step only, as that of
    :class:`~steppe.Bernoulli`.

    The authors' code draws whole tensors and leaves the others out of the next first pass, and so out of the norm;
    this is what makes it cheaper. ``whole=True`` draws whole tensors too and gives the rule only these, but both passes
    are full. The other half of ESAM, the selection of samples, is :func:`steppe.closures.selected`.

    Example:
        >>> import steppe
        >>> w, g = torch.zeros(6), torch.ones(6)
        >>> rule = Stochastic(steppe.LInf(), beta=0.5)
        >>> direction, scale = rule(Point([w], [g], rho=[0.05], base_state=[{}], step=0))
        >>> scale * direction[0]
        tensor([0., 0., 0., 2., 0., 2.])

    References:
        Du et al., Efficient Sharpness-aware Minimization for Improved Training of Neural Networks, arXiv 2110.03141,
        and its official code.
    """

    paper: ClassVar[Paper] = ESAM_PAPER

    rule: Perturbation
    """The perturbation to apply to a share of the weights."""
    beta: float = 0.6
    """beta, the probability of each weight to be perturbed; the authors' examples have 0.5 and 0.6."""
    seed: int = 0
    """The seed of the draws."""
    whole: bool = False
    """True if a tensor is perturbed as a whole or not at all."""

    def __post_init__(self) -> None:
        check_single_ascent_step(self.rule, "Stochastic")
        check_positive_share("beta", self.beta, "the probability of each weight to be perturbed")
        check_seed(self.seed)

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the rule's perturbation of a random share of the weights."""
        if self.whole:
            n, micro_batch = len(point.parameters), point.micro_batch
            chances = [
                uniform_number("Stochastic", self.seed, point.step, i, micro_batch=micro_batch) for i in range(n)
            ]
            chosen = [i for i, chance in enumerate(chances) if chance < self.beta]
            e = perturb_subset(self.rule, point, chosen)
        else:
            chance = uniform("Stochastic", self.seed, point.step, point.weights, micro_batch=point.micro_batch)
            e = apply_masks(self.rule(point), [c < self.beta for c in chance])
        return ScaledDirection(e.direction, e.scale / self.beta)


@cites(ESAM_PAPER)
def selected(optimizer: SAM, losses: Loss, batch: Sequence[Tensor], *, gamma: float = 0.5) -> Callable[[], Tensor]:
    """Return a closure that updates with the samples whose loss rises most from w to w + e (ESAM's SDS).

    B+ = the ceil(gamma |B|) samples with the largest l(w + e) - l(w). The paper has |B+| = gamma |B|, which is followed
    here; the authors' code leaves the last of them out. At w + e all samples are evaluated forward only, and B+ forward
    and backward; with a forward as a third of a pass, a step costs 4/3 + gamma passes. The gradient of the mean loss
    over B+ is no longer an unbiased estimate of the batch's; this is intended.

    The other half of ESAM, the perturbation of a random share of the weights, is :func:`steppe.variants.esam`.

    Args:
        optimizer: A :class:`steppe.SAM` that makes two passes per step.
        losses: Function of the tensors of a batch that returns the loss of each sample, of shape (n,).
        batch: Tensors with the samples along their first dimension.
        gamma: gamma, the share of the samples in B+; the paper has 0.5.

    Returns:
        The closure for ``optimizer.step``; it returns the mean loss of the batch at w.

    Raises:
        TypeError: The batch is no tuple of tensors.
        ValueError: gamma is out of range, the batch is empty or of unequal lengths, or ``losses`` does not return
            one loss per sample.
        RuntimeError: (when called) The only pass is at w + e, so there are no losses at w.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
        >>> x = torch.tensor([1.0, 5.0, 2.0, -3.0])
        >>> def losses(x):
        ...     print(x.tolist())
        ...     return w * x
        >>> _ = optimizer.step(selected(optimizer, losses, (x,), gamma=0.5))
        [1.0, 5.0, 2.0, -3.0]
        [1.0, 5.0, 2.0, -3.0]
        [5.0, 2.0]

    References:
        Du et al., Efficient Sharpness-aware Minimization for Improved Training of Neural Networks, arXiv 2110.03141.
    """
    samples = count_samples(batch)
    check_positive_share("gamma", gamma, "a share of the samples")
    kept = math.ceil(gamma * samples)
    losses_at_w: list[Tensor] = []

    def evaluate(part: Sequence[Tensor], n: int) -> Tensor:
        values = losses(*part)
        if values.shape != (n,):
            raise ValueError(
                f"losses returned a tensor of shape {tuple(values.shape)} for {n} samples, and the selection needs "
                f'the loss of each: return shape ({n},), for example with reduction="none"'
            )
        return values

    def closure() -> Tensor:
        optimizer.zero_grad()
        if optimizer.current_pass is None or not optimizer.current_pass.is_perturbed:
            values = evaluate(batch, samples)
            losses_at_w[:] = [values.detach()]
        elif not losses_at_w:
            raise RuntimeError(
                f"the step's only pass is at w + e, with {optimizer.perturbation}, so there are no losses at w to "
                "compare with: use a perturbation that makes a pass at w"
            )
        else:
            with torch.no_grad():
                rise = evaluate(batch, samples) - losses_at_w[0]
            chosen = rise.topk(kept).indices
            values = evaluate([t[chosen.to(t.device)] for t in batch], kept)
        value = values.mean()
        backward(value, optimizer.scaler)
        return value.detach()

    return closure


def esam(base_optimizer: Base, rho: Rho = 0.05, *, beta: float = 0.6, seed: int = 0, **options: Unpack[Options]) -> SAM:
    """ESAM: perturb a random share of the weights, update with selected samples. 4/3 + gamma passes per step.

    e = m * rho g / |g| / beta,   P(m_i = 1) = beta.

    This function makes the perturbation, which costs two passes. The selection of samples, which saves a part of the
    second, is in the closure: pass :func:`steppe.closures.selected`, with its ``gamma``, to ``step()``.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood; the authors use 0.05 to 0.2.
        beta: beta, the probability of each weight to be perturbed; usually 0.5 or 0.6.
        seed: The seed of the draws.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> esam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        Stochastic(rule=L2(), beta=0.6, seed=0, whole=False)

    References:
        Du et al., Efficient Sharpness-aware Minimization for Improved Training of Neural Networks, arXiv 2110.03141.
    """
    return SAM(base_optimizer, rho, **options, perturbation=Stochastic(L2(), beta, seed))


class ESAMStep(StepFunction):
    """Takes the steps of ESAM in a comparison: updates with selected samples."""

    optimizer: SAM

    def __init__(self, optimizer: SAM, gamma: float = 0.5) -> None:
        super().__init__(optimizer)
        self.gamma = gamma

    def step(self, forward: CountedForward, batch: LabeledBatch) -> Tensor:
        """Take one step."""
        closure = selected(self.optimizer, forward.losses, batch.tensors, gamma=self.gamma)
        loss: Tensor = self.optimizer.step(closure)
        return loss


def _esam_and_selection(base: Optimizer, model: nn.Module, **arguments: Any) -> tuple[Any, ...]:
    return esam(base, model=model, **arguments), selected


CARD = MethodCard(
    name="esam",
    function=esam,
    label="ESAM",
    paper=ESAM_PAPER,
    summary="Perturb a random share of the weights, and update with the samples whose loss rises most. Fewer samples "
    "in the second backward make it cheaper than SAM.",
    equation="e = m * rho g / |g| / beta,   P(m_i = 1) = beta\n"
    "B+ = the ceil(gamma |B|) samples of the batch B with the largest l(w + e) - l(w)\n"
    "w <- Base(w, gradient at w + e of the mean loss over B+)",
    cost="4/3 + gamma",
    passes=lambda gamma: 4 / 3 + gamma,
    memory=COPY,
    when="To save a part of SAM's second pass, if the loss of each sample is available.",
    when_not="With a method whose only pass is at w + e (`msam`, `rwp`): there are no losses at w to compare with.",
    usual={"rho": "0.05 to 0.2", "beta": "0.5 to 0.6", "gamma": "0.5"},
    verified="official code, read",
    checked="https://github.com/dydjw9/Efficient_SAM: a forward without gradients over all samples at w + e, then "
    "forward and backward on the selected. In the paper, |B+| = gamma |B|, and so it is here: 16 of 32 with gamma = "
    "0.5. The code selects one sample less, those above the smallest of the largest rises. After 20 steps in float64, "
    "this one sample of 16 makes the weights differ by 7 %. The code draws whole tensors, and leaves the others out "
    "of the next first pass; here each weight is drawn, and both passes are full (`steppe.Stochastic(..., "
    "whole=True)` draws tensors).",
    caveats=(
        "The update gradient is no longer an unbiased estimate of the batch's; this is intended.",
        "e is SAM's on average, and longer than rho.",
        "With a plain closure, ESAM selects no samples, and a step costs 2 passes.",
    ),
    build_example=_esam_and_selection,
    arguments_of=(esam, selected),
    usage_code="optimizer = steppe.variants.esam(base, model=model)\n"
    "optimizer.step(steppe.closures.selected(optimizer, losses, (x, y), gamma=0.5))  # losses: one per sample",
    comparison=Comparison(
        summary="perturbs some weights, updates with the samples whose loss rose most, at SAM's rho",
        step_function=ESAMStep,
    ),
)
