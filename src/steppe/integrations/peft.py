"""PEFT: perturbations of the merged weights W = W0 + s B A of LoRA, instead of its factors A and B.

:class:`steppe.SAM` around the optimizer of a PEFT model perturbs A and B, and its radius is measured on them. The
network sees the product, in which e moves W by s (B e_A + e_B A + e_B e_A): B is 0 at first, so that the gradient of A
is zero and only B is perturbed; and W never moves out of the rows and columns of the two factors. Here, e moves W
itself:

- :func:`merged_sam`: along the gradient of W, in two passes.
- :func:`flat_lora`: by random noise, in a single pass.

In both, the update gradient is that of A and B at W + e, and nothing is ever written to W0.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from steppe import papers
from steppe._engine.rounding import MIN_SURVIVING_SHARE
from steppe._tensors.random import generator, key
from steppe.integrations._adapted_layers import AdaptedLayer, MergedWeights
from steppe.methods._base import OwnStepMethod
from steppe.methods._options import Base, Options, Rho
from steppe.papers import Paper
from steppe.rules import Perturbation, Point, ScaledDirection, needs_gradient
from steppe.rules._checks import check_count
from steppe.rules.ops import norm, reciprocal, scaled, widen
from steppe.sam import Pass

__all__ = ["FLAT_LORA_PAPER", "MergedGradient", "MergedNoise", "MergedWeightMethod", "flat_lora", "merged_sam"]

FLAT_LORA_PAPER = Paper(
    "li2025flatlora",
    ("Tao Li", "Zhengbao He", "Yujun Li", "Yasheng Wang", "Lifeng Shang", "Xiaolin Huang"),
    "{Flat-LoRA}: Low-Rank Adaptation over a Flat Loss Landscape",
    "2409.14396",
    2025,
    "International Conference on Machine Learning (ICML)",
)


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
        radii = _radii(merged.layers, point)
        for i, G in found:
            merged.perturbations[i] = partial(_times, G, scale * radii[i])
        return ScaledDirection(direction, scale)


@dataclass(frozen=True)
class MergedNoise:
    """Perturb merged weights by Gaussian noise, in each filter in proportion to its norm: e = rho_t |W_f| r / sqrt(n).

    W_f is a filter of W = W0 + s B A, the n weights of one output, and r is Gaussian: |e_f| is about rho_t |W_f|. With
    ``total_steps`` T, rho_t = rho (1 - cos(pi t / T)) / 2 grows from 0 to rho. The draw depends on the seed, the step
    and the layer's position, and is made again where it is needed. Of :func:`flat_lora`.
    """

    paper: ClassVar[Paper] = FLAT_LORA_PAPER
    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    total_steps: int | None = None
    """T, the steps in which the radius grows; None for a constant one."""
    seed: int = 0
    """The seed of the noise."""
    merged: MergedWeights = field(default_factory=MergedWeights, repr=False, compare=False)
    """The merged weights of the step."""

    def __post_init__(self) -> None:
        if self.total_steps is not None:
            check_count("total_steps", self.total_steps, "the number of steps in which the radius grows")

    def __call__(self, point: Point) -> ScaledDirection:
        """Perturb the merged weights, and no parameter."""
        progress = 1.0 if self.total_steps is None else min(point.step / self.total_steps, 1.0)
        share = (1 - math.cos(math.pi * progress)) / 2
        radii = _radii(self.merged.layers, point)
        for i, layer in enumerate(self.merged.layers):
            dims = layer.dims_of_filter()
            W = widen(layer.merged_weight())
            lengths = torch.linalg.vector_norm(W, dim=dims, keepdim=True)
            n = math.prod(W.shape[d] for d in dims)
            deviation = lengths * (share / math.sqrt(n) * radii[i])
            draw = key("FlatLoRA", self.seed, point.step, i, point.micro_batch)
            self.merged.perturbations[i] = partial(_noise, layer.weight, deviation, draw)
        return ScaledDirection([None] * len(point.parameters))


class MergedWeightMethod(OwnStepMethod):
    """Runs the perturbed passes of a step at W + e; made by :func:`merged_sam` and :func:`flat_lora`.

    Args:
        *args: Positional arguments of :class:`steppe.SAM`.
        rule: :class:`MergedGradient` or :class:`MergedNoise`.
        **kwargs: Keyword arguments of :class:`steppe.SAM`, but for ``perturbation``.

    Raises:
        ValueError: ``model`` is missing, or has a layer of which the merged weight cannot be perturbed.
        RuntimeError: Several processes, for a perturbation along the gradient; a parameter group with ``maximize``.
    """

    own_rules: ClassVar[tuple[str, ...]] = ("perturbation",)
    why_no_first_step: ClassVar[str] = "the merged weights have no .grad that first_step() could read"

    def __init__(self, *args: Any, rule: MergedGradient | MergedNoise, **kwargs: Any) -> None:
        self.refuse_own_rules(kwargs)
        super().__init__(*args, perturbation=rule, **kwargs)
        self._begin_step(rule)
        rule.merged.end_step()

    @property
    def _rule(self) -> Any:
        rule: Perturbation = self.perturbation
        return rule

    def _begin_step(self, rule: MergedGradient | MergedNoise) -> None:
        if needs_gradient(rule):
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                self.refuse("several processes", "the gradients of the frozen base weights are not averaged over them")
            if any(group.get("maximize", False) for group in self.param_groups):
                self.refuse("maximize=True", "the perturbation would lower the objective. Minimize the negative loss")
        rule.merged.begin_step(self.model, rounding=self.steps_taken if self.stochastic_rounding else None)
        if isinstance(rule, MergedNoise):
            for layer in rule.merged.layers:
                layer.dims_of_filter()  # raises for a layer without filters

    def step_passes(self, *, accumulate: bool) -> Iterator[Pass]:
        """Yield SAM's passes: the one at w with the gradients of the merged weights, the other one at W + e."""
        merged: MergedWeights = self._rule.merged
        self._begin_step(self._rule)
        for sam_pass in self.sam_passes(accumulate=accumulate):
            if sam_pass.is_perturbed:
                sam_pass.around(merged.displaced())
            elif not sam_pass.is_last:
                sam_pass.around(merged.recorded())
            yield sam_pass
            if sam_pass.is_perturbed:
                self._record(merged)
        merged.end_step()

    @torch.no_grad()
    def _record(self, merged: MergedWeights) -> None:
        """Record |e| and |W| for :meth:`steppe.SAM.report`, and warn once if much of e is lost by rounding."""
        if not self.is_measuring:
            return
        for i, layer in enumerate(merged.layers):
            if (perturbed := merged.at(i)) is not None:
                e = widen(perturbed()) - widen(layer.weight)
                self.record_displacement(layer.factors, e, layer.merged_weight())
        share = merged.surviving_share()
        if share < MIN_SURVIVING_SHARE and not self.stochastic_rounding:
            self.warn_once(
                "rounding of merged weights",
                f"only {share:.0%} of the perturbation survives rounding to half-precision base weights: the rest is "
                "smaller than their last bit, so that SAM acts with a smaller radius than rho. Give "
                "stochastic_rounding=True, which keeps all of it on average, or load the base in float32",
            )


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


def flat_lora(
    base_optimizer: Base,
    rho: Rho = 0.05,
    *,
    total_steps: int | None = None,
    seed: int = 0,
    **options: Unpack[Options],
) -> MergedWeightMethod:
    """Flat-LoRA: perturb the merged weights W = W0 + s B A by random noise. A single pass per step, at W + e.

    e = rho_t |W_f| r / sqrt(n) in each filter f of n weights, with Gaussian r and rho_t = rho (1 - cos(pi t / T)) / 2.
    A step costs what a step of the base costs. No noise is stored: it is drawn again from its seed in the backward.

    Checked with the official code, https://github.com/nblt/Flat-LoRA: the same formula and schedule, and the filters of
    the merged weight, too. It draws from a global generator and subtracts e from W0, which is off in the last bits;
    here W0 is not written. It counts micro-batches in t, and its noise is that of linear layers: filters of
    convolutions are ours.

    Args:
        base_optimizer: The optimizer of the trained parameters.
        rho: rho, the length of e relative to the filter's norm; 0.05 in the authors' script.
        total_steps: T, the number of optimizer steps in the training, as in the paper; None keeps rho constant.
        seed: The seed of the noise.
        **options: ``model``, the model of PEFT, and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: ``model`` is missing, or has a layer of which the merged weight cannot be perturbed: quantized,
            merged, with several active adapters, DoRA, an embedding.

    Example:
        >>> method = partial(flat_lora, total_steps=1000)
        >>> trainer = SAMTrainer(model=model, args=args, method=method)  # doctest: +SKIP

    References:
        Li et al., Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape, ICML 2025, arXiv 2409.14396.
    """
    return MergedWeightMethod(base_optimizer, rho, **options, rule=MergedNoise(total_steps, seed))


def _radii(layers: Sequence[AdaptedLayer], point: Point) -> list[float | Tensor]:
    """Return the radius of the group that the factors of each layer are in; 0 if they are in none."""
    rho = dict(zip(map(id, point.parameters), point.rho, strict=True))
    return [next((rho[id(p)] for p in layer.factors if id(p) in rho), 0.0) for layer in layers]


def _times(G: Tensor, alpha: Tensor) -> Tensor:
    return scaled(G, alpha.to(G.device))


def _noise(weight: Tensor, deviation: Tensor, draw: int) -> Tensor:
    r = torch.empty_like(weight, requires_grad=False).normal_(generator=generator(weight.device, draw))
    return scaled(r, deviation)
