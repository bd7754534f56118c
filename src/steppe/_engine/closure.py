"""Run a closure once a pass: a closure that calls backward, or one that only returns the loss."""

import functools
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steppe._engine.engine import Engine
from steppe._engine.losses import find_loss
from steppe._engine.passes import Pass
from steppe._tensors.graph import graph

Closure: TypeAlias = Callable[[], Any]


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
    inputs = InputGradients(closure, engine)
    for sam_pass in passes:
        with sam_pass, torch.enable_grad():
            if sam_pass.is_first:
                engine.gradients.restore_earlier(earlier)  # for the closure to clear, as with any optimizer
            else:
                inputs.begin_further_pass()
            watched = {} if sam_pass.is_first or engine.closure_watched else _versions(closure)
            value = closure()
            loss = differentiable_loss(value)
            reuse.check(loss)
            if loss is not None and not engine.gradients.changed_since(earlier) and engine.trains(loss):
                engine.gradients.refuse_if_kept(earlier, left_by_step=False)
                engine.gradients.clear()
                _check_scalar(loss)
                _check_alone(loss, value)
                backward(loss)
                if value is loss:
                    value = loss.detach()
            else:
                engine.gradients.refuse_if_kept(earlier)
            earlier = {}
            sam_pass.record_loss(value)
            if sam_pass.is_first:
                first = value
                inputs.end_first_pass()
            else:
                _check_unchanged(watched, engine)
    inputs.end()
    return first


class InputGradients:
    """Gives each pass the gradients of the closure's inputs with which the first one began.

    Inputs are all tensors around it that the optimizer does not train. Adversarial training steps along their
    gradients; where a step is one pass, the inputs are new in each, so that loops do not clear these. They are searched
    for in the first step, and in later ones if it has found any.
    """

    def __init__(self, closure: Closure, engine: Engine) -> None:
        self._engine = engine
        self._before: list[tuple[Tensor, Tensor | None]] = []
        self._after: list[tuple[Tensor, Tensor | None]] = []
        if engine.inputs_have_gradients or not engine.closure_watched:
            found = {id(t): t for _, t in _outer_tensors(closure) if t.is_leaf}
            inputs = [found[key] for key in found.keys() - engine.owned_ids()]
            self._before = [(t, None if t.grad is None else t.grad.clone()) for t in inputs]

    def end_first_pass(self) -> None:
        """Keep the gradients that the first pass has left."""
        self._after = [(t, t.grad) for t, _ in self._before]
        self._engine.inputs_have_gradients |= any(gradient is not None for _, gradient in self._after)

    def begin_further_pass(self) -> None:
        """Restore the gradients with which the first pass began."""
        for t, gradient in self._before:
            t.grad = None if gradient is None else gradient.clone()

    def end(self) -> None:
        """Restore the gradients that the first pass has left."""
        for t, gradient in self._after:
            t.grad = gradient


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


# What a closure changes in place: the input of a pass would be that which the pass before has left.


def _versions(closure: Callable[[], Any]) -> dict[str, tuple[Tensor, int]]:
    """Return the tensors that a closure takes from outside, by name, with their versions."""
    return {
        name: (tensor, tensor._version)
        for name, tensor in _outer_tensors(closure)
        if not (tensor.requires_grad or isinstance(tensor, nn.Parameter) or is_lazy(tensor) or tensor.is_inference())
    }


def _outer_tensors(closure: Callable[[], Any]) -> Iterable[tuple[str, Tensor]]:
    """Yield the tensors in the variables of a closure, and in attributes of objects in these (``self``).

    Both one level of lists, tuples and dicts deep. A closure may be a method, or an object that is called.
    """
    while isinstance(closure, functools.partial):
        for value in (*closure.args, *closure.keywords.values()):
            yield from _tensors_in("an argument", value)
        closure = closure.func
    if not inspect.isroutine(closure):
        yield from _tensors_in("self", closure)
        closure = type(closure).__call__
    if inspect.ismethod(closure):
        yield from _tensors_in("self", closure.__self__)
        closure = closure.__func__
    if not inspect.isfunction(closure):
        return
    try:
        outer = inspect.getclosurevars(closure)
    except ValueError:  # a variable that has no value yet
        return
    for name, value in {**outer.globals, **outer.nonlocals}.items():
        yield from _tensors_in(name, value)
    for value in (*(closure.__defaults__ or ()), *(closure.__kwdefaults__ or {}).values()):
        yield from _tensors_in("an argument", value)


def _tensors_in(name: str, value: Any) -> Iterable[tuple[str, Tensor]]:
    """Yield the tensors in a variable; of an object, those in its attributes."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple | dict):
        yield from _items(name, value)
    elif not isinstance(value, ModuleType | type | torch.optim.Optimizer) and not inspect.isroutine(value):
        for attribute, held in getattr(value, "__dict__", {}).items():
            found = [(f"{name}.{attribute}", held)] if isinstance(held, Tensor) else _items(f"{name}.{attribute}", held)
            # of a module, only inputs: SAM protects the rest of it
            yield from ((k, t) for k, t in found if not isinstance(value, nn.Module) or _may_be_input(t))


def _items(name: str, value: Any) -> Iterable[tuple[str, Tensor]]:
    if isinstance(value, list | tuple | dict):
        items = value.values() if isinstance(value, dict) else value
        yield from ((f"{name}, number {i}", item) for i, item in enumerate(items) if isinstance(item, Tensor))


def _may_be_input(tensor: Tensor) -> bool:
    return tensor.requires_grad and not isinstance(tensor, nn.Parameter)


def _check_unchanged(watched: dict[str, tuple[Tensor, int]], engine: Engine) -> None:
    """Warn once if a later pass has changed a tensor of the closure's surroundings; seen in the first step only."""
    engine.closure_watched = True
    changed = [name for name, (tensor, version) in watched.items() if tensor._version != version]
    if changed:
        engine.warn_once(
            "in place",
            f"the closure changes a tensor in place ({'; '.join(changed)}), and it runs once a pass: an input that is "
            "changed in place is another one in the second pass, and a sum is counted twice. Change a copy, or change "
            "it only where optimizer.current_pass.is_first",
        )
