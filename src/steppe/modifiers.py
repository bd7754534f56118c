"""What changes any perturbation: one short class a modifier."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from steppe import papers
from steppe._tensors import random as draws
from steppe._tensors.dtensor import foreach, part_of, whole
from steppe._tensors.ops import where_finite
from steppe.rules import Ascent, Perturbation, Point, climbs, needs_gradient, scale_free

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Modifier:
    """A perturbation made of another one, ``rule``: it needs what that one needs."""

    rule: Perturbation

    @property
    def needs_gradient(self) -> bool:
        """Whether the modified rule needs the gradient at w."""
        return needs_gradient(self.rule)

    @property
    def climbs(self) -> int:
        """How many climbs the modified rule makes in a step."""
        return climbs(self.rule)

    @property
    def scale_free(self) -> bool:
        """Whether the modified rule gives the same for any multiple of the gradient."""
        return scale_free(self.rule)


@dataclass(frozen=True, eq=False)
class Only(Modifier):
    """Climb with some of the parameters only: e is the rule's on them, and 0 on the others.

    The rule sees nothing of the others, so rho is the radius among those that climb. Parameters that stay are neither
    copied nor moved, so a climb with few of them costs next to nothing beside its pass.

    >>> import torch, steppe
    >>> a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = steppe.SAM(torch.optim.SGD([a, b], lr=0.1), rho=1.0, perturbation=Only(steppe.L2(), [a]))
    >>> for walk in optimizer.passes():
    ...     with walk:
    ...         seen = a.tolist(), b.tolist()
    ...         (3 * a[0] + 4 * a[1] + 100 * b).sum().backward()
    >>> seen
    ([0.6000000238418579, 0.800000011920929], [0.0])
    """

    rule: Perturbation
    """The perturbation to restrict."""
    parameters: Iterable[Tensor] = field(repr=False)
    """Those that climb."""
    paper: papers.Paper | None = field(default=None, repr=False)
    """Whose choice of parameters it is, for :func:`steppe.citation`."""

    def __post_init__(self) -> None:
        chosen = tuple(dict.fromkeys(self.parameters))
        if not chosen:
            raise ValueError("no parameter is to climb, so this would be the plain base optimizer at twice the price")
        object.__setattr__(self, "parameters", chosen)

    def __call__(self, at: Point) -> Ascent:
        """Return the rule's climb at the restricted point."""
        chosen = set(self.parameters)
        return _restricted(self.rule, at, [i for i, p in enumerate(at.parameters) if p in chosen])


@dataclass(frozen=True, eq=False)
class Masked(Modifier):
    """Climb with some of the coordinates only: e = m * e(rule), entry by entry, for masks m that stay as they are.

    The rule does not know of the masks: rho is its radius before the masking. Parameters without a mask climb with all
    their coordinates; :class:`Only` leaves parameters out.

    >>> import steppe
    >>> w, g = torch.zeros(2), torch.tensor([3.0, 4.0])
    >>> rule = Masked(steppe.L2(), {w: torch.tensor([True, False])})
    >>> rule(Point([w], [g], rho=[0.05], base_state=[{}], step=0)).direction
    [tensor([3., 0.])]
    """

    rule: Perturbation
    """The perturbation to mask."""
    masks: Mapping[Tensor, Tensor] = field(repr=False)
    """For each parameter, a bool tensor of its shape, and best on its device: True where it climbs."""

    def __post_init__(self) -> None:
        for p, mask in self.masks.items():
            if mask.dtype != torch.bool or mask.shape != p.shape:
                raise ValueError(
                    f"the mask of a parameter must be a bool tensor of its shape {tuple(p.shape)}, got {mask.dtype} of "
                    f"shape {tuple(mask.shape)}: it says for each coordinate whether it climbs"
                )
        object.__setattr__(self, "masks", dict(self.masks))

    def __call__(self, at: Point) -> Ascent:
        """Return the rule's climb, masked."""
        masks = [self.masks.get(p) for p in at.parameters]
        pairs = zip(at.parameters, masks, strict=True)
        return _masked(self.rule(at), [m if m is None or not p.is_complex() else m.unsqueeze(-1) for p, m in pairs])


@dataclass(frozen=True)
class Sparse(Modifier):
    """Climb where the Fisher information is largest (SSAM-F): e = m * e(rule), m for the top 1 - sparsity of g^2.

    m is chosen over all parameters together, at the first climb and at those of the steps ``every``, 2 ``every``, ...;
    with a cadence, let ``every`` be a multiple of its interval. As in the authors' code, the rule is masked after its
    normalisation: rho is its radius before the masking. A bool a coordinate is kept.

    The authors' code sums the squared gradients of single samples (16 to 1024 of them), once an epoch or every five
    epochs, and climbs with no coordinate before its first mask; a rule sees the batch's gradient only, so here it is
    the square of that.

    >>> import steppe
    >>> w, g = torch.zeros(4), torch.tensor([3.0, -4.0, 1.0, 0.0])
    >>> Sparse(steppe.L2(), sparsity=0.5)(Point([w], [g], rho=[0.05], base_state=[{}], step=0)).direction
    [tensor([ 3., -4.,  0.,  0.])]

    Source: Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, arXiv 2210.05177,
    and its official code.
    """

    paper: ClassVar[papers.Paper] = papers.SSAM

    rule: Perturbation
    """The perturbation to mask."""
    sparsity: float = 0.5
    """The share of the coordinates that stay; the authors' examples have 0.5."""
    every: int = 100
    """After how many steps the mask is chosen anew."""

    def __post_init__(self) -> None:
        _check_sparse(self.rule, self.sparsity, self.every, type(self).__name__)

    def __call__(self, at: Point) -> Ascent:
        """Return the rule's climb, masked."""
        memory = at.memory_of(self)
        if _is_due(at, self.every) or any("mask" not in own for own in memory):
            scores = foreach(torch._foreach_abs, at.gradients)
            _remember(at, memory, _largest(scores, _kept(scores, self.sparsity)))
        return _masked(self.rule(at), _masks(memory))


@dataclass(frozen=True)
class DynamicSparse(Modifier):
    """Climb with a mask in dynamic training (SSAM-D): drop the flattest of its coordinates, grow as many at random.

    e = m * e(rule), with m random at first. At the climbs of the steps ``every``, 2 ``every``, ..., a share
    drop (1 + cos(pi t / steps)) / 2 of its coordinates, those of the smallest |g|, is exchanged for random ones of the
    others; m always has the same number of coordinates. As in the authors' code, the rule is masked after its
    normalisation: rho is its radius before the masking. A bool a coordinate is kept; the draws depend on the seed and
    the step alone.

    The authors' code climbs with the new mask from the next step on, and here this one does already.

    >>> import steppe
    >>> w, g, memory = torch.zeros(6), torch.arange(1.0, 7.0), {}
    >>> rule = DynamicSparse(steppe.L2(), steps=100, every=1, drop=0.4)
    >>> for step in range(3):
    ...     rule(Point([w], [g], rho=[0.05], base_state=[{}], step=step, memory=memory)).direction
    [tensor([1., 0., 0., 4., 5., 0.])]
    [tensor([0., 0., 3., 4., 5., 0.])]
    [tensor([1., 0., 0., 4., 5., 0.])]

    Source: Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, arXiv 2210.05177,
    and its official code.
    """

    paper: ClassVar[papers.Paper] = papers.SSAM

    rule: Perturbation
    """The perturbation to mask."""
    steps: int
    """How many steps the training has: at its end, no more coordinates are exchanged."""
    sparsity: float = 0.5
    """The share of the coordinates that stay; the authors' examples have 0.5."""
    drop: float = 0.5
    """The share of the mask that is exchanged at first; the authors' value."""
    every: int = 100
    """After how many steps coordinates are exchanged."""
    seed: int = 0
    """What makes the draws of two runs differ."""

    def __post_init__(self) -> None:
        _check_sparse(self.rule, self.sparsity, self.every, type(self).__name__)
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must be between 0 and 1, got {self.drop}: it is a share of the mask")
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}: it is the length of the training in steps")

    def __call__(self, at: Point) -> Ascent:
        """Return the rule's climb, masked."""
        memory = at.memory_of(self)
        if any("mask" not in own for own in memory):
            scores = draws.uniform("DynamicSparse", self.seed, at.step, at.gradients)
            _remember(at, memory, _largest(scores, _kept(scores, self.sparsity)))
        elif _is_due(at, self.every):
            _remember(at, memory, self._exchanged(at, _masks(memory)))
        return _masked(self.rule(at), _masks(memory))

    def _exchanged(self, at: Point, masks: Sequence[Tensor]) -> list[Tensor]:
        kept = _kept(masks, self.sparsity)
        share = self.drop * (1 + math.cos(math.pi * min(at.step / self.steps, 1))) / 2
        number = int(min(share * kept, sum(m.numel() for m in masks) - kept))
        chance = draws.uniform("DynamicSparse", self.seed, at.step, at.gradients)
        flatness = [torch.where(m, g.abs(), -1.0) for m, g in zip(masks, at.gradients, strict=True)]
        stay = _largest(flatness, kept - number)
        come = _largest([torch.where(m, -1.0, c) for m, c in zip(masks, chance, strict=True)], number)
        return [s | c for s, c in zip(stay, come, strict=True)]


@dataclass(frozen=True)
class Stochastic(Modifier):
    """Climb with a random share of the weights at each step (ESAM's SWP): e = m * e(rule) / beta, P(m_i = 1) = beta.

    So e is the rule's on average, and longer than rho. The draw depends on the seed and the step alone, as
    :class:`~steppe.Randomly`'s.

    The authors' code draws whole tensors, and what makes it cheaper, leaves them out of the next first pass, and so of
    the norm; ``whole=True`` draws so and has the rule see the chosen tensors only, but both passes are whole. ESAM's
    other half, the selection of samples, is a matter of the closure.

    >>> import steppe
    >>> w, g = torch.zeros(6), torch.ones(6)
    >>> rule = Stochastic(steppe.LInf(), beta=0.5)
    >>> direction, scale = rule(Point([w], [g], rho=[0.05], base_state=[{}], step=0))
    >>> scale * direction[0]
    tensor([0., 0., 0., 2., 0., 2.])

    Source: Du et al., Efficient Sharpness-aware Minimization for Improved Training of Neural Networks, arXiv
    2110.03141, and its official code.
    """

    paper: ClassVar[papers.Paper] = papers.ESAM

    rule: Perturbation
    """The perturbation to thin out."""
    beta: float = 0.6
    """beta, the probability of each weight to climb; the authors' examples have 0.5 and 0.6."""
    seed: int = 0
    """What makes the draws of two runs differ."""
    whole: bool = False
    """Whether a tensor climbs as a whole or not at all."""

    def __post_init__(self) -> None:
        _check_climbs(self.rule, "Stochastic")
        if not 0 < self.beta <= 1:
            raise ValueError(
                f"beta must be more than 0 and at most 1, got {self.beta}: it is each weight's probability to climb"
            )

    def __call__(self, at: Point) -> Ascent:
        """Return the rule's climb, thinned out."""
        if self.whole:
            chances = [draws.key("Stochastic", self.seed, at.step, i) / 2**64 for i in range(len(at.parameters))]
            chosen = [i for i, chance in enumerate(chances) if chance < self.beta]
            climb = _restricted(self.rule, at, chosen)
        else:
            chance = draws.uniform("Stochastic", self.seed, at.step, at.weights)
            climb = _masked(self.rule(at), [c < self.beta for c in chance])
        return Ascent(climb.direction, climb.scale / self.beta)


def norm_layers(model: nn.Module) -> list[Tensor]:
    """The parameters of a model's normalisation layers, for :class:`Only` (SAM-ON).

    Batch, instance, layer, group and RMS norm count, in all their forms.

    >>> len(norm_layers(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
    2

    Source: Mueller et al., Normalization Layers Are All That Sharpness-Aware Minimization Needs, arXiv 2306.04226.
    """
    return [p for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(recurse=False)]


def layers(model: nn.Module, *patterns: str) -> list[Tensor]:
    """The parameters of the modules whose names match a pattern, for :class:`Only`.

    Names are those of ``model.named_modules()``; ``*`` stands for any characters, dots included. A module comes with
    all that it contains.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()))
    >>> len(layers(model, "0")), len(layers(model, "1", "1.*"))
    (2, 1)
    """
    if not patterns:
        raise ValueError('no pattern, so no layer: give names of modules, such as "encoder.*"')
    chosen = set()
    for pattern in patterns:
        found = {p for name, module in model.named_modules() if fnmatchcase(name, pattern) for p in module.parameters()}
        if not found:
            names = ", ".join(name for name, module in _owners(model))
            raise ValueError(
                f"no module with parameters is called {pattern!r}: this model has {names or 'none at all'}"
            )
        chosen |= found
    return [p for p in model.parameters() if p in chosen]


def last_layers(model: nn.Module, k: int) -> list[Tensor]:
    """The parameters of the last k modules that have parameters of their own, for :class:`Only`.

    They count in the order in which the model lists them, which is as a rule that of the forward pass.

    >>> len(last_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), 1))
    2
    """
    owners = _owners(model)
    if not 1 <= k <= len(owners):
        raise ValueError(f"k must be between 1 and {len(owners)}, the number of layers with parameters, got {k}")
    return list(dict.fromkeys(p for _, module in owners[-k:] for p in module.parameters(recurse=False)))


def _owners(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]


def _restricted(rule: Perturbation, at: Point, inside: Sequence[int]) -> Ascent:
    """The climb of a rule that sees some of the parameters only, given by their positions."""
    if not inside:
        return Ascent([None] * len(at.parameters))
    direction, scale = rule(at.restricted(inside))
    where = dict(zip(inside, direction, strict=True))
    return Ascent([where.get(i) for i in range(len(at.parameters))], scale)


def _masked(climb: Ascent, masks: Sequence[Tensor | None]) -> Ascent:
    pairs = zip(climb.direction, masks, strict=True)
    return Ascent([d if d is None or m is None else d * m.to(d.device) for d, m in pairs], climb.scale)


def _masks(memory: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The masks in memory; a checkpoint gives them back in the dtype of the parameter."""
    for own in memory:
        own["mask"] = own["mask"].bool()
    return [own["mask"] for own in memory]


def _remember(at: Point, memory: Sequence[dict[str, Tensor]], masks: Sequence[Tensor]) -> None:
    """Keep new masks; those before stay where g is not finite, and the step will be skipped."""
    before = [own.get("mask", mask).bool() for own, mask in zip(memory, masks, strict=True)]
    for own, mask in zip(memory, where_finite(at.gradient_norm, masks, before), strict=True):
        own["mask"] = mask


def _kept(tensors: Sequence[Tensor], sparsity: float) -> int:
    """How many coordinates climb."""
    n = sum(t.numel() for t in tensors)
    return min(n, max(1, n - round(n * sparsity)))


def _largest(scores: Sequence[Tensor], number: int) -> list[Tensor]:
    """Masks of the largest scores of all tensors together: exactly so many, whatever is equal.

    Sharded scores are gathered for it: every rank holds them all for a moment.
    """
    home = scores[0].device
    line = torch.cat([whole(s).reshape(-1).to(home) for s in scores])
    top = line.topk(number, sorted=False).indices
    mask = torch.zeros_like(line, dtype=torch.bool).scatter_(0, top, True)
    parts = torch.split(mask, [s.numel() for s in scores])
    return [part_of(part.reshape(s.shape).to(s.device), s) for part, s in zip(parts, scores, strict=True)]


def _is_due(at: Point, every: int) -> bool:
    """Whether a new mask is to be chosen: once a step, however many climbs that has."""
    return at.step % every == 0 and at.climbed is None


def _check_climbs(rule: Perturbation, modifier: str) -> None:
    if climbs(rule) > 1:
        raise ValueError(
            f"{rule} climbs {climbs(rule)} times, and would be thinned out anew at each: turn them round, as in "
            f"Steps({modifier}(L2()))"
        )


def _check_sparse(rule: Perturbation, sparsity: float, every: int, modifier: str) -> None:
    _check_climbs(rule, modifier)
    if not needs_gradient(rule):
        raise ValueError(f"{rule} needs no gradient at w, and there is none then to choose a mask by: take Stochastic")
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity must be at least 0 and less than 1, got {sparsity}: it is the share of coordinates that stay"
        )
    if every < 1:
        raise ValueError(f"every must be 1 or more, got {every}: the mask is chosen anew after so many steps")
