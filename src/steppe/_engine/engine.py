"""Perturb the weights, restore them, and write the update gradient to ``.grad``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from steppe._engine.base_hook import call_before_step
from steppe._engine.callers import warn
from steppe._engine.dependence import depends_on, uses_again
from steppe._engine.displacement import Displacement, write
from steppe._engine.distributed import Ranks, refuse_uneven_inputs
from steppe._engine.gradients import Gradients
from steppe._engine.groups import RHO, parameters_of, trained_parameters
from steppe._engine.lazy_sequence import LazySequence
from steppe._engine.micro_batches import MicroBatches
from steppe._engine.pass_gradients import PassGradients
from steppe._engine.recorder import Recorder
from steppe._engine.registrations import same_objects
from steppe._engine.rounding import MIN_SURVIVING_SHARE, add_scaled_stochastically_, is_half, surviving_share
from steppe._engine.side_effects import SideEffects
from steppe._engine.stage import Stage
from steppe._engine.state_dict import holds_sam_state, take_from_base
from steppe._tensors.cached_weights import drop_cached_weights
from steppe._tensors.dtensor import all_plain, local
from steppe.rules import (
    Cadence,
    Combination,
    Memory,
    Perturbation,
    PerturbedGradient,
    Point,
    ScaledDirection,
    ascent_steps,
    averages_memory,
    follows_gradient,
    scale_free,
)

Combine: TypeAlias = Callable[[Point, Sequence[Tensor] | None], Sequence[Tensor]]


class Engine:
    """Weights, gradients and side effects within one step. The optimizer decides which operation comes when."""

    def __init__(self, base: Optimizer, **options: Any) -> None:
        self._base = base
        self._owned: list[Tensor] = []
        self._displacement = Displacement()
        self.recorder = Recorder(base)
        self._perturbed_parameters: list[Tensor] | None = None
        self._ascent: ScaledDirection | None = None
        self._unperturbed_gradients: list[Tensor] = []
        self.stage = Stage.IDLE
        self.memory: Memory = {}
        """Tensors that the rules keep from step to step."""
        self.gradients = Gradients(base)
        self.pass_gradients = PassGradients(self.gradients)
        self.take_options(**options)
        self.micro_batches = MicroBatches()
        self.scale: Tensor | None = None
        """Loss scale by which the gradients of this step are multiplied; None without a loss scaler."""
        self.unscaled_by: tuple[Any, int] | None = None
        """The scaler that has unscaled the gradients last, and the number under which it knows the optimizer."""
        self.steps = 0
        """Number of steps taken."""
        self._counted = 0
        self.current_pass: Any = None
        """The latest pass that passes() has yielded."""
        self.loop: object = None
        """Identifies the loop over passes() that is running; None if none is."""
        self.closure_watched = False
        """True if the tensors around a closure have been checked for changes in place."""
        self.clearing_watched = False
        """True if a step of the classic API was checked for gradients that were not cleared between its passes."""
        self._warned: set[str] = set()
        self.load_from_base()
        call_before_step(base, self._refuse_foreign_step)

    def take_options(
        self, *, model: nn.Module | None, replay_rng: bool, per_rank: bool, stochastic_rounding: bool
    ) -> None:
        """Take the options of the optimizer, in the constructor and when one of them is assigned.

        Raises:
            TypeError, ValueError: As :class:`Ranks`; then nothing has changed.
        """
        is_incomplete = model is not None and not is_copied_whole(model)
        if is_incomplete:  # a copy of a module that holds its optimizer: copied first, it begins without the module
            model = None
        owned = list(parameters_of(self._base))
        ranks = Ranks(model, owned, per_rank=per_rank and not is_incomplete)  # first: it may raise
        self._replay_rng, self._per_rank = replay_rng, per_rank
        self._stochastic_rounding, self._rounding_checked = stochastic_rounding, False
        self.protect(model, ranks)
        if is_incomplete:
            self._owned = []  # as if the parameters were replaced: the next step looks at the module again

    def protect(self, model: nn.Module | None, ranks: Ranks | None = None) -> None:
        """Protect the model from side effects of the second pass; called again for another model or more parameters."""
        self._owned = owned = list(parameters_of(self._base))
        self._forget_others(set(map(id, owned)))
        self.recorder.watch(model)
        self.ranks = ranks or Ranks(model, owned, per_rank=self._per_rank)
        self.side_effects = SideEffects(model, owned, replay_rng=self._replay_rng)

    def _forget_others(self, kept: set[int]) -> None:
        """Forget what is kept of parameters that the base has no more; else it would keep them in memory for ever."""
        self._displacement.forget_others(kept)
        for of_rule in self.memory.values():
            for p in [p for p in of_rule if id(p) not in kept]:
                del of_rule[p]

    def follow_parameters(self, model: nn.Module | None) -> dict[Tensor, Tensor]:
        """Protect the model as :meth:`protect` does if the base's groups have other parameters than before.

        Returns:
            The parameters that others have replaced one by one, each with the one in its place.
        """
        before, now = self._owned, list(parameters_of(self._base))
        if same_objects(now, before):
            return {}
        self.protect(model)
        pairs = zip(before, now, strict=True) if len(before) == len(now) else ()
        known, kept = set(map(id, before)), set(map(id, now))
        return {old: new for old, new in pairs if id(old) not in kept and id(new) not in known}

    def load_from_base(self) -> None:
        """Load memory and step counter from a checkpoint of SAM that was loaded into the base, if there was one."""
        if holds_sam_state(self._base):
            self.memory, self.steps = take_from_base(self._base)

    # Points: the arguments of the rules.

    def point(
        self,
        parameters: list[Tensor] | None = None,
        gradients: list[Tensor] | None = None,
        *,
        memory: Memory | None = None,
    ) -> Point:
        """Return the current point; by default, of every parameter that has a gradient."""
        if parameters is None:
            parameters, found = self.gradients.parameters_and_gradients()
            gradients = found if gradients is None else gradients
        return Point(
            parameters=parameters,
            gradients=self.gradients.views(parameters) if gradients is None else gradients,
            rho=LazySequence(partial(self._radii, parameters)),
            base_state=LazySequence(partial(self._states, parameters)),
            step=self.steps,
            memory=self.memory if memory is None else memory,
            anchor=next(parameters_of(self._base), None),
            micro_batch=self.micro_batches.number,
        )

    def _radii(self, parameters: Sequence[Tensor]) -> list[float | Tensor]:
        rho = {id(p): group[RHO] for group in self._base.param_groups for p in group["params"]}
        return [rho[id(p)] for p in parameters]

    def _states(self, parameters: Sequence[Tensor]) -> list[Mapping[str, Any]]:
        return [self._base.state.get(p, {}) for p in parameters]

    @torch.no_grad()
    def point_after_first_pass(self) -> Point:
        """Return the point for a perturbation: w, with the gradient of the first pass."""
        here, gradients = self.gradients.parameters_and_gradients()
        parameters = self.ranks.with_gradient_anywhere(here, parameters_of(self._base))
        if parameters is not here:
            self.gradients.fill_missing(parameters)
            gradients = self.gradients.views(parameters)
        return self.point(parameters, gradients, memory=self.ranks.memory_of_perturbation(self.memory))

    @torch.no_grad()
    def point_after_ascent_step(self) -> Point:
        """Return the point for a further ascent step: w + e and its gradient, of the parameters that are perturbed."""
        parameters, ascent = self._perturbed_parameters or [], self._ascent
        self.gradients.fill_missing(parameters)
        memory = self.ranks.memory_of_perturbation(self.memory)
        return replace(self.point(parameters, memory=memory), ascent_so_far=ascent)

    def point_before_passes(self) -> Point:
        """Return the point before any pass: every trainable parameter, without gradients."""
        return self.point(trained_parameters(self._base), [])

    def point_of_step(self) -> Point:
        """Return a point for a cadence that reads only the step's number."""
        return Point([], [], rho=[], base_state=[], step=self.steps)

    def unscaled_view(self, rule: Perturbation | Cadence, point: Point) -> Point:
        """Return the point without loss scale and loss weight, for a rule that depends on the size of the gradients."""
        factor = self._hidden_factor(rule)
        if factor is None or not point.gradients:
            return point
        return replace(point, gradients=_times(point.gradients, 1 / factor))

    def _hidden_factor(self, rule: Perturbation | Combination | Cadence) -> Tensor | float | None:
        """Return loss scale times loss weight if a rule must see gradients without them; else None."""
        weight = self.micro_batches.loss_weight
        if weight is None:
            return None if scale_free(rule) else self.scale
        if scale_free(rule) and not averages_memory(rule):
            return None
        return weight if self.scale is None else self.scale * weight

    @torch.no_grad()
    def memory_template(self, perturbation: Perturbation, combination: Combination, cadence: Cadence) -> Memory:
        """Return the memory that these rules make of zero gradients: names and shapes of a later checkpoint."""
        point = self.zero_point()
        cadence(point)
        perturbation(point)
        combination(point, point.gradients)
        return point.memory

    def zero_point(self) -> Point:
        """Return the point before any step, of every trainable parameter, with gradients of zeros."""
        point = self.point_before_passes()
        return replace(point, gradients=[torch.zeros_like(w) for w in point.weights], step=0, memory={})

    def owned_ids(self) -> set[int]:
        """Return the ids of the base's parameters, which need not be an ``nn.Parameter``."""
        return set(map(id, parameters_of(self._base)))

    def frozen_parameters(self) -> list[Tensor]:
        """Return the base's parameters that are frozen now."""
        return [p for p in parameters_of(self._base) if not p.requires_grad]

    def trains(self, loss: Tensor) -> bool:
        """True if the loss depends on a parameter of the optimizer, or if that cannot be told (sharded parameters)."""
        return self.ranks.sharded or depends_on(loss, parameters_of(self._base))

    def uses_again(self, loss: Tensor, earlier: set[Any]) -> bool:
        """True if the graph of a loss leads to a parameter through a node of an earlier graph."""
        return uses_again(loss, earlier, parameters_of(self._base))

    # Perturb and restore.

    @torch.no_grad()
    def begin_perturbed_pass(
        self, point: Point, perturbation: Perturbation, *, keep_unperturbed: bool, single_pass: bool = False
    ) -> None:
        """Perturb the weights and begin the pass at w + e. If anything raises, restore the weights.

        Args:
            point: The point at which the perturbation is evaluated.
            perturbation: The rule.
            keep_unperturbed: Keep the gradient at w for the combination.
            single_pass: This is the step's only pass, so that no first pass has to be protected from it.
        """
        if single_pass and self.steps == 0 and any(map(is_lazy, point.parameters)):
            raise ValueError(
                "a lazy module has parameters without values, and this method perturbs the weights before the first "
                "forward: run one forward before the first step"
            )
        is_further_ascent = self._perturbed_parameters is not None
        if not is_further_ascent:
            self._perturbed_parameters, self._ascent = list(point.parameters), None
            self._unperturbed_gradients = [g.clone() for g in point.gradients] if keep_unperturbed else []
        try:
            if not single_pass:
                refuse_uneven_inputs(self._base)
                finite = self.ranks.all_true(point.gradient_norm.isfinite())
                finite = self.gradients.record_finite(finite, is_further_ascent=is_further_ascent)
                self.side_effects.begin_second_pass()
                if finite.is_cpu and not finite:
                    return  # the step will be skipped; a rule must not keep anything of this gradient
            if point.parameters:
                self.perturb(point, perturbation)
                self.recorder.perturbation(self.displaced, point.parameters, point.gradients)
                self.ranks.average_([] if is_further_ascent else self._unperturbed_gradients)
        except BaseException:
            self.restore()
            raise
        self.drop_cached_weights()
        if single_pass:
            self.watch_displaced()

    def begin_second_pass_at_w(self) -> None:
        """Begin a second pass without a perturbation: a caller of the classic API makes two passes in each step."""
        self.side_effects.begin_second_pass()
        self.drop_cached_weights()

    def watch_displaced(self) -> None:
        """Watch for what the forward of this step's first pass writes to the displaced weights."""
        self._displacement.watch(values=self.steps == 0)

    def perturb(self, point: Point, perturbation: Perturbation) -> None:
        """Displace the weights by e(point), until :meth:`restore`."""
        direction, scale = ascent = perturbation(self.unscaled_view(perturbation, point))
        if ascent_steps(perturbation) > 1:
            self._ascent = ascent
        # maximize flips the sign of gradients only: the base's momentum has it flipped already
        sign = -1 if follows_gradient(perturbation) else 1
        for group, parameters, along in self._by_group(point.parameters, direction):
            length = group[RHO] * scale * (sign if group.get("maximize", False) else 1)
            alpha = length if isinstance(length, Tensor) else point.gradient_norm.new_full((), length)
            self.displace(parameters, alpha, along)
        self._rounding_checked = True

    def _by_group(
        self, parameters: Sequence[Tensor], direction: Sequence[Tensor | None]
    ) -> Iterator[tuple[dict[str, Any], Sequence[Tensor], Sequence[Tensor]]]:
        """Yield each group with those of the parameters that it has and that are perturbed, and their directions."""
        groups = self._base.param_groups
        along = {id(p): d for p, d in zip(parameters, direction, strict=True) if d is not None}
        if len(groups) == 1 and len(along) == len(parameters):
            yield groups[0], parameters, list(along.values())
            return
        for group in groups:
            own = [p for p in group["params"] if id(p) in along]
            yield group, own, [along[id(p)] for p in own]

    def displace(self, parameters: Sequence[Tensor], alpha: Tensor, direction: Sequence[Tensor]) -> None:
        """Displace weights by alpha * direction, until :meth:`restore`."""
        if not self._stochastic_rounding:
            self._displacement.displace(parameters, alpha, direction)
            if not self._rounding_checked:
                self._check_rounding(parameters, alpha, direction)
        else:
            add = partial(add_scaled_stochastically_, step=self.steps)
            self._displacement.displace(parameters, alpha, direction, add=add)

    def _check_rounding(self, parameters: Sequence[Tensor], alpha: Tensor, direction: Sequence[Tensor]) -> None:
        """Warn once if much of a perturbation of half-precision weights rounds to nothing."""
        halves = [i for i, p in enumerate(parameters) if is_half(p)]
        if not halves:
            return
        self._rounding_checked = True
        weights = [parameters[i] for i in halves]
        before, along = self._displacement.saved(weights), [direction[i] for i in halves]
        share = float(surviving_share([local(w) for w in weights], before, alpha, along))
        if share < MIN_SURVIVING_SHARE:
            warn(
                f"only {share:.0%} of the perturbation survives rounding to {weights[0].dtype} weights: the rest is "
                "smaller than their last bit, so SAM acts with a smaller radius than rho. Keep the weights in float32 "
                "and train under torch.autocast, or give SAM stochastic_rounding=True, which keeps all of it on average"
            )

    def restore(self) -> None:
        """Restore the weights to w and end the second pass; without a perturbation, do nothing."""
        try:
            self._restore()
        except BaseException:
            self._restore()  # an interrupt came in the middle of it
            raise

    def _restore(self) -> None:
        if written := self._displacement.written():
            self.warn_once(
                "lost write",
                f"the forward writes to {written} of the weights that this optimizer trains (initialization from data, "
                "a norm that it limits, a codebook). With this method the first pass of a step is not at w, and the "
                "writes are lost when w is restored. Run one forward before the training, if the forward writes only "
                "once; write after the step instead; or take a method whose first pass is at w, such as steppe.SAM",
            )
        self.side_effects.end_first_pass()
        self._displacement.restore()
        self.side_effects.end_second_pass()
        self.drop_cached_weights()

    def displaced(self) -> list[tuple[Tensor, Tensor]]:
        """Return the displaced weights with copies of w, for a copy of the optimizer in the middle of a step."""
        return self._displacement.pairs()

    @contextmanager
    def weights_restored_on_exception(self) -> Iterator[None]:
        """Restore w if the block raises: a step from w that has several parts, after a perturbation."""
        copies, steps = self._displacement.latest_copies, self.gradients.base_steps
        stepped = {id(p): p for p in self.gradients.parameters()} if copies else {}
        unperturbed = [(p, local(p.detach()).clone()) for key, p in stepped.items() if key not in copies]
        try:
            yield
        except BaseException:
            write([*copies.values(), *unperturbed])
            self.gradients.base_steps = steps
            raise

    def write_unperturbed(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Write w into the weights of a copy, from what :meth:`displaced` of its original returned."""
        write(pairs)

    def drop_cached_weights(self) -> None:
        """Drop copies of the weights that torch has cached; the next pass would run on stale weights."""
        drop_cached_weights()
        self.ranks.drop_gathered_weights()

    def leave_loop(self) -> None:
        """Leave a loop over passes() before its end; of several micro-batches, the step goes on with the others."""
        is_running, is_left = self.micro_batches.is_running, self.loop is None
        self.abort()
        if is_running:
            self.gradients.leave_loop()
            self.stage = Stage.READY if self.micro_batches.number else Stage.INCOMPLETE
            self.micro_batches.leave_out(self.memory)
        elif not is_left:  # an interrupt came when the last pass was over
            self.gradients.mark_left_by_failure()
            self.stage = Stage.INCOMPLETE
        self.gradients.before_loop = None

    def abort(self) -> None:
        """Restore the weights and discard the step; a step that the base has taken already counts."""
        self.restore()
        self.gradients.end_observation()
        self.forget_perturbation()
        self.loop = None
        self.count_step()
        self.recorder.forget()

    def forget_perturbation(self) -> None:
        """Forget the perturbation of this step and its gradient at w."""
        self._perturbed_parameters, self._ascent, self._unperturbed_gradients = None, None, []
        self._displacement.latest_copies = {}

    def count_step(self) -> None:
        """Count a step, if the base has stepped since the last one that was counted."""
        taken, before = self.gradients.base_steps, self._counted
        self.steps, self._counted = self.steps + (taken != before), taken
        if taken != before:
            self.recorder.count_step()

    def has_warned(self, kind: str) -> bool:
        """True if :meth:`warn_once` has been called for this kind."""
        return kind in self._warned

    def warn_once(self, kind: str, message: str) -> None:
        """Warn, but only once for each kind of warning."""
        if kind not in self._warned:
            self._warned.add(kind)
            warn(message)

    def _refuse_foreign_step(self) -> None:
        """Refuse a step of the base in the middle of a step of SAM.

        Raises:
            RuntimeError: The weights are at w + e, or the passes of this step would be lost.
        """
        if self.gradients.stepping:
            return
        self.recorder.plain_steps += 1
        self.gradients.mark_left()
        if self.stage not in (Stage.IDLE, Stage.INCOMPLETE):
            raise RuntimeError(
                f"the base optimizer's step() was called {self.stage.value}: SAM would not restore the weights, count "
                "the step or use its update gradient. Call step() of SAM in its place (scaler.step(optimizer) with "
                "SAM's optimizer), or restore() to abort SAM's step first"
            )

    # The update gradient.

    @torch.no_grad()
    def unscale_unperturbed(self) -> None:
        """Record that a loss scaler has unscaled ``.grad``; unscale the kept gradient at w, too."""
        if self.scale is not None:
            self._unperturbed_gradients = _times(self._unperturbed_gradients, self.scale.reciprocal())
            self.recorder.unscale(self.scale)
        self.scale = None

    @torch.no_grad()
    def combine(self, combination: Combination, function: Combine | None = None) -> None:
        """Write the update gradient to ``.grad``, and discard the perturbation.

        Args:
            combination: The rule, whose attributes declare what it needs.
            function: Computes the update gradient; by default the combination itself.
        """
        if self.recorder.is_measuring():
            self.recorder.perturbed_gradient(*self.gradients.parameters_and_gradients())
        parameters, self._perturbed_parameters, self._ascent = self._perturbed_parameters, None, None
        takes_g_s = function is None and type(combination) is PerturbedGradient
        if takes_g_s and parameters is not None and self.gradients.known_to_be_finite and all_plain(parameters):
            # .grad is g_s, the update gradient (of sharded weights, it may still be a partial sum): nothing to write
            self.gradients.write([], [])
            self._unperturbed_gradients = []
            return
        function = function or combination
        perturbed: list[Tensor] | None = None
        if parameters is None:
            point = self.point()
        elif combination.needs_unperturbed_gradient:
            self.gradients.fill_missing(parameters)
            point, perturbed = self.point(parameters, self._unperturbed_gradients), self.gradients.views(parameters)
        else:
            parameters, perturbed = self.gradients.parameters_and_gradients()
            point = self.point(parameters, [])
        targets = point.gradients if perturbed is None else perturbed
        factor = self._hidden_factor(combination)
        if factor is None:
            update = function(point, perturbed)
        else:
            unscaled = perturbed if perturbed is None else _times(perturbed, 1 / factor)
            point = replace(point, gradients=_times(point.gradients, 1 / factor))
            update = _times(function(point, unscaled), factor)
        self.gradients.write(targets, update)
        self._unperturbed_gradients = []


def is_copied_whole(model: nn.Module) -> bool:
    """True unless a module in it is a copy without attributes: one that holds its optimizer gets them after it."""
    seen: set[int] = set()
    modules = [model]
    while modules:
        module = modules.pop()
        if "_modules" not in vars(module):
            return False
        if id(module) not in seen:
            seen.add(id(module))
            modules += [child for child in module._modules.values() if child is not None]
    return True


@torch.no_grad()
def _times(gradients: Sequence[Tensor], factor: Tensor | float) -> list[Tensor]:
    """Return copies of the gradients times a number or a 0-dim tensor."""
    return [g * (factor.to(g.device) if isinstance(factor, Tensor) else factor) for g in gradients]
