"""Run a closure once a pass: a closure that calls backward, or one that only returns the loss."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steppe._engine.cuda_graphs import is_capturing
from steppe._engine.engine import Engine
from steppe._engine.gradients import is_nonzero
from steppe._engine.losses import find_loss
from steppe._engine.model_state import is_writable
from steppe._engine.passes import Pass
from steppe._tensors.dtensor import all_plain
from steppe._tensors.graph import derivatives, graph, keeps_saved_tensors
from steppe._tensors.in_place import real_views
from steppe._tensors.reductions import dot, norm

Closure: TypeAlias = Callable[[], Any]

_TOLERANCE = 1e-2
"""How far the cosine of two gradients of one loss may be from 1, in half precision."""


def check_closure(closure: object) -> None:
    """Refuse a loss, or anything else that cannot be run once a pass.

    Raises:
        TypeError: Says what to write.
    """
    if not callable(closure):
        raise TypeError(
            f"step() got a {type(closure).__name__}, and needs a closure: a function that runs the forward and returns "
            "the loss. SAM calls it once a pass, with other weights, and runs the backward. Write "
            "optimizer.step(lambda: criterion(model(x), y))"
        )


def run_closure(closure: Closure, passes: Iterable[Pass], engine: Engine, backward: Callable[[Tensor], None]) -> Any:
    """Call the closure once a pass; return the loss of the first, detached where the backward was run here.

    Args:
        closure: The user's closure.
        passes: The passes of a step.
        engine: The engine of the optimizer.
        backward: Runs the backward of a loss, scaled if there is a loss scaler.
    """
    try:
        return _run_passes(closure, passes, engine, backward)
    except BaseException:
        engine.gradients.mark_left_by_failure()
        raise


def _run_passes(closure: Closure, passes: Iterable[Pass], engine: Engine, backward: Callable[[Tensor], None]) -> Any:
    first: Any = None
    reuse = GraphReuse(engine)
    earlier = engine.gradients.accumulated_earlier()
    around = list(_outer_tensors(closure))
    inputs = InputGradients(around, engine)
    writes = None if engine.closure_watched else InPlaceWrites(around)
    for sam_pass in passes:
        with sam_pass, torch.enable_grad():
            if sam_pass.is_first:
                engine.gradients.restore_earlier(earlier)  # for the closure to clear, as with any optimizer
            else:
                inputs.begin_further_pass()
                if writes is not None:
                    writes.begin_further_pass(_outer_tensors(closure))
            value = closure()
            loss = differentiable_loss(value)
            reuse.check(loss)
            if loss is not None and not _ran_backward(loss, earlier, engine) and engine.trains(loss):
                engine.gradients.refuse_if_kept(earlier, left_by_step=False)
                engine.gradients.clear()
                _check_scalar(loss)
                _check_alone(loss, value)
                backward(loss)
                if value is loss:
                    value = loss.detach()
            else:
                engine.gradients.refuse_if_kept(earlier)
                if writes is not None and sam_pass.is_first and loss is not None:
                    _warn_of_another_gradient(loss, engine)
            earlier = {}
            sam_pass.record_loss(value)
            if sam_pass.is_first:
                first = value
                inputs.end_first_pass(_outer_tensors(closure))
            elif writes is not None:
                writes.check(engine)
                writes = None
    inputs.end()
    return first


class InputGradients:
    """Gives each pass the gradients of the closure's inputs with which the first one began.

    Inputs are all tensors around it that the optimizer does not train. Adversarial training steps along their
    gradients; where a step is one pass, the inputs are new in each, so that loops do not clear these.

    Args:
        around: The tensors around the closure before the first pass.
        engine: The engine of the optimizer.
    """

    def __init__(self, around: Iterable[tuple[str, Tensor]], engine: Engine) -> None:
        self._engine = engine
        self._leaves: dict[int, Tensor] = {}
        self._after: dict[int, Tensor] = {}
        self._add(around)
        self._before = {key: gradient.clone() for key, gradient in self._gradients().items()}

    def _add(self, around: Iterable[tuple[str, Tensor]]) -> None:
        self._leaves.update((id(t), t) for _, t in around if t.is_leaf)

    def _gradients(self) -> dict[int, Tensor]:
        """Return the gradients that inputs have now, by the id of the input."""
        found = {key: gradient for key, t in self._leaves.items() if (gradient := t.grad) is not None}
        if found:  # seldom; only then the optimizer's own tensors are looked up
            for key in found.keys() & self._engine.owned_ids():
                del found[key]
        return found

    def end_first_pass(self, around: Iterable[tuple[str, Tensor]]) -> None:
        """Keep the gradients that the first pass has left, also of inputs that it has made."""
        self._add(around)
        self._after = self._gradients()

    def begin_further_pass(self) -> None:
        """Restore the gradients with which the first pass began."""
        self._restore({key: gradient.clone() for key, gradient in self._before.items()})

    def end(self) -> None:
        """Restore the gradients that the first pass has left."""
        self._restore(self._after)

    def _restore(self, gradients: dict[int, Tensor]) -> None:
        for key in self._gradients().keys() | gradients.keys():
            self._leaves[key].grad = gradients.get(key)


class GraphReuse:
    """Refuses a pass whose graph was made before it: the gradient would be that at w, or at another pass's weights."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loss: Tensor | None = None
        self._nodes: set[Any] = set()

    def check(self, loss: Tensor | None) -> None:
        """Compare the loss of a pass with those of the passes before; their whole graphs in the first step only.

        Raises:
            RuntimeError: A part of the graph that leads to a parameter is that of an earlier pass.
        """
        if loss is None:
            return
        if loss is self._loss or (self._nodes and self._engine.uses_again(loss, self._nodes)):
            raise RuntimeError(
                "the graph of the loss was made before this pass, by a forward outside of the closure or with weights "
                "cached outside of it: the gradient is not that at w + e. Run the whole forward inside the closure"
            )
        self._loss = loss
        if not self._engine.closure_watched:
            self._nodes.update(graph(loss.grad_fn))


def differentiable_loss(value: Any) -> Tensor | None:
    """Return the loss that a closure returned (:func:`find_loss`); None if there is none, or if it has no graph."""
    loss = find_loss(value)
    return loss if isinstance(loss, Tensor) and loss.grad_fn is not None else None


def _check_scalar(loss: Tensor) -> None:
    if loss.numel() != 1:
        raise RuntimeError(
            f"the closure made no gradient and returned a tensor of shape {tuple(loss.shape)}, which is no loss: "
            "return the mean loss, and SAM runs its backward; or call backward in the closure"
        )


def _check_alone(loss: Tensor, value: Any) -> None:
    """Refuse several losses in a list or tuple; terms of the first one may follow it, such as for a log."""
    if not isinstance(value, tuple | list):
        return
    others = [t for t in value[1:] if isinstance(t, Tensor) and t.dim() == 0 and t.grad_fn is not None]
    if others and not {t.grad_fn for t in others} <= {loss.grad_fn, *graph(loss.grad_fn)}:
        raise RuntimeError(
            f"the closure made no gradient and returned {1 + len(others)} losses, and SAM would train the first one "
            "only: return their sum, or call backward in the closure; where the others are values for a log, return "
            "them detached"
        )


def _ran_backward(loss: Tensor, earlier: dict[Tensor, Tensor], engine: Engine) -> bool:
    """True if a closure has made a gradient. Zeros are none where another backward was cleared to them."""
    if not engine.gradients.changed_since(earlier):
        return engine.ranks.holds_unreduced_gradients()
    # first what is quick: a gradient that nothing has written in place was not set to zero
    if engine.gradients.any_unwritten() or engine.ranks.sharded or not keeps_saved_tensors(loss.grad_fn):
        return True
    return any(map(is_nonzero, engine.gradients.parameters_and_gradients()[1]))


def _warn_of_another_gradient(loss: Tensor, engine: Engine) -> None:
    """Warn once if the gradient that a closure has made is not that of the loss which it returned."""
    if loss.numel() != 1 or not keeps_saved_tensors(loss.grad_fn):
        return
    parameters = [p for p in engine.gradients.parameters() if p.requires_grad]
    made = engine.gradients.views(parameters)
    if not made or not all_plain(made) or made[0].is_meta or is_capturing(made[0]):
        return
    # loss.backward(retain_graph=True) has left the graph, too, and this gradient or a multiple of it
    own = real_views(derivatives(loss, parameters, retain_graph=True))
    if dot(own, made) < (1 - _TOLERANCE) * norm(own) * norm(made):
        engine.warn_once(
            "another gradient",
            "the closure ran a backward, and returned a loss of which it was not: the step follows the gradient that "
            "this backward made (of an attack, a penalty, ...), and the returned loss trains nothing. SAM runs the "
            "backward of a returned loss only where the closure has left no gradient. Call zero_grad() after the other "
            "backward, or take its gradient by torch.autograd.grad(); or call backward() of the whole loss",
        )


# What a closure changes in place: the input of a pass would be that which the pass before has left.


class InPlaceWrites:
    """Notices that a pass changes its inputs in place, and leaves other values than the one before.

    Writes that each pass repeats exactly (noise of a generator that is replayed, a copy of the batch) change nothing.
    Tensors that the first pass has written are copied, so this is for the first step only.

    Args:
        around: The tensors around the closure before the first pass.
        function: What reads them in each pass, for the warning.
    """

    def __init__(self, around: Iterable[tuple[str, Tensor]], function: str = "the closure") -> None:
        self._function = function
        self._versions = {name: (t, t._version) for name, t in around if _is_watched(t)}
        self._left: list[tuple[str, Tensor, int, Tensor | None]] = []

    def begin_further_pass(self, around: Iterable[tuple[str, Tensor]]) -> None:
        """Keep what the pass before has left, before the next one."""
        self._left = []
        for name, t in around:
            if _is_watched(t):
                before, version = self._versions.get(name, (None, 0))
                is_written = (before is not t or version != t._version) and is_writable(t) and all_plain([t])
                self._left.append((name, t, t._version, t.detach().clone() if is_written else None))

    def check(self, engine: Engine) -> None:
        """Warn once if the second pass has left another value than the first."""
        engine.closure_watched = True
        written = [(name, t, value) for name, t, version, value in self._left if t._version != version]
        changed = [name for name, t, value in written if value is None or not _is_same(t.detach(), value)]
        if changed:
            engine.warn_once(
                "in place",
                f"{self._function} changes a tensor in place ({'; '.join(changed)}), and it runs once a pass: an input "
                "that is changed in place is another one in the second pass, and a sum is counted twice. Change a "
                "copy, or change it only where current_pass.is_first",
            )


def _is_watched(tensor: Tensor) -> bool:
    return not (tensor.requires_grad or isinstance(tensor, nn.Parameter) or is_lazy(tensor) or tensor.is_inference())


def _is_same(a: Tensor, b: Tensor) -> bool:
    """True if two tensors have the same values (NaN is the same as NaN), and where these cannot be read."""
    if a.is_meta or is_capturing(a):
        return True
    return a.shape == b.shape and (torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all()))


def _outer_tensors(closure: Callable[[], Any]) -> Iterable[tuple[str, Tensor]]:
    """Yield the tensors in the variables of a closure, and in attributes of objects in these (``self``).

    Both one level of lists, tuples and dicts deep. It is called in each step, and takes some microseconds.
    """
    for name, value in _outer_variables(closure):
        kind = _kind(type(value))
        if kind == _TENSOR:
            yield name, value
        elif kind == _ITEMS:
            yield from _items(name, value)
        elif kind != _OTHER:
            of_module = kind == _MODULE
            for attribute, held in _attributes(value):
                kind = _kind(type(held))
                if kind == _TENSOR:
                    # of a module, only inputs: SAM protects the rest of it
                    if not of_module or _may_be_input(held):
                        yield f"{name}.{attribute}", held
                elif kind == _ITEMS and held and not (of_module and attribute in _OF_MODULE):
                    found = _items(f"{name}.{attribute}", held)
                    yield from ((k, t) for k, t in found if not of_module or _may_be_input(t))


def _outer_variables(closure: Callable[[], Any]) -> Iterable[tuple[str, Any]]:
    """Yield the variables that a closure takes from outside, and those of the functions among them.

    A decorator, ``torch.compile`` or ``lambda: closure()`` has the closure itself in a variable.
    """
    left: list[Any] = [closure]
    seen: set[int] = set()
    while left and len(seen) < _MANY_FUNCTIONS:
        function = left.pop(0)
        if id(function) not in seen:
            seen.add(id(function))
            for name, value in _variables_of(function):
                if isinstance(value, _FUNCTIONS):
                    left.append(value)
                else:
                    yield name, value


def _variables_of(function: Callable[..., Any]) -> Iterable[tuple[str, Any]]:
    """Yield the variables that a function takes from outside; it may be a method, or an object that is called."""
    while isinstance(function, functools.partial):
        for value in (*function.args, *function.keywords.values()):
            yield "an argument", value
        function = function.func
    if not inspect.isroutine(function):
        yield "self", function
        yield from ((name, value) for name, value in _attributes(function) if isinstance(value, _FUNCTIONS))
        function = type(function).__call__
    if inspect.ismethod(function):
        yield "self", function.__self__
        function = function.__func__
    if not inspect.isfunction(function):
        return
    # not inspect.getclosurevars(), which takes a tenth of a millisecond
    code, outer = function.__code__, function.__globals__
    for name in code.co_names:
        # of functions only those of the same file, which may use its variables
        if name in outer and not (type(value := outer[name]) is FunctionType and value.__globals__ is not outer):
            yield name, value
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield "an argument", value


def _attributes(value: object) -> list[tuple[str, Any]]:
    return list(getattr(value, "__dict__", {}).items())


_TENSOR, _ITEMS, _MODULE, _OBJECT, _OTHER = range(5)


def _find_kind(of: type) -> int:
    """Return how tensors are found in values of a type."""
    return next((kind for kind, types in _TYPES.items() if issubclass(of, types)), _OBJECT)


_TYPES: dict[int, tuple[type, ...]] = {
    _TENSOR: (Tensor,),
    _ITEMS: (list, tuple, dict),
    _MODULE: (nn.Module,),
    _OTHER: (int, float, str, ModuleType, type, FunctionType, BuiltinFunctionType, torch.optim.Optimizer),
}
_kind: Callable[[Any], int] = functools.lru_cache(maxsize=1024)(_find_kind)
"""Kept for each type, because isinstance() takes longer where it looks for a tensor."""
_OF_MODULE = frozenset({"_parameters", "_modules"})
"""Attributes of a module in which there are no inputs."""
_MANY = 256
"""Of a longer list, tuple or dict (a log, a data set), only so many items are looked at."""
_FUNCTIONS = (FunctionType, MethodType, functools.partial)
_MANY_FUNCTIONS = 16
"""Number of functions in which variables are looked for: a closure, what it calls and what is around it."""


def _items(name: str, value: Any) -> Iterable[tuple[str, Tensor]]:
    items = list(itertools.islice(dict.values(value) if isinstance(value, dict) else value, _MANY))
    if any(_kind(of) == _TENSOR for of in set(map(type, items))):
        yield from ((f"{name}, number {i}", item) for i, item in enumerate(items) if _kind(type(item)) == _TENSOR)


def _may_be_input(tensor: Tensor) -> bool:
    return tensor.requires_grad and not isinstance(tensor, nn.Parameter)
