"""C-Flat: SAM's gradient plus that of the largest gradient norm, for continual learning."""

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from steppe._checks import check_nonnegative
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.methods.gam import FirstOrderFlatness
from steppe.papers import NEURIPS, Paper
from steppe.rules.ops import foreach

C_FLAT_PAPER = Paper(
    "bian2024cflat",
    (
        "Ang Bian",
        "Wei Li",
        "Hangjie Yuan",
        "Chengrong Yu",
        "Mang Wang",
        "Zixiang Zhao",
        "Aojun Lu",
        "Pengliang Ji",
        "Tao Feng",
    ),
    "Make Continual Learning Stronger via {C-Flat}",
    "2404.00986",
    2024,
    NEURIPS,
)


class CFlat(FirstOrderFlatness):
    """C-Flat: SAM's gradient plus lambda times the gradient of the largest gradient norm in the neighborhood.

        e_0 = rho g_0 / |g_0|            g_0 at w,   g_1 at w + e_0
        e_1 = rho h / |h|                h = g_1 - g_0,   g_2 at w + e_1
        e_2 = rho g_2 / |g_2|            g_3 at w + e_1 + e_2
        w  <- Base(w, g_1 + lambda (g_3 - g_2))

    The passes are those of :class:`~steppe.methods.gam.GAM` with rho' = rho. lambda = 0 is SAM, at twice the cost.

    Args:
        *args: The base optimizer and rho, or the class form, as for :class:`steppe.SAM`.
        lmbda: lambda, the weight of the gradient of the gradient norm; 0.2 in the authors' code.
        **kwargs: ``model``, ``cadence``, ``replay_rng`` as for :class:`steppe.SAM`.

    Raises:
        ValueError: lambda is negative or not finite.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = CFlat(torch.optim.SGD([w], lr=0.1), rho=0.5, lmbda=0.1)
        >>> for sam_pass in optimizer.passes():
        ...     with sam_pass:
        ...         w.square().sum().backward()
        >>> w.grad  # 2 * 3.5 + 0.1 (2 * 4 - 2 * 3.5)
        tensor([7.1000])

    References:
        Bian et al., Make Continual Learning Stronger via C-Flat, arXiv 2404.00986.
    """

    paper: ClassVar[Paper] = C_FLAT_PAPER
    lmbda: float
    hyperparameters: ClassVar[tuple[str, ...]] = ("lmbda",)

    def __init__(self, *args: Any, lmbda: float = 0.2, **kwargs: Any) -> None:
        check_nonnegative("lmbda", lmbda, "the weight of the gradient of the gradient norm")
        self.lmbda = lmbda
        super().__init__(*args, ratio=1.0, **kwargs)

    def update(self, gradients: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
        """Return g_1 + lambda (g_3 - g_2)."""
        _, g_1, g_2, g_3 = gradients
        update = foreach(torch._foreach_sub, g_3, g_2)
        foreach(torch._foreach_mul_, update, scalar=self.lmbda)
        foreach(torch._foreach_add_, update, g_1)
        return update


def c_flat(base_optimizer: Base, rho: Rho = 0.2, *, lmbda: float = 0.2, **options: Unpack[Options]) -> CFlat:
    """C-Flat: SAM and the largest gradient norm in the neighborhood, for continual learning. Four passes per step.

    w <- Base(w, g_1 + lambda (g_3 - g_2)), with the gradients g_0 at w, g_1 at w + rho g_0 / |g_0|, which is SAM's,
    g_2 at w + e_1, e_1 = rho (g_1 - g_0) / |g_1 - g_0|, and g_3 at w + e_1 + rho g_2 / |g_2|.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of each perturbation; 0.2 in the official code.
        lmbda: lambda, the weight of the gradient of the gradient norm; 0.2 in the official code, and 0 is SAM.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: lambda is negative or not finite.

    Example:
        >>> c_flat(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).lmbda
        0.2

    References:
        Bian et al., Make Continual Learning Stronger via C-Flat, arXiv 2404.00986.
    """
    return CFlat(base_optimizer, rho, lmbda=lmbda, **options)


CARD = MethodCard(
    name="c_flat",
    function=c_flat,
    label="C-Flat",
    paper=C_FLAT_PAPER,
    summary="Update with SAM's gradient plus lambda times the gradient of the largest gradient norm in the "
    "neighborhood. It was proposed for continual learning, where each task's solution shall remain good on the next.",
    equation="e_0 = rho g_0 / |g_0|                        g_0 at w,  g_1 at w + e_0\n"
    "e_1 = rho h / |h|,   h = g_1 - g_0            g_2 at w + e_1\n"
    "e_2 = rho g_2 / |g_2|                        g_3 at w + e_1 + e_2\n"
    "w <- Base(w, g_1 + lambda (g_3 - g_2))",
    cost="4",
    passes=4,
    memory=f"{COPY}; within a step three gradients and the perturbation",
    when="In continual learning, to measure what first-order flatness adds to SAM.",
    when_not="At equal compute without a measurement: a step costs twice that of SAM.",
    usual={"rho": "0.2 (official code)", "lmbda": "0.2 (official code); 0 is SAM"},
    verified="official code, same steps",
    checked="https://github.com/WanNaa/C-Flat: 20 steps in float64 agree. With several workers, it perturbs each "
    "along its own gradient. Its passes are those of `gam` with rho' = rho; the update is not GAM's.",
    caveats=("`first_step()` and `second_step()` are an error.",),
    comparison=Comparison(summary="adds the gradient of the largest gradient norm to SAM's, at SAM's rho"),
)
