"""SAM with several ascent steps."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from steppe.methods._card import COPY, MethodCard
from steppe.methods.sam import sam
from steppe.rules.ascent_steps import AscentSteps


def _made(base: Optimizer, model: nn.Module, **given: Any) -> tuple[Any, ...]:
    return (sam(base, steps=given.pop("k", 2), model=model, **given),)


CARD = MethodCard(
    name="ascent_steps",
    function=AscentSteps,
    label="Several climbs",
    about="It looks for the worst point within the radius by several steps of ascent, where SAM takes one.",
    equation="e_k = P(e_{k-1} + alpha rho d(g(w + e_{k-1})))     d = the rule's climb for rho = 1\n"
    "P = projection onto |e| <= rho",
    cost="1 + k",
    passes=lambda k: 1 + k,
    memory=f"{COPY}, and the climb so far",
    when="To see whether one step of the inner maximization is too few; around any perturbation.",
    when_not="At equal compute without a measurement: each climb is a further pass.",
    usual={"k": "1 is SAM; 2 and more", "alpha": "1 / k, which never leaves the ball"},
    checked="Not compared with other code. The SAM paper's appendix compares several steps with one.",
    caveats=("An alpha above 1 / k needs the projection, which is known for `L2` only.",),
    make=_made,
    use="optimizer = steppe.variants.sam(base, steps=2, model=model)\n"
    "optimizer = steppe.SAM(base, perturbation=steppe.AscentSteps(steppe.Adaptive(), k=2), model=model)",
)
