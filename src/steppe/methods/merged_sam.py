"""SAM on the merged weights W = W0 + s B A of LoRA, instead of its factors A and B."""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Unpack

from torch import Tensor

from steppe import papers
from steppe.methods._adapters import AdaptedLayer
from steppe.methods._card import Comparison, MethodCard
from steppe.methods._merged_weights import MergedWeightMethod, MergedWeights, radii_of
from steppe.methods._options import Base, Options, Rho
from steppe.papers import Paper, cites
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import norm, reciprocal, scaled


@dataclass(frozen=True)
class MergedGradient:
    """Perturb merged weights along their gradients: e = rho G / |G|.

    The norm runs over the merged weights of all adapted layers and the trained parameters that belong to no adapter
    (modules_to_save, biases) together; A and B are not perturbed. A layer has the radius of the group of its A and B.
    Of :func:`merged_sam`, which records the gradients.
    """

    paper: ClassVar[Paper] = papers.SAM
    scale_free: ClassVar[bool] = True

    merged: MergedWeights = field(default_factory=MergedWeights, repr=False, compare=False)
    """The merged weights of the step."""

    def __call__(self, point: Point) -> ScaledDirection:
        """Perturb the merged weights, and return the perturbation of the other parameters."""
        merged = self.merged
        factors = {id(p) for layer in merged.layers for p in layer.factors}
        direction = [None if id(p) in factors else g for p, g in zip(point.parameters, point.gradients, strict=True)]
        found = [(i, G) for i, G in enumerate(merged.gradients) if G is not None]
        scale = reciprocal(norm([*(G for _, G in found), *(g for g in direction if g is not None)]))
        radii = radii_of(merged.layers, point)
        for i, G in found:
            merged.perturbations[i] = partial(_times, G, scale * radii[i])
        return ScaledDirection(direction, scale)

    def check_layer(self, layer: AdaptedLayer) -> None:
        """Accept every layer."""


@cites(papers.SAM)
def merged_sam(base_optimizer: Base, rho: Rho = 0.05, **options: Unpack[Options]) -> MergedWeightMethod:
    """SAM on the merged weights W = W0 + s B A of LoRA: e = rho G / |G| with the gradient G of W.

    The radius is that of SAM on the whole weights of the adapted layers. Trained parameters that belong to no adapter
    are perturbed in the same ball; A and B are not. The update gradient is that of A and B at W + e.

    Memory: G, as large as the base weights of the adapted layers, until the second pass is done; and in the first pass
    the inputs of these layers, as in training them whole. One W0 + e exists at a time.

    Args:
        base_optimizer: The optimizer of the trained parameters.
        rho: rho, the radius, measured on the merged weights.
        **options: ``model``, the model of PEFT, and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: ``model`` is missing, or has a layer of which the merged weight cannot be perturbed: quantized,
            merged, with several active adapters, DoRA.

    A base in bfloat16 rounds much of a small e to nothing: a warning says so, and ``stochastic_rounding=True`` keeps
    all of it on average.

    Example:
        >>> trainer = SAMTrainer(model=model, args=args, method=merged_sam, rho=0.05)  # doctest: +SKIP

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """
    return MergedWeightMethod(base_optimizer, rho, **options, rule=MergedGradient())


def _times(G: Tensor, alpha: Tensor) -> Tensor:
    return scaled(G, alpha.to(G.device))


CARD = MethodCard(
    name="merged_sam",
    function=merged_sam,
    label="SAM on merged weights",
    paper=papers.SAM,
    summary="Perturb the merged weights W of LoRA along their own gradient G, and update A and B. The radius means "
    "what it means in training the whole weights.",
    equation="W = W0 + s B A\ne = rho G / |G|,   G = dL/dW at W\nA, B <- Base((A, B), dL/d(A, B) at W + e)",
    cost="2",
    passes=2,
    memory="G, as large as the base weights of the adapted layers, until the second pass is done; three tensors of "
    "one layer's size, from which W0 + e is made; in the first pass the inputs of these layers",
    when="To fine-tune LoRA adapters with SAM's own neighborhood, that of the weights that the network uses.",
    when_not="Where G does not fit into memory, with a quantized base, or with DoRA: `sam` perturbs A and B alone.",
    usual={
        "rho": "0.1 was the best of 0.05, 0.1 and 0.2 for LoRA on a sentence encoder, and 0.05 with 40 % wrong labels"
    },
    verified="nothing else",
    checked="Two passes by hand in float64 agree. No paper proposes it under a name of its own: it is SAM with W in "
    "the place of w.",
    caveats=(
        "The perturbation of a fresh adapter has its whole radius, where that of A and B has B only.",
        "A base in bfloat16 rounds much of a small e to nothing: a warning says so, and `stochastic_rounding=True` "
        "keeps it on average.",
        "Several processes: DistributedDataParallel. G is averaged over the ranks, which communicates as much as "
        "training the whole weights, once a step.",
        "`first_step()` and `second_step()` are an error: W has no `.grad`.",
    ),
    other_measurements=(
        "[LoRA on few sentences](../evidence/adapters.md), ten seeds: 6.6 points worse than AdamW at equal "
        "compute, not distinguishable at equal steps; with 40 % wrong labels not distinguishable at equal compute.",
    ),
    needs_adapters=True,
    comparison=Comparison(summary="perturbs the merged weights of LoRA adapters along their gradient, at SAM's rho"),
)
