"""BAR, balancedness-aware regularization: what SAM does to the balance of LoRA's factors, without a second pass."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack, get_args

import torch
from torch import Tensor

from steppe._checks import check_count, check_nonnegative
from steppe._engine.slots import SLOTS
from steppe._tensors.dtensor import is_sharded, local
from steppe.methods._adapters import Factors, trained_factors
from steppe.methods._base import OwnStepMethod
from steppe.methods._card import TOTAL_STEPS, Comparison, MethodCard
from steppe.methods._options import Base, Options
from steppe.papers import NEURIPS, Paper, cites
from steppe.rules import Point
from steppe.rules.ops import accumulator, all_finite, norm, widen

BAR_PAPER = Paper(
    "li2024bar",
    ("Bingcong Li", "Liang Zhang", "Niao He"),
    "Implicit Regularization of Sharpness-Aware Minimization for Scale-Invariant Problems",
    "2410.14802",
    2024,
    NEURIPS,
)

Compare = Literal["gradients", "weights"]


@dataclass(frozen=True)
class NoPerturbation:
    """The cadence of a method that never perturbs: each step is one pass, at w."""

    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    def __call__(self, point: Point) -> bool:
        return False


class BAR(OwnStepMethod):
    """BAR: let the factors of each LoRA adapter grow and shrink against each other, as SAM does. A pass per step.

    Before the base steps, one factor of each pair is multiplied by 1 + alpha_t lr and the other one by 1 - alpha_t lr,
    each with the learning rate of its own group, as decoupled weight decay would: A grows if |g_A| >= |g_B| (nBAR), or
    if |A| < |B| (oBAR). Made by :func:`bar`. A step that is skipped as not finite scales nothing.

    Args:
        *args: The base optimizer.
        alpha: alpha, the coefficient at the first step.
        compare: What decides which factor grows.
        total_steps: T, the steps after which alpha_t is 0; None for a constant one.
        **kwargs: ``model`` and the other options of :class:`steppe.SAM`, but for the rules and rho.

    Raises:
        ValueError: A hyperparameter out of range; a model without trained LoRA factors; a base without a learning rate.
        TypeError: rho was given.
    """

    alpha: float
    compare: Compare
    total_steps: int | None
    paper: ClassVar[Paper] = BAR_PAPER
    perturbs: ClassVar[bool] = False
    hyperparameters: ClassVar[tuple[str, ...]] = ("alpha", "compare", "total_steps")
    own_rules: ClassVar[tuple[str, ...]] = SLOTS
    why_no_first_step: ClassVar[str] = "there is one pass, and no perturbation"

    def __init__(
        self,
        *args: Any,
        alpha: float = 0.5,
        compare: Compare = "gradients",
        total_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.refuse_own_rules(kwargs)
        if "rho" in kwargs:
            raise TypeError("BAR perturbs nothing and has no radius: leave rho= out, and give alpha=, its coefficient")
        check_nonnegative("alpha", alpha, "the coefficient of the term; 0 is the base, 0.2 to 1 is usual")
        if compare not in get_args(Compare):
            raise ValueError(f"compare must be 'gradients' (nBAR) or 'weights' (oBAR), got {compare!r}")
        if total_steps is not None:
            check_count("total_steps", total_steps, "the number of steps after which alpha is 0")
        self.alpha, self.compare, self.total_steps = alpha, compare, total_steps
        super().__init__(*args, rho=0.0, cadence=NoPerturbation(), **kwargs)
        self._pairs()

    def step_base(self) -> bool:
        """Scale the factors, and step the base."""
        with self._scaled():
            return self.step_base_once()

    @contextmanager
    def _scaled(self) -> Iterator[None]:
        """Scale the factors; write them back if the block raises an exception."""
        progress = 1.0 if self.total_steps is None else min(self.steps_taken / self.total_steps, 1.0)
        alpha = self.alpha * ((1 + math.cos(math.pi * progress)) / 2 if self.total_steps else 1.0)
        pairs = [(f, group_A, group_B) for f, group_A, group_B in self._pairs() if _has_gradients(f)]
        _, gradients = self.gradients.parameters_and_gradients()
        finite = all_finite(gradients)
        if not (alpha and pairs) or (finite.is_cpu and not finite):
            yield
            return
        factors = [f.A for f, _, _ in pairs] + [f.B for f, _, _ in pairs]
        groups = [group for _, group, _ in pairs] + [group for _, _, group in pairs]
        here = [local(p.detach()) for p in factors]
        before = [p.clone() for p in here]
        try:
            signs = self._signs(factors)
            signs = torch.where(finite.to(signs.device), signs, 0.0)
            for group in {id(group): group for group in groups}.values():
                positions = [i for i, own in enumerate(groups) if own is group]
                rate = self._rate(alpha, group, factors[positions[0]].dtype)
                scales = (1 + signs * rate).unbind()
                own = [here[i] for i in positions]
                wide = [widen(p) for p in own]  # in half precision, 1 + alpha lr is often 1
                torch._foreach_mul_(wide, [scales[i].to(p) for i, p in zip(positions, wide, strict=True)])
                torch._foreach_copy_(own, wide)
            yield
        except BaseException:
            torch._foreach_copy_(here, before)
            raise

    def _signs(self, factors: Sequence[Tensor]) -> Tensor:
        """Return 1 for each factor that grows and -1 for each that shrinks; all A come first, then all B."""
        compared = self.gradients.views(factors) if self.compare == "gradients" else [p.detach() for p in factors]
        A, B = _norms(compared).chunk(2)
        signs = (A >= B if self.compare == "gradients" else A < B).to(A) * 2 - 1
        return torch.cat([signs, -signs])

    def _rate(self, alpha: float, group: dict[str, Any], dtype: torch.dtype) -> float | Tensor:
        """Return alpha lr of a group.

        Raises:
            ValueError: It is 1 or more.
        """
        rate: float | Tensor = alpha * group["lr"]
        if not isinstance(rate, Tensor):
            if rate >= 1:
                raise ValueError(
                    f"alpha lr = {rate:g}, so that 1 - alpha lr is not positive and a factor would change its sign: "
                    "lower alpha or the learning rate"
                )
            if dtype in (torch.bfloat16, torch.float16) and 0 < rate < torch.finfo(dtype).eps / 4:
                self.warn_once(
                    "rounding of factors",
                    f"alpha lr = {rate:g} is below the last bit of {dtype}, so that the factors of LoRA do not "
                    "change: keep the adapters in float32, as PEFT does by default",
                )
        return rate

    def _pairs(self) -> list[tuple[Factors, dict[str, Any], dict[str, Any]]]:
        """Return the trained factors of the model that this optimizer has, with their groups."""
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        own = [f for f in trained_factors(self.model) if id(f.A) in groups and id(f.B) in groups]
        found = [(f, groups[id(f.A)], groups[id(f.B)]) for f in own]
        if not found:
            raise ValueError("the base optimizer has no pair of LoRA factors of model=: give it the model's parameters")
        if any("lr" not in group for _, *both in found for group in both):
            raise ValueError("a group of the base has no 'lr', and BAR scales by alpha lr: take a base with one")
        return found


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of each tensor, in one vector."""
    if any(map(is_sharded, tensors)):
        return torch.stack([norm([t]) for t in tensors])
    device = tensors[0].device
    return torch.stack([n.to(device) for n in torch._foreach_norm(list(tensors), 2, dtype=accumulator(device))])


def _has_gradients(f: Factors) -> bool:
    return f.A.grad is not None and f.B.grad is not None


@cites(BAR_PAPER)
def bar(
    base_optimizer: Base,
    *,
    alpha: float = 0.5,
    compare: Compare = "gradients",
    total_steps: int | None = None,
    **options: Unpack[Options],
) -> BAR:
    """BAR: regularize the balance |A|^2 - |B|^2 of LoRA's factors as SAM does. A single pass per step, at w.

    SAM on A and B changes their balance by d/dt (|A|^2 - |B|^2) / 2 = rho (|g_A|^2 - |g_B|^2) / |(g_A, g_B)|, where the
    base alone keeps it. nBAR follows the sign of this without a perturbation: before each step of the base,
    A <- (1 + s alpha_t lr) A and B <- (1 - s alpha_t lr) B in each adapter, with s = 1 if |g_A| >= |g_B|, else -1.
    oBAR has s = 1 if |A| < |B|: it brings the two lengths together.

    Nothing but the factors of LoRA is changed, and W0 is neither read nor needed: quantized bases and DoRA work.

    Args:
        base_optimizer: The optimizer of the trained parameters.
        alpha: alpha, the coefficient; the authors search 0.2, 0.5, 1 and 2, and use down to 0.05. 0 is the base.
        compare: "gradients" for nBAR, the authors' best, or "weights" for oBAR.
        total_steps: T, the number of optimizer steps in the training: alpha_t = alpha (1 + cos(pi t / T)) / 2 falls to
            0, one of the authors' schedules; None keeps alpha constant.
        **options: ``model``, the model of PEFT, and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range, ``model`` is missing or has no trained factors of LoRA, or (at a
            step) alpha lr is 1 or more.

    Example:
        >>> from functools import partial
        >>> method = partial(bar, alpha=0.5, total_steps=1000)
        >>> trainer = SAMTrainer(model=model, args=args, method=method)  # doctest: +SKIP

    References:
        Li et al., Implicit Regularization of Sharpness-Aware Minimization for Scale-Invariant Problems, NeurIPS 2024,
        arXiv 2410.14802.
    """
    return BAR(base_optimizer, alpha=alpha, compare=compare, total_steps=total_steps, **options)


CARD = MethodCard(
    name="bar",
    function=bar,
    label="BAR",
    paper=BAR_PAPER,
    summary="Let the factors A and B of each LoRA adapter grow and shrink against each other, as SAM on them would. "
    "There is no perturbation and no second pass.",
    equation="A <- (1 + s alpha_t lr) A,   B <- (1 - s alpha_t lr) B,   then the step of the base\n"
    "s = 1 if |g_A| >= |g_B|, else -1     (nBAR)\n"
    's = 1 if |A| < |B|, else -1          (oBAR, compare="weights")\n'
    "alpha_t = alpha (1 + cos(pi t / T)) / 2   with total_steps=T, else alpha",
    cost="1",
    passes=1,
    memory="a copy of A and B within a step",
    when="To fine-tune LoRA adapters at the cost of the base, also on a quantized base, if only SAM's effect on the "
    "balance of A and B is wanted.",
    when_not="Without LoRA; for a flat minimum in other respects than the balance of the factors.",
    usual={
        "alpha": "0.2, 0.5, 1 or 2, searched by the authors; 0.05 on their largest data set",
        "compare": '"gradients" (nBAR), slightly better than "weights" (oBAR) in the paper',
        "total_steps": f"{TOTAL_STEPS}; the authors choose among linear, cosine and constant schedules",
    },
    verified="texts only",
    checked="Algorithms 2 and 3 of the paper, read in full: the same factors and the same conditions. Which of the "
    "two is the paper's x matters only where both sides are equal. The authors' repository, "
    "https://github.com/BingcongLi/BAR, held a license and no code. With several learning rates (LoRA+) each factor "
    "has its own, where the paper has one.",
    caveats=(
        "It has no rho: the Trainer's `rho=` is an error, and `perturbed_loss` is not logged.",
        "The norms are those of the gradients at the step, so that clipping by norm and a loss scale change nothing.",
        "A layer that got no gradient in a step is left alone.",
    ),
    short_run={"total_steps": 10},
    needs_adapters=True,
    comparison=Comparison(summary="changes the balance of LoRA's two factors as SAM on them would; it has no rho"),
)
