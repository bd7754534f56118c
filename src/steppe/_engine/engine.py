"""The delicate part of a step: climb from w, come back, and make ``.grad`` what goes down."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe._engine.callers import warn
from steppe._engine.displacement import Displacement
from steppe._engine.distributed import Ranks
from steppe._engine.gradients import Gradients
from steppe._engine.rounding import add_scaled_stochastically_, arrived, is_half
from steppe._engine.side_effects import Protection
from steppe._engine.state_dict import RHO, parameters, take_from_base
from steppe._tensors.dtensor import local
from steppe.rules import (
    Cadence,
    Combination,
    Memory,
    Perturbation,
    Point,
    ScaledDirection,
    ascent_steps,
    needs_gradient,
    scale_free,
)

_T = TypeVar("_T")
_MUCH_OF_A_CLIMB = 0.9


class LazySequence(Sequence[_T]):
    """A sequence that is made when somebody looks at it: most rules look at neither radii nor states."""

    def __init__(self, make: Callable[[], Sequence[_T]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Sequence[_T]:
        return self._make()

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | Sequence[_T]:
        return self._made[index]

    def __len__(self) -> int:
        return len(self._made)


class Engine:
    """What happens to weights, gradients and surroundings within one step; when, is for the caller to know."""

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module | None,
        *,
        replay_rng: bool,
        per_rank: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        self._base = base
        self._displacement = Displacement()
        self._perturbed_parameters: list[Tensor] | None = None
        self._ascent: ScaledDirection | None = None
        self._clean: list[Tensor] = []
        self.gradients = Gradients(base)
        self.protect(model, replay_rng=replay_rng, per_rank=per_rank)
        self.memory: Memory = {}
        """What the rules keep from step to step."""
        self._rounding_checked = False
        self.stochastic_rounding = stochastic_rounding
        """Whether half-precision weights are rounded up or down at random when they climb."""
        self.scale: Tensor | None = None
        """What a loss scaler has multiplied the gradients of this step by."""
        self.steps = 0
        """How many steps were taken."""
        self.take_from_base()

    def protect(self, model: nn.Module | None, *, replay_rng: bool, per_rank: bool = False) -> None:
        """Look after what a second pass must leave alone; again when the base has got more parameters."""
        owned = list(parameters(self._base))
        self.ranks = Ranks(model, owned, per_rank=per_rank)
        self.protection = Protection(model, owned, replay_rng=replay_rng)

    def take_from_base(self) -> None:
        """Take memory and step counter from a checkpoint that was loaded into the base."""
        self.memory, self.steps = take_from_base(self._base)

    def point(self, members: list[Tensor] | None = None, gradients: list[Tensor] | None = None) -> Point:
        """Where we stand; by default, with every parameter that has a gradient."""
        if members is None:
            members, held = self.gradients.held()
            gradients = held if gradients is None else gradients
        return Point(
            parameters=members,
            gradients=self.gradients.of(members) if gradients is None else gradients,
            rho=LazySequence(partial(self._radii, members)),
            base_state=LazySequence(partial(self._states, members)),
            step=self.steps,
            memory=self.memory,
            anchor=next(parameters(self._base), None),
        )

    def _radii(self, members: Sequence[Tensor]) -> list[float | Tensor]:
        rho = {id(p): group[RHO] for group in self._base.param_groups for p in group["params"]}
        return [rho[id(p)] for p in members]

    def _states(self, members: Sequence[Tensor]) -> list[Mapping[str, Any]]:
        return [self._base.state.get(p, {}) for p in members]

    @torch.no_grad()
    def point_after_first_pass(self) -> Point:
        """Where we stand after the first pass, for a rule that is to say where to climb."""
        members = self.ranks.holders(self.gradients.holders(), list(parameters(self._base)))
        self.gradients.fill(members)
        return replace(self.point(members), memory=self.ranks.memory(self.memory))

    def point_before_passes(self) -> Point:
        """Where we stand before any pass: with every trainable parameter, and no gradients."""
        members = dict.fromkeys(p for p in parameters(self._base) if p.requires_grad)
        return self.point(list(members), [])

    @torch.no_grad()
    def empty_memory(self, perturbation: Perturbation, combination: Combination, cadence: Cadence) -> Memory:
        """What these rules keep from step to step, as they make it of gradients that are zero."""
        point = self.point_before_passes()
        zeros = [torch.zeros_like(w) for w in point.weights]
        point = replace(point, gradients=zeros, step=0, memory={})
        cadence(point)
        perturbation(point)
        combination(point, zeros)
        return point.memory

    def point_of_step(self) -> Point:
        """Where we stand for a rule that looks at nothing but the step's number."""
        return Point([], [], rho=[], base_state=[], step=self.steps)

    @torch.no_grad()
    def unscaled_view(self, rule: Perturbation | Cadence, point: Point) -> Point:
        """The same point for a rule that depends on the size of the gradients: without the loss scale."""
        if self.scale is None or scale_free(rule) or not point.gradients:
            return point
        return replace(point, gradients=_times(point.gradients, self.scale.reciprocal()))

    @torch.no_grad()
    def point_after_ascent_step(self) -> Point:
        """Where we stand after the pass at w + e, when a further climb is to come: with those who climbed before."""
        climbers, climbed = self._perturbed_parameters or [], self._ascent
        self.gradients.fill(climbers)
        return replace(self.point(climbers), ascent_so_far=climbed, memory=self.ranks.memory(self.memory))

    @torch.no_grad()
    def perturb(self, point: Point, perturbation: Perturbation, *, keep_unperturbed: bool, ahead: bool = False) -> None:
        """Move the weights to w + e, and begin the pass there: the step's first one if ``ahead``, or a further one.

        If anything raises on the way, come back.
        """
        further = self._perturbed_parameters is not None
        if not further:
            self._perturbed_parameters, self._ascent = list(point.parameters), None
            self._clean = [g.clone() for g in point.gradients] if keep_unperturbed else []
        try:
            if not ahead:
                finite = self.gradients.note(self.ranks.all(point.gradient_norm.isfinite()), further=further)
                self.protection.second_pass()
                if finite.is_cpu and not finite:
                    return  # this step will be skipped: no rule is to remember such a gradient
            if point.parameters:
                self.move(point, perturbation)
                self.ranks.mean_(self._clean if not further else [])
        except BaseException:
            self.restore()
            raise
        self.moved()

    def move(self, point: Point, perturbation: Perturbation) -> None:
        """Move the weights to w + e(at)."""
        direction, scale = ascent = perturbation(self.unscaled_view(perturbation, point))
        if ascent_steps(perturbation) > 1:
            self._ascent = ascent
        along = {id(p): d for p, d in zip(point.parameters, direction, strict=True) if d is not None}
        follows_gradient = needs_gradient(perturbation)  # what the base remembers is turned round by it already
        for group in self._base.param_groups:
            members = [p for p in group["params"] if id(p) in along]
            length = group[RHO] * scale * (-1 if follows_gradient and group.get("maximize", False) else 1)
            alpha = length if isinstance(length, Tensor) else point.gradient_norm.new_full((), length)
            self.displace(members, alpha, [along[id(p)] for p in members])
        self._rounding_checked = True

    def displace(self, members: Sequence[Tensor], alpha: Tensor, direction: Sequence[Tensor]) -> None:
        """Move some weights by alpha * direction, until :meth:`restore`."""
        if not self.stochastic_rounding:
            self._displacement.move(members, alpha, direction)
            if not self._rounding_checked:
                self._check_rounding(members, alpha, direction)
        else:
            add = partial(add_scaled_stochastically_, step=self.steps)
            self._displacement.move(members, alpha, direction, add=add)

    def _check_rounding(self, members: Sequence[Tensor], alpha: Tensor, direction: Sequence[Tensor]) -> None:
        """Say so, once, if much of a climb rounds to nothing; only half-precision weights are looked at."""
        halves = [i for i, p in enumerate(members) if is_half(p)]
        if not halves:
            return
        self._rounding_checked = True
        weights = [members[i] for i in halves]
        before, along = self._displacement.before(weights), [direction[i] for i in halves]
        share = float(arrived([local(w) for w in weights], before, alpha, along))
        if share < _MUCH_OF_A_CLIMB:
            warn(
                f"of the climb, only {share:.0%} arrives in {weights[0].dtype} weights: the rest is smaller than their "
                "last bit and rounds to nothing, so SAM acts with a smaller radius than rho. Keep the weights in "
                "float32 and train under torch.autocast; or give SAM stochastic_rounding=True, with which all of it "
                "arrives on average"
            )

    @torch.no_grad()
    def unscaled(self) -> None:
        """Note that somebody has taken the loss scale out of ``.grad``; take it out of what is kept of g, too."""
        if self.scale is not None:
            self._clean = _times(self._clean, self.scale.reciprocal())
        self.scale = None

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the weights back to w, and end the second pass; without a climb before, do nothing."""
        self._displacement.restore()
        self.protection.end()
        self.moved()

    def moved(self) -> None:
        """Drop copies of the weights that others have made, or the next pass would run on them."""
        torch.clear_autocast_cache()  # the casts of an open autocast region
        self.ranks.moved()

    def abort(self) -> None:
        """Come back, and forget the step."""
        self.restore()
        self._perturbed_parameters, self._ascent, self._clean = None, None, []

    @torch.no_grad()
    def combine(self, combination: Combination) -> None:
        """Make ``.grad`` what goes down."""
        climbers, self._perturbed_parameters, self._ascent = self._perturbed_parameters, None, None
        perturbed: list[Tensor] | None = None
        if climbers is None:
            point = self.point()
        elif combination.needs_unperturbed_gradient:
            self.gradients.fill(climbers)
            point, perturbed = self.point(climbers, self._clean), self.gradients.of(climbers)
        else:
            members, perturbed = self.gradients.held()
            point = self.point(members, [])
        targets = point.gradients if perturbed is None else perturbed
        if self.scale is None or scale_free(combination):
            down = combination(point, perturbed)
        else:
            unscaled = perturbed if perturbed is None else _times(perturbed, self.scale.reciprocal())
            point = replace(point, gradients=_times(point.gradients, self.scale.reciprocal()))
            down = _times(combination(point, unscaled), self.scale)
        self.gradients.write(targets, down)
        self._clean = []


def _times(gradients: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Copies of the gradients times a 0-dim tensor."""
    return [g * factor.to(g.device) for g in gradients]
