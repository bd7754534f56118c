"""The loops over passes() of one step, where each micro-batch has a perturbation of its own."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from steppe.rules import (
    Cadence,
    Combination,
    Memory,
    Perturbation,
    Point,
    averages_memory,
    needs_gradient,
    scale_free,
)

Rules: TypeAlias = tuple[Perturbation, Combination, Cadence]


class MicroBatches:
    """The micro-batches of the step so far.

    Each starts from the memory that the rules had before the step, and the memory after the step is the mean of theirs,
    weighted by ``loss_weight``. So their order has no effect, and a step of equal micro-batches is that of one of them.
    """

    def __init__(self) -> None:
        self.number = 0
        """The number of micro-batches of this step before the present one."""
        self.loss_weight: float | None = None
        """The factor of the losses of the present one; None if it was not given."""
        self.is_running = False
        """True until the present one has ended or failed."""
        self.left_out = False
        """True if a micro-batch of this step has failed."""
        self._keeps_gradients = False
        self._total_weight = 0.0
        self._before_step: Memory = {}
        self._mean: Memory = {}
        self._checked: tuple[object, ...] = ()

    def begin(self, memory: Memory, loss_weight: float | None, *, is_first: bool) -> None:
        """Begin a micro-batch, with the memory that the rules had before the step.

        Args:
            memory: The memory of the rules.
            loss_weight: The factor of the losses.
            is_first: True for the first one of a step, also for a step without micro-batches.

        Raises:
            ValueError: loss_weight is not a share.
            RuntimeError: loss_weight is missing for some micro-batches of the step.
        """
        if loss_weight is not None and not 0 < loss_weight <= 1:
            raise ValueError(
                f"loss_weight must be more than 0 and at most 1, got {loss_weight}: it is the factor by which the "
                "losses of this loop are multiplied, the micro-batch's share of the samples"
            )
        if not is_first and (loss_weight is None) != (self.loss_weight is None):
            raise RuntimeError(
                "loss_weight was given for some micro-batches of this step only. Give it in each loop over passes(), "
                "the first one included: the share of the micro-batch by which its loss is multiplied"
            )
        self.number = 0 if is_first else self.number + 1
        self.loss_weight, self.is_running = loss_weight, True
        if is_first:
            self.left_out, self._total_weight = False, 0.0
            self._before_step = {} if loss_weight is None else _copy(memory)
        elif self._before_step or memory:
            self._mean = _copy(memory)
            _write(memory, self._before_step)

    @torch.no_grad()
    def end(self, memory: Memory, *, keeps_gradients: bool = False) -> None:
        """End a micro-batch: make the memory the mean over the micro-batches so far.

        Args:
            memory: The memory of the rules.
            keeps_gradients: Its gradient was not averaged over the ranks.

        Raises:
            RuntimeError: Those of the step's other micro-batches were, or the other way round.
        """
        if self.number and keeps_gradients != self._keeps_gradients:
            raise RuntimeError(
                "passes(accumulate=True) ran some micro-batches of a step in no_sync() of DistributedDataParallel, and "
                "others not: each pass begins with cleared gradients, so that the last backward averages its own only, "
                "and the ranks would step differently. Leave no_sync() out (nor end a pass with a forward in "
                "no_grad() of some micro-batches only), or run all micro-batches inside each pass, all but the last "
                "one in no_sync()"
            )
        self._keeps_gradients, self.is_running = keeps_gradients, False
        if self.loss_weight is None:
            return
        before, self._total_weight = self._total_weight, self._total_weight + self.loss_weight
        mean, self._mean = self._mean, {}
        for rule, p, key, value in _tensors(memory):
            earlier = mean.get(rule, {}).get(p, {}).get(key)
            if earlier is not None:  # else this parameter had no gradient in the micro-batches before
                value.lerp_(earlier, before / self._total_weight)
        _add_missing(memory, mean)

    @torch.no_grad()
    def leave_out(self, memory: Memory) -> None:
        """Leave out a micro-batch that has failed: the memory is again that before it."""
        if self.number == 0 and self.loss_weight is None:  # no micro-batch, and no copy of the memory
            self.is_running = False
            return
        before, number = self._mean if self.number else self._before_step, max(self.number - 1, 0)
        _write(memory, before)
        _add_missing(memory, before)
        self.number, self._mean, self.left_out, self.is_running = number, {}, True, False  # no interrupt comes between

    def check(self, rules: Rules, zero_point: Callable[[], Point], loss_weight: float | None) -> None:
        """Refuse rules that cannot have a perturbation for each micro-batch.

        Args:
            rules: The optimizer's rules.
            zero_point: Returns a point with gradients of zeros.
            loss_weight: The factor of the losses; None if it was not given.

        Raises:
            RuntimeError: A rule has a memory that is no mean, or needs the factor of the losses.
        """
        checked = (*rules, loss_weight is None)
        if self._checked and all(a is b for a, b in zip(checked, self._checked, strict=True)):
            return
        keepers = _with_memory(rules, zero_point())
        for rule in keepers:
            if not averages_memory(rule):
                raise RuntimeError(
                    f"a perturbation for each micro-batch with {rule}: it keeps a memory from step to step, which the "
                    "micro-batches would change one after the other. Run all micro-batches inside each pass, so that "
                    "they share one perturbation"
                )
        sized = [rule for rule in rules if rule in keepers or (needs_gradient(rule) and not scale_free(rule))]
        if loss_weight is None and sized:
            raise RuntimeError(
                f"passes(accumulate=True) with {sized[0]}, which depends on the size of the gradients: a micro-batch's "
                "loss is multiplied by its share of the samples, and so is the gradient that this rule gets. Give that "
                "share in each loop, passes(accumulate=True, loss_weight=len(part) / len(batch))"
            )
        self._checked = checked


def _with_memory(rules: Rules, zero_point: Point) -> list[Perturbation | Combination | Cadence]:
    """Return the rules that keep something from step to step."""
    perturbation, combination, cadence = rules
    calls = (
        (perturbation, perturbation),
        (combination, lambda point: combination(point, point.gradients)),
        (cadence, cadence),
    )
    keepers: list[Perturbation | Combination | Cadence] = []
    for rule, call in calls:
        memory: Memory = {}
        call(replace(zero_point, memory=memory))
        if memory:
            keepers.append(rule)
    return keepers


def _tensors(memory: Memory) -> Iterator[tuple[str, Tensor, str, Tensor]]:
    for rule, of_rule in memory.items():
        for p, own in of_rule.items():
            for key, value in own.items():
                yield rule, p, key, value


def _copy(memory: Memory) -> Memory:
    copy: Memory = {}
    for rule, p, key, value in _tensors(memory):
        copy.setdefault(rule, {}).setdefault(p, {})[key] = value.clone()
    return copy


def _add_missing(memory: Memory, values: Memory) -> None:
    for rule, p, key, value in _tensors(values):
        memory.setdefault(rule, {}).setdefault(p, {}).setdefault(key, value)


def _write(memory: Memory, values: Memory) -> None:
    """Write values into a memory, in place where it has the tensors: a CUDA graph keeps their addresses."""
    for rule, p, key, value in list(_tensors(memory)):
        wanted = values.get(rule, {}).get(p, {}).get(key)
        if wanted is None:
            del memory[rule][p][key]
        else:
            value.copy_(wanted)
