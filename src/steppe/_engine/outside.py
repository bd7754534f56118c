"""Notice what the passes change outside of ``model=``, and a second pass that does not run the model."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from steppe._engine.attributes import Attributes, may_assign_attributes
from steppe._engine.callers import warn
from steppe._engine.forwards import may_watch_forwards, watch_forwards
from steppe._engine.model_state import is_writable
from steppe._tensors.dtensor import all_plain

_FUNCTIONAL = "for torch.func.functional_call, a module that holds the parameters and buffers that it is given"
_COUNTER = "num_batches_tracked"
"""BatchNorm's counter of batches: it has an effect only if the running mean is cumulative (momentum=None)."""


class OutsideWatch:
    """Watches the passes of one step, and finds the modules outside of ``model=`` that both of them change.

    With ``model=``, these modules are left as the first pass left them, as if they were in it.

    Args:
        model: The module that SAM protects; None without ``model=``.
        owned: The optimizer's parameters.
    """

    def __init__(self, model: nn.Module | None, owned: Sequence[Tensor]) -> None:
        self._model = model
        self._owned = owned
        self._inside: set[int] = set()
        self._tensors_inside: set[int] = set()
        self._seen: dict[int, OutsideModule] = {}
        self._touched_first: dict[int, OutsideModule] = {}
        self._model_ran = False
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._nodes_before = 0
        self._stop: Callable[[], None] | None = None
        self._message = ""
        self.ended = False
        """True after the second pass."""
        self.found: list[nn.Module] = []
        """Modules outside of ``model=`` that both passes changed."""

    def begin_first_pass(self) -> None:
        """Begin to watch the first pass."""
        self.stop()
        self._touched_first = {}
        if self._model is not None:
            self._watch()

    def begin_second_pass(self, excluded: set[int]) -> None:
        """Begin to watch the second pass, before the gradients of the first one are cleared.

        Args:
            excluded: Modules of other SAM optimizers that are in a step, which protect them themselves.
        """
        self.stop()
        self._touched_first = {
            key: module for key, module in self._seen.items() if key not in excluded and module.is_touched()
        }
        for module in self._touched_first.values():
            module.begin_second_pass()
        smallest = sorted((p for p in self._owned if p.grad is not None), key=Tensor.numel)[:4]
        self._gradients = [(p, p.grad.detach().clone()) for p in smallest if p.grad is not None]
        self._watch()
        self._nodes_before = number_of_nodes()

    def _watch(self) -> None:
        modules = list(self._model.modules()) if self._model is not None else []
        self._seen, self._model_ran = {}, False
        if may_watch_forwards():
            self._inside = set(map(id, modules))
            tensors = [*self._owned, *(t for m in modules for t in (*m.parameters(False), *m.buffers(False)))]
            self._tensors_inside = set(map(id, tensors))
            self._stop = watch_forwards(self._before_forward)

    def stop(self) -> None:
        """Stop watching."""
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()

    def _before_forward(self, module: nn.Module) -> None:
        if id(module) in self._inside:
            self._model_ran = True
        elif id(module) not in self._seen:
            # all of its modules: it may change them before it runs them, or without running them
            for part in module.modules():
                if id(part) not in self._inside and id(part) not in self._seen:
                    self._seen[id(part)] = OutsideModule(part, self._tensors_inside)

    def end(self, excluded: set[int]) -> None:
        """End the second pass, also after an exception, and keep what was found for :meth:`warn`."""
        watched = self._stop is not None
        self.stop()
        self.ended = True
        touched = {key: module for key, module in self._seen.items() if key not in excluded and module.is_touched()}
        self.found = [module.module for module in touched.values()]
        if watched:
            made = number_of_nodes() - self._nodes_before - 1  # less the one that was made to count
            self._message = self._from_w(made) or self._outside(list(touched.values()))
        for key, module in self._touched_first.items():
            module.end_second_pass(gradients=key in touched)
        self._seen, self._touched_first, self._gradients = {}, {}, []

    def warn(self) -> None:
        """Warn of what was found."""
        message, self._message = self._message, ""
        if message:
            warn(message)

    def _from_w(self, nodes: int) -> str:
        """Return a message if the second pass has the gradient of the first without having run the model.

        A loss may be computed by a method of the model, and its gradient may be the same at w + e (a hinge; rho = 0).

        Args:
            nodes: Number of nodes that the second pass has added to graphs. More than one, such as the product with a
                loss scale, are taken for a forward.
        """
        if self._model is None or self._model_ran or not self._gradients or nodes > 1:
            return ""
        if not all_plain([gradient for _, gradient in self._gradients]):
            return ""  # sharded: each rank would have to read all of them; and fake tensors have no values
        if not all(p.grad is not None and torch.equal(p.grad, gradient) for p, gradient in self._gradients):
            return ""
        if not any(gradient.count_nonzero() for _, gradient in self._gradients):
            return ""
        return (
            "the second pass did not run the model, and its gradient is that of the first pass: the loss was computed "
            "before the pass, at w, so this is a plain step at twice the cost. Compute the loss inside each pass: "
            "forward and backward in the closure, or in `with sam_pass:`"
        )

    def _outside(self, touched: Sequence["OutsideModule"]) -> str:
        """Return a message that names modules outside of ``model=`` that the second pass has changed."""
        changed = [o.module for o in touched if o.has_changed_buffers()]
        moved = [o.module for o in touched if o.has_written_parameters()]
        trained = [o.module for o in touched if o.has_new_gradients()]
        what = [f"the buffers (running statistics, ...) of {self._names(changed)}"] if changed else []
        if moved:
            what.append(f"parameters without gradients of {self._names(moved)}")
        if trained:
            what.append(f"gradients of {self._names(trained)}, which this optimizer does not train")
        if not what:
            return ""
        if self._model is None:
            return (
                f"both passes changed {' and '.join(what)}: without model=, SAM does not undo what the second pass, at "
                "w + e, changes beside its own parameters. Give SAM the module that the passes run, model=model, "
                f"several in a list; {_FUNCTIONAL}"
            )
        return (
            f"both passes changed {' and '.join(what)}, but model= does not hold these modules. They are protected "
            "from now on, as far as this step has shown them; give model= all modules that the passes run, in a list, "
            f"model=[model, ...]; {_FUNCTIONAL}"
        )

    def _names(self, modules: Iterable[nn.Module]) -> str:
        """Return the names of the outermost modules, and in each those of the modules."""
        parts: dict[str, list[str]] = {}
        for module in modules:
            top = next(o.module for o in self._seen.values() if any(m is module for m in o.module.modules()))
            name = next(k for k, m in top.named_modules() if m is module)
            parts.setdefault(type(top).__name__, []).append(f"{name!r}" if name else "")
        return ", ".join(
            f"{top} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names[0] else top
            for top, names in parts.items()
        )


class OutsideModule:
    """A module that is not in ``model=``: its own buffers, attributes and gradients before it ran in a pass.

    Attributes are restored in this step already. So no warning names them: one that is only assigned again in each pass
    (the last loss) would be named, too.

    Args:
        module: The module.
        inside: Tensors that are protected anyway.
    """

    def __init__(self, module: nn.Module, inside: set[int]) -> None:
        self.module = module
        self._buffers = {
            name: (b, b.detach().clone(), b._version)
            for name, b in module.named_buffers(recurse=False)
            if id(b) not in inside and is_writable(b)
        }
        self._attributes = Attributes(module, set()) if may_assign_attributes(module) else None
        self._attributes_after = self._attributes
        self._tensors = [(t, t.clone()) for t in self._attributes.tensors if is_writable(t)] if self._attributes else []
        self._untrained = [
            (p, p._version, p.data_ptr())
            for p in module.parameters(recurse=False)
            if not p.requires_grad and id(p) not in inside and is_writable(p) and all_plain([p])
        ]
        self._gradients = [
            (p, p.grad, None if p.grad is None else p.grad._version)
            for p in module.parameters(recurse=False)
            if p.requires_grad and p.is_leaf and id(p) not in inside  # functional_call may run it with others
        ]
        self._after: list[tuple[Tensor, Tensor]] = []
        self._gradients_after: list[tuple[Tensor, Tensor | None]] = []

    def is_touched(self) -> bool:
        """True if a pass has changed a buffer, an attribute, an untrained parameter or a gradient."""
        return (
            self.has_changed_buffers()
            or self.has_new_gradients()
            or self.has_written_parameters()
            or (self._attributes is not None and self._attributes.are_changed())
        )

    def has_written_parameters(self) -> bool:
        """True if a parameter without a gradient was written."""
        return any((p._version, p.data_ptr()) != (version, address) for p, version, address in self._untrained)

    def has_changed_buffers(self) -> bool:
        """True if a buffer has another value. On an accelerator, values are read only if the buffer was written."""
        now = dict(self.module.named_buffers(recurse=False))
        counted = getattr(self.module, "momentum", 0.0) is None
        return any(
            now.get(name) is not buffer
            or ((buffer.is_cpu or buffer._version != version) and not _equal(buffer, before))
            for name, (buffer, before, version) in self._buffers.items()
            if name != _COUNTER or counted
        )

    def has_new_gradients(self) -> bool:
        """True if a gradient was written."""
        return any(
            p.grad is not None and (p.grad is not gradient or p.grad._version != version)
            for p, gradient, version in self._gradients
        )

    @torch.no_grad()
    def begin_second_pass(self) -> None:
        """Save the state after the first pass, and restore the buffers from before it."""
        own = [(b, before) for b, before, _ in self._buffers.values()]
        own = [(t, before) for t, before in (*own, *self._tensors) if t.shape == before.shape]
        self._after = [(b, b.clone()) for b, _ in own]
        self._gradients_after = [(p, None if p.grad is None else p.grad.clone()) for p, _, _ in self._gradients]
        if self._attributes is not None:
            self._attributes_after = Attributes(self.module, set())
            self._attributes.restore()
        for buffer, before in own:
            buffer.copy_(before)

    @torch.no_grad()
    def end_second_pass(self, *, gradients: bool) -> None:
        """Restore the buffers after the first pass; with ``gradients``, its gradients too."""
        if self._attributes_after is not None:
            self._attributes_after.restore()
        for buffer, after in self._after:
            buffer.copy_(after)
        if gradients:
            for p, gradient in self._gradients_after:
                p.grad = gradient


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def number_of_nodes() -> int:
    """Return the number of nodes of graphs that this thread has made so far, including one that this function makes."""
    # A private name of torch: the numbers by which a backward runs the nodes of a graph, latest first.
    with torch.enable_grad():
        return int(torch.zeros((), requires_grad=True).clone().grad_fn._sequence_nr())  # type: ignore[union-attr]
