"""Protect the model's state, random generators and other parameters' gradients from the second pass."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat
from operator import attrgetter
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from steppe._engine.callers import warn
from steppe._engine.forwards import may_watch_forwards, watch_forwards
from steppe._engine.generators import Generators
from steppe._engine.model_state import ModelState
from steppe._engine.outside import OutsideWatch
from steppe._tensors.dtensor import all_plain

_version = attrgetter("_version")


@contextmanager
def frozen_stats(model: nn.Module) -> Iterator[None]:
    """Keep every buffer of ``model`` unchanged by the ``with`` block.

    Modules use batch statistics as their modes say. At the end of the block, also on an exception, their buffers are
    restored: running mean and variance, ``num_batches_tracked``, power iterations, ... So are numbers and tensors in
    attributes that a forward assigns. For code that drives its own second pass; :class:`steppe.SAM` with ``model=``
    needs no such care.

    Args:
        model: The module whose buffers are kept.

    Example:
        >>> bn = torch.nn.BatchNorm1d(2)
        >>> with frozen_stats(bn):
        ...     _ = bn(torch.randn(8, 2))
        >>> bn.num_batches_tracked
        tensor(0)
    """
    state = ModelState(model, model.parameters(), generators=False)
    state.save()
    try:
        yield
    finally:
        state.restore()


class UntrainedGradients:
    """Gradients of parameters that this optimizer does not train; a second pass must not add to them."""

    def __init__(self) -> None:
        self._gradients: list[tuple[Tensor, Tensor | None]] = []

    def save(self, parameters: Iterable[Tensor]) -> None:
        """Save the current gradients of these parameters."""
        self._gradients = [(p, p.grad) for p in parameters]

    def clear(self) -> None:
        """Clear them, so that the second pass makes gradients of its own."""
        for p, _ in self._gradients:
            p.grad = None

    def restore(self) -> None:
        """Restore the gradients of :meth:`save`."""
        for p, gradient in self._gradients:
            p.grad = gradient
        self._gradients = []


class Initialization:
    """Notices a first pass that writes the optimizer's own parameters: it initializes them from its data.

    Such a pass cannot be repeated from the state in which it started: it would initialize the weights again, over
    w + e.
    """

    def __init__(self, owned: Iterable[Tensor]) -> None:
        self._owned = list(owned)
        self._trained = self._owned
        self._marks: list[tuple[int, int]] = []
        self._norms: list[Tensor] = []
        self._first = True
        self._ever_written: set[int] = set()

    @torch.no_grad()
    def begin(self) -> None:
        """Begin the first pass."""
        self._trained = [p for p in self._owned if p.requires_grad]  # the others are a part of the model's state
        self._marks = self._current_marks()
        # `p.data.copy_(...)` leaves no mark. An initialization comes in the first step, so only that one pays for norms
        self._norms = self._current_norms() if self._first else []

    def end(self, *, may_initialize: Callable[[], bool]) -> bool:
        """End the first pass; return True if it has initialized parameters."""
        marks = zip(self._trained, self._marks, self._current_marks(), strict=True) if self._marks else ()
        written = {id(p) for p, before, now in marks if before != now} - self._ever_written
        self._ever_written |= written
        norms, self._norms, self._marks, self._first = self._norms, [], [], False
        if not written and norms and may_initialize():
            return any(not torch.equal(a, b) for a, b in zip(norms, self._current_norms(), strict=True))
        return bool(written)

    def _current_marks(self) -> list[tuple[int, int]]:
        trained = self._trained
        addresses = map(Tensor.data_ptr, trained) if all_plain(trained) else repeat(0)
        return list(zip(map(_version, trained), addresses, strict=False))

    @torch.no_grad()
    def _current_norms(self) -> list[Tensor]:
        return list(torch._foreach_norm(self._trained)) if self._trained and all_plain(self._trained) else []


_live_instances: "WeakSet[SideEffects]" = WeakSet()


class SideEffects:
    """Gives two passes the side effects of one ordinary pass.

    The second pass starts from the generator states and the state of the model from which the first one started, so
    that it evaluates the same function at w + e. After it, both are what the first pass left.

    Args:
        model: The module that the passes run, or None.
        owned: The optimizer's parameters.
        replay_rng: Replay the generators.
    """

    def __init__(self, model: nn.Module | None, owned: Iterable[Tensor], *, replay_rng: bool) -> None:
        owned = list(owned)
        self._generators = Generators(p.device for p in owned) if replay_rng else None
        self._states_before: dict[str | torch.device, Any] | None = None
        self._states_after: dict[str | torch.device, Any] | None = None
        self._model = _ModelProtection(model, owned, generators=replay_rng) if model is not None else None
        self._watch: OutsideWatch | None = OutsideWatch(model, owned)  # of the first step only
        self._in_second_pass = False
        self._in_step = False
        _live_instances.add(self)

    def begin_first_pass(self) -> None:
        """Save the state from which the first pass starts."""
        self._in_step = True
        self._save_generators()
        if self._model is not None:
            self._model.begin_first_pass()
        if self._watch is not None:
            self._watch.begin_first_pass()

    def expect_first_pass(self, *, in_step: bool = True) -> None:
        """Save the generators, and the model when its next forward begins: the classic API has no call there.

        Args:
            in_step: False after a step. Then only the generators are saved: the next forward may come much later, or
                belong to another optimizer's step.
        """
        self._in_step = in_step
        self._save_generators()
        if self._model is not None and self._model.expect_first_pass(in_step=in_step) and self._watch is not None:
            self._watch.begin_first_pass()

    def _save_generators(self) -> None:
        self._states_before = self._generators.save() if self._generators is not None else None

    def end_first_pass(self) -> None:
        """End the first pass, before its weights change; without one, do nothing."""
        if self._watch is not None and not self._in_second_pass:
            self._watch.stop()
        if self._model is not None:
            self._model.end_first_pass()

    def begin_second_pass(self) -> None:
        """Save the state in which the first pass ended, and restore the one from which it started."""
        self.end_first_pass()
        if self._generators is not None:
            self._states_after = self._generators.save()
        if self._model is not None:
            self._model.save_after()
        self._in_second_pass = True  # set before anything is changed: end_second_pass() undoes an interrupt below, too
        if self._watch is not None and not self._watch.ended:
            self._watch.begin_second_pass(self._modules_of_other_optimizers())
        if self._generators is not None and self._states_before is not None:
            self._generators.restore(self._states_before)
        if self._model is not None:
            self._model.restore_before()

    def end_second_pass(self) -> None:
        """Restore the state in which the first pass ended; without a second pass, do nothing."""
        if self._in_second_pass:
            self._restore_after()
            self._in_second_pass = False

    @torch.no_grad()
    def _restore_after(self) -> None:
        if self._watch is not None and not self._watch.ended:
            self._watch.end(self._modules_of_other_optimizers())
        if self._generators is not None and self._states_after is not None:
            self._generators.restore(self._states_after)
        if self._model is not None:
            self._model.restore_after()

    def end_step(self) -> None:
        """End the step at w, and warn once of what its passes did to the rest of the program."""
        self._in_step = False
        watch = self._watch
        if watch is not None and watch.ended:
            self._watch = None
            if self._model is not None and watch.found:
                self._model.protect_also(watch.found)
            watch.warn()
        if self._model is not None:
            self._model.warn()

    def _modules_of_other_optimizers(self) -> set[int]:
        """Return the modules of other optimizers of this package that are in a step at this time."""
        optimizers = [
            other for other in _live_instances if other is not self and other._in_step and other._model is not None
        ]
        return {id(m) for other in optimizers if other._model is not None for m in other._model.model.modules()}


class _ModelProtection:
    """Protects a model from the second pass: its states before and after the first pass, and untrained gradients."""

    def __init__(self, model: nn.Module, owned: list[Tensor], *, generators: bool) -> None:
        self.model = model
        self._owned, self._generators = owned, generators
        self._save_states_of(model)
        self._untrained_gradients = UntrainedGradients()
        self._initialization = Initialization(owned)
        self._initialized = False
        self._in_first_pass = False
        self._has_passes = False  # set by passes(); before, the first pass may be one of the classic API
        self._stop_expecting: Callable[[], None] | None = None
        self._module_ids: set[int] = set()
        self._written_late: list[Tensor] = []

    def _save_states_of(self, model: nn.Module) -> None:
        self._before = ModelState(model, self._owned, generators=self._generators)
        self._after = ModelState(model, self._owned, generators=self._generators)
        self._after.share_writes(self._before)

    def protect_also(self, modules: list[nn.Module]) -> None:
        """Protect further modules."""
        self.model = nn.ModuleList([self.model, *modules])
        self._save_states_of(self.model)

    def begin_first_pass(self) -> None:
        self._stop()
        self._has_passes = True
        self._begin()

    def expect_first_pass(self, *, in_step: bool) -> bool:
        """Begin the first pass at the next forward; return False if this optimizer is stepped by passes()."""
        self._stop()
        if self._has_passes:
            return False
        self._before.discard()
        if not in_step:
            return False
        if may_watch_forwards():
            self._module_ids = set(map(id, self.model.modules()))
            self._stop_expecting = watch_forwards(self._before_forward)
        return True

    def _before_forward(self, module: nn.Module) -> None:
        # without a graph, it is no pass: an evaluation between two steps
        if torch.is_grad_enabled() and id(module) in self._module_ids:
            self._stop()
            self._begin()

    def _begin(self) -> None:
        self._before.save()
        self._initialization.begin()
        self._initialized, self._in_first_pass = False, True

    def end_first_pass(self) -> None:
        self._stop()
        if self._in_first_pass:
            self._in_first_pass = False
            self._initialized = self._initialization.end(may_initialize=self._before.own_modules_changed)

    def save_after(self) -> None:
        self._written_late += self._before.find_writes()
        self._after.save(like=self._before)
        self._untrained_gradients.save(self._after.untrained)

    def restore_before(self) -> None:
        # In the classic API, the forward that was taken for the first pass may belong to a step of another optimizer.
        outdated = not self._has_passes and self._before.another_optimizer_stepped()
        if not self._initialized and not outdated:
            self._before.restore(now=self._after)
        self._untrained_gradients.clear()

    def restore_after(self) -> None:
        self._after.restore()
        self._untrained_gradients.restore()

    def warn(self) -> None:
        written, self._written_late = self._written_late, []
        if written:
            warn(
                f"the forward writes to {len(written)} parameters that this optimizer does not train, and they are "
                "copied from now on. They were not copied in this step, because model= holds more such parameters than "
                "this optimizer trains: its second pass began with the values that the first one left"
            )

    def _stop(self) -> None:
        stop, self._stop_expecting = self._stop_expecting, None
        if stop is not None:
            stop()
