"""Perturb with a mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steppe.rules.ops import shard_like, where_finite, whole
from steppe.rules.protocols import Perturbation, Point, ScaledDirection, ascent_steps, needs_gradient
from steppe.rules.subsets import Modifier


@dataclass(frozen=True, eq=False)
class Masked(Modifier):
    """Climb with some of the coordinates only: e = m * e(rule), entry by entry, for masks m that stay as they are.

    The rule does not know of the masks: rho is its radius before the masking. Parameters without a mask climb with all
    their coordinates; :class:`ParameterSubset` leaves parameters out.

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

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the rule's climb, masked."""
        masks = [self.masks.get(p) for p in point.parameters]
        pairs = zip(point.parameters, masks, strict=True)
        return masked(self.rule(point), [m if m is None or not p.is_complex() else m.unsqueeze(-1) for p, m in pairs])


def masked(climb: ScaledDirection, masks: Sequence[Tensor | None]) -> ScaledDirection:
    pairs = zip(climb.direction, masks, strict=True)
    return ScaledDirection([d if d is None or m is None else d * m.to(d.device) for d, m in pairs], climb.scale)


def masks_of(memory: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The masks in memory; a checkpoint gives them back in the dtype of the parameter."""
    for own in memory:
        own["mask"] = own["mask"].bool()
    return [own["mask"] for own in memory]


def remember(point: Point, memory: Sequence[dict[str, Tensor]], masks: Sequence[Tensor]) -> None:
    """Keep new masks; those before stay where g is not finite, and the step will be skipped."""
    before = [own.get("mask", mask).bool() for own, mask in zip(memory, masks, strict=True)]
    for own, mask in zip(memory, where_finite(point.gradient_norm, masks, before), strict=True):
        own["mask"] = mask


def num_kept(tensors: Sequence[Tensor], sparsity: float) -> int:
    """How many coordinates climb."""
    n = sum(t.numel() for t in tensors)
    return min(n, max(1, n - round(n * sparsity)))


def largest(scores: Sequence[Tensor], number: int) -> list[Tensor]:
    """Masks of the largest scores of all tensors together: exactly so many, whatever is equal.

    Sharded scores are gathered for it: every rank holds them all for a moment.
    """
    home = scores[0].device
    line = torch.cat([whole(s).reshape(-1).to(home) for s in scores])
    top = line.topk(number, sorted=False).indices
    mask = torch.zeros_like(line, dtype=torch.bool).scatter_(0, top, True)
    parts = torch.split(mask, [s.numel() for s in scores])
    return [shard_like(part.reshape(s.shape).to(s.device), s) for part, s in zip(parts, scores, strict=True)]


def is_due(point: Point, every: int) -> bool:
    """Whether a new mask is to be chosen: once a step, however many climbs that has."""
    return point.step % every == 0 and point.ascent_so_far is None


def check_single_ascent_step(rule: Perturbation, modifier: str) -> None:
    if ascent_steps(rule) > 1:
        raise ValueError(
            f"{rule} climbs {ascent_steps(rule)} times, and would be thinned out anew at each: turn them round, as in "
            f"AscentSteps({modifier}(L2()))"
        )


def check_sparse(rule: Perturbation, sparsity: float, every: int, modifier: str) -> None:
    check_single_ascent_step(rule, modifier)
    if not needs_gradient(rule):
        raise ValueError(f"{rule} needs no gradient at w, and there is none then to choose a mask by: take Stochastic")
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity must be at least 0 and less than 1, got {sparsity}: it is the share of coordinates that stay"
        )
    if every < 1:
        raise ValueError(f"every must be 1 or more, got {every}: the mask is chosen anew after so many steps")
