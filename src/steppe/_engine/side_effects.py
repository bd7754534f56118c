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
from steppe._engine.model_state import LARGE, ModelState
from steppe._engine.outside import OutsideWatch
from steppe._engine.registrations import Registrations
from steppe._tensors.dtensor import all_plain
from steppe._tensors.in_place import write_marks

_device = attrgetter("device")


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


class ForwardWrites:
    """Notices a first pass that writes the optimizer's own parameters.

    If these have a gradient, the pass initializes them from its data. It cannot be repeated from the state in which it
    started: it would initialize the weights again, over w + e. If they have none, they are a state of the model (a
    codebook), though ``nn.Embedding`` makes them like weights.
    """

    def __init__(self, owned: Iterable[Tensor]) -> None:
        self._owned = list(owned)
        self._trained = self._owned
        self._marks: list[tuple[int, int]] = []
        self._values: list[Tensor] = []
        self._few = False
        self._first = True
        self._ever_written: set[int] = set()
        self._found: list[Tensor] = []
        """The parameters without a gradient that a first pass has written."""
        self._without_gradient: list[Tensor] = []
        """Those that never had a gradient: a later pass may write them, and `p.data.copy_(...)` would leave no mark."""
        self.new_states: list[tuple[Tensor, Tensor]] = []
        """Those that were found in this step, with their values before it."""

    @property
    def states(self) -> list[Tensor]:
        """The parameters that are, or may be, states of the model."""
        return [*self._found, *self._without_gradient]

    @torch.no_grad()
    def begin(self) -> None:
        """Begin the first pass."""
        self._trained = [p for p in self._owned if p.requires_grad]  # the others are a part of the model's state
        self._marks = write_marks(self._trained)
        # `p.data.copy_(...)` leaves no mark; it is searched for in the first step only, which pays for it
        self._values = []
        if self._first and all_plain(self._trained) and not any(p.is_meta for p in self._trained):
            self._few = sum(map(Tensor.numel, self._trained)) <= LARGE
            self._values = self._current_values()
        self.new_states = []

    @torch.no_grad()
    def end(self, *, may_initialize: Callable[[], bool]) -> bool:
        """End the first pass; return True if it has initialized parameters."""
        marks = zip(self._trained, self._marks, write_marks(self._trained), strict=True) if self._marks else ()
        marked = {id(p) for p, before, now in marks if before != now}
        trained = {id(p) for p in self._trained if p.grad is not None}
        written = (marked & trained) - self._ever_written
        searched = set() if written or not self._values or not may_initialize() else trained
        changed = marked | self._changed(searched | (set(map(id, self._trained)) - trained))
        self._find_states(changed - trained - set(map(id, self.states)))
        self._follow_gradients()
        self._ever_written |= marked
        self._values, self._marks, self._first = [], [], False
        return bool(written or changed & searched)

    def _changed(self, searched: set[int]) -> set[int]:
        """Return those of the parameters whose values have changed, as far as they are known."""
        if not self._values or not searched:
            return set()
        now = self._trained if self._few else self._current_values()  # the values before are copies, or norms
        compared = zip(self._trained, self._values, now, strict=True)
        return {id(p) for p, before, value in compared if id(p) in searched and not torch.equal(before, value)}

    def _find_states(self, found: set[int]) -> None:
        values = self._values if self._few and self._values else repeat(None)
        pairs = [(p, value) for p, value in zip(self._trained, values, strict=False) if id(p) in found]
        self._found += [p for p, _ in pairs]
        self.new_states = [(p, value) for p, value in pairs if value is not None and value.shape == p.shape]

    def _follow_gradients(self) -> None:
        """Drop the parameters that have a gradient now from those that never had one."""
        if not self._first and not self._without_gradient:
            return
        found = set(map(id, self._found))
        candidates = self._trained if self._first else self._without_gradient
        without = [p for p in candidates if p.grad is None and id(p) not in found]
        few = all_plain(without) and sum(map(Tensor.numel, without)) <= LARGE
        self._without_gradient = without if few else []

    def _current_values(self) -> list[Tensor]:
        """Return copies of the parameters, or only their norms if these are large."""
        if self._few:
            return [p.detach().clone() for p in self._trained]
        return list(torch._foreach_norm(self._trained)) if self._trained else []


def _devices_of(model: nn.Module | None) -> set[torch.device]:
    """Return the devices on which the forward of a model may draw random numbers."""
    if model is None:
        return set()
    replicas = (m for m in model.modules() if isinstance(m, nn.DataParallel))
    replicated = {torch.device(m.src_device_obj.type, i) for m in replicas for i in m.device_ids}
    return replicated | set(map(_device, (*model.parameters(), *model.buffers())))


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
        self._module, self._owned, self._replay_rng = model, owned, replay_rng
        self._generators: Generators | None = None
        self._devices: set[torch.device] = set()
        self._states_before: dict[str | torch.device, Any] | None = None
        self._states_after: dict[str | torch.device, Any] | None = None
        self._model = _ModelProtection(model, owned, generators=replay_rng) if model is not None else None
        self._watch: OutsideWatch | None = OutsideWatch(model, owned)  # of the first step only
        self._in_second_pass = False
        self._in_step = False
        _live_instances.add(self)

    def begin_first_pass(self, displaced: Iterable[Tensor] = ()) -> None:
        """Save the state from which the first pass starts.

        Args:
            displaced: The optimizer's parameters that are not at w; their values now are no state of the model.
        """
        self._in_step = True
        self._save_generators()
        if self._model is not None:
            self._model.begin_first_pass(displaced)
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
        if not self._replay_rng:
            return
        devices = set(map(_device, self._owned))
        if self._generators is None or devices != self._devices:  # the model may be moved after the optimizer is made
            self._devices, self._generators = devices, Generators(devices | _devices_of(self._module))
        self._states_before = self._generators.save()

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
            self._model.end_step()

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
        self._writes = ForwardWrites(owned)
        self._initialized = False
        self._in_first_pass = False
        self._by_passes = False
        """True if this step, or the one before, is made by passes(); False in the classic API."""
        self._registered: Registrations | None = None
        self._stop_expecting: Callable[[], None] | None = None
        self._module_ids: set[int] = set()
        self._written_late: list[Tensor] = []
        self._displaced: set[int] = set()
        """The parameters that are displaced in the first pass: w is what the second one starts from."""

    def _save_states_of(self, model: nn.Module) -> None:
        self._before = ModelState(model, self._owned, generators=self._generators)
        self._after = ModelState(model, self._owned, generators=self._generators)
        self._after.share_writes(self._before)

    def protect_also(self, modules: list[nn.Module]) -> None:
        """Protect further modules."""
        self.model = nn.ModuleList([self.model, *modules])
        self._save_states_of(self.model)

    def begin_first_pass(self, displaced: Iterable[Tensor]) -> None:
        self._stop()
        self._by_passes = True
        self._begin(displaced=displaced)

    def expect_first_pass(self, *, in_step: bool) -> bool:
        """Begin the first pass at the next forward; return False if none is expected.

        None is after a step by passes(), which probably is followed by another one.
        """
        self._stop()
        self._before.discard()
        by_passes, self._by_passes = self._by_passes, False
        if by_passes or not in_step:
            return False
        if may_watch_forwards():
            # listed now: functional_call() replaces the parameters before it calls the module
            self._registered = self._before.registered_now()
            self._module_ids = set(map(id, self._registered.modules))
            self._stop_expecting = watch_forwards(self._before_forward)
        return True

    def _before_forward(self, module: nn.Module) -> None:
        # without a graph, it is no pass: an evaluation between two steps
        if torch.is_grad_enabled() and id(module) in self._module_ids:
            self._stop()
            self._begin(self._registered)

    def _begin(self, registered: Registrations | None = None, displaced: Iterable[Tensor] = ()) -> None:
        self._displaced = set(map(id, displaced))
        states = [p for p in self._writes.states if id(p) not in self._displaced]
        self._before.save(registered=registered, states=states)
        self._writes.begin()
        self._initialized, self._in_first_pass = False, True

    def end_first_pass(self) -> None:
        self._stop()
        if self._in_first_pass:
            self._in_first_pass = False
            self._initialized = self._writes.end(may_initialize=self._before.own_modules_changed)

    def save_after(self) -> None:
        self._written_late += self._before.find_writes()
        self._after.save(like=self._before, states=self._writes.states)
        self._untrained_gradients.save(self._after.untrained)

    def restore_before(self) -> None:
        # In the classic API, the forward that was taken for the first pass may belong to a step of another optimizer.
        outdated = not self._by_passes and self._before.another_optimizer_stepped()
        if not self._initialized and not outdated:
            self._before.leave_out_trained()
            self._before.restore(now=self._after)
            for p, value in self._writes.new_states:
                if id(p) not in self._displaced:
                    p.copy_(value)
        self._untrained_gradients.clear()

    def restore_after(self) -> None:
        self._after.restore()
        self._untrained_gradients.restore()

    def end_step(self) -> None:
        """Forget the state before the step, which is no other step's; warn of what was found in it."""
        self._before.discard()
        self._before.release_graphs()
        self._after.release_graphs()
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
