"""The graph of a tensor, and derivatives of derivatives."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

# The node that `once_differentiable` puts into a graph: torch returns zeros for the derivative.
_ONCE_DIFFERENTIABLE = "torch::autograd::Error"
# Nodes of torch with a wrong second derivative, by the begin of their name: this one holds the norm |v| constant.
_WRONG = {"WeightNormInterface": "torch's weight_norm has a wrong second derivative"}

_LATEST = 32
"""Number of nodes at the end of a graph in which saved tensors are looked for."""


class NoSecondDerivativeError(RuntimeError):
    """An operation of a model has no second derivative, or a wrong one."""

    def __init__(self, why: object) -> None:
        super().__init__(
            f"An operation of this model has no second derivative ({why}), but the Hessian needs it: for this use an "
            "implementation in plain torch operations (attention: F.scaled_dot_product_attention, "
            "attn_implementation='eager')"
        )


def graph(*roots: Any) -> Iterator[Any]:
    """Yield the nodes of the graph below some nodes, each once, depth first."""
    todo = [node for node in roots if node is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        new = [following for following, _ in node.next_functions if following is not None and following not in seen]
        seen.update(new)
        todo += new


def keeps_saved_tensors(root: Any) -> bool:
    """Return True if a graph holds the tensors that its latest nodes saved: no backward ran, or one that retained it.

    False also where these nodes have saved none.

    >>> loss = torch.ones(2, requires_grad=True).square().sum()
    >>> keeps_saved_tensors(loss.grad_fn), loss.backward(), keeps_saved_tensors(loss.grad_fn)
    (True, None, False)
    """
    found = False
    for node in islice(graph(root), _LATEST):
        kind: Any = type(node)
        for name in _saved_names(kind):
            try:
                value = getattr(node, name)
            except RuntimeError:  # freed by a backward
                return False
            found = found or isinstance(value, Tensor) or (isinstance(value, tuple) and any(map(_is_tensor, value)))
    return found


@lru_cache(maxsize=256)  # each compiled graph has a kind of its own
def _saved_names(kind: Any) -> list[str]:
    """Return the attributes of a kind of node in which there may be saved tensors."""
    return [name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors"]


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def leaves(tensor: Tensor) -> set[int]:
    """Return the ``id`` of each leaf that a tensor is a function of, as far as it can be differentiated."""
    if tensor.grad_fn is None:
        return {id(tensor)} if tensor.requires_grad else set()
    found = (getattr(node, "variable", None) for node in graph(tensor.grad_fn))
    return {id(variable) for variable in found if variable is not None}


def derivatives(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    along: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> tuple[Tensor, ...]:
    """Return ``torch.autograd.grad``, in which an input that is not used has the derivative 0."""
    return torch.autograd.grad(
        outputs,
        inputs,
        along,
        retain_graph=retain_graph,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def check_twice_differentiable(gradient: Sequence[Tensor | None]) -> None:
    """Refuse to differentiate a gradient, made with its graph, where torch would return a wrong result.

    Raises:
        NoSecondDerivativeError: A function that is marked ``once_differentiable``, or one of torch's own that is wrong.
    """
    for node in graph(*(g.grad_fn for g in gradient if g is not None)):
        name = node.name()
        if name == _ONCE_DIFFERENTIABLE:
            raise NoSecondDerivativeError("it is marked once_differentiable")
        for begin, why in _WRONG.items():
            if name.startswith(begin):
                raise NoSecondDerivativeError(why)
