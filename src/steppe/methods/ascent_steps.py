"""SAM with several ascent steps."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from steppe import papers
from steppe.methods._card import COPY, MethodCard
from steppe.methods.sam import sam
from steppe.rules.ascent_steps import AscentSteps


def _sam_with_ascent_steps(
    base: Optimizer, model: nn.Module, *, ascent_steps: int = 2, **arguments: Any
) -> tuple[Any, ...]:
    return (sam(base, ascent_steps=ascent_steps, model=model, **arguments),)


CARD = MethodCard(
    name="ascent_steps",
    function=AscentSteps,
    label="Several ascent steps",
    paper=papers.SAM,
    summary="Search the worst point within the radius by several ascent steps. SAM makes one.",
    equation="e_k = P(e_{k-1} + alpha rho d(g(w + e_{k-1})))     d = the rule's perturbation for rho = 1\n"
    "P = projection onto |e| <= rho",
    cost="1 + ascent_steps",
    passes=lambda ascent_steps: 1 + ascent_steps,
    memory=f"{COPY}, and the ascent so far",
    when="To measure whether one step of the inner maximization is too few; around any perturbation.",
    when_not="At equal compute without a measurement: each ascent step is a further pass.",
    usual={"ascent_steps": "1 is SAM; 2 and more", "alpha": "1 / ascent_steps, which never leaves the ball"},
    verified="nothing else",
    checked="The SAM paper's appendix compares several steps with one.",
    caveats=("An alpha above 1 / ascent_steps needs the projection, which is known for `L2` only.",),
    build_example=_sam_with_ascent_steps,
    usage_code="optimizer = steppe.variants.sam(base, ascent_steps=2, model=model)\n"
    "rule = steppe.AscentSteps(steppe.Adaptive(), ascent_steps=2)\n"
    "optimizer = steppe.SAM(base, perturbation=rule, model=model)",
)
