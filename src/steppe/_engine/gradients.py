"""Read, write and validate the gradients of an optimizer's parameters."""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe._engine.callers import warn
from steppe._engine.groups import parameters_of
from steppe._tensors.dtensor import all_plain, foreach, local, reduced
from steppe._tensors.in_place import copy_, overlapping, real_views
from steppe._tensors.reductions import all_finite

# Attribute of a gradient: its version when the last step or zero_grad() left it, and True if that was a step. Without
# this mark, a gradient that was accumulated before step(closure) could not be told from the one that a step has left.
_LEFT = "_steppe_left"

# Attribute of a gradient that is observed through a second pass. To hold the gradient itself would keep its memory.
_OBSERVED = "_steppe_observed"

_STRIDED = frozenset({torch.strided})
_layout = attrgetter("layout")


class EarlierGradient:
    """Observes the gradient of one parameter until the next backward: zeros count as cleared, however made."""

    def __init__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.version = parameter.grad._version
        self.got_a_gradient = False
        """True if a backward has added to the gradient, be it zeros."""
        self._parameter = parameter
        self._nonzero = [is_nonzero(parameter.grad)]
        self._handles: list[Any] = []
        if parameter.requires_grad:
            # the first is called before the next backward adds to the gradient: the user's code may have set it to zero
            hooked: Any = parameter
            self._handles.append(hooked.register_hook(self._before_backward))
            self._handles.append(hooked.register_post_accumulate_grad_hook(self._after_backward))

    def _before_backward(self, _: Tensor) -> None:
        gradient = self._parameter.grad
        if len(self._nonzero) == 1 and gradient is not None:
            self._nonzero.append(is_nonzero(gradient))

    def _after_backward(self, _: Tensor) -> None:
        self.got_a_gradient = True

    def end(self) -> None:
        """End the observation."""
        for handle in self._handles:
            handle.remove()

    def was_nonzero(self) -> bool:
        """True if the gradient was not zero, neither at first nor before the backward; read on the host."""
        return all(map(bool, self._nonzero))

    def was_added_to(self) -> bool:
        """True if a backward has added to the gradient that :meth:`Gradients.observe` has marked, but not to zeros."""
        is_same = getattr(self._parameter.grad, _OBSERVED, False)
        return is_same and len(self._nonzero) > 1 and self.was_nonzero()


def is_nonzero(tensor: Tensor) -> Tensor:
    """Return a 0-dim tensor that is true unless every element of this rank's shard is zero."""
    return (local(tensor) != 0).any()


class Gradients:
    """The gradients of a base optimizer's parameters."""

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self._so_far_finite: Tensor | None = None
        self._was_cleared = False
        self._earlier: dict[Tensor, EarlierGradient] = {}
        self._restored: dict[Tensor, Tensor] = {}
        self.before_loop: dict[Tensor, Tensor] | None = None
        """Copies of the gradients to which the running loop over passes() adds; None if it adds to none."""
        self.skipped: Tensor | int = 0
        """Number of steps skipped because a gradient was not finite; a tensor on an accelerator."""
        self.base_steps = 0
        """Number of the base's steps."""
        self.stepping = False
        """True while this package steps the base."""

    def parameters(self) -> list[Tensor]:
        """Return the parameters that have a gradient, each once.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        return self.parameters_and_gradients()[0]

    def parameters_and_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters that have a gradient (:meth:`parameters`), and their gradients (:meth:`views`)."""
        parameters = [p for p in parameters_of(self._base) if p.grad is not None]
        if len(set(map(id, parameters))) < len(parameters):
            parameters = list({id(p): p for p in parameters}.values())
        gradients: list[Any] = [p.grad for p in parameters]
        if not _STRIDED.issuperset(map(_layout, gradients)):
            sparse = next(gradient for gradient in gradients if gradient.layout not in _STRIDED)
            raise RuntimeError(
                f"a parameter of shape {tuple(sparse.shape)} has a sparse gradient ({sparse.layout}), and a "
                "perturbation would have to move rows that have none. Use sparse=False (Embedding), or give this "
                "parameter to an optimizer of its own"
            )
        return parameters, _real_gradients(parameters, gradients)

    def views(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return gradients as real views of ``.grad``; those that are still partial sums over the ranks are reduced."""
        parameters = [p for p in parameters if p.grad is not None]
        return _real_gradients(parameters, [gradient for p in parameters if (gradient := p.grad) is not None])

    def any(self) -> bool:
        """True if any parameter has a gradient."""
        return any(p.grad is not None for p in parameters_of(self._base))

    def any_unwritten(self) -> bool:
        """True if any parameter has a gradient that was never written in place."""
        return any(p.grad is not None and p.grad._version == 0 for p in parameters_of(self._base))

    def fill_missing(self, parameters: Iterable[Tensor]) -> None:
        """Set the gradient of each parameter that has none to zeros."""
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)

    def clear(self) -> None:
        """Clear the gradients."""
        for p in parameters_of(self._base):  # not base.zero_grad(), which a base may override and a hook may watch
            p.grad = None

    def write(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Copy values into gradients, given as :meth:`views`; write NaN to one entry if an earlier pass was not finite.

        A loss scaler and :meth:`step_if_finite` read only ``.grad``, and skip the step because of that entry.
        """
        changed = [(t, v) for t, v in zip(targets, values, strict=True) if t is not v and not _is_same_view(t, v)]
        copy_([t for t, _ in changed], [v for _, v in changed])
        finite = None if self.known_to_be_finite else self._so_far_finite
        self._so_far_finite = None
        if finite is not None:
            skip_unless(finite, targets)

    @property
    def known_to_be_finite(self) -> bool:
        """True if the gradients before the last pass of this step were finite, and the host knows it."""
        finite = self._so_far_finite
        return finite is None or (finite.is_cpu and bool(finite))

    def record_finite(self, finite: Tensor, *, is_further_ascent: bool) -> Tensor:
        """Record if the gradient of a pass is finite; return True if those of this step so far are.

        Args:
            finite: A 0-dim bool tensor.
            is_further_ascent: True after a further ascent step of the same step.
        """
        if is_further_ascent and self._so_far_finite is not None:
            finite = finite & self._so_far_finite
        self._so_far_finite = finite
        return finite

    def copies(self) -> dict[Tensor, Tensor]:
        """Return a copy of each gradient, by parameter."""
        return {p: p.grad.clone() for p in self.parameters() if p.grad is not None}

    @torch.no_grad()
    def accumulate(self, values: dict[Tensor, Tensor]) -> None:
        """Add values to the gradients; a parameter without a gradient gets the value itself."""
        self.parameters_and_gradients()  # each gets a gradient of its own, or a shared one would be added to twice
        both = [(p.grad, v) for p, v in values.items() if p.grad is not None]
        foreach(torch._foreach_add_, [g for g, _ in both], [v for _, v in both])
        self.replace({p: v for p, v in values.items() if p.grad is None})

    def replace(self, values: dict[Tensor, Tensor]) -> None:
        """Make these tensors the ``.grad`` of their parameters."""
        for p, value in values.items():
            p.grad = value

    def leave_loop(self) -> None:
        """Leave a loop over passes() before its end: restore the gradients to which it adds."""
        if self.before_loop is None:
            self.mark_left_by_failure()
        else:
            self.clear()
            self.replace(self.before_loop)

    def clear_left(self) -> None:
        """Clear the gradients that nothing has changed since a step or a failure has left them."""
        for p in parameters_of(self._base):
            if p.grad is not None and getattr(p.grad, _LEFT, (None,))[0] == p.grad._version:
                p.grad = None

    # Gradients that were accumulated before step(closure): the second pass would lose them.

    def accumulated_earlier(self) -> dict[Tensor, Tensor]:
        """Return the gradients that were written since the last step, or since zero_grad() made them zero."""
        self._was_cleared, self._restored = False, {}
        return {
            p: p.grad
            for p in parameters_of(self._base)
            if p.grad is not None and getattr(p.grad, _LEFT, (None,))[0] != p.grad._version
        }

    def mark_cleared(self) -> None:
        """Record that the gradients were cleared through the optimizer."""
        self._was_cleared = True
        self.mark_left(by_step=False)  # zeros, if they were not set to None

    def restore_earlier(self, earlier: dict[Tensor, Tensor]) -> None:
        """Restore gradients of :meth:`accumulated_earlier` for a closure, and observe if it makes them zero."""
        self.replace(earlier)
        self._restored = earlier
        for p in earlier:
            self._earlier[p] = EarlierGradient(p)

    def observe(self) -> None:
        """Observe if the next backward adds to these gradients; for :meth:`were_added_to`."""
        for p in parameters_of(self._base):
            if p.grad is not None:
                self._earlier[p] = EarlierGradient(p)
                setattr(p.grad, _OBSERVED, True)

    def were_added_to(self) -> bool:
        """End the observation; return True if a backward has added to a gradient that nothing had cleared."""
        return any(one.was_added_to() for one in self.end_observation().values())

    def end_observation(self) -> dict[Tensor, EarlierGradient]:
        """Stop observing gradients, also those of a closure that has failed; return what was observed."""
        observed, self._earlier = self._earlier, {}
        for one in observed.values():
            one.end()
        return observed

    def changed_since(self, earlier: dict[Tensor, Tensor]) -> bool:
        """True if a backward ran, or if other values were written, since :meth:`restore_earlier`; zeros aside."""
        kept: list[Tensor] = []
        for p in parameters_of(self._base):
            if p.grad is not None and (p.grad is not earlier.get(p) or self._earlier[p].got_a_gradient):
                return True
            if p.grad is not None and p.grad._version != self._earlier[p].version:
                kept.append(p.grad)
        return bool(kept) and any(map(is_nonzero, kept))

    def refuse_if_kept(self, earlier: dict[Tensor, Tensor], *, left_by_step: bool = True) -> None:
        """Refuse a closure that adds to gradients accumulated before it.

        Args:
            earlier: The gradients of :meth:`accumulated_earlier`, which were restored before the closure.
            left_by_step: Refuse those that the last step has left and that were changed since, too.

        Raises:
            RuntimeError: The closure did not clear them, and they were not zero.
        """
        observed = self.end_observation()
        kept = [p for p, gradient in earlier.items() if p.grad is gradient]
        if not left_by_step:
            kept = [p for p in kept if not getattr(p.grad, _LEFT, (None, False))[1]]
        if self._was_cleared or not kept:
            return
        if any(p not in observed or observed[p].was_nonzero() for p in kept):
            raise RuntimeError(
                "the closure added to gradients that were accumulated before step(closure), and the second pass cannot "
                "repeat those micro-batches: the update gradient would be a mixture. Run all micro-batches inside the "
                "closure, or use passes(); if the old gradients are not wanted, call zero_grad() in the closure"
            )

    def mark_left(self, *, by_step: bool = True) -> None:
        """Record that the gradients are what a step has left, also a skipped one; or what zero_grad() has left."""
        for p in parameters_of(self._base):
            if (gradient := p.grad) is not None:
                setattr(gradient, _LEFT, (gradient._version, by_step))

    def mark_left_by_failure(self) -> None:
        """Record that the gradients are those of passes that failed, except those that were there before the closure.

        Half a backward is no gradient that the user has accumulated.
        """
        for p in parameters_of(self._base):
            if (gradient := p.grad) is not None and gradient is not self._restored.get(p):
                setattr(gradient, _LEFT, (gradient._version, True))

    # The base optimizer's step.

    def step_if_finite(self) -> bool:
        """Step the base unless a gradient is not finite.

        On a CPU the host decides. On an accelerator the device decides: by ``found_inf`` if the base supports it, else
        by zeroing the gradient.

        Returns:
            False if the host skipped the step.
        """
        _, gradients = self.parameters_and_gradients()
        finite = all_finite(gradients)
        if finite.device.type == "cpu":
            if not finite:
                self.skipped += 1
                warn(
                    "a step was skipped: its gradient was not finite (NaN or inf) in one of the passes, and would "
                    "have made the weights NaN. They and the optimizer state are unchanged; see skipped_steps",
                    RuntimeWarning,
                )
                self.mark_left()
                return False
            self._step()
        else:
            self._step_on_device(finite, gradients)
        self.mark_left()
        return True

    def _step(self) -> None:
        try:
            self.stepping = True
            self.base_steps += (self._base.step(), 1)[1]  # in one line: no interrupt comes between step and count
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                f"{type(self._base).__name__} cannot be the base: its step() differentiates the gradient once more "
                "(backward(create_graph=True)), and the weights were restored to w since the pass in which its graph "
                "was made. steppe.variants.sassha steps with an estimate of the Hessian's diagonal"
            ) from error
        finally:
            self.stepping = False

    def _step_on_device(self, finite: Tensor, gradients: Sequence[Tensor]) -> None:
        not_finite = finite.logical_not()
        if isinstance(self.skipped, int):
            self.skipped = torch.full_like(not_finite, self.skipped, dtype=torch.int64)
        self.skipped += not_finite
        # torch's private protocol between GradScaler and fused optimizers: they skip the step where found_inf is 1
        if not getattr(self._base, "_step_supports_amp_scaling", False):
            for g in gradients:
                local(g).masked_fill_(not_finite.to(g.device), 0.0)
            self._step()
            return
        try:
            self._base.grad_scale, self._base.found_inf = None, not_finite.float()  # type: ignore[attr-defined]
            self._step()
        finally:
            for name in ("grad_scale", "found_inf"):
                vars(self._base).pop(name, None)


def skip_unless(finite: Tensor, gradients: Sequence[Tensor]) -> None:
    """Write NaN to one gradient where a 0-dim bool tensor is false, so that the step is skipped without a host read."""
    index = smallest(gradients)
    if index is not None:
        shard = local(gradients[index])  # sharded tensors of torch 2.6 cannot be filled
        shard.masked_fill_(finite.logical_not().to(shard.device), float("nan"))


def smallest(gradients: Sequence[Tensor]) -> int | None:
    """Return the index of the smallest gradient that can hold a NaN: an empty one cannot. None if there is none."""
    return min((i for i, g in enumerate(gradients) if g.numel()), key=lambda i: gradients[i].numel(), default=None)


def unless_skipped(base: Optimizer, new: Sequence[Tensor], old: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the new values, or the old ones where the device has found the gradient of a base's step not finite.

    For a base with ``_step_supports_amp_scaling``, which reads ``found_inf`` itself.
    """
    found_inf = getattr(base, "found_inf", None)
    if found_inf is None:
        return new
    return [torch.where(found_inf.to(t.device) != 0, o, t) for t, o in zip(new, old, strict=True)]


def _real_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return real views of ``.grad``, such that writing to them writes to ``.grad`` of that parameter alone."""
    plain = gradients
    if not all_plain(gradients):
        gradients = [reduced(gradient) for gradient in gradients]
        for p, gradient in zip(parameters, gradients, strict=True):
            if p.grad is not gradient:
                p.grad = gradient
        plain = [gradient for gradient in gradients if all_plain([gradient])]
    return real_views(_with_own_memory(parameters, gradients, plain))


def _with_own_memory(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], plain: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return the gradients after each parameter whose plain one is not its own has got a copy as its ``.grad``.

    ``torch.autograd.grad`` returns one tensor for several parameters whose gradients are equal, and an expanded one for
    a sum. It and ``backward()`` return complex gradients that are conjugated only where they are read.
    """
    shared = {id(plain[i]) for i in overlapping(plain)}
    shared.update(id(g) for g in filter(Tensor.is_complex, plain) if g.is_conj() or g.is_neg())
    if not shared:
        return gradients
    with torch.enable_grad():  # a base may differentiate the gradient once more
        for p, gradient in zip(parameters, gradients, strict=True):
            if id(gradient) in shared and p.grad is gradient:
                value = gradient.resolve_conj().resolve_neg()
                p.grad = gradient.clone() if value is gradient else value
    return [own for p in parameters if (own := p.grad) is not None]


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    """True if two tensors are the same view of the same memory."""
    same_base = a._base is not None and a._base is b._base
    return same_base and a.shape == b.shape and a.storage_offset() == b.storage_offset()
