"""SAM along the gradient of the step before, in a single pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

from torch import Tensor

from steppe._engine.callers import warn
from steppe.methods._card import COPY, NO_CODE, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import copy_, norm, reciprocal, where_finite
from steppe.sam import SAM

STALE_SAM_PAPER = Paper(
    "jo2025async",
    ("Junhyuk Jo", "Jihyun Lim", "Sunwoo Lee"),
    "Asynchronous Sharpness-Aware Minimization For Fast and Accurate Deep Learning",
    "2503.11147",
    2025,
)


@dataclass(frozen=True)
class KeptGradient:
    """Update with g_s, and keep it for the perturbation of the next step (:class:`StaleGradient`).

    At a step without perturbation, the update gradient is g, which is kept. A gradient that is not finite is not kept.

    References:
        Jo et al., Asynchronous Sharpness-Aware Minimization For Fast and Accurate Deep Learning, arXiv 2503.11147.
    """

    paper: ClassVar[Paper] = STALE_SAM_PAPER
    needs_unperturbed_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        update = point.gradients if perturbed is None else perturbed
        memory = point.memory_of(self)
        trusted = where_finite(norm(update), update, [own.get("g", 0.0) for own in memory])
        # in place: a CUDA graph replays operations on these tensors, and would not see a new one in the dictionary
        copy_([own.setdefault("g", v) for own, v in zip(memory, trusted, strict=True)], trusted)
        return update


@dataclass(frozen=True)
class StaleGradient:
    """Perturb along the gradient of the step before, in a single pass per step: e_t = rho g_(t-1) / |g_(t-1)|.

    g_(t-1) is the update gradient of step t - 1, taken at its perturbed weights and on its batch. The combination
    :class:`KeptGradient` keeps it: use both together. The first step has none and is not perturbed; neither is a later
    step without one, with a warning.

    Example:
        >>> import torch
        >>> w, memory, g = torch.zeros(2), {}, torch.tensor([3.0, 4.0])
        >>> _ = KeptGradient()(Point([w], [g], rho=[0.05], base_state=[{}], step=0, memory=memory), None)
        >>> direction, scale = StaleGradient()(Point([w], [], rho=[0.05], base_state=[{}], step=1, memory=memory))
        >>> 0.05 * scale * direction[0]
        tensor([0.0300, 0.0400])

    References:
        Jo et al., Asynchronous Sharpness-Aware Minimization For Fast and Accurate Deep Learning, arXiv 2503.11147.
    """

    paper: ClassVar[Paper] = STALE_SAM_PAPER
    needs_gradient: ClassVar[bool] = False
    follows_gradient: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    def __call__(self, point: Point) -> ScaledDirection:
        kept = [own.get("g") for own in point.memory_of(KeptGradient())]
        if point.step and all(g is None for g in kept):
            warn(
                "StaleGradient has no gradient of the step before, so that this step is not perturbed. Give the "
                "optimizer combination=steppe.KeptGradient(), which keeps it, or use steppe.variants.stale_sam (after "
                "loading the checkpoint of another method, only the first step lacks it)"
            )
        return ScaledDirection(kept, reciprocal(norm([g for g in kept if g is not None])))


def stale_sam(base_optimizer: Base, rho: Rho = 0.05, **options: Unpack[Options]) -> SAM:
    """SAM along the gradient of the step before. A single pass per step, at w + e.

    e_t = rho g_(t-1) / |g_(t-1)|,   w <- Base(w, g_t), with g_t the gradient at w + e_t.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood, as for SAM.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Example:
        >>> import torch
        >>> stale_sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        StaleGradient()

    References:
        Jo et al., Asynchronous Sharpness-Aware Minimization For Fast and Accurate Deep Learning, arXiv 2503.11147.
    """
    return SAM(base_optimizer, rho, **options, perturbation=StaleGradient(), combination=KeptGradient())


CARD = MethodCard(
    name="stale_sam",
    function=stale_sam,
    label="Stale SAM",
    paper=STALE_SAM_PAPER,
    summary="Perturb along the gradient of the step before. The direction is known before the pass, so a step costs "
    "what a step of the base costs.",
    equation="e_t = rho g_(t-1) / |g_(t-1)|\nw <- Base(w, g_t)             g_t = gradient at w + e_t",
    cost="1",
    passes=1,
    memory=f"{COPY}; from step to step, the last gradient",
    when="When a second pass is too expensive; around any base, where MSAM needs one with momentum.",
    when_not="With small batches: the last batch's gradient then tells little about the present batch.",
    usual={"rho": "SAM's; the paper's values are unverified"},
    verified="texts only",
    checked=f"{NO_CODE} Only descriptions of AsyncSAM were read: it perturbs along an old gradient at w, on a batch of "
    "a size of its own, which a second device computes meanwhile. Here it is the last update gradient, at w + e, and "
    "there is no second pass. S2-SAM (Ji et al., NeurIPS 2024) is described as this single pass, for sparse training; "
    "its paper was not read.",
    caveats=(
        "The first step has no gradient yet, and is not perturbed.",
        "The only pass is at w + e: the reported loss and BatchNorm's statistics are those of that point.",
        "A perturbation for each micro-batch (`closures.micro_batches`) is an error: they would exchange one gradient.",
    ),
    comparison=Comparison(summary="perturbs along the gradient of the step before, in a single pass, at SAM's rho"),
)
