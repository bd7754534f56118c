"""Flat-LoRA: random noise on the merged weights W = W0 + s B A of LoRA, in a single pass."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from steppe._checks import check_count, check_seed
from steppe._tensors.random import generator, key
from steppe.methods._adapters import AdaptedLayer
from steppe.methods._card import FIRST_GUESS, TOTAL_STEPS, Comparison, MethodCard
from steppe.methods._merged_weights import MergedWeightMethod, MergedWeights, radii_of
from steppe.methods._options import Base, Options, Rho
from steppe.papers import ICML, Paper, cites
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import scaled, widen

FLAT_LORA_PAPER = Paper(
    "li2025flatlora",
    ("Tao Li", "Zhengbao He", "Yujun Li", "Yasheng Wang", "Lifeng Shang", "Xiaolin Huang"),
    "{Flat-LoRA}: Low-Rank Adaptation over a Flat Loss Landscape",
    "2409.14396",
    2025,
    ICML,
)


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
        check_seed(self.seed)

    def __call__(self, point: Point) -> ScaledDirection:
        """Perturb the merged weights, and no parameter."""
        progress = 1.0 if self.total_steps is None else min(point.step / self.total_steps, 1.0)
        share = (1 - math.cos(math.pi * progress)) / 2
        radii = radii_of(self.merged.layers, point)
        for i, layer in enumerate(self.merged.layers):
            dims = layer.dims_of_filter()
            W = widen(layer.merged_weight())
            lengths = torch.linalg.vector_norm(W, dim=dims, keepdim=True)
            n = math.prod(W.shape[d] for d in dims)
            deviation = lengths * (share / math.sqrt(n) * radii[i])
            draw = key("FlatLoRA", self.seed, point.step, i, point.micro_batch)
            self.merged.perturbations[i] = partial(_noise, layer.weight, deviation, draw)
        return ScaledDirection([None] * len(point.parameters))

    def check_layer(self, layer: AdaptedLayer) -> None:
        """Refuse a layer without filters."""
        layer.dims_of_filter()


@cites(FLAT_LORA_PAPER)
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


def _noise(weight: Tensor, deviation: Tensor, draw: int) -> Tensor:
    r = torch.empty_like(weight, requires_grad=False).normal_(generator=generator(weight.device, draw))
    return scaled(r, deviation)


CARD = MethodCard(
    name="flat_lora",
    function=flat_lora,
    label="Flat-LoRA",
    paper=FLAT_LORA_PAPER,
    summary="Perturb the merged weights W of LoRA by Gaussian noise, in each filter in proportion to its norm. A step "
    "is a single pass, at W + e.",
    equation="W = W0 + s B A\n"
    "e_f = rho_t |W_f| r / sqrt(n),   r ~ N(0, 1), in each filter f of n weights\n"
    "rho_t = rho (1 - cos(pi t / T)) / 2   with total_steps=T, else rho\n"
    "A, B <- Base((A, B), dL/d(A, B) at W + e)",
    cost="1",
    passes=1,
    memory="three tensors of one layer's size, from which W0 + e is made; one number for each output: noise is drawn "
    "again from its seed in the backward",
    when="To fine-tune LoRA adapters toward flat minima of the merged weights at the cost of the base.",
    when_not="With few tokens a batch, where drawing the noise takes as long as the pass; with a quantized base; with "
    "DoRA.",
    usual={"rho": "0.05, in the authors' script", "total_steps": f"{TOTAL_STEPS}, as in the paper"},
    verified="official code, read",
    checked="https://github.com/nblt/Flat-LoRA: the same formula and schedule, and the filters of the merged weight, "
    "too. It draws from a global generator and subtracts e from W0, which is off in the last bits; here W0 is not "
    "written. It counts micro-batches in t, and its noise is that of linear layers: filters of convolutions are ours.",
    caveats=(
        "Without `total_steps` the radius is constant.",
        "Ranks of DistributedDataParallel draw the same noise.",
        "Embeddings have no filters, and are an error.",
    ),
    short_run={"total_steps": 10},
    other_measurements=(
        "[LoRA on few sentences](../evidence/adapters.md), ten seeds: not distinguishable from AdamW, also with 40 "
        "% wrong labels.",
    ),
    needs_adapters=True,
    comparison=Comparison(
        summary=f"perturbs the merged weights of LoRA adapters by growing noise, at 2 x rho ({FIRST_GUESS})",
        rho_factor=2.0,
    ),
)
