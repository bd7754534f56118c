"""MSAM: perturb against the base optimizer's momentum, in one pass."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

from torch.optim import Optimizer

from steppe.methods._card import COPY, FIRST_GUESS, Comparison, MethodCard
from steppe.methods._options import Options, Rho
from steppe.papers import Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import as_real, norm, reciprocal
from steppe.sam import SAM

MSAM_PAPER = Paper(
    "becker2024msam",
    ("Marlon Becker", "Frederick Altrock", "Benjamin Risse"),
    "Momentum-{SAM}: Sharpness Aware Minimization without Computational Overhead",
    "2401.12033",
    2024,
)


@dataclass(frozen=True)
class Momentum:
    """Climb against the base's momentum, in one pass a step (MSAM): e = -rho v / |v|.

    v is the base's running mean of gradients: SGD's ``momentum_buffer``, or ``exp_avg`` of Adam and its kin. The sign
    is that of the authors' code, which climbs in the direction of the next update. The first step has no v and does
    not climb. rho is much larger than SAM's: their examples have 3 where SAM has 0.2. Their code adds weight decay at
    w + e; here the base does, at w.

    >>> w, v = torch.zeros(2), torch.tensor([3.0, 4.0])
    >>> direction, scale = Momentum()(Point([w], [], rho=[3.0], base_state=[{"momentum_buffer": v}], step=1))
    >>> 3.0 * scale * direction[0]
    tensor([-1.8000, -2.4000])

    Source: Becker et al., Momentum-SAM: Sharpness Aware Minimization without Computational Overhead, arXiv 2401.12033,
    and its official code.
    """

    paper: ClassVar[Paper] = MSAM_PAPER
    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    def __call__(self, point: Point) -> ScaledDirection:
        v = [state.get("momentum_buffer", state.get("exp_avg")) for state in point.base_state]
        known = [as_real(b) for b in v if b is not None]
        if point.step > 0 and not known:
            raise ValueError(
                "the base optimizer keeps no momentum, so there is nothing to climb along, and every step would be a "
                "plain one: give SGD a momentum, or take Adam or AdamW"
            )
        return ScaledDirection([None if b is None else as_real(b) for b in v], -reciprocal(norm(known)))


def msam(base_optimizer: Optimizer, rho: Rho = 3.0, **options: Unpack[Options]) -> SAM:
    """MSAM: climb against the base's momentum, e = -rho v / |v|. One pass a step, at w + e.

    Source: Becker et al., Momentum-SAM: Sharpness Aware Minimization without Computational Overhead, arXiv 2401.12033.
    """
    return SAM(base_optimizer, rho, **options, perturbation=Momentum())


CARD = MethodCard(
    name="msam",
    function=msam,
    label="MSAM",
    about="It costs what the base costs, because the direction is known before the pass.",
    equation="e = -rho v / |v|             v = the base's momentum (SGD's buffer, Adam's exp_avg)\n"
    "w <- Base(w, gradient at w + e)",
    cost="1",
    passes=1,
    memory=COPY,
    when="Where a second pass is too dear, and the base has momentum: SGD with momentum, Adam, AdamW.",
    when_not="Around a base without momentum: that is an error.",
    usual={"rho": "3 where SAM has 0.2, in the authors' examples"},
    checked="The official code, https://github.com/MarlonBecker/MSAM: trajectories agree without weight decay "
    "(3e-14). Theirs adds weight decay at w + e; here the base does, at w. The sign is that of their code.",
    caveats=(
        "The first step has no momentum yet, and does not climb.",
        "The only pass is at w + e: the loss that you see, and BatchNorm's statistics, are those of that point.",
    ),
    comparison=Comparison(
        summary=f"climbs against the momentum, in one pass, at 4 x rho ({FIRST_GUESS})",
        rho_factor=4.0,
        needs_momentum=True,
        capturable=True,
    ),
)
