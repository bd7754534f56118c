"""SAM: the original method."""

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from torch import Tensor, nn
from torch.optim import Optimizer

from steppe import papers
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho, repeated_on_subset
from steppe.rules.l2 import L2
from steppe.sam import SAM


def sam(
    base_optimizer: Base,
    rho: Rho = 0.05,
    *,
    ascent_steps: int = 1,
    only: Iterable[Tensor] | None = None,
    **options: Unpack[Options],
) -> SAM:
    """SAM: perturb along the gradient, update with the gradient there. 1 + ascent_steps passes per step.

    e = rho g / |g|,   w <- Base(w, gradient at w + e).

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood; 0.05 is the usual start.
        ascent_steps: K, the number of ascent steps, each of length rho / K; usually 1.
        only: The parameters to perturb; by default all. :func:`steppe.norm_layers`, :func:`steppe.layers` and
            :func:`steppe.last_layers` choose some.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> import torch
        >>> sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        L2()

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """
    return SAM(base_optimizer, rho, **options, perturbation=repeated_on_subset(L2(), ascent_steps, only))


def sam_with(part: Any) -> Callable[..., tuple[Any, ...]]:
    """Return the ``build_example`` of a method that is a closure or a loss: it is used with an optimizer of SAM."""

    def build(base: Optimizer, model: nn.Module, **arguments: Any) -> tuple[Any, ...]:
        return sam(base, model=model, **arguments), part

    return build


CARD = MethodCard(
    name="sam",
    function=sam,
    label="SAM",
    paper=papers.SAM,
    summary="Perturb the weights along the gradient, and update them with the gradient at the perturbed weights. This "
    "aims at a flat minimum, which is said to generalize better.",
    equation="e = rho g / |g|              g = gradient at w, |.| over all perturbed parameters\n"
    "w <- Base(w, g_s)            g_s = gradient at w + e",
    cost="1 + ascent_steps",
    passes=lambda ascent_steps: 1 + ascent_steps,
    memory=COPY,
    when="First: the other methods are variants of this one, and are compared with it.",
    when_not="When a second pass is too expensive: `msam` and `rwp` make one pass, `looksam`, `late_sam`, "
    "`random_sam`, `aesam` and `fraction_sam` fewer than two.",
    usual={
        "rho": "0.05 is the usual start",
        "ascent_steps": "1; for more, see the card `ascent_steps`",
        "only": "all parameters; `steppe.norm_layers`, `layers` and `last_layers` choose some",
    },
    verified="other code, same steps",
    checked="https://github.com/davda54/sam, the well-known single-file implementation: 20 steps in float64 agree "
    "(3e-13). In the authors' JAX code the L2 penalty is a part of the loss, so that it acts on the perturbation too; "
    "here, as in that file, the base applies its weight decay at w. After 20 steps this makes 2e-4 at a weight decay "
    "of 5e-4, and 4e-3 at 1e-2. To have theirs, add the penalty to the loss. Here the weights are restored from a "
    "copy, because w + e - e is not w in floating point.",
    caveats=(
        "A step costs two passes: compare at equal compute, as `steppe compare` does.",
        "rho depends on model and data.",
        "Without `model=`, BatchNorm and other buffers are not protected from the second pass.",
    ),
    other_measurements=(
        "[Wrong labels](../evidence/noisy-labels.md), ten seeds: 8, 24 and 38 points more accurate than SGD with "
        "20, 40 and 60 % of them, and worse calibrated. [On 12,000 images and 40 %](../evidence/price.md), 20 seeds: "
        "8.1 better at equal compute, 0.8 worse at equal steps; with correct labels 0.8 worse, better calibrated. "
        "[Cosine schedule](../evidence/price.md), 3,000 images: 0.6 points better, better calibrated.",
        "Fine-tuning a sentence encoder on few sentences, ten seeds: 1.3 points worse [with two layers "
        "trained](../evidence/text.md), 7.8 with LoRA and 3.4 with the whole encoder "
        "([adapters](../evidence/adapters.md)).",
    ),
    comparison=Comparison(summary="SAM around the base optimizer", capturable=True),
)
