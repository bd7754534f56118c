"""SAM: the original method."""

from collections.abc import Iterable
from typing import Unpack

from torch import Tensor
from torch.optim import Optimizer

from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._options import Options, Rho, modified
from steppe.rules.l2 import L2
from steppe.sam import SAM


def sam(
    base_optimizer: Optimizer,
    rho: Rho = 0.05,
    *,
    steps: int = 1,
    only: Iterable[Tensor] | None = None,
    **options: Unpack[Options],
) -> SAM:
    """SAM: climb along the gradient, e = rho g / |g|, and go down with the gradient there. Two passes a step.

    With ``steps`` climbs in the place of one it costs 1 + steps; with ``only``, no other parameters climb:
    :func:`steppe.norm_layers`, :func:`steppe.layers` and :func:`steppe.last_layers` choose some.

    >>> import torch
    >>> sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
    L2()

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """
    return SAM(base_optimizer, rho, **options, perturbation=modified(L2(), steps, only))


CARD = MethodCard(
    name="sam",
    function=sam,
    label="SAM",
    about="It leads to flat minima, which generalize better.",
    equation="e = rho g / |g|              g = gradient at w, |.| over all parameters that climb\n"
    "w <- Base(w, g_s)            g_s = gradient at w + e",
    cost="1 + steps",
    passes=lambda steps: 1 + steps,
    memory=COPY,
    when="First: the others change this one, and are compared with it.",
    when_not="Where a second pass is too dear: `msam` and `rwp` make one, `looksam`, `late_sam`, `random_sam`, "
    "`aesam` and `fraction_sam` fewer than two.",
    usual={
        "rho": "0.05 is the usual start",
        "steps": "1; more climbs: the card `steps`",
        "only": "all parameters; `steppe.norm_layers`, `layers` and `last_layers` choose some",
    },
    checked="The well-known single-file implementation, https://github.com/davda54/sam, which is not the authors': "
    "20 steps in float64 agree (3e-13). Comes back by a copy of w, where w + e - e is not w in floating point.",
    caveats=(
        "A step costs two passes: compare at equal compute, as `steppe compare` does.",
        "rho depends on model and data.",
        "Without `model=`, BatchNorm and other buffers are not protected from the second pass.",
    ),
    comparison=Comparison(summary="SAM around the base optimizer", capturable=True),
)
