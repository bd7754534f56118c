"""Layer-wise SAM: perturb each tensor in proportion to its own norm."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

from torch.optim import Optimizer

from steppe.methods._card import COPY, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Options, Rho
from steppe.methods.looksam import LOOKSAM_PAPER
from steppe.papers import Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import norm, reciprocal, scaled_by
from steppe.sam import SAM


@dataclass(frozen=True)
class LayerWise:
    """Climb in every layer by its own norms (as Look-LayerSAM does): in each e_l = rho |w_l| g_l / |g_l|.

    A layer is one parameter tensor. rho is the length of the climb relative to the layer's weights, so that layers of
    all scales climb alike, as LARS and LAMB let them step; layers at zero stay there, and so do those whose gradient
    is zero. With ``relative=False``, e_l = rho g_l / |g_l|, and for L layers |e| = rho sqrt(L).

    Which of the two the paper means is not reduced: no code of the authors was found, of the paper no more than the
    abstract could be read, and of two implementations one has the second form, and one divides twice by the gradient,
    rho |w_l| g_l / |g_l|^2, and so climbs the farther the smaller that is.

    >>> w, g = [torch.tensor([0.0, 2.0]), torch.tensor([4.0])], [torch.tensor([3.0, 4.0]), torch.tensor([-1e-3])]
    >>> LayerWise()(Point(w, g, rho=[0.05] * 2, base_state=[{}, {}], step=0)).direction
    [tensor([1.2000, 1.6000]), tensor([-4.])]

    Source: Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714.
    """

    paper: ClassVar[Paper] = LOOKSAM_PAPER
    scale_free: ClassVar[bool] = True

    relative: bool = True
    """Whether rho is relative to the norm of each layer's weights."""

    def __call__(self, point: Point) -> ScaledDirection:
        lengths = [reciprocal(norm([g])) for g in point.gradients]
        if self.relative:
            lengths = [norm([w]) * length for w, length in zip(point.weights, lengths, strict=True)]
        return ScaledDirection([scaled_by(g, length) for g, length in zip(point.gradients, lengths, strict=True)])


def layerwise_sam(
    base_optimizer: Optimizer, rho: Rho = 0.01, *, relative: bool = True, **options: Unpack[Options]
) -> SAM:
    """Layer-wise SAM: each tensor climbs along its own gradient, by rho times its own norm. Two passes a step.

    Source: Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714.
    """
    return SAM(base_optimizer, rho, **options, perturbation=LayerWise(relative))


CARD = MethodCard(
    name="layerwise_sam",
    function=layerwise_sam,
    label="Layer-wise SAM",
    about="So layers of all scales climb alike, as LARS and LAMB let them step.",
    equation="e_l = rho |w_l| g_l / |g_l|       in each tensor l\n"
    "e_l = rho g_l / |g_l|             with relative=False",
    cost="2",
    passes=2,
    memory=COPY,
    when="Where layers differ much in scale, and one radius does not fit all.",
    when_not="To reproduce a paper: which form it means is not reduced.",
    usual={"rho": "unverified", "relative": "unverified"},
    checked="No code of the authors was found, and only the paper's abstract was read. Two third-party "
    "implementations disagree: one has rho g_l / |g_l|, one rho |w_l| g_l / |g_l|^2, which climbs the farther the "
    "smaller the gradient is. Unsettled.",
    caveats=(
        "Layers at zero stay there, and so do those whose gradient is zero.",
        "With relative=False the whole climb of L layers has length rho sqrt(L).",
    ),
    comparison=Comparison(
        summary=f"climbs in each tensor by its own norm, at rho / 5 ({USUAL_RATIO})", rho_factor=0.2, capturable=True
    ),
)
