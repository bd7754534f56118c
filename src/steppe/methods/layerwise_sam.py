"""Layer-wise SAM: perturb each tensor in proportion to its own norm."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

from steppe.methods._card import COPY, SEARCHED, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.methods.looksam import LOOKSAM_PAPER
from steppe.papers import Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import norm, reciprocal, scaled
from steppe.sam import SAM


@dataclass(frozen=True)
class LayerWise:
    """Perturb every layer by its own norms (Look-LayerSAM): in each, e_l = rho |w_l| g_l / |g_l|.

    A layer is one parameter tensor. rho is the length of e_l relative to the layer's weights, so that layers of all
    scales are perturbed alike, as LARS and LAMB do for the update. Layers at zero, and those with a zero gradient, are
    not perturbed. With ``relative=False``, e_l = rho g_l / |g_l|, and for L layers |e| = rho sqrt(L).

    Which of the two forms the paper means is not settled. No code by the authors was found, and only the abstract
    could be read. Of two third-party implementations one has the second form; the other divides twice by the gradient,
    rho |w_l| g_l / |g_l|^2, and so perturbs more the smaller the gradient is.

    Example:
        >>> import torch
        >>> w, g = [torch.tensor([0.0, 2.0]), torch.tensor([4.0])], [torch.tensor([3.0, 4.0]), torch.tensor([-1e-3])]
        >>> LayerWise()(Point(w, g, rho=[0.05] * 2, base_state=[{}, {}], step=0)).direction
        [tensor([1.2000, 1.6000]), tensor([-4.])]

    References:
        Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714.
    """

    paper: ClassVar[Paper] = LOOKSAM_PAPER
    scale_free: ClassVar[bool] = True

    relative: bool = True
    """True if rho is relative to the norm of each layer's weights."""

    def __call__(self, point: Point) -> ScaledDirection:
        lengths = [reciprocal(norm([g])) for g in point.gradients]
        if self.relative:
            lengths = [norm([w]) * length for w, length in zip(point.weights, lengths, strict=True)]
        return ScaledDirection([scaled(g, length) for g, length in zip(point.gradients, lengths, strict=True)])


def layerwise_sam(base_optimizer: Base, rho: Rho = 0.01, *, relative: bool = True, **options: Unpack[Options]) -> SAM:
    """Layer-wise SAM: perturb each tensor along its own gradient, in proportion to its own norm. Two passes per step.

    e_l = rho |w_l| g_l / |g_l| in each tensor l.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the length of e_l relative to |w_l|; the paper's values are unverified.
        relative: False for e_l = rho g_l / |g_l|.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Example:
        >>> import torch
        >>> layerwise_sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        LayerWise(relative=True)

    References:
        Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714.
    """
    return SAM(base_optimizer, rho, **options, perturbation=LayerWise(relative))


CARD = MethodCard(
    name="layerwise_sam",
    function=layerwise_sam,
    label="Layer-wise SAM",
    paper=LOOKSAM_PAPER,
    summary="Perturb each tensor along its own gradient, by rho times its own norm. Layers of all scales are perturbed "
    "alike, as LARS and LAMB do for the update.",
    equation="e_l = rho |w_l| g_l / |g_l|       in each tensor l\n"
    "e_l = rho g_l / |g_l|             with relative=False",
    cost="2",
    passes=2,
    memory=COPY,
    when="When layers differ much in scale, and one radius does not fit all.",
    when_not="To reproduce a paper: it is unclear which form the paper uses.",
    usual={"rho": "unverified", "relative": "unverified"},
    verified="other code, read",
    checked="No code by the authors was found, and only the paper's abstract was read. Two third-party "
    "implementations disagree: one has rho g_l / |g_l|, the other rho |w_l| g_l / |g_l|^2, which perturbs more the "
    "smaller the gradient is. It is unknown which one is right.",
    caveats=(
        "Layers at zero, and those with a zero gradient, are not perturbed.",
        "With relative=False, e has length rho sqrt(L) for L layers.",
    ),
    comparison=Comparison(
        summary=f"perturbs each tensor by its own norm, at rho / 20 ({SEARCHED})", rho_factor=0.05, capturable=True
    ),
)
