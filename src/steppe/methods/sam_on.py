"""SAM-ON: perturb the normalization layers only."""

from typing import Unpack

from steppe._engine.constructor import Model, one_module
from steppe.methods._card import FIRST_GUESS, Comparison, MethodCard
from steppe.methods._options import Base, PassOptions, Rho
from steppe.papers import NEURIPS, Paper
from steppe.rules.l2 import L2
from steppe.rules.subsets import ParameterSubset, norm_layers
from steppe.sam import SAM

SAM_ON_PAPER = Paper(
    "mueller2023samon",
    ("Maximilian Mueller", "Tiffany Vlaar", "David Rolnick", "Matthias Hein"),
    "Normalization Layers Are All That Sharpness-Aware Minimization Needs",
    "2306.04226",
    2023,
    NEURIPS,
)


def sam_on(base_optimizer: Base, rho: Rho, *, model: Model, **options: Unpack[PassOptions]) -> SAM:
    """SAM-ON: SAM that perturbs the normalization layers only. Two passes per step.

    e = rho g / |g| on the parameters of normalization layers, 0 elsewhere.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius within the normalization layers; it is not SAM's, and the paper's values are unverified.
        model: The model whose normalization layers are perturbed.
        **options: The other options of :class:`steppe.SAM`.

    Raises:
        TypeError: ``model`` is not a module, or several.
        ValueError: The model has no normalization layers.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        >>> optimizer = sam_on(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
        >>> len(optimizer.perturbation.parameters)
        2

    References:
        Mueller et al., Normalization Layers Are All That Sharpness-Aware Minimization Needs, arXiv 2306.04226.
    """
    module = one_module(model)
    if module is None:
        raise TypeError("sam_on perturbs the normalization layers of model=, which is None: give the trained module")
    perturbation = ParameterSubset(L2(), norm_layers(module), SAM_ON_PAPER)
    return SAM(base_optimizer, rho, model=model, **options, perturbation=perturbation)


CARD = MethodCard(
    name="sam_on",
    function=sam_on,
    label="SAM-ON",
    paper=SAM_ON_PAPER,
    summary="Perturb the normalization layers only, with a radius of their own. The other weights are neither copied "
    "nor moved.",
    equation="e = rho g / |g| on the parameters of normalization layers, 0 elsewhere",
    cost="2",
    passes=2,
    memory="a copy of the normalization layers' weights",
    when="For networks with normalization layers, if a copy of all weights takes too much memory.",
    when_not="To save time: both passes are full. For networks without normalization layers: that is an error.",
    usual={"rho": "0.5 in the script of the official code; tune it"},
    verified="texts only",
    checked="The author confirms in https://github.com/mueller-mp/SAM-ON/issues/1 that the norm runs over the "
    "perturbed layers only, as here.",
    caveats=("rho has no default: it is not SAM's, because the norm runs over few parameters.",),
    required={"rho": 0.1},
    comparison=Comparison(
        summary=f"perturbs the normalization layers only, at 2 x rho ({FIRST_GUESS})",
        rho_factor=2.0,
        capturable=True,
    ),
)
