"""Perturb with a mask: constant masks, and the operations on masks that sparse methods share."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steppe._checks import check_below_one, check_count
from steppe.rules.modifier import Modifier
from steppe.rules.ops import full_tensor, shard_like, where_finite
from steppe.rules.protocols import Perturbation, Point, ScaledDirection, ascent_steps, needs_gradient


@dataclass(frozen=True, eq=False)
class Masked(Modifier):
    """Perturb some of the coordinates only: e = m * e(rule), entry by entry, for constant masks m.

    The rule is evaluated without the masks, so rho is its radius before masking. Parameters without a mask are
    perturbed in all coordinates; :class:`ParameterSubset` leaves parameters out.

    Example:
        >>> import steppe
        >>> w, g = torch.zeros(2), torch.tensor([3.0, 4.0])
        >>> rule = Masked(steppe.L2(), {w: torch.tensor([True, False])})
        >>> rule(Point([w], [g], rho=[0.05], base_state=[{}], step=0)).direction
        [tensor([3., 0.])]
    """

    rule: Perturbation
    """The perturbation to mask."""
    masks: Mapping[Tensor, Tensor] = field(repr=False)
    """For each parameter a bool tensor of its shape, preferably on its device: True where it is perturbed."""

    def __post_init__(self) -> None:
        for p, mask in self.masks.items():
            if mask.dtype != torch.bool or mask.shape != p.shape:
                raise ValueError(
                    f"the mask of a parameter must be a bool tensor of its shape {tuple(p.shape)}, got {mask.dtype} of "
                    f"shape {tuple(mask.shape)}: give one bool for each coordinate, True where it is perturbed"
                )
        object.__setattr__(self, "masks", dict(self.masks))

    def check_parameters(self, owned: Collection[Tensor]) -> None:
        """Raise ValueError if there is a mask for a parameter that the optimizer does not train."""
        own = set(owned)
        if foreign := sum(p not in own and p.requires_grad for p in self.masks):
            raise ValueError(
                f"{foreign} of the {len(self.masks)} masks are of parameters that are not in the optimizer, so that "
                "they would have no effect: take the parameters that the base optimizer got as keys"
            )

    def with_parameters(self, replaced: Mapping[Tensor, Tensor]) -> "Masked":
        """Return this rule for parameters that were put in the place of others, given by those that they replace.

        The masks are sharded as the new parameters are.
        """
        new = {p: replaced.get(p, p) for p in self.masks}
        return dataclasses.replace(self, masks={new[p]: shard_like(mask, new[p]) for p, mask in self.masks.items()})

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the rule's perturbation, masked."""
        masks = [self.masks.get(p) for p in point.parameters]
        pairs = zip(point.parameters, masks, strict=True)
        return apply_masks(
            self.rule(point), [m if m is None or not p.is_complex() else m.unsqueeze(-1) for p, m in pairs]
        )


def apply_masks(perturbation: ScaledDirection, masks: Sequence[Tensor | None]) -> ScaledDirection:
    """Multiply a direction by masks, entry by entry; None keeps all coordinates."""
    pairs = zip(perturbation.direction, masks, strict=True)
    return ScaledDirection([d if d is None or m is None else d * m.to(d.device) for d, m in pairs], perturbation.scale)


def stored_masks(memory: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """Return the masks in memory, as bool: loading a checkpoint casts state to the dtype of the parameter."""
    for own in memory:
        own["mask"] = own["mask"].bool()
    return [own["mask"] for own in memory]


def store_masks(point: Point, memory: Sequence[dict[str, Tensor]], masks: Sequence[Tensor]) -> None:
    """Store new masks, except where g is not finite: such a step is skipped and must not change the masks."""
    before = [own.get("mask", mask).bool() for own, mask in zip(memory, masks, strict=True)]
    for own, mask in zip(memory, where_finite(point.gradient_norm, masks, before), strict=True):
        own["mask"] = mask


def num_kept(tensors: Sequence[Tensor], sparsity: float) -> int:
    """Return the number of perturbed coordinates: the share 1 - sparsity of all, and at least one."""
    n = sum(t.numel() for t in tensors)
    return min(n, max(1, n - round(n * sparsity)))


def top_masks(scores: Sequence[Tensor], number: int) -> list[Tensor]:
    """Return masks of the ``number`` largest scores over all tensors together, exactly that many even with ties.

    Sharded scores are gathered: every rank holds all of them for a moment.
    """
    device = scores[0].device
    all_scores = torch.cat([full_tensor(s).reshape(-1).to(device) for s in scores])
    top = all_scores.topk(number, sorted=False).indices
    mask = torch.zeros_like(all_scores, dtype=torch.bool).scatter_(0, top, True)
    parts = torch.split(mask, [s.numel() for s in scores])
    return [shard_like(part.reshape(s.shape).to(s.device), s) for part, s in zip(parts, scores, strict=True)]


def is_due(point: Point, interval: int) -> bool:
    """Return True if a new mask is to be chosen: once per step, whatever its number of ascent steps."""
    return point.step % interval == 0 and point.ascent_so_far is None


def check_single_ascent_step(rule: Perturbation, modifier: str) -> None:
    """Raise ValueError if the rule makes several ascent steps, each of which would get another mask."""
    if ascent_steps(rule) > 1:
        raise ValueError(
            f"{rule} makes {ascent_steps(rule)} ascent steps, and {modifier} would choose other coordinates at each: "
            f"put it inside, as in AscentSteps({modifier}(L2()))"
        )


def check_sparse(rule: Perturbation, sparsity: float, interval: int, modifier: str) -> None:
    """Raise ValueError where a rule cannot be masked by its gradient, or a hyperparameter is out of range."""
    check_single_ascent_step(rule, modifier)
    if not needs_gradient(rule):
        raise ValueError(
            f"{rule} needs no gradient at w, so there is none to choose a mask by: use Stochastic, which draws one"
        )
    check_below_one("sparsity", sparsity, "the share of coordinates that are not perturbed")
    check_count("interval", interval, "the number of steps from one choice of the mask to the next")
